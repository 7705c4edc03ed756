//! The one table of options and commands. Parser, help and refusals are all generated from it.
//!
//! Names, letters, `--no-` forms and arguments are those of CRIU 4.2 (its manual page criu(8)); what each one does here is
//! said by its [`Status`] for each command.

/// Whether an option takes an argument, and how the help calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// None.
    None,
    /// Required: `--opt VALUE` or `--opt=VALUE`.
    Required(&'static str),
    /// Optional, only attached: `--opt=VALUE`, `-oVALUE`.
    Optional(&'static str),
}

/// What an option does with a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It works.
    Built,
    /// It is refused by name: its feature is not built.
    NotYet,
    /// It is accepted and changes nothing, for this reason (which goes to the log).
    NoEffect(&'static str),
    /// It belongs to other commands: a warning when it is on the command line.
    Foreign,
    /// It belongs to other commands: an error, for this reason.
    Wrong(&'static str),
}
use Status::{Built, Foreign, NoEffect, NotYet, Wrong};

/// Heading under which the help lists an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Directories, log, configuration.
    Common,
    /// What happens to the tree.
    Tree,
    /// Conditions and special objects.
    Objects,
    /// TCP and other network state.
    Network,
    /// Mounts and namespaces, things from outside.
    Namespaces,
    /// Control groups and security modules.
    Cgroups,
    /// Incremental and remote memory.
    Memory,
    /// `check`.
    Check,
}

impl Group {
    /// All headings, in the order of the help.
    pub const ALL: [(Group, &'static str); 8] = [
        (Group::Common, "Common"),
        (Group::Tree, "The tree"),
        (Group::Objects, "Files, terminals and other objects"),
        (Group::Network, "Network"),
        (Group::Namespaces, "Namespaces, mounts and external resources"),
        (Group::Cgroups, "Control groups and security modules"),
        (Group::Memory, "Memory: format, incremental and remote checkpoints"),
        (Group::Check, "Check"),
    ];
}

/// One option.
#[derive(Debug)]
pub struct Opt {
    /// Name without `--`.
    pub long: &'static str,
    /// Letter.
    pub short: Option<u8>,
    /// Its argument.
    pub arg: Arg,
    /// It has a `--no-` form.
    pub negatable: bool,
    /// Heading in the help.
    pub group: Group,
    /// One line for the help.
    pub help: &'static str,
    /// What it does with `dump` (and with `check -t`, which looks with the eyes of a dump).
    pub dump: Status,
    /// What it does with `restore`.
    pub restore: Status,
    /// What it does with `check`.
    pub check: Status,
    /// What it does with `resume`.
    pub resume: Status,
    /// What it does with `unlock`.
    pub unlock: Status,
}

impl PartialEq for Opt {
    fn eq(&self, other: &Self) -> bool {
        self.long == other.long
    }
}

impl Opt {
    const fn new(
        long: &'static str,
        group: Group,
        arg: Arg,
        negatable: bool,
        help: &'static str,
    ) -> Self {
        Opt {
            long,
            short: None,
            arg,
            negatable,
            group,
            help,
            dump: Foreign,
            restore: Foreign,
            check: Foreign,
            resume: Foreign,
            unlock: Foreign,
        }
    }

    /// A flag without a `--no-` form.
    const fn flag(long: &'static str, group: Group, help: &'static str) -> Self {
        Self::new(long, group, Arg::None, false, help)
    }

    /// A switch with a `--no-` form.
    const fn switch(long: &'static str, group: Group, help: &'static str) -> Self {
        Self::new(long, group, Arg::None, true, help)
    }

    /// An option with a required argument.
    const fn value(
        long: &'static str,
        metavar: &'static str,
        group: Group,
        help: &'static str,
    ) -> Self {
        Self::new(long, group, Arg::Required(metavar), false, help)
    }

    /// An option with an optional argument.
    const fn maybe(
        long: &'static str,
        metavar: &'static str,
        group: Group,
        help: &'static str,
    ) -> Self {
        Self::new(long, group, Arg::Optional(metavar), false, help)
    }

    const fn short(mut self, letter: u8) -> Self {
        self.short = Some(letter);
        self
    }

    const fn dump(mut self, status: Status) -> Self {
        self.dump = status;
        self
    }

    const fn restore(mut self, status: Status) -> Self {
        self.restore = status;
        self
    }

    const fn check(mut self, status: Status) -> Self {
        self.check = status;
        self
    }

    const fn unlock(mut self, status: Status) -> Self {
        self.unlock = status;
        self
    }

    const fn both(self, status: Status) -> Self {
        self.dump(status).restore(status)
    }

    const fn all(mut self, status: Status) -> Self {
        self.resume = status;
        self.unlock = status;
        self.both(status).check(status)
    }

    /// What the option does with `command`; `None` for commands that are refused as a whole.
    pub fn status(&self, command: Command) -> Option<Status> {
        match command {
            Command::Dump | Command::CheckTree => Some(match (command, self.dump) {
                // `check -t` takes what `check` takes as well.
                (Command::CheckTree, Foreign) => self.check,
                (_, status) => status,
            }),
            Command::Restore => Some(self.restore),
            Command::Check => Some(self.check),
            Command::PreDump => Some(match self.long {
                "pre-dump-mode" => Built,
                "leave-running" | "leave-stopped" => NoEffect("the tree always runs on"),
                "lazy-pages" => Wrong("cannot be used with pre-dump"),
                "compress" | "dedup" => {
                    Wrong("cannot be used with pre-dump: chains of images are CRIU's too")
                }
                _ => self.dump,
            }),
            Command::LazyPages => Some(match self.long {
                "restore-detached" | "daemon" | "pidfile" | "no-verify" | "record-working-set"
                | "status-fd" => Built,
                "lazy-pages" => NoEffect("that is what it does"),
                "page-server" | "address" | "port" | "ps-socket" => NotYet,
                name if name.starts_with("tls") => NotYet,
                _ => self.resume,
            }),
            Command::Resume | Command::Dedup => Some(self.resume),
            Command::Unlock => Some(self.unlock),
            _ => None,
        }
    }

    /// Not built for any command: the help says so.
    pub fn nowhere_built(&self) -> bool {
        !matches!(self.dump, Built | NoEffect(_))
            && !matches!(self.restore, Built | NoEffect(_))
            && !matches!(self.check, Built | NoEffect(_))
            && !matches!(self.status(Command::PreDump), Some(Built | NoEffect(_)))
    }
}

use Group::{Cgroups, Check, Common, Memory, Namespaces, Network, Objects, Tree};

const DETACH: &str = "leave the restored tree to itself instead of waiting for it";

/// Every option.
#[rustfmt::skip]
pub static OPTIONS: [Opt; 98] = [
    // Common
    Opt::value("images-dir", "DIR", Common, "directory of the images (default: .)").short(b'D').all(Built),
    Opt::value("work-dir", "DIR", Common, "directory of logs, pidfile and statistics (default: that of the images)").short(b'W').all(Built),
    Opt::value("log-file", "FILE", Common, "log to FILE, relative to the work directory; - is standard output").short(b'o').all(Built),
    Opt::switch("log-pid", Common, "log each restored task to FILE.PID").restore(Built),
    Opt::maybe("verbosity", "N", Common, "0 silent, 1 errors, 2 warnings (default), 3 info, 4 debug; -v and -vv add to it").short(b'v').all(Built),
    Opt::switch("display-stats", Common, "print times and page counts at the end").both(Built),
    Opt::value("config", "FILE", Common, "read this configuration file instead of the default ones").all(Built),
    Opt::flag("no-default-config", Common, "do not read the default configuration files").all(Built),
    Opt::value("action-script", "FILE", Common, "run FILE at each stage; may repeat, the last one runs first").both(Built)
        .check(NoEffect("check has no stages")),
    Opt::switch("unprivileged", Common, "work without root, as far as the kernel allows").all(Built),
    Opt::switch("deprecated", Common, "allow deprecated features").all(NoEffect("no deprecated feature exists here")),
    Opt::flag("ms", Common, "removed long ago: an error").all(Wrong("is deprecated; use check --all instead")),
    Opt::value("close", "FD", Common, "close descriptor FD before anything else; may repeat").all(Built),
    Opt::value("libdir", "DIR", Common, "directory of plugins").short(b'L').both(NotYet),
    Opt::flag("help", Common, "print this text").short(b'h').all(Built),
    Opt::flag("version", Common, "print the version").short(b'V').all(Built),
    // The tree
    Opt::value("tree", "PID", Tree, "root of the tree").short(b't').dump(Built).check(Built),
    Opt::flag("leave-stopped", Tree, "leave the tree stopped (default: a dump kills it, a restore runs it)").short(b's').both(Built),
    Opt::flag("leave-running", Tree, "leave the tree running after a dump").short(b'R').both(Built),
    Opt::switch("restore-detached", Tree, DETACH).short(b'd').restore(Built),
    Opt::switch("daemon", Tree, "run a server in the background (the same switch as --restore-detached)").restore(Built),
    Opt::switch("restore-sibling", Tree, "restore the root as a sibling of this process; needs --restore-detached").short(b'S').restore(Built),
    Opt::flag("no-verify", Tree, "take the images as they are, also if they are not as they were written").restore(Built),
    Opt::value("copies", "N", Tree, "restore N trees, each in a PID namespace of its own, that share memory until they write").restore(Built),
    Opt::flag("copy-netns", Tree, "give each copy a network namespace of its own").restore(Built),
    Opt::flag("new-pidns", Tree, "restore into a PID namespace of its own, with its own /proc").restore(Built),
    Opt::value("pidfile", "FILE", Tree, "write the root's pid to FILE, which must not exist").restore(Built),
    Opt::flag("exec-cmd", Tree, "become the command after --, which is then the parent of the restored tree").restore(Built),
    Opt::value("timeout", "SECONDS", Tree, "limit for stopping and surveying the tree (default: 10; 0 is none)").dump(Built),
    Opt::maybe("cpu-cap", "LIST", Tree, "CPU features that must match: fpu, cpu, ins, all, none; ^ inverts").both(Built),
    Opt::switch("stream", Tree, "talk to criu-image-streamer instead of image files").both(NotYet),
    // Objects
    Opt::switch("shell-job", Objects, "allow a terminal and a session led from outside the tree").short(b'j').both(Built),
    Opt::switch("file-locks", Objects, "save and restore file locks").short(b'l').both(Built),
    Opt::switch("link-remap", Objects, "keep open files whose name is gone alive by extra hard links").both(Built),
    Opt::value("ghost-limit", "SIZE", Objects, "largest deleted file that is stored in the images (default: 1M; K, M, G)").dump(Built),
    Opt::switch("ghost-fiemap", Objects, "find the holes of deleted files with FIEMAP (default: on)").dump(NoEffect("holes are found with SEEK_DATA, which works on every file system")),
    Opt::switch("evasive-devices", Objects, "take any path to a device that leads to the same device").dump(Built),
    Opt::switch("force-irmap", Objects, "look for watched files by a scan of the file system").dump(Built),
    Opt::value("irmap-scan-path", "PATH", Objects, "look for watched files below PATH first; may repeat").dump(Built),
    Opt::value("file-validation", "MODE", Objects, "how a file is known to be the same: buildid (default) or filesize").both(Built),
    Opt::switch("skip-file-rwx-check", Objects, "do not compare the permissions of files").restore(Built),
    Opt::switch("allow-uprobes", Objects, "allow images of memory with uprobes (CRIU's; ours have none)").dump(NoEffect("probes are not saved; those that are there at the restore are set anew")).restore(Built),
    // Network
    Opt::switch("tcp-established", Network, "save and restore established TCP connections").both(Built),
    Opt::switch("tcp-close", Network, "let TCP connections come back closed").both(Built),
    Opt::value("replace-address", "OLD=NEW", Network, "restore sockets at other addresses, prefixes or ports; may repeat, the first match counts").restore(Built),
    Opt::switch("skip-in-flight", Network, "forget connections that are not accepted yet").dump(Built),
    Opt::value("network-lock", "METHOD", Network, "keep packets of connections away until the restore: nftables (default), iptables or skip").dump(Built)
        .restore(NoEffect("the images say how their connections are locked")),
    Opt::maybe("ext-unix-sk", "INODES", Network, "leave out the peers of unix sockets that are outside the tree; connect anew to their addresses").short(b'x').both(Built),
    Opt::switch("weak-sysctls", Network, "only warn about sysctls that do not exist").restore(NotYet),
    Opt::value("veth-pair", "IN=OUT", Network, "name of the host end of a veth pair").restore(NotYet),
    Opt::value("empty-ns", "NS", Network, "create the namespace (net) but leave it empty").both(NotYet),
    // Namespaces
    Opt::value("root", "PATH", Namespaces, "new root of the mount namespace; a mount point").short(b'r').both(NotYet),
    Opt::value("external", "ID[:VALUE]", Namespaces, "what belongs to the outside: unix[INODE], file[MNT:INODE], tty[RDEV:DEV]").both(Built),
    Opt::value("inherit-fd", "fd[N]:RES", Namespaces, "use descriptor N in the place of RES, as pipe:[ID] or a path without its first slash")
        .dump(Wrong("can only be used with restore")).restore(Built).check(Wrong("can only be used with restore")),
    Opt::value("join-ns", "NS:PID|FILE", Namespaces, "restore into this namespace").short(b'J').restore(NotYet),
    Opt::value("skip-mnt", "PATH", Namespaces, "leave out the mount at PATH").dump(NotYet),
    Opt::value("enable-fs", "LIST", Namespaces, "allow these file systems; all is allowed").dump(NotYet),
    Opt::value("ext-mount-map", "KEY:VALUE", Namespaces, "old form of --external mnt[KEY]:VALUE").short(b'M').both(NotYet),
    Opt::flag("enable-external-sharing", Namespaces, "allow external mounts that are shared").dump(NotYet),
    Opt::flag("enable-external-masters", Namespaces, "allow external mounts that are slaves").dump(NotYet),
    Opt::switch("mntns-compat-mode", Namespaces, "restore mounts the old way")
        .dump(Wrong("can only be used with restore")).restore(NotYet).check(Wrong("can only be used with restore")),
    // Control groups, security modules
    Opt::maybe("manage-cgroups", "MODE", Cgroups, "none, props, soft (default), full, strict or ignore").both(Built),
    Opt::value("cgroup-root", "[CTL:]PATH", Cgroups, "root of the restored control groups").both(NotYet),
    Opt::value("cgroup-props", "YAML", Cgroups, "properties to save").dump(NotYet),
    Opt::value("cgroup-props-file", "FILE", Cgroups, "file of properties to save").dump(NotYet),
    Opt::value("cgroup-dump-controller", "NAME", Cgroups, "save only these controllers").dump(NotYet),
    Opt::value("cgroup-yard", "PATH", Cgroups, "where control groups are mounted").both(NotYet),
    Opt::value("freeze-cgroup", "PATH", Cgroups, "stop the tree with this control group").dump(NotYet),
    Opt::value("lsm-profile", "TYPE:NAME", Cgroups, "security label of the restored tree: apparmor:NAME, selinux:NAME or none").restore(Built),
    Opt::value("lsm-mount-context", "CONTEXT", Cgroups, "SELinux context of restored mounts").restore(NotYet),
    // Memory
    Opt::value("format", "FORMAT", Memory, "images for auto (CRIU too, unless much is saved otherwise; default), criu, rewake").dump(Built),
    Opt::maybe("compress", "METHOD", Memory, "compress page stores: lz4 (fast; default), zstd (small); only rewake reads them").dump(Built),
    Opt::flag("dedup", Memory, "store pages of equal content once; only rewake reads them").dump(Built),
    Opt::value("compress-region", "SIZE", Memory, "size of what is compressed at once").dump(NoEffect("it is always 1 MiB")),
    Opt::value("compress-acceleration", "N", Memory, "compress faster and less").dump(NoEffect("there is one level")),
    Opt::value("decompress-threads", "N", Memory, "threads that decompress").restore(NoEffect("there are as many as CPUs")),
    Opt::value("max-pause", "MS", Memory, "how long a tree that is left running may stand still, in milliseconds").dump(Built),
    Opt::switch("track-mem", Memory, "track memory changes for the next dump").dump(Built),
    Opt::value("prev-images-dir", "DIR", Memory, "images of the previous dump, relative to those of this one").dump(Built),
    Opt::switch("auto-dedup", Memory, "punch pages out of older images").dump(Built).restore(NotYet),
    Opt::value("pre-dump-mode", "MODE", Memory, "splice (default) or read: noted in the images, for CRIU; memory is read in one way only"),
    Opt::switch("page-server", Memory, "send pages to a page server").dump(NotYet),
    Opt::value("address", "ADDR", Memory, "address of the server").dump(NotYet),
    Opt::value("port", "PORT", Memory, "port of the page server").dump(NotYet),
    Opt::value("ps-socket", "FD", Memory, "connected socket of the page server").dump(NotYet),
    Opt::flag("lazy-pages", Memory, "let the tree run at once: its memory comes when it is touched, or in the background").dump(NotYet).restore(Built),
    Opt::flag("record-working-set", Memory, "note in which order memory is touched; the next lazy restore brings it first").restore(Built),
    Opt::value("status-fd", "FD", Memory, "write a byte to FD when the server is ready"),
    Opt::switch("tls", Memory, "encrypt the connection to the page server").dump(NotYet),
    Opt::value("tls-cacert", "FILE", Memory, "certificate authorities").dump(NotYet),
    Opt::value("tls-cacrl", "FILE", Memory, "revoked certificates").dump(NotYet),
    Opt::value("tls-cert", "FILE", Memory, "certificate").dump(NotYet),
    Opt::value("tls-key", "FILE", Memory, "private key").dump(NotYet),
    Opt::flag("tls-no-cn-verify", Memory, "do not compare the peer's name").dump(NotYet),
    // Check
    Opt::switch("extra", Check, "also check what only some programs need").check(Built),
    Opt::switch("experimental", Check, "also check what is new or rarely used").check(Built),
    Opt::flag("all", Check, "check everything; with unlock: all locks, CRIU's too").check(Built).unlock(Built),
    Opt::value("feature", "NAME", Check, "check this one feature").check(Built),
];

/// A command word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Save a tree.
    Dump,
    /// Save memory while the tree runs.
    PreDump,
    /// Free older images of what younger ones have.
    Dedup,
    /// Bring memory to a tree that is restored.
    LazyPages,
    /// Bring a tree back.
    Restore,
    /// Check the kernel.
    Check,
    /// Check a tree (`check -t`).
    CheckTree,
    /// Let a stopped tree run on.
    Resume,
    /// Remove network locks.
    Unlock,
    /// Show a checkpoint and restore from start to end.
    Demo,
    /// The image tool.
    Crit,
    /// Changes to a directory of images.
    Images,
    /// Known, but not built: refused by name.
    NotBuilt(&'static str),
    /// Removed long ago: refused with exit code 255.
    Removed(&'static str),
}

/// Command words: name, meaning, operands and purpose for the help.
pub static COMMANDS: [(&str, Command, &str, &str); 17] = [
    ("dump", Command::Dump, "-t PID [-D DIR]", "save the tree of PID to images in DIR"),
    ("restore", Command::Restore, "[-D DIR] [-d]", "bring a tree back from images in DIR"),
    ("check", Command::Check, "", "check what this kernel can do"),
    ("check", Command::CheckTree, "-t PID", "show what stands in the way of a dump of PID"),
    ("resume", Command::Resume, "PID", "let a tree that a checkpoint left stopped run on"),
    (
        "unlock",
        Command::Unlock,
        "[-D DIR | --all]",
        "remove network locks that killed dumps have left, or those of DIR, or all",
    ),
    ("demo", Command::Demo, "", "checkpoint and restore a small program, and show how"),
    (
        "images",
        Command::Images,
        "replace-address DIR OLD=NEW...",
        "give the sockets in images other addresses",
    ),
    ("crit", Command::Crit, "COMMAND ...", "look into images (rewake crit --help)"),
    ("pre-dump", Command::PreDump, "-t PID [-D DIR]", "save memory while the tree runs"),
    ("page-server", Command::NotBuilt("page-server"), "", "receive pages from a dump elsewhere"),
    (
        "lazy-pages",
        Command::LazyPages,
        "[-D DIR]",
        "bring memory to the tree of a restore with --lazy-pages",
    ),
    ("service", Command::NotBuilt("service"), "", "serve requests on a socket"),
    ("swrk", Command::NotBuilt("swrk"), "FD", "serve one client on FD"),
    ("dedup", Command::Dedup, "[-D DIR]", "punch pages out of the images that DIR/parent leads to"),
    ("cpuinfo", Command::NotBuilt("cpuinfo"), "dump|check", "write or compare CPU features"),
    ("exec", Command::Removed("exec"), "", ""),
];

/// The command of a word; `show` is the second removed one.
pub fn command(word: &str) -> Option<Command> {
    if word == "show" {
        return Some(Command::Removed("show"));
    }
    COMMANDS.iter().find(|(name, ..)| *name == word).map(|(_, command, ..)| *command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_and_letters_are_unique() {
        let mut seen = HashSet::new();
        for opt in &OPTIONS {
            assert!(seen.insert(opt.long.to_owned()), "{} twice", opt.long);
            if opt.negatable {
                assert!(seen.insert(format!("no-{}", opt.long)), "no-{} twice", opt.long);
                assert_eq!(opt.arg, Arg::None, "a switch takes no argument");
            }
            if let Some(letter) = opt.short {
                assert!(seen.insert(format!("-{}", char::from(letter))), "-{letter} twice");
            }
            assert!(!opt.help.is_empty());
        }
    }

    #[test]
    fn letters_and_negations_are_the_references() {
        let mut letters: Vec<char> =
            OPTIONS.iter().filter_map(|o| o.short.map(char::from)).collect();
        letters.sort_unstable();
        let mut reference: Vec<char> = "tsRdSDWovrLxjlMJVh".chars().collect();
        reference.sort_unstable();
        assert_eq!(letters, reference);
        assert_eq!(OPTIONS.iter().filter(|o| o.negatable).count(), 27);
    }
}
