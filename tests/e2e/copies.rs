//! A tree beside itself: `restore --new-pidns` where its pids are taken, `--copies`, changed addresses.

use crate::flavours::{finish, inner_pid, started};
use crate::harness::{Fail, Fs, NotReady, Run, TIMEOUT, Tool, alive, kill};
use crate::programs::by_name;
use crate::{reaper, trial, view};
use libtest_mimic::Trial;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

/// All trials about trees in namespaces of their own.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("copies::{name}"), move || finish(body(&tool))));
    };
    add("beside_the_original", beside_the_original);
    add("init_passes_signals_on", init_passes_signals_on);
    add("init_takes_all_with_it", init_takes_all_with_it);
    add("addresses_replaced_at_restore", replaced_at_restore);
    add("addresses_replaced_in_images", replaced_in_images);
    add("address_of_nobody", address_of_nobody);
    add("twenty_servers", twenty_servers);
    add("trees", trees);
    add("shared_memory", |tool| kin(tool, "shared_mm", &[]));
    add("shared_descriptors", |tool| kin(tool, "shared_files", &[]));
    add("senders_inside", |tool| kin(tool, "unix_senders", &[]));
    add("peers_inside", |tool| kin(tool, "unix_creds", &["--copy-netns"]));
    add("networks_of_their_own", networks_of_their_own);
    add("all_or_none", all_or_none);
    add("the_same_address_is_refused", same_address);
    add("the_same_socket_file_is_refused", |tool| {
        let words = ["copy 1", "unix socket", "in use by a socket of another network namespace"];
        same_file(tool, "unix_names", &["--copy-netns"], &words)
    });
    add("the_same_lock_is_refused", |tool| {
        same_file(tool, "file_locks", &["--file-locks"], &["lock", "by one copy only"])
    });
    all
}

/// A run of `counter`, saved and left running, and its twin; `run.root` is the twin's init.
fn twin(tool: &Tool) -> Result<(Run, i32, i32), NotReady> {
    let (mut run, _) = started(&by_name("counter")?, Fs::Disk)?;
    let original = run.root;
    let images = run.images(1)?;
    run.dump(tool, &images, &["--leave-stopped"])?;
    let twin = run.restore_inside(tool, &images, &[])?;
    Ok((run, original, twin))
}

fn beside_the_original(tool: &Tool) -> Result<(), NotReady> {
    let (run, original, twin) = twin(tool)?;
    if inner_pid(twin) != Some(original) {
        return Err(run.fail(format!("{twin} is not {original} inside")).into());
    }
    let state = view::state(original);
    if state != Some('T') {
        return Err(run.fail(format!("the original is in state {state:?}")).into());
    }
    // What /proc says of the twin inside is about itself.
    let own = format!("/proc/{twin}/root/proc/{original}/cmdline");
    if fs::read(&own).ok() != fs::read(format!("/proc/{original}/cmdline")).ok() {
        return Err(run.fail(format!("{own} is not the twin's")).into());
    }
    run.check(&run.view()?)?;
    kill(original, libc::SIGKILL);
    Ok(())
}

/// The init's exit status once it has ended.
fn ended(run: &Run) -> Result<i32, Fail> {
    reaper::wait(run.root, run.mark, TIMEOUT)
        .ok_or_else(|| run.fail(format!("the init {} did not end", run.root)))
}

fn init_passes_signals_on(tool: &Tool) -> Result<(), NotReady> {
    let (run, original, twin) = twin(tool)?;
    kill(run.root, libc::SIGTERM);
    let status = ended(&run)?;
    kill(original, libc::SIGKILL);
    if !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 128 + libc::SIGTERM {
        return Err(run.fail(reaper::describe(status)).into());
    }
    run.gone(&[twin], "after SIGTERM to the init")?;
    Ok(())
}

