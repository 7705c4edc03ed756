use super::*;
use crate::args::parse::parse;
use crate::args::table::{Arg, OPTIONS};

fn run(line: &str) -> Result<(Common, Job), String> {
    let words = parse(line.split(' ').map(OsString::from)).map_err(|e| e.to_string())?;
    let command = command(&words.operands, &words.given).map_err(|e| e.to_string())?;
    job(command, &words.operands, &words.given).map_err(|e| e.to_string())
}

fn dump(line: &str) -> DumpJob {
    match run(line) {
        Ok((_, Job::Dump(job))) => *job,
        other => panic!("{line}: {other:?}"),
    }
}

fn restore(line: &str) -> RestoreJob {
    match run(line) {
        Ok((_, Job::Restore(job))) => *job,
        other => panic!("{line}: {other:?}"),
    }
}

fn error(line: &str) -> String {
    run(line).map(|_| ()).expect_err(line)
}

#[test]
fn dump_defaults() {
    let job = dump("dump -t 17");
    assert_eq!(job.options.root, 17);
    assert_eq!(job.options.final_state, FinalState::Dead);
    assert_eq!(job.options.ghost_limit, 1 << 20);
    assert_eq!(job.options.timeout, Some(Duration::from_secs(10)));
    assert!(!job.options.shell_job && !job.display_stats && job.scripts.is_empty());
}

#[test]
fn the_last_final_state_wins() {
    assert_eq!(dump("dump -t 1 -s -R").options.final_state, FinalState::Running);
    assert_eq!(dump("dump -t 1 -R -s").options.final_state, FinalState::Stopped);
    assert_eq!(restore("restore").options.final_state, FinalState::Running);
    assert_eq!(restore("restore -s").options.final_state, FinalState::Stopped);
}

#[test]
fn the_last_value_wins_and_lists_accumulate() {
    let job =
        dump("dump -t 1 -t 2 -j --no-shell-job --timeout 0 --action-script /a --action-script /b");
    assert_eq!(job.options.root, 2);
    assert!(!job.options.shell_job);
    assert_eq!(job.options.timeout, None);
    assert_eq!(job.scripts, [PathBuf::from("/a"), PathBuf::from("/b")]);
    assert_eq!(dump("dump -t 1 --ghost-limit 8M").options.ghost_limit, 8 << 20);
    assert_eq!(run("check -v -vv").unwrap().0.verbosity, 5);
    assert_eq!(run("check -vv -v1").unwrap().0.verbosity, 1);
}

#[test]
fn restore_options() {
    let job = restore(
        "restore -d -S --tcp-established --cpu-cap=none --file-validation filesize --pidfile p",
    );
    assert!(job.options.detached && job.options.sibling && job.options.tcp.established);
    assert!(!job.options.check_cpu && !job.options.build_ids);
    assert!(restore("restore --file-validation buildid").options.build_ids);
    assert_eq!(restore("restore").options.label, Label::OfImages);
    assert_eq!(restore("restore --lsm-profile none").options.label, Label::Ignored);
    let named = Label::Named("selinux".into(), "u:r:t:s0".into());
    assert_eq!(restore("restore --lsm-profile selinux:u:r:t:s0").options.label, named);
    for wrong in ["smack:a", "apparmor", "apparmor:", "none:a"] {
        assert!(run(&format!("restore --lsm-profile {wrong}")).is_err(), "{wrong}");
    }
    assert!(restore("restore").options.build_ids && dump("dump -t 1").options.build_ids);
    assert_eq!(job.options.pidfile, Some(PathBuf::from("p")));
    assert!(restore("restore").options.check_cpu);
    assert!(restore("restore --daemon").options.detached);
    assert!(!restore("restore -d --no-restore-detached").options.detached);
    assert_eq!(error("restore -S"), "--restore-sibling needs --restore-detached");
    assert_eq!(error("restore --log-pid"), "--log-pid needs --log-file FILE");
    assert_eq!(error("restore --log-pid -o -"), "--log-pid needs --log-file FILE");
    assert!(run("restore --log-pid -o r.log").unwrap().0.log_pid);
}

