//! What the images say of unix sockets, checked before anything exists: a hostile image must not be able to do more than
//! to be refused.

use super::unix::{CLOSE, ESTABLISHED, EXTERNAL, LISTEN};
use super::unix_open::{State, describe};
use crate::Problem;
use crate::files::open::Opener;
use rewake_image::kind;
use rewake_image::messages::{SkShutdown, UnixSkEntry};
use rewake_sys::message::MAX_RIGHTS;
use std::collections::{HashMap, HashSet};

/// More bytes than a message, and than a queue, can have: the kernel counts buffers in an `int`.
const MAX_MESSAGE: usize = 1 << 30;
const MAX_QUEUE: usize = 1 << 31;
/// Room for an address in `struct sockaddr_un`.
const ADDRESS: usize = 108;
/// Flags of [`UnixSkEntry::uflags`] that somebody else must handle: CRIU's service, a plugin.
const FOREIGN: u32 = !(EXTERNAL | INHERITED);
const INHERITED: u32 = 8;

/// Reads and checks what the images say of unix sockets and their queues; opens nothing.
///
/// # Errors
/// It cannot be.
pub fn load(opener: &mut Opener<'_>) -> Result<(), Problem> {
    if std::mem::replace(&mut opener.sockets.unix_loaded, true) {
        return Ok(());
    }
    let damaged = |name: &str, e: rewake_image::ImageError| Problem::new(name, e.to_string());
    for entry in opener.files.values().filter_map(|file| file.usk.as_deref()) {
        let extra = opener.extra.get(&entry.id).and_then(|e| e.unix.clone()).unwrap_or_default();
        let state = State::new(entry.clone(), extra);
        if opener.sockets.unix.insert(entry.ino, state).is_some() {
            return Err(problem(entry, "the images have two sockets with its inode number"));
        }
    }
    let unix = &opener.sockets.unix;
    unix.values().try_for_each(|state| check(state, unix))?;
    check_partners(unix)?;
    let lines = lines(opener)?;
    let queues = opener
        .images
        .read_with_payload(kind::SK_QUEUES, ())
        .map_err(|e| damaged("sk-queues.img", e))?;
    if queues.is_empty() {
        return Ok(());
    }
    let mut extras = HashMap::new();
    for entry in opener.images.read_all(kind::REWAKE, ()).map_err(|e| damaged("rewake.img", e))? {
        if let Some(packet) = entry.packet {
            if !matches!(packet.credentials.len(), 0 | 3)
                || packet.sender.as_deref().is_some_and(|name| bad_name(name).is_some())
            {
                return Err(Problem::new(
                    "rewake.img",
                    format!("what it says of a message for file id {} is damaged", packet.id_for),
                ));
            }
            extras.insert((packet.id_for, packet.index), packet);
        }
    }
    let by_id: HashMap<u32, &UnixSkEntry> =
        opener.sockets.unix.values().map(|state| (state.entry.id, &*state.entry)).collect();
    let mut read = HashMap::new();
    let mut total: HashMap<u32, usize> = HashMap::new();
    for (packet, data) in queues {
        let id = packet.id_for;
        let entry = by_id.get(&id).filter(|entry| receives(entry)).copied();
        let Some(entry) = entry.or_else(|| lines.get(&id).copied()) else {
            return Err(Problem::new(
                "sk-queues.img",
                format!("it has a message for file id {id}, which is no socket that receives any"),
            ));
        };
        let size = total.entry(id).or_default();
        *size += data.len();
        if data.len() > MAX_MESSAGE || *size > MAX_QUEUE {
            return Err(problem(entry, "its receive queue is longer than any queue can be"));
        }
        if packet.scm.len() > 1 || packet.scm.iter().any(|scm| scm.r#type != RIGHTS) {
            return Err(problem(
                entry,
                "a message in its queue has control messages other than one list of descriptors",
            ));
        }
        let rights = packet.scm.first().map_or(&[][..], |scm| scm.rights.as_slice());
        if rights.len() > MAX_RIGHTS {
            let reason = format!("a message in its queue has more than {MAX_RIGHTS} descriptors");
            return Err(problem(entry, reason));
        }
        let external = |id: &u32| by_id.get(id).is_some_and(|e| e.uflags & EXTERNAL != 0);
        if let Some(id) = rights.iter().find(|id| !opener.files.contains_key(id) || external(id)) {
            return Err(problem(
                entry,
                format!("file id {id} is in flight in it, which the images do not have"),
            ));
        }
        let queue = read.entry(id).or_insert_with(Vec::new);
        let extra = extras.remove(&(id, queue.len() as u32)).unwrap_or_default();
        if extra.oob == Some(true) && (data.len() != 1 || entry.r#type as i32 != libc::SOCK_STREAM)
        {
            return Err(problem(entry, "a message out of band in its queue is not one byte"));
        }
        queue.push((packet, data, extra));
    }
    opener.sockets.packets = read;
    Ok(())
}

/// The queues of connections that wait to be accepted, by their ids, with the sockets where they do.
fn lines<'o>(opener: &'o Opener<'_>) -> Result<HashMap<u32, &'o UnixSkEntry>, Problem> {
    let unix = &opener.sockets.unix;
    let mut lines = HashMap::new();
    for state in unix.values() {
        let entry = &*state.entry;
        let bad = |what: &str| {
            let reason = format!("what rewake.img says of connections that wait there {what}");
            Err(problem(entry, reason))
        };
        let connections = &state.extra.connections;
        if !connections.is_empty() && entry.state != u32::from(LISTEN) {
            return bad("makes no sense: it does not listen");
        }
        let mut clients = HashSet::new();
        for connection in connections {
            let client = connection.client;
            let waits = |s: &State| s.entry.peer == entry.ino && !s.is_external();
            let known = client == 0 || unix.get(&client).is_some_and(waits);
            if !known || client != 0 && !clients.insert(client) {
                return bad("names a client that does not");
            }
            if !matches!(connection.credentials.len(), 0 | 3)
                || connection.name.as_deref().is_some_and(|name| bad_name(name).is_some())
            {
                return bad("is damaged");
            }
            if let Some(id) = connection.queue
                && (opener.files.contains_key(&id) || lines.insert(id, entry).is_some())
            {
                return bad("names a queue that is another's");
            }
        }
    }
    Ok(lines)
}

/// `SCM_RIGHTS`
const RIGHTS: u32 = libc::SCM_RIGHTS as u32;

fn receives(entry: &UnixSkEntry) -> bool {
    entry.uflags & EXTERNAL == 0 && entry.state != u32::from(LISTEN)
}

fn problem(entry: &UnixSkEntry, reason: impl Into<String>) -> Problem {
    Problem::new(describe(entry), reason)
}

/// Why these bytes are no address.
fn bad_name(name: &[u8]) -> Option<&'static str> {
    let written = name.strip_suffix(b"\0").unwrap_or(name);
    if name.len() > ADDRESS + 1 || written.len() > ADDRESS {
        return Some("is longer than addresses can be");
    }
    match name.first() {
        None | Some(0) => None,
        Some(_) if written.contains(&0) => Some("has a zero byte inside"),
        Some(_) if matches!(written.rsplit(|b| *b == b'/').next(), Some(b"" | b"." | b"..")) => {
            Some("names a directory")
        }
        Some(_) => None,
    }
}