fn init_takes_all_with_it(tool: &Tool) -> Result<(), NotReady> {
    let (run, original, twin) = twin(tool)?;
    kill(run.root, libc::SIGKILL);
    ended(&run)?;
    run.gone(&[twin], "after SIGKILL to the init")?;
    if !alive(original) {
        return Err(run.fail("the original is gone too".into()).into());
    }
    kill(original, libc::SIGKILL);
    Ok(())
}

/// The addresses of the program `addresses`, saved.
fn with_addresses(tool: &Tool) -> Result<(Run, view::View, String), NotReady> {
    let (run, before) = started(&by_name("addresses")?, Fs::Disk)?;
    let path = run.dir.join("addresses");
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    run.dump(tool, &run.images(1)?, &["--tcp-established"])?;
    run.gone(&before.pids(), "after the dump")?;
    Ok((run, before, text))
}

/// The address with this name.
fn address(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_default().to_owned()
}

/// What [`with_addresses`] becomes by these rules, and the rules.
fn elsewhere(text: &str) -> (String, [String; 3]) {
    // The wildcard's port, the network of the listener, IPv6 loopback: each by a rule of its own kind.
    let port = |address: &str| address.rsplit_once(':').map_or("0", |(_, p)| p).to_owned();
    let (wildcard, v6) = (port(&address(text, "wildcard")), port(&address(text, "loopback6")));
    let other: u16 = wildcard.parse::<u16>().unwrap_or(0) ^ 32;
    let rules = [
        "127.0.71.0/24=127.0.72.0/24".to_owned(),
        format!(":{wildcard}=:{other}"),
        format!("[::1]:{v6}=[::1]:{}", v6.parse::<u16>().unwrap_or(0) ^ 32),
    ];
    let expected = text
        .replace("127.0.71.1", "127.0.72.1")
        .replace(&format!("0.0.0.0:{wildcard}"), &format!("0.0.0.0:{other}"))
        .replace(&format!("[::1]:{v6}"), &rules[2][rules[2].find('=').map_or(0, |i| i + 1)..]);
    (expected, rules)
}

fn replaced_at_restore(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before, text) = with_addresses(tool)?;
    let (expected, rules) = elsewhere(&text);
    fs::write(run.dir.join("expected"), expected).map_err(|e| e.to_string())?;
    let images = run.dir.join("img.1");
    let mut options = vec!["--tcp-established"];
    for rule in &rules {
        options.extend(["--replace-address", rule]);
    }
    options.extend(["--replace-address", "192.0.2.1=192.0.2.2"]);
    let done = run.restore(tool, &images, &options)?;
    let log = fs::read_to_string(images.join("restore.log")).unwrap_or_default();
    for (word, wanted) in [("192.0.2.1=192.0.2.2: no socket", true), ("its peer", false)] {
        if log.contains(word) != wanted {
            return Err(run
                .fail(format!("{word:?} in the log: not {wanted}\n{log}{}", done.text))
                .into());
        }
    }
    run.check(&before)?;
    Ok(())
}

fn replaced_in_images(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before, text) = with_addresses(tool)?;
    let (expected, rules) = elsewhere(&text);
    fs::write(run.dir.join("expected"), expected).map_err(|e| e.to_string())?;
    let images = run.dir.join("img.1");
    let mut command = std::process::Command::new(&tool.path);
    command.args(["images", "replace-address"]).arg(&images).args(&rules);
    let done = crate::harness::execute(command, &run.dir)?;
    if !done.success() || !done.text.contains("now 127.0.72.1:") {
        return Err(run.fail(format!("images replace-address: {}", done.text)).into());
    }
    run.restore(tool, &images, &["--tcp-established"])?;
    run.check(&before)?;
    Ok(())
}

