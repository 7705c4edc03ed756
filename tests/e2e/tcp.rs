//! What the flavours do not reach of TCP: `--tcp-close`, refusals, the network lock, restores that must fail. Each trial
//! has a network namespace of its own.

use crate::flavours::finish;
use crate::harness::{Fail, Fs, NotReady, Run, TIMEOUT, Tool, alive, execute, exists};
use crate::hosts;
use crate::kills::{dump_command, killed_after};
use crate::netns::{Net, ip};
use crate::programs::{Program, by_name};
use crate::refusals::{held_by_us, refused};
use crate::view::View;
use crate::{no_excuses, skip, trial};
use libtest_mimic::Trial;
use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

pub const ESTABLISHED: &[&str] = &["--tcp-established"];
const CLOSE: &[&str] = &["--tcp-close"];

/// All trials of this file.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("tcp::{name}"), move || {
            if tool.is_criu && !no_excuses() {
                return Ok(skip("CRIU is not what these trials are about"));
            }
            let done = Net::new().map_err(NotReady::Skip).and_then(|net| {
                net.within(|| body(&tool)).unwrap_or_else(|e| Err(NotReady::Skip(e)))
            });
            finish(done)
        }));
    };
    add("close_of_established_images", close_of_established_images);
    add("close_of_closing_images", close_of_closing_images);
    add("closed_and_then_established", closed_and_then_established);
    add("options_are_named", options_are_named);
    add("running_leaves_no_lock", running_leaves_no_lock);
    add("stopped_stays_locked", stopped_stays_locked);
    add("dead_stays_locked", dead_stays_locked);
    add("rules_are_those_of_iptables", rules_are_those_of_iptables);
    add("lock_of_edited_images", lock_of_edited_images);
    add("leftovers_are_removed", leftovers_are_removed);
    add("skip_in_flight", skip_in_flight);
    add("address_in_use", address_in_use);
    add("interface_is_missing", interface_is_missing);
    add("address_is_missing", address_is_missing);
    add("nothing_was_agreed", nothing_was_agreed);
    add("two_hosts", hosts::two_hosts);
    add("backlog_moves", hosts::backlog_moves);
    add("half_open_nftables", |tool| hosts::half_open(tool, "nftables"));
    add("half_open_iptables", |tool| hosts::half_open(tool, "iptables"));
    add("backlog_of_an_interface", hosts::backlog_of_an_interface);
    add("killed_dumps", killed_dumps);
    add("locks_of_criu", locks_of_criu);
    add("refused_mptcp", |tool| is_refused(tool, "tcp_refused_mptcp", &["multipath TCP"]));
    add("refused_md5", |tool| is_refused(tool, "tcp_refused_md5", &["TCP_MD5SIG", "keys"]));
    add("refused_urgent", |tool| {
        is_refused(tool, "tcp_refused_urgent", &["urgent", "--tcp-close"])
    });
    add("refused_ended", |tool| {
        is_refused(tool, "tcp_refused_ended", &["has ended", "urgent", "--tcp-close"])
    });
    add("chaos_established", |tool| chaos(tool, "tcp_chaos", ESTABLISHED));
    add("chaos_close", |tool| chaos(tool, "tcp_chaos_close", CLOSE));
    all
}

pub fn ready(program: &Program) -> Result<(Run, View), NotReady> {
    let run = Run::ready(program.name, &program.start(), Fs::Memory)?;
    let before = run.view()?;
    Ok((run, before))
}

/// The program is told that its connections have been closed, and checks itself.
fn check_closed(run: &Run, before: &View) -> Result<(), Fail> {
    fs::write(run.dir.join("closed"), "").map_err(|e| e.to_string())?;
    run.check(before)
}

/// Dumped with `--tcp-established`, restored twice with `--tcp-close`.
fn close_of_established_images(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = ready(&by_name("tcp_close")?)?;
    let images = run.images(1)?;
    run.dump(tool, &images, ESTABLISHED)?;
    run.gone(&before.pids(), "after dump")?;
    run.restore(tool, &images, CLOSE)?;
    run.kill_tree(&run.view()?)?;
    run.restore(tool, &images, CLOSE)?;
    check_closed(&run, &before)?;
    Ok(())
}

