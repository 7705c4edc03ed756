//! What a checkpoint holds, as a tree for people: read from the images alone.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rewake_image::messages::{
    FdTypes, FdinfoEntry, FileEntry, InetSkEntry, PipeDataEntry, PipeEntry, PstreeEntry,
    RegFileEntry, TcpStreamEntry,
};
use rewake_image::{ImageDir, Result, kind};

/// `TCP_LISTEN` and `TCP_ESTABLISHED` of tcp(7).
const LISTEN: u32 = 10;
const ESTABLISHED: u32 = 1;

/// `O_ACCMODE` and `O_WRONLY` of open(2).
const ACCESS: u32 = 3;
const WRITE_ONLY: u32 = 1;

/// The files of a checkpoint, by id.
struct Files {
    by_id: HashMap<u32, FileEntry>,
    deleted: HashMap<u32, u32>,
    in_pipes: HashMap<u32, PipeDataEntry>,
}

/// The tree of a checkpoint's processes with what they hold.
pub fn checkpoint(images: &ImageDir) -> Result<String> {
    let processes = images.read_all(kind::PSTREE, ())?;
    let files = Files::read(images)?;
    let mut out = String::new();
    let (count, bytes) = size(images);
    let _ = writeln!(out, "   In {count} files, {}:", human(bytes));
    // Parents come before their children, and a process of a loop of parents is not reached from a root.
    for root in processes.iter().filter(|process| process.ppid == 0) {
        out.push_str("   ");
        process(images, &files, &processes, root, "   ", &mut out)?;
    }
    out.push('\n');
    Ok(out)
}

/// How many files there are, and their size.
fn size(images: &ImageDir) -> (usize, u64) {
    let entries = std::fs::read_dir(images.path()).into_iter().flatten().flatten();
    let sizes = entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len());
    sizes.fold((0, 0), |(count, sum), size| (count + 1, sum + size))
}

