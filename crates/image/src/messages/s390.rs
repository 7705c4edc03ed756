//! Registers of a thread on s390x.

use super::declare::messages;

messages! {
    /// The s390x part of a thread.
    message ThreadInfoS390 "thread_info_s390" {
        required uint64 clear_tid_addr = 1 [hex];
        required message UserS390RegsEntry gpregs = 2 [hex];
        required message UserS390FpregsEntry fpregs = 3 [hex];
        optional message UserS390VxrsLowEntry vxrs_low = 4 [hex];
        optional message UserS390VxrsHighEntry vxrs_high = 5 [hex];
        optional message UserS390GsCbEntry gs_cb = 6 [hex];
        optional message UserS390GsCbEntry gs_bc = 7 [hex];
        optional message UserS390RiEntry ri_cb = 8 [hex];
    }

    /// General and access registers, 16 each.
    message UserS390RegsEntry "user_s390_regs_entry" {
        required uint64 psw_mask = 1;
        required uint64 psw_addr = 2;
        repeated uint64 gprs = 3;
        repeated uint32 acrs = 4;
        required uint64 orig_gpr2 = 5;
        required uint32 system_call = 6;
    }

    /// FPU registers.
    message UserS390FpregsEntry "user_s390_fpregs_entry" {
        required uint32 fpc = 1;
        repeated uint64 fprs = 2;
    }

    /// Low halves of vector registers 0-15.
    message UserS390VxrsLowEntry "user_s390_vxrs_low_entry" {
        repeated uint64 regs = 1;
    }

    /// Vector registers 16-31, as pairs high, low.
    message UserS390VxrsHighEntry "user_s390_vxrs_high_entry" {
        repeated uint64 regs = 1;
    }

    /// A guarded storage control block: four words.
    message UserS390GsCbEntry "user_s390_gs_cb_entry" {
        repeated uint64 regs = 1;
    }

    /// The runtime instrumentation control block: eight words.
    message UserS390RiEntry "user_s390_ri_entry" {
        required uint32 ri_on = 1;
        repeated uint64 regs = 2;
    }
}
