//! From occurrences to what a command needs: the last value wins, lists accumulate, and what is not built is refused by name.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use log::Level;
use rewake_engine::{
    Compression, DumpOptions, External as OutsideFiles, FinalState, Format, Inherited, Label,
    LockMethod, Locks, OutsideUnix, Pid, PreDumpMode, RestoreOptions, Scan, TcpPolicy,
};

use rewake_image::addresses::Template;

use super::table::{Command, Status};
use super::values::External;
use super::{ArgError, Given, Kind, Origin, values};

/// CRIU's default for `--ghost-limit`.
const GHOST_LIMIT: u64 = 1 << 20;
/// CRIU's default for `--timeout`, in seconds.
const TIMEOUT: u64 = 10;
/// Verbosity without `-v`: errors and warnings.
pub const VERBOSITY: u32 = 2;

/// Where the log goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogTo {
    /// No `-o`: the terminal gets words for people.
    Stderr,
    /// `-o -`.
    Stdout,
    /// `-o FILE`, relative to the work directory.
    File(PathBuf),
}

/// What every command needs.
#[derive(Debug)]
pub struct Common {
    /// `-D`, relative to the directory of the start.
    pub images_dir: PathBuf,
    /// `-W`; the images directory if absent.
    pub work_dir: Option<PathBuf>,
    /// `-o`.
    pub log: LogTo,
    /// `-v`.
    pub verbosity: u32,
    /// `--log-pid`.
    pub log_pid: bool,
    /// `--unprivileged`.
    pub unprivileged: bool,
    /// `--close`, each.
    pub close: Vec<i32>,
    /// Remarks on the options, for the log once it is open.
    pub notes: Vec<(Level, String)>,
}

/// `dump`, and the eyes of `check -t`.
#[derive(Debug)]
pub struct DumpJob {
    /// For the engine; the directories are not resolved yet.
    pub options: DumpOptions,
    /// `--display-stats`.
    pub display_stats: bool,
    /// `--action-script`, in the order given.
    pub scripts: Vec<PathBuf>,
}

/// `restore`.
#[derive(Debug)]
pub struct RestoreJob {
    /// For the engine; the directories and the pidfile are not resolved yet.
    pub options: RestoreOptions,
    /// `--display-stats`.
    pub display_stats: bool,
    /// `--action-script`, in the order given.
    pub scripts: Vec<PathBuf>,
    /// What this process becomes afterwards (`--exec-cmd`): a program and its arguments.
    pub command: Option<Vec<OsString>>,
}

/// `check`.
#[derive(Debug, PartialEq, Eq)]
pub struct CheckJob {
    /// `--extra` or `--all`.
    pub extra: bool,
    /// `--experimental` or `--all`.
    pub experimental: bool,
    /// `--feature`, each.
    pub features: Vec<String>,
}

/// `lazy-pages`.
#[derive(Debug, PartialEq, Eq)]
pub struct LazyPagesJob {
    /// Not `--no-verify`.
    pub verify: bool,
    /// `--record-working-set`.
    pub record: bool,
    /// `--daemon`.
    pub daemon: bool,
    /// `--pidfile`, not resolved yet.
    pub pidfile: Option<PathBuf>,
    /// `--status-fd`.
    pub status_fd: Option<i32>,
    /// `-o`.
    pub logs: bool,
}

/// What is to be done.
#[derive(Debug)]
pub enum Job {
    /// Save a tree.
    Dump(Box<DumpJob>),
    /// Save memory while the tree runs.
    PreDump(Box<DumpJob>),
    /// Free older images of what younger ones have.
    Dedup,
    /// Bring memory to a tree that is restored.
    LazyPages(LazyPagesJob),
    /// Bring a tree back.
    Restore(Box<RestoreJob>),
    /// Check the kernel.
    Check(CheckJob),
    /// Check a tree.
    CheckTree(Box<DumpJob>),
    /// Let a stopped tree run on.
    Resume(Pid),
    /// Remove network locks.
    Unlock(Locks),
}

