//! What the CPU says of itself (CPUID).

use std::sync::OnceLock;

/// Highest component number that is asked for.
const COMPONENTS: usize = 20;

/// Where a component of the XSAVE area lies in the standard form: offset and size in bytes; `None` if this CPU does not
/// have it. Intel and AMD put AVX-512 at different places.
#[must_use]
pub fn xsave_component(number: u32) -> Option<(usize, usize)> {
    // In a virtual machine each CPUID is a trip to the hypervisor, of some microseconds: what nobody asks for is not looked up.
    static PLACES: [OnceLock<Option<(usize, usize)>>; COMPONENTS] =
        [const { OnceLock::new() }; COMPONENTS];
    *PLACES.get(number as usize)?.get_or_init(|| ask(number))
}

#[cfg(target_arch = "x86_64")]
fn ask(number: u32) -> Option<(usize, usize)> {
    const XSAVE_LEAF: u32 = 0xd;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    static LEAVES: OnceLock<u32> = OnceLock::new();
    #[allow(unused_unsafe, reason = "CPUID is a safe function in newer Rust")]
    // SAFETY: every x86-64 CPU has CPUID, and it only reads.
    let leaves = *LEAVES.get_or_init(|| unsafe { __cpuid(0) }.eax);
    if leaves < XSAVE_LEAF {
        return None;
    }
    #[allow(unused_unsafe, reason = "CPUID is a safe function in newer Rust")]
    // SAFETY: as above.
    let answer = unsafe { __cpuid_count(XSAVE_LEAF, number) };
    (answer.eax != 0).then_some((answer.ebx as usize, answer.eax as usize))
}