/// Dumped with `--tcp-close`: nothing of a stream is saved, and only `--tcp-close` restores it.
fn close_of_closing_images(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = ready(&by_name("tcp_close")?)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &["--tcp-close", "--leave-running"])?;
    let streams = fs::read_dir(&images)
        .map_err(|e| e.to_string())?
        .flatten()
        .any(|f| f.file_name().to_string_lossy().starts_with("tcp-stream"));
    if streams {
        return Err(run.fail("--tcp-close has saved streams".into()).into());
    }
    nothing_locked(&run, tool)?;
    run.kill_tree(&before)?;
    for options in [&[][..], ESTABLISHED] {
        let done = run.try_restore(tool, &images, options)?;
        refused(&run, tool, &done, &images.join("restore.log"), &["--tcp-close"])?;
    }
    run.restore(tool, &images, CLOSE)?;
    check_closed(&run, &before)?;
    Ok(())
}

/// A restore with `--tcp-close` takes nothing from the images: the same set restores with `--tcp-established` later.
fn closed_and_then_established(tool: &Tool) -> Result<(), NotReady> {
    // Both ends in the tree: a peer outside would have been told.
    let program = by_name("tcp_pair")?;
    let (mut run, before) = ready(&program)?;
    let images = run.images(1)?;
    run.dump(tool, &images, ESTABLISHED)?;
    run.gone(&before.pids(), "after dump")?;
    run.restore(tool, &images, CLOSE)?;
    run.kill_tree(&run.view()?)?;
    run.restore(tool, &images, ESTABLISHED)?;
    run.check(&before)?;
    Ok(())
}

/// Without an option a connection is refused, at either end, and both options are named.
fn options_are_named(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = ready(&by_name("tcp_pair")?)?;
    let images = run.images(1)?;
    let both = ["TCP connection", "--tcp-established", "--tcp-close"];
    let done = run.try_dump(tool, run.root, &images, &[])?;
    refused(&run, tool, &done, &images.join("dump.log"), &both)?;
    run.dump(tool, &images, ESTABLISHED)?;
    run.gone(&before.pids(), "after dump")?;
    let done = run.try_restore(tool, &images, &[])?;
    refused(&run, tool, &done, &images.join("restore.log"), &both)?;
    run.restore(tool, &images, ESTABLISHED)?;
    run.check(&before)?;
    Ok(())
}

/// What `rewake unlock` with the arguments says.
fn unlock(run: &Run, tool: &Tool, arguments: &[&str]) -> Result<String, Fail> {
    let mut command = Command::new(&tool.path);
    command.arg("unlock").args(arguments);
    let done = execute(command, &run.dir)?;
    if done.success() { Ok(done.text) } else { Err(run.fail(format!("unlock: {}", done.text))) }
}

/// Fails unless `unlock` says all of this.
fn unlock_says(run: &Run, tool: &Tool, arguments: &[&str], words: &[&str]) -> Result<(), Fail> {
    let text = unlock(run, tool, arguments)?;
    if words.iter().all(|word| text.contains(word)) {
        return Ok(());
    }
    Err(run.fail(format!("unlock {arguments:?} says {text:?}, not {words:?}")))
}

pub fn nothing_locked(run: &Run, tool: &Tool) -> Result<(), Fail> {
    unlock_says(run, tool, &[], &["there is no network lock"])?;
    match iptables(run, &["-S"])? {
        Some(rules) if rules.contains("DROP") => Err(run.fail(format!("rules are left: {rules}"))),
        _ => Ok(()),
    }
}

/// Runs iptables, the one on top of nftables; nothing if it is not installed.
fn iptables(run: &Run, arguments: &[&str]) -> Result<Option<String>, Fail> {
    let path = Path::new("/usr/sbin/iptables-nft");
    if !path.exists() {
        return Ok(None);
    }
    let mut command = Command::new(path);
    command.args(arguments);
    let done = execute(command, &run.dir)?;
    if !done.success() {
        return Err(run.fail(format!("iptables {arguments:?}: {}", done.text)));
    }
    Ok(Some(done.text))
}

