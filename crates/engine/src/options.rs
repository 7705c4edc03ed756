//! What a caller (command line, RPC) asks of a dump or a restore, in plain values.

pub use rewake_image::Compression;
use rewake_image::addresses::Template;
pub use rewake_objects::files::external::{Inherited, Outside as External};
pub use rewake_objects::files::watched::Scan;
pub use rewake_objects::sockets::unix::Outside as OutsideUnix;
use std::path::PathBuf;
use std::time::Duration;

pub use crate::dump::layout::Format;
pub use rewake_objects::sockets::lock::Method as LockMethod;

/// A process id as seen by the caller (`pid_t`).
pub type Pid = i32;

/// What becomes of the tree when the command has done its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FinalState {
    /// Killed and reaped (default after a dump; not possible after a restore).
    Dead,
    /// Stopped as by SIGSTOP.
    Stopped,
    /// Running (default after a restore).
    #[default]
    Running,
}

/// How connected TCP sockets are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpPolicy {
    /// `--tcp-established`: save and restore live connections.
    pub established: bool,
    /// `--tcp-close`: connections come back closed.
    pub close: bool,
    /// `--skip-in-flight`: forget half-open requests of listeners.
    pub skip_in_flight: bool,
}

/// A point at which the caller may act (action scripts, RPC notifications).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Before anything is frozen or written.
    PreDump,
    /// Images are complete, the tree is still frozen.
    PostDump,
    /// Before the first process is created.
    PreRestore,
    /// All tasks are built, nothing runs yet.
    PostRestore,
    /// Before connections are locked, in a tree with a network namespace of its own.
    NetworkLock,
    /// Before connections are unlocked, in a tree with a network namespace of its own.
    NetworkUnlock,
    /// The root task exists, its namespaces are empty. Only if it has any of its own.
    SetupNamespaces,
    /// Namespaces are filled. Only if there are any.
    PostSetupNamespaces,
    /// Right before tasks resume.
    PreResume,
    /// Tasks have resumed.
    PostResume,
}

impl Action {
    /// The action's name as scripts see it in `CRTOOLS_SCRIPT_ACTION`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Action::PreDump => "pre-dump",
            Action::PostDump => "post-dump",
            Action::PreRestore => "pre-restore",
            Action::PostRestore => "post-restore",
            Action::NetworkLock => "network-lock",
            Action::NetworkUnlock => "network-unlock",
            Action::SetupNamespaces => "setup-namespaces",
            Action::PostSetupNamespaces => "post-setup-namespaces",
            Action::PreResume => "pre-resume",
            Action::PostResume => "post-resume",
        }
    }
}

/// What the engine calls at each [`Action`]. The command line runs the action scripts here.
pub trait Hooks {
    /// Called at `action`; `root` is the real pid of the root task once it is known.
    ///
    /// # Errors
    /// A text that says which script failed and how; the dump or restore is then abandoned
    /// (except for [`Action::PostDump`], after which the images are kept and the tree runs on, and for
    /// [`Action::NetworkUnlock`], [`Action::PreResume`] and [`Action::PostResume`], for which it is a warning).
    fn run(&mut self, action: Action, root: Option<Pid>) -> Result<(), String>;

    /// Does anybody act at [`Action::PostDump`] at all? Then the tree must still be frozen.
    fn listens(&self) -> bool {
        false
    }
}

/// Hooks that do nothing.
#[derive(Debug, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {
    fn run(&mut self, _: Action, _: Option<Pid>) -> Result<(), String> {
        Ok(())
    }
}

