//! What must be refused, and what must not have happened then: exit status 1, a text that says why, the target as it
//! was, no process and no mount left.

use crate::flavours::{Outcome, finish, started, with};
use crate::harness::{Fail, Fs, NotReady, Run, Tool, alive, exists, tail};
use crate::pools::HugePages;
use crate::programs::{Program, by_name};
use crate::view::{self, View};
use crate::{no_excuses, skip, trial, trial_alone};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};

/// All trials about refusals.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("refusals::{name}"), move || finish(body(&tool))));
    };
    add("dump_nonexistent_pid", nonexistent_pid);
    add("dump_kernel_thread", kernel_thread);
    add("dump_traced", traced);
    add("dump_unsupported_object", unsupported);
    add("dump_vfork_waiter", vfork_waiter);
    add("dump_vfork_child", vfork_child);
    add("dumps_of_a_churn", churn);
    add("dump_tracer", |tool| tracer(tool, "tracer"));
    add("dump_tracer_of_thread", |tool| tracer(tool, "tracer_of_thread"));
    add("dump_tracer_by_clone", |tool| tracer(tool, "tracer_by_clone"));
    for (program, what, words) in RINGS {
        let tool = tool.clone();
        let name =
            format!("refusals::dump_io_uring_{}", what.trim_start_matches("ZOO_").to_lowercase());
        all.push(trial(name, move || finish(refused_with(&tool, program, (what, "1"), words))));
    }
    {
        let tool = tool.clone();
        all.push(trial("refusals::dump_aio_of_parent".into(), move || {
            let words = &["asynchronous i/o context", "fork(2)"];
            finish(refused_with(&tool, "aio", ("ZOO_FORKED", "1"), words))
        }));
    }
    {
        let tool = tool.clone();
        all.push(trial("refusals::dump_dispatched_thread".into(), move || {
            let told = ("ZOO_FOREIGN", "1");
            finish(refused_with(&tool, "syscall_user_dispatch", told, &["dispatch", "try again"]))
        }));
    }
    {
        let tool = tool.clone();
        all.push(trial("refusals::dump_signal_of_first_thread".into(), move || {
            let words = &["parent death signal", "first thread", "PR_SET_PDEATHSIG"];
            finish(refused_with(&tool, "leader_gone", ("ZOO_PDEATH", "1"), words))
        }));
    }
    {
        // The pager of a lazy restore would be done at some time.
        let tool = tool.clone();
        all.push(trial("refusals::dump_userfaultfd_outside".into(), move || {
            let told = ("ZOO_KIND", "userfaultfd_outside");
            let words = &["mapping 0x", "still to come", "(unsupported) brings", "within ", "runs"];
            finish(refused_after(&tool, "unsupported", told, words, &["--timeout", "1"]))
        }));
    }
    for (kind, words) in KINDS {
        let tool = tool.clone();
        all.push(trial(format!("refusals::dump_{kind}"), move || {
            finish(kind_refused(&tool, kind, words))
        }));
    }
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("refusals::{name}"), move || finish(body(&tool))));
    };
    add("dump_into_bad_directory", bad_directory);
    add("dump_to_full_disk", full_disk);
    add("restore_pid_taken", pid_taken);
    add("restore_without_images", no_images);
    {
        let tool = tool.clone();
        all.push(trial_alone("refusals::restore_scrambled_images".into(), move || -> Outcome {
            if tool.is_criu && !no_excuses() {
                return Ok(skip("CRIU has no --no-verify"));
            }
            finish(scrambled(&tool))
        }));
    }
    {
        // Other trials want huge pages, too.
        let tool = tool.clone();
        let name = "refusals::restore_without_huge_pages".into();
        all.push(trial_alone(name, move || finish(no_huge_pages(&tool))));
    }
    for (name, how) in
        [("truncated", Damage::Truncate), ("flipped", Damage::Flip), ("missing", Damage::Remove)]
    {
        if !tool.is_criu {
            // Page stores that tasks have in common, read while processes are being born and afterwards.
            let tool = tool.clone();
            all.push(trial_alone(format!("refusals::restore_{name}_page_stores"), move || {
                finish(damaged(&tool, how, "prefork", "pages-"))
            }));
        }
        let tool = tool.clone();
        all.push(trial_alone(format!("refusals::restore_{name}_images"), move || -> Outcome {
            if tool.is_criu && !no_excuses() {
                return Ok(skip("CRIU cannot: it has no checksums, damage may go unnoticed"));
            }
            finish(damaged(&tool, how, "pipes", ""))
        }));
    }
    all
}

