//! `lazy-pages`: bring memory to the tree of a restore with `--lazy-pages`.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use log::Level;
use rewake_engine::PagerOptions;
use rewake_sys::descriptors::inherited;

use crate::args::resolve::LazyPagesJob;
use crate::logging::{self, Failure};
use crate::startup::Place;

/// Serves one restore; 0 when its tree has all its memory, or 1.
pub fn run(job: LazyPagesJob, place: &Place) -> ExitCode {
    let options = PagerOptions {
        images_dir: place.images_dir.clone(),
        work_dir: place.work_dir.clone(),
        verify: job.verify,
        record: job.record,
    };
    let done = if job.daemon { background(&job, place) } else { serve(&job, &options, place) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            logging::failure(&failure);
            logging::milestone(Level::Error, "Lazy pages FAILED.");
            ExitCode::FAILURE
        }
    }
}

fn serve(job: &LazyPagesJob, options: &PagerOptions, place: &Place) -> Result<(), Failure> {
    if let Some(pidfile) = &job.pidfile {
        write_pidfile(pidfile, std::process::id(), place)?;
    }
    let mut status = status(job)?;
    // Whoever waits for more waits for the end of the stream.
    let ready = || {
        let _ = status.take().map(|status| rustix::io::write(&status, &[0]));
    };
    let report = rewake_engine::lazy_pages(options, ready)
        .map_err(|error| super::failed("bring memory", error))?;
    log::info!(
        "{} bytes were touched, {} came in the background",
        report.touched,
        report.background
    );
    logging::milestone(Level::Info, "Lazy pages finished successfully");
    Ok(())
}

/// Starts this command once more, without a terminal, and leaves when it is ready for a restore.
fn background(job: &LazyPagesJob, place: &Place) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure {
        message: format!("lazy-pages does not start in the background: {e}"),
        ..Failure::default()
    };
    let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    // The work directory is entered already: paths are told anew.
    arguments.extend(["--no-daemon".into(), "-D".into(), place.images_dir.clone().into()]);
    arguments.extend(["-W".into(), place.work_dir.clone().into()]);
    if !job.logs {
        arguments.extend(["-o".into(), "lazy-pages.log".into()]);
    }
    let (mut ready, its) = std::io::pipe().map_err(failed)?;
    // This one outlives exec.
    let its = rustix::io::dup(its).map_err(|e| failed(e.into()))?;
    let mut child = Command::new("/proc/self/exe")
        .arg0(std::env::args_os().next().unwrap_or_default())
        .args(&arguments)
        .arg(format!("--status-fd={}", its.as_raw_fd()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    drop(its);
    // It says so, or ends.
    if ready.read(&mut [0]).map_err(failed)? != 1 {
        let _ = child.wait();
        return Err(Failure::new("lazy-pages has failed in the background", "its log says why"));
    }
    log::info!("process {} waits for a restore", child.id());
    if let Some(status) = status(job)? {
        let _ = rustix::io::write(&status, &[0]);
    }
    Ok(())
}

/// The descriptor that somebody waits for a byte from.
fn status(job: &LazyPagesJob) -> Result<Option<OwnedFd>, Failure> {
    job.status_fd.map(inherited).transpose().map_err(|e| {
        Failure::new(format!("--status-fd: {e}"), "give the number of an open descriptor above 2")
    })
}

fn write_pidfile(path: &std::path::Path, pid: u32, place: &Place) -> Result<(), Failure> {
    let path = place.work_dir.join(path);
    std::fs::File::create_new(&path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, pid.to_string().as_bytes()))
        .map_err(|e| {
            let text = format!("the pidfile {}: {e}", path.display());
            Failure::new(text, "remove it, or name another one with --pidfile")
        })
}
