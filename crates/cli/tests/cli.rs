//! The built binary, from outside: words, refusals, configuration files, exit codes, the log.
//!
//! The tests that go past the options need root (as the program does) and say so by failing without it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

const REWAKE: &str = env!("CARGO_BIN_EXE_rewake");

/// A directory of the test's own, removed at its end.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("rewake-cli-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        Dir(path)
    }

    fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
        fs::write(&path, text).expect("write");
        path
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).expect(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The program in directory `dir`, which is its home as well, with no configuration but what is there.
fn command(dir: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).env("HOME", dir).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CR") {
            command.env_remove(name);
        }
    }
    command
}

fn run_in(dir: &Dir, args: &str) -> Output {
    command(&dir.0, REWAKE).args(args.split_whitespace()).output().expect("runs")
}

fn run(args: &str) -> Output {
    run_in(&Dir::new(), args)
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn refused(args: &str, code: i32, text: &str) {
    let output = run(args);
    assert_eq!(output.status.code(), Some(code), "{args}: {}", err(&output));
    assert!(err(&output).contains(text), "{args}: {}", err(&output));
    assert_eq!(out(&output), "", "{args}");
}

#[test]
fn version_and_help() {
    for args in ["-V", "--version", "dump -t 1 --vers"] {
        let output = run(args);
        assert!(output.status.success());
        assert_eq!(out(&output), "Version: 4.2\nrewake 0.1.0\n");
    }
    for args in ["-h", "--help", "-h --no-default-config dump"] {
        let output = run(args);
        assert!(output.status.success() && err(&output).is_empty());
        let text = out(&output);
        assert!(text.contains("Usage: rewake COMMAND"));
        assert!(text.contains("--[no-]tcp-established"));
    }
}

#[test]
fn the_name_decides() {
    let dir = Dir::new();
    for name in ["criu", "crit", "other"] {
        symlink(REWAKE, dir.0.join(name)).expect("symlink");
    }
    let as_name =
        |name: &str, arg: &str| command(&dir.0, dir.0.join(name)).arg(arg).output().expect("runs");
    assert!(out(&as_name("criu", "--help")).contains("Usage: criu COMMAND"));
    assert!(err(&as_name("criu", "--bogus")).starts_with("criu: unknown option '--bogus'"));
    assert!(out(&as_name("other", "--help")).contains("Usage: rewake COMMAND"));
    let crit = as_name("crit", "--help");
    assert!(out(&crit).contains("decode") && !out(&crit).contains("--tcp-established"));
    let same = command(&dir.0, REWAKE).args(["crit", "--help"]).output().expect("runs");
    assert!(out(&same).contains("decode") && !out(&same).contains("--tcp-established"));
}

#[test]
fn wrong_words_get_the_usage_text() {
    for (args, text) in [
        ("", "a command is missing"),
        ("dumb", "unknown command 'dumb'"),
        ("Dump -t 1", "unknown command 'Dump'"),
        ("dump --bogus", "unknown option '--bogus'"),
        ("dump -Z", "unknown option '-Z'"),
        ("dump --leave", "'--leave' is ambiguous"),
        ("dump -t", "'-t' needs an argument"),
        ("dump", "dump needs --tree PID"),
        ("restore here", "'here' is one word too many"),
        ("restore -S", "--restore-sibling needs --restore-detached"),
    ] {
        refused(args, 1, text);
        assert!(err(&run(args)).contains("usage: rewake COMMAND"), "{args}");
    }
    refused("dump -t 0", 1, "bad argument '0' of --tree: expected a process id");
    refused("dump -t 5 --ghost-limit 1Q", 1, "bad argument '1Q' of --ghost-limit");
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    for command in ["page-server", "service", "swrk 3", "cpuinfo dump"] {
        let name = command.split(' ').next().expect("a word");
        refused(command, 1, &format!("{name} is not supported yet"));
    }
    for args in [
        "dump -t 1 --external mnt[]",
        "dump -t 1 --page-server",
        "pre-dump -t 1 --page-server",
        "restore --auto-dedup",
        "dump -t 1 --lazy-pages",
        "lazy-pages --page-server",
        "restore -r /x",
        "restore --manage-cgroups=full",
    ] {
        refused(args, 1, "not supported yet");
    }
    refused("exec", 255, "deprecated");
    refused("show", 255, "deprecated");
    let dir = Dir::new();
    let output =
        command(&dir.0, REWAKE).env("CRIU_FAULT", "1").arg("check").output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("CRIU_FAULT (fault injection) is not supported yet"));
}