/// Kinds of `unsupported`, and what the refusal of each says.
const KINDS: &[(&str, &[&str])] = &[
    ("userfaultfd", &["userfaultfd"]),
    ("userfaultfd_missing", &["mapping 0x", "registered with a userfaultfd", "unregister"]),
    ("userfaultfd_wp", &["mapping 0x", "registered with a userfaultfd", "unregister"]),
    ("secretmem_mapped", &["mapping 0x", "memfd_secret", "unmap"]),
    ("kvm", &["kvm"]),
    ("fsopen", &["mount"]),
    ("secretmem", &["secret"]),
    ("ruleset", &["landlock"]),
    ("landlock", &["landlock"]),
    ("landlock_user", &["landlock"]),
    ("listener", &["seccomp"]),
    ("notify_filter", &["seccomp", "supervisor"]),
    ("bpf_prog", &["bpf program"]),
    ("bpf_ring", &["bpf map", "type 27"]),
    ("fuse", &["fuse"]),
    ("keyring", &["process keyring"]),
    ("mqueue", &["message queue"]),
    ("kvm_running", &["kvm", "thread"]),
    ("broken_lease", &["leased", "being broken"]),
];

/// Programs with io_uring instances, what they are told to have, and what the refusal says.
const RINGS: &[(&str, &str, &[&str])] = &[
    ("io_uring", "ZOO_BUSY", &["requests in flight", "--timeout"]),
    ("uring_register", "ZOO_ONLY", &["slot 0", "/dev/null", "no process has open", "descriptor"]),
    ("uring_register", "ZOO_MOVED", &["registered buffers", "not mapped any more"]),
    ("uring_register", "ZOO_GROUP", &["groups of buffers"]),
    ("uring_register", "ZOO_POLL", &["poll network devices"]),
];

fn kind_refused(tool: &Tool, kind: &'static str, words: &[&str]) -> Result<(), NotReady> {
    refused_with(tool, "unsupported", ("ZOO_KIND", kind), words)
}

/// The dump of a program that is told to have something is refused.
fn refused_with(
    tool: &Tool,
    program: &'static str,
    told: (&'static str, &'static str),
    words: &[&str],
) -> Result<(), NotReady> {
    // What has no name must not be taken for a file that has lost its name.
    refused_after(tool, program, told, words, &["--link-remap"])
}

/// As [`refused_with`], with other options.
fn refused_after(
    tool: &Tool,
    program: &'static str,
    told: (&'static str, &'static str),
    words: &[&str],
    options: &[&str],
) -> Result<(), NotReady> {
    let mut program = by_name(program)?;
    let name = program.name;
    let env: &'static [(&'static str, &'static str)] = Vec::leak(vec![told]);
    program.env = env;
    unharmed(&program, tool, |run, _| {
        let images = run.images(1)?;
        let done = run.try_dump(tool, run.root, &images, options)?;
        let pid = run.root.to_string();
        let words: Vec<&str> = [&pid[..], name].into_iter().chain(words.iter().copied()).collect();
        refused(run, tool, &done, &images.join("dump.log"), &words)?;
        no_inventory(run, &images)
    })
}

/// Fails unless the command was refused: exit status 1 and a text, in its output or its log, with every word.
pub fn refused(
    run: &Run,
    tool: &Tool,
    done: &crate::harness::Done,
    log: &Path,
    words: &[&str],
) -> Result<(), Fail> {
    let text = format!("{}{}", done.text, fs::read_to_string(log).unwrap_or_default());
    if !(libc::WIFEXITED(done.status) && libc::WEXITSTATUS(done.status) == 1) {
        let how = crate::reaper::describe(done.status);
        return Err(
            run.fail(format!("expected exit status 1, got {how}\n{}", tail("its log", log)))
        );
    }
    // How CRIU words its errors is its own affair.
    let missing: Vec<_> =
        words.iter().filter(|w| !text.to_lowercase().contains(&w.to_lowercase())).collect();
    if !tool.is_criu && !missing.is_empty() {
        return Err(run.fail(format!(
            "the error does not say {missing:?}:\n{}\n{}",
            done.text,
            tail("its log", log)
        )));
    }
    Ok(())
}

