//! The zoo: every program, and what is special about testing it.

use crate::harness::{Fail, Run, Start, Tool};
use crate::pools::Hugetlbfs;
use crate::probes;

/// A question asked from outside the tree.
pub type Probe = fn(&Run) -> Result<(), Fail>;

/// One zoo program as a test subject.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its name: the file in tests/zoo/src/bin, and the first part of its trials' names.
    pub name: &'static str,
    /// The built executable.
    pub path: &'static str,
    /// Environment it is started with.
    pub env: &'static [(&'static str, &'static str)],
    /// Options added to every dump.
    pub dump_options: &'static [&'static str],
    /// Options added to every restore.
    pub restore_options: &'static [&'static str],
    /// Why CRIU cannot pass: trials that need CRIU are ignored with this reason.
    pub unless_criu: Option<&'static str>,
    /// A kind of object that a later issue brings: a refusal that says so ("… yet") is a skip. Anything else than such a
    /// refusal, or a pass, is a failure all the same. To be taken away when the kind is there.
    pub later: bool,
    /// Flavours in which the program cannot pass, whatever the tool, and why.
    pub not_in: &'static [(&'static str, &'static str)],
    /// As `unless_criu` for single flavours.
    pub unless_criu_in: &'static [(&'static str, &'static str)],
    /// Facts CRIU changes in a program that survives its dump.
    pub criu_disturbs: &'static [&'static str],
    /// Facts CRIU does not bring back for this program.
    pub criu_loses: &'static [&'static str],
    /// Facts that no restore can bring back: names and flags of files that have no name.
    pub loses: &'static [&'static str],
    /// Whether it runs in a network namespace of its own, and the command with it.
    pub private_net: bool,
    /// Huge pages (2 MiB) that the host needs for it.
    pub huge_pages: u64,
    /// Whether it needs a mount of hugetlbfs.
    pub hugetlbfs: bool,
    /// Why it cannot be in another PID namespace than before.
    pub needs_its_pids: Option<&'static str>,
    /// How often the survivor is dumped with `--leave-running`.
    pub running_dumps: usize,
    /// Asked from outside before and after each checkpoint.
    pub probe: Option<Probe>,
}

/// What CRIU brings back differently for every program: it continues the monotonic clock in a new time namespace, and
/// does not know io priorities, the coredump filter and the timer slack.
const CRIU_LOSES: &[&str] = &["ns/time", "ioprio", "coredump_filter", "timerslack_ns"];

const RINGS: &str =
    "it makes rings anew, without their contents, and the kernel begins at their beginning";

/// Where a program lives on that only a dump which ends it can save.
const DEAD_ONLY: &[(&str, &str)] = &[
    ("running", LIVES_ON),
    ("running_restored", LIVES_ON),
    ("stopped", LIVES_ON),
    ("stopped_restored", LIVES_ON),
];
const LIVES_ON: &str = "it is refused by name where the program lives on";

/// Sharing is saved however little it is.
const OWN_FORMAT: &[&str] = &["--format", "rewake"];
const OWN: &str = "it has no such format";

/// A queued SIGCONT is taken away by whatever stops a process.
const CONTINUED: &[(&str, &str)] =
    &[("stopped", "SIGSTOP takes it away"), ("stopped_restored", "SIGSTOP takes it away")];

impl Program {
    const fn new(name: &'static str, path: &'static str) -> Program {
        Program {
            name,
            path,
            env: &[],
            dump_options: &[],
            restore_options: &[],
            unless_criu: None,
            later: false,
            not_in: &[],
            unless_criu_in: &[],
            criu_disturbs: &[],
            criu_loses: &[],
            loses: &[],
            private_net: false,
            huge_pages: 0,
            hugetlbfs: false,
            needs_its_pids: None,
            running_dumps: 2,
            probe: None,
        }
    }

    const fn unless_criu(mut self, reason: &'static str) -> Program {
        self.unless_criu = Some(reason);
        self
    }

    const fn unless_criu_in(
        mut self,
        flavours: &'static [(&'static str, &'static str)],
    ) -> Program {
        self.unless_criu_in = flavours;
        self
    }

    const fn not_in(mut self, flavours: &'static [(&'static str, &'static str)]) -> Program {
        self.not_in = flavours;
        self
    }

