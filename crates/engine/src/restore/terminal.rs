//! Steps by which a session gets its controlling terminal, and a process group its foreground.

use super::build::op;
use super::read::Alive;
use rewake_objects::files::pty::Controlling;
use rewake_objects::steps::{Label, Steps};

/// Makes a terminal control the session that the task leads.
pub(super) fn terminal_steps(steps: &mut Steps, terminal: &Controlling) {
    let label = Label::Text("getting the session's terminal");
    let path = steps.script.cstr(&terminal.path);
    let flags = (libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) as u64;
    let open = op(libc::SYS_openat, &[libc::AT_FDCWD as u64, path.address, flags]);
    let take = [0, libc::TIOCSCTTY, u64::from(terminal.force)];
    let take = op(libc::SYS_ioctl, &take);
    if terminal.must {
        let fd = steps.must(label, open) as u32;
        steps.must(label, take.arg_result(0, fd, 0));
        steps.must(label, op(libc::SYS_close, &[0]).arg_result(0, fd, 0));
    } else {
        let fd = steps.wish(label, open) as u32;
        steps.wish(label, take.arg_result(0, fd, 0));
        steps.may(label, op(libc::SYS_close, &[0]).arg_result(0, fd, 0));
    }
}

/// Puts a process group in the foreground of the terminal, whose session the task leads.
pub(super) fn foreground_steps(steps: &mut Steps, terminal: &Controlling, alive: &Alive) {
    let label = Label::Text("putting a process group in the foreground of the terminal");
    let group = steps.words(&[terminal.group as u64]);
    let set = |fd: u64| op(libc::SYS_ioctl, &[fd, libc::TIOCSPGRP, group.address]);
    if let Some(own) = alive.fds.iter().find(|f| terminal.files.contains(&f.id)) {
        steps.wish(label, set(u64::from(own.fd)));
        return;
    }
    let path = steps.script.cstr(b"/dev/tty");
    let flags = (libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) as u64;
    let open = op(libc::SYS_openat, &[libc::AT_FDCWD as u64, path.address, flags]);
    let fd = steps.wish(label, open) as u32;
    steps.wish(label, set(0).arg_result(0, fd, 0));
    steps.may(label, op(libc::SYS_close, &[0]).arg_result(0, fd, 0));
}
