//! The address space as a whole: its layout, and the order in which it is rebuilt.

use super::fill::{fill, pieces};
use super::huge::{self, Staged, fill_huge};
use super::inherit::Inheritance;
use super::vma::{self, status};
use super::{PAGE, TASK_SIZE, aio, hugetlb, numa, together};
use crate::Problem;
use crate::steps::{Label, Steps};
use crate::task::attributes::Attributes;
use rewake_agent::layout::Op;
use rewake_image::messages::{MmEntry, RewakePolicyEntry, VmaEntry};
use rewake_image::{PageStore, StoredPages};
use rewake_proc::stat::Stat;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

/// The image's entry, still without mappings and exe.
#[must_use]
pub fn survey(stat: &Stat, attributes: &Attributes, auxv: &[u8]) -> MmEntry {
    let mut words: Vec<u64> = auxv
        .chunks_exact(8)
        .map(|c| u64::from_ne_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]))
        .collect();
    // The kernel gives its whole array; what follows the AT_NULL pair is nothing.
    if let Some(end) = words.chunks(2).position(|pair| pair[0] == 0) {
        words.truncate(end * 2);
    }
    MmEntry {
        mm_start_code: stat.start_code,
        mm_end_code: stat.end_code,
        mm_start_data: stat.start_data,
        mm_end_data: stat.end_data,
        mm_start_stack: stat.start_stack,
        mm_start_brk: stat.start_brk,
        mm_brk: attributes.brk,
        mm_arg_start: stat.arg_start,
        mm_arg_end: stat.arg_end,
        mm_env_start: stat.env_start,
        mm_env_end: stat.env_end,
        exe_file_id: 0,
        mm_saved_auxv: words,
        vmas: Vec::new(),
        dumpable: Some(attributes.dumpable),
        aios: Vec::new(),
        thp_disabled: Some(attributes.thp_disable & 1 != 0),
    }
}

/// The kernel's special mappings of a process, as address ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Specials {
    /// `[vvar]` and, where the kernel has it, `[vvar_vclock]`, in address order.
    pub vvar: Vec<Range<u64>>,
    /// `[vdso]`.
    pub vdso: Option<Range<u64>>,
}

impl Specials {
    /// Finds them in the text of `/proc/PID/maps`.
    ///
    /// # Errors
    /// The text is not what the kernel writes.
    pub fn find(maps: &[u8]) -> Result<Specials, rewake_proc::ParseError> {
        use rewake_proc::maps::MapName;
        let mut specials = Specials::default();
        for map in rewake_proc::maps::parse(maps) {
            let map = map?;
            match map.name() {
                MapName::Vdso => specials.vdso = Some(map.start..map.end),
                MapName::Vvar | MapName::VvarVclock => specials.vvar.push(map.start..map.end),
                _ => {}
            }
        }
        Ok(specials)
    }

    /// From the first to the last byte of all of them.
    #[must_use]
    pub fn span(&self) -> Option<Range<u64>> {
        let vdso = self.vdso.clone()?;
        let start = self.vvar.iter().map(|r| r.start).chain([vdso.start]).min()?;
        let end = self.vvar.iter().map(|r| r.end).chain([vdso.end]).max()?;
        Some(start..end)
    }

    fn parts(&self) -> impl Iterator<Item = Range<u64>> {
        self.vvar.iter().cloned().chain(self.vdso.clone())
    }
}

/// Everything that rebuilding one address space needs besides its images.
pub struct Layout<'a> {
    /// The stub's own special mappings.
    pub stub: &'a Specials,
    /// An unused range in both address spaces, as large as the special mappings, to hop through.
    pub hop: u64,
    /// Is the dumped vdso the same as this kernel's?
    pub same_vdso: bool,
    /// Descriptor number, inside the task, of the file behind a mapping.
    pub descriptor: &'a dyn Fn(&VmaEntry) -> Result<i32, Problem>,
    /// Size in bytes of a System V shared memory segment.
    pub segment: &'a dyn Fn(u64) -> u64,
    /// Descriptor number, inside the task, of a pages file.
    pub pages: &'a dyn Fn(PageStore) -> Option<i32>,
    /// Start addresses of mappings that are locked as they are touched.
    pub lock_on_fault: &'a [u64],
    /// What the task has already, from the template it was cloned from.
    pub held: &'a Held,
    /// Pages that come only when the task runs.
    pub later: Option<&'a StoredPages>,
    /// NUMA policies of mappings.
    pub policies: &'a [RewakePolicyEntry],
    /// Contexts of asynchronous I/O.
    pub aio: &'a [aio::Saved],
    /// A free place through which dense memory is filled in huge pages, if that may be.
    pub huge: Option<huge::Place>,
    /// What the task has already, from the task that cloned it.
    pub inherited: &'a Inheritance,
}

