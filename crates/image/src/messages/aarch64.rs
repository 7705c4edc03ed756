//! Registers of a thread on 64-bit Arm.

use super::declare::messages;

messages! {
    /// The arm64 part of a thread.
    message ThreadInfoAarch64 "thread_info_aarch64" {
        /// set_tid_address(2)
        required uint64 clear_tid_addr = 1 [hex];
        /// The register `TPIDR_EL0`.
        required uint64 tls = 2;
        required message UserAarch64RegsEntry gpregs = 3 [hex];
        required message UserAarch64FpsimdContextEntry fpsimd = 4;
        optional message PacKeys pac_keys = 5;
    }

    /// General registers: `struct user_pt_regs`.
    message UserAarch64RegsEntry "user_aarch64_regs_entry" {
        /// x0 to x30.
        repeated uint64 regs = 1;
        required uint64 sp = 2;
        required uint64 pc = 3;
        required uint64 pstate = 4;
    }

    /// FPU state: `struct user_fpsimd_state`.
    message UserAarch64FpsimdContextEntry "user_aarch64_fpsimd_context_entry" {
        /// Low and high half of each v register.
        repeated uint64 vregs = 1;
        required uint32 fpsr = 2;
        required uint32 fpcr = 3;
    }

    /// Pointer authentication keys.
    message PacKeys "pac_keys" {
        optional message PacAddressKeys pac_address_keys = 6;
        optional message PacGenericKeys pac_generic_keys = 7;
    }

    /// Address keys: `struct user_pac_address_keys`.
    message PacAddressKeys "pac_address_keys" {
        required uint64 apiakey_lo = 1;
        required uint64 apiakey_hi = 2;
        required uint64 apibkey_lo = 3;
        required uint64 apibkey_hi = 4;
        required uint64 apdakey_lo = 5;
        required uint64 apdakey_hi = 6;
        required uint64 apdbkey_lo = 7;
        required uint64 apdbkey_hi = 8;
        required uint64 pac_enabled_key = 9;
    }

    /// Generic keys: `struct user_pac_generic_keys`.
    message PacGenericKeys "pac_generic_keys" {
        required uint64 apgakey_lo = 1;
        required uint64 apgakey_hi = 2;
    }
}
