//! Kernel state: the whole vector and floating-point register file, held by threads that spin without touching memory:
//! x87 stack and control word, MXCSR, YMM, and with AVX-512 all ZMM and mask registers.
#![allow(unsafe_code, reason = "registers are held in assembly")]

use std::sync::atomic::{AtomicU32, Ordering};
use zoo::{Rng, ensure, ensure_eq};

/// The threads spin until this is 1.
static GO: AtomicU32 = AtomicU32::new(0);
static SPINNING: AtomicU32 = AtomicU32::new(0);

#[repr(C, align(64))]
#[derive(Clone)]
struct Vectors([[u8; 64]; 32]);

/// Loads 16 YMM registers, spins, stores them.
fn ymm(load: &Vectors, store: &mut Vectors) {
    // SAFETY: 16 loads and stores within the two arrays; every register is declared by the ABI clobber.
    unsafe {
        std::arch::asm!(
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "vmovdqu ymm\\i, [r10 + 64*\\i]",
            ".endr",
            "2: pause",
            "cmp dword ptr [r9], 0",
            "je 2b",
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "vmovdqu [r11 + 64*\\i], ymm\\i",
            ".endr",
            "vzeroupper",
            in("r9") GO.as_ptr(), in("r10") load, in("r11") store, clobber_abi("C"),
        );
    }
}

/// Loads 32 ZMM and 7 mask registers, spins, stores them.
fn zmm(load: &Vectors, store: &mut Vectors, masks: &mut [u64; 8]) {
    // SAFETY: as above, and 7 words of `masks`.
    unsafe {
        std::arch::asm!(
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "vmovdqu64 zmm\\i, [r10 + 64*\\i]",
            ".endr",
            "kmovq k1, [r8 + 8]", "kmovq k2, [r8 + 16]", "kmovq k3, [r8 + 24]", "kmovq k4, [r8 + 32]",
            "kmovq k5, [r8 + 40]", "kmovq k6, [r8 + 48]", "kmovq k7, [r8 + 56]",
            "2: pause",
            "cmp dword ptr [r9], 0",
            "je 2b",
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "vmovdqu64 [r11 + 64*\\i], zmm\\i",
            ".endr",
            "kmovq [r8 + 8], k7", "kmovq [r8 + 16], k6", "kmovq [r8 + 24], k5", "kmovq [r8 + 32], k4",
            "kmovq [r8 + 40], k3", "kmovq [r8 + 48], k2", "kmovq [r8 + 56], k1",
            "vzeroupper",
            in("r8") masks, in("r9") GO.as_ptr(), in("r10") load, in("r11") store, clobber_abi("C"),
        );
    }
}

/// Sets the x87 control word and MXCSR to odd values, pushes four numbers, spins, takes everything back.
fn x87(control: u16, mxcsr: u32) -> ([f64; 4], u16, u32, u16) {
    let mut values = [1.5f64, -2.25, 1e300, 3.0e-300];
    let (mut control_after, mut mxcsr_after, mut tags) = (0u16, 0u32, [0u8; 28]);
    let (mut control_before, mut mxcsr_before) = (0u16, 0u32);
    // SAFETY: the named memory only; both control registers are put back before Rust code runs again.
    unsafe {
        std::arch::asm!(
            "fnstcw [rsi]", "stmxcsr [rdi]",
            "fldcw [r8]", "ldmxcsr [rcx]",
            "fld qword ptr [r10]", "fld qword ptr [r10 + 8]", "fld qword ptr [r10 + 16]", "fld qword ptr [r10 + 24]",
            "2: pause",
            "cmp dword ptr [r9], 0",
            "je 2b",
            "fnstcw [rdx]", "stmxcsr [rax]",
            "fstp qword ptr [r10 + 24]", "fstp qword ptr [r10 + 16]", "fstp qword ptr [r10 + 8]", "fstp qword ptr [r10]",
            "fnstenv [r11]",
            "fldcw [rsi]", "ldmxcsr [rdi]",
            in("rsi") &raw mut control_before, in("rdi") &raw mut mxcsr_before,
            in("r8") &raw const control, in("rcx") &raw const mxcsr,
            in("rdx") &raw mut control_after, inout("rax") &raw mut mxcsr_after => _,
            in("r9") GO.as_ptr(), in("r10") &raw mut values, in("r11") &raw mut tags, clobber_abi("C"),
        );
    }
    (values, control_after, mxcsr_after, u16::from_le_bytes([tags[8], tags[9]]))
}

fn vectors(seed: u64) -> Vectors {
    let mut v = Vectors([[0; 64]; 32]);
    v.0.iter_mut().enumerate().for_each(|(i, r)| Rng(seed + i as u64).fill(r));
    v
}

fn main() {
    zoo::run(|z| {
        let mut threads: Vec<std::thread::JoinHandle<zoo::Check>> = Vec::new();
        let control = std::thread::spawn(|| {
            SPINNING.fetch_add(1, Ordering::SeqCst);
            // Rounding down, double precision; flush-to-zero, rounding up, all masked.
            let (values, control, mxcsr, tags) = x87(0x067f, 0xdf80);
            ensure_eq!(values, [1.5, -2.25, 1e300, 3.0e-300], "values on the x87 stack");
            ensure_eq!(control, 0x067f, "x87 control word");
            ensure_eq!(mxcsr & !0x3f, 0xdf80, "MXCSR");
            ensure_eq!(tags, 0xffff, "x87 tags after taking all values");
            Ok(())
        });
        threads.push(control);
        if std::is_x86_feature_detected!("avx") {
            for seed in [100, 200] {
                threads.push(std::thread::spawn(move || {
                    let (load, mut store) = (vectors(seed), vectors(0));
                    SPINNING.fetch_add(1, Ordering::SeqCst);
                    ymm(&load, &mut store);
                    for i in 0..16 {
                        ensure_eq!(store.0[i][..32], load.0[i][..32], "ymm{i}");
                    }
                    Ok(())
                }));
            }
        } else {
            println!("no AVX here");
        }
        if std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bw") {
            threads.push(std::thread::spawn(|| {
                let (load, mut store) = (vectors(300), vectors(0));
                let before: [u64; 8] =
                    std::array::from_fn(|i| 0x0123_4567_89ab_cdef_u64.rotate_left(i as u32 * 7));
                let mut masks = before;
                SPINNING.fetch_add(1, Ordering::SeqCst);
                zmm(&load, &mut store, &mut masks);
                for i in 0..32 {
                    ensure_eq!(store.0[i], load.0[i], "zmm{i}");
                }
                for i in 1..8 {
                    ensure_eq!(masks[8 - i], before[i], "k{i}");
                }
                Ok(())
            }));
        } else {
            println!("no AVX-512 here");
        }
        while (SPINNING.load(Ordering::SeqCst) as usize) < threads.len() {
            zoo::nap(1);
        }
        zoo::nap(20);
        z.ready()?;
        z.wait_for_check();
        GO.store(1, Ordering::SeqCst);
        for thread in threads {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        ensure!(std::hint::black_box(1.0f64) / 3.0 * 3.0 == 1.0, "arithmetic of the main thread");
        Ok(())
    })
}
