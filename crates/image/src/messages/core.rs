//! A thread and, in the thread leader's image, its process: `core-TID.img`.

use super::{
    CredsEntry, SaEntry, SeccompMode, SignalQueueEntry, TaskKobjIdsEntry, TaskTimersEntry,
    ThreadInfoAarch64, ThreadInfoArm, ThreadInfoLoongarch64, ThreadInfoMips, ThreadInfoPpc64,
    ThreadInfoRiscv64, ThreadInfoS390, ThreadInfoX86,
    declare::{enums, messages},
};

enums! {
    /// Machine architecture.
    enum March "march" {
        Unknown "UNKNOWN" = 0;
        X8664 "X86_64" = 1;
        Arm "ARM" = 2;
        Aarch64 "AARCH64" = 3;
        Ppc64 "PPC64" = 4;
        S390 "S390" = 5;
        Mips "MIPS" = 6;
        Loongarch64 "LOONGARCH64" = 7;
        Riscv64 "RISCV64" = 8;
    }
}

messages! {
    /// A thread. The leader of a process has `tc`, other threads have not; a zombie has `tc` alone.
    message CoreEntry "core_entry" {
        required enum March mtype = 1;
        optional message ThreadInfoX86 thread_info = 2;
        optional message TaskCoreEntry tc = 3;
        /// Old place of what is in `ids-N.img` now; not written.
        optional message TaskKobjIdsEntry ids = 4;
        optional message ThreadCoreEntry thread_core = 5;
        optional boxed ThreadInfoArm ti_arm = 6;
        optional boxed ThreadInfoAarch64 ti_aarch64 = 8;
        optional boxed ThreadInfoPpc64 ti_ppc64 = 9;
        optional boxed ThreadInfoS390 ti_s390 = 10;
        optional boxed ThreadInfoMips ti_mips = 11;
        optional boxed ThreadInfoLoongarch64 ti_loongarch64 = 12;
        optional boxed ThreadInfoRiscv64 ti_riscv64 = 13;
    }

    /// What belongs to a process as a whole.
    message TaskCoreEntry "task_core_entry" {
        /// 1: alive; 2: a zombie; 3: stopped. (crit prints other names.)
        required uint32 task_state = 1 [dict = "gen"];
        /// Of a zombie: its wait(2) status; otherwise 0.
        required uint32 exit_code = 2;
        /// /proc/PID/personality, whose text is hexadecimal but is read as decimal (a quirk of CRIU).
        required uint32 personality = 3;
        /// The flags of /proc/PID/stat; nothing depends on them.
        required uint32 flags = 4;
        /// Blocked signals of the leader; signal `n` is bit `n - 1`.
        required uint64 blk_sigset = 5 [hex];
        /// At most 15 bytes.
        required string comm = 6;
        optional message TaskTimersEntry timers = 7;
        optional message TaskRlimitsEntry rlimits = 8;
        /// Old place of the cgroup set; not written.
        optional uint32 cg_set = 9;
        /// Signals pending for the process.
        optional message SignalQueueEntry signals_s = 10;
        /// Old; not written.
        optional enum SeccompMode old_seccomp_mode = 11;
        /// Old; not written.
        optional uint32 old_seccomp_filter = 12;
        /// /proc/PID/loginuid; `u32::MAX` if it is not set.
        optional uint32 loginuid = 13;
        optional int32 oom_score_adj = 14;
        /// Of all signals but `SIGKILL` and `SIGSTOP`, ascending.
        repeated message SaEntry sigactions = 15;
        /// prctl(2), `PR_SET_CHILD_SUBREAPER`.
        optional bool child_subreaper = 18;
        /// Signals 65 to 128, on MIPS.
        optional uint64 blk_sigset_extended = 20 [hex];
        /// The signal that stopped the process.
        optional uint32 stop_signo = 21;
        /// As by membarrier(2), `MEMBARRIER_CMD_GET_REGISTRATIONS`; absent if 0.
        optional uint32 membarrier_registration_mask = 22 [hex];
    }

    /// What each thread has of its own.
    message ThreadCoreEntry "thread_core_entry" {
        /// The head of the robust futex list: get_robust_list(2).
        required uint64 futex_rla = 1;
        required uint32 futex_rla_len = 2;
        optional sint32 sched_nice = 3;
        /// As by sched_getscheduler(2), with `SCHED_RESET_ON_FORK`.
        optional uint32 sched_policy = 4;
        /// Only of `SCHED_FIFO` and `SCHED_RR`.
        optional uint32 sched_prio = 5;
        /// Blocked signals of a thread that is not the leader.
        optional uint64 blk_sigset = 6;
        optional message ThreadSasEntry sas = 7;
        /// prctl(2), `PR_SET_PDEATHSIG`; absent if 0.
        optional uint32 pdeath_sig = 8;
        /// Signals pending for the thread.
        optional message SignalQueueEntry signals_p = 9;
        optional message CredsEntry creds = 10;
        /// Absent if it is disabled.
        optional enum SeccompMode seccomp_mode = 11;
        /// The oldest filter: an index into `seccomp.img`.
        optional uint32 seccomp_filter = 12;
        optional string comm = 13;
        /// Signals 65 to 128, on MIPS.
        optional uint64 blk_sigset_extended = 14;
        /// Present, with a pointer of 0, if there is no registration but the kernel could have told it.
        optional message RseqEntry rseq_entry = 15;
        optional uint32 cg_set = 16;
    }

    /// The alternate signal stack: sigaltstack(2).
    message ThreadSasEntry "thread_sas_entry" {
        required uint64 ss_sp = 1;
        required uint64 ss_size = 2;
        required uint32 ss_flags = 3;
    }

    /// A registration for restartable sequences: rseq(2).
    message RseqEntry "rseq_entry" {
        /// Address of the `struct rseq`; 0 if there is none.
        required uint64 rseq_abi_pointer = 1;
        required uint32 rseq_abi_size = 2;
        required uint32 signature = 3;
        /// The interrupted critical section, if it must not be aborted (`RSEQ_CS_FLAG_NO_RESTART_ON_SIGNAL`).
        optional uint64 rseq_cs_pointer = 4;
    }

    /// Resource limits.
    message TaskRlimitsEntry "task_rlimits_entry" {
        /// By number: `RLIMIT_CPU` is 0.
        repeated message RlimitEntry rlimits = 1;
    }

    /// A resource limit: getrlimit(2). `u64::MAX` is infinity.
    message RlimitEntry "rlimit_entry" {
        required uint64 cur = 1;
        required uint64 max = 2;
    }
}
