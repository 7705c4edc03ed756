//! Memory kept as it was at one instant, of this very process, while its threads write to it.
#![allow(unsafe_code, reason = "a userfaultfd of our own, raw mappings")]
#![allow(clippy::unwrap_used, reason = "a test")]

use rewake_objects::memory::copies::Reserve;
use rewake_objects::memory::early::Early;
use rewake_objects::memory::pages::{CopyError, Run};
use rewake_objects::memory::shield::{FEATURES, FLAGS, Shield};
use rewake_objects::memory::tracking;
use rewake_objects::memory::vma::{self, Vma};
use rewake_sys::userfaultfd::Userfaultfd;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const PAGE: usize = 4096;

/// `None` for those who may not have one.
fn userfaultfd() -> Option<Userfaultfd> {
    made(FLAGS, FEATURES)
}

fn made(flags: u64, features: u64) -> Option<Userfaultfd> {
    // SAFETY: makes a descriptor, which nobody else knows.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        eprintln!("skipped: no userfaultfd: {}", std::io::Error::last_os_error());
        return None;
    }
    // SAFETY: just made.
    let uffd = Userfaultfd::from_fd(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    uffd.enable(features).unwrap();
    Some(uffd)
}

/// Memory of our own, between two pages that cannot be accessed: a mapping of its own.
fn map(pages: usize) -> *mut u8 {
    // SAFETY: a new mapping at an address of the kernel's choice, and changes within it.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let len = (pages + 2) * PAGE;
        let all = libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0);
        assert_ne!(all, libc::MAP_FAILED);
        let p = all.cast::<u8>().add(PAGE);
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(libc::mprotect(p.cast(), pages * PAGE, rw), 0);
        assert_eq!(libc::madvise(p.cast(), pages * PAGE, libc::MADV_NOHUGEPAGE), 0);
        p
    }
}

/// The mapping at an address.
fn vma_of(p: *mut u8) -> Vec<Vma> {
    let text = std::fs::read("/proc/self/smaps").unwrap();
    let mut vmas = vma::survey(&text, &mut Vec::new()).unwrap();
    vmas.retain(|vma| vma.entry.start == p as u64);
    assert_eq!(vmas.len(), 1);
    vmas
}

fn shield(uffd: Option<Userfaultfd>, at_once: u64) -> Arc<Shield> {
    shield_with(uffd, None, at_once)
}

fn shield_with(uffd: Option<Userfaultfd>, early: Option<Early>, at_once: u64) -> Arc<Shield> {
    let memory = Arc::new(File::open("/proc/self/mem").unwrap());
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let reserve = Arc::new(Reserve::new(at_once));
    Arc::new(Shield::new(std::process::id() as i32, memory, pagemap, uffd, early, reserve))
}

fn read(shield: &Shield, run: &Run) -> Result<Vec<u8>, CopyError> {
    let mut bytes = vec![0; (run.end - run.start) as usize];
    // In pieces that are no multiple of what a write keeps.
    for (at, piece) in (run.start..).step_by(7 * PAGE).zip(bytes.chunks_mut(7 * PAGE)) {
        shield.read(&[(at, piece.len())], piece)?;
    }
    Ok(bytes)
}

/// Serves until it is told that all is over.
struct Serving(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl Serving {
    fn begin(shield: &Arc<Shield>) -> Serving {
        let over = Arc::new(AtomicBool::new(false));
        let (shield, seen) = (shield.clone(), over.clone());
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::SeqCst) {
                shield.serve();
                std::thread::yield_now();
            }
        });
        Serving(over, Some(thread))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
        self.1.take().unwrap().join().unwrap();
    }
}

#[test]
fn memory_is_of_one_instant() {
    const PAGES: usize = 1000;
    let Some(uffd) = userfaultfd() else { return };
    let p = map(PAGES) as usize;
    let word = move |page: usize| (p + page * PAGE) as *mut u64;
    // All but the last hundred, which are new when the instant comes.
    // SAFETY: within the mapping.
    (0..PAGES - 100).for_each(|page| unsafe { word(page).write_volatile(1) });
    let shield = shield(Some(uffd), 0);
    shield.register(&vma_of(p as *mut u8));
    let serving = Serving::begin(&shield);
    let (stand, stands, over) =
        (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 1u64;
            while !over.load(Ordering::SeqCst) {
                n += 1;
                let page = (n.wrapping_mul(0x9e37_79b9) % (PAGES as u64 - 50)) as usize;
                // SAFETY: within the mapping, and this thread's alone.
                unsafe { word(page).write_volatile(n) };
                while stand.load(Ordering::SeqCst) {
                    stands.store(true, Ordering::SeqCst);
                    std::thread::yield_now();
                }
            }
        });
        shield.prepare().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
        stand.store(true, Ordering::SeqCst);
        while !stands.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let runs = shield.survey(&vma_of(p as *mut u8), true).unwrap();
        // SAFETY: within the mapping; nobody writes to it now.
        let before: Vec<u64> =
            (0..PAGES).map(|page| unsafe { word(page).read_volatile() }).collect();
        stand.store(false, Ordering::SeqCst);
        // The writer comes before the reader to much of it.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let mut pages = 0;
        for run in &runs {
            let bytes = read(&shield, run).unwrap();
            for (n, page) in bytes.chunks(PAGE).enumerate() {
                let at = (run.start as usize - p) / PAGE + n;
                let is = u64::from_ne_bytes(page[..8].try_into().unwrap());
                assert_eq!(is, before[at], "page {at}");
                pages += 1;
            }
        }
        // The last fifty were never written, and may have been read only.
        assert!((PAGES - 100..=PAGES).contains(&pages), "{pages} pages");
        over.store(true, Ordering::SeqCst);
    });
    shield.leave();
    drop(serving);
}

