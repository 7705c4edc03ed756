//! Both ways with CRIU: what one of the two dumped, the other restores. Runs if `CRIU=path` is given.

use crate::flavours::{Outcome, finish, in_its_net, started, unless_later};
use crate::harness::{Fs, NotReady, Tool};
use crate::programs::Program;

/// Dumps with `from`, restores with `to`, checks; then the other way with the same tree.
pub fn run(program: &Program, from: &Tool, to: &Tool) -> Outcome {
    let done = in_its_net(program, || cross(program, from, to));
    finish(if program.later { unless_later(done) } else { done })
}

fn cross(program: &Program, from: &Tool, to: &Tool) -> Result<(), NotReady> {
    let (mut run, before) = started(program, Fs::Disk)?;
    let images = run.images(1)?;
    let format: &[&str] = if to.is_criu { &["--format", "criu"] } else { &[] };
    run.dump(from, &images, &[program.dump_options, format].concat())?;
    run.gone(&before.pids(), "after dump")?;
    run.restore(to, &images, program.restore_options)?;
    // Whatever CRIU cannot keep is lost whichever side it stands on.
    let criu = if from.is_criu { from } else { to };
    run.same(&before, "after restore by the other", &program.ignored(criu))?;
    program.ask(&run)?;
    run.check(&before)?;
    Ok(())
}
