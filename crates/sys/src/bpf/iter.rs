//! Programs that the kernel runs for each of its objects of a kind, and what they write: BPF iterators.

use super::{Attr, call, owned, set};
use crate::call::{Errno, Result, SyscallError};
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

const PROG_LOAD: usize = 5;
const LINK_CREATE: usize = 28;
const ITER_CREATE: usize = 33;

const TYPE_TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;

/// Loads a program that is to be run for each object; `target` is the number of the iterator's function in the kernel's type
/// information. It lives as long as what has been made of it.
///
/// # Errors
/// `EPERM` without `CAP_BPF` and `CAP_PERFMON`, `EINVAL` or `EACCES` if the kernel does not find it safe.
pub fn load(instructions: &[u64], target: u32) -> Result<OwnedFd> {
    // Helpers that read kernel memory are for programs only that may be passed on under the GPL, too.
    const LICENSE: &[u8] = b"Dual MIT/GPL\0";
    // The kernel gives up looking at a program when a signal comes, as those do that tell of a traced thread's stop.
    const TRIES: u32 = 50;
    let mut tries = 0;
    loop {
        let mut attr: Attr = [0; 16];
        set(&mut attr, 0, TYPE_TRACING);
        set(&mut attr, 4, instructions.len() as u32);
        attr[1] = instructions.as_ptr() as u64;
        attr[2] = LICENSE.as_ptr() as u64;
        attr[6] = u64::from_ne_bytes(*b"rewake\0\0");
        set(&mut attr, 68, TRACE_ITER);
        set(&mut attr, 108, target);
        match call("BPF_PROG_LOAD", PROG_LOAD, &mut attr, 120) {
            Err(e) if e.errno == Errno::AGAIN && tries < TRIES => tries += 1,
            done => return done.map(owned),
        }
    }
}

/// Whose objects a program is run for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// Those of a thread.
    Thread(i32),
    /// Those of all threads of a process, also if its first thread has ended.
    Process(i32),
    /// Those of everybody.
    All,
}

/// A file that yields what `program` writes about objects; reading runs it.
///
/// # Errors
/// `EINVAL` before Linux 6.1, or if there is no such thread; `EPERM`.
pub fn of(program: BorrowedFd<'_>, whose: Whose) -> Result<OwnedFd> {
    // union bpf_iter_link_info
    let info: [u32; 4] = match whose {
        Whose::Thread(tid) => [tid as u32, 0, 0, 0],
        Whose::Process(pid) => [0, pid as u32, 0, 0],
        Whose::All => [0; 4],
    };
    let mut attr: Attr = [0; 16];
    set(&mut attr, 0, program.as_raw_fd() as u32);
    set(&mut attr, 8, TRACE_ITER);
    attr[2] = info.as_ptr() as u64;
    set(&mut attr, 24, size_of_val(&info) as u32);
    let link = call("BPF_LINK_CREATE", LINK_CREATE, &mut attr, 32).map(owned)?;
    let mut attr: Attr = [0; 16];
    set(&mut attr, 0, link.as_raw_fd() as u32);
    call("BPF_ITER_CREATE", ITER_CREATE, &mut attr, 8).map(owned)
}

/// The kernel's description of its types (BTF).
#[derive(Debug)]
pub struct Types(Bytes);

#[derive(Debug)]
enum Bytes {
    /// Address and length (since Linux 6.16).
    Mapped(*const u8, usize),
    Copied(Vec<u8>),
}

impl Types {
    /// Gets them.
    ///
    /// # Errors
    /// `ENOENT` if the kernel has none.
    pub fn of_kernel() -> Result<Types> {
        let failed = |errno| SyscallError::new("/sys/kernel/btf/vmlinux", errno);
        let file = std::fs::File::open("/sys/kernel/btf/vmlinux")
            .map_err(|e| failed(Errno::from_io_error(&e).unwrap_or(Errno::NOENT)))?;
        let len = rustix::fs::fstat(&file).map_err(failed)?.st_size as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::PRIVATE,
                &file,
                0,
            )
        };
        if let Ok(base) = base {
            return Ok(Types(Bytes::Mapped(base.cast(), len)));
        }
        let mut bytes = Vec::with_capacity(len);
        std::io::Read::read_to_end(&mut &file, &mut bytes)
            .map_err(|e| failed(Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
        Ok(Types(Bytes::Copied(bytes)))
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            // SAFETY: mapped for as long as `self` is there, from pages of the kernel that nobody ever writes to.
            Bytes::Mapped(base, len) => unsafe { std::slice::from_raw_parts(*base, *len) },
            Bytes::Copied(bytes) => bytes,
        }
    }
}

impl Drop for Types {
    fn drop(&mut self) {
        if let Bytes::Mapped(base, len) = self.0 {
            // SAFETY: the mapping made above; `bytes` are lent no longer than `self` lives.
            let _ = unsafe { rustix::mm::munmap(base.cast_mut().cast(), len) };
        }
    }
}
