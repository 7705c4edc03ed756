//! Lazy restore: the tree runs at once, and its memory comes when it is touched, or else in the background.
//!
//! * The restore has each task wait for its pages (`objects::memory::lazy`) and tells the pager of it ([`client`], [`wire`]).
//! * The **pager** is a process of its own: `rewake lazy-pages`, which waits for a restore as CRIU's does and works with
//!   CRIU's too, or one that the restore starts itself. [`pager`] is its work, [`space`] one address space, [`missing`] what
//!   that lacks, [`background`] the threads that bring the rest, [`stores`] the images.
//! * The [`guard`] ends the tree if the pager dies.
//! * [`working_set`]: what came first once comes first the next time.

mod background;
pub(crate) mod client;
pub mod guard;
mod missing;
mod pager;
mod space;
mod stores;
mod wire;
mod working_set;

use crate::error::{Error, Result};
use crate::peer::is_ours;
use guard::Guard;
use pager::{How, Pager};
use rewake_image::{ImageDir, OpenOptions};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use stores::Stores;

/// Options of a pager.
#[derive(Debug, Clone)]
pub struct PagerOptions {
    /// Directory the images come from (`-D`).
    pub images_dir: PathBuf,
    /// Directory of the socket (`-W`).
    pub work_dir: PathBuf,
    /// Not `--no-verify`.
    pub verify: bool,
    /// `--record-working-set`.
    pub record: bool,
}

/// What a pager has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PagerReport {
    /// Bytes that came because they were touched, with what lay around them.
    pub touched: u64,
    /// Bytes that came in the background.
    pub background: u64,
}

/// Waits for a restore on the socket in the work directory, and serves its tree until that has all its memory. `ready` is
/// called when a restore may begin.
///
/// # Errors
/// The images are damaged, the restore fails, pages cannot be brought: the tree is ended then.
pub fn lazy_pages(options: &PagerOptions, ready: impl FnOnce()) -> Result<PagerReport> {
    let stores = open(options)?;
    let socket = Socket::listen(&options.work_dir)?;
    ready();
    let connection = loop {
        match rustix::net::accept_with(&socket.listener, SocketFlags::CLOEXEC) {
            Ok(connection) if is_ours(connection.as_fd()) == Ok(true) => break connection,
            Ok(_) => {
                log::warn!("somebody else's connection to {} is refused", socket.path.display())
            }
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(e) => return Err(Error::new(format!("{}: {e}", socket.path.display()))),
        }
    };
    // One restore; a second one finds nobody.
    drop(socket);
    serve(options, &stores, connection.as_fd(), false)
}

/// What `rewake pager DIR` does: it serves the restore that has started it, whose end of the connection is its standard
/// input.
#[must_use]
pub fn pager(arguments: &[OsString]) -> ExitCode {
    let stdin = std::io::stdin();
    let connection = stdin.as_fd();
    let Some(dir) = arguments.first() else { return ExitCode::FAILURE };
    if rustix::net::sockopt::socket_type(connection) != Ok(SocketType::STREAM) {
        return ExitCode::FAILURE;
    }
    let _ = rustix::thread::set_name(c"rewake-pager");
    let _ = rustix::process::setsid();
    let has = |option: &str| arguments.iter().any(|argument| argument == option);
    let options = PagerOptions {
        images_dir: dir.into(),
        work_dir: PathBuf::new(),
        verify: !has("--no-verify"),
        record: has("--record-working-set"),
    };
    let done = open(&options).and_then(|stores| serve(&options, &stores, connection, true));
    let text = match &done {
        Ok(PagerReport { touched, background }) => {
            format!(
                "all memory is there: {touched} bytes were touched, {background} came in the background\n"
            )
        }
        Err(e) => {
            let hint = e.hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default();
            format!(
                "the memory of the restored tree cannot be brought, the tree is ended: {e}{hint}\n"
            )
        }
    };
    let _ = rustix::io::write(std::io::stderr(), format!("rewake: {text}").as_bytes());
    if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn open(options: &PagerOptions) -> Result<Stores> {
    let how = OpenOptions { verify: options.verify, ..OpenOptions::default() };
    let images = ImageDir::open_with(&options.images_dir, how)?.with_parents()?;
    Ok(Stores::new(images))
}

fn serve(
    options: &PagerOptions,
    stores: &Stores,
    connection: BorrowedFd<'_>,
    own: bool,
) -> Result<PagerReport> {
    // Two descriptors a process.
    let _ = rewake_sys::descriptors::make_room(1 << 20);
    let mut guard = Guard::start()?;
    let done = attend(options, stores, connection, &mut guard, own);
    match done {
        Ok(report) => {
            guard.done();
            Ok(report)
        }
        Err(e) => {
            guard.end_tree();
            guard.done();
            Err(e)
        }
    }
}

fn attend(
    options: &PagerOptions,
    stores: &Stores,
    connection: BorrowedFd<'_>,
    guard: &mut Guard,
    own: bool,
) -> Result<PagerReport> {
    let wanted = working_set::read(&options.images_dir).unwrap_or_else(|e| {
        log::warn!("{e}");
        Vec::new()
    });
    let how = How { own, record: options.record };
    let mut pager = Pager::new(stores, connection, guard, how, wanted)?;
    let report = pager.run()?;
    if own {
        // The restore may still be there, and is not to think that we have died.
        let _ = rustix::io::write(connection, b".");
    }
    if options.record {
        pager.order().write(&options.images_dir)?;
        log::info!("the working set of {} bytes is noted", pager.order().bytes());
    }
    // Only now: the program has waited for its pages, nobody for this.
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    stores.images().raw_check()?.run(workers)?;
    Ok(report)
}

/// The listening socket, whose file is gone when this is dropped.
struct Socket {
    listener: OwnedFd,
    path: PathBuf,
}

impl Socket {
    fn listen(dir: &Path) -> Result<Socket> {
        let path = dir.join(wire::SOCKET);
        let failed = |e: Errno| Error::new(format!("{}: {e}", path.display()));
        let listener = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed)?;
        let _ = std::fs::remove_file(&path);
        // We are in the work directory: so the address is short enough.
        let address = SocketAddrUnix::new(wire::SOCKET).map_err(failed)?;
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = rustix::net::bind(&listener, &address);
        rustix::process::umask(before);
        bound.map_err(failed)?;
        rustix::net::listen(&listener, 10).map_err(failed)?;
        Ok(Socket { listener, path })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
