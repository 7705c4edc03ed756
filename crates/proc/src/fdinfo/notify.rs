//! inotify and fanotify: one line a watch, made of `key:value` words.

use super::{KernelDev, whole};

/// A file handle as name_to_handle_at(2) gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHandle {
    /// `handle_type`.
    pub handle_type: u32,
    /// `f_handle`, at most 128 bytes.
    pub bytes: Box<[u8]>,
}

/// One watch of an inotify(7) instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InotifyWatch {
    /// Watch descriptor.
    pub wd: i32,
    /// Inode watched.
    pub ino: u64,
    /// Its device.
    pub sdev: KernelDev,
    /// `IN_*` mask.
    pub mask: u32,
    /// Always 0 for inotify.
    pub ignored_mask: u32,
    /// Handle of the inode, if its file system gives any (CONFIG_EXPORTFS).
    pub handle: Option<FileHandle>,
}

/// The settings of a fanotify(7) group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FanotifyGroup {
    /// `FAN_*` flags of fanotify_init(2).
    pub flags: u32,
    /// `event_f_flags` of fanotify_init(2).
    pub event_flags: u32,
}

/// What a fanotify mark is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FanotifyTarget {
    /// An inode.
    Inode {
        /// Inode number.
        ino: u64,
        /// Its device.
        sdev: KernelDev,
        /// Its handle, if the file system gives any.
        handle: Option<FileHandle>,
    },
    /// A mount, by its id.
    Mount(u32),
    /// A whole file system.
    SuperBlock(KernelDev),
    /// A mount namespace, by its inode number (since Linux 6.15).
    MountNamespace(u32),
}

/// One mark of a fanotify(7) group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FanotifyMark {
    /// What it is on.
    pub target: FanotifyTarget,
    /// `FAN_MARK_*` flags.
    pub mflags: u32,
    /// `FAN_*` event mask.
    pub mask: u64,
    /// Events ignored.
    pub ignored_mask: u64,
}

/// All words that occur, by name.
#[derive(Default)]
struct Words {
    wd: Option<u32>,
    ino: Option<u64>,
    sdev: Option<u32>,
    mask: Option<u64>,
    ignored_mask: Option<u64>,
    flags: Option<u32>,
    event_flags: Option<u32>,
    mflags: Option<u32>,
    mnt_id: Option<u32>,
    mnt_ns: Option<u32>,
    handle: Option<FileHandle>,
}

fn words(text: &[u8]) -> Result<Words, &'static str> {
    let mut found = Words::default();
    let mut bytes = None;
    let mut handle_type = None;
    for word in text.split(|b| *b == b' ').filter(|w| !w.is_empty()) {
        let Some(colon) = memchr::memchr(b':', word) else { continue };
        let value = &word[colon + 1..];
        match &word[..colon] {
            b"wd" => found.wd = Some(whole(value, |s| s.hex()).ok_or("wd")?),
            b"ino" => found.ino = Some(whole(value, |s| s.hex()).ok_or("ino")?),
            b"sdev" => found.sdev = Some(whole(value, |s| s.hex()).ok_or("sdev")?),
            b"mask" => found.mask = Some(whole(value, |s| s.hex()).ok_or("mask")?),
            b"ignored_mask" => {
                found.ignored_mask = Some(whole(value, |s| s.hex()).ok_or("ignored_mask")?)
            }
            b"flags" => found.flags = Some(whole(value, |s| s.hex()).ok_or("flags")?),
            b"event-flags" => {
                found.event_flags = Some(whole(value, |s| s.hex()).ok_or("event-flags")?)
            }
            b"mflags" => found.mflags = Some(whole(value, |s| s.hex()).ok_or("mflags")?),
            b"mnt_id" => found.mnt_id = Some(whole(value, |s| s.hex()).ok_or("mnt_id")?),
            // The only number of these lines that is printed in decimal.
            b"mnt_ns" => found.mnt_ns = Some(whole(value, |s| s.dec()).ok_or("mnt_ns")?),
            b"fhandle-bytes" => {
                bytes = Some(whole(value, |s| s.hex::<u32>()).ok_or("fhandle-bytes")?)
            }
            b"fhandle-type" => handle_type = Some(whole(value, |s| s.hex()).ok_or("fhandle-type")?),
            b"f_handle" => {
                let data = hex_bytes(value).ok_or("f_handle")?;
                if Some(data.len()) != bytes.map(|n| n as usize) {
                    return Err("fhandle-bytes");
                }
                found.handle = Some(FileHandle {
                    handle_type: handle_type.ok_or("fhandle-type")?,
                    bytes: data,
                });
            }
            _ => {}
        }
    }
    Ok(found)
}

fn hex_bytes(text: &[u8]) -> Option<Box<[u8]>> {
    let (pairs, []) = text.as_chunks::<2>() else { return None };
    pairs.iter().map(|pair| whole(pair, |s| s.hex())).collect()
}

/// The words after `inotify `.
pub(super) fn inotify_watch(text: &[u8]) -> Result<InotifyWatch, &'static str> {
    let found = words(text)?;
    let narrow = |mask: Option<u64>, field| u32::try_from(mask.ok_or(field)?).map_err(|_| field);
    Ok(InotifyWatch {
        wd: i32::try_from(found.wd.ok_or("wd")?).map_err(|_| "wd")?,
        ino: found.ino.ok_or("ino")?,
        sdev: KernelDev(found.sdev.ok_or("sdev")?),
        mask: narrow(found.mask, "mask")?,
        ignored_mask: narrow(found.ignored_mask, "ignored_mask")?,
        handle: found.handle,
    })
}

/// The words after `fanotify `: the group's line or a mark's.
pub(super) fn fanotify_line(
    text: &[u8],
    group: &mut Option<FanotifyGroup>,
    marks: &mut Vec<FanotifyMark>,
) -> Result<(), &'static str> {
    let found = words(text)?;
    if let (Some(flags), Some(event_flags)) = (found.flags, found.event_flags) {
        *group = Some(FanotifyGroup { flags, event_flags });
        return Ok(());
    }
    let target = match (found.ino, found.sdev, found.mnt_id, found.mnt_ns) {
        (Some(ino), Some(sdev), None, None) => {
            FanotifyTarget::Inode { ino, sdev: KernelDev(sdev), handle: found.handle }
        }
        (None, Some(sdev), None, None) => FanotifyTarget::SuperBlock(KernelDev(sdev)),
        (None, None, Some(id), None) => FanotifyTarget::Mount(id),
        (None, None, None, Some(ns)) => FanotifyTarget::MountNamespace(ns),
        _ => return Err("fanotify mark"),
    };
    marks.push(FanotifyMark {
        target,
        mflags: found.mflags.ok_or("mflags")?,
        mask: found.mask.ok_or("mask")?,
        ignored_mask: found.ignored_mask.ok_or("ignored_mask")?,
    });
    Ok(())
}