/// Starts a program, lets `dump` be refused, and finds the program unharmed.
pub fn unharmed(
    program: &Program,
    tool: &Tool,
    refuse: impl FnOnce(&Run, &View) -> Result<(), Fail>,
) -> Result<(), NotReady> {
    let (run, before) = started(program, Fs::Disk)?;
    refuse(&run, &before)?;
    run.same(&before, "after the refused dump", &program.disturbed(tool))?;
    run.check(&before)?;
    program.judge_eintr(&run, tool, false)?;
    Ok(())
}

/// What an error says of something that we hold. A trial beside this one may have forked: until its child executes a program, that
/// has it, too, and is named after us.
pub fn held_by_us() -> [String; 2] {
    ["in use by process".to_owned(), format!(" {} (", std::process::id())]
}

/// Fails if the images look complete.
pub fn no_inventory(run: &Run, images: &Path) -> Result<(), Fail> {
    if images.join("inventory.img").exists() {
        return Err(run.fail(format!("{} looks like a complete checkpoint", images.display())));
    }
    Ok(())
}

fn nonexistent_pid(tool: &Tool) -> Result<(), NotReady> {
    unharmed(&by_name("counter")?, tool, |run, _| {
        // The largest pid is practically never in use.
        let max = fs::read_to_string("/proc/sys/kernel/pid_max").unwrap_or_default();
        let pid = max.trim().parse::<i32>().unwrap_or(32768) - 1;
        let images = run.images(1)?;
        let done = run.try_dump(tool, pid, &images, &[])?;
        refused(run, tool, &done, &images.join("dump.log"), &[&pid.to_string()])?;
        no_inventory(run, &images)
    })
}

fn kernel_thread(tool: &Tool) -> Result<(), NotReady> {
    let comm = fs::read_to_string("/proc/2/comm").unwrap_or_default();
    if comm.trim() != "kthreadd" {
        return Err(NotReady::Skip("no kernel thread is visible in this pid namespace".into()));
    }
    unharmed(&by_name("counter")?, tool, |run, _| {
        let images = run.images(1)?;
        let done = run.try_dump(tool, 2, &images, &[])?;
        refused(run, tool, &done, &images.join("dump.log"), &["2", "kthreadd"])?;
        no_inventory(run, &images)
    })
}

fn traced(tool: &Tool) -> Result<(), NotReady> {
    unharmed(&by_name("sleepers")?, tool, |run, before| {
        // The tracer is a thread; its end lets the program go, running.
        let pid = run.root;
        let attempt = std::thread::scope(|s| {
            let tracer = s.spawn(|| {
                // SAFETY: integers and null pointers.
                let ret = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0usize, 0usize) };
                if ret != 0 {
                    return Err(format!("PTRACE_SEIZE: {}", std::io::Error::last_os_error()));
                }
                let images = run.images(1)?;
                let done = run.try_dump(tool, pid, &images, &[])?;
                refused(run, tool, &done, &images.join("dump.log"), &[&pid.to_string(), "traced"])?;
                no_inventory(run, &images)
            });
            tracer.join().unwrap_or_else(|_| Err("tracer panicked".into()))
        });
        attempt?;
        run.same(before, "after the tracer let it go", &[])
    })
}

fn vfork_waiter(tool: &Tool) -> Result<(), NotReady> {
    unharmed(&by_name("vfork_waiter")?, tool, |run, _| {
        let images = run.images(1)?;
        let done = run.try_dump(tool, run.root, &images, &[])?;
        let child = fs::read_to_string(run.dir.join("child")).unwrap_or_default();
        let log = images.join("dump.log");
        refused(run, tool, &done, &log, &["vfork_waiter", "vfork(2)", child.trim()])?;
        no_inventory(run, &images)
    })
}