/// A survivor's connections are locked during the dump only, by either method.
fn running_leaves_no_lock(tool: &Tool) -> Result<(), NotReady> {
    let (run, before) = ready(&by_name("tcp_close")?)?;
    for (n, method) in ["nftables", "iptables", "skip"].into_iter().enumerate() {
        let images = run.images(n)?;
        let options = ["--tcp-established", "--leave-running", "--network-lock", method];
        run.dump(tool, &images, &options)?;
        nothing_locked(&run, tool)?;
    }
    run.check(&before)?;
    Ok(())
}

/// A tree left stopped keeps its peers waiting until `resume`.
fn stopped_stays_locked(tool: &Tool) -> Result<(), NotReady> {
    let (run, before) = ready(&by_name("tcp_close")?)?;
    run.dump(tool, &run.images(1)?, &["--tcp-established", "--leave-stopped"])?;
    run.all_stopped(&before.pids(), "after dump")?;
    let kept = ["kept: nftables table inet CRIU-", "left stopped: rewake resume"];
    unlock_says(&run, tool, &[], &kept)?;
    run.resume(tool, &before.running_pids())?;
    nothing_locked(&run, tool)?;
    run.check(&before)?;
    Ok(())
}

/// A dead tree's lock stays until the restore, or until it is asked for.
fn dead_stays_locked(tool: &Tool) -> Result<(), NotReady> {
    for method in ["nftables", "iptables"] {
        let (mut run, before) = ready(&by_name("tcp_close")?)?;
        let images = run.images(1)?;
        run.dump(tool, &images, &["--tcp-established", "--network-lock", method])?;
        run.gone(&before.pids(), "after dump")?;
        unlock_says(&run, tool, &[], &["kept: ", method, "until the restore"])?;
        let rules = iptables(&run, &["-S"])?;
        if method == "iptables" && rules.is_some_and(|r| !r.contains("! --mark 0xc114")) {
            return Err(run.fail("iptables does not see the rules".into()).into());
        }
        run.restore(tool, &images, ESTABLISHED)?;
        nothing_locked(&run, tool)?;
        let again = run.images(2)?;
        run.dump(tool, &again, &["--tcp-established", "--network-lock", method])?;
        let dir = again.to_string_lossy();
        unlock_says(&run, tool, &["-D", &dir], &["removed: the lock of"])?;
        nothing_locked(&run, tool)?;
        run.restore(tool, &again, ESTABLISHED)?;
        // Its peers outside have been told in the meantime, if they had something to say: these have not.
        run.check(&before)?;
    }
    Ok(())
}

/// A lock is found by its images also when their addresses were replaced.
fn lock_of_edited_images(tool: &Tool) -> Result<(), NotReady> {
    for method in ["nftables", "iptables"] {
        let (run, before) = ready(&by_name("tcp_close")?)?;
        let images = run.images(1)?;
        run.dump(tool, &images, &["--tcp-established", "--network-lock", method])?;
        run.gone(&before.pids(), "after dump")?;
        let mut command = std::process::Command::new(&tool.path);
        command.args(["images", "replace-address"]).arg(&images).arg("127.0.0.1=127.0.0.9");
        let done = execute(command, &run.dir)?;
        if !done.success() {
            return Err(run.fail(format!("images replace-address: {}", done.text)).into());
        }
        let dir = images.to_string_lossy();
        unlock_says(&run, tool, &["-D", &dir], &["removed: the lock of"])?;
        nothing_locked(&run, tool)?;
    }
    Ok(())
}

