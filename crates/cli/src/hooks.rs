//! Action scripts: programs of the user that run at each stage of a dump or restore.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use rewake_engine::{Action, Hooks, Pid};
use rustix::fs::{Mode, OFlags};

use crate::logging;

/// The scripts of `--action-script`.
#[derive(Debug)]
pub struct Scripts {
    scripts: Vec<PathBuf>,
    images_dir: PathBuf,
}

impl Scripts {
    /// Scripts in the order they were given.
    pub fn new(scripts: Vec<PathBuf>, images_dir: &Path) -> Self {
        Scripts { scripts, images_dir: images_dir.to_owned() }
    }

    /// Runs one script and waits for it.
    fn run_one(&self, script: &Path, action: Action, root: Option<Pid>) -> Result<(), String> {
        let fail = |text: String| {
            format!("action script {} at {}: {text}", script.display(), action.name())
        };
        // Open while the script runs, so that its number in our /proc/PID/fd means it.
        let images = rustix::fs::open(
            &self.images_dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| fail(format!("cannot open {}: {e}", self.images_dir.display())))?;
        let output =
            || logging::script_output().map_err(|e| fail(format!("cannot share the log: {e}")));
        let mut command = Command::new(script);
        command
            .env("CRTOOLS_SCRIPT_ACTION", action.name())
            .env(
                "CRTOOLS_IMAGE_DIR",
                format!("/proc/{}/fd/{}", std::process::id(), images.as_raw_fd()),
            )
            .stdout(output()?)
            .stderr(output()?);
        match root {
            Some(pid) => command.env("CRTOOLS_INIT_PID", pid.to_string()),
            None => command.env_remove("CRTOOLS_INIT_PID"),
        };
        rewake_sys::probe::bare_descriptors(&mut command);
        log::debug!("running action script {} for {}", script.display(), action.name());
        let status = command.status().map_err(|e| fail(format!("cannot run it: {e}")))?;
        if status.success() { Ok(()) } else { Err(fail(status.to_string())) }
    }
}

impl Hooks for Scripts {
    fn run(&mut self, action: Action, root: Option<Pid>) -> Result<(), String> {
        // The last one added runs first.
        self.scripts.iter().rev().try_for_each(|script| self.run_one(script, action, root))
    }

    fn listens(&self) -> bool {
        !self.scripts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    /// A directory with scripts that write what they see to `seen`.
    fn dir(name: &str, scripts: &[(&str, &str)]) -> (PathBuf, Vec<PathBuf>) {
        let dir = std::env::temp_dir().join(format!("rewake-hooks-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let paths = scripts.iter().map(|(name, body)| {
            let path = dir.join(name);
            fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        });
        let paths = paths.collect();
        (dir, paths)
    }

    #[test]
    fn scripts_see_their_environment_and_nothing_else() {
        // Without O_CLOEXEC, as an unclean parent might leave it to us.
        let stray = rustix::fs::open("/dev/zero", OFlags::RDONLY, Mode::empty()).unwrap();
        let body = r#"{ echo "$CRTOOLS_SCRIPT_ACTION ${CRTOOLS_INIT_PID-none} $#"; ls "$CRTOOLS_IMAGE_DIR"
            ls -l /proc/$$/fd | grep -c zero; [ -e /proc/$$/fd/0 ] && echo stdin; } > "$(dirname "$0")/seen" 2>&1; exit 0"#;
        let (dir, paths) = dir("env", &[("one", body)]);
        let mut scripts = Scripts::new(paths, &dir);
        scripts.run(Action::PreDump, None).unwrap();
        assert_eq!(
            fs::read_to_string(dir.join("seen")).unwrap(),
            "pre-dump none 0\none\nseen\n0\n"
        );
        scripts.run(Action::PostRestore, Some(77)).unwrap();
        assert!(fs::read_to_string(dir.join("seen")).unwrap().starts_with("post-restore 77 0\n"));
        drop(stray);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn the_last_one_runs_first_and_a_failure_ends_it() {
        let body = |code: u32| format!("basename $0 >> $(dirname $0)/seen; exit {code}");
        let (dir, paths) = dir("order", &[("a", &body(0)), ("b", &body(3)), ("c", &body(0))]);
        let error = Scripts::new(paths, &dir).run(Action::PostDump, Some(1)).unwrap_err();
        assert_eq!(fs::read_to_string(dir.join("seen")).unwrap(), "c\nb\n");
        assert!(error.contains("/b at post-dump: exit status: 3"), "{error}");
        let missing = vec![dir.join("missing")];
        let error = Scripts::new(missing, &dir).run(Action::PreDump, None).unwrap_err();
        assert!(error.contains("cannot run it: No such file"), "{error}");
        fs::remove_dir_all(&dir).unwrap();
    }
}
