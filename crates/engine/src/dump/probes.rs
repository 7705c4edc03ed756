//! What probes of user space have done to a task, which images do not hold: [`uprobes`].

use super::inside::Inside;
use super::outside::Outside;
use crate::error::{Context, Error, Result};
use crate::freeze::Task;
use rewake_objects::memory::uprobes::{self, Busy, Thread};
use rewake_objects::problem::text;
use std::fs::File;

/// Takes breakpoints and the kernel's pages out of what is saved of a task that stands still.
///
/// # Errors
/// The task is gone; [`Error::transient`] where a thread is in such a page at this moment.
pub(super) fn leave_out(task: &Task, outside: &mut Outside, inside: &mut Inside) -> Result<()> {
    let (pid, comm, tid) = (task.pid(), task.comm(), outside.tid);
    let (vmas, runs, memory) = (&outside.vmas, &mut outside.runs, &outside.memory);
    let threads: Vec<Thread> = inside
        .cores
        .iter()
        .filter_map(|(tid, core)| {
            let registers = &core.thread_info.as_ref()?.gpregs;
            Some(Thread { tid: *tid, ip: registers.ip, sp: registers.sp })
        })
        .collect();
    match uprobes::busy(vmas, runs, memory, &threads).map_err(|e| e.to_string()).of(pid, comm)? {
        None => {}
        Some(Busy::Returns(problem)) => inside.problems.push(problem),
        Some(Busy::Inside(thread)) => {
            let name = format!("process {pid} ({})", text(comm));
            let mut error = Error::new(format!(
                "{name}: thread {thread} is in a page of the kernel's for probes (uprobes)"
            ))
            .hint("try again, or detach whoever probes it");
            error.transient = true;
            return Err(error);
        }
    }
    let open =
        |start: u64, end: u64| File::open(format!("/proc/{tid}/map_files/{start:x}-{end:x}"));
    uprobes::leave_out(vmas, runs, memory, |vma| open(vma.entry.start, vma.entry.end))
        .map_err(|e| format!("comparing its code with the files: {e}"))
        .of(pid, comm)?;
    outside.vmas.retain(|vma| !uprobes::is_kernels(vma));
    Ok(())
}
