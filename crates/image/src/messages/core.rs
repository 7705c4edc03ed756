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
        /// Architecture; must match.
        required enum March mtype = 1;
        /// x86.
        optional message ThreadInfoX86 thread_info = 2;
        /// process-wide part; only in the core of the thread leader and of zombies.
        optional message TaskCoreEntry tc = 3;
        /// Obsolete place of ids (now ids-N.img).
        optional message TaskKobjIdsEntry ids = 4;
        /// per-thread part; absent for zombies.
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
        /// 1 alive, 2 dead/zombie, 3 stopped (values written). crit --pretty prints 3 as Zombie and 6 as Stopped —
        /// misleading.
        required uint32 task_state = 1 [dict = "gen"];
        /// Zombie: raw wait status (e.g. exit(3) → 768); else 0.
        required uint32 exit_code = 2;
        /// /proc/pid/personality parsed as decimal text (quirk: file is hex).
        required uint32 personality = 3;
        /// Task flags word from /proc/pid/stat; informational.
        required uint32 flags = 4;
        /// Blocked signals of leader, bit n-1 = signal n.
        required uint64 blk_sigset = 5 [hex];
        /// Max 15 chars.
        required string comm = 6;
        /// Itimers and posix timers.
        optional message TaskTimersEntry timers = 7;
        /// 16 entries in RLIMIT_* order.
        optional message TaskRlimitsEntry rlimits = 8;
        /// Deprecated, per-process set id.
        optional uint32 cg_set = 9;
        /// Shared pending queue.
        optional message SignalQueueEntry signals_s = 10;
        /// Deprecated; not written.
        optional enum SeccompMode old_seccomp_mode = 11;
        /// Deprecated; not written.
        optional uint32 old_seccomp_filter = 12;
        /// Audit login uid in userns view; 4294967295 = unset.
        optional uint32 loginuid = 13;
        /// -1000..1000.
        optional int32 oom_score_adj = 14;
        /// One per signal 1.._NSIG except SIGKILL and SIGSTOP, in ascending order (62 on x86).
        repeated message SaEntry sigactions = 15;
        /// PR_SET_CHILD_SUBREAPER.
        optional bool child_subreaper = 18;
        /// MIPS: signals 65-128.
        optional uint64 blk_sigset_extended = 20 [hex];
        /// Signal that stopped the task (state 3).
        optional uint32 stop_signo = 21;
        /// MEMBARRIER_CMD_GET_REGISTRATIONS bits; absent if 0.
        optional uint32 membarrier_registration_mask = 22 [hex];
    }

    /// What each thread has of its own.
    message ThreadCoreEntry "thread_core_entry" {
        /// Robust list head address.
        required uint64 futex_rla = 1;
        /// Length (24 on 64-bit).
        required uint32 futex_rla_len = 2;
        /// -20..19 (zigzag).
        optional sint32 sched_nice = 3;
        /// SCHED_* incl. RESET_ON_FORK bit 0x40000000.
        optional uint32 sched_policy = 4;
        /// RT priority, only FIFO/RR.
        optional uint32 sched_prio = 5;
        /// non-leader threads: blocked signals.
        optional uint64 blk_sigset = 6;
        /// Sigaltstack.
        optional message ThreadSasEntry sas = 7;
        /// PR_SET_PDEATHSIG; absent if 0.
        optional uint32 pdeath_sig = 8;
        /// Private pending queue.
        optional message SignalQueueEntry signals_p = 9;
        /// Credentials (replaces creds-N.img).
        optional message CredsEntry creds = 10;
        /// Only if not disabled.
        optional enum SeccompMode seccomp_mode = 11;
        /// Index into seccomp.img list of the innermost filter.
        optional uint32 seccomp_filter = 12;
        /// Thread name.
        optional string comm = 13;
        /// MIPS.
        optional uint64 blk_sigset_extended = 14;
        /// Rseq registration (present, with zero pointer, if kernel can report).
        optional message RseqEntry rseq_entry = 15;
        /// Cgroup set id.
        optional uint32 cg_set = 16;
    }

    /// The alternate signal stack: sigaltstack(2).
    message ThreadSasEntry "thread_sas_entry" {
        /// Sigaltstack base.
        required uint64 ss_sp = 1;
        required uint64 ss_size = 2;
        /// SS_* (2 = disabled).
        required uint32 ss_flags = 3;
    }

    /// A registration for restartable sequences: rseq(2).
    message RseqEntry "rseq_entry" {
        /// User address of struct rseq, 0 = none.
        required uint64 rseq_abi_pointer = 1;
        /// Registered length (32).
        required uint32 rseq_abi_size = 2;
        /// Registration signature (0x53053053 on x86).
        required uint32 signature = 3;
        /// Saved rseq_cs pointer, only when critical section has NO_RESTART_ON_SIGNAL flag.
        optional uint64 rseq_cs_pointer = 4;
    }

    /// Resource limits.
    message TaskRlimitsEntry "task_rlimits_entry" {
        /// Index = RLIMIT_*.
        repeated message RlimitEntry rlimits = 1;
    }

    /// A resource limit: getrlimit(2). `u64::MAX` is infinity.
    message RlimitEntry "rlimit_entry" {
        /// Soft; 2^64-1 = infinity.
        required uint64 cur = 1;
        /// Hard.
        required uint64 max = 2;
    }
}