/// Options of a dump (and of `check -t`, which surveys with the same eyes).
#[derive(Debug, Clone)]
pub struct DumpOptions {
    /// Root of the tree (`-t`).
    pub root: Pid,
    /// Directory the images go to (`-D`).
    pub images_dir: PathBuf,
    /// Directory of `stats-dump` (`-W`).
    pub work_dir: PathBuf,
    /// State of the tree afterwards; [`FinalState::Dead`] by default.
    pub final_state: FinalState,
    /// `--shell-job`: a session or terminal led from outside the tree is fine.
    pub shell_job: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--link-remap`.
    pub link_remap: bool,
    /// `--file-validation buildid`: executable files must be of the same build.
    pub build_ids: bool,
    /// `--evasive-devices`: a device may be opened by any path that leads to one of its number.
    pub evasive_devices: bool,
    /// `--ghost-limit` in bytes.
    pub ghost_limit: u64,
    /// `--timeout`: limit for freezing and surveying; `None` is no limit.
    pub timeout: Option<Duration>,
    /// TCP options.
    pub tcp: TcpPolicy,
    /// `--network-lock`.
    pub network_lock: LockMethod,
    /// `--ext-unix-sk`, `--external unix[INODE]`: unix sockets outside the tree that may be left out.
    pub outside_unix: OutsideUnix,
    /// `--compress`: page stores are compressed; not those of a chain.
    pub compression: Option<Compression>,
    /// `--dedup`: equal pages are stored once; not in a chain, and not compressed.
    pub dedup: bool,
    /// `--format`: whose images. Those of a chain are always CRIU's.
    pub format: Format,
    /// `--external file[…]` and `tty[…]`: what is left out.
    pub external: External,
    /// `--force-irmap`, `--irmap-scan-path`: how watched files are looked for.
    pub scan: Scan,
    /// `--max-pause`: for how long the tree may stand still, if it is left running.
    pub max_pause: Option<Duration>,
    /// `--track-mem`: track memory from now on, for the next dump.
    pub track_mem: bool,
    /// `--prev-images-dir`, relative to the images directory.
    pub parent: Option<PathBuf>,
    /// `--auto-dedup`: pages that these images have are punched out of the parents.
    pub auto_dedup: bool,
    /// `--pre-dump-mode`, which only the inventory of a pre-dump tells.
    pub pre_dump_mode: PreDumpMode,
}

/// How a pre-dump is said to have read memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PreDumpMode {
    /// `splice`.
    #[default]
    Splice,
    /// `read`.
    Read,
}

/// `--lsm-profile`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Label {
    /// It was not given: labels of the images must be those that the tree gets.
    #[default]
    OfImages,
    /// `none`: whatever the images say, the tree gets that of this command.
    Ignored,
    /// A module (`apparmor`, `selinux`) and a label.
    Named(String, String),
}

/// Options of a restore.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Directory the images come from (`-D`).
    pub images_dir: PathBuf,
    /// Directory of `stats-restore` (`-W`).
    pub work_dir: PathBuf,
    /// [`FinalState::Running`] or [`FinalState::Stopped`].
    pub final_state: FinalState,
    /// `-d`: the root becomes a child of whoever reaps orphans; the caller does not wait for it.
    pub detached: bool,
    /// `--restore-sibling`: the root becomes a sibling of the caller (`CLONE_PARENT`).
    pub sibling: bool,
    /// Not `--no-verify`: the images must be as they were written.
    pub verify: bool,
    /// `--lazy-pages`: memory comes when it is touched.
    pub lazy_pages: bool,
    /// `--record-working-set`: the pager that is started notes in which order memory is touched.
    pub record_working_set: bool,
    /// `--new-pidns`: into a PID namespace (and a mount namespace with its own `/proc`) of its own.
    pub new_pidns: bool,
    /// `--copies`: so many trees, each in a PID namespace of its own.
    pub copies: Option<u32>,
    /// `--copy-netns`: each copy in a network namespace of its own.
    pub copy_netns: bool,
    /// `--replace-address`, in the order given.
    pub addresses: Vec<Template>,
    /// `--shell-job`.
    pub shell_job: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--link-remap`.
    pub link_remap: bool,
    /// `--file-validation buildid`: executable files must be of the same build.
    pub build_ids: bool,
    /// `--allow-uprobes`: images of CRIU that were made with it may be restored.
    pub allow_uprobes: bool,
    /// `--skip-file-rwx-check`.
    pub skip_file_rwx_check: bool,
    /// `--cpu-cap`: refuse images that need CPU features this machine lacks (`false` = `--cpu-cap=none`).
    pub check_cpu: bool,
    /// `--lsm-profile`: under which label of a security module the tree comes back.
    pub label: Label,
    /// `--pidfile`, already resolved against the work directory.
    pub pidfile: Option<PathBuf>,
    /// TCP options.
    pub tcp: TcpPolicy,
    /// `--ext-unix-sk`: unix sockets may connect anew to addresses outside the tree.
    pub external_unix: bool,
    /// `--inherit-fd fd[N]:KEY`: the caller's descriptors, by the keys of what they are put in the place of.
    pub inherited: Inherited,
}