#[test]
fn configuration_files() {
    let dir = Dir::new();
    let conf = dir.put("bad.conf", "# fine\nshell-job\nwork-dir \"x\n");
    let output = run_in(&dir, &format!("check --config {}", conf.display()));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        err(&output),
        format!("rewake: {}:3: syntax error: a quoted value does not end\n", conf.display())
    );

    dir.put(".criu/default.conf", "lsm-mount-context x # of restore\n");
    let output = run_in(&dir, "restore");
    assert_eq!(output.status.code(), Some(1));
    let text = format!(
        "{}/.criu/default.conf:1: --lsm-mount-context of restore is not supported yet\n",
        dir.0.display()
    );
    assert_eq!(err(&output), format!("rewake: {text}"));
    // It does not concern check, and can be left out.
    assert!(run_in(&dir, "check --feature openat2").status.success());
    let output = run_in(&dir, "restore --no-default-config -D nowhere");
    assert!(err(&output).contains("cannot open the images directory nowhere"), "{}", err(&output));

    let env = dir.put("env.conf", "log-file env.log\nverbosity 4\n");
    let output = command(&dir.0, REWAKE)
        .env("CRIU_CONFIG_FILE", &env)
        .args(["check", "--feature", "openat2", "--no-default-config"])
        .output()
        .expect("runs");
    assert!(output.status.success(), "{}", err(&output));
    assert!(dir.read("env.log").contains("Version: 4.2"));

    let output = run_in(&dir, "check --feature openat2 --config /nonexistent/criu.conf");
    assert!(output.status.success());
    assert_eq!(
        err(&output),
        "rewake: warning: configuration file /nonexistent/criu.conf does not exist\n"
    );
}

#[test]
fn features() {
    let output = run("check --feature timerfd --feature openat2");
    assert!(output.status.success(), "{}{}", out(&output), err(&output));
    assert_eq!(out(&output), "timerfd is supported\nopenat2 is supported\n");
    // No kernel makes this one true yet: the reason is ours.
    let output = run("check --feature compat_cr");
    assert_eq!(output.status.code(), Some(1));
    assert!(out(&output).starts_with("compat_cr is not supported: "));
    for unknown in ["list", "nonsense"] {
        let output = run(&format!("check --feature {unknown}"));
        assert_eq!(output.status.code(), Some(1));
        assert!(err(&output).contains(&format!("unknown feature '{unknown}'")));
        assert!(err(&output).contains("pagemap_scan"));
    }
}

#[test]
fn check_gives_a_verdict_that_fits_its_exit_code() {
    for args in ["check", "check --extra", "check --all", "check --experimental"] {
        let output = run(args);
        let text = out(&output);
        match output.status.code() {
            Some(0) => assert_eq!(text, "Looks good.\n", "{args}"),
            Some(1) => {
                assert!(text.contains(" is missing ("), "{args}: {text}");
                assert!(
                    text.contains("Looks good but") || text.contains("Does not look good."),
                    "{text}"
                );
            }
            code => panic!("{args}: {code:?}"),
        }
    }
    // 32-bit tasks are experimental, and missing.
    assert_eq!(run("check --all").status.code(), Some(1));
    assert!(out(&run("check --all")).contains("compat_cr is missing (32-bit tasks): "));
}

