//! Pages that a child has mapped too are noticed, and others are not.
#![allow(unsafe_code, reason = "a child that is forked, raw mappings")]

use rewake_objects::iterators::mappings;
use rewake_objects::memory::pages::{Run, mark_shared};
use std::fs::File;

const PAGE: usize = 4096;
const PAGES: usize = 1600;

#[test]
fn pages_of_several_are_noticed() {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let memory = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), PAGES * PAGE, access, flags, -1, 0)
    };
    assert_ne!(memory, libc::MAP_FAILED);
    // SAFETY: the mapping made above, which is small pages from now on.
    assert_eq!(unsafe { libc::madvise(memory, PAGES * PAGE, libc::MADV_NOHUGEPAGE) }, 0);
    let write = |pages: std::ops::Range<usize>| {
        for page in pages {
            // SAFETY: within the mapping, which nobody refers to.
            unsafe { memory.cast::<u8>().add(page * PAGE).write_volatile(1) };
        }
    };
    write(0..PAGES - 10);
    let end = memory as u64 + (PAGES * PAGE) as u64;
    // None where the kernel does not tell.
    let is_alone = |pid: i32| {
        let areas = mappings::of(pid).inspect_err(|e| println!("not told: {e}")).ok()?;
        let area = areas.into_iter().find(|area| area.start < end && area.end >= end)?;
        Some(area.alone)
    };
    let own = std::process::id() as i32;
    let before = is_alone(own);
    // SAFETY: the child does nothing but wait for its end.
    let child = unsafe {
        let child = libc::fork();
        if child == 0 {
            loop {
                libc::pause();
            }
        }
        child
    };
    assert!(child > 0);
    // These are now the parent's alone.
    write(0..1);
    write(2..20);
    write(500..1100);
    write(PAGES - 10..PAGES);
    let run = |from: usize, to: usize| {
        let address = |page: usize| (memory as usize + page * PAGE) as u64;
        Run { start: address(from), end: address(to), lazy: true, readable: true, parent: false }
    };
    let cases = [
        (0, 1, true),
        (1, 2, false),
        (2, 20, true),
        (20, 21, false),
        (400, 501, false),
        (501, 1100, true),
        (510, 1101, false),
        (1101, 1200, false),
        (PAGES - 10, PAGES, true),
    ];
    let mut runs = cases.map(|(from, to, _)| run(from, to));
    let done = mark_shared(&File::open("/proc/self/pagemap").unwrap(), &mut runs);
    let with_child = [is_alone(own), is_alone(child)];
    // SAFETY: a child of ours, and where the kernel is to tell how it ended: nowhere.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    done.unwrap();
    let after = is_alone(own);
    if before.is_some() {
        assert_eq!((before, with_child, after), (Some(true), [Some(false); 2], Some(true)));
    }
    assert_eq!(runs.map(|run| run.readable), cases.map(|(_, _, alone)| alone));
}
