//! Kernel state: set_tid_address as the C library uses it: joining a thread that ends after a restore.
#![allow(unsafe_code, reason = "the shared reference outlives the program")]

use zoo::ensure_eq;

fn main() {
    zoo::run(|z| {
        // SAFETY: the program ends with this closure.
        let z: &'static zoo::Zoo = unsafe { &*(z as *const zoo::Zoo) };
        let threads: Vec<_> = (0..50u64)
            .map(|i| {
                std::thread::spawn(move || {
                    let before = zoo::tid();
                    zoo::here();
                    z.wait_for_check();
                    (before, zoo::tid(), i * i)
                })
            })
            .collect();
        zoo::all_here(50)?;
        z.ready()?;
        z.wait_for_check();
        for (i, thread) in threads.into_iter().enumerate() {
            let (before, after, value) =
                thread.join().map_err(|_| format!("thread {i} panicked"))?;
            ensure_eq!(after, before, "id of thread {i}");
            ensure_eq!(value, (i * i) as u64, "result of thread {i}");
        }
        Ok(())
    })
}
