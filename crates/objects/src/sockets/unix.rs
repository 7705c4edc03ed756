//! Dumping unix sockets: unix(7). Who is connected to whom, and the addresses, tells unix_diag.

use super::{SOCKETS_NETNS, Survey, holder, options, queue};
use crate::Problem;
use crate::files::collect::{Collector, View};
use crate::problem::text;
use rewake_image::messages::{FdTypes, FileEntry, FilePermsEntry, SkPacketEntry, UnixSkEntry};
use rewake_netlink::diag;
use rewake_sys::sockets::bound_file;
use rustix::fd::AsRawFd;
use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;

/// `TCP_ESTABLISHED`
pub const ESTABLISHED: u8 = 1;
/// `TCP_LISTEN`
pub const LISTEN: u8 = 10;
const BOTH: u8 = 3;

/// A unix socket of the tree.
#[derive(Debug)]
pub(crate) struct Found {
    pid: i32,
    object: String,
    /// The inode number of the peer it needs.
    peer: u32,
}

/// Surveys a unix socket; `kind` is `SOCK_*`.
///
/// # Errors
/// Descriptors or connections are in flight in it.
pub fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    kind: i32,
) -> Result<(u32, FdTypes), Problem> {
    if !matches!(kind, libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_SEQPACKET) {
        return Err(view.problem(format!("unix sockets of type {kind} cannot be saved")));
    }
    let inode = view.stat.st_ino as u32;
    let record = collector
        .sockets
        .unix(inode)
        .map_err(|e| view.problem(format!("sock_diag does not tell its state: {e}")))?
        .ok_or_else(|| {
            view.problem("sock_diag does not know it: it is of another network namespace")
        })?
        .clone();
    check(collector, view, &record)?;
    let mut entry = UnixSkEntry {
        id: collector.new_id(),
        ino: inode,
        r#type: kind as u32,
        state: record.state.into(),
        flags: view.flags,
        backlog: record.send_queue,
        peer: record.peer.unwrap_or(0),
        fown: view.owner()?,
        opts: options::survey(view, true)?,
        shutdown: (record.shutdown != 0).then_some(record.shutdown.into()),
        ns_id: Some(SOCKETS_NETNS),
        name: record.name,
        ..UnixSkEntry::default()
    };
    if entry.name.first().is_some_and(|first| *first != 0) {
        survey_file(view, &mut entry)?;
    }
    let id = entry.id;
    if record.state != LISTEN && (kind == libc::SOCK_DGRAM || record.state == ESTABLISHED) {
        for data in queue::read(view, kind)? {
            let packet = SkPacketEntry { id_for: id, length: data.len() as u32, scm: Vec::new() };
            collector.sockets.packets.push((packet, data));
        }
    }
    let found = Found { pid: view.pid, object: view.object(), peer: entry.peer };
    collector.sockets.unix.insert(inode, found);
    collector.push(FileEntry {
        r#type: FdTypes::Unixsk as i32,
        id,
        usk: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Unixsk))
}

/// Whether the state of a socket is one that can be saved.
fn check(collector: &Collector, view: &View<'_>, record: &diag::Unix) -> Result<(), Problem> {
    if record.state == LISTEN && !record.waiting.is_empty() && !collector.options.skip_in_flight {
        let count = record.waiting.len();
        return Err(view
            .problem(format!(
                "unix socket listening at {}: {count} connections wait to be accepted, which cannot be saved yet",
                shown(&record.name)
            ))
            .remedy("--skip-in-flight drops them: their clients have to connect again"));
    }
    // The peer of a connection not accepted yet has no inode; nor has one that is closed, but then so are both directions.
    let stream = i32::from(record.kind) != libc::SOCK_DGRAM;
    if stream && record.state == ESTABLISHED && record.peer == Some(0) && record.shutdown != BOTH {
        if collector.options.skip_in_flight {
            return Ok(());
        }
        return Err(view
            .problem("its connection waits to be accepted, which cannot be saved yet")
            .remedy("--skip-in-flight drops it; or try again once it is accepted"));
    }
    Ok(())
}

/// The file a socket is bound to: owner and mode, whether it is still there, and from where it was named.
fn survey_file(view: &View<'_>, entry: &mut UnixSkEntry) -> Result<(), Problem> {
    let failed =
        |e: String| view.problem(format!("the file it is bound to cannot be examined: {e}"));
    let file = bound_file(view.as_fd()).map_err(|e| failed(e.to_string()))?;
    let stat = rustix::fs::fstat(&file).map_err(|e| failed(e.to_string()))?;
    entry.file_perms =
        Some(FilePermsEntry { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid });
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(|e| failed(e.to_string()))?;
    let link = link.as_os_str().as_bytes();
    let (path, deleted) = match link.strip_suffix(b" (deleted)") {
        Some(path) if stat.st_nlink == 0 => (path, true),
        _ => (link, stat.st_nlink == 0),
    };
    entry.deleted = deleted.then_some(true);
    let name = entry.name.strip_suffix(b"\0").unwrap_or(&entry.name);
    if name.first() == Some(&b'/') {
        if !deleted && path != name {
            log::warn!(
                "{}: the file it is bound to, {}, is now {}; it comes back under its old name",
                view.object(),
                text(name),
                text(path)
            );
        }
        return Ok(());
    }
    let relative = name.strip_prefix(b"./").unwrap_or(name);
    match path.strip_suffix(relative).and_then(|dir| dir.strip_suffix(b"/")) {
        Some(dir) => {
            entry.name_dir = Some(if dir.is_empty() { b"/".to_vec() } else { dir.to_vec() });
            Ok(())
        }
        None => Err(view.problem(format!(
            "it is bound to the relative path {}, which is now {}: from where it was named cannot be told",
            text(name),
            text(path)
        ))),
    }
}

/// An address as text.
#[must_use]
pub(super) fn shown(name: &[u8]) -> String {
    match name.split_first() {
        None => "(no address)".to_owned(),
        Some((0, name)) => format!("@{}", text(name)),
        Some(_) => text(name.strip_suffix(b"\0").unwrap_or(name)),
    }
}

impl Survey {
    /// What stands in the way once all tasks are surveyed: pid and problem of each socket whose peer is not in the tree.
    #[must_use]
    pub fn obstacles(&self) -> Vec<(i32, Problem)> {
        self.unix
            .values()
            .filter(|found| found.peer != 0 && !self.unix.contains_key(&found.peer))
            .map(|found| {
                let peer = self.unix_table.as_ref().and_then(|table| table.get(&found.peer));
                // A client is known by the address of the server that it has called.
                let at = peer.filter(|p| !p.name.is_empty());
                let at = at.map_or_else(String::new, |p| format!(" at {}", shown(&p.name)));
                let who = holder::of_inodes(&HashSet::from([found.peer]))
                    .unwrap_or_else(|| "a process that cannot be found".to_owned());
                let problem = Problem::new(
                    found.object.clone(),
                    format!("unix socket connected to {who}{at}, outside the tree"),
                )
                .remedy(
                    "have the program close the connection, or checkpoint both; --ext-unix-sk and --external unix[INODE] are not supported yet",
                );
                (found.pid, problem)
            })
            .collect()
    }
}