/// Everything the options said, before it is known which command wants what.
#[derive(Debug, Default)]
struct Values {
    tree: Option<Pid>,
    final_state: Option<FinalState>,
    detached: bool,
    sibling: bool,
    exec: bool,
    close: Vec<i32>,
    no_verify: bool,
    lazy_pages: bool,
    record_working_set: bool,
    status_fd: Option<i32>,
    new_pidns: bool,
    copies: Option<u32>,
    copy_netns: bool,
    addresses: Vec<Template>,
    images_dir: Option<PathBuf>,
    work_dir: Option<PathBuf>,
    log_file: Option<OsString>,
    log_pid: bool,
    verbosity: Option<u32>,
    display_stats: bool,
    pidfile: Option<PathBuf>,
    scripts: Vec<PathBuf>,
    cpu_cap: Option<(u32, Origin)>,
    timeout: Option<u64>,
    max_pause: Option<Duration>,
    tcp: TcpPolicy,
    network_lock: LockMethod,
    format: Format,
    compression: Option<Compression>,
    dedup: bool,
    outside_unix: OutsideUnix,
    external_unix: bool,
    external: OutsideFiles,
    scan: Scan,
    inherited: Inherited,
    track_mem: bool,
    parent: Option<PathBuf>,
    auto_dedup: bool,
    pre_dump_mode: PreDumpMode,
    link_remap: bool,
    evasive_devices: bool,
    /// `--file-validation filesize`
    sizes_only: bool,
    ghost_limit: Option<u64>,
    shell_job: bool,
    file_locks: bool,
    cgroups: Option<(String, Origin)>,
    skip_rwx: bool,
    /// `--lsm-profile`
    label: Label,
    allow_uprobes: bool,
    unprivileged: bool,
    extra: bool,
    experimental: bool,
    features: Vec<String>,
}

/// The command the operands name.
///
/// # Errors
/// None, an unknown one, or too many operands for it.
pub fn command(operands: &[OsString], given: &[Given]) -> Result<Command, ArgError> {
    let Some(word) = operands.first() else {
        return Err(Kind::Usage("a command is missing".into()).argv());
    };
    let shown = word.to_string_lossy();
    let command = super::table::command(&shown)
        .ok_or_else(|| Kind::UnknownCommand(shown.clone().into_owned()).argv())?;
    let most = match command {
        Command::Resume => 2,
        // It takes as many rules as there are.
        Command::Images => return Ok(command),
        // Refused by name, whatever their operands.
        Command::NotBuilt(_) | Command::Removed(_) => return Ok(command),
        _ => 1,
    };
    // What follows `--exec-cmd --` is a command of its own; the option is judged where all are.
    let has_command = given.iter().any(|g| g.opt.long == "exec-cmd");
    if let Some(extra) = operands.get(most).filter(|_| !has_command) {
        return Err(
            Kind::Usage(format!("'{}' is one word too many", extra.to_string_lossy())).argv()
        );
    }
    let has_tree = given.iter().any(|g| g.opt.long == "tree");
    Ok(if command == Command::Check && has_tree { Command::CheckTree } else { command })
}

/// Turns the occurrences into a job.
///
/// # Errors
/// A value that makes no sense, an option that is not built or does not belong here, a missing one.
pub fn job(
    command: Command,
    operands: &[OsString],
    given: &[Given],
) -> Result<(Common, Job), ArgError> {
    let mut values = Values::default();
    let mut notes = Vec::new();
    for (index, occurrence) in given.iter().enumerate() {
        let again = |later: &Given| later.opt == occurrence.opt;
        if occurrence.opt.negatable && given[index + 1..].iter().any(again) {
            continue; // `--track-mem --no-track-mem` asks for nothing.
        }
        admit(command, occurrence, &mut values, &mut notes)?;
    }
    values.refuse_modes(command)?;
    let job = values.job(command, operands, &mut notes)?;
    Ok((values.common(notes), job))
}

