//! Lazy restores of a program whose memory changes in every way while it comes, and which knows what it must be; what becomes
//! of the tree when whoever brings the memory is killed, or cannot.

use crate::flavours::finish;
use crate::harness::{Fail, Fs, NotReady, Run, Tool, alive, execute, kill, tail};
use crate::programs::by_name;
use crate::refusals::refused;
use crate::trial;
use libtest_mimic::Trial;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// All trials about lazy restores; with CRIU, each brings the memory to the other's trees.
pub fn trials(tool: &Tool, criu: Option<&Tool>) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("lazy::{name}"), move || finish(body(&tool))));
    };
    add("pager_killed", pager_killed);
    add("guard_killed", guard_killed);
    add("working_set", working_set);
    add("damaged_pages", damaged_pages);
    add("restore_fails", restore_fails);
    add("strangers", strangers);
    add("looked_at", looked_at);
    add("saved_meanwhile", |tool| saved_meanwhile(tool, &[]));
    add("saved_meanwhile_running", |tool| saved_meanwhile(tool, &["--leave-running"]));
    add("pre_dumped_meanwhile", pre_dumped_meanwhile);
    add("never_comes", never_comes);
    add("words_are_there", words_are_there);
    add("kernel_waits", kernel_waits);
    let mut add = |name: &str, restorer: &Tool, pager: &Tool| {
        let (tool, restorer, pager) = (tool.clone(), restorer.clone(), pager.clone());
        let body = move || finish(daemon(&tool, &restorer, &pager));
        all.push(trial(format!("lazy::{name}"), body));
    };
    add("daemon", tool, tool);
    if let Some(criu) = criu {
        add("daemon_for_criu", criu, tool);
        add("daemon_of_criu", tool, criu);
    }
    all
}

/// The log of a pager that a restore has started.
fn log(images: &Path) -> String {
    fs::read_to_string(images.join("lazy-pages.log")).unwrap_or_default()
}

/// Waits until the pager of the restore from `images` has brought all.
pub fn all_there(run: &Run, images: &Path) -> Result<(), Fail> {
    until(run, "the memory to be there", || log(images).contains("all memory is there"))
        .map_err(|e| format!("{e}{}", tail("lazy-pages.log", &images.join("lazy-pages.log"))))
}