fn human(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..1_048_576 => format!("{} KiB", bytes.div_ceil(1024)),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

fn text(bytes: &[u8]) -> String {
    crate::console::printable(&String::from_utf8_lossy(bytes)).into_owned()
}

fn process(
    images: &ImageDir,
    files: &Files,
    all: &[PstreeEntry],
    process: &PstreeEntry,
    margin: &str,
    out: &mut String,
) -> Result<()> {
    let core = images.read_one(kind::CORE, process.pid)?;
    let comm = core.tc.as_ref().map(|tc| text(&tc.comm)).unwrap_or_default();
    let _ =
        writeln!(out, "{} {comm}, session {}, group {}", process.pid, process.sid, process.pgid);
    let children: Vec<&PstreeEntry> =
        all.iter().filter(|child| child.ppid == process.pid && child.pid != process.pid).collect();
    let bar = format!("{margin}{}", if children.is_empty() { "   " } else { "|  " });
    for (label, value) in facts(images, files, process)? {
        let _ = writeln!(out, "{bar}{label:<8} {value}");
    }
    for (at, child) in children.iter().enumerate() {
        let last = at + 1 == children.len();
        let _ = write!(out, "{margin}`- ");
        let below = format!("{margin}{}", if last { "   " } else { "|  " });
        self::process(images, files, all, child, &below, out)?;
    }
    Ok(())
}

/// What a process holds, line by line.
fn facts(images: &ImageDir, files: &Files, process: &PstreeEntry) -> Result<Vec<(String, String)>> {
    let mut facts = Vec::new();
    for tid in process.threads.iter().filter(|tid| **tid != process.pid) {
        let core = images.read_one(kind::CORE, *tid)?;
        let comm = core.thread_core.and_then(|thread| thread.comm);
        facts.push(("thread".into(), format!("{tid} {}", text(&comm.unwrap_or_default()))));
    }
    if let Some(mm) = images.read_opt(kind::MM, process.pid)? {
        let mapped: u64 = mm.vmas.iter().map(|vma| vma.end.saturating_sub(vma.start)).sum();
        let runs = images.read_pagemap(process.pid)?.map(|map| map.entries).unwrap_or_default();
        let stored: u64 =
            runs.iter().filter(|run| run.source.is_stored()).map(|run| run.bytes()).sum();
        let text =
            format!("{} mappings of {}; {} saved", mm.vmas.len(), human(mapped), human(stored));
        facts.push(("memory".into(), text));
    }
    if let Some(ids) = images.read_opt(kind::IDS, process.pid)? {
        let mut seen = HashMap::new();
        for fd in images.read_all(kind::FDINFO, ids.files_id)? {
            let first = *seen.entry(fd.id).or_insert(fd.fd);
            let what = match first == fd.fd {
                true => files.describe(images, &fd)?,
                false => format!("the same file description as fd {first}"),
            };
            facts.push((format!("fd {}", fd.fd), what));
        }
    }
    Ok(facts)
}

impl Files {
    fn read(images: &ImageDir) -> Result<Files> {
        let by_id =
            images.read_all(kind::FILES, ())?.into_iter().map(|file| (file.id, file)).collect();
        let deleted = images.read_all(kind::REMAP_FPATH, ())?;
        let in_pipes = images.read_all(kind::PIPES_DATA, ())?;
        Ok(Files {
            by_id,
            deleted: deleted.into_iter().map(|remap| (remap.orig_id, remap.remap_id)).collect(),
            in_pipes: in_pipes.into_iter().map(|data| (data.pipe_id, data)).collect(),
        })
    }

    fn describe(&self, images: &ImageDir, fd: &FdinfoEntry) -> Result<String> {
        let file = self.by_id.get(&fd.id);
        if let Some(regular) = file.and_then(|file| file.reg.as_deref()) {
            return Ok(self.regular(regular));
        }
        if let Some(pipe) = file.and_then(|file| file.pipe.as_deref()) {
            return Ok(self.pipe(pipe));
        }
        if let Some(socket) = file.and_then(|file| file.isk.as_deref()) {
            return internet(images, socket);
        }
        let name = FdTypes::DESC.name_of(fd.r#type).unwrap_or("unknown kind").to_lowercase();
        Ok(format!("{name}, id {}", fd.id))
    }

    fn regular(&self, file: &RegFileEntry) -> String {
        let mut line = text(&file.name);
        if let Some(ghost) = self.deleted.get(&file.id) {
            let _ = write!(line, " (deleted; content in ghost-file-{ghost:x}.img)");
        }
        if file.pos > 0 {
            let _ = write!(line, ", at byte {}", file.pos);
        }
        line
    }

    fn pipe(&self, pipe: &PipeEntry) -> String {
        let end = if pipe.flags & ACCESS == WRITE_ONLY { "write" } else { "read" };
        let held = self.in_pipes.get(&pipe.pipe_id).map_or(0, |data| data.bytes);
        format!("pipe {}, {end} end, {held} bytes in it", pipe.pipe_id)
    }
}

fn internet(images: &ImageDir, socket: &InetSkEntry) -> Result<String> {
    let protocol = match socket.proto {
        6 => "TCP",
        17 => "UDP",
        _ => "socket",
    };
    let from = address(&socket.src_addr, socket.src_port);
    if socket.state == LISTEN {
        return Ok(format!("{protocol} {from}, listening"));
    }
    let mut line = format!("{protocol} {from} <-> {}", address(&socket.dst_addr, socket.dst_port));
    if socket.state == ESTABLISHED && socket.proto == 6 {
        let queues: Option<TcpStreamEntry> = images.read_opt(kind::TCP_STREAM, socket.ino)?;
        let (received, sent) = queues.map_or((0, 0), |stream| (stream.inq_len, stream.outq_len));
        let _ = write!(line, "; unread {received} bytes, unacknowledged {sent}");
    }
    Ok(line)
}

fn address(words: &[u32], port: u32) -> String {
    let bytes = |at: usize| words.get(at).copied().unwrap_or(0).to_ne_bytes();
    let ip = match words.len() {
        4 => {
            let mut all = [0; 16];
            for (at, part) in all.chunks_mut(4).enumerate() {
                part.copy_from_slice(&bytes(at));
            }
            IpAddr::V6(Ipv6Addr::from(all))
        }
        _ => IpAddr::V4(Ipv4Addr::from(bytes(0))),
    };
    match ip {
        IpAddr::V4(ip) => format!("{ip}:{port}"),
        IpAddr::V6(ip) => format!("[{ip}]:{port}"),
    }
}
