//! Kernel state: memory that forked processes share copy-on-write: pages that all have, that siblings share while the parent has
//! its own since, that one has written, given back, or made read-only, in anonymous memory and in the program's data.
#![allow(unsafe_code, reason = "raw mappings")]

use zoo::{Check, Rng, Zoo, bytes, ensure, ensure_eq, mmap_anon};

const PAGE: usize = 4096;
const PAGES: usize = 3072;
const CHILDREN: usize = 5;
/// Enough to be worth sharing, all together.
const LEN: usize = PAGES * PAGE;

static mut DATA: [u8; 8 * PAGE] = [7; 8 * PAGE];

fn data() -> &'static mut [u8] {
    let data = &raw mut DATA;
    // SAFETY: each process has one thread, and one such reference at a time.
    unsafe { &mut *data }
}

/// What a process should have in the shared mapping: kept as sums, which are not in that mapping.
fn sums(memory: &[u8]) -> Vec<u64> {
    let sum = |page: &[u8]| {
        page.iter().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
        })
    };
    memory.chunks(PAGE).map(sum).collect()
}

/// Proportional and whole resident bytes of the mapping at `start`, in kB.
fn resident(start: usize) -> Result<(u64, u64), String> {
    let text = std::fs::read_to_string("/proc/self/smaps").map_err(|e| e.to_string())?;
    let mut found = (0, 0);
    let mut inside = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else { continue };
        if let Some((from, to)) = first.split_once('-')
            && let (Ok(from), Ok(to)) =
                (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
        {
            inside = from < start + LEN && start < to;
        }
        let value = || second.and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
        match first {
            "Rss:" if inside => found.0 += value(),
            "Pss:" if inside => found.1 += value(),
            _ => {}
        }
    }
    Ok(found)
}

/// Looks whether everything is as it was, and waits until all have looked. `all` are the others, whom the parent waits for.
fn live(z: &Zoo, name: &str, memory: &[u8], all: &[String]) -> Check {
    let wait = |what: &str| all.iter().try_for_each(|other| z.wait_for(&format!("{what}.{other}")));
    let (before, of_data) = (sums(memory), sums(data()));
    z.publish(&format!("up.{name}"), "");
    wait("up")?;
    if !all.is_empty() {
        z.publish("all-up", "");
    }
    z.wait_for("all-up")?;
    let shared = resident(memory.as_ptr() as usize)?;
    z.publish(&format!("seen.{name}"), "");
    wait("seen")?;
    if !all.is_empty() {
        z.ready()?;
    }
    z.wait_for_check();
    let now = sums(memory);
    let differs = before.iter().zip(&now).position(|(a, b)| a != b);
    ensure!(differs.is_none(), "{name}: page {differs:?} differs");
    ensure_eq!(sums(data()), of_data, "{name}: data");
    let (rss, pss) = resident(memory.as_ptr() as usize)?;
    let (had, had_pss) = shared;
    ensure!(rss <= had + had / 50 + 64, "{name}: {rss} kB resident, {had} before");
    // As many have them as before.
    ensure!(pss <= had_pss + had_pss / 20 + 64, "{name}: {pss} kB are its share, {had_pss} before");
    z.publish(&format!("ok.{name}"), "");
    wait("ok")?;
    if !all.is_empty() {
        z.publish("done", "");
    }
    z.wait_for("done")
}

fn main() {
    zoo::run(|z| {
        let p = mmap_anon(LEN, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
        // SAFETY: just mapped, and private to each process.
        let memory = unsafe { bytes(p, LEN) };
        Rng(1).fill(memory);
        data()[PAGE] = 1;
        let mut pids = Vec::new();
        let mut names = Vec::new();
        for child in 0..CHILDREN {
            // Children born before share what this was.
            memory[child * 7 * PAGE] ^= 1;
            data()[2 * PAGE] = child as u8;
            let name = format!("child{child}");
            names.push(name.clone());
            if child == 0 {
                names.push("grandchild".to_string());
            }
            pids.push(z.fork(|z| {
                memory[(100 + child) * PAGE] ^= 0xff;
                let at = |page: usize| memory.as_ptr().wrapping_add(page * PAGE).cast_mut().cast();
                let mut grandchild = None;
                match child {
                    0 => {
                        memory[200 * PAGE] ^= 1;
                        grandchild = Some(z.fork(|z| live(z, "grandchild", memory, &[]))?);
                        memory[201 * PAGE] ^= 1;
                    }
                    // SAFETY: pages of our own mapping, which are then zero.
                    1 => unsafe {
                        ensure_eq!(
                            libc::madvise(at(300), 16 * PAGE, libc::MADV_DONTNEED),
                            0,
                            "madvise"
                        );
                    },
                    // SAFETY: as above; nobody writes them any more.
                    2 => unsafe {
                        ensure_eq!(
                            libc::mprotect(at(400), 16 * PAGE, libc::PROT_READ),
                            0,
                            "mprotect"
                        );
                    },
                    _ => {}
                }
                live(z, &format!("child{child}"), memory, &[])?;
                grandchild.map_or(Ok(()), |pid| z.join(pid))
            })?);
        }
        memory[500 * PAGE] ^= 1;
        data()[4 * PAGE] = 9;
        live(z, "parent", memory, &names)?;
        pids.into_iter().try_for_each(|pid| z.join(pid))
    })
}
