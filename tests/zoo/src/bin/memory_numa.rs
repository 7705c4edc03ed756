//! Kernel state: NUMA policies, of the process (set_mempolicy(2)) and of mappings (mbind(2)): of all modes, with and without
//! flags, of anonymous, shared and file memory, and of a part of what was one mapping. A child has another policy than its parent.
#![allow(unsafe_code, reason = "raw mappings, and calls that libc has no wrapper for")]

use zoo::{Check, Zoo, bytes, check, ensure, ensure_eq, mmap_anon};

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

const PREFERRED: i32 = 1;
const BIND: i32 = 2;
const INTERLEAVE: i32 = 3;
const LOCAL: i32 = 4;
const STATIC_NODES: i32 = 1 << 15;
const RELATIVE_NODES: i32 = 1 << 14;

/// Mode and the first nodes.
type Policy = (i32, u64);

fn policy(at: Option<*const u8>) -> Result<Policy, String> {
    let (mut mode, mut nodes) = (0i32, [0u64; 16]);
    let (address, flags) = at.map_or((0, 0usize), |at| (at as usize, 2));
    // SAFETY: the kernel stores an int and 1024 bits.
    let done = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            nodes.as_mut_ptr(),
            1024usize,
            address,
            flags,
        )
    };
    ensure!(done == 0, "get_mempolicy: {}", std::io::Error::last_os_error());
    Ok((mode, nodes[0]))
}

fn set(policy: Policy) -> Check {
    let (mode, nodes) = policy;
    let (mask, bits) = if nodes == 0 { (std::ptr::null(), 0usize) } else { (&raw const nodes, 65) };
    // SAFETY: 64 bits are read.
    let done = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits) };
    check(done as i32, "set_mempolicy")
}

fn bind(at: *mut u8, len: usize, (mode, nodes): Policy) -> Check {
    let (mask, bits) = if nodes == 0 { (std::ptr::null(), 0usize) } else { (&raw const nodes, 65) };
    // SAFETY: 64 bits are read; what is there does not change.
    let done = unsafe { libc::syscall(libc::SYS_mbind, at, len, mode, mask, bits, 0) };
    check(done as i32, "mbind")
}

fn child(z: &Zoo, own: Policy) -> Check {
    set(own)?;
    let all = [
        (BIND, 1u64),
        (PREFERRED, 1),
        (INTERLEAVE, 1),
        (LOCAL, 0),
        (BIND | STATIC_NODES, 1),
        (INTERLEAVE | RELATIVE_NODES, 1),
    ];
    let mut places: Vec<(*mut u8, usize, Policy)> = Vec::new();
    for (n, policy) in all.into_iter().enumerate() {
        let shared = if n % 2 == 1 { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let p = mmap_anon(9 * PAGE, RW, shared)?;
        // SAFETY: just mapped.
        unsafe { bytes(p, 9 * PAGE) }.fill(n as u8 + 1);
        // A part of it, so that there are mappings with and without one side by side.
        bind(p.wrapping_add(3 * PAGE), 3 * PAGE, policy)?;
        places.push((p, n, policy));
    }
    // Large enough to come back in huge pages.
    let p = mmap_anon(24 << 20, RW, libc::MAP_PRIVATE)?;
    bind(p, 24 << 20, (BIND, 1))?;
    // SAFETY: just mapped.
    unsafe { bytes(p, 24 << 20) }.fill(77);
    z.ready()?;
    z.wait_for_check();
    ensure_eq!(policy(None)?, own, "that of the process");
    for (p, n, wanted) in places {
        for (page, wanted) in [(0, (0, 0)), (3, wanted), (5, wanted), (6, (0, 0))] {
            let at = p.wrapping_add(page * PAGE);
            ensure_eq!(policy(Some(at))?, wanted, "area {n}, page {page}");
            // SAFETY: a byte of ours.
            ensure!(unsafe { at.read() } == n as u8 + 1, "area {n}: content");
        }
    }
    ensure_eq!(policy(Some(p))?, (BIND, 1), "the large area");
    // SAFETY: as above.
    ensure!(unsafe { bytes(p, 24 << 20) }.iter().all(|b| *b == 77), "the large area: content");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        if policy(None).is_err() {
            z.skip("the kernel has no NUMA policies");
        }
        child(z, (PREFERRED, 1))
    })
}