fn check(state: &State, all: &HashMap<u32, State>) -> Result<(), Problem> {
    let entry = &state.entry;
    let bad = |reason: String| Err(problem(entry, reason));
    let kind = entry.r#type as i32;
    if !matches!(kind, libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_SEQPACKET) {
        return bad(format!("the image has an impossible type {}", entry.r#type));
    }
    if let Some(reason) = bad_name(&entry.name) {
        return bad(format!("its address {reason}"));
    }
    if entry.uflags & FOREIGN != 0 {
        return bad("it belongs to CRIU's service or to a plugin, which rewake has none of".into());
    }
    if entry.uflags & EXTERNAL != 0 {
        return Ok(());
    }
    let paths = [entry.name_dir.as_deref(), state.extra.path.as_deref()];
    let mut paths = paths.into_iter().flatten();
    if paths.any(|path| path.contains(&0) || path.first() != Some(&b'/')) {
        return bad("the place of its file is no absolute path".into());
    }
    if entry.shutdown.is_some_and(|how| SkShutdown::try_from(how).is_err()) {
        return bad("the image has no valid shutdown state".into());
    }
    if !matches!(state.extra.peer_credentials.len(), 0 | 3)
        || !matches!(state.extra.own_credentials.len(), 0 | 3)
        || state.extra.peer_name.as_deref().is_some_and(|name| bad_name(name).is_some())
    {
        return bad("what rewake.img says of its peer is damaged".into());
    }
    match u8::try_from(entry.state) {
        Ok(LISTEN) if kind != libc::SOCK_DGRAM && entry.peer == 0 => {}
        Ok(ESTABLISHED | CLOSE) => {}
        _ => return bad(format!("the image has an impossible state {}", entry.state)),
    }
    if entry.peer == 0 {
        return Ok(());
    }
    let Some(peer) = all.get(&entry.peer) else {
        return bad("it is connected to a socket that the images do not have".into());
    };
    let peer = &peer.entry;
    if peer.uflags & EXTERNAL != 0 {
        return Ok(());
    }
    if peer.r#type != entry.r#type {
        return bad("it is connected to a socket of another type".into());
    }
    let mutual = peer.peer == entry.ino && peer.ino != entry.ino;
    let waits = peer.state == u32::from(LISTEN);
    if kind == libc::SOCK_DGRAM || mutual || waits && !peer.name.is_empty() {
        return Ok(());
    }
    bad("it is connected to a socket that is not connected to it".into())
}

/// A datagram socket without an address can have been given to one other only: by socketpair(2).
fn check_partners(all: &HashMap<u32, State>) -> Result<(), Problem> {
    let mut taken = HashSet::new();
    let datagrams = all.values().map(|state| &state.entry).filter(|entry| {
        entry.r#type as i32 == libc::SOCK_DGRAM && entry.peer != 0 && entry.uflags & EXTERNAL == 0
    });
    for entry in datagrams {
        let unnamed = all
            .get(&entry.peer)
            .is_some_and(|peer| peer.entry.name.is_empty() && peer.entry.uflags & EXTERNAL == 0);
        if unnamed && (entry.peer == entry.ino || !taken.insert(entry.peer)) {
            return Err(problem(
                entry,
                "it is connected to a socket without an address, to which others are connected too",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "unix_check_tests.rs"]
mod tests;
