//! Whose mappings of a file there are, asked of the running kernel.
#![allow(unsafe_code, reason = "raw mappings")]

use rewake_objects::iterators::sharers::of;
use rustix::fd::AsFd;
use rustix::fd::BorrowedFd;
use rustix::mm::{MapFlags, ProtFlags};

fn map(file: BorrowedFd<'_>) -> *mut std::ffi::c_void {
    let flags = MapFlags::SHARED;
    // SAFETY: a new mapping at an address of the kernel's choice, of which nobody makes use.
    unsafe { rustix::mm::mmap(std::ptr::null_mut(), 4096, ProtFlags::READ, flags, file, 0) }
        .unwrap()
}

#[test]
fn mappings_of_files_are_counted() {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("some", flags).unwrap();
    let other = rustix::fs::memfd_create("other", flags).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    rustix::fs::ftruncate(&other, 4096).unwrap();
    let mapped: Vec<_> = (0..20).map(|_| map(file.as_fd())).collect();
    let own = std::process::id() as i32;
    let ask = |known, of_other| of(&[(file.as_fd(), known), (other.as_fd(), of_other)]);
    match ask(20, 0) {
        Ok(found) => assert_eq!(found, [vec![], vec![]]),
        Err(e) => return println!("not here: {e}"),
    }
    assert_eq!(ask(19, 0), Ok(vec![vec![own], vec![]]));
    let more = map(other.as_fd());
    assert_eq!(ask(20, 0), Ok(vec![vec![], vec![own]]));
    for at in mapped.into_iter().chain([more]) {
        // SAFETY: mapped above.
        unsafe { rustix::mm::munmap(at, 4096) }.unwrap();
    }
    assert_eq!(ask(0, 0), Ok(vec![vec![], vec![]]));
}
