//! Filling memory that is dense in huge pages: four times as fast as page by page, since the kernel is asked once for 2 MiB.
//!
//! The advice to use huge pages (`MADV_HUGEPAGE`) cannot be taken back from a mapping. So it is given to an area beside, whose
//! pages then move to their place (`UFFDIO_MOVE`, since Linux 6.8), page tables only. No more memory is resident than
//! before: only ranges of which every page is stored are filled so.
//!
//! Of little memory the task reads piece after piece into a small area. If it is much, the area is as large as all of it, and
//! the controller fills it ([`Staged`]), by as many threads as it wants: it has the bytes anyway, to compare them with their
//! checksum. The task waits at a gate meanwhile.

use super::fill::{Piece, fill};
use super::vma::status;
use crate::Problem;
use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::PageStore;
use rewake_image::messages::VmaEntry;
use rewake_sys::userfaultfd::{MOVE, REQUEST_API, REQUEST_MOVE, REQUEST_REGISTER};
use rewake_sys::userfaultfd::{REQUEST_UNREGISTER, USER_MODE_ONLY};

/// A huge page.
pub const HUGE: u64 = 2 << 20;
/// Address space that the area needs, but for its alignment, if the task fills it.
pub const AREA: u64 = 32 << 20;
/// What is worth that the controller fills it.
const MUCH: u64 = 8 << 20;

/// Where the area may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Aligned to a huge page.
    pub start: u64,
    /// Past the last address that is free.
    pub end: u64,
    /// The word at which tasks wait until the controller has filled their areas, if it does that.
    pub gate: Option<u64>,
}

/// The word of a gate: all areas are filled.
pub const OPEN: u32 = 1;
/// The word of a gate: they will never be.
pub const SHUT: u32 = 2;

/// What the controller has to fill before it opens the gate: [`Piece::address`] is in the area.
pub type Staged = Vec<Piece>;

/// `MADV_HUGEPAGE`.
const ADVICE: u64 = libc::MADV_HUGEPAGE as u64;

/// Can pages be moved into this mapping, as it is while it is filled?
fn is_eligible(vma: &VmaEntry) -> bool {
    let plain = status::ANON_PRIVATE | status::REGULAR;
    let rw = (libc::PROT_READ | libc::PROT_WRITE) as u32;
    let never = (libc::MAP_GROWSDOWN | libc::MAP_HUGETLB) as u32;
    vma.status & !status::HEAP == plain
        && vma.prot | libc::PROT_WRITE as u32 == rw
        && vma.flags & never == 0
        && vma.madv.unwrap_or(0) & !(1 << ADVICE) == 0
}

/// The whole huge pages of a piece.
fn inner(piece: &Piece) -> Option<(u64, u64)> {
    let start = piece.address.next_multiple_of(HUGE);
    let end = (piece.address + piece.len) / HUGE * HUGE;
    (start < end).then_some((start, end))
}

fn part(piece: &Piece, start: u64, end: u64) -> Option<Piece> {
    let offset = piece.offset + (start - piece.address);
    (start < end).then_some(Piece { address: start, len: end - start, offset, ..*piece })
}

/// Cuts a piece along the mappings it lies in, which `home` tells.
fn cut<'v>(
    piece: &Piece,
    home: impl Fn(&Piece) -> Option<&'v VmaEntry>,
) -> impl Iterator<Item = (Piece, Option<&'v VmaEntry>)> {
    let past = piece.address + piece.len;
    let mut rest = part(piece, piece.address, past);
    std::iter::from_fn(move || {
        let all = rest.take()?;
        let vma = home(&all);
        let end = vma.map_or(past, |vma| vma.end.min(past));
        rest = part(&all, end, past);
        Some((part(&all, all.address, end)?, vma))
    })
}

/// What [`fill_huge`] leaves to others.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// To be filled page by page.
    pub pieces: Vec<Piece>,
    /// To be filled by the controller, in an area that [`stage`] makes.
    pub staged: Staged,
}

