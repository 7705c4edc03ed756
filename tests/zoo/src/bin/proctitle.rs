//! Kernel state: the argument and environment areas as set by PR_SET_MM_MAP: /proc/PID/cmdline shows memory that is
//! elsewhere, and what is written there later.
#![allow(unsafe_code, reason = "prctl and raw memory")]

use zoo::{bytes, ensure, ensure_eq, mmap_anon};

/// struct prctl_mm_map of linux/prctl.h.
#[repr(C)]
#[derive(Debug)]
struct MmMap {
    start_code: u64,
    end_code: u64,
    start_data: u64,
    end_data: u64,
    start_brk: u64,
    brk: u64,
    start_stack: u64,
    arg_start: u64,
    arg_end: u64,
    env_start: u64,
    env_end: u64,
    auxv: u64,
    auxv_size: u32,
    exe_fd: u32,
}

fn cmdline() -> Vec<u8> {
    std::fs::read("/proc/self/cmdline").unwrap_or_default()
}

fn main() {
    zoo::run(|z| {
        let stat = std::fs::read_to_string("/proc/self/stat").map_err(|e| e.to_string())?;
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .map(|(_, rest)| rest.split_whitespace().map(|f| f.parse().unwrap_or(0)).collect())
            .unwrap_or_default();
        let field = |n: usize| fields.get(n - 3).copied().unwrap_or(0);
        let title = mmap_anon(8192, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
        // SAFETY: just mapped.
        let memory = unsafe { bytes(title, 8192) };
        memory[..18].copy_from_slice(b"zoo: a new title\0!");
        // The harness knows its programs by this variable.
        let mark =
            format!("ZOO_RUN={}\0TITLE=here\0", std::env::var("ZOO_RUN").unwrap_or_default());
        memory[4096..4096 + mark.len()].copy_from_slice(mark.as_bytes());
        let at = title as u64;
        let map = MmMap {
            start_code: field(26),
            end_code: field(27),
            start_data: field(45),
            end_data: field(46),
            start_brk: field(47),
            // SAFETY: brk(0) only asks.
            brk: unsafe { libc::syscall(libc::SYS_brk, 0) as u64 },
            start_stack: field(28),
            arg_start: at,
            arg_end: at + 17,
            env_start: at + 4096,
            env_end: at + 4096 + mark.len() as u64,
            auxv: 0,
            auxv_size: 0,
            exe_fd: u32::MAX,
        };
        // SAFETY: `map` is a local of the size given; PR_SET_MM_MAP is 14.
        let ret =
            unsafe { libc::prctl(libc::PR_SET_MM, 14, &raw const map, size_of::<MmMap>(), 0) };
        if ret != 0 {
            z.skip(&format!("PR_SET_MM_MAP: {}", std::io::Error::last_os_error()));
        }
        ensure_eq!(cmdline(), b"zoo: a new title\0", "set-up");
        z.ready()?;
        z.wait_for_check();
        // A lazy restore may still bring these pages: the kernel waits for them if they are read, but not for who reads /proc.
        ensure!(memory.starts_with(b"zoo:") && memory[4096..].starts_with(b"ZOO_RUN"), "memory");
        ensure_eq!(cmdline(), b"zoo: a new title\0", "command line");
        memory[5..10].copy_from_slice(b"still");
        ensure!(
            cmdline().starts_with(b"zoo: still"),
            "the command line does not follow the memory any more"
        );
        let environ = std::fs::read("/proc/self/environ").map_err(|e| e.to_string())?;
        ensure_eq!(environ, mark.as_bytes(), "environment");
        Ok(())
    })
}
