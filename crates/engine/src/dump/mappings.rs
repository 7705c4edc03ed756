//! The mappings of a task: from `smaps`, which for many of them takes long, or for the most part from elsewhere.

use super::live::{Before, Glance};
use crate::error::{Context, Result};
use crate::freeze::Task;
use rewake_objects::Problem;
use rewake_objects::iterators::mappings::{self, Area, Codes};
use rewake_objects::memory::vma::{self, Vma};
use rewake_proc::vmflags::VmFlags;
use rewake_sys::memory::Specimens;
use std::collections::HashMap;
use std::sync::OnceLock;
use std::thread;

/// So much of `smaps` is read before another way is looked for, a mapping's part being 0.7 kB: as long as that takes at
/// least to be ready.
const MANY: usize = 600 << 10;
/// Of processes with so many bytes in memory it is not read at all, for it counts them page by page.
const LARGE: u64 = 128 << 20;
/// The same where the other way is ready.
const LARGE_IF_READY: u64 = 8 << 20;

/// Mappings.
#[derive(Debug)]
pub struct Mappings {
    /// All that can be saved, ascending.
    pub vmas: Vec<Vma>,
    /// Do they tell which pages are shared copy-on-write ([`Vma::readable`])?
    pub tell_shared: bool,
}

/// Looks at the mappings of a task that stands still, with `resident` bytes in memory.
///
/// # Errors
/// The task is gone.
pub fn survey(
    task: &Task,
    resident: u64,
    before: Before<'_>,
    buffer: &mut Vec<u8>,
    problems: &mut Vec<Problem>,
) -> Result<Mappings> {
    let (pid, tid, comm, dir) = (task.pid(), task.tid(), task.comm(), &task.dir);
    if !matches!(before, Before::Unseen) {
        let maps = dir.read("maps", buffer).of(pid, comm)?;
        if let Some(Ok(vmas)) =
            before.glance(task, |glance| at_a_glance(tid, glance, maps, problems))
        {
            before.set_exact(task);
            return Ok(Mappings { vmas, tell_shared: true });
        }
        if let Some(Some(text)) = before.glance(task, |glance| glance.of(maps)) {
            let vmas = vma::survey(&text, problems).of(pid, comm)?;
            return Ok(Mappings { vmas, tell_shared: true });
        }
    }
    if resident >= if mappings::is_ready() { LARGE_IF_READY } else { LARGE } {
        match quickly(task, b"", problems) {
            Ok(mappings) => return Ok(mappings),
            Err(e) => log::debug!("process {pid}: smaps is read: {e}"),
        }
    }
    let mut vmas = None;
    let mut enough = |text: &[u8]| {
        if vmas.is_some() || text.len() < MANY {
            return false;
        }
        let found = quickly(task, text, problems);
        vmas = Some(found.inspect_err(|e| log::debug!("process {pid}: smaps is read: {e}")));
        matches!(vmas, Some(Ok(_)))
    };
    let text = dir.read_until("smaps", buffer, &mut enough).of(pid, comm)?;
    if let Some(Ok(mappings)) = vmas {
        return Ok(mappings);
    }
    Ok(Mappings { vmas: vma::survey(text, problems).of(pid, comm)?, tell_shared: true })
}

/// Asks the kernel for the flags of all mappings at once; `smaps` is how `smaps` begins.
fn quickly(
    task: &Task,
    smaps: &[u8],
    problems: &mut Vec<Problem>,
) -> std::result::Result<Mappings, String> {
    let tid = task.tid();
    let mut text = Vec::new();
    let (areas, maps) = thread::scope(|scope| {
        let areas = thread::Builder::new().spawn_scoped(scope, || mappings::of(tid));
        let maps = task.dir.read("maps", &mut text);
        let areas = areas.map_err(|e| e.to_string())?;
        let areas = areas.join().map_err(|_| "a thread of ours broke down".to_owned())??;
        Ok::<_, String>((areas, maps.map_err(|e| e.to_string())?))
    })?;
    let mut codes = Codes::default();
    codes.learn(whole(smaps), &areas)?;
    let vmas = with_flags(maps, &areas, &mut codes, problems)?;
    let merged = |vma: &Vma| vma.entry.madv.unwrap_or(0) & 1 << libc::MADV_MERGEABLE != 0;
    let tell_shared = areas.iter().all(|area| area.alone) && !vmas.iter().any(merged);
    Ok(Mappings { vmas, tell_shared })
}

/// Asks the kernel for the flags of all mappings, of a process that was seen before.
fn at_a_glance(
    tid: i32,
    glance: &Glance,
    maps: &[u8],
    problems: &mut Vec<Problem>,
) -> std::result::Result<Vec<Vma>, String> {
    let mut codes = glance.codes().cloned().ok_or("its flags were not learned")?;
    let mut vmas = with_flags(maps, &mappings::of(tid)?, &mut codes, problems)?;
    for vma in &mut vmas {
        // Of what is new nobody has counted the pages.
        vma.readable &= glance.is_readable(vma);
    }
    Ok(vmas)
}