/// Applies one occurrence, or refuses it, or remarks that it does nothing.
fn admit(
    command: Command,
    given: &Given,
    values: &mut Values,
    notes: &mut Vec<(Level, String)>,
) -> Result<(), ArgError> {
    let word = word(command);
    match given.opt.status(command) {
        Some(Status::Built) => values.apply(given).map_err(|kind| kind.at(&given.origin)),
        // What is not built is off; asking for that is fine.
        Some(Status::NotYet | Status::Wrong(_)) if given.negated => Ok(()),
        Some(Status::NotYet) => {
            Err(Kind::NotYet(format!("{} of {word}", given.name())).at(&given.origin))
        }
        Some(Status::Wrong(why)) => {
            Err(Kind::Misplaced { option: given.name(), why }.at(&given.origin))
        }
        Some(Status::NoEffect(why)) => {
            notes.push((Level::Info, format!("{} changes nothing: {why}", given.name())));
            Ok(())
        }
        Some(Status::Foreign) | None => {
            // A configuration file serves all commands, so there it is no mistake.
            if given.origin == Origin::Argv {
                notes.push((Level::Warn, format!("{} has no effect on {word}", given.name())));
            }
            Ok(())
        }
    }
}

/// The command's word, for error texts.
fn word(command: Command) -> &'static str {
    match command {
        Command::Dump => "dump",
        Command::PreDump => "pre-dump",
        Command::Dedup => "dedup",
        Command::LazyPages => "lazy-pages",
        Command::Restore => "restore",
        Command::Check | Command::CheckTree => "check",
        Command::Resume => "resume",
        Command::Unlock => "unlock",
        Command::Demo => "demo",
        Command::Crit => "crit",
        Command::Images => "images",
        Command::NotBuilt(name) | Command::Removed(name) => name,
    }
}