#[test]
fn check_jobs() {
    let job = |line| match run(line) {
        Ok((_, Job::Check(job))) => job,
        other => panic!("{other:?}"),
    };
    assert_eq!(job("check"), CheckJob { extra: false, experimental: false, features: vec![] });
    assert_eq!(job("check --all"), CheckJob { extra: true, experimental: true, features: vec![] });
    assert_eq!(job("check --feature a --feature b").features, ["a", "b"]);
    assert!(
        matches!(run("check -t 5 --tcp-close"), Ok((_, Job::CheckTree(job))) if job.options.tcp.close)
    );
    assert!(matches!(run("resume 5"), Ok((_, Job::Resume(5)))));
}

#[test]
fn network_locks() {
    let method = |line| match run(line) {
        Ok((_, Job::Dump(job))) => job.options.network_lock,
        other => panic!("{other:?}"),
    };
    assert_eq!(method("dump -t 1"), LockMethod::Nftables);
    assert_eq!(method("dump -t 1 --network-lock iptables"), LockMethod::Iptables);
    assert_eq!(method("dump -t 1 --network-lock=skip"), LockMethod::Skip);
    assert!(error("dump -t 1 --network-lock x").contains("expected iptables, nftables or skip"));
    let locks = |line| match run(line) {
        Ok((_, Job::Unlock(locks))) => locks,
        other => panic!("{other:?}"),
    };
    assert_eq!(locks("unlock"), Locks::Leftovers);
    assert_eq!(locks("unlock --all"), Locks::All);
    assert_eq!(locks("unlock -D x"), Locks::Of("x".into()));
    assert!(error("unlock -D x --all").contains("not both"));
    assert!(error("unlock 5").contains("one word too many"));
}

#[test]
fn missing_and_surplus_words() {
    assert_eq!(error("dump"), "dump needs --tree PID");
    assert_eq!(error("resume"), "resume needs a PID");
    assert_eq!(error("-j"), "a command is missing");
    assert_eq!(error("dumb -t 1"), "unknown command 'dumb'");
    assert_eq!(error("dump x -t 1"), "'x' is one word too many");
    assert_eq!(error("restore x"), "'x' is one word too many");
    assert!(error("restore --exec-cmd").contains("needs a command"));
    assert!(error("restore -d --exec-cmd -- x y").contains("exclude each other"));
    assert_eq!(error("dump -t 0"), "bad argument '0' of --tree: expected a process id");
    assert_eq!(error("resume x"), "bad argument 'x' of resume: expected a process id");
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    assert_eq!(error("dump -t 1 --page-server"), "--page-server of dump is not supported yet");
    assert_eq!(error("dump -t 1 --lazy-pages"), "--lazy-pages of dump is not supported yet");
    assert_eq!(error("dump -t 1 --external mnt[x]:y"), "--external mnt[x]:y is not supported yet");
    assert_eq!(
        error("dump -t 1 --manage-cgroups=full"),
        "--manage-cgroups=full is not supported yet"
    );
    assert!(error("dump -t 1 --cpu-cap").contains("not supported yet"));
    assert!(error("dump -t 1 --inherit-fd fd[3]:x").contains("can only be used with restore"));
    assert!(error("check --ms").contains("deprecated"));
    assert!(error("dump -t 1 --manage-cgroups=x").contains("expected none, props"));
    for fine in [
        "dump -t 1 --no-page-server",
        "dump -t 1 --page-server --no-page-server",
        "dump -t 1 --manage-cgroups",
        "dump -t 1 --manage-cgroups=full --manage-cgroups=ignore",
        "dump -t 1 --cpu-cap=none",
        "dump -t 1 --no-mntns-compat-mode",
        "dump -t 1 --no-ghost-fiemap",
        "dump -t 1 -x --external unix[7]",
        "dump -t 1 --ext-unix-sk=7,8",
        "restore -x --inherit-fd fd[3]:socket:[9]",
        "restore --inherit-fd fd[3]:pipe:[9] --inherit-fd fd[4]:var/log/x",
        "dump -t 1 --force-irmap --irmap-scan-path /etc --irmap-scan-path /srv",
        "dump -t 1 --external file[1:2] --external tty[8803:1a]",
        "restore --network-lock nftables",
    ] {
        assert!(run(fine).is_ok(), "{fine}");
    }
}