fn address_of_nobody(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before, text) = with_addresses(tool)?;
    let images = run.dir.join("img.1");
    let old = address(&text, "listener");
    let old = old.rsplit_once(':').map_or("", |(ip, _)| ip);
    let rule = format!("{old}=192.0.2.77");
    let options = ["--tcp-established", "--replace-address", &rule];
    let done = run.try_restore(tool, &images, &options)?;
    let words = ["192.0.2.77 is not an address of this host", "127.0.0.1"];
    if done.success() || !words.iter().all(|w| done.text.contains(w)) {
        return Err(run
            .fail(format!("not refused in these words: {words:?}\n{}", done.text))
            .into());
    }
    run.gone(&before.pids(), "after the refused restore")?;
    // The images are what they were.
    run.restore(tool, &images, &["--tcp-established"])?;
    run.check(&before)?;
    Ok(())
}

/// The program `copy_server` (or its namesake with workers), saved with so much memory, and its port.
fn saved_server(tool: &Tool, name: &str) -> Result<(Run, u16), NotReady> {
    let (run, before) = started(&by_name(name)?, Fs::Disk)?;
    let port = fs::read_to_string(run.dir.join("port")).unwrap_or_default();
    let port = port.parse().map_err(|e| format!("port: {e}"))?;
    run.dump(tool, &run.images(1)?, &[])?;
    run.gone(&before.pids(), "after the dump")?;
    Ok((run, port))
}

/// The first of the run's ports that the program itself does not use: half of them.
fn free_ports(run: &Run) -> u16 {
    run.ports() + zoo::net::PORTS / 2
}

