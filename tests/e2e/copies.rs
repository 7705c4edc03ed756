//! A tree beside itself: `restore --new-pidns` where its pids are taken, `--copies`, changed addresses.

use crate::flavours::{finish, inner_pid, started};
use crate::harness::{Fail, Fs, NotReady, Run, TIMEOUT, Tool, alive, kill};
use crate::programs::by_name;
use crate::{reaper, trial, view};
use libtest_mimic::Trial;
use std::fs;

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
    let other: u16 = wildcard.parse::<u16>().unwrap_or(0) ^ 0x400;
    let rules = [
        "127.0.71.0/24=127.0.72.0/24".to_owned(),
        format!(":{wildcard}=:{other}"),
        format!("[::1]:{v6}=[::1]:{}", v6.parse::<u16>().unwrap_or(0) ^ 0x400),
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
