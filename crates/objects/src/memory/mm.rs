//! The address space as a whole: its layout, and the order in which it is rebuilt.

use super::vma::{self, status};
use super::{PAGE, TASK_SIZE};
use crate::Problem;
use crate::steps::{Label, Steps};
use crate::task::attributes::Attributes;
use rewake_agent::layout::Op;
use rewake_image::messages::{MmEntry, VmaEntry};
use rewake_image::{PageRun, Pagemap};
use rewake_proc::stat::Stat;
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
    /// Descriptor number of the task's pages file.
    pub pages: Option<i32>,
    /// Start addresses of mappings that are locked as they are touched.
    pub lock_on_fault: &'a [u64],
}

/// Is this entry mapped by [`restore`] itself (and not by the kernel, or moved)?
#[must_use]
pub fn is_mapped(entry: &VmaEntry) -> bool {
    entry.status & (status::VSYSCALL | status::GUARD | status::VVAR) == 0
}

/// Checks what a hostile image could do harm with: ranges in order, aligned, in user space, pages inside mappings.
///
/// # Errors
/// What is wrong.
pub fn validate(mm: &MmEntry, pagemap: Option<&Pagemap>) -> Result<(), Problem> {
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
        let unsupported =
            status::SYSVIPC | status::SOCKET | status::AIORING | status::SHSTK | status::UPROBES;
        if vma.status & unsupported != 0 || vma.flags & libc::MAP_HUGETLB as u32 != 0 {
            return bad("mappings of this kind cannot be restored yet");
        }
        last = vma.end;
    }
    let Some(pagemap) = pagemap else { return Ok(()) };
    let mut vmas = mm.vmas.iter().filter(|v| vma::has_private_pages(v)).peekable();
    for run in &pagemap.entries {
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

/// Rebuilds the address space of a task whose stub holds nothing but the agent and the special mappings.
///
/// # Errors
/// The image asks for something impossible.
pub fn restore(
    steps: &mut Steps,
    mm: &MmEntry,
    pagemap: Option<&Pagemap>,
    layout: &Layout<'_>,
) -> Result<(), Problem> {
    move_specials(steps, mm, layout)?;
    let plain_vdso = |v: &VmaEntry| v.status & status::VDSO != 0 && layout.same_vdso;
    let filled: Vec<bool> = touched(mm, pagemap);
    for (vma, filled) in mm.vmas.iter().zip(&filled).filter(|(v, _)| is_mapped(v) && !plain_vdso(v))
    {
        map(steps, vma, *filled, layout)?;
    }
    if let Some(pagemap) = pagemap {
        fill(steps, mm, pagemap, layout)?;
    }
    for (vma, filled) in mm.vmas.iter().zip(&filled).filter(|(v, _)| is_mapped(v) && !plain_vdso(v))
    {
        let (start, len) = (vma.start, vma.end - vma.start);
        let label = Label::Vma(vma.start, vma.end);
        if *filled && vma.prot & libc::PROT_WRITE as u32 == 0 {
            steps.must(label, Op::new(libc::SYS_mprotect, &[start, len, u64::from(vma.prot)]));
        }
        if vma.flags & libc::MAP_LOCKED as u32 != 0 {
            let on_fault = u64::from(layout.lock_on_fault.contains(&start));
            steps.must(label, Op::new(libc::SYS_mlock2, &[start, len, on_fault]));
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
    Ok(())
}

/// Which mappings get pages from the image?
fn touched(mm: &MmEntry, pagemap: Option<&Pagemap>) -> Vec<bool> {
    let runs = pagemap.map_or(&[][..], |p| p.entries.as_slice());
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

/// Brings vvar and vdso to where the image has them, hopping through unused memory where old and new place overlap.
fn move_specials(steps: &mut Steps, mm: &MmEntry, layout: &Layout<'_>) -> Result<(), Problem> {
    let label = Label::Text("moving the vdso");
    let Some(span) = layout.stub.span() else { return Ok(()) };
    let vdso = mm.vmas.iter().find(|v| v.status & status::VDSO != 0);
    let target = match vdso {
        Some(vdso) if layout.same_vdso => {
            let own = layout.stub.vdso.clone().unwrap_or(0..0);
            // vvar keeps its distance from the vdso: code in the vdso reads it relative to itself.
            vdso.start.checked_sub(own.start - span.start).ok_or_else(|| {
                Problem::new("vdso of the image", "there is no room below it for its data")
            })?
        }
        // Without a vdso of the image, or with a foreign one, ours lives where nothing else does.
        _ => layout.hop,
    };
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
    filled: bool,
    layout: &Layout<'_>,
) -> Result<(), Problem> {
    let label = Label::Vma(vma.start, vma.end);
    let len = vma.end - vma.start;
    let is_file = vma.status & (status::FILE_PRIVATE | status::FILE_SHARED) != 0;
    let keep = (libc::MAP_SHARED | libc::MAP_PRIVATE | libc::MAP_GROWSDOWN | libc::MAP_NORESERVE)
        as u32
        | vma::MAP_DROPPABLE;
    let mut flags = vma.flags & keep | libc::MAP_FIXED_NOREPLACE as u32;
    let mut prot = vma.prot;
    if filled {
        prot |= libc::PROT_WRITE as u32;
    }
    let (fd, offset) = if is_file {
        ((layout.descriptor)(vma)?, vma.pgoff)
    } else {
        flags |= libc::MAP_ANONYMOUS as u32;
        (-1, 0)
    };
    let (prot, flags) = (u64::from(prot), u64::from(flags));
    steps.must_be(
        label,
        vma.start as i64,
        Op::new(libc::SYS_mmap, &[vma.start, len, prot, flags, fd as u64, offset]),
    );
    let madv = vma.madv.unwrap_or(0);
    for advice in (0..64u64).filter(|bit| madv & (1 << bit) != 0) {
        steps.must(label, Op::new(libc::SYS_madvise, &[vma.start, len, advice]));
    }
    Ok(())
}

/// `IOV_MAX`.
const RUNS_A_READ: usize = 1024;
/// A read transfers at most 2 GiB less a page.
const BYTES_A_READ: u64 = 1 << 30;

/// Fills private pages from the pages file, as many as fit into each vectored read.
fn fill(
    steps: &mut Steps,
    mm: &MmEntry,
    pagemap: &Pagemap,
    layout: &Layout<'_>,
) -> Result<(), Problem> {
    let vdso = mm
        .vmas
        .iter()
        .find(|v| v.status & status::VDSO != 0 && layout.same_vdso)
        .map_or(0..0, |v| v.start..v.end);
    let mut batch: Vec<(u64, u64)> = Vec::new();
    let mut bytes = 0;
    let mut first_offset = 0;
    let mut flush = |batch: &mut Vec<(u64, u64)>, bytes: &mut u64, offset: u64| {
        let Some(&(start, _)) = batch.first() else { return Ok(()) };
        let fd = layout
            .pages
            .ok_or_else(|| Problem::new("pages file", "the image has pages but no pages file"))?;
        let end = batch.last().map_or(start, |(s, l)| s + l);
        let words: Vec<u64> = batch.iter().flat_map(|(s, l)| [*s, *l]).collect();
        let iov = steps.words(&words);
        steps.must_be(
            Label::Fill(start, end),
            *bytes as i64,
            Op::new(libc::SYS_preadv, &[fd as u64, iov.address, batch.len() as u64, offset, 0]),
        );
        batch.clear();
        *bytes = 0;
        Ok::<(), Problem>(())
    };
    for (run, offset) in pagemap.with_offsets() {
        let PageRun { vaddr, .. } = run;
        let Some(offset) = offset else {
            return Err(Problem::new(
                format!("page {vaddr:#x} of the image"),
                "its contents are in a parent image or at a page server, which is not supported yet",
            ));
        };
        let mut done = 0;
        while done < run.bytes() {
            let address = vaddr + done;
            if vdso.contains(&address) {
                flush(&mut batch, &mut bytes, first_offset)?;
                done += PAGE;
                continue;
            }
            // Not into the vdso, if the run goes on there.
            let stop = if address < vdso.start { vdso.start } else { u64::MAX };
            let len = (run.bytes() - done).min(BYTES_A_READ - bytes).min(stop - address);
            if batch.is_empty() {
                first_offset = offset + done;
            }
            match batch.last_mut() {
                Some((s, l)) if *s + *l == address => *l += len,
                _ => batch.push((address, len)),
            }
            bytes += len;
            done += len;
            if batch.len() == RUNS_A_READ || bytes == BYTES_A_READ {
                flush(&mut batch, &mut bytes, first_offset)?;
            }
        }
    }
    flush(&mut batch, &mut bytes, first_offset)
}

/// Tells the kernel where code, data, heap, stack, arguments and environment lie, and which file is the executable
/// (`PR_SET_MM_MAP`, which needs no capability but `CAP_CHECKPOINT_RESTORE`).
pub fn restore_map(steps: &mut Steps, mm: &MmEntry, exe: i32) {
    const PR_SET_MM: u64 = 35;
    const PR_SET_MM_MAP: u64 = 14;
    let mut auxv = mm.mm_saved_auxv.clone();
    auxv.extend([0, 0]);
    let auxv = steps.words(&auxv);
    let map = [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
        auxv.address,
        auxv.len as u64 | u64::from(exe as u32) << 32,
    ];
    let data = steps.words(&map);
    steps.must(
        Label::Text("setting the layout of the address space (PR_SET_MM_MAP)"),
        Op::new(libc::SYS_prctl, &[PR_SET_MM, PR_SET_MM_MAP, data.address, data.len as u64, 0]),
    );
}
