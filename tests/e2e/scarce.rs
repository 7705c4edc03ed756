//! A restore with less memory than the tree needs.

use crate::flavours::{finish, started};
use crate::harness::{Fs, NotReady, Tool};
use crate::programs::by_name;
use crate::refusals::refused;
use crate::{no_excuses, trial};
use libtest_mimic::Trial;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// All trials with little memory.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let tool = tool.clone();
    vec![trial("scarce::restore_without_memory".into(), move || finish(no_memory(&tool)))]
}

/// A control group with a limit of its memory, which goes when it is dropped.
struct Limited(PathBuf);

impl Limited {
    /// In the control group of this process, of whichever version; `None` if none can be made.
    fn new(bytes: u64) -> Option<Limited> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let name = format!("rewake-e2e-{}-memory", std::process::id());
        let places = groups.lines().filter_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let path = path.trim_start_matches('/');
            match controllers {
                "memory" => Some((PathBuf::from("/sys/fs/cgroup/memory"), "memory.limit_in_bytes")),
                "" => Some((PathBuf::from("/sys/fs/cgroup"), "memory.max")),
                _ => None,
            }
            .map(|(mount, file)| (mount.join(path).join(&name), file))
        });
        for (place, file) in places {
            if fs::create_dir(&place).is_err() {
                continue;
            }
            let limited = Limited(place);
            if fs::write(limited.0.join(file), bytes.to_string()).is_ok() {
                return Some(limited);
            }
        }
        None
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        // Whoever was in it may not be gone quite yet.
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// Less memory than the tree needs: all are ended, and the error has the sizes.
fn no_memory(tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu && !no_excuses() {
        return Err(NotReady::Skip("CRIU does not tell".into()));
    }
    let Some(group) = Limited::new(64 << 20) else {
        return Err(NotReady::Skip("no control group with a limit can be made".into()));
    };
    let program = by_name("memory_dense")?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, program.dump_options)?;
    run.gone(&before.pids(), "after the dump")?;
    let script = format!("echo $$ >'{}' && exec \"$@\"", group.0.join("cgroup.procs").display());
    let limited = |command: &mut Command| {
        let mut words = vec![command.get_program().to_owned()];
        words.extend(command.get_args().map(ToOwned::to_owned));
        *command = Command::new("sh");
        command.args(["-c", &script, "sh"]).args(words);
    };
    let done = run.try_restore_with(tool, &images, &[], limited)?;
    let told = ["the memory of the tree takes", "kB are available", "may have 65536 kB"];
    refused(&run, tool, &done, &images.join("restore.log"), &told)?;
    run.gone(&before.pids(), "after the refused restore")?;
    run.restore(tool, &images, program.restore_options)?;
    run.check(&before)?;
    Ok(())
}