fn until(run: &Run, what: &str, is_so: impl Fn() -> bool) -> Result<(), Fail> {
    let until = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        if Instant::now() > until {
            return Err(run.fail(format!("waited for {what}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A tree that is saved.
fn saved(tool: &Tool) -> Result<Run, NotReady> {
    saved_one(tool, "memory_written")
}

fn saved_one(tool: &Tool, name: &str) -> Result<Run, NotReady> {
    saved_with(tool, name, &[])
}

fn saved_with(tool: &Tool, name: &str, options: &[&str]) -> Result<Run, NotReady> {
    let program = by_name(name)?;
    let run = Run::ready(program.name, &program.start(), Fs::Memory)?;
    let before = run.view()?;
    run.dump(tool, &run.images(1)?, options)?;
    run.gone(&before.pids(), "after the dump")?;
    Ok(run)
}

/// The processes `rewake WORD` that work on a run's images.
fn helpers(run: &Run, word: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.starts_with(&format!("rewake\0{word}\0"))
            && line.contains(&format!("{}/", run.dir.display()))
        {
            found.push(pid);
        }
    }
    found
}

/// The guard of a pager: its child.
fn guard_of(pager: i32) -> Option<i32> {
    let path = format!("/proc/{pager}/task/{pager}/children");
    fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
}

/// A tree that is restored such that memory comes only where it is touched, for a while, and its pager.
fn restored_slowly(tool: &Tool) -> Result<(Run, i32), NotReady> {
    for _ in 0..10 {
        let mut run = saved(tool)?;
        let images = run.images(1)?;
        run.restore(tool, &images, &["--lazy-pages", "--record-working-set"])?;
        let pager = helpers(&run, "pager");
        match pager[..] {
            [pager] => return Ok((run, pager)),
            // On a busy machine all has been touched by now.
            [] if log(&images).contains("all memory is there") => {}
            _ => return Err(run.fail(format!("pagers: {pager:?}\n{}", log(&images))).into()),
        }
    }
    Err(NotReady::Fail("all memory is there before anybody can look".into()))
}

fn pager_killed(tool: &Tool) -> Result<(), NotReady> {
    let (run, pager) = restored_slowly(tool)?;
    let tree = run.view()?.pids();
    kill(pager, libc::SIGKILL);
    run.gone(&tree, "after the pager was killed")?;
    let text = log(&run.images(1)?);
    if !text.contains("were ended: the process that brought their memory") {
        return Err(run.fail(format!("the log does not tell: {text}")).into());
    }
    if fs::metadata(run.dir.join("result")).is_ok() || !run.leftovers().is_empty() {
        return Err(run.fail(format!("left over: {:?}", run.leftovers())).into());
    }
    Ok(())
}

fn guard_killed(tool: &Tool) -> Result<(), NotReady> {
    let (run, pager) = restored_slowly(tool)?;
    let guard = guard_of(pager).ok_or_else(|| run.fail("the pager has no guard".into()))?;
    kill(guard, libc::SIGKILL);
    std::thread::sleep(Duration::from_millis(100));
    let view = run.view()?;
    run.check(&view)?;
    all_there(&run, &run.images(1)?)?;
    Ok(())
}

/// A tree that is restored without most of its memory, whose pager is held up.
fn held_up(tool: &Tool, program: &str, later: Duration) -> Result<(Run, i32), NotReady> {
    let mut run = saved_one(tool, program)?;
    let images = run.images(1)?;
    // What is not touched only comes a second later.
    run.restore(tool, &images, &["--lazy-pages", "--record-working-set"])?;
    std::thread::sleep(later);
    match helpers(&run, "pager")[..] {
        [pager] => {
            kill(pager, libc::SIGSTOP);
            Ok((run, pager))
        }
        ref pagers => Err(run.fail(format!("pagers: {pagers:?}\n{}", log(&images))).into()),
    }
}

/// Are the pages of any mapping still to come?
fn is_to_come(pid: i32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut flags = text.lines().filter(|line| line.starts_with("VmFlags:"));
    flags.any(|line| line.split(' ').any(|word| word == "um"))
}

/// Does `save`, which must wait for the pager, and not hold up the tree meanwhile.
fn waits(
    run: &Run,
    pager: i32,
    save: impl FnOnce() -> Result<crate::harness::Done, Fail> + Send,
) -> Result<(), Fail> {
    std::thread::scope(|scope| {
        let saving = scope.spawn(save);
        std::thread::sleep(Duration::from_millis(700));
        let (waits, missing) = (!saving.is_finished(), is_to_come(run.root));
        let stat = fs::read_to_string(format!("/proc/{}/stat", run.root)).unwrap_or_default();
        kill(pager, libc::SIGCONT);
        let done = saving.join().map_err(|_| "the trial panicked".to_owned())??;
        if !done.success() {
            return Err(run.fail(format!("it was not waited for: {}", done.text)));
        }
        if !waits || !missing || stat.contains(") t ") {
            let is = format!("waits: {waits}, something is missing: {missing}, the tree: {stat}");
            return Err(run.fail(is));
        }
        Ok(())
    })
}

/// A tree is saved right after it was restored: that waits for its memory.
fn saved_meanwhile(tool: &Tool, options: &[&str]) -> Result<(), NotReady> {
    let (mut run, pager) = held_up(tool, "memory_private", Duration::ZERO)?;
    let images = run.images(2)?;
    waits(&run, pager, || run.try_dump(tool, run.root, &images, options))?;
    let view = run.view();
    if options.is_empty() {
        run.gone(&[run.root], "after the dump")?;
    } else {
        run.kill_tree(&view?)?;
    }
    run.restore(tool, &images, &[])?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// So does a pre-dump, or nothing of it would be tracked.
fn pre_dumped_meanwhile(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, pager) = held_up(tool, "memory_private", Duration::ZERO)?;
    let (first, second) = (run.images(2)?, run.images(3)?);
    waits(&run, pager, || {
        let mut command = Command::new(&tool.path);
        command.args(["pre-dump", "-t", &run.root.to_string(), "-o", "dump.log", "-v4"]);
        command.arg("-D").arg(&first);
        execute(command, &run.dir)
    })?;
    let stored = fs::metadata(first.join("pages-1.img")).map_or(0, |file| file.len());
    let view = run.view()?;
    run.dump(tool, &second, &["--track-mem", "--prev-images-dir", "../img.2"])?;
    let after = fs::metadata(second.join("pages-1.img")).map_or(0, |file| file.len());
    if stored < 1 << 20 || after > stored / 2 {
        return Err(run.fail(format!("{stored} bytes were stored, then {after}")).into());
    }
    run.gone(&view.pids(), "after the dump")?;
    run.restore(tool, &second, &[])?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// Arguments and environment are there before anything comes: nobody else could wait for them.
fn words_are_there(tool: &Tool) -> Result<(), NotReady> {
    let (run, pager) = held_up(tool, "memory_private", Duration::ZERO)?;
    for (file, word) in [("cmdline", "memory_private"), ("environ", "ZOO_")] {
        let text = fs::read(format!("/proc/{}/{file}", run.root)).unwrap_or_default();
        if !String::from_utf8_lossy(&text).contains(word) {
            let text = text.escape_ascii();
            return Err(run.fail(format!("{file} without {word}: \"{text}\"")).into());
        }
    }
    kill(pager, libc::SIGCONT);
    all_there(&run, &run.images(1)?)?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// What does not come in time is told with who is to bring it, and the tree runs on.
fn never_comes(tool: &Tool) -> Result<(), NotReady> {
    let (run, pager) = held_up(tool, "memory_private", Duration::ZERO)?;
    let images = run.images(2)?;
    let root = run.root.to_string();
    let words =
        [&root[..], "mapping 0x", "still to come", &format!("process {pager}"), "--timeout"];
    for options in [&["--timeout", "1"][..], &["--timeout", "1", "--leave-running"]] {
        let begun = Instant::now();
        let done = run.try_dump(tool, run.root, &images, options)?;
        refused(&run, tool, &done, &images.join("dump.log"), &words)?;
        crate::refusals::no_inventory(&run, &images)?;
        if begun.elapsed() < Duration::from_secs(1) || begun.elapsed() > Duration::from_secs(8) {
            return Err(run.fail(format!("it waited for {:?}", begun.elapsed())).into());
        }
    }
    let mut command = Command::new(&tool.path);
    command.args(["check", "-t", &root]);
    let done = execute(command, &run.dir)?;
    if done.success() || !words.iter().all(|word| done.text.contains(word)) {
        return Err(run.fail(format!("check: {}", done.text)).into());
    }
    kill(pager, libc::SIGCONT);
    all_there(&run, &run.images(1)?)?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// A thread that waits inside the kernel for memory cannot be stopped: the others are not to stand still for that.
fn kernel_waits(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, pager) = held_up(tool, "read_late", Duration::from_millis(300))?;
    fs::write(run.dir.join("read"), "").map_err(|e| e.to_string())?;
    std::thread::sleep(Duration::from_millis(100));
    let waits_in = || fs::read_to_string(format!("/proc/{}/wchan", run.root)).unwrap_or_default();
    if waits_in() != "handle_userfault" {
        return Err(run.fail(format!("it waits in {}", waits_in())).into());
    }
    let images = run.images(2)?;
    let root = run.root.to_string();
    let words =
        [&root[..], "mapping 0x", "still to come", &format!("process {pager}"), "--timeout"];
    let done = run.try_dump(tool, run.root, &images, &["--timeout", "2"])?;
    refused(&run, tool, &done, &images.join("dump.log"), &words)?;
    waits(&run, pager, || run.try_dump(tool, run.root, &images, &[]))?;
    run.gone(&[run.root], "after the dump")?;
    run.restore(tool, &images, &[])?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// What was touched after one restore comes first after the next.
fn working_set(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, _) = restored_slowly(tool)?;
    let images = run.images(1)?;
    all_there(&run, &images)?;
    let noted = fs::read_to_string(images.join("rewake.working-set"))
        .map_err(|e| run.fail(format!("the working set: {e}")))?;
    if noted.lines().count() < 10 {
        return Err(run.fail(format!("the working set is only {noted}")).into());
    }
    // The images are old by now: the program has gone on.
    let view = run.view()?;
    let again = run.images(2)?;
    run.dump(tool, &again, &[])?;
    run.gone(&view.pids(), "after the second dump")?;
    fs::write(again.join("rewake.working-set"), noted).map_err(|e| e.to_string())?;
    run.restore(tool, &again, &["--lazy-pages"])?;
    let view = run.view()?;
    run.check(&view)?;
    all_there(&run, &again)?;
    Ok(())
}

/// The program runs before all pages are compared with their checksum: if one is wrong, it is ended.
fn damaged_pages(tool: &Tool) -> Result<(), NotReady> {
    let run = saved(tool)?;
    let images = run.images(1)?;
    let failed = |e: std::io::Error| format!("pages-1.img: {e}");
    let file = fs::File::options().read(true).write(true).open(images.join("pages-1.img"));
    let file = file.map_err(failed)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000).map_err(failed)?;
    file.write_all_at(&[byte[0] ^ 4], 5000).map_err(failed)?;
    run.try_restore(tool, &images, &["--lazy-pages"])?;
    until(&run, "the damage to be found", || log(&images).contains("its checksum differs"))?;
    until(&run, "the tree to end", || !alive(run.root))?;
    // The pager ends after the tree.
    until(&run, "the pager to end", || run.leftovers().is_empty())?;
    let log = log(&images);
    if !log.contains("the tree is ended") {
        return Err(run.fail(format!("nobody says why:\n{log}")).into());
    }
    Ok(())
}

/// A restore that fails leaves neither tree nor pager.
fn restore_fails(tool: &Tool) -> Result<(), NotReady> {
    let mut run = saved(tool)?;
    let images = run.images(1)?;
    let script = run.dir.join("fails.sh");
    let text = "#!/bin/sh\ntest $CRTOOLS_SCRIPT_ACTION != post-restore\n";
    fs::write(&script, text).map_err(|e| e.to_string())?;
    crate::harness::set_mode(&script, 0o755)?;
    let script = script.to_str().ok_or_else(|| String::from("the directory's name is no text"))?;
    let started = Instant::now();
    let done = run.try_restore(tool, &images, &["--lazy-pages", "--action-script", script])?;
    if done.success() || started.elapsed() > Duration::from_secs(8) {
        return Err(run.fail(format!("{:?} after {:?}", done.status, started.elapsed())).into());
    }
    until(&run, "the pager to end", || helpers(&run, "pager").is_empty())?;
    if !run.leftovers().is_empty() {
        return Err(run.fail(format!("left over: {:?}", run.leftovers())).into());
    }
    run.restore(tool, &images, &["--lazy-pages"])?;
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

/// A pager that waits for a restore from `images`.
fn start_daemon(run: &Run, pager: &Tool, images: &Path) -> Result<i32, Fail> {
    let mut command = Command::new(&pager.path);
    command.args(["lazy-pages", "--daemon", "--pidfile", "pager.pid", "-o", "pager.log", "-v4"]);
    command.arg("-D").arg(images);
    let done = execute(command, &run.dir)?;
    let pid = fs::read_to_string(images.join("pager.pid")).ok().and_then(|t| t.trim().parse().ok());
    pid.ok_or_else(|| run.fail(format!("no pager: {}", done.text)))
}

/// Does `body` as another user, who may go everywhere all the same.
fn as_stranger<T: Send>(body: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T, NotReady> {
    const NOBODY: u32 = 65534;
    const SECBIT_NO_SETUID_FIXUP: u64 = 4;
    let stranger = || {
        // SAFETY: integers. Made directly, the calls are about the calling thread alone.
        let denied = unsafe {
            libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) != 0
                || libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) != 0
        };
        if denied { Err(std::io::Error::last_os_error()) } else { body() }
    };
    std::thread::scope(|scope| scope.spawn(stranger).join())
        .map_err(|_| NotReady::Fail("the stranger panicked".into()))?
        .map_err(|e| NotReady::Fail(format!("as another user: {e}")))
}

/// Another user gets nothing from a pager, and a restore nothing from another user's.
fn strangers(tool: &Tool) -> Result<(), NotReady> {
    let mut run = saved(tool)?;
    let images = run.images(1)?;
    let socket = images.join("lazy-pages.socket");
    let false_pager = as_stranger(|| UnixListener::bind(&socket))?;
    let before: Vec<i32> = vec![run.root];
    let done = run.try_restore(tool, &images, &["--lazy-pages"])?;
    refused(&run, tool, &done, &images.join("restore.log"), &["another user"])?;
    run.gone(&before, "after a restore from a stranger")?;
    drop(false_pager);
    fs::remove_file(&socket).map_err(|e| format!("{}: {e}", socket.display()))?;

    let pager = start_daemon(&run, tool, &images)?;
    let got = as_stranger(|| {
        let mut connection = UnixStream::connect(&socket)?;
        let mut got = Vec::new();
        connection.read_to_end(&mut got).map(|_| got)
    })?;
    if !got.is_empty() {
        return Err(run.fail(format!("the pager told a stranger {got:?}")).into());
    }
    run.restore(tool, &images, &["--lazy-pages"])?;
    let view = run.view()?;
    run.check(&view)?;
    until(&run, "the pager to end", || !alive(pager))?;
    let log = fs::read_to_string(images.join("pager.log")).unwrap_or_default();
    if !log.contains("somebody else") {
        return Err(run.fail(format!("the pager does not say who was there:\n{log}")).into());
    }
    Ok(())
}

/// Others read arguments and environment of a process all the while (as ps does), also before its memory waits for its
/// content: it must come nevertheless.
fn looked_at(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("vmas")?;
    let mut run = Run::ready(program.name, &program.start(), Fs::Memory)?;
    let before = run.view()?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after the dump")?;
    let (root, over) = (run.root, AtomicBool::new(false));
    let done = std::thread::scope(|scope| {
        for file in ["cmdline", "environ"] {
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let _ = fs::read(format!("/proc/{root}/{file}"));
                }
            });
        }
        let done = run.restore(tool, &images, &["--lazy-pages"]);
        over.store(true, Ordering::Relaxed);
        done
    });
    done?;
    all_there(&run, &images)?;
    run.same(&before, "after a restore that was looked at", &[])?;
    run.check(&before)?;
    Ok(())
}

/// `lazy-pages` as a command of its own.
fn daemon(tool: &Tool, restorer: &Tool, pager: &Tool) -> Result<(), NotReady> {
    // That of CRIU brings the wrong pages to memory that is moved meanwhile.
    let program = if pager.is_criu { "memory_private" } else { "memory_written" };
    // How much its processes share copy-on-write is a matter of chance, and so would be who can read it.
    let mut run = saved_with(tool, program, &["--format", "criu"])?;
    let images = run.images(1)?;
    let pid = start_daemon(&run, pager, &images)?;
    run.restore(restorer, &images, &["--lazy-pages"])?;
    let view = run.view()?;
    run.check(&view)?;
    until(&run, "the pager to end", || !alive(pid))
        .map_err(|e| format!("{e}{}", tail("pager.log", &images.join("pager.log"))))?;
    if fs::symlink_metadata(images.join("lazy-pages.socket")).is_ok() && !pager.is_criu {
        return Err(run.fail("the socket is still there".into()).into());
    }
    Ok(())
}
