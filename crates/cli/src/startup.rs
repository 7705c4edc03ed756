//! What every command does before its work: environment, capabilities, directories, log — in this order.

use std::io;
use std::path::PathBuf;

use log::Level;
use rewake_engine::Inherited;
use rustix::thread::CapabilitySet;

use crate::args::help::{CRIU_VERSION, VERSION};
use crate::args::resolve::{Common, LogTo};
use crate::args::{ArgError, Kind};
use crate::console;
use crate::logging::{self, Failure};

/// Where the command works; the process is in the work directory now.
#[derive(Debug)]
pub struct Place {
    /// The images directory, absolute.
    pub images_dir: PathBuf,
    /// The work directory, absolute.
    pub work_dir: PathBuf,
}

/// Looks at CRIU's environment variables, and passes on the remarks on configuration files that were skipped.
///
/// # Errors
/// `CRIU_FAULT` asks for something that is not built.
pub fn environment(notes: &mut Vec<(Level, String)>, skipped: Vec<String>) -> Result<(), ArgError> {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if set("CRIU_FAULT") {
        return Err(Kind::NotYet("CRIU_FAULT (fault injection)".into()).argv());
    }
    for (name, why) in [
        ("CRIU_LIBS_DIR", "plugins are not supported yet"),
        ("CRIU_TRACK_SHMEM", "shared memory is always compared with that of parent images"),
        ("CRIU_PMC_OFF", "there is no pagemap cache"),
        ("CR_IP_TOOL", "no helper programs are run"),
        ("CR_IPTABLES", "no helper programs are run"),
    ] {
        if set(name) {
            notes.push((Level::Info, format!("{name} changes nothing: {why}")));
        }
    }
    notes.extend(skipped.into_iter().map(|remark| (Level::Warn, remark)));
    Ok(())
}

/// Closes the descriptors of `--close`.
///
/// # Errors
/// One is not open, or a standard stream.
pub fn close(numbers: &[i32]) -> Result<(), ArgError> {
    for number in numbers {
        drop(rewake_sys::descriptors::inherited(*number).map_err(|e| {
            let text = match number {
                0..=2 => format!("--close {number}: standard streams are redirected, not closed"),
                _ => format!("--close {number}: {e}"),
            };
            Kind::Usage(text).argv()
        })?);
    }
    Ok(())
}

/// Checks that the descriptors of `--inherit-fd` are there, while nothing of ours has got their numbers.
///
/// # Errors
/// One is not open.
pub fn inherited(inherited: &Inherited) -> Result<(), ArgError> {
    let mut all: Vec<_> = inherited.iter().map(|(key, number)| (*number, key)).collect();
    all.sort_unstable();
    match all.into_iter().find(|(number, _)| !is_open(*number)) {
        None => Ok(()),
        Some((number, key)) => {
            let text = format!(
                "--inherit-fd fd[{number}]:{}: descriptor {number} is not open",
                console::printable(&String::from_utf8_lossy(key))
            );
            Err(Kind::Usage(text).argv())
        }
    }
}

fn is_open(number: i32) -> bool {
    std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok()
}

/// Checks the capabilities, enters the work directory and opens the log.
///
/// # Errors
/// A capability is missing, a directory does not exist, the log cannot be created.
pub fn start(common: &Common) -> Result<Place, Failure> {
    capabilities(common.unprivileged)?;
    let images_dir = directory(&common.images_dir, "images", "-D")?;
    let work_dir = match &common.work_dir {
        Some(dir) => directory(dir, "work", "-W")?,
        None => images_dir.clone(),
    };
    std::env::set_current_dir(&work_dir).map_err(|e| {
        Failure::new(
            format!("cannot enter the work directory {}: {e}", work_dir.display()),
            "choose another one with -W DIR",
        )
    })?;
    logging::init(&common.log, common.verbosity, common.log_pid).map_err(|e| {
        let name = match &common.log {
            LogTo::File(path) => path.display().to_string(),
            LogTo::Stdout | LogTo::Stderr => String::new(),
        };
        Failure::new(
            format!("cannot create the log file {name}: {e}"),
            &format!(
                "its place is relative to the work directory {}; choose another with -o or -W",
                work_dir.display()
            ),
        )
    })?;
    if log::log_enabled!(Level::Info) {
        let uname = rustix::system::uname();
        log::info!("Version: {CRIU_VERSION} (gitid 0)");
        log::info!("rewake {VERSION}");
        log::info!(
            "Running on {} {} {} {} {}",
            uname.nodename().to_string_lossy(),
            uname.sysname().to_string_lossy(),
            uname.release().to_string_lossy(),
            uname.version().to_string_lossy(),
            uname.machine().to_string_lossy()
        );
    }
    for (level, text) in &common.notes {
        log::log!(*level, "{text}");
    }
    Ok(Place { images_dir, work_dir })
}

/// An existing directory, as an absolute path without links (the process leaves the place the path was relative to).
fn directory(path: &PathBuf, what: &str, option: &str) -> Result<PathBuf, Failure> {
    let found = std::fs::canonicalize(path).and_then(|full| {
        let is_dir = std::fs::metadata(&full)?.is_dir();
        if is_dir { Ok(full) } else { Err(io::Error::from(io::ErrorKind::NotADirectory)) }
    });
    found.map_err(|e| {
        Failure::new(
            format!("cannot open the {what} directory {}: {e}", path.display()),
            &format!("create it first, or choose another one with {option} DIR"),
        )
    })
}

/// Checkpoint and restore need `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN` (capabilities(7)).
fn capabilities(unprivileged: bool) -> Result<(), Failure> {
    let effective = rustix::thread::capabilities(None)
        .map_err(|e| Failure {
            message: format!("cannot read my capabilities: {e}"),
            ..Failure::default()
        })?
        .effective;
    if !effective.intersects(CapabilitySet::CHECKPOINT_RESTORE | CapabilitySet::SYS_ADMIN) {
        return Err(Failure::new(
            "this needs the capability CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, and has neither",
            "run it as root, or give the program the capability: \
             setcap cap_checkpoint_restore+ep PROGRAM, and use --unprivileged",
        ));
    }
    if !rustix::process::geteuid().is_root() && !unprivileged {
        return Err(Failure::new(
            "this runs as an ordinary user, which must be asked for",
            "add --unprivileged (it does what the kernel allows), or run it as root",
        ));
    }
    Ok(())
}
