//! Neighbouring mappings that differ in protection only (as stacks and their guards do) are made as one, which is then protected piece by piece: half as many
//! calls, and cheaper ones, than a mapping each.

use super::mm::advices;
use super::vma::status;
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::VmaEntry;

const WRITE: u32 = libc::PROT_WRITE as u32;
const KEEP: u32 = (libc::MAP_PRIVATE | libc::MAP_NORESERVE) as u32;

/// A mapping that is to be made, and whether it will be filled, for which it must be writable.
pub type Wanted<'a> = (&'a VmaEntry, bool);

/// Can the second be made as a piece of the first?
#[must_use]
pub fn joins(first: &VmaEntry, second: &VmaEntry) -> bool {
    first.end == second.start
        && is_plain(first)
        && is_plain(second)
        && first.flags & KEEP == second.flags & KEEP
        && first.madv.unwrap_or(0) == second.madv.unwrap_or(0)
}

/// Is it anonymous private memory without anything that a piece of a larger mapping could not be?
fn is_plain(vma: &VmaEntry) -> bool {
    let flags = KEEP | libc::MAP_ANONYMOUS as u32;
    vma.status & !status::HEAP == status::REGULAR | status::ANON_PRIVATE && vma.flags & !flags == 0
}

fn protection((vma, filled): &Wanted<'_>) -> u32 {
    vma.prot | if *filled { WRITE } else { 0 }
}

/// Makes mappings each of which [`joins`] the one before, as one. `false`, and nothing is done, if they had better be made one
/// by one.
///
/// The one has a protection that cannot be written to: what is writable counts as memory that may be needed, of which the
/// kernel gives only so much at once.
pub fn map(steps: &mut Steps, group: &[Wanted<'_>]) -> bool {
    let ([(first, _), _, ..], Some((last, _))) = (group, group.last()) else { return false };
    let mut counts = [0usize; 8];
    for wanted in group {
        let protection = protection(wanted);
        if protection & WRITE == 0 {
            counts[(protection & 7) as usize] += 1;
        }
    }
    let most = counts.iter().enumerate().max_by_key(|(_, count)| **count);
    let Some((base, 1..)) = most.map(|(base, count)| (base as u32, *count)) else { return false };
    let (start, len) = (first.start, last.end - first.start);
    let flags = first.flags & KEEP | (libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u32;
    steps.must_be(
        Label::Vma(start, last.end),
        start as i64,
        Op::new(libc::SYS_mmap, &[start, len, base.into(), flags.into(), u64::MAX, 0]),
    );
    for advice in advices(first) {
        let args = [start, len, advice];
        steps.must(Label::Vma(start, last.end), Op::new(libc::SYS_madvise, &args));
    }
    for piece in group.chunk_by(|a, b| protection(a) == protection(b)) {
        let ([wanted @ (first, _), ..], Some((last, _))) = (piece, piece.last()) else { continue };
        let protection = protection(wanted);
        if protection != base {
            let args = [first.start, last.end - first.start, protection.into()];
            steps.must(Label::Vma(first.start, last.end), Op::new(libc::SYS_mprotect, &args));
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn vma(at: u64, pages: u64, prot: u32) -> VmaEntry {
        VmaEntry {
            start: at * PAGE,
            end: (at + pages) * PAGE,
            prot,
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
            status: status::REGULAR | status::ANON_PRIVATE,
            ..VmaEntry::default()
        }
    }

    fn calls(group: &[Wanted<'_>]) -> Option<Vec<(i64, [u64; 3])>> {
        let mut steps = Steps::new(0x1000);
        let done = map(&mut steps, group);
        let ops =
            steps.script.ops.iter().map(|op| (op.nr as i64, [op.args[0], op.args[1], op.args[2]]));
        done.then(|| ops.collect())
    }

    #[test]
    fn one_mapping_is_made_and_protected_in_pieces() {
        let all =
            [vma(1, 2, 1), vma(3, 1, 3), vma(4, 1, 1), vma(5, 1, 1), vma(6, 3, 0), vma(9, 1, 3)];
        let filled = [false, true, true, false, false, true];
        assert!(all.windows(2).all(|pair| joins(&pair[0], &pair[1])));
        let group: Vec<Wanted<'_>> = all.iter().zip(filled).collect();
        assert_eq!(
            calls(&group),
            Some(vec![
                (libc::SYS_mmap, [PAGE, 9 * PAGE, 1]),
                // The second and third, which is filled: both writable for now.
                (libc::SYS_mprotect, [3 * PAGE, 2 * PAGE, 3]),
                (libc::SYS_mprotect, [6 * PAGE, 3 * PAGE, 0]),
                (libc::SYS_mprotect, [9 * PAGE, PAGE, 3]),
            ])
        );
    }

    #[test]
    fn advice_is_given_once() {
        let advised = |vma| VmaEntry { madv: Some(1 << 15), ..vma };
        let all = [advised(vma(1, 1, 0)), advised(vma(2, 16, 3)), advised(vma(18, 1, 0))];
        assert!(all.windows(2).all(|pair| joins(&pair[0], &pair[1])));
        assert!(!joins(&all[0], &vma(2, 16, 3)));
        let group: Vec<Wanted<'_>> = all.iter().map(|vma| (vma, false)).collect();
        assert_eq!(
            calls(&group),
            Some(vec![
                (libc::SYS_mmap, [PAGE, 18 * PAGE, 0]),
                (libc::SYS_madvise, [PAGE, 18 * PAGE, 15]),
                (libc::SYS_mprotect, [2 * PAGE, 16 * PAGE, 3]),
            ])
        );
    }

    #[test]
    fn memory_that_counts_is_not_asked_for_at_once() {
        let all = [vma(1, 1, 3), vma(2, 1, 7)];
        let group: Vec<Wanted<'_>> = all.iter().zip([true, false]).collect();
        assert_eq!(calls(&group), None);
        assert_eq!(calls(&group[..1]), None);
    }

    #[test]
    fn what_is_special_stands_alone() {
        let plain = vma(1, 1, 1);
        assert!(!joins(&plain, &vma(3, 1, 1)), "there is a gap");
        for special in [
            VmaEntry { madv: Some(1 << 14), ..vma(2, 1, 1) },
            VmaEntry { flags: plain.flags | libc::MAP_GROWSDOWN as u32, ..vma(2, 1, 1) },
            VmaEntry { flags: plain.flags | libc::MAP_LOCKED as u32, ..vma(2, 1, 1) },
            VmaEntry { flags: plain.flags | libc::MAP_NORESERVE as u32, ..vma(2, 1, 1) },
            VmaEntry { status: status::REGULAR | status::FILE_PRIVATE, ..vma(2, 1, 1) },
            VmaEntry { status: plain.status | status::VDSO, ..vma(2, 1, 1) },
        ] {
            assert!(!joins(&plain, &special), "{special:?}");
        }
    }
}
