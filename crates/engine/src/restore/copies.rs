//! `--copies`: several trees from one set of images.
//!
//! All are clones of one [`Template`], made one after the other in the same arena, and held until the last is ready: then all
//! go on, or, if one fails, none ever has.

use super::batches::{hand_over, take_socket};
use super::page_check::{Filling, PageCheck};
use super::template::Template;
use super::undo::Created;
use super::{Run, Standing, addresses};
use crate::error::{Context, Error, Result};
use crate::options::{Hooks, Pid};
use crate::report::RestoreReport;
use rewake_image::ImageDir;
use rewake_inject::ring::Ring;
use rewake_inject::stub::Kind;
use rewake_objects::files::open::Made;
use rewake_objects::files::open::{self, Opener};
use rewake_objects::steps::Steps;
use rewake_proc::read::ProcDir;
use rewake_proc::stat::TaskState;
use rewake_sys::task::CloneArgs;
use rewake_sys::{signal, wait};
use std::time::Instant;

/// The way out where a copy has what only one can have.
pub(super) const SAME_FILES: &str = "copies have the files of this host in common, and only one of them can have this one; restore them one by one, each in a mount namespace with files of its own (unshare --mount, there restore --new-pidns)";

/// How error texts call a template.
const TEMPLATE: &[u8] = b"template";

/// Where the descriptors of the copies come from.
pub struct Files<'i> {
    /// The images.
    pub images: &'i ImageDir,
    /// How they are opened.
    pub options: open::Options,
    /// That of the first copy.
    pub first: Opener<'i>,
}

