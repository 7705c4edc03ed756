//! Unix sockets whose peers or addresses are outside the tree.

use crate::flavours::{finish, started};
use crate::harness::{Done, Fail, Fs, NotReady, Run, Tool};
use crate::programs::by_name;
use crate::refusals::{SmallDisk, held_by_us};
use crate::trial;
use libtest_mimic::Trial;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// All trials with unix sockets of the outside.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("unix::{name}"), move || {
            if tool.is_criu {
                return finish(Err(NotReady::Skip("it is about rewake's own errors".into())));
            }
            finish(body(&tool))
        }));
    };
    add("server_outside", server_outside);
    add("address_in_use", address_in_use);
    add("end_replaced", end_replaced);
    add("waiting_data_lives_on", waiting_data_lives_on);
    all
}

/// A server outside of any tree: echoes what streams send, and collects datagrams.
struct Server {
    base: PathBuf,
    datagrams: UnixDatagram,
    /// Something came through a stream.
    streamed: Arc<AtomicBool>,
}

impl Server {
    fn start() -> Result<Server, Fail> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("rewake-e2e-{}-server{number}", std::process::id());
        let base = std::env::temp_dir().join(name);
        let failed = |e: std::io::Error| format!("{}: {e}", base.display());
        let listener = UnixListener::bind(base.with_extension("stream")).map_err(failed)?;
        let datagrams = UnixDatagram::bind(base.with_extension("dgram")).map_err(failed)?;
        datagrams.set_nonblocking(true).map_err(failed)?;
        let streamed = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&streamed);
        std::thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                let told = Arc::clone(&told);
                std::thread::spawn(move || {
                    let mut data = [0; 64];
                    while let Ok(got @ 1..) = client.read(&mut data) {
                        told.store(true, Ordering::Relaxed);
                        if client.write_all(&data[..got]).is_err() {
                            break;
                        }
                    }
                });
            }
        });
        Ok(Server { base, datagrams, streamed })
    }

    fn streamed(&self) -> bool {
        self.streamed.load(Ordering::Relaxed)
    }

    fn received(&self) -> Vec<String> {
        let mut data = [0; 64];
        let next = || {
            let got = self.datagrams.recv(&mut data).ok()?;
            Some(String::from_utf8_lossy(&data[..got]).into_owned())
        };
        std::iter::from_fn(next).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for kind in ["stream", "dgram"] {
            let _ = std::fs::remove_file(self.base.with_extension(kind));
        }
    }
}

/// Fails unless the command was refused with all the words.
fn refused(run: &Run, done: &Done, words: &[&str]) -> Result<(), Fail> {
    let missing: Vec<_> = words.iter().filter(|word| !done.text.contains(**word)).collect();
    if done.success() || !missing.is_empty() {
        let status = done.status;
        return Err(run.fail(format!("status {status:#x}, without {missing:?}:\n{}", done.text)));
    }
    Ok(())
}

/// No directory of a restore is left beside the run's files.
fn tidy(run: &Run) -> Result<(), Fail> {
    let names = std::fs::read_dir(&run.dir).map_err(|e| e.to_string())?.flatten();
    let left = names.map(|n| n.file_name().to_string_lossy().into_owned());
    match left.into_iter().find(|name| name.starts_with(".rewake")) {
        None => Ok(()),
        Some(name) => Err(run.fail(format!("{name} is left"))),
    }
}

fn server_outside(tool: &Tool) -> Result<(), NotReady> {
    let server = Server::start()?;
    let mut program = by_name("unix_client")?.start();
    program.env.push(("ZOO_SERVER".into(), server.base.to_string_lossy().into_owned()));
    let mut run = Run::ready("unix_client", &program, Fs::Disk)?;
    let before = run.view()?;
    let images = run.images(1)?;
    let holder = format!("process {} ", std::process::id());
    let path = server.base.with_extension("stream").to_string_lossy().into_owned();
    let words = ["outside the tree", &holder, &path, "--ext-unix-sk", "--external unix["];
    refused(&run, &run.try_dump(tool, run.root, &images, &[])?, &words)?;
    run.same(&before, "after the refused dump", &[])?;

    run.dump(tool, &images, &["--ext-unix-sk"])?;
    run.gone(&before.pids(), "after the dump")?;
    refused(&run, &run.try_restore(tool, &images, &[])?, &[&path, "--ext-unix-sk"])?;
    run.restore(tool, &images, &["--ext-unix-sk"])?;
    run.same(&before, "after the restore", &[])?;
    run.check(&before)?;
    let got = server.received();
    if got != ["before", "after"] {
        return Err(run.fail(format!("the server has received {got:?}")).into());
    }
    Ok(())
}

