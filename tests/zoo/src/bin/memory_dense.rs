//! Kernel state: large mappings of which every page is there, with odd bounds, holes, and protection, locks and advice of all
//! kinds: what a restore may fill in huge pages. Afterwards every byte is as it was, no more of it is resident, and no
//! mapping has an advice that nobody gave.
#![allow(unsafe_code, reason = "raw mappings")]

use zoo::{Check, Rng, Zoo, bytes, ensure, ensure_eq, mmap_anon};

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;

struct Area {
    what: &'static str,
    memory: &'static mut [u8],
    sum: u64,
}

fn sum(memory: &[u8]) -> u64 {
    memory
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

/// Resident kilobytes, and the flags of all mappings in there.
fn seen(memory: &[u8]) -> Result<(u64, Vec<String>), String> {
    let text = std::fs::read_to_string("/proc/self/smaps").map_err(|e| e.to_string())?;
    let (start, end) = (memory.as_ptr() as usize, memory.as_ptr() as usize + memory.len());
    let mut found = (0, Vec::new());
    let mut inside = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else { continue };
        if let Some((from, to)) = first.split_once('-')
            && let (Ok(from), Ok(to)) =
                (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
        {
            inside = from < end && start < to;
        }
        match first {
            "Rss:" if inside => found.0 += second.and_then(|v| v.parse::<u64>().ok()).unwrap_or(0),
            // Pages that come only when they are touched show in this one.
            "VmFlags:" if inside => found.1.push(line.replace(" um", "")),
            _ => {}
        }
    }
    Ok(found)
}

fn area(what: &'static str, len: usize, seed: u64) -> Result<Area, String> {
    let p = mmap_anon(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
    // SAFETY: just mapped, and nobody else's.
    let memory = unsafe { bytes(p, len) };
    Rng(seed).fill(memory);
    Ok(Area { what, memory, sum: 0 })
}

fn call(what: &str, result: i32) -> Check {
    ensure!(result == 0, "{what}: {}", std::io::Error::last_os_error());
    Ok(())
}

fn areas() -> Result<Vec<Area>, String> {
    let plain = area("plain", 4 * HUGE + 3 * PAGE, 1)?;
    // As large as the area that a restore may use, and more.
    let large = area("large", 40 * HUGE - PAGE, 2)?;
    let holes = area("holes", 5 * HUGE, 3)?;
    let at = |area: &Area, offset: usize| area.memory.as_ptr().wrapping_add(offset);
    for offset in [0, HUGE + 5 * PAGE, 3 * HUGE - PAGE] {
        let start = at(&holes, offset).cast_mut().cast();
        // SAFETY: a page of our own, which is zero from then on.
        call("MADV_DONTNEED", unsafe { libc::madvise(start, PAGE, libc::MADV_DONTNEED) })?;
    }
    let mut all = vec![plain, large, holes];
    let protections = [
        ("read-only", libc::PROT_READ),
        ("executable", libc::PROT_READ | libc::PROT_EXEC),
        ("all", libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC),
    ];
    for (seed, (what, prot)) in (4..).zip(protections) {
        let area = area(what, 3 * HUGE, seed)?;
        let (start, len) = (area.memory.as_ptr().cast_mut().cast(), area.memory.len());
        // SAFETY: our own, and not written any more.
        call("mprotect", unsafe { libc::mprotect(start, len, prot) })?;
        all.push(area);
    }
    for (seed, (what, advice)) in
        (7..).zip([("huge", libc::MADV_HUGEPAGE), ("small", libc::MADV_NOHUGEPAGE)])
    {
        let area = area(what, 3 * HUGE + PAGE, seed)?;
        let (start, len) = (area.memory.as_ptr().cast_mut().cast(), area.memory.len());
        // SAFETY: it changes nothing of what is there.
        call("madvise", unsafe { libc::madvise(start, len, advice) })?;
        all.push(area);
    }
    let locked = area("locked", 2 * HUGE + PAGE, 9)?;
    // SAFETY: as above. Where so much may not be locked it is one area more without.
    unsafe { libc::mlock(locked.memory.as_ptr().cast(), locked.memory.len()) };
    all.push(locked);
    all.iter_mut().for_each(|area| area.sum = sum(area.memory));
    Ok(all)
}

fn check(z: &Zoo, areas: &mut [Area]) -> Check {
    let before = areas.iter().map(|a| seen(a.memory)).collect::<Result<Vec<_>, _>>()?;
    z.ready()?;
    z.wait_for_check();
    for (area, (rss, flags)) in areas.iter_mut().zip(before) {
        let what = area.what;
        let (rss_now, flags_now) = seen(area.memory)?;
        ensure_eq!(sum(area.memory), area.sum, "{what}: content");
        ensure_eq!(flags_now, flags, "{what}: mappings");
        ensure!(rss_now <= rss + rss / 50, "{what}: {rss_now} kB resident, {rss} before");
        if !matches!(what, "read-only" | "executable") {
            area.memory.iter_mut().step_by(PAGE).for_each(|b| *b ^= 0xff);
        }
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let mut areas = areas()?;
        check(z, &mut areas)
    })
}