    const fn loses(mut self, facts: &'static [&'static str]) -> Program {
        self.loses = facts;
        self
    }

    const fn private_net(mut self) -> Program {
        self.private_net = true;
        self
    }

    const fn huge_pages(mut self, n: u64) -> Program {
        self.huge_pages = n;
        self
    }

    const fn hugetlbfs(mut self) -> Program {
        self.hugetlbfs = true;
        self
    }

    const fn criu_loses(mut self, facts: &'static [&'static str]) -> Program {
        self.criu_loses = facts;
        self
    }

    const fn needs_its_pids(mut self, why: &'static str) -> Program {
        self.needs_its_pids = Some(why);
        self
    }

    const fn later(mut self) -> Program {
        self.later = true;
        self
    }

    const fn criu_disturbs(mut self, facts: &'static [&'static str]) -> Program {
        self.criu_disturbs = facts;
        self
    }

    const fn named(mut self, name: &'static str) -> Program {
        self.name = name;
        self
    }

    const fn running_dumps(mut self, n: usize) -> Program {
        self.running_dumps = n;
        self
    }

    const fn probe(mut self, probe: Probe) -> Program {
        self.probe = Some(probe);
        self
    }

    /// Asks the program from outside whether it serves, if it is one that does.
    pub fn ask(&self, run: &Run) -> Result<(), Fail> {
        self.probe.map_or(Ok(()), |probe| probe(run).map_err(|e| run.fail(e)))
    }

    const fn env(mut self, env: &'static [(&'static str, &'static str)]) -> Program {
        self.env = env;
        self
    }

    const fn options(
        mut self,
        dump: &'static [&'static str],
        restore: &'static [&'static str],
    ) -> Program {
        self.dump_options = dump;
        self.restore_options = restore;
        self
    }

    /// How it is started.
    pub fn start(&self) -> Start {
        let mut start = Start::program(self.path);
        start.env = self.env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        if self.hugetlbfs {
            let mount = Hugetlbfs::path().to_string_lossy().into_owned();
            start.env.push(("ZOO_FILE".into(), mount));
        }
        start
    }

    /// Why the program is not run in this flavour.
    pub fn reason(&self, flavour: &str) -> Option<&'static str> {
        self.not_in.iter().find(|(f, _)| *f == flavour).map(|(_, why)| *why)
    }

    /// Why a trial of this flavour cannot pass if CRIU takes part.
    pub fn criu_reason(&self, flavour: &str) -> Option<&'static str> {
        let here = self.unless_criu_in.iter().find(|(f, _)| *f == flavour).map(|(_, why)| *why);
        self.unless_criu.or(here).filter(|_| !crate::no_excuses())
    }

    /// Facts that may differ after a restore in which `tool` took part.
    pub fn ignored(&self, tool: &Tool) -> Vec<&'static str> {
        let mut all = self.loses.to_vec();
        if tool.is_criu {
            all.extend(CRIU_LOSES);
            all.extend(self.criu_loses);
            all.extend(self.criu_disturbs);
        }
        all
    }

    /// Facts that may differ in a survivor of a dump by `tool`.
    pub fn disturbed(&self, tool: &Tool) -> Vec<&'static str> {
        let mut all = self.loses.to_vec();
        if tool.is_criu {
            all.extend(self.criu_disturbs);
        }
        all
    }

    /// Judges the EINTRs the program noted (`DIR/eintr`, a system call's name each line): a dump it survives must not
    /// be felt at all; a restore only where the rest of a relative timeout is nowhere to be had.
    pub fn judge_eintr(&self, run: &Run, tool: &Tool, restored: bool) -> Result<(), Fail> {
        if tool.is_criu {
            return Ok(());
        }
        let noted = std::fs::read_to_string(run.dir.join("eintr")).unwrap_or_default();
        let excused = ["poll_timed", "futex_timed", "nanosleep_norem"];
        let bad: Vec<&str> = noted.lines().filter(|l| !(restored && excused.contains(l))).collect();
        if bad.is_empty() {
            Ok(())
        } else {
            Err(run.fail(format!("system calls felt the checkpoint (EINTR): {bad:?}")))
        }
    }
}

macro_rules! program {
    ($name:ident) => {
        Program::new(stringify!($name), env!(concat!("CARGO_BIN_EXE_", stringify!($name))))
    };
}

const RSEQ: &str = "a survivor's interrupted restartable sequence is not restarted";
const PEER_GONE: &str = "a peer outside the tree learns that the survivor is killed, and is gone";
const NO_RULES: &str = "what it restores first speaks before the other side is there, unless rules of its own hold it back";
const STOPPED_TCP: &str =
    "connections of a tree left stopped stay in repair mode, nothing resumes them";

/// So many threads are told by the kernel instead of being visited.
const MANY_THREADS: (&str, &str) = ("ZOO_THREADS", "120");

/// It can restore one all the same.
const NO_LEADER: &[(&str, &str)] = &[
    ("dead", LED),
    ("as_criu", LED),
    ("running", LED),
    ("running_restored", LED),
    ("stopped", LED),
    ("stopped_restored", LED),
    ("from_criu", LED),
];
const LED: &str = "it cannot stop a process whose first thread has ended";

const NO_BPF: &str = "the CRIU at hand is built without BPF";
const MIXES: &str = "some of the mixes have what it loses: O_DIRECTORY of a directory";
const FROM_OUTSIDE: &str = "somebody outside reads its filters by its pid";

