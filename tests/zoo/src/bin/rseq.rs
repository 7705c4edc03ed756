//! Kernel state: registered rseq areas. Threads count in per-CPU cells inside restartable sequences all through the
//! checkpoint: a sequence that is neither restarted nor finished, or a stale cpu_id, loses or doubles a count.
#![allow(unsafe_code, reason = "a restartable sequence is assembly by nature")]

use std::sync::atomic::{AtomicBool, Ordering};
use zoo::{ensure, ensure_eq};

unsafe extern "C" {
    /// Offset of the C library's registered area from the thread pointer; size 0 if it did not register one.
    static __rseq_offset: isize;
    static __rseq_size: u32;
}

const CPUS: usize = 1024;

/// One cell per CPU, each on its own cache line.
#[repr(align(64))]
struct Cell(std::cell::UnsafeCell<u64>);
// SAFETY: written only inside restartable sequences on the cell's own CPU.
unsafe impl Sync for Cell {}
static CELLS: [Cell; CPUS] = [const { Cell(std::cell::UnsafeCell::new(0)) }; CPUS];
static STOP: AtomicBool = AtomicBool::new(false);

fn area() -> *mut u8 {
    let thread: *mut u8;
    // SAFETY: reads the thread pointer, which the ABI keeps at fs:0; the offset is the C library's.
    unsafe {
        std::arch::asm!("mov {}, fs:0", out(reg) thread, options(nostack, readonly));
        thread.offset(__rseq_offset)
    }
}

fn cpu(area: *const u8) -> u32 {
    // SAFETY: cpu_id is the second word of the area, updated by the kernel.
    unsafe { std::ptr::read_volatile(area.add(4).cast()) }
}

/// Adds one to the cell of the CPU this runs on; false if the sequence was restarted.
fn add(area: *mut u8, cpu: u32) -> bool {
    let done: u64;
    // SAFETY: the sequence's only store is its last instruction; the descriptor is static.
    unsafe {
        std::arch::asm!(
            ".pushsection __rseq_cs, \"aw\"",
            ".balign 32",
            "33: .long 0, 0",
            ".quad 34f, 35f - 34f, 36f",
            ".popsection",
            "xor {done:e}, {done:e}",
            "lea {t}, [rip + 33b]",
            "mov [{area} + 8], {t}",
            "34:",
            "cmp [{area} + 4], {cpu:e}",
            "jne 37f",
            // Stay in the sequence for a while, so that checkpoints fall into it; the value is read first.
            "mov {t}, [{cell}]",
            "mov {n:e}, 300",
            "38: dec {n:e}",
            "jnz 38b",
            "inc {t}",
            "mov [{cell}], {t}",
            "35:",
            "mov {done:e}, 1",
            "jmp 37f",
            // The signature the C library registered, in front of the abort handler.
            ".byte 0x0f, 0xb9, 0x3d",
            ".long 0x53053053",
            "36:",
            "37:",
            "mov qword ptr [{area} + 8], 0",
            area = in(reg) area,
            cpu = in(reg) cpu,
            cell = in(reg) CELLS[cpu as usize % CPUS].0.get(),
            t = out(reg) _,
            n = out(reg) _,
            done = out(reg) done,
        );
    }
    done == 1
}

fn main() {
    zoo::run(|z| {
        // SAFETY: constants of the C library.
        if unsafe { __rseq_size } == 0 {
            z.skip("the C library registered no rseq area");
        }
        let worker = || {
            let area = area();
            zoo::here();
            let (mut done, mut restarted) = (0u64, 0u64);
            while !STOP.load(Ordering::Relaxed) {
                match add(area, cpu(area)) {
                    true => done += 1,
                    false => restarted += 1,
                }
            }
            (area as usize, done, restarted, cpu(area) as usize)
        };
        let threads: Vec<_> = (0..3).map(|_| std::thread::spawn(worker)).collect();
        let before = area();
        zoo::all_here(3)?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(area(), before, "address of the rseq area");
        for _ in 0..100 {
            // The thread may be moved between the two looks: try again then.
            let mut tries = 0;
            // SAFETY: only asks.
            while cpu(area()) as i32 != unsafe { libc::sched_getcpu() } {
                tries += 1;
                ensure!(tries < 100, "cpu_id is {} and does not follow", cpu(area()) as i32);
            }
            zoo::nap(1);
        }
        STOP.store(true, Ordering::Relaxed);
        let mut total = 0;
        for thread in threads {
            let (_, done, restarted, last) = thread.join().map_err(|_| "a worker died")?;
            println!("{done} done, {restarted} restarted, last cpu_id {}", last as i32);
            ensure!(done > 0, "a worker finished no sequence");
            total += done;
        }
        // SAFETY: all workers are gone.
        let counted: u64 = CELLS.iter().map(|c| unsafe { *c.0.get() }).sum();
        ensure_eq!(counted, total, "counted in the cells, against sequences finished");
        Ok(())
    })
}
