//! Files whose state others have a say in: locks.

use crate::flavours::{finish, started};
use crate::harness::{Fs, NotReady, Tool};
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
