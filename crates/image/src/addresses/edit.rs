//! Rules applied to a directory of images.
//!
//! Only the bytes of changed addresses are written anew; whatever else a message holds, known or not, is copied. At every
//! instant the directory holds the old checkpoint or the new one, whole: while `files.img` changes, the manifest says
//! nothing of it.

use super::rewrite::{Outcome, rewrite};
use super::rule::Rule;
use crate::dir::ImageDir;
use crate::dynamic::put_varint;
use crate::error::{ImageError, Result};
use crate::file::Dir;
use crate::kind;
use crate::manifest::{self, FileSum};
use crate::messages::{FileEntry, InetSkEntry};
use crate::raw::RawImage;
use crate::wire::{self, Fields, RawValue};
use crate::writer::HIDDEN;
use rustix::fs::{self, FlockOperation};
use rustix::io::Errno;
use std::collections::HashMap;
use std::path::Path;

/// Applies `rules` to the images in `path`. Nothing is written if nothing matches.
///
/// # Errors
/// There is no checkpoint, it is damaged, somebody else is writing there, or the disk is full. The checkpoint is then what
/// it was before.
pub fn edit(path: &Path, rules: &[Rule]) -> Result<Outcome> {
    let dir = Dir::open(path)?;
    if let Err(Errno::WOULDBLOCK) = fs::flock(&dir.fd, FlockOperation::NonBlockingLockExclusive) {
        return Err(ImageError::Busy(path.to_owned()));
    }
    let images = ImageDir::open(path)?;
    let name = kind::FILES.file_name(());
    let Some(bytes) = images.load(&name)? else {
        return Ok(rewrite([], rules));
    };
    let version = images.inventory().img_version;
    let (edited, outcome) = edit_files(&path.join(&name), version, &bytes, rules)?;
    if outcome.changes.is_empty() {
        return Ok(outcome);
    }
    clean(&dir)?;
    let result = replace(&dir, &name, &edited);
    if result.is_err() {
        let _ = clean(&dir);
    }
    result.map(|()| outcome)
}

/// Puts `content` in the place of a file, and its sum into the manifest.
fn replace(dir: &Dir, name: &str, content: &[u8]) -> Result<()> {
    let old = match dir.open_regular(manifest::FILE_NAME)? {
        Some((fd, size)) => Some(dir.read(manifest::FILE_NAME, &fd, size)?),
        None => None,
    };
    let manifest = |sum: Option<FileSum>| {
        old.as_deref().map(|old| manifest::with_sum(&String::from_utf8_lossy(old), name, sum))
    };
    let sum = FileSum { size: content.len() as u64, crc: Some(crc32fast::hash(content)) };
    let mut files = vec![(name, content.to_vec())];
    if let (Some(without), Some(with)) = (manifest(None), manifest(Some(sum))) {
        files.insert(0, (manifest::FILE_NAME, without.into_bytes()));
        files.push((manifest::FILE_NAME, with.into_bytes()));
    }
    // All that can fail for want of space comes first.
    for (i, (name, content)) in files.iter().enumerate() {
        let fd = dir.create(&new_name(i))?;
        dir.write(name, &fd, content)?;
    }
    for (i, (name, _)) in files.iter().enumerate() {
        fs::renameat(&dir.fd, new_name(i), &dir.fd, *name)
            .map_err(|e| ImageError::write("put in place", &dir.path, name, e))?;
    }
    Ok(())
}

/// A file before it gets its name.
fn new_name(i: usize) -> String {
    format!("{HIDDEN}edit-{i}")
}

/// Removes what an edit did not finish.
fn clean(dir: &Dir) -> Result<()> {
    (0..3).try_for_each(|i| dir.remove(&new_name(i)))
}

/// The new content of `files.img`.
pub(super) fn edit_files(
    path: &Path,
    version: u32,
    bytes: &[u8],
    rules: &[Rule],
) -> Result<(Vec<u8>, Outcome)> {
    let mut image = RawImage::new(path, kind::FILES.info(), version, bytes)?;
    let mut entries = Vec::new();
    let mut files: Vec<FileEntry> = Vec::new();
    while let Some(entry) = image.next_entry()? {
        let decoded =
            wire::decode_checked(entry.message).map_err(|f| image.entry_fault(&entry, f))?;
        entries.push(entry);
        files.push(decoded);
    }
    let outcome = rewrite(&mut files, rules);
    let changed: HashMap<u32, &InetSkEntry> = files
        .iter()
        .filter_map(|f| f.isk.as_deref())
        .filter(|s| outcome.changes.iter().any(|c| c.id == s.id))
        .map(|s| (s.id, s))
        .collect();
    let mut edited = Vec::with_capacity(bytes.len() + 64);
    let mut copied = 0;
    for (entry, file) in entries.iter().zip(&files) {
        let Some(socket) = file.isk.as_deref().and_then(|s| changed.get(&s.id)) else { continue };
        // Everything up to the length before the message.
        edited.extend_from_slice(&bytes[copied..entry.offset - 4]);
        let message =
            with_socket(entry.message, socket).map_err(|f| image.entry_fault(entry, f))?;
        edited.extend_from_slice(&(message.len() as u32).to_le_bytes());
        edited.extend_from_slice(&message);
        copied = entry.offset + entry.message.len();
    }
    edited.extend_from_slice(&bytes[copied..]);
    Ok((edited, outcome))
}

/// `FileEntry::isk`.
const ISK: u32 = 4;
/// `InetSkEntry::{src_port, dst_port, src_addr, dst_addr}`.
const PORTS: [u32; 2] = [7, 8];
const ADDRESSES: [u32; 2] = [11, 12];

/// A file entry with the addresses of `socket`.
fn with_socket(message: &[u8], socket: &InetSkEntry) -> std::result::Result<Vec<u8>, wire::Fault> {
    let mut out = Vec::with_capacity(message.len() + 16);
    let mut fields = Fields::new(message);
    while let Some(field) = fields.next()? {
        match (field.number, field.value) {
            (ISK, RawValue::Bytes(inner)) => {
                let inner = with_addresses(inner, socket)?;
                put_varint(&mut out, u64::from(ISK) << 3 | 2);
                put_varint(&mut out, inner.len() as u64);
                out.extend_from_slice(&inner);
            }
            _ => out.extend_from_slice(&message[field.offset..field.end]),
        }
    }
    Ok(out)
}

fn with_addresses(
    message: &[u8],
    socket: &InetSkEntry,
) -> std::result::Result<Vec<u8>, wire::Fault> {
    let ports = [socket.src_port, socket.dst_port];
    let addresses = [socket.src_addr.as_slice(), socket.dst_addr.as_slice()];
    let mut out = Vec::with_capacity(message.len() + 16);
    let mut written = [false; 2];
    let mut fields = Fields::new(message);
    while let Some(field) = fields.next()? {
        let place = |of: [u32; 2]| of.iter().position(|n| *n == field.number);
        if let Some(at) = place(PORTS) {
            put_varint(&mut out, u64::from(field.number) << 3);
            put_varint(&mut out, ports[at].into());
        } else if let Some(at) = place(ADDRESSES) {
            // All words where the first was.
            for word in addresses[at].iter().filter(|_| !written[at]) {
                put_varint(&mut out, u64::from(field.number) << 3);
                put_varint(&mut out, (*word).into());
            }
            written[at] = true;
        } else {
            out.extend_from_slice(&message[field.offset..field.end]);
        }
    }
    Ok(out)
}
