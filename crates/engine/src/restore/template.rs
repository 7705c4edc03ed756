//! A template for several copies of one tree: a stub that holds the memory of all tasks, filled once, and of which each
//! copy is a clone. Anonymous pages stay shared between the copies until one of them writes.
//!
//! Of a tree of one task the template has the memory where the task wants it. Of several it has it elsewhere, side by side
//! (*staged*): every process of a copy is cloned with all of it, moves its own part to its place (which moves page tables,
//! no pages) and gives the rest back.
//!
//! What copies may not share is not in it: memory shared between tasks, and files that were deleted, of which each copy gets
//! its own.

use super::arena::Space;
use super::build::{self, Environment, Handed};
use super::read::{Alive, Task};
use crate::error::{Error, Result};
use rewake_agent::layout::Op;
use rewake_objects::memory::inherit::Inheritance;
use rewake_objects::memory::mm::{self, Held, Layout, Strings};
use rewake_objects::memory::vma::status;
use rewake_objects::steps::{Label, Steps};
use rewake_objects::task::schedule::lend_timer_slack;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Page tables are moved whole where both places lie alike in their 2 MiB.
const ALIKE: u64 = 2 << 20;

/// What a template holds.
#[derive(Debug)]
pub struct Holdings {
    /// Of each task.
    pub tasks: Vec<Held>,
    /// Where it has vvar and vdso.
    pub specials: Range<u64>,
}

/// Which mappings the template holds, task by task. `is_plain` says whether a file id is that of an ordinary file, and
/// `free` is address space for staging.
///
/// # Errors
/// There is not enough of it.
pub fn holdings(
    tasks: &[Task],
    is_plain: &dyn Fn(u32) -> bool,
    same_vdso: &dyn Fn(&Alive) -> Result<bool>,
    env: &Environment,
    free: Range<u64>,
) -> Result<Holdings> {
    let makes_memory = |(at, task): (usize, &Task)| task.alive.is_some() && task.part.memory == at;
    let in_place = tasks.iter().enumerate().filter(|t| makes_memory(*t)).count() == 1;
    let mut specials = env.specials.span().unwrap_or(0..0);
    let start = free.start.next_multiple_of(ALIKE);
    let mut next = start;
    let mut all = Vec::with_capacity(tasks.len());
    for (at, task) in tasks.iter().enumerate() {
        let mut held = Held { in_place, ..Held::default() };
        if let Some(alive) = task.alive.as_ref().filter(|_| makes_memory((at, task))) {
            let own_vdso = same_vdso(alive)?;
            if in_place {
                let start = mm::specials_place(&env.specials, env.hop, &alive.mm, own_vdso)
                    .map_err(|p| Error::of(task.pid, &task.comm, p))?;
                specials = start..start + (specials.end - specials.start);
            }
            let mut last_end = 0;
            for vma in alive.mm.vmas.iter().filter(|v| mm::is_mapped(v)) {
                let file = build::is_file(vma);
                let plain = u32::try_from(vma.shmid).is_ok_and(is_plain);
                let shared = vma.status & status::ANON_SHARED != 0;
                let vdso = vma.status & status::VDSO != 0 && own_vdso;
                // A clone would have no reservation of its own for these.
                let huge = vma.flags & libc::MAP_HUGETLB as u32 != 0;
                if vdso || shared || huge || (file && !plain) {
                    continue;
                }
                if in_place {
                    held.places.insert(vma.start, vma.start);
                    continue;
                }
                // Neighbours stay neighbours, so that they merge as they did.
                if vma.start != last_end {
                    let ahead = (vma.start % ALIKE + ALIKE - next % ALIKE) % ALIKE;
                    next += ahead;
                }
                held.places.insert(vma.start, next);
                next += vma.end - vma.start;
                last_end = vma.end;
                if next > free.end {
                    return Err(Error::new(
                        "there is no address space for a template of all tasks",
                    ));
                }
            }
        }
        all.push(held);
    }
    let end = next.next_multiple_of(ALIKE);
    for held in all.iter_mut().filter(|_| !in_place && end > start) {
        held.range = Some(start..end);
    }
    Ok(Holdings { tasks: all, specials })
}

/// The scripts of a template.
#[derive(Debug)]
pub struct Template {
    /// Offset of its ring.
    pub at: usize,
    /// Bytes of the ring.
    pub len: usize,
    /// Bytes of data in it.
    pub data: usize,
    /// Empties the address space and makes the socket.
    pub birth: Steps,
    /// Makes and fills memory.
    pub build: Steps,
    /// Clones the first process of a copy.
    pub clone: Steps,
    /// What is handed over, message by message.
    pub messages: Vec<Vec<Handed>>,
    /// Where the numbers of the socket pair are, in the birth script's data.
    pub socket: rewake_inject::ring::Data,
}