/// Fills what can be filled in huge pages, through an area at `place`. `may` says which mappings hold no pages yet.
///
/// # Errors
/// A page store was not handed over.
pub fn fill_huge(
    steps: &mut Steps,
    vmas: &[VmaEntry],
    pieces: &[Piece],
    place: Place,
    may: impl Fn(&VmaEntry) -> bool,
    pages: &dyn Fn(PageStore) -> Option<i32>,
) -> Result<Left, Problem> {
    let mut left = Left { pieces: Vec::with_capacity(pieces.len()), staged: Vec::new() };
    let mut dense: Vec<(Piece, &VmaEntry)> = Vec::new();
    let home = |piece: &Piece| {
        let at = vmas.partition_point(|vma| vma.end <= piece.address);
        vmas.get(at).filter(|vma| vma.start <= piece.address)
    };
    for (piece, vma) in pieces.iter().flat_map(|piece| cut(piece, home)) {
        let vma = vma.filter(|vma| is_eligible(vma) && may(vma));
        let Some(((start, end), vma)) = inner(&piece).zip(vma) else {
            left.pieces.push(piece);
            continue;
        };
        left.pieces.extend(part(&piece, piece.address, start));
        dense.extend(part(&piece, start, end).map(|inner| (inner, vma)));
        left.pieces.extend(part(&piece, end, piece.address + piece.len));
    }
    let total: u64 = dense.iter().map(|(piece, _)| piece.len).sum();
    if total == 0 {
        return Ok(left);
    }
    let gate = place.gate.filter(|_| total >= MUCH && total <= place.end - place.start);
    if let Some(gate) = gate {
        wait(steps, gate);
    }
    let uffd = begin(steps);
    if gate.is_none() {
        make(steps, place.start, AREA);
    }
    let mut registered: Option<&VmaEntry> = None;
    let mut staged = place.start;
    for (piece, vma) in dense {
        if registered.is_none_or(|before| before.start != vma.start) {
            if let Some(before) = registered.replace(vma) {
                unregister(steps, uffd, before);
            }
            let register = [vma.start, vma.end - vma.start, MISSING, 0];
            request(steps, Label::Vma(vma.start, vma.end), uffd, REQUEST_REGISTER, &register);
        }
        if gate.is_some() {
            relocate(steps, uffd, &piece, staged);
            left.staged.push(Piece { address: staged, ..piece });
            staged += piece.len;
            continue;
        }
        let mut at = piece.address;
        while let Some(chunk) = part(&piece, at, (piece.address + piece.len).min(at + AREA)) {
            fill(steps, &[Piece { address: place.start, ..chunk }], pages)?;
            relocate(steps, uffd, &chunk, place.start);
            at += chunk.len;
        }
    }
    if let Some(last) = registered {
        unregister(steps, uffd, last);
    }
    let len = if gate.is_some() { total } else { AREA };
    let label = Label::Text("giving back an area of huge pages");
    steps.must(label, Op::new(libc::SYS_munmap, &[place.start, len]));
    steps.must(label, Op::new(libc::SYS_close, &[0]).arg_result(0, uffd, 0));
    Ok(left)
}

/// Makes the area that the controller fills.
pub fn stage(steps: &mut Steps, staged: &[Piece]) {
    let (Some(first), Some(last)) = (staged.first(), staged.last()) else { return };
    make(steps, first.address, last.address + last.len - first.address);
}

/// Waits until the controller has filled the area.
fn wait(steps: &mut Steps, gate: u64) {
    let label = Label::Text("waiting for the memory to be filled");
    // A word that has changed already does not block.
    steps.may(label, Op::new(libc::SYS_futex, &[gate, libc::FUTEX_WAIT as u64, 0, 0]));
    // Nobody is woken or moved to another word: this fails (EAGAIN) if the gate is not open.
    let compare = libc::FUTEX_CMP_REQUEUE as u64;
    steps.must(label, Op::new(libc::SYS_futex, &[gate, compare, 0, 0, gate + 4, OPEN.into()]));
}

/// `UFFDIO_REGISTER_MODE_MISSING`.
const MISSING: u64 = 1;

/// Makes a userfaultfd; returns the operation that has its number.
fn begin(steps: &mut Steps) -> u32 {
    let label = Label::Text("making a userfaultfd to move huge pages");
    let flags = libc::O_CLOEXEC as u64 | USER_MODE_ONLY;
    let uffd = steps.must(label, Op::new(libc::SYS_userfaultfd, &[flags])) as u32;
    request(steps, label, uffd, REQUEST_API, &[rewake_sys::userfaultfd::API, MOVE, 0]);
    uffd
}

/// Makes an area of huge pages.
fn make(steps: &mut Steps, area: u64, len: u64) {
    let label = Label::Text("making an area of huge pages");
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let flags = (kind | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE) as u64;
    let map = Op::new(libc::SYS_mmap, &[area, len, prot, flags, u64::MAX, 0]);
    steps.must_be(label, area as i64, map);
    steps.must(label, Op::new(libc::SYS_madvise, &[area, len, ADVICE]));
}