/// What a server answers: pid, how often it and its tree were asked, what the deleted file said, the state of its memory.
fn ask(port: u16, question: &str) -> Result<Vec<String>, Fail> {
    let failed = |e: std::io::Error| format!("port {port}: {e}");
    let mut stream = TcpStream::connect(("127.0.0.1", port)).map_err(failed)?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(failed)?;
    stream.write_all(question.as_bytes()).map_err(failed)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(failed)?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// A line of /proc/PID/smaps_rollup, in bytes.
fn memory(pid: i32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Restores copies; returns the pids of their roots.
fn copies(run: &mut Run, tool: &Tool, count: usize, extra: &[&str]) -> Result<Vec<i32>, Fail> {
    run.mark = reaper::mark();
    let images = run.dir.join("img.1");
    let pidfile = run.dir.join("copies.pid");
    let pidfile = pidfile.to_str().ok_or("the directory's name is no text")?;
    let count_text = count.to_string();
    let mut options = vec!["--copies", &count_text, "--pidfile", pidfile];
    options.extend(extra);
    let done = run.try_restore(tool, &images, &options)?;
    if !done.success() {
        return Err(run.fail(format!("restore --copies {count}: {}", done.text)));
    }
    let list = fs::read_to_string(pidfile).unwrap_or_default();
    let pids: Vec<i32> = list.lines().filter_map(|l| l.parse().ok()).collect();
    if pids.len() != count || done.text != list {
        return Err(run.fail(format!("not {count} pids: {list:?}, printed {:?}", done.text)));
    }
    Ok(pids)
}

/// Has all copies check themselves; fails unless each passes and nothing is left.
fn all_pass(run: &Run, roots: &[i32]) -> Result<(), Fail> {
    let inits: Vec<i32> = roots.iter().filter_map(|r| view::parent(*r)).collect();
    let everybody: Vec<i32> = inits.iter().flat_map(|i| view::descendants(*i)).collect();
    fs::write(run.dir.join("check"), "").map_err(|e| format!("check: {e}"))?;
    for init in &inits {
        let status = reaper::wait(*init, run.mark, TIMEOUT);
        if status != Some(0) {
            let how = status.map_or("no end in time".into(), reaper::describe);
            let result = fs::read_to_string(run.dir.join("result")).unwrap_or_default();
            return Err(run.fail(format!("the copy of init {init}: {how}, {result}")));
        }
    }
    run.gone(&everybody, "after the check")
}

fn twenty_servers(tool: &Tool) -> Result<(), NotReady> {
    const COPIES: u16 = 20;
    let (mut run, port) = saved_server(tool, "copy_server")?;
    let inner = run.root.to_string();
    let base = free_ports(&run);
    let rule = format!(":{port}=:{{{base}+i}}");
    let roots = copies(&mut run, tool, COPIES.into(), &["--replace-address", &rule])?;
    // Nobody has written: all together hold what one would hold alone, and a little for each.
    let together: u64 = roots.iter().map(|r| memory(*r, "Pss")).sum();
    let alone = memory(roots[0], "Rss");
    let limit = alone + u64::from(COPIES) * (1 << 20);
    if alone < 8 << 20 || together > limit {
        let text =
            format!("{together} bytes together, one alone has {alone}, the limit is {limit}");
        return Err(run.fail(text).into());
    }
    // Each counts for itself, and has a deleted file of its own.
    for round in 1..=3u64 {
        for i in 0..COPIES {
            let question = if i == 3 { "w" } else { "r" };
            let want =
                [inner.clone(), round.to_string(), round.to_string(), (round - 1).to_string()];
            let answer = ask(base + i, question).map_err(|e| run.fail(e))?;
            if answer[..] != [&want[..], &["whole".to_owned()]].concat() {
                return Err(run.fail(format!("copy {i} in round {round}: {answer:?}")).into());
            }
        }
    }
    all_pass(&run, &roots)?;
    Ok(())
}

fn trees(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, port) = saved_server(tool, "copy_server_tree")?;
    let base = free_ports(&run);
    let rule = format!(":{port}=:{{{base}+i}}");
    let roots = copies(&mut run, tool, 3, &["--replace-address", &rule])?;
    let everybody: Vec<i32> = roots.iter().flat_map(|r| view::descendants(*r)).collect();
    let together: u64 = everybody.iter().map(|p| memory(*p, "Pss")).sum();
    let tree: u64 = view::descendants(roots[0]).iter().map(|p| memory(*p, "Rss")).sum();
    // Pages that were shared between processes of the tree are not shared so any more: only between copies.
    if everybody.len() != 12 || together > tree + (12 << 20) {
        let text = format!("{} processes hold {together} bytes, one tree {tree}", everybody.len());
        return Err(run.fail(text).into());
    }
    for i in 0..3u16 {
        for n in 1..=5u64 {
            let answer = ask(base + i, if i == 1 { "w" } else { "r" }).map_err(|e| run.fail(e))?;
            // Whoever of the tree answers: they count together, each copy for itself.
            let want = [n.to_string(), (n - 1).to_string(), "whole".to_owned()];
            if answer.get(2..) != Some(&want[..]) {
                return Err(run.fail(format!("copy {i}, question {n}: {answer:?}")).into());
            }
        }
    }
    all_pass(&run, &roots)?;
    Ok(())
}

/// Processes that share kernel objects share them within each copy, and know each other by their numbers there.
fn kin(tool: &Tool, name: &str, options: &[&str]) -> Result<(), NotReady> {
    let (mut run, before) = started(&by_name(name)?, Fs::Disk)?;
    run.dump(tool, &run.images(1)?, &[])?;
    run.gone(&before.pids(), "after the dump")?;
    let roots = copies(&mut run, tool, 2, options)?;
    let pids: Vec<usize> = roots.iter().map(|r| view::descendants(*r).len()).collect();
    if pids != [before.pids().len(); 2] {
        return Err(run.fail(format!("{pids:?} processes")).into());
    }
    Ok(all_pass(&run, &roots)?)
}

/// Runs `body` in a thread that is in the network namespace of a process.
fn in_network<T: Send>(pid: i32, body: impl FnOnce() -> Result<T, Fail> + Send) -> Result<T, Fail> {
    use std::os::fd::AsRawFd;
    let file = fs::File::open(format!("/proc/{pid}/ns/net")).map_err(|e| e.to_string())?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: integers only; the thread ends with this.
            if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(format!("setns: {}", std::io::Error::last_os_error()));
            }
            body()
        });
        thread.join().unwrap_or_else(|_| Err("the thread panicked".into()))
    })
}

