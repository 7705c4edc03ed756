//! Kernel state: memory in which many pages are alike: in a row, scattered between others, in another mapping, written zeros.
//! Afterwards each is as it was, and each is its own: what is written to one is in no other.
#![allow(unsafe_code, reason = "raw mappings")]

use zoo::{Check, Rng, Zoo, bytes, ensure, mmap_anon};

const PAGE: usize = 4096;
const PAGES: usize = 1024;

/// What page `at` of area `area` holds.
fn content(area: usize, at: usize) -> Vec<u8> {
    let mut page = vec![0u8; PAGE];
    match at % 8 {
        // All alike, in both areas.
        0..=2 => Rng(1).fill(&mut page),
        // Written, and zero.
        3 => {}
        // Alike within a stretch.
        4 | 5 => Rng(2 + (at / 64) as u64).fill(&mut page),
        // Nobody else's.
        6 => Rng(1000 + (area * PAGES + at) as u64).fill(&mut page),
        // Like another one but for the last byte.
        _ => {
            Rng(1).fill(&mut page);
            page[PAGE - 1] ^= (1 + at / 8) as u8;
        }
    }
    page
}

fn check(z: &Zoo, areas: &mut [&'static mut [u8]; 2]) -> Check {
    z.ready()?;
    z.wait_for_check();
    for (n, area) in areas.iter_mut().enumerate() {
        for at in 0..PAGES {
            let page = &mut area[at * PAGE..(at + 1) * PAGE];
            ensure!(page == content(n, at), "area {n}, page {at}: content");
            // Whoever shares this page with it now differs, and is found out.
            page[at] ^= 0xff;
        }
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let area = |n: usize| {
            let p = mmap_anon(PAGES * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
            // SAFETY: just mapped, and nobody else's.
            let memory = unsafe { bytes(p, PAGES * PAGE) };
            for at in 0..PAGES {
                // Written even where it is zero.
                memory[at * PAGE..(at + 1) * PAGE].fill(1);
                memory[at * PAGE..(at + 1) * PAGE].copy_from_slice(&content(n, at));
            }
            Ok::<_, String>(memory)
        };
        let mut areas = [area(0)?, area(1)?];
        check(z, &mut areas)
    })
}