impl Run<'_> {
    /// Makes `number` copies and lets them go on.
    pub fn copies(
        &mut self,
        template: &Template,
        number: u32,
        files: Files<'_>,
        pages: PageCheck,
        hooks: &mut dyn Hooks,
        created: &mut Created,
    ) -> Result<RestoreReport> {
        let another = || {
            let extra = self.checkpoint.file_extra.clone();
            Opener::new(files.images, files.options.clone(), extra)
        };
        let rules = (0..number)
            .map(|i| addresses::rules(&self.options.addresses, i))
            .collect::<Result<Vec<_>>>()?;
        if !self.options.copy_netns {
            addresses::refuse_conflicts(&mut another()?, &mut another()?, &rules)?;
        }
        let mut warnings = Vec::new();
        let ring = self.arena.ring(template.at, template.len, template.data, Kind::Process);
        let pid = self.fill(template, &ring, &mut another()?, pages, created, &mut warnings)?;
        let mut trees: Vec<Standing> = Vec::new();
        let mut made = Vec::new();
        let mut first = Some(files.first);
        for (i, rules) in rules.iter().enumerate() {
            let begun = Instant::now();
            let extra = || self.checkpoint.file_extra.clone();
            let mut opener = match first.take() {
                Some(opener) => opener,
                None => {
                    let mut opener = Opener::new(files.images, files.options.clone(), extra())?;
                    addresses::replace(&mut opener, rules, self.options)?;
                    opener.check()?;
                    opener
                }
            };
            let of_copy = |e: Error| {
                let of_another = i > 0 && e.contested;
                let e = Error { message: format!("copy {i}: {}", e.message), ..e };
                if of_another { e.hint(SAME_FILES) } else { e }
            };
            let tree = self
                .copy(template, &ring, pid, &mut opener, hooks, created, &mut warnings)
                .map_err(of_copy)?;
            log::info!("copy {i}: root {} after {:?}", tree.root, begun.elapsed());
            trees.push(tree);
            // The descriptors themselves are the copy's by now.
            made.push(opener.into_made());
        }
        end(pid);
        created.pids.retain(|p| *p != pid);
        let list: String = trees.iter().map(|t| format!("{}\n", t.root)).collect();
        let pidfile = self.write_pidfile(&list)?;
        // What cannot be as it was is so in every copy.
        let mut seen = std::collections::HashSet::new();
        warnings.retain(|w| seen.insert(w.clone()));
        let report = self.release(trees, hooks, warnings)?;
        pidfile.keep();
        made.into_iter().for_each(Made::keep);
        Ok(report)
    }

    /// Clones the template and has it fill itself.
    fn fill(
        &self,
        template: &Template,
        ring: &Ring,
        opener: &mut Opener<'_>,
        pages: PageCheck,
        created: &mut Created,
        warnings: &mut Vec<String>,
    ) -> Result<Pid> {
        let of = |e: rewake_inject::Error| Error::new(format!("the template: {e}"));
        ring.load(&template.birth.script).map_err(of)?;
        let args = CloneArgs { exit_signal: libc::SIGCHLD as u64, ..CloneArgs::default() };
        let pid = self.clone_stub(&args, ring, 0)?;
        created.pids.push(pid);
        self.await_template(ring, 1, &template.birth, pid, warnings)?;
        let results = ring.results(&template.birth.script);
        let numbers = [results.u32(template.socket, 0), results.u32(template.socket, 4)];
        take_socket(pid, numbers)
            .and_then(|socket| hand_over(&socket, &template.messages, self.images, opener))
            .map_err(|p| Error::of(pid, TEMPLATE, p))?;
        let checking = pages.start(self.images, Filling::default())?;
        let number = ring.load(&template.build.script).map_err(of)?;
        ring.ring().map_err(of)?;
        self.await_template(ring, number, &template.build, pid, warnings)?;
        checking.finish()?;
        log::info!("template filled after {:?}", self.start.elapsed());
        Ok(pid)
    }

    fn await_template(
        &self,
        ring: &Ring,
        number: u32,
        steps: &Steps,
        pid: Pid,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let gone = |how: &str| rewake_inject::Error::Gone { tid: pid, how: how.into() };
        ring.wait(number, |_| match state(pid) {
            None | Some(TaskState::Zombie) => Err(gone("it died")),
            _ => Ok(()),
        })
        .of(pid, TEMPLATE)?;
        self.check(steps, &ring.results(&steps.script), pid, TEMPLATE, warnings)
    }

    /// Makes one copy ready.
    #[allow(clippy::too_many_arguments, reason = "one call site, all of it needed")]
    fn copy(
        &mut self,
        template: &Template,
        ring: &Ring,
        pid: Pid,
        opener: &mut Opener<'_>,
        hooks: &mut dyn Hooks,
        created: &mut Created,
        warnings: &mut Vec<String>,
    ) -> Result<Standing> {
        let rings = self.load()?;
        let of = |e: rewake_inject::Error| Error::new(format!("the template: {e}"));
        let number = ring.load(&template.clone.script).map_err(of)?;
        ring.ring().map_err(of)?;
        self.await_template(ring, number, &template.clone, pid, warnings)?;
        let results = ring.results(&template.clone.script);
        let first = results.or_zero(template.clone.script.ops.len() - 1) as Pid;
        created.roots.push(first);
        let tree = self.bring_up(first, &rings, opener, None, hooks, created, warnings)?;
        self.await_dead()?;
        Ok(tree)
    }

    /// Waits until all who were born to die have died: nobody may be in a ring that the next copy uses.
    fn await_dead(&self) -> Result<()> {
        for task in self.checkpoint.tasks.iter().filter(|t| t.alive.is_none()) {
            let give_up = Instant::now() + super::PATIENCE;
            while self.pids.outer(task.pid).and_then(state).is_some_and(|s| s != TaskState::Zombie)
            {
                if Instant::now() > give_up {
                    return Err(Error::new(format!("process {} does not die", task.pid)));
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

fn state(pid: Pid) -> Option<TaskState> {
    ProcDir::open(pid).and_then(|dir| dir.stat(&mut Vec::new())).ok().map(|stat| stat.state)
}

/// Ends the template.
fn end(pid: Pid) {
    let _ = signal::kill(pid, libc::SIGKILL);
    let _ = wait::wait(pid);
}