const FORCED: &str = "the kernel lets nobody read by force (/proc/self/mem) what is not there yet";

const LOCKS: &[&str] = &["--file-locks"];

/// What tells numbers of pseudoterminals.
const PTS: &[&str] =
    &["tty_nr", "fd 3", "fd 4", "fd 5", "fd 6", "fd 7", "fd 8", "fd 9", "fd 10", "fd 11"];

/// Every program of the zoo.
pub fn all() -> Vec<Program> {
    vec![
        program!(counter),
        program!(threads),
        program!(leader_gone).unless_criu_in(NO_LEADER),
        program!(leader_gone)
            .named("leader_gone_large")
            .env(&[("ZOO_N", "20"), ("ZOO_FDS", "700"), ("ZOO_MIB", "40"), ("ZOO_FILTER", "1")])
            .unless_criu_in(NO_LEADER),
        program!(tree).needs_its_pids("it checks the pid of its root's parent"),
        // A thread that CRIU let run its code inside a sequence goes on in it: a lost update.
        program!(rseq).unless_criu_in(&[("running", RSEQ), ("stopped", RSEQ)]),
        program!(robust_list),
        program!(thread_words),
        program!(thread_words).named("thread_words_many").env(&[MANY_THREADS]),
        program!(clocks),
        // It comes back in another time namespace, at its time.
        program!(clocks).named("clocks_ahead").env(&[("ZOO_AHEAD", "1")]).loses(&["ns/time"]),
        program!(cwd),
        program!(live),
        program!(memory_private),
        program!(memory_private)
            .named("memory_onfault")
            .env(&[("ZOO_ONFAULT", "1")])
            .unless_criu("it locks MLOCK_ONFAULT memory outright"),
        program!(memory_dense),
        program!(memory_equal),
        program!(memory_numa).unless_criu("it does not keep NUMA policies"),
        program!(memory_swapped),
        program!(memory_guard),
        program!(prefork)
            .unless_criu("its images have a copy for each process, and the shares of memory differ")
            .not_in(&[("lazy", "pages that come later come to each process by themselves")]),
        program!(memory_shared),
        program!(shared_outside),
        program!(shared_outside).named("shared_inside").env(&[("ZOO_INSIDE", "1")]),
        program!(shared_outside).named("shared_sealed").env(&[("ZOO_SEALED", "1")]),
        program!(memory_advice),
        program!(address_spaces)
            .not_in(&[("lazy", FORCED)])
            .unless_criu("it does not keep seals (mseal)"),
        program!(address_spaces)
            .named("address_spaces_plain")
            .env(&[("ZOO_PLAIN", "1"), ("ZOO_SEED", "2")])
            .not_in(&[("lazy", FORCED)])
            .unless_criu("it locks MLOCK_ONFAULT memory outright"),
        program!(hugetlb).huge_pages(24),
        program!(hugetlb)
            .named("hugetlb_sysv")
            .env(&[("ZOO_SYSV", "1")])
            .huge_pages(8)
            .unless_criu("it refuses System V segments in the IPC namespace that it runs in"),
        program!(hugetlb)
            .named("hugetlb_file")
            .huge_pages(12)
            .hugetlbfs()
            .unless_criu("it can neither save nor restore deleted files of hugetlbfs")
            .options(&["--ghost-limit", "8M"], &[]),
        program!(memory_sealed).unless_criu("it does not keep seals (mseal)"),
        program!(memory_files).unless_criu_in(&[(
            "from_criu",
            "its images do not tell which mappings of a memfd sealed later may be written",
        )]),
        program!(memory_files).named("memory_files_plain").env(&[("ZOO_PLAIN", "1")]),
        program!(memory_layout),
        program!(memory_future)
            .named("memory_lock_future")
            .env(&[("ZOO_LOCK", "1")])
            .unless_criu("it does not keep MCL_FUTURE"),
        program!(memory_future)
            .named("memory_lock_on_fault")
            .env(&[("ZOO_LOCK", "2")])
            .unless_criu("it does not keep MCL_FUTURE"),
        program!(memory_future)
            .named("memory_merge")
            .env(&[("ZOO_MERGE", "1")])
            .unless_criu("it does not keep PR_SET_MEMORY_MERGE"),
        program!(memory_future)
            .named("memory_thp_advised")
            .env(&[("ZOO_THP", "1")])
            .unless_criu("it does not keep PR_THP_DISABLE_EXCEPT_ADVISED"),
        program!(sysv_shm)
            .unless_criu("it refuses System V segments in the IPC namespace that it runs in"),
        program!(memfd),
        program!(vmas),
        program!(vmas).named("vmas_60000").env(&[("ZOO_N", "60000")]),
        program!(brk),
        program!(vdso),
        program!(vdso).named("vdso_rounds").env(&[("ZOO_ROUNDS", "3")]),
        program!(fpu),
        program!(sleepers),
        program!(sleepers_fds).later(),
        program!(interrupted).running_dumps(20),
        program!(orphan_session)
            .unless_criu("it hands members of a dead leader's session to init instead of the subreaper in the tree"),
        program!(sessions)
            .unless_criu("it hands members of a dead leader's session to init instead of the subreaper in the tree"),
        program!(zombies),
        program!(zombies)
            .named("zombies_255")
            .env(&[("ZOO_CODE", "255")])
            .unless_criu("it cuts exit codes of zombies to seven bits"),
        // CRIU queues its stop signal again for a process that was stopped already.
        program!(stopped_child).criu_disturbs(&["ShdPnd"]),
        program!(stopped_child)
            .named("stopped_by_ttin")
            .env(&[("ZOO_SIGNAL", "21")])
            .unless_criu("it knows SIGSTOP and SIGTSTP only"),
        program!(sigactions),
        program!(sigactions)
            .named("sigactions_trap")
            .env(&[("ZOO_TRAP", "1")])
            .unless_criu("its single steps reset the action of an ignored SIGTRAP"),
        program!(sigpending),
        program!(sigcont).not_in(CONTINUED),
        program!(sigcont)
            .named("sigcont_handled")
            .env(&[("ZOO_HANDLED", "1")])
            .not_in(CONTINUED),
        program!(sigaltstack),
        program!(sigaltstack).named("sigaltstack_many").env(&[MANY_THREADS]),
        program!(itimers),
        program!(itimers)
            .named("itimers_expired")
            .env(&[("ZOO_EXPIRED", "1")])
            .unless_criu("it starts an expired ITIMER_REAL anew"),
        program!(posix_timers),
        program!(timerslack)
            .unless_criu("it does not keep the timer slack"),
        program!(timerslack)
            .named("timerslack_many")
            .env(&[MANY_THREADS])
            .unless_criu("it does not keep the timer slack"),
        program!(creds)
            .unless_criu("without CAP_SYS_RESOURCE, which this machine may lack, it cannot ask another user's limits"),
        program!(creds)
            .named("creds_many")
            .env(&[MANY_THREADS])
            .unless_criu("without CAP_SYS_RESOURCE, which this machine may lack, it cannot ask another user's limits"),
        program!(creds).named("creds_caps").env(&[("ZOO_KEEP_IDS", "1")]),
        program!(rlimits),
        program!(rlimits)
            .named("rlimits_fsize")
            .env(&[("ZOO_FSIZE", "4096")])
            .unless_criu("what it writes inside the task runs into RLIMIT_FSIZE: SIGXFSZ kills the program"),
        program!(sched),
        program!(sched_reset),
        program!(affinity).unless_criu("it does not keep CPU affinity"),
        program!(misc_task),
        program!(pdeathsig),
        program!(pdeathsig).named("pdeathsig_many").env(&[MANY_THREADS]),
        program!(personality).unless_criu("it reads the hexadecimal personality as decimal"),
        program!(autogroup).unless_criu("it does not keep the nice value of an autogroup"),
        program!(ioprio).unless_criu("it does not keep I/O priorities"),
        program!(coredump_filter).unless_criu("it does not keep the core dump filter"),
        program!(loginuid),
        // CRIU drops O_DIRECTORY from the flags of a directory's descriptor.
        program!(files_regular).criu_loses(&["fd 13"]),
        program!(files_regular)
            .named("files_regular_link")
            .env(&[("ZOO_LINK", "1")])
            .criu_loses(&["fd 14"]),
        program!(pipes),
        program!(fifo).later(),
        program!(owner),
        program!(pipe_packet).unless_criu("it refuses pipes in packet mode"),
        program!(nofile_full).unless_criu("it needs descriptors of its own inside the task"),
        program!(nofile_full)
            .named("nofile_two_left")
            .env(&[("ZOO_FREE", "2")])
            .unless_criu("it needs descriptors of its own inside the task"),
        // CRIU restores a deleted file under a name of its own, and an O_TMPFILE one without the flag.
        program!(files_deleted).options(&["--ghost-limit", "20M"], &[]).loses(&["fd 6", "fd 7"]),
        program!(files_deleted)
            .named("files_deleted_large_table")
            .env(&[("ZOO_TABLE", "600")])
            .options(&["--ghost-limit", "20M"], &[])
            .loses(&["fd 6", "fd 7"]),
        // The name of one is taken: it is opened under another for a moment.
        program!(link_remap)
            .options(&["--link-remap"], &[])
            .loses(&["fd 5"])
            .unless_criu_in(&[("running_restored", "it takes the names away if the tree runs on")]),
        // Of two directories that had one name, one gets another.
        program!(deleted_dirs)
            .options(&["--ghost-limit", "500M"], &[])
            .loses(&["cwd"])
            .unless_criu("of two deleted directories that had one name it makes one"),
        program!(many_fds),
        program!(descriptors),
        program!(file_locks).options(LOCKS, LOCKS),
        program!(file_locks)
            .named("file_locks_large_table")
            .options(LOCKS, LOCKS)
            .env(&[("ZOO_TABLE", "600")]),
        program!(file_locks)
            .named("file_locks_inherited")
            .env(&[("ZOO_INHERITED", "1")])
            .options(LOCKS, LOCKS)
            .unless_criu("of a shared description it sees the locks of one process only"),
        program!(file_locks)
            .named("file_locks_orphan")
            .env(&[("ZOO_ORPHAN", "1")])
            .options(LOCKS, LOCKS)
            // The lock is another process's now.
            .loses(&["fd 3"]),
        // Others may have taken the numbers in the names of terminals meanwhile.
        program!(pty).loses(PTS).unless_criu(
            "it gives a session's terminal to the leader only, and mixes up lines that are typed",
        ),
        program!(pty).named("pty_simple").env(&[("ZOO_SIMPLE", "1")]).loses(PTS).unless_criu_in(
            &[("to_criu", "a number that another trial has taken is an error to it")],
        ),
        program!(devnull),
        program!(devnull)
            .named("devnull_evasive")
            .env(&[("ZOO_EVASIVE", "1")])
            .options(&["--evasive-devices"], &[])
            // The name leads to another node.
            .loses(&["fd 3", "fd 4"])
            .unless_criu("it wants --link-remap for it all the same"),
        program!(eventfd),
        program!(eventfd)
            .named("eventfd_semaphore")
            .env(&[("ZOO_SEMAPHORE", "1")])
            .unless_criu("it loses EFD_SEMAPHORE"),
        program!(eventfd)
            .named("eventfd_large")
            .env(&[("ZOO_LARGE", "1")])
            .unless_criu("it cuts eventfd counters to 32 bits"),
        program!(epoll),
        program!(epoll)
            .named("epoll_polls")
            .env(&[("ZOO_POLLS", "1")])
            .unless_criu("it loses how network devices are polled"),
        program!(timerfd),
        program!(timerfd)
            // Expirations that nobody has read are counted only when somebody asks.
            .loses(&["fd 3", "fd 8"])
            .named("timerfd_ticks")
            .env(&[("ZOO_TICKS", "1")])
            .unless_criu("it loses ticks of a periodic timerfd that were not read yet"),
        program!(signalfd),
        program!(inotify),
        program!(inotify_gaps).loses(&["fd 4"]).unless_criu("it does not find the path of a file that was moved or deleted"),
        program!(aio),
        program!(write_hint).unless_criu("it loses write hints"),
        program!(pidfd)
            .named("pidfd_of_threads")
            .env(&[("ZOO_OF_THREADS", "1")])
            .not_in(&[(
                "new_pidns",
                "a dead thread that a pidfd is of is made outside the namespace: signals to it fail with EINVAL, not ESRCH",
            )])
            .unless_criu("it refuses pidfds of threads"),
        program!(io_uring).unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_no_array")
            .env(&[("ZOO_NO_ARRAY", "1")])
            .unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_cooperative")
            .env(&[("ZOO_FLAGS", "896")])
            .unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_large_entries")
            .env(&[("ZOO_FLAGS", "3072")])
            .unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_single_issuer")
            .env(&[("ZOO_FLAGS", "4096"), ("ZOO_MORE", "11")])
            .unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_deferred")
            .env(&[("ZOO_FLAGS", "12416"), ("ZOO_MORE", "11")])
            .unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_more_completions")
            .env(&[("ZOO_MORE", "11")])
            .unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_fewer_completions")
            .env(&[("ZOO_SILENT", "100"), ("ZOO_FLAGS", "12288")])
            .unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_worker")
            .env(&[("ZOO_WORKER", "1")])
            .unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_in_flight")
            .env(&[("ZOO_SOON", "300")])
            .unless_criu("it refuses io_uring"),
        program!(io_uring)
            .named("io_uring_tiny")
            .env(&[("ZOO_LARGE", "1")])
            .unless_criu("it refuses io_uring"),
        program!(uring_register).unless_criu("it refuses io_uring"),
        program!(uring_register)
            .named("uring_register_async")
            .env(&[("ZOO_ASYNC", "1"), ("ZOO_FLAGS", "4096")])
            .unless_criu("it refuses io_uring"),
        program!(uring_register)
            .named("uring_register_by_thread")
            .env(&[("ZOO_FLAGS", "12288"), ("ZOO_THREAD", "1"), ("ZOO_NOBODY", "1")])
            .unless_criu("it refuses io_uring"),
        program!(bpf_maps).unless_criu(NO_BPF),
        program!(bpf_maps).named("bpf_maps_plain").env(&[("ZOO_PLAIN", "1")]).unless_criu(NO_BPF),
        program!(mix).unless_criu(MIXES),
        program!(mix).named("mix_large_table").env(&[("ZOO_TABLE", "600")]).unless_criu(MIXES),
        program!(mix).named("mix_1").env(&[("ZOO_SEED", "1"), ("ZOO_KINDS", "19")]),
        program!(mix)
            .named("mix_2")
            .env(&[("ZOO_SEED", "2"), ("ZOO_KINDS", "19")])
            .unless_criu_in(&[("to_criu", "it drops O_DIRECTORY from the flags of a directory")]),
        program!(mix)
            .named("mix_3")
            .env(&[("ZOO_SEED", "3"), ("ZOO_KINDS", "19")])
            .unless_criu_in(&[("to_criu", "it drops O_DIRECTORY from the flags of a directory")]),
        program!(fanotify).unless_criu("it refuses marks on whole file systems"),
        program!(fanotify).named("fanotify_plain").env(&[("ZOO_PLAIN", "1")]),
        program!(nsfs),
        program!(pidfd).not_in(&[(
            "new_pidns",
            "a dead process that a pidfd is of is made outside the namespace: signals to it fail with EINVAL, not ESRCH",
        )]),
        program!(mdwe).unless_criu("it keeps neither PR_SET_MDWE nor the mode of the time stamp counter"),
        program!(tcp_listen).probe(probes::echo),
        program!(tcp_pair)
            .options(&["--tcp-established"], &["--tcp-established"])
            .unless_criu_in(&[("stopped", STOPPED_TCP)]),
        program!(tcp_ended).unless_criu("it loses what was not read and errors"),
        program!(tcp_ended)
            .named("tcp_ended_6")
            .env(&[("ZOO_V6", "1")])
            .unless_criu("it loses what was not read and errors"),
        program!(tcp_linger)
            .options(&["--tcp-established"], &["--tcp-established"])
            .unless_criu("it cannot bind where connections linger"),
        program!(addresses)
            .options(&["--tcp-established"], &["--tcp-established"])
            .unless_criu("it drops datagrams that wait"),
        program!(tcp_states)
            .options(&["--tcp-established"], &["--tcp-established"])
            .unless_criu_in(&[("stopped", STOPPED_TCP), ("to_criu", NO_RULES)]),
        program!(tcp_states)
            .named("tcp_states_6")
            .env(&[("ZOO_V6", "1")])
            .options(&["--tcp-established"], &["--tcp-established"])
            .unless_criu_in(&[("stopped", STOPPED_TCP), ("to_criu", NO_RULES)]),
        program!(tcp_states)
            .named("tcp_states_outside")
            .env(&[("ZOO_OUTSIDE", "1")])
            .options(&["--tcp-established"], &["--tcp-established"])
            .not_in(&[("running_restored", PEER_GONE)])
            .unless_criu_in(&[("stopped", STOPPED_TCP)]),
        program!(tcp_backlog)
            .options(&["--tcp-established"], &["--tcp-established"])
            .unless_criu("it refuses connections that are not accepted yet"),
        program!(tcp_backlog)
            .named("tcp_backlog_outside")
            .env(&[("ZOO_OUTSIDE", "1")])
            .options(&["--tcp-established"], &["--tcp-established"])
            .not_in(&[("running_restored", PEER_GONE), ("stopped_restored", PEER_GONE)])
            .unless_criu("it refuses connections that are not accepted yet"),
        program!(tcp_close)
            .options(&["--tcp-established"], &["--tcp-established"])
            .not_in(&[("running_restored", PEER_GONE)])
            .unless_criu("a poll(2) that waits gets EINTR from it"),
        program!(tcp_options)
            .options(&["--tcp-established"], &["--tcp-established"])
            .not_in(&[("running_restored", PEER_GONE)])
            .unless_criu("it does not keep most options of tcp(7)"),
        program!(udp).unless_criu("it drops datagrams that wait to be read"),
        program!(udp).named("udp_empty").env(&[("ZOO_EMPTY", "1")]),
        program!(raw)
            .private_net()
            .unless_criu("it does not keep peers of raw sockets and identifiers of echo sockets"),
        program!(raw)
            .named("raw_plain")
            .private_net()
            .env(&[("ZOO_PLAIN", "1")])
            .unless_criu_in(&[("to_criu", "it does not bind raw sockets to their addresses again")]),
        program!(multicast).private_net().unless_criu("it does not keep multicast memberships"),
        program!(reuseport).private_net().unless_criu("it does not keep groups of SO_REUSEPORT"),
        program!(packet).private_net().unless_criu("it refuses memberships that were added twice"),
        program!(packet).named("packet_plain").private_net().env(&[("ZOO_PLAIN", "1")]),
        program!(packet_ring).private_net().env(&[("ZOO_VERSION", "1")]).unless_criu(RINGS),
        program!(packet_ring)
            .named("packet_ring_v2")
            .private_net()
            .env(&[("ZOO_VERSION", "2"), ("ZOO_LOSS", "1")])
            .unless_criu(RINGS),
        program!(packet_ring)
            .named("packet_ring_v3")
            .private_net()
            .env(&[("ZOO_VERSION", "3")])
            .unless_criu(RINGS),
        program!(packet_ring)
            .named("packet_ring_quiet")
            .private_net()
            .env(&[("ZOO_QUIET", "1")])
            .unless_criu(RINGS),
        program!(socket_bound)
            .private_net()
            .unless_criu("it does not bind to addresses that no interface has"),
        program!(netlink).private_net().unless_criu("it refuses groups above 32"),
        program!(netlink).named("netlink_plain").private_net().env(&[("ZOO_PLAIN", "1")]),
        program!(vsock).unless_criu("it refuses vsock sockets"),
        program!(socket_options).private_net().unless_criu("it keeps the options that its format has only"),
        program!(socket_options)
            .named("socket_options_plain")
            .private_net()
            .env(&[("ZOO_PLAIN", "1")]),
        program!(unix_pair),
        program!(copy_server),
        program!(copy_server).named("copy_server_tree").env(&[("ZOO_WORKERS", "3")]),
        program!(unix_pair)
            .named("unix_pair_empty")
            .env(&[("ZOO_EMPTY", "1")])
            .unless_criu("it loses empty datagrams"),
        program!(unix_flight)
            .unless_criu_in(&[("to_criu", "it cannot set a timerfd that is nowhere but in flight")]),
        program!(unix_flight)
            .named("unix_flight_deep")
            .env(&[("ZOO_DEEP", "1")])
            .unless_criu("it crashes restoring sockets that are nowhere but in flight"),
        program!(unix_flight)
            .named("unix_flight_borders")
            .env(&[("ZOO_BORDERS", "1")])
            .unless_criu("it does not see where in a stream the bytes with descriptors begin"),
        program!(unix_flight)
            .named("unix_flight_epoll")
            .env(&[("ZOO_EPOLL", "1"), ("ZOO_DEEP", "1"), ("ZOO_BORDERS", "1")])
            .unless_criu("it cannot save an epoll instance in flight"),
        program!(unix_many),
        program!(unix_names).unless_criu("it loses addresses of peers and senders that are gone"),
        program!(unix_backlog),
        program!(unix_backlog)
            .named("unix_backlog_named")
            .env(&[("ZOO_NAMED", "1")])
            .unless_criu("it does not bind clients that wait to be accepted"),
        program!(unix_backlog_data)
            .not_in(DEAD_ONLY)
            .unless_criu("it loses what waits in connections that are not accepted"),
        program!(unix_creds).unless_criu("it loses credentials of peers and senders"),
        program!(unix_senders).unless_criu("it loses credentials of senders"),
        program!(seccomp),
        program!(seccomp_threads).needs_its_pids(FROM_OUTSIDE),
        program!(seccomp_threads)
            .named("seccomp_threads_many")
            .env(&[MANY_THREADS])
            .needs_its_pids(FROM_OUTSIDE),
        program!(seccomp_threads)
            .named("seccomp_uniform")
            .env(&[("ZOO_UNIFORM", "1")])
            .needs_its_pids(FROM_OUTSIDE),
        program!(seccomp_threads)
            .named("seccomp_strict")
            .env(&[("ZOO_STRICT", "1")])
            .needs_its_pids(FROM_OUTSIDE),
        program!(syscall_user_dispatch).unless_criu("it does not keep syscall user dispatch"),
        program!(proctitle),
        program!(probed),
        program!(shared_files).unless_criu("it restores shared tables of parents and their children only"),
        program!(shared_files).named("shared_files_plain").env(&[("ZOO_PLAIN", "1")]),
        program!(shared_mm).unless_criu("it refuses processes that share memory"),
        program!(no_vdso),
        program!(proc_files)
            .unless_criu_in(&[("to_criu", "it opens files of threads before there are threads")]),
        program!(pty_unheld).loses(PTS),
        program!(shared_fs).unless_criu("it refuses processes that share a working directory"),
        // What is handed down copy-on-write, among processes that share other things outright.
        program!(shared_files).named("shared_files_own_format").options(OWN_FORMAT, &[]).unless_criu(OWN),
        program!(shared_mm).named("shared_mm_own_format").options(OWN_FORMAT, &[]).unless_criu(OWN),
        program!(shared_fs).named("shared_fs_own_format").options(OWN_FORMAT, &[]).unless_criu(OWN),
    ]
}

