//! Registers of a thread on 64-bit LoongArch.

use super::declare::messages;

messages! {
    /// The LoongArch part of a thread.
    message ThreadInfoLoongarch64 "thread_info_loongarch64" {
        required uint64 clear_tid_addr = 1 [hex];
        required uint64 tls = 2;
        required message UserLoongarch64GpregsEntry gpregs = 3 [hex];
        required message UserLoongarch64FpregsEntry fpregs = 4 [hex];
    }

    /// General registers: 32.
    message UserLoongarch64GpregsEntry "user_loongarch64_gpregs_entry" {
        repeated uint64 regs = 1;
        required uint64 pc = 2;
    }

    /// FPU registers: 32.
    message UserLoongarch64FpregsEntry "user_loongarch64_fpregs_entry" {
        repeated uint64 regs = 1;
        required uint64 fcc = 2;
        required uint32 fcsr = 3;
    }
}
