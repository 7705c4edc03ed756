//! Registers of a thread on x86.

use super::declare::{enums, messages};

enums! {
    /// Instruction set a thread runs.
    enum UserX86RegsMode "user_x86_regs_mode" {
        Native "NATIVE" = 1;
        Compat "COMPAT" = 2;
    }
}

messages! {
    /// The x86 part of a thread.
    message ThreadInfoX86 "thread_info_x86" {
        /// set_tid_address(2)
        required uint64 clear_tid_addr = 1 [hex];
        required message UserX86RegsEntry gpregs = 2 [hex];
        required message UserX86FpregsEntry fpregs = 3;
        /// Always three; one not in use has `seg_not_present`.
        repeated message UserDescT tls = 4;
    }

    /// General registers: `struct user_regs_struct`. A system call that restarts is already rewound (`ax`, `ip`).
    message UserX86RegsEntry "user_x86_regs_entry" {
        required uint64 r15 = 1;
        required uint64 r14 = 2;
        required uint64 r13 = 3;
        required uint64 r12 = 4;
        required uint64 bp = 5;
        required uint64 bx = 6;
        required uint64 r11 = 7;
        required uint64 r10 = 8;
        required uint64 r9 = 9;
        required uint64 r8 = 10;
        required uint64 ax = 11;
        required uint64 cx = 12;
        required uint64 dx = 13;
        required uint64 si = 14;
        required uint64 di = 15;
        required uint64 orig_ax = 16;
        required uint64 ip = 17;
        required uint64 cs = 18;
        required uint64 flags = 19;
        required uint64 sp = 20;
        required uint64 ss = 21;
        required uint64 fs_base = 22;
        required uint64 gs_base = 23;
        required uint64 ds = 24;
        required uint64 es = 25;
        required uint64 fs = 26;
        required uint64 gs = 27;
        optional enum UserX86RegsMode mode = 28 [default = "1"];
    }

    /// FPU state: the FXSAVE area, and the XSAVE area beyond it.
    message UserX86FpregsEntry "user_x86_fpregs_entry" {
        required uint32 cwd = 1;
        required uint32 swd = 2;
        /// The abridged tag word of FXSAVE.
        required uint32 twd = 3;
        required uint32 fop = 4;
        required uint64 rip = 5;
        required uint64 rdp = 6;
        required uint32 mxcsr = 7;
        required uint32 mxcsr_mask = 8;
        /// 32 words.
        repeated uint32 st_space = 9;
        /// 64 words.
        repeated uint32 xmm_space = 10;
        /// Not used.
        repeated uint32 padding = 11;
        /// Present if the kernel uses XSAVE.
        optional message UserX86XsaveEntry xsave = 13;
    }

    /// Extended state beyond FXSAVE.
    message UserX86XsaveEntry "user_x86_xsave_entry" {
        required uint64 xstate_bv = 1;
        /// 64 words.
        repeated uint32 ymmh_space = 2;
        /// 8 words.
        repeated uint64 bndreg_state = 3;
        /// 8 words.
        repeated uint64 bndcsr_state = 4;
        /// 8 words.
        repeated uint64 opmask_reg = 5;
        /// 64 words.
        repeated uint64 zmm_upper = 6;
        /// 128 words.
        repeated uint64 hi16_zmm = 7;
        repeated uint32 pkru = 8;
        /// Present if the CPU has shadow stacks.
        optional message UserX86CetEntry cet = 9;
    }

    /// Shadow stack state.
    message UserX86CetEntry "user_x86_cet_entry" {
        /// The register `MSR_U_CET`.
        required uint64 cet = 1 [hex];
        /// Shadow stack pointer.
        required uint64 ssp = 2 [hex];
    }

    /// A thread-local storage segment: `struct user_desc` of set_thread_area(2).
    message UserDescT "user_desc_t" {
        /// 12, 13 and 14.
        required uint32 entry_number = 1;
        required uint32 base_addr = 2;
        required uint32 limit = 3;
        required bool seg_32bit = 4;
        /// Bit 1 of `contents`.
        required bool contents_h = 5;
        /// Bit 0 of `contents`.
        required bool contents_l = 6;
        required bool read_exec_only = 7 [default = "true"];
        required bool limit_in_pages = 8;
        required bool seg_not_present = 9 [default = "true"];
        required bool usable = 10;
    }
}