/// Those of the text of `maps`, with the flags of `areas`.
fn with_flags(
    maps: &[u8],
    areas: &[Area],
    codes: &mut Codes,
    problems: &mut Vec<Problem>,
) -> std::result::Result<Vec<Vma>, String> {
    let meaning = meaning(codes, areas)?;
    let mut rest = areas.iter();
    let flags = |map: &rewake_proc::maps::Map<'_>| {
        // That of the kernel is everybody's.
        if map.raw_name == b"[vsyscall]" {
            return Some(VmFlags::NONE);
        }
        let area = rest.next().filter(|area| (area.start, area.end) == (map.start, map.end))?;
        let flags = *meaning.get(&area.flags)?;
        let same = |flag, is: bool| flags.contains(flag) == is;
        let fits = same(VmFlags::READ, map.read)
            && same(VmFlags::WRITE, map.write)
            && same(VmFlags::EXEC, map.exec);
        fits.then_some(flags)
    };
    let vmas = vma::survey_maps(maps, flags, problems).map_err(|e| e.to_string())?;
    let mut vmas = vmas.ok_or("not all of its mappings are told as maps has them")?;
    for vma in &mut vmas {
        let at = areas.binary_search_by_key(&vma.entry.start, |area| area.start);
        vma.may_have_pages = at.map_or(true, |at| areas[at].has_pages);
    }
    Ok(vmas)
}

/// Without the mapping at the end that may not be there as a whole.
fn whole(smaps: &[u8]) -> &[u8] {
    const LAST_LINE: &[u8] = b"\nVmFlags:";
    let last = smaps.windows(LAST_LINE.len()).rposition(|part| part == LAST_LINE);
    let end = |at: usize| Some(at + 1 + smaps[at + 1..].iter().position(|b| *b == b'\n')? + 1);
    match last {
        // Another one may follow that is cut off in its last line.
        Some(at) => match end(at) {
            Some(end) => &smaps[..end],
            None => whole(&smaps[..at]),
        },
        None => &[],
    }
}

/// Does what takes long and is done once.
pub fn get_ready() {
    if let Err(e) = specimens() {
        log::debug!("flags of mappings are read from smaps: {e}");
    }
}

/// What some mappings of our own tell, which are made for that once.
fn specimens() -> std::result::Result<&'static Codes, String> {
    static OWN: OnceLock<std::result::Result<Codes, String>> = OnceLock::new();
    let learn = || {
        let _specimens = Specimens::make();
        let own = mappings::of(std::process::id() as i32)?;
        let text = std::fs::read("/proc/self/smaps").map_err(|e| e.to_string())?;
        let mut codes = Codes::default();
        codes.learn(&text, &own)?;
        Ok(codes)
    };
    OWN.get_or_init(learn).as_ref().map_err(Clone::clone)
}

/// What the flags of all `areas` mean. What the mappings at hand do not tell is learned from some of our own.
fn meaning(
    codes: &mut Codes,
    areas: &[Area],
) -> std::result::Result<HashMap<u64, VmFlags>, String> {
    let mut meaning = HashMap::new();
    let mut learned = false;
    for area in areas {
        if meaning.contains_key(&area.flags) {
            continue;
        }
        let mut flags = codes.flags(area.flags);
        if flags.is_none() && !std::mem::replace(&mut learned, true) {
            codes.add(specimens()?)?;
            flags = codes.flags(area.flags);
        }
        let flags =
            flags.ok_or_else(|| format!("nobody tells what flags {:#x} are", area.flags))?;
        meaning.insert(area.flags, flags);
    }
    Ok(meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_does_not_count() {
        let one = "1000-2000 r--p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd \n";
        let text = one.repeat(2);
        for end in one.len()..text.len() {
            assert_eq!(whole(&text.as_bytes()[..end]).len(), one.len(), "{end}");
        }
        assert_eq!(whole(text.as_bytes()).len(), text.len());
        assert_eq!(whole(&one.as_bytes()[..one.len() - 1]), b"");
    }

    #[test]
    fn rare_flags_are_learned_from_specimens() {
        let _specimens = Specimens::make();
        let Ok(areas) = mappings::of(std::process::id() as i32) else { return };
        drop(_specimens);
        let meaning = meaning(&mut Codes::default(), &areas).unwrap();
        for flag in [VmFlags::DONTDUMP, VmFlags::DONTCOPY, VmFlags::WIPEONFORK, VmFlags::NORESERVE]
        {
            assert!(meaning.values().any(|flags| flags.contains(flag)), "{flag}");
        }
    }
}
