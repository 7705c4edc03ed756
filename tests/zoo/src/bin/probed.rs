//! Kernel state: code in which somebody outside has set probes (uprobes): breakpoints, and calls where there is nothing to be
//! done. Two threads are in it all the time. Checked: it computes as before, and nothing is left of the probes.
#![allow(unsafe_code, reason = "functions in assembly, compared with the file that has them")]

use std::arch::global_asm;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use zoo::{Check, ensure_eq};

// One whose first instruction the kernel has to execute elsewhere, and one whose first instruction it can replace.
global_asm!(
    ".globl zoo_stepped",
    "zoo_stepped: lea rax, [rdi + rdi * 2 + 1]",
    "ret",
    ".globl zoo_nothing",
    "zoo_nothing: .byte 0x0f, 0x1f, 0x44, 0x00, 0x00",
    "lea rax, [rdi + 5]",
    "ret",
    ".byte 0xcc, 0xcc, 0xcc, 0xcc",
);

unsafe extern "C" {
    fn zoo_stepped(n: u64) -> u64;
    fn zoo_nothing(n: u64) -> u64;
}

static STOP: AtomicBool = AtomicBool::new(false);
static CALLS: AtomicU64 = AtomicU64::new(0);

/// What is probed when it returns: most of the time a thread is in it.
#[inline(never)]
extern "C" fn stays(ms: u64) -> u64 {
    zoo::nap(ms);
    std::hint::black_box(ms) + 1
}

fn compute(n: u64) -> Check {
    // SAFETY: functions of numbers, which follow the C calling convention and touch nothing else.
    let (stepped, nothing) = unsafe { (zoo_stepped(n), zoo_nothing(n)) };
    ensure_eq!((stepped, nothing), (n * 3 + 1, n + 5), "what the functions compute");
    Ok(())
}

fn call() -> Check {
    zoo::here();
    while !STOP.load(Ordering::SeqCst) {
        compute(CALLS.fetch_add(1, Ordering::SeqCst))?;
        zoo::nap(1);
    }
    Ok(())
}

fn stay() -> Check {
    zoo::here();
    while !STOP.load(Ordering::SeqCst) {
        ensure_eq!(stays(20), 21, "what the function that stays returns");
    }
    Ok(())
}

/// The mapping that an address is in: its start, and where in the file it begins.
fn mapping_of(address: u64) -> Result<(u64, u64), String> {
    let maps = fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let find = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (start, end) = (number(start)?, number(end)?);
        let offset = number(words.nth(1)?)?;
        (start..end).contains(&address).then_some((start, offset))
    };
    maps.lines().find_map(find).ok_or_else(|| format!("nothing is mapped at {address:#x}"))
}

/// Where in the executable a function is.
fn offset_of(function: usize) -> Result<u64, String> {
    let (start, offset) = mapping_of(function as u64)?;
    Ok(function as u64 - start + offset)
}

fn as_in_file(function: usize) -> Check {
    let file = fs::File::open("/proc/self/exe").map_err(|e| e.to_string())?;
    let mut wanted = [0; 8];
    file.read_exact_at(&mut wanted, offset_of(function)?).map_err(|e| e.to_string())?;
    // SAFETY: code of this program, which is mapped readable, and each function has more bytes behind it.
    let found = unsafe { (function as *const [u8; 8]).read_unaligned() };
    ensure_eq!(found, wanted, "code without probes");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let functions = [
            zoo_stepped as *const () as usize,
            zoo_nothing as *const () as usize,
            stays as *const () as usize,
        ];
        let offsets: Result<Vec<String>, String> =
            functions.iter().map(|f| offset_of(*f).map(|offset| offset.to_string())).collect();
        z.publish("offsets", &offsets?.join(" "));
        let threads = [std::thread::spawn(call), std::thread::spawn(stay)];
        zoo::all_here(threads.len())?;
        z.ready()?;
        z.wait_for_check();
        let before = CALLS.load(Ordering::SeqCst);
        zoo::nap(50);
        ensure_eq!(CALLS.load(Ordering::SeqCst) > before, true, "the thread goes on");
        STOP.store(true, Ordering::SeqCst);
        for thread in threads {
            thread.join().map_err(|_| "a thread panicked".to_owned())??;
        }
        compute(7)?;
        functions.iter().try_for_each(|function| as_in_file(*function))
    });
}