#[test]
fn pages_that_vanish_are_missed() {
    let Some(uffd) = userfaultfd() else { return };
    let p = map(64);
    // SAFETY: within the mapping.
    (0..64).for_each(|page| unsafe { p.add(page * PAGE).write_volatile(1) });
    let shield = shield(Some(uffd), 0);
    shield.register(&vma_of(p));
    shield.prepare().unwrap();
    let runs = shield.survey(&vma_of(p), true).unwrap();
    assert_eq!(runs.len(), 1);
    let start = runs[0].start;
    // SAFETY: the same; nobody else uses it.
    assert_eq!(unsafe { libc::madvise(p.add(32 * PAGE).cast(), PAGE, libc::MADV_DONTNEED) }, 0);
    let mut bytes = vec![0; 16 * PAGE];
    shield.read(&[(start, bytes.len())], &mut bytes).unwrap();
    assert!(bytes.chunks(PAGE).all(|page| page[0] == 1));
    let lost = shield.read(&[(start + 32 * PAGE as u64, PAGE)], &mut bytes[..PAGE]);
    assert!(
        matches!(lost, Err(CopyError::Lost { address }) if address == start + 32 * PAGE as u64)
    );
}

#[test]
fn what_is_not_protected_is_copied_at_once_as_far_as_it_may() {
    let p = map(8);
    // SAFETY: within the mapping.
    (0..8).for_each(|page| unsafe { p.add(page * PAGE).write_volatile(page as u8) });
    assert!(shield(None, 7 * PAGE as u64).survey(&vma_of(p), true).is_err());
    let shield = shield(None, 8 * PAGE as u64);
    let runs = shield.survey(&vma_of(p), true).unwrap();
    // SAFETY: the same.
    (0..8).for_each(|page| unsafe { p.add(page * PAGE).write_volatile(99) });
    let bytes = read(&shield, &runs[0]).unwrap();
    assert!(bytes.chunks(PAGE).enumerate().all(|(n, page)| page[0] == n as u8));
}

/// Private memory of a file: what nobody has written to since it was copied is not copied again.
#[test]
fn memory_of_a_file_is_copied_before() {
    const PAGES: usize = 20;
    let Some(uffd) = made(tracking::FLAGS, tracking::FEATURES) else { return };
    let exe = File::open("/proc/self/exe").unwrap();
    // SAFETY: a new mapping at an address of the kernel's choice.
    let p = unsafe {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&exe);
        let flags = libc::MAP_PRIVATE;
        libc::mmap(std::ptr::null_mut(), PAGES * PAGE, rw, flags, fd, 0).cast::<u8>()
    };
    // SAFETY: within the mapping.
    let write = |page: usize, byte| unsafe { p.add(page * PAGE).write_volatile(byte) };
    // The last four are the file's own.
    (0..PAGES - 4).for_each(|page| write(page, 1));
    let early = Early::new(uffd, Arc::new(AtomicU64::new(1 << 20)));
    // Five pages may be copied at once, and are all that is.
    let shield = shield_with(None, Some(early), 5 * PAGE as u64);
    shield.register(&vma_of(p));
    shield.copy_early().unwrap();
    write(2, 2);
    // A second time, as after a pause that would have been too long.
    shield.copy_early().unwrap();
    for page in [0, 5, 6, PAGES - 4, PAGES - 2] {
        write(page, 3);
    }
    let runs = shield.survey(&vma_of(p), true).unwrap();
    (0..PAGES).for_each(|page| write(page, 4));
    let mut seen = Vec::new();
    for run in &runs {
        let first = (run.start as usize - p as usize) / PAGE;
        let bytes = read(&shield, run).unwrap();
        seen.extend(bytes.chunks(PAGE).enumerate().map(|(n, page)| (first + n, page[0])));
    }
    let wanted: Vec<(usize, u8)> = (0..PAGES)
        .filter_map(|page| match page {
            2 => Some((page, 2)),
            0 | 5 | 6 => Some((page, 3)),
            page if page == PAGES - 4 || page == PAGES - 2 => Some((page, 3)),
            page if page < PAGES - 4 => Some((page, 1)),
            _ => None,
        })
        .collect();
    assert_eq!(seen, wanted);
}