/// What iptables finds and removes, as CRIU has it do, is what `--network-lock iptables` makes.
fn rules_are_those_of_iptables(tool: &Tool) -> Result<(), NotReady> {
    let (run, before) = ready(&by_name("tcp_close")?)?;
    run.dump(tool, &run.images(1)?, &["--tcp-established", "--network-lock", "iptables"])?;
    run.gone(&before.pids(), "after dump")?;
    let Some(rules) = iptables(&run, &["-S"])? else {
        return Err(NotReady::Skip("iptables is not installed".into()));
    };
    let own: Vec<&str> = rules.lines().filter(|l| l.contains("0xc114")).collect();
    if own.is_empty() {
        return Err(run.fail(format!("no rules: {rules}")).into());
    }
    for rule in own {
        let mut words: Vec<&str> = rule.split_whitespace().collect();
        words[0] = "-D";
        iptables(&run, &words)?;
    }
    nothing_locked(&run, tool)?;
    Ok(())
}

/// The lock that a dump leaves which is killed just before its tree is: the next dump removes it, and so does `unlock`.
fn leftovers_are_removed(tool: &Tool) -> Result<(), NotReady> {
    use rewake_netlink::{iptables, nftables::Block};
    let (run, before) = ready(&by_name("tcp_close")?)?;
    let stat = fs::read_to_string(format!("/proc/{}/stat", run.root)).map_err(|e| e.to_string())?;
    let start = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19));
    let start = start.ok_or("no start time".to_owned())?;
    // Nobody has had this number for the controller.
    let stale = format!("rewake 1:1 for {}:{start}", run.root);
    let dead = "rewake 1:1 for 1:1";
    let some = [(([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into())];
    let make = |name: &str, comment: &str| {
        Block::stay(name, &some, comment).map_err(|e| format!("nftables: {e}"))
    };
    make("CRIU-leftover", &stale)?;
    make("CRIU-needed", dead)?;
    make("CRIU-of-criu", "")?;
    make("other", &stale)?;
    iptables::block(&some, &stale).map_err(|e| format!("nftables: {e}"))?;
    unlock_says(
        &run,
        tool,
        &[],
        &[
            "removed: nftables table inet CRIU-leftover\n",
            "removed: 2 iptables rules\n",
            "kept: nftables table inet CRIU-needed: it keeps the peers of process 1",
            "kept: nftables table inet CRIU-of-criu: of CRIU",
        ],
    )?;
    make("CRIU-leftover", &stale)?;
    run.dump(tool, &run.images(1)?, &["--tcp-established", "--leave-running"])?;
    let text = unlock(&run, tool, &["--all"])?;
    let expected =
        "removed: nftables table inet CRIU-needed\nremoved: nftables table inet CRIU-of-criu\n";
    if text != expected {
        return Err(run.fail(format!("unlock --all says {text:?}")).into());
    }
    nothing_locked(&run, tool)?;
    run.check(&before)?;
    Ok(())
}

/// The server is saved and restored many times while its clients write and read without a pause.
fn chaos(tool: &Tool, program: &str, restore: &[&str]) -> Result<(), NotReady> {
    let (mut run, before) = ready(&by_name(program)?)?;
    wait_for(&run, "connected")?;
    let until = Instant::now() + Duration::from_secs(30);
    for n in 0..50u64 {
        progress(&run)?;
        // Another instant each time.
        std::thread::sleep(Duration::from_micros(n * 731 % 10_000));
        let images = run.images(n as usize)?;
        // Also with clients that have called just now.
        run.dump(tool, &images, ESTABLISHED)?;
        run.gone(&before.pids(), "after dump")?;
        run.restore(tool, &images, restore)?;
        let _ = fs::remove_dir_all(&images);
        if Instant::now() > until {
            // A slow machine: what was done counts.
            break;
        }
    }
    progress(&run)?;
    run.check(&before)?;
    let ended = fs::read_to_string(run.dir.join("ended")).unwrap_or_default();
    let ended: u32 = ended.trim().parse().map_err(|e| format!("ended: {e}"))?;
    if (ended == 0) == (restore == CLOSE) {
        return Err(run.fail(format!("{ended} connections have ended")).into());
    }
    Ok(())
}

/// Waits until the server has received more.
pub fn progress(run: &Run) -> Result<(), Fail> {
    let total = || -> u64 {
        let text = fs::read_to_string(run.dir.join("total")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let before = total();
    let until = Instant::now() + TIMEOUT;
    while total() <= before {
        if Instant::now() > until {
            return Err(run.fail(format!("the server stands still at {before} bytes")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Waits until a file of the run exists.
pub fn wait_for(run: &Run, name: &str) -> Result<(), Fail> {
    let until = Instant::now() + TIMEOUT;
    while !run.dir.join(name).exists() {
        if Instant::now() > until {
            return Err(run.fail(format!("{name} does not appear")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Connections that nobody has accepted yet are refused, or forgotten: their clients are told, and new ones are served.
fn skip_in_flight(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("tcp_listen_still")?;
    let (mut run, before) = ready(&program)?;
    let port = fs::read_to_string(run.dir.join("port")).map_err(|e| e.to_string())?;
    let port: u16 = port.trim().parse().map_err(|e| format!("port: {e}"))?;
    let mut client = TcpStream::connect(("127.0.0.1", port)).map_err(|e| e.to_string())?;
    let images = run.images(1)?;
    let done = run.try_dump(tool, run.root, &images, &[])?;
    let words = ["1 connection waits to be accepted", "--tcp-established", "--skip-in-flight"];
    refused(&run, tool, &done, &images.join("dump.log"), &words)?;
    run.dump(tool, &images, &["--skip-in-flight"])?;
    client.set_read_timeout(Some(TIMEOUT)).map_err(|e| e.to_string())?;
    let ended = match client.read(&mut [0]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() == ErrorKind::ConnectionReset,
    };
    if !ended {
        return Err(run.fail("a forgotten client is not told".into()).into());
    }
    run.restore(tool, &images, &[])?;
    run.check(&before)?;
    Ok(())
}

/// Nothing of a refused restore is there: no process, no listener.
fn nothing_left(run: &Run, before: &View) -> Result<(), Fail> {
    match before.pids().iter().find(|pid| exists(**pid)) {
        None => Ok(()),
        Some(pid) => Err(run.fail(format!("process {pid} is left"))),
    }
}

/// Who has the address of a listener is named.
fn address_in_use(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = ready(&by_name("tcp_listen")?)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after dump")?;
    let port = fs::read_to_string(run.dir.join("port")).map_err(|e| e.to_string())?;
    let address = format!("127.0.0.1:{}", port.trim());
    let taken = TcpListener::bind(&address).map_err(|e| e.to_string())?;
    let [held, us] = held_by_us();
    let done = run.try_restore(tool, &images, &[])?;
    refused(&run, tool, &done, &images.join("restore.log"), &[&address, &held, &us])?;
    nothing_left(&run, &before)?;
    drop(taken);
    run.restore(tool, &images, &[])?;
    run.check(&before)?;
    Ok(())
}

/// A listener bound to an interface that is gone at the restore: the interface is named.
fn interface_is_missing(tool: &Tool) -> Result<(), NotReady> {
    missing(tool, "tcp_listen_device", &["network interface zoo0"])
}

/// The same of an address that no interface has.
fn address_is_missing(tool: &Tool) -> Result<(), NotReady> {
    missing(tool, "tcp_listen_address", &["no network interface here has the address 10.78.0.1"])
}

fn missing(tool: &Tool, program: &str, words: &[&str]) -> Result<(), NotReady> {
    let other = Net::new().map_err(NotReady::Skip)?;
    let dir = crate::harness::base(Fs::Memory);
    let connect = || -> Result<(), NotReady> {
        other.cable(&dir, "zoo0", "zoo1")?;
        ip(&dir, "addr add 10.78.0.1/24 dev zoo0")
    };
    connect()?;
    let (mut run, before) = ready(&by_name(program)?)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after dump")?;
    ip(&dir, "link del zoo0")?;
    let done = run.try_restore(tool, &images, &[])?;
    refused(&run, tool, &done, &images.join("restore.log"), words)?;
    nothing_left(&run, &before)?;
    connect()?;
    run.restore(tool, &images, &[])?;
    Ok(())
}

/// Connections without timestamps, selective acknowledgements and window scaling.
fn nothing_was_agreed(tool: &Tool) -> Result<(), NotReady> {
    for name in ["timestamps", "sack", "window_scaling"] {
        let path = format!("/proc/sys/net/ipv4/tcp_{name}");
        // The mount of /proc may be read-only.
        fs::write(&path, "0").map_err(|e| NotReady::Skip(format!("{path}: {e}")))?;
    }
    for name in ["tcp_states_outside", "tcp_pair"] {
        let (mut run, before) = ready(&by_name(name)?)?;
        for n in 0..2 {
            let images = run.images(n)?;
            run.dump(tool, &images, ESTABLISHED)?;
            run.gone(&before.pids(), "after dump")?;
            run.restore(tool, &images, ESTABLISHED)?;
        }
        run.check(&before)?;
    }
    Ok(())
}

/// What CRIU has locked is free after a restore by rewake, and the other way round.
fn locks_of_criu(tool: &Tool) -> Result<(), NotReady> {
    let Some(criu) = std::env::var_os("CRIU") else {
        return Err(NotReady::Skip("no CRIU is given (CRIU=path)".into()));
    };
    let criu = Tool { path: criu.into(), is_criu: true };
    for method in ["nftables", "iptables"] {
        for (from, to, n) in [(&criu, tool, 0), (tool, &criu, 1)] {
            let (mut run, before) = ready(&by_name("tcp_states_outside")?)?;
            let images = run.images(n)?;
            run.dump(from, &images, &["--tcp-established", "--network-lock", method])?;
            run.gone(&before.pids(), "after dump")?;
            unlock_says(&run, tool, &[], &["kept: ", method])?;
            run.restore(to, &images, ESTABLISHED)?;
            nothing_locked(&run, tool)?;
            run.check(&before)?;
        }
        let (run, before) = ready(&by_name("tcp_states_outside")?)?;
        let images = run.images(2)?;
        run.dump(&criu, &images, &["--tcp-established", "--network-lock", method])?;
        run.gone(&before.pids(), "after dump")?;
        unlock_says(&run, tool, &["--all"], &["removed: ", method])?;
        nothing_locked(&run, tool)?;
    }
    Ok(())
}

/// A program that cannot be saved is told why, and goes on.
fn is_refused(tool: &Tool, program: &str, words: &[&str]) -> Result<(), NotReady> {
    let (run, before) = ready(&by_name(program)?)?;
    let images = run.images(1)?;
    let done = run.try_dump(tool, run.root, &images, ESTABLISHED)?;
    refused(&run, tool, &done, &images.join("dump.log"), words)?;
    run.check(&before)?;
    Ok(())
}

/// Dumps that are killed at any instant: the connections of who lives go on once `unlock` has been there; who is dead is
/// restored.
fn killed_dumps(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = ready(&by_name("tcp_options")?)?;
    let options = ["--tcp-established", "--leave-running"];
    let whole = run.dump(tool, &run.images(0)?, &options)?.took;
    let mut rng = zoo::Rng(before.pids().first().map_or(1, |p| *p as u64));
    for n in 1..=60 {
        let images = run.images(n)?;
        let delay = Duration::from_nanos(rng.next() % (whole.as_nanos() as u64 * 13 / 10));
        killed_after(dump_command(&run, tool, &images, ESTABLISHED), delay)?;
        std::thread::sleep(Duration::from_millis(10));
        if alive(run.root) {
            unlock(&run, tool, &[])?;
            nothing_locked(&run, tool)?;
        } else {
            run.gone(&before.pids(), "after a killed dump")?;
            run.restore(tool, &images, ESTABLISHED)
                .map_err(|e| format!("kill {n} after {delay:?}: the target died and {e}"))?;
        }
        let _ = fs::remove_dir_all(&images);
    }
    run.check(&before)?;
    Ok(())
}