/// Plans the template of `tasks`, of which it holds `held`. `first` is the pid of the first process of a copy inside its
/// namespace, `header` the address of its ring, and
/// `slack` its default timer slack.
///
/// # Errors
/// The images ask for something impossible.
pub fn plan(
    tasks: &[Task],
    held: &[Held],
    env: &Environment,
    space: &mut Space,
    same_vdso: &dyn Fn(&Alive) -> Result<bool>,
    (first, header): (i32, u64),
    slack: Option<u64>,
) -> Result<Template> {
    let base = space.next_data_address();
    let mut birth = Steps::new(base);
    build::die_with(&mut birth, Some(std::process::id() as i32));
    build::strip_steps(&mut birth, env);
    // Pages files and an executable for each task, and a file for each mapping at most.
    let stores = tasks.iter().filter_map(|task| task.alive.as_ref()).flat_map(build::pages).count();
    let lent = stores + held.iter().map(|h| h.places.len() + 1).sum::<usize>();
    let number = build::number_beyond(lent, env) as i32;
    let socket = build::socket_steps(&mut birth, number);
    let mut steps = Steps::new(base);
    steps.must(Label::Text("closing the controller's socket"), Op::new(libc::SYS_close, &[1]));
    let (messages, numbers) = lend(tasks, held, &mut steps, number)?;
    for (at, (task, held)) in tasks.iter().zip(held).enumerate() {
        let Some(alive) = task.alive.as_ref().filter(|_| task.part.memory == at) else { continue };
        let of = |p| Error::of(task.pid, &task.comm, p);
        let number = |handed: Handed| numbers.get(&handed).copied().unwrap_or(-1);
        if held.in_place {
            // Before anything is mapped, as in a task.
            let exe = number(Handed::File(alive.mm.exe_file_id));
            mm::restore_map(&mut steps, &alive.mm, exe, Strings::Told);
        }
        let layout = Layout {
            stub: &env.specials,
            hop: env.hop,
            same_vdso: same_vdso(alive)?,
            descriptor: &|vma| build::mapped(vma).map(number),
            pages: &|store| numbers.get(&Handed::Pages(store)).copied(),
            lock_on_fault: &[],
            // No segment has copies.
            segment: &|_| 0,
            held,
            later: None,
            policies: &[],
            aio: &[],
            huge: None,
            inherited: &Inheritance::default(),
        };
        mm::hold(&mut steps, &alive.mm, alive.pages.as_ref(), &layout).map_err(of)?;
    }
    steps.must(
        Label::Text("closing lent descriptors"),
        Op::new(libc::SYS_close_range, &[0, u64::from(u32::MAX), 0]),
    );
    let mut clone = Steps::new(base);
    // A child of ours, not of the template, which ends when all copies are made.
    let flags = env.namespaces.flags() | libc::CLONE_PARENT as u64;
    lend_timer_slack(&mut clone, slack);
    build::clone_op(&mut clone, Some(first), flags, 0, header);
    let scripts = [&birth, &steps, &clone];
    let data = scripts.iter().map(|s| s.script.data_len()).max().unwrap_or(0);
    let ops = scripts.iter().map(|s| s.script.ops.len()).max().unwrap_or(0);
    let (at, len, data) = space.take(data, ops);
    Ok(Template { at, len, data, birth, build: steps, clone, messages, socket })
}

/// What the template is lent: the files behind what it holds, and pages.
#[allow(clippy::type_complexity, reason = "messages, and the numbers their descriptors get")]
fn lend(
    tasks: &[Task],
    held: &[Held],
    steps: &mut Steps,
    socket: i32,
) -> Result<(Vec<Vec<Handed>>, HashMap<Handed, i32>)> {
    let mut list: Vec<Handed> = Vec::new();
    for (at, (task, held)) in tasks.iter().zip(held).enumerate() {
        let Some(alive) = task.alive.as_ref().filter(|_| task.part.memory == at) else { continue };
        list.extend(build::pages(alive));
        if held.in_place {
            list.push(Handed::File(alive.mm.exe_file_id));
        }
        let file = |v: &&_| build::is_file(v);
        let vmas: BTreeMap<u64, _> = alive.mm.vmas.iter().map(|v| (v.start, v)).collect();
        for vma in held.places.keys().filter_map(|start| vmas.get(start)).filter(|v| file(v)) {
            list.push(build::mapped(vma).map_err(|p| Error::of(task.pid, &task.comm, p))?);
        }
    }
    let mut numbers = HashMap::new();
    list.retain(|handed| {
        let next = numbers.len() as i32;
        numbers.insert(*handed, next).is_none_or(|known| {
            numbers.insert(*handed, known);
            false
        })
    });
    let messages: Vec<Vec<Handed>> = list.chunks(build::A_MESSAGE).map(<[_]>::to_vec).collect();
    for message in &messages {
        build::receive(steps, socket, message.len());
    }
    Ok((messages, numbers))
}