/// A tree in which one process traces another.
fn tracer(tool: &Tool, name: &str) -> Result<(), NotReady> {
    unharmed(&by_name(name)?, tool, |run, _| {
        let images = run.images(1)?;
        let done = run.try_dump(tool, run.root, &images, &[])?;
        let tracee = fs::read_to_string(run.dir.join("tracee")).unwrap_or_default();
        let traced = format!("process {} (tracer): ", tracee.trim());
        let by = format!("is traced already, by process {} (tracer)", run.root);
        refused(run, tool, &done, &images.join("dump.log"), &[&traced, &by, "end the debugger"])?;
        no_inventory(run, &images)
    })
}

/// The child that its parent waits for, alone: it has the memory of one outside the tree.
fn vfork_child(tool: &Tool) -> Result<(), NotReady> {
    unharmed(&by_name("vfork_waiter")?, tool, |run, _| {
        let images = run.images(1)?;
        let child = fs::read_to_string(run.dir.join("child")).unwrap_or_default();
        let pid = child.trim().parse().map_err(|e| format!("child: {e}"))?;
        let done = run.try_dump(tool, pid, &images, &["--shell-job"])?;
        let log = images.join("dump.log");
        refused(run, tool, &done, &log, &[child.trim(), "address space", "outside the tree"])?;
        no_inventory(run, &images)
    })
}

fn unsupported(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("unsupported")?;
    for options in [&[][..], &["--leave-running"], &["--leave-stopped"]] {
        unharmed(&program, tool, |run, _| {
            let images = run.images(1)?;
            let done = run.try_dump(tool, run.root, &images, options)?;
            let pid = run.root.to_string();
            refused(
                run,
                tool,
                &done,
                &images.join("dump.log"),
                &[&pid, "unsupported", "perf_event"],
            )?;
            no_inventory(run, &images)
        })?;
    }
    Ok(())
}

fn bad_directory(tool: &Tool) -> Result<(), NotReady> {
    unharmed(&by_name("sleepers")?, tool, |run, before| {
        let file = run.dir.join("a file");
        fs::write(&file, "").map_err(|e| e.to_string())?;
        for bad in [run.dir.join("nowhere"), file, PathBuf::from("/sys/kernel")] {
            let done = run.try_dump(tool, run.root, &bad, &[])?;
            let name = bad.to_string_lossy().into_owned();
            refused(run, tool, &done, &run.dir.join("none"), &[&name])?;
            run.same(before, &format!("after the refused dump into {name}"), &[])?;
        }
        Ok(())
    })
}

/// A mounted tmpfs, unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(pub PathBuf);