/// Moves pages from the area to their place.
fn relocate(steps: &mut Steps, uffd: u32, to: &Piece, area: u64) {
    let label = Label::Huge(to.address, to.address + to.len);
    // If the kernel holds a page for a moment this fails (EAGAIN), and the restore is tried again.
    request(steps, label, uffd, REQUEST_MOVE, &[to.address, area, to.len, 0, 0]);
}

fn unregister(steps: &mut Steps, uffd: u32, vma: &VmaEntry) {
    let range = [vma.start, vma.end - vma.start];
    request(steps, Label::Vma(vma.start, vma.end), uffd, REQUEST_UNREGISTER, &range);
}

fn request(steps: &mut Steps, label: Label, uffd: u32, request: usize, argument: &[u64]) {
    let argument = steps.words(argument);
    let args = [0, request as u64, argument.address];
    steps.must(label, Op::new(libc::SYS_ioctl, &args).arg_result(0, uffd, 0));
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: PageStore = PageStore { depth: 0, pages_id: 1 };

    fn vma(start: u64, end: u64) -> VmaEntry {
        VmaEntry {
            start,
            end,
            prot: 3,
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
            status: status::ANON_PRIVATE | status::REGULAR,
            ..VmaEntry::default()
        }
    }

    fn piece(address: u64, len: u64) -> Piece {
        Piece { address, len, store: STORE, offset: 0x1000 }
    }

    fn place(gate: Option<u64>) -> Place {
        Place { start: 1 << 40, end: 2 << 40, gate }
    }

    fn left(vmas: &[VmaEntry], pieces: Vec<Piece>) -> (Vec<Piece>, usize) {
        let mut steps = Steps::new(0x1000);
        let left = fill_huge(&mut steps, vmas, &pieces, place(None), |_| true, &|_| Some(3));
        let left = left.expect("a page store");
        assert_eq!(left.staged, []);
        (left.pieces, steps.labels.len())
    }

    #[test]
    fn much_is_left_to_the_controller_without_a_gap() {
        let vmas = [vma(0, 20 * HUGE), vma(20 * HUGE, 40 * HUGE)];
        let pieces = [piece(HUGE - 0x1000, 5 * HUGE + 0x1000), piece(18 * HUGE, 4 * HUGE)];
        let fill = |gate| {
            let mut steps = Steps::new(0x1000);
            let no_store = |_| None;
            fill_huge(&mut steps, &vmas, &pieces, place(gate), |_| true, &no_store)
        };
        let left = fill(Some(0x2000)).expect("the task reads nothing");
        let staged: Vec<_> =
            left.staged.iter().map(|p| (p.address - (1 << 40), p.len, p.offset)).collect();
        assert_eq!(
            staged,
            [
                (0, 5 * HUGE, 0x2000),
                (5 * HUGE, 2 * HUGE, 0x1000),
                (7 * HUGE, 2 * HUGE, 0x1000 + 2 * HUGE)
            ]
        );
        assert_eq!(left.pieces, [piece(HUGE - 0x1000, 0x1000)]);
        assert!(fill(None).is_err(), "without a gate the task reads by itself");
    }

    #[test]
    fn the_ends_of_a_piece_are_left() {
        let vmas = [vma(HUGE - 0x3000, 40 * HUGE)];
        let (left, _) = left(&vmas, vec![piece(HUGE - 0x2000, 20 * HUGE + 0x3000)]);
        let plain: Vec<_> = left.iter().map(|p| (p.address, p.len, p.offset)).collect();
        assert_eq!(
            plain,
            [(HUGE - 0x2000, 0x2000, 0x1000), (21 * HUGE, 0x1000, 0x3000 + 20 * HUGE)]
        );
    }

    #[test]
    fn nothing_is_done_for_what_is_not_dense() {
        let readable = VmaEntry { prot: 4, ..vma(4 * HUGE, 8 * HUGE) };
        let vmas = [vma(0, 4 * HUGE), readable];
        let all = vec![piece(0x1000, 2 * HUGE - 0x2000), piece(4 * HUGE, 4 * HUGE)];
        assert_eq!(left(&vmas, all.clone()), (all, 0));
    }

    #[test]
    fn what_reaches_over_the_end_of_a_mapping_is_cut() {
        let readable = VmaEntry { prot: 4, ..vma(4 * HUGE, 8 * HUGE) };
        let (left, steps) = left(&[vma(0, 4 * HUGE), readable], vec![piece(HUGE, 4 * HUGE)]);
        let plain: Vec<_> = left.iter().map(|p| (p.address, p.len, p.offset)).collect();
        assert_eq!(plain, [(4 * HUGE, HUGE, 0x1000 + 3 * HUGE)]);
        assert!(steps > 0);
    }
}
