//! Kernel state: private memory that the kernel itself writes to, when it is told to: a read(2) of some of it. After a lazy
//! restore the thread may have to wait there for what has not come.
#![allow(unsafe_code, reason = "raw mappings, read into them")]

use std::os::fd::AsRawFd;
use zoo::{Rng, bytes, ensure, mmap_anon, ok};

const LEN: usize = 8 << 20;
/// Where it is read to, and how much.
const AT: usize = 5 << 20;
const MUCH: usize = 1 << 20;

fn main() {
    zoo::run(|z| {
        let region = mmap_anon(LEN, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
        // SAFETY: just mapped.
        Rng(7).fill(unsafe { bytes(region, LEN) });
        let zeros = std::fs::File::open("/dev/zero").map_err(|e| e.to_string())?;
        z.ready()?;
        let mut was_read = false;
        while !z.checking() {
            if !was_read && z.path("read").exists() {
                let mut done = 0;
                // Being stopped may cut it short.
                while done < MUCH {
                    // SAFETY: within the region.
                    let to = unsafe { region.add(AT + done) };
                    // SAFETY: as much as there is left.
                    let got = unsafe { libc::read(zeros.as_raw_fd(), to.cast(), MUCH - done) };
                    done += ok(got as i64, "read")? as usize;
                }
                was_read = true;
            }
            zoo::nap(10);
        }
        let mut wanted = vec![0; LEN];
        Rng(7).fill(&mut wanted);
        if was_read {
            wanted[AT..AT + MUCH].fill(0);
        }
        // SAFETY: mapped.
        ensure!(unsafe { bytes(region, LEN) } == wanted, "the memory is not what it was");
        Ok(())
    });
}
