//! Files whose state others have a say in: locks, names.

use crate::flavours::{finish, started};
use crate::harness::{Fail, Fs, NotReady, Run, Start, Tool};
use crate::programs::by_name;
use crate::refusals::{no_inventory, refused, unharmed};
use crate::trial;
use libtest_mimic::Trial;

/// All trials about files.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("files::{name}"), move || finish(body(&tool))));
    };
    add("locks_need_their_option", locks_need_their_option);
    add("locks_held_by_others", locks_held_by_others);
    add("another_build", another_build);
    add("many_descriptors", many_descriptors);
    add("more_than_may_be_open", more_than_may_be_open);
    add("link_remap_needs_its_option", link_remap_needs_its_option);
    add("core_of_a_zombie", core_of_a_zombie);
    add("link_remap_names_stay_until_restored", names_stay_until_restored);
    all
}

fn locks_need_their_option(tool: &Tool) -> Result<(), NotReady> {
    for name in ["file_locks", "file_locks_orphan"] {
        unharmed(&by_name(name)?, tool, |run, _| {
            let images = run.images(1)?;
            let done = run.try_dump(tool, run.root, &images, &[])?;
            let words = ["file_locks", "fd 3", "flock", "--file-locks"];
            refused(run, tool, &done, &images.join("dump.log"), &words)?;
            no_inventory(run, &images)
        })?;
    }
    Ok(())
}

/// A zombie that has left a core file leaves no other that anybody finds. Its status tells of one all the same where core files
/// have plain names; elsewhere not, which is said.
fn core_of_a_zombie(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = started(&by_name("zombies_core")?, Fs::Disk)?;
    let core = std::fs::read_to_string(run.dir.join("core")).unwrap_or_default();
    let fact = format!("{core}/{core} exit_code");
    let flag_and = |signal: i32| Some((signal | 0x80).to_string());
    if before.get(&fact) != flag_and(libc::SIGABRT).as_deref() {
        return Err(run.fail(format!("{fact} is {:?}", before.get(&fact))).into());
    }
    let images = run.images(1)?;
    run.dump(tool, &images, &["--leave-running"])?;
    run.same(&before, "after dump with --leave-running", &[])?;
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    let is_beside = !pattern.contains(['/', '|', '@']);
    let files = std::fs::read_dir(&run.dir).map_err(|e| e.to_string())?.count();
    run.dump(tool, &images, &[])?;
    run.restore(tool, &images, &[])?;
    if !tool.is_criu && is_beside {
        run.same(&before, "after restore", &[])?;
    }
    run.same(&before, "after restore", &[&fact])?;
    let left = std::fs::read_dir(&run.dir).map_err(|e| e.to_string())?.count();
    if left != files {
        return Err(run.fail(format!("{left} files in its directory, where {files} were")).into());
    }
    if !tool.is_criu && is_beside {
        run.check(&before)?;
        return Ok(());
    }
    let log = std::fs::read_to_string(images.join("restore.log")).unwrap_or_default();
    let (words, after) = (format!("process {core} (zombies), a zombie"), run.view()?);
    let is_said = tool.is_criu || log.contains(&words) && log.contains("left a core file");
    if !is_said || after.get(&fact) != Some(&libc::SIGABRT.to_string()) {
        return Err(run.fail(format!("{fact}: {:?}\n{log}", after.get(&fact))).into());
    }
    run.check(&before)?;
    Ok(())
}

