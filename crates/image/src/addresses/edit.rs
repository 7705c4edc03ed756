//! Rules applied to a directory of images.
//!
//! Only the bytes of changed addresses are written anew; whatever else a message holds, known or not, is copied. At every
//! instant the directory holds a whole checkpoint: while `files.img` and `rewake.img` change, the manifest says nothing of
//! them. Between the two what has been received before has the addresses of old.

use super::extra::rewrite_extra;
use super::rewrite::{Outcome, rewrite};
use super::rule::Rule;
use crate::dir::ImageDir;
use crate::dynamic::put_varint;
use crate::error::{ImageError, Result};
use crate::file::Dir;
use crate::kind;
use crate::manifest::{self, FileSum};
use crate::messages::{FileEntry, InetSkEntry, RewakeEntry, RewakeFileEntry};
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
    let (edited, mut outcome) = edit_files(&path.join(&name), version, &bytes, rules)?;
    let mut files = Vec::new();
    if !outcome.changes.is_empty() {
        files.push((name, edited));
    }
    let name = kind::REWAKE.file_name(());
    if let Some(bytes) = images.load(&name)?
        && let Some(edited) = edit_extra(&path.join(&name), version, &bytes, rules, &mut outcome)?
    {
        files.push((name, edited));
    }
    if files.is_empty() {
        return Ok(outcome);
    }
    clean(&dir)?;
    let result = replace(&dir, files);
    if result.is_err() {
        let _ = clean(&dir);
    }
    result.map(|()| outcome)
}

/// Puts contents in the places of files, and their sums into the manifest.
fn replace(dir: &Dir, files: Vec<(String, Vec<u8>)>) -> Result<()> {
    let old = match dir.open_regular(manifest::FILE_NAME)? {
        Some((fd, size)) => Some(dir.read(manifest::FILE_NAME, &fd, size)?),
        None => None,
    };
    let manifest = |with: bool| {
        let old = String::from_utf8_lossy(old.as_deref()?);
        Some(files.iter().fold(old.into_owned(), |text, (name, content)| {
            let size = content.len() as u64;
            let sum = || FileSum { size, crc: Some(crc32fast::hash(content)) };
            manifest::with_sum(&text, name, with.then(sum))
        }))
    };
    let (without, with) = (manifest(false), manifest(true));
    let mut files = files;
    if let (Some(without), Some(with)) = (without, with) {
        files.insert(0, (manifest::FILE_NAME.to_owned(), without.into_bytes()));
        files.push((manifest::FILE_NAME.to_owned(), with.into_bytes()));
    }
    // All that can fail for want of space comes first.
    for (i, (name, content)) in files.iter().enumerate() {
        let fd = dir.create(&new_name(i))?;
        dir.write(name, &fd, content)?;
    }
    for (i, (name, _)) in files.iter().enumerate() {
        fs::renameat(&dir.fd, new_name(i), &dir.fd, name)
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
    (0..4).try_for_each(|i| dir.remove(&new_name(i)))
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

/// The new content of `rewake.img`, if there is any address to be changed.
pub(super) fn edit_extra(
    path: &Path,
    version: u32,
    bytes: &[u8],
    rules: &[Rule],
    outcome: &mut Outcome,
) -> Result<Option<Vec<u8>>> {
    let mut image = RawImage::new(path, kind::REWAKE.info(), version, bytes)?;
    let mut entries = Vec::new();
    let mut files: Vec<RewakeEntry> = Vec::new();
    while let Some(entry) = image.next_entry()? {
        let decoded =
            wire::decode_checked(entry.message).map_err(|f| image.entry_fault(&entry, f))?;
        entries.push(entry);
        files.push(decoded);
    }
    let changed = rewrite_extra(files.iter_mut().filter_map(|e| e.file.as_mut()), rules, outcome);
    if changed.is_empty() {
        return Ok(None);
    }
    let mut edited = Vec::with_capacity(bytes.len() + 64);
    let mut copied = 0;
    for (entry, file) in entries.iter().zip(&files) {
        let Some(file) = file.file.as_ref().filter(|f| changed.contains(&f.id)) else { continue };
        edited.extend_from_slice(&bytes[copied..entry.offset - 4]);
        let message = with_extra(entry.message, file).map_err(|f| image.entry_fault(entry, f))?;
        edited.extend_from_slice(&(message.len() as u32).to_le_bytes());
        edited.extend_from_slice(&message);
        copied = entry.offset + entry.message.len();
    }
    edited.extend_from_slice(&bytes[copied..]);
    Ok(Some(edited))
}

/// `RewakeEntry::file`.
const FILE: u32 = 3;
/// `RewakeFileEntry::{socket_options, memberships, datagrams}`.
const OPTIONS: u32 = 10;
const MEMBERSHIPS: u32 = 11;
const DATAGRAMS: u32 = 12;

/// An entry of `rewake.img` with the addresses of `file`.
fn with_extra(message: &[u8], file: &RewakeFileEntry) -> std::result::Result<Vec<u8>, wire::Fault> {
    use prost::Message;
    let put = |out: &mut Vec<u8>, number: u32, inner: &[u8]| {
        put_varint(out, u64::from(number) << 3 | 2);
        put_varint(out, inner.len() as u64);
        out.extend_from_slice(inner);
    };
    let mut out = Vec::with_capacity(message.len() + 16);
    let mut fields = Fields::new(message);
    while let Some(field) = fields.next()? {
        let (FILE, RawValue::Bytes(inner)) = (field.number, field.value) else {
            out.extend_from_slice(&message[field.offset..field.end]);
            continue;
        };
        let mut edited = Vec::with_capacity(inner.len() + 16);
        let mut fields = Fields::new(inner);
        // Each list as it is now, in its order.
        let (mut options, mut joined, mut received) =
            (file.socket_options.iter(), file.memberships.iter(), file.datagrams.iter());
        while let Some(field) = fields.next()? {
            let now = match field.number {
                OPTIONS => options.next().map(Message::encode_to_vec),
                MEMBERSHIPS => joined.next().map(Message::encode_to_vec),
                DATAGRAMS => received.next().map(Message::encode_to_vec),
                _ => None,
            };
            match now {
                Some(now) => put(&mut edited, field.number, &now),
                None => edited.extend_from_slice(&inner[field.offset..field.end]),
            }
        }
        put(&mut out, FILE, &edited);
    }
    Ok(out)
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