/// A program that is used by other trials, among them those that no flavour can run.
pub fn by_name(name: &str) -> Result<Program, Fail> {
    let others = vec![
        program!(unsupported),
        program!(address_spaces).named("address_spaces_of_seed"),
        program!(vfork_waiter),
        program!(zombies).named("zombies_core").env(&[("ZOO_CORE", "1")]),
        program!(tracer),
        program!(tracer).named("tracer_of_thread").env(&[("ZOO_KIND", "thread")]),
        program!(tracer).named("tracer_by_clone").env(&[("ZOO_KIND", "clone")]),
        program!(leader_gone).named("leader_ends").env(&[("ZOO_LATE", "1")]),
        program!(unix_client),
        program!(outside),
        program!(sysv_shm).named("sysv_shm_outside").env(&[("ZOO_OUTSIDE", "1")]),
        program!(shell_job),
        program!(tcp_listen)
            .named("tcp_listen_device")
            .env(&[("ZOO_BIND", "10.78.0.1"), ("ZOO_DEVICE", "zoo0")]),
        program!(tcp_listen).named("tcp_listen_device_still").env(&[
            ("ZOO_BIND", "10.78.0.1"),
            ("ZOO_DEVICE", "zoo0"),
            ("ZOO_STILL", "1"),
        ]),
        program!(tcp_listen).named("tcp_listen_host").env(&[("ZOO_BIND", "10.77.0.2")]),
        program!(tcp_listen).named("tcp_listen_address").env(&[("ZOO_BIND", "10.78.0.1")]),
        program!(tcp_refused).named("tcp_refused_mptcp").env(&[("ZOO_KIND", "mptcp")]),
        program!(tcp_refused).named("tcp_refused_md5").env(&[("ZOO_KIND", "md5")]),
        program!(tcp_refused).named("tcp_refused_urgent").env(&[("ZOO_KIND", "urgent")]),
        program!(tcp_refused).named("tcp_refused_ended").env(&[("ZOO_KIND", "ended")]),
        program!(tcp_listen).named("tcp_listen_still").env(&[("ZOO_STILL", "1")]),
        program!(churn),
        program!(tcp_chaos),
        program!(live).named("live_churn").env(&[("ZOO_CHURN", "1")]),
        program!(memory_written),
        program!(shared_written),
        program!(shared_written).named("shared_written_plain").env(&[("ZOO_PLAIN", "1")]),
        program!(read_late),
        program!(shared_written).named("shared_written_large").env(&[("ZOO_LARGE", "80")]),
        program!(shared_written)
            .named("shared_written_large_sysv")
            .env(&[("ZOO_LARGE", "80"), ("ZOO_LARGE_SYSV", "1")]),
        program!(socket_case).named("socket_cork").env(&[("ZOO_KIND", "cork")]),
        program!(socket_case).named("socket_more").env(&[("ZOO_KIND", "more")]),
        program!(socket_case).named("socket_ebpf").env(&[("ZOO_KIND", "ebpf")]),
        program!(socket_case).named("socket_reuseport").env(&[("ZOO_KIND", "reuseport")]),
        program!(socket_case).named("socket_ring").env(&[("ZOO_KIND", "ring")]),
        program!(socket_case).named("socket_answer").env(&[("ZOO_KIND", "answer")]),
        program!(socket_case).named("socket_xdp").env(&[("ZOO_KIND", "xdp")]),
        program!(socket_case).named("socket_alg").env(&[("ZOO_KIND", "alg")]),
        program!(socket_case).named("socket_can").env(&[("ZOO_KIND", "can")]),
        program!(socket_case).named("socket_tipc").env(&[("ZOO_KIND", "tipc")]),
        program!(socket_case).named("socket_sctp").env(&[("ZOO_KIND", "sctp")]),
        program!(socket_case).named("socket_bluetooth").env(&[("ZOO_KIND", "bluetooth")]),
        program!(socket_case).named("socket_udp").env(&[("ZOO_KIND", "udp")]),
        program!(socket_case).named("socket_address").env(&[("ZOO_KIND", "address")]),
        program!(socket_case).named("socket_netlink").env(&[("ZOO_KIND", "netlink")]),
        program!(socket_case).named("socket_group").env(&[("ZOO_KIND", "group")]),
        program!(socket_case).named("socket_device").env(&[("ZOO_KIND", "device")]),
        program!(socket_case).named("socket_packet").env(&[("ZOO_KIND", "packet")]),
        program!(tcp_chaos).named("tcp_chaos_close").env(&[("ZOO_CLOSE", "1")]),
        // For a server that is elsewhere.
        program!(tcp_chaos)
            .named("tcp_chaos_server")
            .env(&[("ZOO_CLIENTS", "0"), ("ZOO_BIND", "10.77.0.2:7777")]),
        program!(tcp_backlog).named("tcp_backlog_server").env(&[("ZOO_BIND", "10.77.0.2")]),
        program!(tcp_chaos).named("tcp_chaos_clients").env(&[("ZOO_SERVER", "10.77.0.2:7777")]),
    ];
    all()
        .into_iter()
        .chain(others)
        .find(|p| p.name == name)
        .ok_or(format!("no program {name} in the zoo"))
}