#[test]
fn foreign_options_are_remarked_on() {
    let (common, _) = run("restore -t 5").unwrap();
    assert_eq!(common.notes, [(Level::Warn, "--tree has no effect on restore".to_owned())]);
    let (common, _) = run("dump -t 5").unwrap();
    assert!(common.notes.is_empty());
}

#[test]
fn a_configuration_file_may_hold_options_of_other_commands() {
    let mut given = Vec::new();
    let file = std::rc::Rc::new(PathBuf::from("c"));
    crate::args::config::parse(b"restore-detached\npage-server", &file, &mut given).unwrap();
    let operands = [OsString::from("check")];
    let (common, _) = job(Command::Check, &operands, &given).unwrap();
    assert!(common.notes.is_empty());
    let e = job(Command::Dump, &operands, &given).unwrap_err().to_string();
    assert_eq!(e, "c:2: --page-server of dump is not supported yet");
}

/// Every option that the table calls built is really applied, and every one that it calls not built is really refused:
/// for all of them and each command.
#[test]
fn the_table_tells_the_truth() {
    for opt in &OPTIONS {
        for command in [
            Command::Dump,
            Command::PreDump,
            Command::Dedup,
            Command::Restore,
            Command::Check,
            Command::CheckTree,
            Command::Resume,
            Command::Unlock,
        ] {
            let value = match opt.arg {
                Arg::None => None,
                _ => Some(OsString::from(match opt.long {
                    "network-lock" => "nftables",
                    "lsm-profile" => "none",
                    "format" => "criu",
                    "compress" => "zstd",
                    "file-validation" => "filesize",
                    "manage-cgroups" => "ignore",
                    "cpu-cap" => "none",
                    "pre-dump-mode" => "read",
                    "external" => "unix[1]",
                    "replace-address" => "127.0.0.1=127.0.0.2",
                    "inherit-fd" => "fd[0]:socket:[1]",
                    _ => "1",
                })),
            };
            let given = Given { opt, value, negated: false, origin: Origin::Argv };
            let outcome = admit(command, &given, &mut Values::default(), &mut Vec::new());
            let refused = match &outcome {
                Ok(()) => "",
                Err(ArgError { kind: Kind::NotYet(_), .. }) => "not yet",
                Err(ArgError { kind: Kind::Misplaced { .. }, .. }) => "wrong",
                Err(other) => panic!("{}: {other}", opt.long),
            };
            let want = match opt.status(command).expect("built commands") {
                Status::NotYet => "not yet",
                Status::Wrong(_) => "wrong",
                Status::Built | Status::NoEffect(_) | Status::Foreign => "",
            };
            assert_eq!(refused, want, "--{} of {command:?}", opt.long);
        }
    }
}

#[test]
fn copies_take_what_several_trees_can_have() {
    for (line, word) in [
        ("restore --copies 0", "number of copies"),
        ("restore --copies x", "number of copies"),
        ("restore --copy-netns", "needs --copies"),
        ("restore --replace-address :80=:{80+i}", "needs --copies"),
        ("restore --copies 2 --tcp-established", "can live once"),
        ("restore --copies 2 --shell-job", "--shell-job"),
        ("restore --copies 2 -d --restore-sibling", "--restore-sibling"),
        ("restore --copies 3 --replace-address :65533=:{65534+i}", "for copy 2"),
        ("restore --replace-address 10.0.0.1", "not OLD=NEW"),
    ] {
        let error = run(line).expect_err(line);
        assert!(error.contains(word), "{line}: {error}");
    }
    run("restore --copies 2 --replace-address :65533=:{65534+i} --copy-netns").unwrap();
}
