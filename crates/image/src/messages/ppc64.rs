//! Registers of a thread on 64-bit POWER.

use super::declare::messages;

messages! {
    /// The ppc64 part of a thread.
    message ThreadInfoPpc64 "thread_info_ppc64" {
        required uint64 clear_tid_addr = 1 [hex];
        required message UserPpc64RegsEntry gpregs = 2 [hex];
        optional message UserPpc64FpstateEntry fpstate = 3;
        optional message UserPpc64VrstateEntry vrstate = 4;
        optional message UserPpc64VsxstateEntry vsxstate = 5;
        optional message UserPpc64TmRegsEntry tmstate = 6;
    }

    /// General registers.
    message UserPpc64RegsEntry "user_ppc64_regs_entry" {
        repeated uint64 gpr = 1;
        required uint64 nip = 2;
        required uint64 msr = 3;
        required uint64 orig_gpr3 = 4;
        required uint64 ctr = 5;
        required uint64 link = 6;
        required uint64 xer = 7;
        required uint64 ccr = 8;
        required uint64 trap = 9;
        optional uint64 texasr = 10;
        optional uint64 tfhar = 11;
        optional uint64 tfiar = 12;
    }

    /// FPU registers: 32, then `fpscr`.
    message UserPpc64FpstateEntry "user_ppc64_fpstate_entry" {
        repeated uint64 fpregs = 1;
    }

    /// Altivec registers, as pairs high, low; the last pair is VSCR.
    message UserPpc64VrstateEntry "user_ppc64_vrstate_entry" {
        repeated uint64 vrregs = 1;
        required uint32 vrsave = 2;
    }

    /// VSX registers: 32 low halves.
    message UserPpc64VsxstateEntry "user_ppc64_vsxstate_entry" {
        repeated uint64 vsxregs = 1;
    }

    /// Checkpointed registers of transactional memory.
    message UserPpc64TmRegsEntry "user_ppc64_tm_regs_entry" {
        required message UserPpc64RegsEntry gpregs = 1;
        optional message UserPpc64FpstateEntry fpstate = 2;
        optional message UserPpc64VrstateEntry vrstate = 3;
        optional message UserPpc64VsxstateEntry vsxstate = 4;
    }
}