/// Peers are left out one by one (`--external unix[INODE]`); at the restore one socket is replaced by a descriptor of the
/// caller's (`--inherit-fd`), and the other connects to its server anew.
fn end_replaced(tool: &Tool) -> Result<(), NotReady> {
    let server = Server::start()?;
    let mut program = by_name("unix_client")?.start();
    program.env.push(("ZOO_SERVER".into(), server.base.to_string_lossy().into_owned()));
    let mut run = Run::ready("unix_client", &program, Fs::Disk)?;
    let before = run.view()?;
    let images = run.images(1)?;
    let done = run.try_dump(tool, run.root, &images, &[])?;
    let mut peers: Vec<String> = done
        .text
        .split("--external unix[")
        .skip(1)
        .filter_map(|rest| Some(format!("unix[{}]", rest.split_once(']')?.0)))
        .filter(|peer| peer.bytes().any(|b| b.is_ascii_digit()))
        .collect();
    // The hint says one of them again.
    peers.sort_unstable();
    peers.dedup();
    let [one, other] = peers.as_slice() else {
        return Err(run.fail(format!("{peers:?} in\n{}", done.text)).into());
    };
    // One alone is not enough.
    let alone = run.try_dump(tool, run.root, &images, &["--external", one])?;
    refused(&run, &alone, &["outside the tree", other])?;
    run.same(&before, "after the refused dumps", &[])?;
    // The first socket of the program is the stream.
    let links = (0..64).filter_map(|fd| {
        std::fs::read_link(format!("/proc/{}/fd/{fd}", run.root)).ok()?.to_str().map(str::to_owned)
    });
    let stream = links.into_iter().find(|link| link.starts_with("socket:["));
    let stream = stream.ok_or_else(|| run.fail("it has no socket".to_owned()))?;
    run.dump(tool, &images, &["--external", one, "--external", other])?;
    run.gone(&before.pids(), "after the dump")?;

    let (given, mut kept) = UnixStream::pair().map_err(|e| e.to_string())?;
    const NUMBER: i32 = 200;
    let inherit = format!("fd[{NUMBER}]:{stream}");
    let options = ["--ext-unix-sk", "--inherit-fd", &inherit];
    let missing = run.try_restore(tool, &images, &options)?;
    refused(&run, &missing, &[&inherit, "is not open"])?;
    let number = given.as_raw_fd();
    run.restore_with(tool, &images, &options, |command| {
        // SAFETY: dup2 is async-signal-safe; the descriptor is open until the command has ended.
        unsafe {
            command.pre_exec(move || match libc::dup2(number, NUMBER) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
    })?;
    drop(given);
    std::thread::spawn(move || {
        let mut data = [0; 64];
        while let Ok(got @ 1..) = kept.read(&mut data) {
            let _ = kept.write_all(&data[..got]);
        }
    });
    run.check(&before)?;
    let got = server.received();
    if got != ["before", "after"] {
        return Err(run.fail(format!("the server has received {got:?}")).into());
    }
    if server.streamed() {
        return Err(run.fail("the stream went to the server all the same".to_owned()).into());
    }
    Ok(())
}

/// What connections have sent before they were accepted cannot be saved without harm where the program lives on; a dump that
/// is refused for another reason does none either.
fn waiting_data_lives_on(tool: &Tool) -> Result<(), NotReady> {
    let (run, before) = started(&by_name("unix_backlog_data")?, Fs::Disk)?;
    let words = ["has sent data on a connection that waits to be accepted", "--skip-in-flight"];
    for option in ["--leave-running", "--leave-stopped"] {
        let images = run.images(1)?;
        refused(&run, &run.try_dump(tool, run.root, &images, &[option])?, &words)?;
        run.same(&before, "after the refused dump", &[])?;
    }
    // There is no room for the memory of the tree: nothing has been taken yet.
    let full = SmallDisk::mount(run.dir.join("small"), 64 << 10).map_err(NotReady::Skip)?;
    let done = run.try_dump(tool, run.root, &full.0, &[])?;
    refused(&run, &done, &["No space left on device"])?;
    drop(full);
    run.same(&before, "after the dump to a full disk", &[])?;
    run.check(&before)?;
    Ok(())
}

fn address_in_use(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = started(&by_name("unix_backlog")?, Fs::Disk)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after the dump")?;
    let path = run.dir.join("server");
    let taken = bind_anew(&path)?;
    let [held, us] = held_by_us();
    let words = [&*path.to_string_lossy(), &held, &us];
    refused(&run, &run.try_restore(tool, &images, &[])?, &words)?;
    tidy(&run)?;
    drop(taken);
    // A file that is no socket is nobody's to replace.
    std::fs::remove_file(&path)
        .and_then(|()| std::fs::write(&path, "mine"))
        .map_err(|e| e.to_string())?;
    refused(&run, &run.try_restore(tool, &images, &[])?, &["no socket", "move the file away"])?;
    tidy(&run)?;
    if std::fs::read(&path).is_ok_and(|text| text == b"mine") {
        std::fs::remove_file(&path).map_err(|e| e.to_string())?;
    } else {
        return Err(run.fail("a file in the way is gone".to_owned()).into());
    }
    run.restore(tool, &images, &[])?;
    tidy(&run)?;
    run.same(&before, "after the restore", &[])?;
    run.check(&before)?;
    Ok(())
}

fn bind_anew(path: &Path) -> Result<UnixListener, Fail> {
    std::fs::remove_file(path).map_err(|e| format!("{}: {e}", path.display()))?;
    UnixListener::bind(path).map_err(|e| format!("{}: {e}", path.display()))
}