/// The mappings of a task that a template holds, filled, when it clones the task: where they start, and where the template
/// has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// By start address.
    pub places: BTreeMap<u64, u64>,
    /// They are where the task wants them, and so is the vdso.
    pub in_place: bool,
    /// Where they are otherwise, and those of other tasks: the task gives it back.
    pub range: Option<Range<u64>>,
}

impl Held {
    fn place(&self, vma: &VmaEntry) -> Option<u64> {
        self.places.get(&vma.start).copied()
    }
}

/// Is this an advice about clones? What a template holds gets it only once there are no more clones to come.
pub(super) fn is_for_clones(advice: u64) -> bool {
    advice == libc::MADV_DONTFORK as u64 || advice == libc::MADV_WIPEONFORK as u64
}

/// Is this entry mapped by [`restore`] itself (and not by the kernel, or moved)?
#[must_use]
pub fn is_mapped(entry: &VmaEntry) -> bool {
    // Rings of io_uring are mapped when all else is there.
    let special = status::VSYSCALL | status::GUARD | status::VVAR;
    entry.status & (special | status::EXT_PLUGIN | status::AIORING) == 0
}

/// Checks what a hostile image could do harm with: ranges in order, aligned, in user space, pages inside mappings.
///
/// # Errors
/// What is wrong.
pub fn validate(mm: &MmEntry, pages: Option<&StoredPages>) -> Result<(), Problem> {
    let mut last = PAGE;
    for vma in mm.vmas.iter().filter(|v| v.status & (status::VSYSCALL | status::GUARD) == 0) {
        let bad = |reason: &str| {
            Err(Problem::new(
                format!("mapping {:#x}-{:#x} of the image", vma.start, vma.end),
                reason,
            ))
        };
        if vma.start % PAGE != 0 || vma.end % PAGE != 0 || vma.start >= vma.end {
            return bad("its bounds are not those of a mapping");
        }
        if vma.start < last || vma.end > TASK_SIZE {
            return bad("it overlaps another one or lies outside user space");
        }
        if vma.prot & !7 != 0 {
            return bad("it has an unknown protection");
        }
        if vma.pgoff % PAGE != 0 {
            return bad("its file offset is not aligned");
        }
        let unsupported = status::SHSTK | status::UPROBES;
        if vma.status & unsupported != 0 {
            return bad("mappings of this kind cannot be restored yet");
        }
        if let Err(reason) = hugetlb::validate(vma) {
            return bad(reason);
        }
        last = vma.end;
    }
    let Some(pages) = pages else { return Ok(()) };
    let mut vmas = mm.vmas.iter().filter(|v| vma::has_private_pages(v)).peekable();
    for run in &pages.runs {
        let mut at = run.vaddr;
        while at < run.end() {
            while vmas.peek().is_some_and(|v| v.end <= at) {
                vmas.next();
            }
            match vmas.peek() {
                Some(v) if v.start <= at => at = v.end,
                _ => {
                    return Err(Problem::new(
                        format!("page {at:#x} of the image"),
                        "no private mapping of the image holds it",
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Rebuilds the address space of a task whose stub holds nothing but the agent, the special mappings, and what it has from
/// a template. Returns what the controller fills meanwhile.
///
/// # Errors
/// The image asks for something impossible.
pub fn restore(
    steps: &mut Steps,
    mm: &MmEntry,
    pages: Option<&StoredPages>,
    layout: &Layout<'_>,
) -> Result<Staged, Problem> {
    let (held, inherited) = (layout.held, layout.inherited);
    inherited.trim(steps);
    if !held.in_place {
        move_specials(steps, mm, layout)?;
    }
    aio::restore(steps, layout.aio, layout.pages)?;
    // What is filled later is mapped as it once was, too: memory that was never writable is not accounted for.
    let now_and_later = touched(mm, pages).into_iter().zip(touched(mm, layout.later));
    let filled: Vec<bool> = now_and_later.clone().map(|(now, later)| now || later).collect();
    let all_later = mm.vmas.iter().zip(now_and_later).filter(|(_, (now, later))| *later && !now);
    let empty: HashSet<u64> = all_later.map(|(vma, _)| vma.start).collect();
    let mapped = || mm.vmas.iter().zip(&filled).filter(|(v, _)| is_made(v, layout));
    let own: Vec<together::Wanted<'_>> =
        mapped().filter(|(v, _)| !inherited.has(v)).map(|(v, filled)| (v, *filled)).collect();
    let is_new = |vma: &VmaEntry| held.place(vma).is_none();
    let joins = |a: &together::Wanted<'_>, b: &together::Wanted<'_>| {
        together::joins(a.0, b.0) && is_new(a.0) && is_new(b.0)
    };
    for group in own.chunk_by(joins) {
        if together::map(steps, group) {
            continue;
        }
        for (vma, filled) in group {
            match held.place(vma) {
                Some(place) => take(steps, vma, place),
                None => map(steps, vma, vma.start, *filled, layout)?,
            }
        }
    }
    if let Some(range) = &held.range {
        let len = range.end - range.start;
        let back = Op::new(libc::SYS_munmap, &[range.start, len]);
        steps.must(Label::Text("giving back the template's memory"), back);
    }
    // Before any page comes: they are to come from there.
    numa::restore(steps, mm, layout.policies);
    let mut staged = Staged::new();
    if let Some(pages) = pages {
        let want = |vma: &VmaEntry| held.place(vma).is_none().then_some(vma.start);
        staged = fill_own(steps, mm, pages, layout, want)?;
    }
    for (vma, filled) in mapped() {
        if inherited.has(vma) {
            inherited.protect(steps, vma);
        } else if held.place(vma).is_none() {
            if empty.contains(&vma.start) && vma.prot & libc::PROT_WRITE as u32 == 0 {
                touch(steps, vma);
            }
            protect(steps, vma, vma.start, *filled);
        }
    }
    for guard in mm.vmas.iter().filter(|v| v.status & status::GUARD != 0) {
        const MADV_GUARD_INSTALL: u64 = 102;
        let len = guard.end.saturating_sub(guard.start);
        steps.must(
            Label::Vma(guard.start, guard.end),
            Op::new(libc::SYS_madvise, &[guard.start, len, MADV_GUARD_INSTALL]),
        );
    }
    // After the guards, for there are none in locked memory.
    let is_locked = |vma: &VmaEntry| vma.flags & libc::MAP_LOCKED as u32 != 0;
    for (vma, _) in mapped().filter(|(v, _)| is_locked(v)) {
        lock(steps, vma, layout.lock_on_fault.contains(&vma.start));
    }
    Ok(staged)
}

/// Locks memory in two steps: the first does everything that may be refused, the second brings the pages. That one fails
/// where the task has no access, beyond the end of a file and at guard ranges, as it did when the program locked them.
fn lock(steps: &mut Steps, vma: &VmaEntry, on_fault: bool) {
    let label = Label::Vma(vma.start, vma.end);
    let (start, len) = (vma.start, vma.end - vma.start);
    steps.must(label, Op::new(libc::SYS_mlock2, &[start, len, u64::from(libc::MLOCK_ONFAULT)]));
    if !on_fault {
        steps.may(label, Op::new(libc::SYS_mlock, &[start, len]));
    }
}

/// Makes and fills, in a template, what a task will have from it.
///
/// # Errors
/// The image asks for something impossible.
pub fn hold(
    steps: &mut Steps,
    mm: &MmEntry,
    pages: Option<&StoredPages>,
    layout: &Layout<'_>,
) -> Result<(), Problem> {
    let held = layout.held;
    if held.in_place {
        move_specials(steps, mm, layout)?;
    }
    let filled: Vec<bool> = touched(mm, pages);
    let all = mm.vmas.iter().zip(&filled);
    let places: Vec<_> = all.filter_map(|(v, f)| Some((v, held.place(v)?, *f))).collect();
    for (vma, place, filled) in &places {
        map(steps, vma, *place, *filled, layout)?;
    }
    if let Some(pages) = pages {
        fill_own(steps, mm, pages, layout, |vma| held.place(vma))?;
    }
    for (vma, place, filled) in &places {
        protect(steps, vma, *place, *filled);
    }
    Ok(())
}

/// Fills what `place` says, but for the vdso if it is this kernel's, and rings of asynchronous I/O.
fn fill_own(
    steps: &mut Steps,
    mm: &MmEntry,
    pages: &StoredPages,
    layout: &Layout<'_>,
    place: impl Fn(&VmaEntry) -> Option<u64>,
) -> Result<Staged, Problem> {
    let is_own_vdso = |vma: &VmaEntry| vma.status & status::VDSO != 0 && layout.same_vdso;
    let by_others = |vma: &VmaEntry| is_own_vdso(vma) || vma.status & status::AIORING != 0;
    let pieces = pieces(mm, pages, |vma| if by_others(vma) { None } else { place(vma) })?;
    let Some(area) = layout.huge else {
        return fill(steps, &pieces, layout.pages).map(|()| Staged::new());
    };
    let is_empty = |vma: &VmaEntry| place(vma) == Some(vma.start) && !layout.inherited.has(vma);
    let left = fill_huge(steps, &mm.vmas, &pieces, area, is_empty, layout.pages)?;
    fill(steps, &left.pieces, layout.pages)?;
    Ok(left.staged)
}

/// Is this mapping made by us? The vdso is not, if it is this kernel's.
fn is_made(vma: &VmaEntry, layout: &Layout<'_>) -> bool {
    is_mapped(vma) && !(vma.status & status::VDSO != 0 && layout.same_vdso)
}

/// Brings a mapping from where the template has it to its own place.
fn take(steps: &mut Steps, vma: &VmaEntry, place: u64) {
    let (label, len) = (Label::Vma(vma.start, vma.end), vma.end - vma.start);
    if place != vma.start {
        let args = [place, len, len, MREMAP_FIXED_MAYMOVE, vma.start];
        steps.must_be(label, vma.start as i64, Op::new(libc::SYS_mremap, &args));
    }
    for advice in advices(vma).filter(|a| is_for_clones(*a)) {
        steps.must(label, Op::new(libc::SYS_madvise, &[vma.start, len, advice]));
    }
}

/// Has a page come and go in memory that is empty so far: what nobody has ever written to is not accounted for any more (`ac` in
/// smaps) once it may not be written to.
fn touch(steps: &mut Steps, vma: &VmaEntry) {
    let label = Label::Vma(vma.start, vma.end);
    for advice in [libc::MADV_POPULATE_WRITE, libc::MADV_DONTNEED] {
        steps.must(label, Op::new(libc::SYS_madvise, &[vma.start, PAGE, advice as u64]));
    }
}

/// Takes away the permission to write that filling needed.
fn protect(steps: &mut Steps, vma: &VmaEntry, place: u64, filled: bool) {
    if filled && vma.prot & libc::PROT_WRITE as u32 == 0 {
        let args = [place, vma.end - vma.start, u64::from(vma.prot)];
        steps.must(Label::Vma(vma.start, vma.end), Op::new(libc::SYS_mprotect, &args));
    }
}

pub(super) fn advices(vma: &VmaEntry) -> impl Iterator<Item = u64> {
    let madv = vma.madv.unwrap_or(0);
    (0..64u64).filter(move |bit| madv & (1 << bit) != 0)
}

/// Which mappings get pages from the image?
fn touched(mm: &MmEntry, pages: Option<&StoredPages>) -> Vec<bool> {
    let runs = pages.map_or(&[][..], |p| p.runs.as_slice());
    let mut next = 0;
    mm.vmas
        .iter()
        .map(|vma| {
            while next < runs.len() && runs[next].end() <= vma.start {
                next += 1;
            }
            vma::has_private_pages(vma) && runs.get(next).is_some_and(|r| r.vaddr < vma.end)
        })
        .collect()
}

const MREMAP_FIXED_MAYMOVE: u64 = 3;

/// Where the first of the special mappings is in a task: where the image has it, or, without a vdso of the image or with a
/// foreign one, where nothing else is.
///
/// # Errors
/// The image has the vdso where there is no room for its data.
pub fn specials_place(
    stub: &Specials,
    hop: u64,
    mm: &MmEntry,
    same_vdso: bool,
) -> Result<u64, Problem> {
    let (Some(span), Some(own)) = (stub.span(), &stub.vdso) else { return Ok(hop) };
    match mm.vmas.iter().find(|v| v.status & status::VDSO != 0) {
        // vvar keeps its distance from the vdso: code in the vdso reads it relative to itself.
        Some(vdso) if same_vdso => {
            vdso.start.checked_sub(own.start - span.start).ok_or_else(|| {
                Problem::new("vdso of the image", "there is no room below it for its data")
            })
        }
        _ => Ok(hop),
    }
}

/// Brings vvar and vdso to where the image has them, hopping through unused memory where old and new place overlap.
fn move_specials(steps: &mut Steps, mm: &MmEntry, layout: &Layout<'_>) -> Result<(), Problem> {
    let label = Label::Text("moving the vdso");
    let Some(span) = layout.stub.span() else { return Ok(()) };
    let target = specials_place(layout.stub, layout.hop, mm, layout.same_vdso)?;
    if target == span.start {
        return Ok(());
    }
    let len = span.end - span.start;
    let overlap = target < span.end && span.start < target + len;
    let mut from = span.start;
    let mut hops = vec![target];
    if overlap {
        hops.insert(0, layout.hop);
    }
    for to in hops {
        for part in layout.stub.parts() {
            let (offset, size) = (part.start - span.start, part.end - part.start);
            steps.must(
                label,
                Op::new(
                    libc::SYS_mremap,
                    &[from + offset, size, size, MREMAP_FIXED_MAYMOVE, to + offset],
                ),
            );
        }
        from = to;
    }
    Ok(())
}

fn map(
    steps: &mut Steps,
    vma: &VmaEntry,
    place: u64,
    filled: bool,
    layout: &Layout<'_>,
) -> Result<(), Problem> {
    let label = Label::Vma(vma.start, vma.end);
    let len = vma.end - vma.start;
    let files = status::FILE_PRIVATE | status::FILE_SHARED | status::SOCKET;
    let is_file = vma.status & files != 0;
    let keep = (libc::MAP_SHARED | libc::MAP_PRIVATE | libc::MAP_GROWSDOWN | libc::MAP_NORESERVE)
        as u32
        | vma::MAP_DROPPABLE;
    let mut flags = vma.flags & keep | libc::MAP_FIXED_NOREPLACE as u32;
    let mut prot = vma.prot;
    if filled {
        prot |= libc::PROT_WRITE as u32;
    }
    if vma.status & status::SYSVIPC != 0 {
        super::sysv::attach(steps, vma, (layout.segment)(vma.shmid))?;
        for advice in advices(vma) {
            steps.must(label, Op::new(libc::SYS_madvise, &[place, len, advice]));
        }
        return Ok(());
    }
    let (fd, offset) = if is_file {
        ((layout.descriptor)(vma)?, vma.pgoff)
    } else {
        flags |= libc::MAP_ANONYMOUS as u32 | hugetlb::mmap_flags(vma);
        (-1, 0)
    };
    let (prot, flags) = (u64::from(prot), u64::from(flags));
    steps.must_be(
        label,
        place as i64,
        Op::new(libc::SYS_mmap, &[place, len, prot, flags, fd as u64, offset]),
    );
    let later = layout.held.place(vma).is_some();
    for advice in advices(vma).filter(|a| !(later && is_for_clones(*a))) {
        steps.must(label, Op::new(libc::SYS_madvise, &[place, len, advice]));
    }
    Ok(())
}

/// Whether the kernel is told where the strings are that everybody may read in /proc/PID/cmdline and environ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strings {
    /// Yes.
    Told,
    /// Not yet, for they come later: reading what is not registered yet would make pages of zeros there, and the content
    /// would never come. [`restore_strings`] follows.
    Withheld,
}

/// Tells the kernel where code, data, heap, stack, arguments and environment lie, and which file is the executable
/// (`PR_SET_MM_MAP`, which needs no capability but `CAP_CHECKPOINT_RESTORE`).
pub fn restore_map(steps: &mut Steps, mm: &MmEntry, exe: i32, strings: Strings) {
    let mut auxv = mm.mm_saved_auxv.clone();
    auxv.extend([0, 0]);
    let (arguments, environment) = match strings {
        Strings::Told => ([mm.mm_arg_start, mm.mm_arg_end], [mm.mm_env_start, mm.mm_env_end]),
        Strings::Withheld => ([mm.mm_arg_start; 2], [mm.mm_env_start; 2]),
    };
    set_map(steps, mm, [arguments, environment], &auxv, exe);
}

/// Tells the kernel where arguments and environment lie, after [`restore_map`] withheld it.
pub fn restore_strings(steps: &mut Steps, mm: &MmEntry) {
    let places = [[mm.mm_arg_start, mm.mm_arg_end], [mm.mm_env_start, mm.mm_env_end]];
    set_map(steps, mm, places, &[], -1);
}

/// An empty `auxv` and the executable -1 stay as they are.
fn set_map(steps: &mut Steps, mm: &MmEntry, strings: [[u64; 2]; 2], auxv: &[u64], exe: i32) {
    const PR_SET_MM: u64 = 35;
    const PR_SET_MM_MAP: u64 = 14;
    let [[arg_start, arg_end], [env_start, env_end]] = strings;
    let auxv = match auxv {
        [] => [0, 0],
        _ => {
            let auxv = steps.words(auxv);
            [auxv.address, auxv.len as u64]
        }
    };
    let map = [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        arg_start,
        arg_end,
        env_start,
        env_end,
        auxv[0],
        auxv[1] | u64::from(exe as u32) << 32,
    ];
    let data = steps.words(&map);
    steps.must(
        Label::Text("setting the layout of the address space (PR_SET_MM_MAP)"),
        Op::new(libc::SYS_prctl, &[PR_SET_MM, PR_SET_MM_MAP, data.address, data.len as u64, 0]),
    );
}
