//! Kernel state: memory that a process outside the tree has mapped, too: shared anonymous memory and a memfd that are inherited, a
//! deleted file. After a restore the tree has copies of its own; until then they are the same. `ZOO_INSIDE`: the other process is of
//! the tree, and they stay the same.
//!
//! `ZOO_SEALED`: nobody can write to the memfd, and there is nothing else.
#![allow(unsafe_code, reason = "raw mappings, memfd")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use zoo::{Check, Rng, Zoo, bytes, cstring, ensure, mmap, ok};

const LEN: usize = 5 << 12;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

struct Piece {
    name: &'static str,
    p: *mut u8,
    seed: u64,
}

fn memfd() -> Result<OwnedFd, String> {
    let name = cstring("shared outside");
    // SAFETY: NUL-terminated.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_ALLOW_SEALING) };
    let fd = ok(fd.into(), "memfd_create")? as i32;
    // SAFETY: just made.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a descriptor of our own.
    ok(unsafe { libc::ftruncate(fd.as_raw_fd(), LEN as i64) }.into(), "ftruncate")?;
    Ok(fd)
}

fn filled(name: &'static str, p: *mut u8, seed: u64) -> Piece {
    // SAFETY: just mapped.
    Rng(seed).fill(unsafe { bytes(p, LEN) });
    Piece { name, p, seed }
}

/// A memfd that is written once.
fn sealed() -> Result<Vec<Piece>, String> {
    let fd = memfd()?;
    let p = mmap(0, LEN, RW, libc::MAP_SHARED, fd.as_raw_fd(), 0)?;
    let mut piece = filled("sealed memfd", p, 4);
    // SAFETY: a mapping of our own, a descriptor of our own.
    unsafe {
        ok(libc::munmap(p.cast(), LEN).into(), "munmap")?;
        ok(libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE).into(), "F_SEAL")?;
    }
    piece.p = mmap(0, LEN, libc::PROT_READ, libc::MAP_SHARED, fd.as_raw_fd(), 0)?;
    Ok(vec![piece])
}

fn pieces(z: &Zoo) -> Result<Vec<Piece>, String> {
    let anonymous = mmap(0, LEN, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)?;
    let fd = memfd()?;
    let of_memfd = mmap(0, LEN, RW, libc::MAP_SHARED, fd.as_raw_fd(), 0)?;
    let path = z.path("deleted soon");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path);
    let file = file.map_err(|e| e.to_string())?;
    file.set_len(LEN as u64).map_err(|e| e.to_string())?;
    let of_file = mmap(0, LEN, RW, libc::MAP_SHARED, file.as_raw_fd(), 0)?;
    std::fs::remove_file(path).map_err(|e| e.to_string())?;
    Ok(vec![
        filled("shared anonymous memory", anonymous, 1),
        filled("memfd", of_memfd, 2),
        filled("deleted file", of_file, 3),
    ])
}

/// Keeps what it has inherited, until the program is over.
fn keep(z: &Zoo) -> Check {
    z.publish("keeper", &zoo::pid().to_string());
    while !z.is_over() {
        zoo::nap(10);
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let sealed_only = z.param("ZOO_SEALED", 0) == 1;
        let pieces = if sealed_only { sealed()? } else { pieces(z)? };
        let inside = z.param("ZOO_INSIDE", 0) == 1;
        let mut child = None;
        if inside {
            child = Some(z.fork(|z| {
                while !z.path("written").exists() {
                    zoo::nap(5);
                }
                // SAFETY: mapped and this long.
                let first = unsafe { pieces[1].p.read_volatile() };
                ensure!(first == 0x5a, "what the parent wrote to the memfd is not seen");
                Ok(())
            })?);
        } else {
            z.outside(keep)?;
            z.wait_for("keeper")?;
        }
        z.ready()?;
        z.wait_for_check();
        for Piece { name, p, seed } in &pieces {
            // SAFETY: mapped and this long.
            Rng(*seed).verify(unsafe { bytes(*p, LEN) }, name)?;
        }
        if let Some(child) = child {
            // SAFETY: mapped and writable.
            unsafe { pieces[1].p.write_volatile(0x5a) };
            z.publish("written", "");
            z.join(child)?;
        }
        Ok(())
    });
}