impl Values {
    /// Applies one occurrence of an option that is built for the command.
    fn apply(&mut self, given: &Given) -> Result<(), Kind> {
        let on = !given.negated;
        let arg = given.value.as_deref();
        let bad = |want: &'static str| Kind::BadValue {
            option: given.name(),
            value: arg.unwrap_or_default().to_string_lossy().into_owned(),
            want,
        };
        let text = || arg.unwrap_or_default();
        let path = || PathBuf::from(text());
        match given.opt.long {
            "images-dir" => self.images_dir = Some(path()),
            "work-dir" => self.work_dir = Some(path()),
            "log-file" => self.log_file = Some(text().to_owned()),
            "log-pid" => self.log_pid = on,
            "verbosity" => {
                let before = self.verbosity.unwrap_or(VERBOSITY);
                self.verbosity =
                    Some(values::verbosity(before, arg).ok_or_else(|| bad("a level"))?);
            }
            "display-stats" => self.display_stats = on,
            "action-script" => self.scripts.push(path()),
            "unprivileged" => self.unprivileged = on,
            "tree" => self.tree = Some(values::pid(text()).ok_or_else(|| bad("a process id"))?),
            "leave-stopped" => self.final_state = Some(FinalState::Stopped),
            "leave-running" => self.final_state = Some(FinalState::Running),
            "restore-detached" | "daemon" => self.detached = on,
            "restore-sibling" => self.sibling = on,
            "exec-cmd" => self.exec = on,
            "close" => {
                let number = text().to_str().and_then(|t| t.parse().ok());
                self.close.push(number.ok_or_else(|| bad("the number of a descriptor"))?);
            }
            "copies" => {
                let number = text().to_str().and_then(|t| t.parse().ok()).filter(|n| *n > 0);
                self.copies = Some(number.ok_or_else(|| bad("a number of copies"))?);
            }
            "copy-netns" => self.copy_netns = true,
            "replace-address" => {
                let template = Template::new(text().to_string_lossy());
                template.rule(0).map_err(|e| Kind::BadRule(e.to_string()))?;
                self.addresses.push(template);
            }
            "track-mem" => self.track_mem = on,
            "prev-images-dir" => self.parent = Some(path()),
            "auto-dedup" => self.auto_dedup = on,
            "dedup" => self.dedup = true,
            "pre-dump-mode" => {
                let mode = one_of(arg, &["splice", "read"]).ok_or_else(|| bad("splice or read"))?;
                self.pre_dump_mode =
                    if mode == "read" { PreDumpMode::Read } else { PreDumpMode::Splice };
            }
            "no-verify" => self.no_verify = true,
            "lazy-pages" => self.lazy_pages = true,
            "record-working-set" => self.record_working_set = true,
            "status-fd" => {
                let number = text().to_str().and_then(|t| t.parse().ok()).filter(|n| *n > 2);
                self.status_fd = Some(number.ok_or_else(|| bad("a descriptor number"))?);
            }
            "new-pidns" => self.new_pidns = true,
            "pidfile" => self.pidfile = Some(path()),
            "timeout" => {
                let seconds = text().to_str().and_then(|t| t.parse().ok());
                self.timeout = Some(seconds.ok_or_else(|| bad("a number of seconds"))?);
            }
            "max-pause" => {
                let most = text().to_str().and_then(|t| t.parse().ok()).filter(|ms| *ms > 0);
                let most = most.ok_or_else(|| bad("a number of milliseconds, at least 1"))?;
                self.max_pause = Some(Duration::from_millis(most));
            }
            "cpu-cap" => {
                let mask = values::cpu_cap(arg);
                let mask = mask.ok_or_else(|| bad("a list of fpu, cpu, ins, all, none"))?;
                self.cpu_cap = Some((mask, given.origin.clone()));
            }
            "shell-job" => self.shell_job = on,
            "file-locks" => self.file_locks = on,
            "link-remap" => self.link_remap = on,
            "force-irmap" => self.scan.first = on,
            // Relative to where the command was started.
            "irmap-scan-path" => {
                let full = std::path::absolute(path()).map_err(|_| bad("a path"))?;
                self.scan.paths.push(full);
            }
            "evasive-devices" => self.evasive_devices = on,
            "ghost-limit" => {
                let size = values::size(text())
                    .ok_or_else(|| bad("a size in bytes, or with K, M or G"))?;
                self.ghost_limit = Some(size);
            }
            "file-validation" => {
                let mode = one_of(arg, &["filesize", "buildid"])
                    .ok_or_else(|| bad("filesize or buildid"))?;
                self.sizes_only = mode == "filesize";
            }
            "skip-file-rwx-check" => self.skip_rwx = on,
            "lsm-profile" => {
                self.label = values::label(text())
                    .ok_or_else(|| bad("apparmor:NAME, selinux:NAME or none"))?;
            }
            "allow-uprobes" => self.allow_uprobes = on,
            "tcp-established" => self.tcp.established = on,
            "tcp-close" => self.tcp.close = on,
            "skip-in-flight" => self.tcp.skip_in_flight = on,
            "ext-unix-sk" => {
                self.external_unix = on;
                let inodes = values::numbers(arg).ok_or_else(|| bad("a list of inode numbers"))?;
                self.outside_unix.all |= inodes.is_empty();
                self.outside_unix.inodes.extend(inodes);
            }
            "external" => match values::external(text()) {
                Some(External::Unix(inode)) => {
                    self.external_unix = on;
                    self.outside_unix.inodes.insert(inode);
                }
                Some(External::File(key)) => {
                    self.external.files.insert(key);
                }
                Some(External::Terminal(key)) => {
                    self.external.terminals.insert(key);
                }
                None => {
                    return Err(Kind::NotYet(format!("--external {}", text().display())));
                }
            },
            "inherit-fd" => {
                let (number, resource) =
                    values::inherited(text()).ok_or_else(|| bad("fd[N]:RES"))?;
                self.inherited.insert(resource.as_bytes().to_vec(), number);
            }
            "network-lock" => {
                let method = one_of(arg, &["iptables", "nftables", "skip", "none"])
                    .ok_or_else(|| bad("iptables, nftables or skip"))?;
                self.network_lock = match method {
                    "iptables" => LockMethod::Iptables,
                    "nftables" => LockMethod::Nftables,
                    _ => LockMethod::Skip,
                };
            }
            "compress" => {
                let method = arg.map_or(Some("lz4"), |_| one_of(arg, &["lz4", "zstd"]));
                self.compression = Some(match method.ok_or_else(|| bad("lz4 or zstd"))? {
                    "zstd" => Compression::Zstd,
                    _ => Compression::Lz4,
                });
            }
            "format" => {
                self.format = match one_of(arg, &["auto", "criu", "rewake"]) {
                    Some("auto") => Format::Auto,
                    Some("criu") => Format::Criu,
                    Some(_) => Format::Rewake,
                    None => return Err(bad("auto, criu or rewake")),
                };
            }
            "manage-cgroups" => {
                let modes = ["none", "props", "soft", "full", "strict", "ignore"];
                let mode = match arg {
                    None => "soft",
                    some => one_of(some, &modes)
                        .ok_or_else(|| bad("none, props, soft, full, strict or ignore"))?,
                };
                self.cgroups = Some((mode.to_owned(), given.origin.clone()));
            }
            "extra" => self.extra = on,
            "experimental" => self.experimental = on,
            "all" => (self.extra, self.experimental) = (true, true),
            "feature" => self.features.push(text().to_string_lossy().into_owned()),
            // Dealt with before: they decide what is read, or end the program.
            "config" | "no-default-config" | "help" | "version" => {}
            _ => return Err(Kind::NotYet(given.name())),
        }
        Ok(())
    }

    /// Refuses the modes of built options that are not built.
    fn refuse_modes(&self, command: Command) -> Result<(), ArgError> {
        if let Some((mode, origin)) = &self.cgroups
            && !matches!(mode.as_str(), "none" | "soft" | "ignore")
        {
            return Err(Kind::NotYet(format!("--manage-cgroups={mode}")).at(origin));
        }
        match &self.cpu_cap {
            Some((mask, origin)) if *mask != 0 && command == Command::Dump => {
                let what = "--cpu-cap other than none (writing cpuinfo.img) of dump";
                Err(Kind::NotYet(what.into()).at(origin))
            }
            _ => Ok(()),
        }
    }

    fn job(
        &self,
        command: Command,
        operands: &[OsString],
        notes: &mut Vec<(Level, String)>,
    ) -> Result<Job, ArgError> {
        match command {
            Command::Dump => Ok(Job::Dump(Box::new(self.dump("dump")?))),
            Command::PreDump => Ok(Job::PreDump(Box::new(self.dump("pre-dump")?))),
            Command::Dedup => Ok(Job::Dedup),
            Command::LazyPages => Ok(Job::LazyPages(LazyPagesJob {
                verify: !self.no_verify,
                record: self.record_working_set,
                daemon: self.detached,
                pidfile: self.pidfile.clone(),
                status_fd: self.status_fd,
                logs: self.log_file.is_some(),
            })),
            Command::CheckTree => Ok(Job::CheckTree(Box::new(self.dump("check")?))),
            Command::Restore => {
                self.restore(operands, notes).map(|job| Job::Restore(Box::new(job)))
            }
            Command::Check => Ok(Job::Check(CheckJob {
                extra: self.extra,
                experimental: self.experimental,
                features: self.features.clone(),
            })),
            Command::Resume => {
                let text: &OsStr = operands
                    .get(1)
                    .ok_or_else(|| Kind::Usage("resume needs a PID".into()).argv())?;
                let bad = || Kind::BadValue {
                    option: "resume".into(),
                    value: text.to_string_lossy().into_owned(),
                    want: "a process id",
                };
                values::pid(text).map(Job::Resume).ok_or_else(|| bad().argv())
            }
            Command::Unlock => match (&self.images_dir, self.extra) {
                (Some(_), true) => {
                    Err(Kind::Usage("unlock takes --images-dir or --all, not both".into()).argv())
                }
                (Some(dir), false) => Ok(Job::Unlock(Locks::Of(dir.clone()))),
                (None, true) => Ok(Job::Unlock(Locks::All)),
                (None, false) => Ok(Job::Unlock(Locks::Leftovers)),
            },
            // The caller has dealt with the others.
            _ => Err(Kind::NotYet(word(command).into()).argv()),
        }
    }

    fn dump(&self, word: &str) -> Result<DumpJob, ArgError> {
        let root =
            self.tree.ok_or_else(|| Kind::Usage(format!("{word} needs --tree PID")).argv())?;
        self.refuse_for_own_format()?;
        let seconds = self.timeout.unwrap_or(TIMEOUT);
        Ok(DumpJob {
            options: DumpOptions {
                root,
                images_dir: PathBuf::new(),
                work_dir: PathBuf::new(),
                final_state: self.final_state.unwrap_or(FinalState::Dead),
                shell_job: self.shell_job,
                file_locks: self.file_locks,
                link_remap: self.link_remap,
                build_ids: !self.sizes_only,
                evasive_devices: self.evasive_devices,
                ghost_limit: self.ghost_limit.unwrap_or(GHOST_LIMIT),
                timeout: (seconds > 0).then(|| Duration::from_secs(seconds)),
                tcp: self.tcp,
                network_lock: self.network_lock,
                format: self.format,
                compression: self.compression,
                dedup: self.dedup,
                outside_unix: self.outside_unix.clone(),
                external: self.external.clone(),
                scan: self.scan.clone(),
                max_pause: self.max_pause,
                track_mem: self.track_mem,
                parent: self.parent.clone(),
                auto_dedup: self.auto_dedup,
                pre_dump_mode: self.pre_dump_mode,
            },
            display_stats: self.display_stats,
            scripts: self.scripts.clone(),
        })
    }

    /// The command after `--exec-cmd --`; the first operand is `restore` itself.
    fn command(&self, operands: &[OsString]) -> Result<Option<Vec<OsString>>, ArgError> {
        match operands.get(1..) {
            _ if !self.exec => Ok(None),
            _ if self.detached => {
                let text = "--exec-cmd and --restore-detached exclude each other: \
                            the command is to be the parent of the tree";
                Err(Kind::Usage(text.into()).argv())
            }
            Some(command @ [_, ..]) => Ok(Some(command.to_vec())),
            _ => {
                let text = "--exec-cmd needs a command after the options: -- PROGRAM ARGUMENTS";
                Err(Kind::Usage(text.into()).argv())
            }
        }
    }

    fn restore(
        &self,
        operands: &[OsString],
        notes: &mut Vec<(Level, String)>,
    ) -> Result<RestoreJob, ArgError> {
        if self.sibling && !self.detached {
            let text = "--restore-sibling needs --restore-detached";
            return Err(Kind::Usage(text.into()).argv());
        }
        self.refuse_for_copies()?;
        if self.record_working_set && !self.lazy_pages {
            return Err(Kind::Usage("--record-working-set needs --lazy-pages".into()).argv());
        }
        if self.log_pid && !matches!(self.log_to(), LogTo::File(_)) {
            return Err(Kind::Usage("--log-pid needs --log-file FILE".into()).argv());
        }
        let final_state = self.final_state.unwrap_or(FinalState::Running);
        if final_state == FinalState::Stopped && self.detached && self.shell_job {
            let text = "a stopped job that is left to itself gets SIGHUP when this process ends";
            notes.push((Level::Warn, text.into()));
        }
        let mask = self.cpu_cap.as_ref().map_or(values::cpu::FPU, |(mask, _)| *mask);
        if mask & (values::cpu::CPU | values::cpu::INS) != 0 {
            let text = "--cpu-cap: cpuinfo.img is not compared; the extended state of each task is";
            notes.push((Level::Warn, text.into()));
        }
        Ok(RestoreJob {
            options: RestoreOptions {
                images_dir: PathBuf::new(),
                work_dir: PathBuf::new(),
                final_state,
                detached: self.detached,
                sibling: self.sibling,
                verify: !self.no_verify,
                lazy_pages: self.lazy_pages,
                record_working_set: self.record_working_set,
                new_pidns: self.new_pidns,
                copies: self.copies,
                copy_netns: self.copy_netns,
                addresses: self.addresses.clone(),
                shell_job: self.shell_job,
                file_locks: self.file_locks,
                link_remap: self.link_remap,
                build_ids: !self.sizes_only,
                skip_file_rwx_check: self.skip_rwx,
                allow_uprobes: self.allow_uprobes,
                check_cpu: mask != 0,
                label: self.label.clone(),
                pidfile: self.pidfile.clone(),
                tcp: self.tcp,
                external_unix: self.external_unix,
                inherited: self.inherited.clone(),
            },
            display_stats: self.display_stats,
            scripts: self.scripts.clone(),
            command: self.command(operands)?,
        })
    }

    /// Refuses what images that only we can read cannot be.
    fn refuse_for_own_format(&self) -> Result<(), ArgError> {
        let own = [(self.compression.is_some(), "--compress"), (self.dedup, "--dedup")];
        let Some((_, option)) = own.iter().find(|(given, _)| *given) else { return Ok(()) };
        let others = [
            (self.format == Format::Criu, "--format criu: CRIU cannot read them"),
            (self.track_mem, "--track-mem: chains of images are CRIU's too"),
            (self.parent.is_some(), "--prev-images-dir: chains of images are CRIU's too"),
            (
                self.compression.is_some() && self.dedup,
                "--dedup: equal pages are found by where they are",
            ),
        ];
        match others.iter().find(|(given, _)| *given) {
            Some((_, other)) => {
                Err(Kind::Usage(format!("{option} cannot be used with {other}")).argv())
            }
            None => Ok(()),
        }
    }

    /// Refuses what copies cannot be asked for.
    fn refuse_for_copies(&self) -> Result<(), ArgError> {
        let usage = |text: String| Err(Kind::Usage(text).argv());
        let Some(number) = self.copies else {
            if self.copy_netns {
                return usage("--copy-netns needs --copies".into());
            }
            if let Some(rule) = self.addresses.iter().find(|a| !a.is_constant()) {
                return usage(format!("--replace-address {rule} needs --copies"));
            }
            return Ok(());
        };
        let single = [
            (self.tcp.established, "--tcp-established: a connection can live once"),
            (self.shell_job, "--shell-job: a terminal has one job in front"),
            (self.sibling, "--restore-sibling"),
            (self.lazy_pages, "--lazy-pages: copies share their memory"),
        ];
        if let Some((_, option)) = single.iter().find(|(given, _)| *given) {
            return usage(format!("--copies cannot be used with {option}"));
        }
        for template in &self.addresses {
            template.rule(number - 1).map_err(|e| Kind::BadRule(e.to_string()).argv())?;
        }
        Ok(())
    }

    fn log_to(&self) -> LogTo {
        match &self.log_file {
            None => LogTo::Stderr,
            Some(file) if file == "-" => LogTo::Stdout,
            Some(file) => LogTo::File(PathBuf::from(file)),
        }
    }

    fn common(self, notes: Vec<(Level, String)>) -> Common {
        Common {
            log: self.log_to(),
            images_dir: self.images_dir.unwrap_or_else(|| PathBuf::from(".")),
            work_dir: self.work_dir,
            verbosity: self.verbosity.unwrap_or(VERBOSITY),
            log_pid: self.log_pid,
            unprivileged: self.unprivileged,
            close: self.close,
            notes,
        }
    }
}

/// `arg` if it is one of `words`.
fn one_of<'a>(arg: Option<&OsStr>, words: &[&'a str]) -> Option<&'a str> {
    words.iter().find(|word| arg == Some(OsStr::new(word))).copied()
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
