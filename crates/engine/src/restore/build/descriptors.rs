//! How descriptors get from the controller to a task: through a socket, whose number nothing else will ever have.

use super::super::read::{Alive, Task};
use super::{Environment, FIRST_LENT, Handed, op};
use crate::error::{Error, Result};
use rewake_image::messages::VmaEntry;
use rewake_objects::Problem;
use rewake_objects::memory::vma::status;
use rewake_objects::steps::{Label, Steps};

/// Descriptors passed in one message (the kernel's SCM_MAX_FD is 253).
pub const A_MESSAGE: usize = 250;

/// How many descriptors a stub may have.
fn open_files(env: &Environment) -> u32 {
    let (limit, _) = env.limits.get(7).copied().unwrap_or((1024, 1024));
    limit.min(1 << 30) as u32
}

/// A number for an agent's socket beyond so many descriptors that are lent, if a stub may have so many. Not a high one: the
/// kernel's table of descriptors grows up to it, and stays as large as it has become.
pub fn number_beyond(lent: usize, env: &Environment) -> u32 {
    /// The socket pair, pages, and whatever else is lent but not for a mapping.
    const SPARE: usize = 16;
    // What is lent gets the lowest numbers that are free.
    ((lent + SPARE).min(1 << 30) as u32).min(open_files(env).saturating_sub(1))
}

/// A number for the agent's socket that neither the task's descriptors nor what is lent to those that share them will ever have.
/// `table` is the first task that has them.
pub(super) fn socket_number(tasks: &[Task], table: usize, env: &Environment) -> Result<i32> {
    let limit = open_files(env);
    let users = || tasks.iter().filter(|t| t.part.table == table).filter_map(|t| t.alive.as_ref());
    let fds = users().next().map_or(&[][..], |alive| &alive.fds);
    let files = |alive: &Alive| alive.mm.vmas.iter().filter(|v| v.shmid != 0).count();
    let stores = |alive: &Alive| pages(alive).count();
    let files = users().map(|alive| files(alive) + stores(alive)).max().unwrap_or(0);
    // Those who share descriptors keep what is lent at birth until all are born.
    let files = files + if users().count() > 1 { FIRST_LENT + env.lent.len() } else { 0 };
    let beyond = fds.last().map_or(0, |f| f.fd.saturating_add(1));
    let lent = number_beyond(2 * fds.len() + files, env);
    let mut number = lent.max(beyond).min(limit.saturating_sub(1));
    for taken in fds.iter().rev().map(|f| f.fd) {
        if taken < number {
            break;
        }
        if taken == number {
            number = number.saturating_sub(1);
        }
    }
    if fds.iter().any(|f| f.fd == number) {
        return Err(Error::new(format!(
            "every descriptor below the limit of {limit} open files that this command may raise to is one of the images', and \
             one more is needed while they are put in place"
        ))
        .hint("raise the hard limit of open files by one (ulimit -Hn)"));
    }
    let above = fds.last().map_or(0, |f| f.fd);
    if above >= limit {
        return Err(Error::new(format!(
            "descriptor {above} of the images is beyond the limit of {limit} open files that this command may raise to"
        ))
        .hint("raise the hard limit of open files (ulimit -Hn)"));
    }
    Ok(number as i32)
}

/// Makes the socket through which descriptors come; the agent's end gets `number`. Returns where the numbers of the pair are.
pub fn socket_steps(steps: &mut Steps, number: i32) -> rewake_inject::ring::Data {
    let label = Label::Text("making the agent's socket");
    let cell = steps.data(&[0xff; 8]);
    let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
    steps.must(label, op(libc::SYS_socketpair, &[1, kind, 0, cell.address]));
    steps.must(
        label,
        op(libc::SYS_dup3, &[0, number as u64, libc::O_CLOEXEC as u64]).arg_deref(0, cell.address),
    );
    steps.must(label, op(libc::SYS_close, &[0]).arg_deref(0, cell.address));
    cell
}

/// Is this a mapping of a file?
pub fn is_file(vma: &VmaEntry) -> bool {
    vma.status & (status::FILE_PRIVATE | status::FILE_SHARED | status::SOCKET) != 0
}

/// The pages files of a task that it has pages in.
pub fn pages(alive: &Alive) -> impl Iterator<Item = Handed> {
    alive.pages.iter().flat_map(|pages| pages.stores()).map(Handed::Pages)
}

/// Receives one message with `count` descriptors through the agent's socket.
pub fn receive(steps: &mut Steps, socket: i32, count: usize) {
    let byte = steps.data(&[0; 8]);
    let iov = steps.words(&[byte.address, 1]);
    let room = 16 + (count * 4).next_multiple_of(8);
    let control = steps.script.space(room);
    // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags
    let header = steps.words(&[0, 0, iov.address, 1, control.address, room as u64, 0]);
    steps.must_be(
        Label::Text("receiving descriptors"),
        1,
        op(libc::SYS_recvmsg, &[socket as u64, header.address, 0]),
    );
}

/// What a mapping of a file needs: images may name a description that is not open for writing.
pub fn mapped(vma: &VmaEntry) -> std::result::Result<Handed, Problem> {
    let id = u32::try_from(vma.shmid).map_err(|_| {
        Problem::new(Label::Vma(vma.start, vma.end).to_string(), "its file id is out of range")
    })?;
    let shared = vma.status & status::FILE_SHARED != 0;
    let writable = vma.fdflags.unwrap_or(0) & libc::O_ACCMODE as u32 == libc::O_RDWR as u32
        || vma.prot & libc::PROT_WRITE as u32 != 0;
    Ok(if shared && writable { Handed::Writable(id) } else { Handed::File(id) })
}