fn networks_of_their_own(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, port) = saved_server(tool, "copy_server")?;
    // Taken here, free there.
    let _taken = TcpListener::bind(("127.0.0.1", port)).map_err(|e| e.to_string())?;
    let roots = copies(&mut run, tool, 3, &["--copy-netns"])?;
    for (i, root) in roots.iter().enumerate() {
        for round in 1..=i + 1 {
            let answer = in_network(*root, || ask(port, "r")).map_err(|e| run.fail(e))?;
            if answer.get(1) != Some(&round.to_string()) {
                return Err(run.fail(format!("copy {i} in round {round}: {answer:?}")).into());
            }
        }
    }
    all_pass(&run, &roots)?;
    Ok(())
}

fn all_or_none(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, port) = saved_server(tool, "copy_server")?;
    let base = free_ports(&run);
    let rule = format!(":{port}=:{{{base}+i}}");
    let taken = TcpListener::bind(("127.0.0.1", base + 3)).map_err(|e| e.to_string())?;
    let pidfile = run.dir.join("none.pid");
    let images = run.dir.join("img.1");
    let name = pidfile.to_str().unwrap_or_default();
    let options = ["--copies", "5", "--replace-address", &rule, "--pidfile", name];
    let done = run.try_restore(tool, &images, &options)?;
    let address = format!("127.0.0.1:{}", base + 3);
    let words = ["copy 3", "in use by", &address];
    if done.success() || !words.iter().all(|w| done.text.contains(w)) {
        return Err(run.fail(format!("not refused in the words {words:?}: {}", done.text)).into());
    }
    let left = run.leftovers();
    if !left.is_empty() || pidfile.exists() {
        return Err(run
            .fail(format!("left behind: {left:?}, pidfile {}", pidfile.exists()))
            .into());
    }
    drop(taken);
    let roots = copies(&mut run, tool, 5, &["--replace-address", &rule])?;
    all_pass(&run, &roots)?;
    Ok(())
}

fn same_address(tool: &Tool) -> Result<(), NotReady> {
    let (run, port) = saved_server(tool, "copy_server")?;
    let images = run.dir.join("img.1");
    let done = run.try_restore(tool, &images, &["--copies", "2"])?;
    let (address, way_out) = (format!("127.0.0.1:{port}"), format!("':{port}=:{{{port}+i}}'"));
    let words = ["all copies would have", &address, &way_out, "--copy-netns"];
    if done.success() || !words.iter().all(|w| done.text.contains(*w)) {
        return Err(run.fail(format!("not refused in the words {words:?}: {}", done.text)).into());
    }
    let left = run.leftovers();
    if !left.is_empty() {
        return Err(run.fail(format!("left behind: {left:?}")).into());
    }
    Ok(())
}

/// Copies have files in common; a person is told so, and not to end the copy before.
fn same_file(tool: &Tool, program: &str, options: &[&str], words: &[&str]) -> Result<(), NotReady> {
    let program = by_name(program)?;
    let (mut run, before) = started(&program, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, program.dump_options)?;
    run.gone(&before.pids(), "after the dump")?;
    let done = run.try_restore(tool, &images, &[&["--copies", "2"], options].concat())?;
    let all = [words, &["copies have the files of this host in common"]].concat();
    if done.success() || !all.iter().all(|w| done.text.contains(*w)) {
        return Err(run.fail(format!("not refused in the words {all:?}: {}", done.text)).into());
    }
    let left = run.leftovers();
    if !left.is_empty() {
        return Err(run.fail(format!("left behind: {left:?}")).into());
    }
    run.restore(tool, &images, program.restore_options)?;
    run.check(&before)?;
    Ok(())
}
