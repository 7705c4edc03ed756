//! What belongs to the outside: left out of a dump (`--external`), and replaced at a restore (`--inherit-fd`).

use crate::flavours::finish;
use crate::harness::{Done, Fail, Fs, NotReady, Run, Tool};
use crate::programs::by_name;
use crate::trial;
use libtest_mimic::Trial;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The trials.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let tool = tool.clone();
    vec![trial("outside::everything_replaced".into(), move || {
        if tool.is_criu {
            return finish(Err(NotReady::Skip("it is about rewake's own errors".into())));
        }
        finish(everything_replaced(&tool))
    })]
}

/// Both ends of a pipe, closed on exec.
fn pipe() -> Result<(File, File), Fail> {
    let mut ends = [0; 2];
    // SAFETY: two out-parameters.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(format!("pipe2: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: they are ours and open.
    Ok(unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) })
}

/// A pseudoterminal, closed on exec.
fn terminal() -> Result<(File, File), Fail> {
    let (mut master, mut slave) = (0, 0);
    let none = std::ptr::null_mut();
    // SAFETY: two out-parameters; no name, no settings, no size.
    if unsafe { libc::openpty(&mut master, &mut slave, none, std::ptr::null(), std::ptr::null()) }
        != 0
    {
        return Err(format!("openpty: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: the two are ours and open; the files own them from here.
    unsafe {
        libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::fcntl(slave, libc::F_SETFD, libc::FD_CLOEXEC);
        Ok((File::from_raw_fd(master), File::from_raw_fd(slave)))
    }
}

/// Hands descriptors to a command under these numbers.
fn hand_on(command: &mut Command, all: &[(RawFd, RawFd)]) {
    let all = all.to_vec();
    // SAFETY: dup2 is async-signal-safe; the descriptors are open until the command has ended.
    unsafe {
        command.pre_exec(move || {
            for (fd, number) in &all {
                if libc::dup2(*fd, *number) == -1 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

fn refused(run: &Run, done: &Done, words: &[&str]) -> Result<(), Fail> {
    let missing: Vec<_> = words.iter().filter(|word| !done.text.contains(**word)).collect();
    if done.success() || !missing.is_empty() {
        return Err(run.fail(format!("{:#x}, without {missing:?}:\n{}", done.status, done.text)));
    }
    Ok(())
}

/// What a descriptor whose number the program has published leads to.
fn link(run: &Run, name: &str) -> Result<(String, String), Fail> {
    let text = |path: String| std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"));
    let number = text(run.dir.join(name).to_string_lossy().into_owned())?;
    let link = format!("/proc/{}/fd/{number}", run.root);
    let link = std::fs::read_link(&link).map_err(|e| format!("{link}: {e}"))?;
    let info = text(format!("/proc/{}/fdinfo/{number}", run.root))?;
    Ok((link.to_string_lossy().into_owned(), info))
}

fn everything_replaced(tool: &Tool) -> Result<(), NotReady> {
    let text = |e: std::io::Error| e.to_string();
    let (in_read, in_write) = pipe()?;
    let (mut out_read, out_write) = pipe()?;
    let (_master, slave) = terminal()?;
    let base = std::env::temp_dir().join(format!("rewake-e2e-{}-outside", std::process::id()));
    std::fs::create_dir_all(&base).map_err(text)?;
    let made = Directory(base.clone());
    let (file, log) = (base.join("file"), base.join("log"));
    std::fs::write(&file, "my own file").map_err(text)?;
    std::fs::write(&log, "first\n").map_err(text)?;
    let mut program = by_name("outside")?.start();
    let own = |fd: RawFd| format!("/proc/{}/fd/{fd}", std::process::id());
    program.env.extend([
        ("ZOO_IN".into(), own(in_read.as_raw_fd())),
        ("ZOO_OUT".into(), own(out_write.as_raw_fd())),
        ("ZOO_FILE".into(), file.to_string_lossy().into_owned()),
        ("ZOO_LOG".into(), log.to_string_lossy().into_owned()),
        ("ZOO_TTY".into(), own(slave.as_raw_fd())),
    ]);
    let mut run = Run::ready("outside", &program, Fs::Disk)?;
    let before = run.view()?;
    let images = run.images(1)?;
    (&in_write).write_all(b"unread").map_err(text)?;

    // The keys, as anybody would find them.
    let (_, info) = link(&run, "file")?;
    let mount = info.lines().find_map(|l| l.strip_prefix("mnt_id:")).unwrap_or_default();
    let mount: u64 = mount.trim().parse().map_err(|e| format!("{info}: {e}"))?;
    let inode = std::fs::metadata(&file).map_err(text)?.ino();
    let file_key = format!("file[{mount:x}:{inode:x}]");
    let stat = slave.metadata().map_err(text)?;
    let tty_key = format!("tty[{:x}:{:x}]", stat.rdev(), stat.dev());
    let (pipe_in, pipe_out, socket) =
        (link(&run, "in")?.0, link(&run, "out")?.0, link(&run, "socket")?.0);

    let done = run.try_dump(tool, run.root, &images, &["--external", &file_key])?;
    refused(&run, &done, &["it is a terminal whose other side is outside the tree"])?;
    run.same(&before, "after the refused dump", &[])?;
    run.dump(tool, &images, &["--external", &file_key, "--external", &tty_key])?;
    run.gone(&before.pids(), "after the dump")?;
    std::fs::remove_file(&file).map_err(text)?;

    // What takes their places.
    let (given_read, given_write) = pipe()?;
    let (mut kept_read, kept_write) = pipe()?;
    let (mut master, given_tty) = terminal()?;
    let other = base.join("other");
    std::fs::write(&other, "the file given").map_err(text)?;
    let mut given_file = File::options().read(true).write(true).open(&other).map_err(text)?;
    given_file.read_exact(&mut [0; 4]).map_err(text)?;
    let other_log = base.join("other log");
    std::fs::write(&other_log, "second\n").map_err(text)?;
    let given_log = File::options().write(true).open(&other_log).map_err(text)?;
    // SAFETY: the name lives on; the descriptor is nobody else's.
    let memory =
        unsafe { File::from_raw_fd(libc::memfd_create(c"theirs".as_ptr(), libc::MFD_CLOEXEC)) };
    memory.write_all_at(b"theirs", 0).map_err(text)?;
    let given_socket = std::net::UdpSocket::bind("127.0.0.1:0").map_err(text)?;
    let address = given_socket.local_addr().map_err(text)?.to_string();
    let log_key = log.to_string_lossy().trim_start_matches('/').to_owned();
    let all = [
        (pipe_in, given_read.as_raw_fd()),
        (pipe_out, kept_write.as_raw_fd()),
        (file_key.clone(), given_file.as_raw_fd()),
        (log_key, given_log.as_raw_fd()),
        (tty_key.clone(), given_tty.as_raw_fd()),
        ("/memfd:zoo_outside".into(), memory.as_raw_fd()),
        (socket, given_socket.as_raw_fd()),
        ("no/such/thing".into(), given_socket.as_raw_fd()),
    ];
    const NUMBER: i32 = 200;
    let numbered = || (NUMBER..).zip(&all);
    let options = |without: &str| -> Vec<String> {
        let some = numbered().filter(|(_, (key, _))| key != without);
        some.flat_map(|(n, (key, _))| ["--inherit-fd".to_owned(), format!("fd[{n}]:{key}")])
            .collect()
    };
    let numbers: Vec<(RawFd, RawFd)> = numbered().map(|(n, (_, fd))| (*fd, n)).collect();

    let everything = options("");
    let everything: Vec<&str> = everything.iter().map(String::as_str).collect();
    let closed = run.try_restore(tool, &images, &everything)?;
    refused(&run, &closed, &["fd[200]:pipe:[", "is not open"])?;
    for (key, words) in [
        (&file_key, ["the dump left this file out", "--inherit-fd fd[N]:file["]),
        (&tty_key, ["the dump left this terminal out", "--inherit-fd fd[N]:tty["]),
    ] {
        let less = options(key);
        let less: Vec<&str> = less.iter().map(String::as_str).collect();
        let done = run.try_restore_with(tool, &images, &less, |c| hand_on(c, &numbers))?;
        refused(&run, &done, &words)?;
    }
    // One that cannot be what it is to be: the file, by an end of a pipe.
    let mut wrong = numbers.clone();
    wrong[2].0 = kept_read.as_raw_fd();
    let done = run.try_restore_with(tool, &images, &everything, |c| hand_on(c, &wrong))?;
    refused(&run, &done, &["is not open for reading and writing"])?;
    let mut wrong = numbers.clone();
    wrong[4].0 = given_file.as_raw_fd();
    let done = run.try_restore_with(tool, &images, &everything, |c| hand_on(c, &wrong))?;
    refused(&run, &done, &["is no terminal"])?;

    run.restore_with(tool, &images, &everything, |c| hand_on(c, &numbers))?;
    let log_text = std::fs::read_to_string(images.join("restore.log")).map_err(text)?;
    for words in ["bytes that waited in it are not put", "no/such/thing: the images have nothing"] {
        if !log_text.contains(words) {
            return Err(run.fail(format!("the log does not say: {words}")).into());
        }
    }
    // Only the tree has them now: its end is to be seen.
    drop((kept_write, given_tty, given_read));
    (&given_write).write_all(b"given\n").map_err(text)?;
    run.check(&before)?;
    let mut got = String::new();
    kept_read.read_to_string(&mut got).map_err(text)?;
    let mut old = [0; 64];
    let count = out_read.read(&mut old).map_err(text)?;
    if (got.as_str(), &old[..count]) != ("after\n", b"before\n") {
        return Err(run.fail(format!("{got:?} came, and {:?} before", &old[..count])).into());
    }
    let mut hello = [0; 64];
    let count = master.read(&mut hello).map_err(text)?;
    let bound = std::fs::read_to_string(run.dir.join("address")).map_err(text)?;
    let logs = (std::fs::read(&log).map_err(text)?, std::fs::read(&other_log).map_err(text)?);
    if !hello[..count].starts_with(b"hello") || bound != address {
        return Err(run.fail(format!("{:?}, {bound}", &hello[..count])).into());
    }
    if (logs.0.as_slice(), logs.1.as_slice()) != (&b"first\n"[..], &b"second\nmore\n"[..]) {
        return Err(run.fail(format!("{logs:?}")).into());
    }
    let _: OwnedFd = in_read.into();
    drop(made);
    Ok(())
}

/// Removed at the end.
struct Directory(std::path::PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
