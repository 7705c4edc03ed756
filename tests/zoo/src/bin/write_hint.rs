//! Kernel state: what is known of how long the data of files live (`F_SET_RW_HINT`): of a deleted file, of a memfd, of a
//! file that is left alone. All but the last are other inodes after a restore.
#![allow(unsafe_code, reason = "fcntl operations that no library has")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use zoo::{check, cstring, ensure_eq};

const GET: i32 = 1024 + 11;
const SET: i32 = 1024 + 12;
const SHORT: u64 = 2;
const EXTREME: u64 = 5;

fn hint(fd: &OwnedFd) -> Result<u64, String> {
    let mut hint = 0u64;
    // SAFETY: room for a hint.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), GET, &raw mut hint) }, "F_GET_RW_HINT")?;
    Ok(hint)
}

fn main() {
    zoo::run(|z| {
        let create = |name: &str| {
            std::fs::File::create(z.path(name)).map(OwnedFd::from).map_err(|e| e.to_string())
        };
        let (deleted, plain) = (create("deleted")?, create("plain")?);
        std::fs::remove_file(z.path("deleted")).map_err(|e| e.to_string())?;
        let name = cstring("hinted");
        // SAFETY: a name that ends.
        let memory = unsafe { libc::memfd_create(name.as_ptr(), 0) };
        check(memory, "memfd_create")?;
        // SAFETY: a new descriptor.
        let memory = unsafe { OwnedFd::from_raw_fd(memory) };
        for (fd, hint) in [(&deleted, SHORT), (&memory, EXTREME)] {
            // SAFETY: a live hint.
            check(unsafe { libc::fcntl(fd.as_raw_fd(), SET, &raw const hint) }, "F_SET_RW_HINT")?;
        }
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(hint(&deleted)?, SHORT, "hint of the deleted file");
        ensure_eq!(hint(&memory)?, EXTREME, "hint of the memfd");
        ensure_eq!(hint(&plain)?, 0, "hint of the other file");
        Ok(())
    })
}
