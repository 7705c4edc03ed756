//! What the CPU says of itself (CPUID).

/// Where a component of the XSAVE area lies in the standard form: offset and size in bytes; `None` if this CPU does not
/// have it. Intel and AMD put AVX-512 at different places.
#[must_use]
pub fn xsave_component(number: u32) -> Option<(usize, usize)> {
    const XSAVE_LEAF: u32 = 0xd;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        #[allow(unused_unsafe, reason = "CPUID is a safe function since Rust 1.94")]
        // SAFETY: every x86-64 CPU has CPUID, and it only reads.
        let (leaves, answer) = unsafe { (__cpuid(0).eax, __cpuid_count(XSAVE_LEAF, number)) };
        (leaves >= XSAVE_LEAF && answer.eax != 0).then_some((answer.ebx as usize, answer.eax as usize))
    }
}
