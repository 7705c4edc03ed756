//! Kernel state: what is done with mappings that are yet to come: mlockall(2) with MCL_FUTURE (ZOO_LOCK=1, 2: with
//! MCL_ONFAULT), merging of equal pages (PR_SET_MEMORY_MERGE, ZOO_MERGE), transparent huge pages for advised memory only
//! (PR_THP_DISABLE_EXCEPT_ADVISED, ZOO_THP). In a child, so that a parent without stands beside it.
#![allow(unsafe_code, reason = "raw mappings")]

use zoo::{Check, Rng, Zoo, bytes, check, ensure, ensure_eq, mmap_anon, ok};

const PAGE: usize = 4096;
const LEN: usize = 64 * PAGE;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;
const PR_THP_DISABLE_EXCEPT_ADVISED: usize = 2;

/// The flags of the mapping that begins at an address, as smaps has them when no memory of it is still to come (`um`, in a
/// lazy restore).
fn flags(at: *const u8) -> Result<String, String> {
    let until = zoo::now() + 10_000_000_000;
    loop {
        let flags = flags_now(at)?;
        if !flags.contains(" um ") || zoo::now() > until {
            return Ok(flags);
        }
        zoo::nap(5);
    }
}

fn flags_now(at: *const u8) -> Result<String, String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").map_err(|e| e.to_string())?;
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|r| r.split_once('-'));
        if let Some((start, end)) = range
            && let (Ok(start), Ok(end)) =
                (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            inside = (start..end).contains(&(at as usize));
        } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
            return Ok(format!("{flags} "));
        }
    }
    Err(format!("no mapping at {at:p}"))
}

fn has(at: *const u8, flag: &str) -> Result<bool, String> {
    Ok(flags(at)?.contains(&format!(" {flag} ")))
}

fn resident(at: *mut u8) -> Result<bool, String> {
    let mut there = 0u8;
    // SAFETY: one page, one byte.
    check(unsafe { libc::mincore(at.cast(), PAGE, &raw mut there) }, "mincore")?;
    Ok(there & 1 != 0)
}

fn prctl(what: i32, a: usize, b: usize) -> Result<i64, String> {
    // SAFETY: integers.
    ok(unsafe { libc::prctl(what, a, b, 0, 0) } as i64, &format!("prctl {what}"))
}

/// What a new mapping looks like: locked, locked on fault, there at once, mergeable.
fn fresh() -> Result<[bool; 4], String> {
    let p = mmap_anon(PAGE, RW, libc::MAP_PRIVATE)?;
    let is = [has(p, "lo")?, has(p, "lf")?, resident(p)?, has(p, "mg")?];
    // SAFETY: just mapped.
    check(unsafe { libc::munmap(p.cast(), PAGE) }, "munmap")?;
    Ok(is)
}

fn child(z: &Zoo) -> Check {
    let (lock, merge, thp) =
        (z.param("ZOO_LOCK", 0), z.param("ZOO_MERGE", 0), z.param("ZOO_THP", 0));
    let before = mmap_anon(LEN, RW, libc::MAP_PRIVATE)?;
    let unlike = mmap_anon(LEN, RW, libc::MAP_PRIVATE)?;
    // Neighbours that must not become one mapping.
    // SAFETY: just mapped.
    unsafe {
        check(libc::madvise(unlike.cast(), LEN, libc::MADV_DONTDUMP), "MADV_DONTDUMP")?;
        Rng(1).fill(bytes(before, LEN));
        Rng(2).fill(bytes(unlike, LEN));
    }
    if merge != 0 {
        if let Err(e) = prctl(PR_SET_MEMORY_MERGE, 1, 0) {
            z.skip(&e);
        }
        // SAFETY: a range of our own.
        check(unsafe { libc::madvise(unlike.cast(), LEN, libc::MADV_UNMERGEABLE) }, "unmergeable")?;
    }
    if thp != 0
        && let Err(e) = prctl(libc::PR_SET_THP_DISABLE, 1, PR_THP_DISABLE_EXCEPT_ADVISED)
    {
        z.skip(&e);
    }
    if lock != 0 {
        let flags = libc::MCL_FUTURE | if lock == 2 { libc::MCL_ONFAULT } else { 0 };
        // SAFETY: an integer.
        check(unsafe { libc::mlockall(flags) }, "mlockall")?;
    }
    let after = mmap_anon(LEN, RW, libc::MAP_PRIVATE)?;
    // SAFETY: just mapped.
    Rng(3).fill(unsafe { bytes(after, LEN) });
    let want = [lock != 0, lock == 2, lock == 1, merge != 0];
    ensure_eq!(fresh()?, want, "a new mapping, before (locked, on fault, there, mergeable)");
    let old = (flags(before)?, flags(unlike)?, flags(after)?);
    z.publish("up", "");
    z.wait_for_check();
    ensure_eq!(fresh()?, want, "a new mapping (locked, on fault, there, mergeable)");
    ensure_eq!((flags(before)?, flags(unlike)?, flags(after)?), old, "flags of old mappings");
    for (i, p) in [before, unlike, after].into_iter().enumerate() {
        // SAFETY: mapped above.
        Rng(1 + i as u64).verify(unsafe { bytes(p, LEN) }, "memory")?;
    }
    ensure_eq!(prctl(PR_GET_MEMORY_MERGE, 0, 0).unwrap_or(0), i64::from(merge != 0), "merging");
    let disabled = if thp != 0 { 3 } else { 0 };
    ensure_eq!(prctl(libc::PR_GET_THP_DISABLE, 0, 0)?, disabled, "PR_GET_THP_DISABLE");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let pid = z.fork(child)?;
        let until = zoo::now() + 10_000_000_000;
        while !z.path("up").exists() && !z.path("skip").exists() {
            z.complaints()?;
            ensure!(zoo::now() < until, "the child does not come up");
            zoo::nap(1);
        }
        if z.path("skip").exists() {
            zoo::exit_now(0);
        }
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(fresh()?, [false; 4], "a new mapping of the parent");
        z.join(pid)
    })
}