#[test]
fn the_log_file() {
    let dir = Dir::new();
    fs::create_dir(dir.0.join("work")).expect("mkdir");
    dir.put("work/check.log", "old text that goes away\n");
    let output = run_in(&dir, "check --feature openat2 -v4 -o check.log -D . -W work --shell-job");
    assert!(output.status.success() && err(&output).is_empty(), "{}", err(&output));
    let log = dir.read("work/check.log");
    let lines: Vec<&str> = log.lines().collect();
    for line in &lines {
        assert!(line.as_bytes()[0] == b'(' && &line[10..12] == ") ", "{line}");
    }
    assert_eq!(&lines[0][12..], "Version: 4.2 (gitid 0)");
    assert!(lines[1].ends_with("rewake 0.1.0"));
    assert!(lines[2].contains("Running on ") && lines[2].contains(" Linux "));
    assert!(
        log.contains("Warn  (cli/startup.rs:")
            && log.contains("--shell-job has no effect on check\n"),
        "{log}"
    );
    assert!(log.contains("feature openat2: present\n"));

    let output = run_in(&dir, "check --feature openat2 -o quiet.log --shell-job");
    assert!(output.status.success() && err(&output).is_empty());
    assert!(dir.read("quiet.log").starts_with("Warn  (cli/startup.rs:"), "no time below level 3");
    let mode = fs::metadata(dir.0.join("quiet.log")).expect("stat").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);

    let output = run_in(&dir, "check --feature openat2 -v3 -o -");
    assert!(
        out(&output).contains("Running on ") && out(&output).ends_with("openat2 is supported\n")
    );
    let output = run_in(&dir, "check --feature openat2 -v3");
    assert!(err(&output).contains("Version: 4.2 (gitid 0)\n"), "{}", err(&output));
    let output = run_in(&dir, "check --feature openat2 -v0 -o silent.log --shell-job");
    assert!(output.status.success());
    assert_eq!(dir.read("silent.log"), "");
}

#[test]
fn places_that_do_not_exist() {
    let dir = Dir::new();
    dir.put("file", "");
    for (args, text) in [
        ("check -D nowhere", "cannot open the images directory nowhere: "),
        ("check -D file", "cannot open the images directory file: "),
        ("check -W nowhere", "cannot open the work directory nowhere: "),
        ("check -o nowhere/log", "cannot create the log file nowhere/log: "),
    ] {
        let output = run_in(&dir, args);
        assert_eq!(output.status.code(), Some(1), "{args}");
        assert!(err(&output).starts_with(&format!("rewake: {text}")), "{args}: {}", err(&output));
        assert!(err(&output).contains("\nhint: "), "{args}");
    }
    dir.put("pid", "1");
    let output = run_in(&dir, "restore -d --pidfile pid -o restore.log");
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("/pid exists already"), "{}", err(&output));
    let log = dir.read("restore.log");
    assert!(
        log.contains("Error (cli/commands/restore.rs:") && log.contains("/pid exists already\n"),
        "{log}"
    );
    assert!(log.ends_with(": Restoring FAILED.\n"), "{log}");
    assert_eq!(dir.read("pid"), "1");
}

#[test]
fn without_capabilities_it_says_what_is_missing() {
    const NOBODY: u32 = 65534;
    let dir = Dir::new();
    let copy = dir.0.join("rewake");
    fs::copy(REWAKE, &copy).expect("copy");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
    let output = command(&dir.0, &copy)
        .arg("check")
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .expect("runs as nobody");
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN"), "{}", err(&output));
    assert!(err(&output).contains("\nhint: run it as root"), "{}", err(&output));
    // What needs no capability works.
    let output =
        command(&dir.0, &copy).arg("-V").uid(NOBODY).gid(NOBODY).output().expect("runs as nobody");
    assert!(output.status.success());
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let mut child = command(Path::new("/"), REWAKE)
        .arg("--help")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ends");
    assert!(output.status.code().is_some(), "no signal");
    assert_eq!(err(&output), "");
}
