//! Features around memory.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use rewake_sys::{pagemap, probe};
use rustix::fs::{CWD, MemfdFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use super::{Attempt, Reason, ensure, read};

/// Our own mapping that satisfies `wanted`: `(start, end)` and its line.
fn mapping(wanted: impl Fn(&str) -> bool) -> Result<(usize, usize), Reason> {
    let maps = read("/proc/self/maps")?;
    let line =
        maps.lines().find(|line| wanted(line)).ok_or(Reason::from("no such mapping of my own"))?;
    let (range, _) = line.split_once(' ').unwrap_or((line, ""));
    let (start, end) = range.split_once('-').unwrap_or((range, ""));
    match (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)) {
        (Ok(start), Ok(end)) => Ok((start, end)),
        _ => Err("a line of /proc/self/maps makes no sense".into()),
    }
}

pub fn map_files() -> Attempt {
    let (start, end) = mapping(|line| line.contains(" /"))?;
    File::open(format!("/proc/self/map_files/{start:x}-{end:x}"))?;
    Ok(())
}

pub fn mm_map() -> Attempt {
    ensure(probe::mm_map_size()? > 0, "PR_SET_MM_MAP_SIZE says 0")
}

pub fn process_vm() -> Attempt {
    Ok(probe::read_own_memory()?)
}

pub fn memfd_exec() -> Attempt {
    /// `MFD_EXEC`: executable whatever vm.memfd_noexec says, as far as it allows that.
    const EXEC: u32 = 0x10;
    let flags = MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("rewake-check", flags | MemfdFlags::from_bits_retain(EXEC))
        // Linux before 6.3 does not know the flag and needs none.
        .or_else(|_| rustix::fs::memfd_create("rewake-check", flags))?;
    rustix::fs::ftruncate(&file, 4096)?;
    Ok(probe::with_page(file.as_fd(), libc::PROT_READ | libc::PROT_EXEC, |_| ())?)
}

pub fn memfd_hugetlb() -> Attempt {
    rustix::fs::memfd_create("rewake-check", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)?;
    Ok(())
}

pub fn map_vdso() -> Attempt {
    #[cfg(target_arch = "x86_64")]
    {
        Ok(probe::vdso_again()?)
    }
    #[cfg(not(target_arch = "x86_64"))]
    Err("not tried on this architecture".into())
}

pub fn remap_vdso() -> Attempt {
    let (start, end) = mapping(|line| line.ends_with("[vdso]"))?;
    Ok(probe::remap_vdso(start, end - start)?)
}

fn own_pagemap() -> Result<File, Reason> {
    Ok(File::open("/proc/self/pagemap")?)
}

pub fn pagemap_scan() -> Attempt {
    Ok(probe::pagemap_scan(own_pagemap()?.as_fd(), pagemap::PRESENT | pagemap::PFNZERO)?)
}

pub fn pagemap_guard() -> Attempt {
    Ok(probe::pagemap_scan(own_pagemap()?.as_fd(), pagemap::GUARD)?)
}

pub fn guard_pages() -> Attempt {
    Ok(probe::guard_pages()?)
}

fn uffd_with(wanted: u64, otherwise: &str) -> Attempt {
    ensure(probe::userfaultfd_features()? & wanted == wanted, otherwise)
}

pub fn uffd() -> Attempt {
    uffd_with(0, "")
}

pub fn uffd_noncoop() -> Attempt {
    /// `UFFD_FEATURE_EVENT_FORK`, `_REMAP`, `_REMOVE`, `_UNMAP`.
    const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
    uffd_with(EVENTS, "userfaultfd has no events of fork, mremap, madvise and munmap")
}

pub fn uffd_wp_async() -> Attempt {
    /// `UFFD_FEATURE_WP_UNPOPULATED`, `_WP_ASYNC`.
    const ASYNC: u64 = 1 << 13 | 1 << 15;
    uffd_with(ASYNC, "userfaultfd has no asynchronous write protection")
}

pub fn soft_dirty() -> Attempt {
    let pagemap = own_pagemap()?;
    let clear = || -> Result<(), Reason> {
        Ok(OpenOptions::new().write(true).open("/proc/self/clear_refs")?.write_all(b"4")?)
    };
    let dirty = |at: usize| -> Result<bool, Reason> {
        let mut entry = [0u8; 8];
        pagemap.read_exact_at(&mut entry, (at as u64 / 4096) * 8)?;
        Ok(u64::from_ne_bytes(entry) & 1 << 55 != 0)
    };
    ensure(probe::soft_dirty(clear, dirty)?, "a written page is not marked soft-dirty")
}

pub fn aio() -> Attempt {
    Ok(probe::aio_ring_moves()?)
}

pub fn vmsplice() -> Attempt {
    let (_reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    ensure(probe::vmsplice_unaligned(writer.as_fd())? > 0, "vmsplice took nothing")
}

pub fn overlayfs() -> Attempt {
    probe::in_namespaces(libc::CLONE_NEWNS, overlay_map)?
}

/// In a mount namespace of our own: does /proc/PID/maps name the same device and inode as stat(2) for a file on overlayfs?
fn overlay_map() -> Attempt {
    const ROOT: &str = "/tmp";
    let mount = |fs: &str, options: &[(&str, String)]| -> Result<(), Reason> {
        let context = rustix::mount::fsopen(fs, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in options {
            rustix::mount::fsconfig_set_string(&context, *key, value.as_str())?;
        }
        rustix::mount::fsconfig_create(&context)?;
        let made = rustix::mount::fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?;
        let from_fd = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(rustix::mount::move_mount(&made, "", CWD, ROOT, from_fd)?)
    };
    mount("tmpfs", &[])?;
    for dir in ["lower", "upper", "work"] {
        std::fs::create_dir(format!("{ROOT}/{dir}"))?;
    }
    std::fs::write(format!("{ROOT}/lower/file"), [1u8; 4096])?;
    mount(
        "overlay",
        &["lowerdir", "upperdir", "workdir"]
            .map(|key| (key, format!("{ROOT}/{}", &key[..5].replace("workd", "work")))),
    )?;
    let file = File::open(format!("{ROOT}/file"))?;
    let stat = file.metadata()?;
    let (major, minor) = (rustix::fs::major(stat.dev()), rustix::fs::minor(stat.dev()));
    let identity = format!(" {major:02x}:{minor:02x} {} ", stat.ino());
    let shown = probe::with_page(file.as_fd(), libc::PROT_READ, |at| -> Result<bool, Reason> {
        let maps = read("/proc/self/maps")?;
        Ok(maps
            .lines()
            .any(|line| line.starts_with(&format!("{at:x}-")) && line.contains(&identity)))
    })??;
    ensure(shown, "/proc/PID/maps names another file than stat(2)")
}
