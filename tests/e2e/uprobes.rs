//! Programs in whose code somebody else has set probes (perf_event_open(2) of the kind `uprobe`).
#![allow(unsafe_code, reason = "perf_event_open")]

use crate::flavours::{finish, started};
use crate::harness::{Fail, Fs, NotReady, Run, Tool};
use crate::programs::by_name;
use crate::refusals::{no_inventory, refused};
use crate::{no_excuses, trial_alone};
use libtest_mimic::Trial;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// All trials with probes.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        // Probes are in all processes that have the file.
        all.push(trial_alone(format!("uprobes::{name}"), move || finish(body(&tool))));
    };
    add("gone_at_restore", |tool| goes_on(tool, false));
    add("there_at_restore", |tool| goes_on(tool, true));
    add("of_a_tree_that_runs_on", runs_on);
    add("of_a_return", of_a_return);
    all
}

/// A probe: a counter for each CPU. It goes when this is dropped.
struct Probe(Vec<File>);

impl Probe {
    /// At an offset of the file that `run` executes; at returns of the function there, if `returns`.
    fn set(run: &Run, offset: u64, returns: bool) -> Result<Probe, NotReady> {
        let skip = |why: String| NotReady::Skip(format!("no probes can be set here: {why}"));
        let kind = fs::read_to_string("/sys/bus/event_source/devices/uprobe/type");
        let kind: u64 = kind
            .map_err(|e| skip(e.to_string()))?
            .trim()
            .parse()
            .map_err(|e| format!("the type of uprobe: {e}"))?;
        let path = fs::read_link(format!("/proc/{}/exe", run.root)).map_err(|e| e.to_string())?;
        let path = std::ffi::CString::new(path.into_os_string().into_encoded_bytes())
            .map_err(|e| e.to_string())?;
        // struct perf_event_attr of PERF_ATTR_SIZE_VER5.
        let mut attr = [0u64; 14];
        attr[0] = kind | (size_of_val(&attr) as u64) << 32;
        (attr[1], attr[7], attr[8]) = (u64::from(returns), path.as_ptr() as u64, offset);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let open = |cpu: usize| {
            let (all, none) = (-1, -1);
            // SAFETY: the attributes and the path they point to outlive the call; the descriptor is new, and nobody else's.
            unsafe {
                let fd =
                    libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), all, cpu, none, 8u64);
                (fd >= 0).then(|| File::from(OwnedFd::from_raw_fd(fd as i32)))
            }
            .ok_or_else(std::io::Error::last_os_error)
        };
        let counters = (0..cpus).map(open).collect::<Result<Vec<_>, _>>();
        counters.map(Probe).map_err(|e| skip(e.to_string()))
    }

    fn hits(&self) -> u64 {
        let count = |mut counter: &File| {
            let mut count = [0; 8];
            counter.read_exact(&mut count).map_or(0, |()| u64::from_ne_bytes(count))
        };
        self.0.iter().map(count).sum()
    }

    /// Waits until it is met several times more.
    fn is_met(&self) -> Result<(), Fail> {
        let (first, until) = (self.hits(), Instant::now() + Duration::from_secs(10));
        while self.hits() < first + 5 {
            if Instant::now() > until {
                return Err("nobody comes by the probe".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// Where the functions are that can be probed: two that are called, and one that a thread stays in.
fn offsets(run: &Run) -> Result<[u64; 3], Fail> {
    let text = fs::read_to_string(run.dir.join("offsets")).map_err(|e| format!("offsets: {e}"))?;
    let numbers: Option<Vec<u64>> = text.split_ascii_whitespace().map(|n| n.parse().ok()).collect();
    numbers.and_then(|n| n.try_into().ok()).ok_or_else(|| format!("offsets: {text}"))
}

fn set_both(run: &Run) -> Result<[Probe; 2], NotReady> {
    let [stepped, nothing, _] = offsets(run)?;
    let probes = [Probe::set(run, stepped, false)?, Probe::set(run, nothing, false)?];
    for probe in &probes {
        probe.is_met()?;
    }
    Ok(probes)
}

/// CRIU saves breakpoints with the code.
fn ours_only(tool: &Tool) -> Result<(), NotReady> {
    match tool.is_criu && !no_excuses() {
        true => Err(NotReady::Skip("CRIU saves breakpoints with the code".into())),
        false => Ok(()),
    }
}

fn goes_on(tool: &Tool, there: bool) -> Result<(), NotReady> {
    ours_only(tool)?;
    let program = by_name("probed")?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    for cycle in 1..=3 {
        let mut probes = Some(set_both(&run)?);
        let images = run.images(cycle)?;
        run.dump(tool, &images, program.dump_options)?;
        run.gone(&before.pids(), "after the dump")?;
        probes.take_if(|_| !there);
        run.restore(tool, &images, program.restore_options)?;
        for probe in probes.iter().flatten() {
            probe.is_met().map_err(|e| run.fail(format!("after restore {cycle}: {e}")))?;
        }
    }
    run.check(&before)?;
    Ok(())
}

fn runs_on(tool: &Tool) -> Result<(), NotReady> {
    ours_only(tool)?;
    let program = by_name("probed")?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let probes = set_both(&run)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &["--leave-running"])?;
    for probe in &probes {
        probe.is_met().map_err(|e| run.fail(format!("after the dump: {e}")))?;
    }
    drop(probes);
    run.kill_tree(&before)?;
    run.restore(tool, &images, program.restore_options)?;
    run.check(&before)?;
    Ok(())
}

fn of_a_return(tool: &Tool) -> Result<(), NotReady> {
    ours_only(tool)?;
    let program = by_name("probed")?;
    let (run, _) = started(&program, Fs::Memory)?;
    let probe = Probe::set(&run, offsets(&run)?[2], true)?;
    probe.is_met()?;
    // With the kernel's page.
    let before = run.view()?;
    let images = run.images(1)?;
    let done = run.try_dump(tool, run.root, &images, &[])?;
    let words = ["(probed)", "thread ", "uprobes", "detach"];
    refused(&run, tool, &done, &images.join("dump.log"), &words)?;
    no_inventory(&run, &images)?;
    run.same(&before, "after the refused dump", &program.disturbed(tool))?;
    drop(probe);
    run.check(&before)?;
    Ok(())
}