/// A command that may not have as many files open as the tree has together.
fn more_than_may_be_open(tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu {
        return Err(NotReady::Skip("CRIU has no way out".into()));
    }
    let (mut run, before) = started(&by_name("many_fds")?, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after the dump")?;
    let limited = |most: u64| {
        move |command: &mut std::process::Command| {
            let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
            // SAFETY: setrlimit is async-signal-safe, and reads a struct of ours.
            unsafe {
                std::os::unix::process::CommandExt::pre_exec(
                    command,
                    move || match libc::setrlimit(libc::RLIMIT_NOFILE, &limit) {
                        0 => Ok(()),
                        _ => Err(std::io::Error::last_os_error()),
                    },
                );
            }
        }
    };
    // Not even one process has room.
    let done = run.try_restore_with(tool, &images, &[], limited(250))?;
    refused(
        &run,
        tool,
        &done,
        &images.join("restore.log"),
        &["limit of 250 open files", "ulimit -Hn"],
    )?;
    // Each process has, but not all of them at a time.
    run.restore_with(tool, &images, &[], limited(1500))?;
    let log = std::fs::read_to_string(images.join("restore.log")).unwrap_or_default();
    if !log.contains("files are opened in portions") {
        return Err(run.fail("all files were open at a time".to_owned()).into());
    }
    run.check(&before)?;
    Ok(())
}

/// Images of a program that runs on: its locks are its own, whoever else is made of them. Nor is its lease touched.
fn locks_held_by_others(tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu {
        return Err(NotReady::Skip("CRIU has no --new-pidns".into()));
    }
    let (run, before) = started(&by_name("file_locks")?, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &["--leave-running", "--file-locks"])?;
    let done = run.try_restore(tool, &images, &["--file-locks", "--new-pidns"])?;
    let holder = format!("is taken by process {} (file_locks)", run.root);
    refused(&run, tool, &done, &images.join("restore.log"), &["fd 3", "exclusive", &holder])?;
    run.same(&before, "after the refused restore", &[])?;
    run.check(&before)?;
    Ok(())
}

fn link_remap_needs_its_option(tool: &Tool) -> Result<(), NotReady> {
    unharmed(&by_name("link_remap")?, tool, |run, _| {
        let images = run.images(1)?;
        let done = run.try_dump(tool, run.root, &images, &[])?;
        let words = ["link_remap", "fd 3", "gone", "--link-remap"];
        refused(run, tool, &done, &images.join("dump.log"), &words)?;
        no_inventory(run, &images)?;
        has_links(run, 0, "after a refused dump")
    })
}

fn has_links(run: &Run, wanted: usize, when: &str) -> Result<(), Fail> {
    let names = std::fs::read_dir(&run.dir).map_err(|e| e.to_string())?.flatten();
    let ours = names.filter(|e| e.file_name().as_encoded_bytes().starts_with(b"link_remap"));
    match ours.count() {
        count if count == wanted => Ok(()),
        count => Err(run.fail(format!("{count} names for open files {when}, not {wanted}"))),
    }
}

/// The names that a dump makes are needed until a restore has succeeded.
fn names_stay_until_restored(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("link_remap")?;
    let (mut run, before) = started(&program, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, program.dump_options)?;
    has_links(&run, 3, "after the dump")?;
    let script = run.dir.join("fails.sh");
    std::fs::write(&script, "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION != post-restore ]\n")
        .map_err(|e| e.to_string())?;
    crate::harness::set_mode(&script, 0o755)?;
    let script = script.display().to_string();
    let done = run.try_restore(tool, &images, &["--action-script", &script])?;
    refused(&run, tool, &done, &images.join("restore.log"), &["post-restore"])?;
    has_links(&run, 3, "after a restore that failed")?;
    run.restore(tool, &images, program.restore_options)?;
    has_links(&run, 0, "after the restore")?;
    run.check(&before)?;
    Ok(())
}

/// The place of a build id (20 bytes) in an executable.
fn build_id_at(exe: &[u8]) -> Option<usize> {
    let head = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    exe.windows(head.len()).position(|w| w == head).map(|at| at + head.len())
}

/// An executable of the same size and mode takes the place of the program's.
fn another_build(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("counter")?;
    let exe = crate::harness::base(Fs::Disk).join(format!("rewake-e2e-exe-{}", std::process::id()));
    let failed = |e: std::io::Error| e.to_string();
    let mut content = std::fs::read(program.path).map_err(failed)?;
    let Some(at) = build_id_at(&content) else {
        return Err(NotReady::Skip("executables have no build ids here".into()));
    };
    std::fs::copy(program.path, &exe).map_err(failed)?;
    let gone = Gone(&exe);
    let mut run =
        Run::ready("another_build", &Start::program(&exe.display().to_string()), Fs::Disk)?;
    let before = run.view()?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    let id: String = content[at..at + 20].iter().map(|b| format!("{b:02x}")).collect();
    content[at] ^= 0xff;
    std::fs::write(&exe, &content).map_err(failed)?;
    let done = run.try_restore(tool, &images, &[])?;
    let words = ["rewake-e2e-exe", "build id", &id, "--file-validation"];
    refused(&run, tool, &done, &images.join("restore.log"), &words)?;
    run.gone(&before.pids(), "after a refused restore")?;
    run.restore(tool, &images, &["--file-validation", "filesize"])?;
    run.check(&before)?;
    drop(gone);
    Ok(())
}

/// Removes a file in the end.
struct Gone<'a>(&'a std::path::Path);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}

/// 12,000 descriptors in four processes: few enough for the limit of open files that machines without privileges have.
fn many_descriptors(tool: &Tool) -> Result<(), NotReady> {
    let mut program = by_name("descriptors")?;
    program.env = &[("ZOO_CHILDREN", "3"), ("ZOO_EACH", "3000")];
    let mut run = Run::ready(program.name, &program.start(), Fs::Memory)?;
    let pids = crate::view::descendants(run.root);
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&pids, "after the dump")?;
    run.restore(tool, &images, &[])?;
    run.check(&crate::view::View::default())?;
    Ok(())
}
