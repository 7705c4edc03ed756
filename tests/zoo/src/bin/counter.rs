//! Kernel state: none but the registers. A busy loop whose values live in general, SSE/AVX and x87 registers, on the
//! stack and on the heap at the same time, each checked against another way to compute it in every round.
//!
//! On SIGUSR1 it writes `DIR/status` ("ROUNDS ERRORS SIGNALS"), so that the kill tests see it go on.
#![allow(
    unsafe_code,
    reason = "inline assembly keeps values in registers, signal handlers need the C library"
)]

use std::sync::atomic::{AtomicU64, Ordering};
use zoo::{Rng, ensure, ensure_eq};

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_usr1(_: i32) {
    SIGNALS.fetch_add(1, Ordering::SeqCst);
}

/// Adds in general registers, in an XMM register and on the x87 stack side by side for `n` turns without touching
/// memory, so that a checkpoint at almost any instant finds the values in registers only.
fn in_registers(n: u64, step: u64) -> (u64, u64, u64) {
    let (general, sse): (u64, u64);
    let mut x87 = step;
    // SAFETY: only the named registers and the one stack slot are touched; the x87 stack is left empty again.
    unsafe {
        std::arch::asm!(
            "movq {x}, {step}",
            "pxor {acc}, {acc}",
            "fild qword ptr [{slot}]",
            "fldz",
            "2:",
            "add {g}, {step}",
            "paddq {acc}, {x}",
            "fadd st(0), st(1)",
            "dec {n}",
            "jnz 2b",
            "fistp qword ptr [{slot}]",
            "fstp st(0)",
            "movq {out}, {acc}",
            step = in(reg) step,
            n = inout(reg) n => _,
            g = inout(reg) 0u64 => general,
            x = out(xmm_reg) _,
            acc = out(xmm_reg) _,
            out = out(reg) sse,
            slot = in(reg) &raw mut x87,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    (general, sse, x87)
}

/// The same with all sixteen YMM registers, which a wrong xsave size or a lost upper half would spoil.
#[target_feature(enable = "avx2")]
fn in_ymm(n: u64, step: u64) -> bool {
    let mut lanes = [step; 4];
    let same: u32;
    // SAFETY: loads 32 bytes from `lanes`; clobbers are declared.
    unsafe {
        std::arch::asm!(
            "vmovdqu ymm0, [{p}]",
            "vpxor ymm1, ymm1, ymm1", "vpxor ymm2, ymm2, ymm2", "vpxor ymm3, ymm3, ymm3",
            "vpxor ymm4, ymm4, ymm4", "vpxor ymm5, ymm5, ymm5", "vpxor ymm6, ymm6, ymm6",
            "vpxor ymm15, ymm15, ymm15",
            "2:",
            "vpaddq ymm1, ymm1, ymm0", "vpaddq ymm2, ymm2, ymm0", "vpaddq ymm3, ymm3, ymm0",
            "vpaddq ymm4, ymm4, ymm0", "vpaddq ymm5, ymm5, ymm0", "vpaddq ymm6, ymm6, ymm0",
            "vpaddq ymm15, ymm15, ymm0",
            "dec {n}",
            "jnz 2b",
            "vpcmpeqq ymm2, ymm2, ymm1", "vpcmpeqq ymm3, ymm3, ymm1", "vpcmpeqq ymm4, ymm4, ymm1",
            "vpcmpeqq ymm5, ymm5, ymm1", "vpcmpeqq ymm6, ymm6, ymm1", "vpcmpeqq ymm15, ymm15, ymm1",
            "vpand ymm2, ymm2, ymm3", "vpand ymm4, ymm4, ymm5", "vpand ymm6, ymm6, ymm15",
            "vpand ymm2, ymm2, ymm4", "vpand ymm2, ymm2, ymm6",
            "vpmovmskb {same:e}, ymm2",
            "vmovdqu [{p}], ymm1",
            "vzeroupper",
            p = in(reg) lanes.as_mut_ptr(),
            n = inout(reg) n => _,
            same = out(reg) same,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
            out("xmm5") _, out("xmm6") _, out("xmm15") _,
        );
    }
    same == u32::MAX && lanes.iter().all(|&l| l == step.wrapping_mul(n))
}

fn checksum(memory: &[u64]) -> u64 {
    memory.iter().fold(0xcbf2_9ce4_8422_2325, |h, &v| (h ^ v).wrapping_mul(0x0100_0000_01b3))
}

fn main() {
    zoo::run(|z| {
        zoo::on_signal(libc::SIGUSR1, on_usr1 as *const () as usize, libc::SA_RESTART)?;
        let avx = std::is_x86_feature_detected!("avx2");
        let mut rng = Rng(1);
        let mut heap: Vec<u64> = (0..16 << 10).map(|_| rng.next()).collect();
        let mut stack = [0u64; 2048];
        let (mut rounds, mut errors) = (0u64, 0u64);
        let mut told = 0;
        let mut complaint = String::new();
        z.ready()?;
        while !z.checking() {
            rounds += 1;
            let step = rng.next() >> 24;
            let n = 20_000;
            let want = step.wrapping_mul(n);
            let (general, sse, x87) = in_registers(n, step);
            // SAFETY: only called if the CPU has AVX2.
            let ymm = !avx || unsafe { in_ymm(n, step) };
            if general != want || sse != want || x87 != want || !ymm {
                errors += 1;
                complaint = format!(
                    "round {rounds}: {general:x} {sse:x} {x87:x} ymm {ymm}, expected {want:x}"
                );
            }
            // Heap and stack hold the same stream; a lost or stale page on either side parts them.
            let at = (rng.next() % (heap.len() as u64 - stack.len() as u64)) as usize;
            for (i, slot) in stack.iter_mut().enumerate() {
                *slot = rng.next();
                heap[at + i] = *slot;
            }
            std::hint::black_box(&mut stack);
            if checksum(&heap[at..at + stack.len()]) != checksum(&stack) {
                errors += 1;
                complaint = format!("round {rounds}: heap and stack differ");
            }
            let signals = SIGNALS.load(Ordering::SeqCst);
            if signals != told {
                told = signals;
                z.publish("status", &format!("{rounds} {errors} {signals}"));
            }
        }
        println!("{rounds} rounds");
        ensure_eq!(errors, 0, "errors ({complaint})");
        ensure!(rounds > 0, "did not run a round");
        Ok(())
    })
}