impl SmallDisk {
    pub fn mount(dir: PathBuf, bytes: usize) -> Result<SmallDisk, Fail> {
        fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        let target = zoo::cstring(&dir);
        let data = zoo::cstring(format!("size={bytes}"));
        // SAFETY: NUL-terminated strings.
        let ret = unsafe {
            libc::mount(
                c"zoo".as_ptr(),
                target.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                data.as_ptr().cast(),
            )
        };
        if ret != 0 {
            return Err(format!("mount of a small tmpfs: {}", std::io::Error::last_os_error()));
        }
        Ok(SmallDisk(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let target = zoo::cstring(&self.0);
        // SAFETY: a NUL-terminated string.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

fn full_disk(tool: &Tool) -> Result<(), NotReady> {
    let place =
        crate::harness::base(Fs::Disk).join(format!("rewake-e2e-{}-small", std::process::id()));
    // From hardly anything to nearly all of it: each stops the dump at another place. Of the second one several threads write.
    let sizes = [4, 64, 400, 1500].map(|kib| ("memory_private", kib));
    for (program, kib) in
        sizes.into_iter().chain([("memory_dense", 20_000), ("memory_dense", 120_000)])
    {
        let disk = SmallDisk::mount(place.clone(), kib << 10).map_err(NotReady::Skip)?;
        for options in [&["--leave-running"][..], &[]] {
            unharmed(&by_name(program)?, tool, |run, _| {
                let done = run.try_dump(tool, run.root, &disk.0, options)?;
                let place = disk.0.display().to_string();
                let words = [&place[..], "No space left"];
                refused(run, tool, &done, &run.dir.join("none"), &words)?;
                no_inventory(run, &disk.0)
            })?;
            clear(&disk.0);
        }
    }
    let _ = fs::remove_dir(&place);
    Ok(())
}

fn clear(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
    }
}

fn pid_taken(tool: &Tool) -> Result<(), NotReady> {
    unharmed(&by_name("tree")?, tool, |run, before| {
        let images = run.images(1)?;
        run.dump(tool, &images, &["--leave-running"])?;
        let done = run.try_restore(tool, &images, &[])?;
        // Some process of the tree, and what holds its pid.
        refused(run, tool, &done, &images.join("restore.log"), &["tree", "taken"])?;
        run.same(before, "after the refused restore", &[])
    })
}

/// The host has fewer huge pages than the images need: nothing is made, and the error says how many there are.
fn no_huge_pages(tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu {
        return Err(NotReady::Skip("CRIU's restore fails in the middle".into()));
    }
    let program = by_name("hugetlb")?;
    let pages = HugePages::add(program.huge_pages)?;
    let (mut run, before) = started(&program, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after dump")?;
    // What others have in use or reserved meanwhile is theirs: all that is free goes.
    let emptied = HugePages::remove_free()?;
    let done = run.try_restore(tool, &images, &[])?;
    let words = ["huge pages of 2048 kB", "are needed", "nr_hugepages"];
    refused(&run, tool, &done, &images.join("restore.log"), &words)?;
    run.gone(&before.pids(), "after the refused restore")?;
    drop(emptied);
    run.restore(tool, &images, &[])?;
    run.check(&before)?;
    drop(pages);
    Ok(())
}

fn no_images(tool: &Tool) -> Result<(), NotReady> {
    let run = Run::spawn("no_images", &by_name("counter")?.start(), Fs::Disk)?;
    let empty = run.images(1)?;
    for dir in [empty.clone(), run.dir.join("nowhere")] {
        let done = run.try_restore(tool, &dir, &[])?;
        refused(&run, tool, &done, &empty.join("restore.log"), &[])?;
    }
    Ok(())
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Truncate,
    Flip,
    Remove,
}

/// The files a checkpoint consists of.
fn image_files(images: &Path) -> Result<Vec<String>, Fail> {
    let mut names: Vec<_> = fs::read_dir(images)
        .map_err(|e| e.to_string())?
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| !n.ends_with(".log") && !n.starts_with("stats-") && !n.starts_with("irmap"))
        .collect();
    names.sort();
    Ok(names)
}

/// Damages every image file of a program whose name begins with `prefix` in turn; restore must refuse each time, before or after it made processes, and leave none.
fn damaged(tool: &Tool, how: Damage, program: &str, prefix: &str) -> Result<(), NotReady> {
    let program = by_name(program)?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, program.dump_options)?;
    run.gone(&before.pids(), "after dump")?;
    let names = image_files(&images)?;
    let me = std::process::id() as i32;
    for name in names.iter().filter(|name| name.starts_with(prefix)) {
        let path = images.join(name);
        let good = fs::read(&path).map_err(|e| format!("{name}: {e}"))?;
        for (bad, what) in damages(&good, how) {
            match &bad {
                Some(bad) => fs::write(&path, bad),
                None => fs::remove_file(&path),
            }
            .map_err(|e| format!("{name}: {e}"))?;
            let done = run.try_restore(tool, &images, &[])?;
            let log = images.join("restore.log");
            if let Err(e) = refused(&run, tool, &done, &log, &[name]) {
                return Err(format!("{name} {what}: {e}").into());
            }
            let left: Vec<i32> =
                view::descendants(me).into_iter().filter(|&p| p != me && alive(p)).collect();
            if !left.is_empty() || before.pids().iter().any(|&p| exists(p)) {
                let left = view::where_blocked(&left);
                return Err(run
                    .fail(format!("{name} {what}: refused, but processes are left: {left}"))
                    .into());
            }
        }
        fs::write(&path, good).map_err(|e| format!("{name}: {e}"))?;
    }
    // Changed on purpose, it restores if told so.
    if matches!(how, Damage::Remove) {
        let manifest = images.join("rewake.manifest");
        fs::rename(&manifest, run.dir.join("manifest")).map_err(|e| e.to_string())?;
        run.restore(tool, &images, &with(program.restore_options, "--no-verify"))?;
        run.kill_tree(&before)?;
        fs::rename(run.dir.join("manifest"), &manifest).map_err(|e| e.to_string())?;
    }
    // Whole again, it restores: the refusals were about the damage.
    run.restore(tool, &images, program.restore_options)?;
    run.check(&before)?;
    Ok(())
}

/// Bits flipped at random in every image, and nothing that tells: what comes of it is a refusal that leaves nothing, or some
/// tree, never a crash or a hang. (What such images make of a process is its own affair: it is killed.)
fn scrambled(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("tree")?;
    let (run, before) = started(&program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, program.dump_options)?;
    run.gone(&before.pids(), "after dump")?;
    let seed = crate::kills::seed();
    let mut rng = zoo::Rng(seed);
    let me = std::process::id() as i32;
    let options = with(program.restore_options, "--no-verify");
    for name in image_files(&images)?.iter().filter(|n| !n.starts_with("pages-")) {
        let path = images.join(name);
        let good = fs::read(&path).map_err(|e| format!("{name}: {e}"))?;
        for _ in 0..6 {
            let mut bad = good.clone();
            let mut at = Vec::new();
            for _ in 0..1 + rng.next() % 3 {
                let bit = (rng.next() % (good.len() as u64 * 8)) as usize;
                bad[bit / 8] ^= 1 << (bit % 8);
                at.push(bit);
            }
            fs::write(&path, bad).map_err(|e| format!("{name}: {e}"))?;
            let when = format!("{name} with bits {at:?} flipped (seed {seed})");
            let done =
                run.try_restore(tool, &images, &options).map_err(|e| format!("{when}: {e}"))?;
            let left = || -> Vec<i32> {
                view::descendants(me).into_iter().filter(|&p| p != me && exists(p)).collect()
            };
            if done.success() {
                left().into_iter().for_each(|pid| crate::harness::kill(pid, libc::SIGKILL));
            } else {
                refused(&run, tool, &done, &images.join("restore.log"), &[])
                    .map_err(|e| format!("{when}: {e}"))?;
            }
            run.gone(&left(), &when)?;
        }
        fs::write(&path, good).map_err(|e| format!("{name}: {e}"))?;
    }
    Ok(())
}

/// The ways to damage a file: what it holds then (nothing: removed), and in words.
fn damages(good: &[u8], how: Damage) -> Vec<(Option<Vec<u8>>, String)> {
    let n = good.len();
    match how {
        Damage::Remove => vec![(None, "removed".into())],
        Damage::Truncate => {
            let mut to = vec![0, 4, 8, n / 2, n.saturating_sub(1)];
            to.retain(|&t| t < n);
            to.dedup();
            to.iter()
                .map(|&t| (Some(good[..t].to_vec()), format!("cut to {t} of {n} bytes")))
                .collect()
        }
        Damage::Flip => {
            let mut at: Vec<usize> = vec![0, 5, 9, 13, n / 3, n / 2, n.saturating_sub(1)];
            at.retain(|&a| a < n);
            at.dedup();
            let flip = |a: usize| {
                let mut bad = good.to_vec();
                bad[a] ^= 1 << (a % 8);
                (Some(bad), format!("with bit {} of byte {a} flipped", a % 8))
            };
            at.into_iter().map(flip).collect()
        }
    }
}

/// What is not refused: a tree whose processes and threads come and go all the time, many of them while they are being
/// stopped.
fn churn(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("churn")?;
    let mut run = Run::ready(program.name, &program.start(), Fs::Memory)?;
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    for n in 0..120 {
        let images = run.images(0)?;
        run.dump(tool, &images, &["--leave-running"])?;
        fs::remove_dir_all(&images).map_err(|e| e.to_string())?;
        // A slow machine: what was done counts.
        if n > 40 && std::time::Instant::now() > until {
            break;
        }
    }
    for n in 1..4 {
        let images = run.images(n)?;
        run.dump(tool, &images, &[])?;
        run.gone(&[run.root], "after dump")?;
        run.restore(tool, &images, &[])?;
    }
    // Nobody can look at all of it at the same time.
    run.check(&View::default())?;
    Ok(())
}
