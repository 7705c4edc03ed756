//! Kernel state: mappings of files in every state: past the end of the file, of one that was truncated or has grown since, of
//! a deleted one, of one replaced by another under its name, of one with holes, shared from a descriptor that cannot write,
//! /dev/zero private and shared, of memfds with seals and without a name left. What was never touched is not in the images.
#![allow(unsafe_code, reason = "raw mappings")]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use zoo::{Check, Rng, Zoo, bytes, check, ensure, ensure_eq, errno, mmap, ok};

const PAGE: usize = 4096;
const R: i32 = libc::PROT_READ;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE;
const SHARED: i32 = libc::MAP_SHARED;

fn text<T>(result: std::io::Result<T>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

fn file(z: &Zoo, name: &str, pages: usize, seed: u64) -> Result<(File, Vec<u8>), String> {
    let mut content = vec![0u8; pages * PAGE];
    Rng(seed).fill(&mut content);
    text(std::fs::write(z.path(name), &content))?;
    let file = text(File::options().read(true).write(true).open(z.path(name)))?;
    Ok((file, content))
}

/// Can the page be read? Beyond the end of a file it cannot (SIGBUS; write(2) says EFAULT).
fn readable(p: *const u8) -> Result<bool, String> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors; the kernel checks the address.
    unsafe {
        check(libc::pipe(fds.as_mut_ptr()), "pipe")?;
        let can = libc::write(fds[1], p.cast(), 1) == 1;
        libc::close(fds[0]);
        libc::close(fds[1]);
        Ok(can)
    }
}

fn memfd(seals: i32, content: &[u8]) -> Result<File, String> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a NUL-terminated name; a descriptor of our own.
    let fd = ok(unsafe { libc::memfd_create(c"zoo sealed".as_ptr(), flags) } as i64, "memfd")?;
    // SAFETY: just made.
    let file = unsafe { File::from_raw_fd(fd as i32) };
    text(std::os::unix::fs::FileExt::write_all_at(&file, content, 0))?;
    // SAFETY: integers.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }, "F_ADD_SEALS")?;
    Ok(file)
}

fn may_be_written(p: *mut u8) -> bool {
    // SAFETY: a page of our own; the protection is put back.
    unsafe {
        let can = libc::mprotect(p.cast(), PAGE, RW) == 0;
        assert!(can || errno() == libc::EACCES);
        libc::mprotect(p.cast(), PAGE, R);
        can
    }
}

fn main() {
    zoo::run(|z| {
        let same = |p, want: &[u8], what: &str| -> Check {
            // SAFETY: mapped, readable, as long as the content.
            ensure!(unsafe { bytes(p, want.len()) } == want, "{what} differs");
            Ok(())
        };
        let write = |p: *mut u8, at: usize, byte: u8| {
            // SAFETY: within a writable mapping.
            unsafe { p.add(at).write_volatile(byte) };
        };
        // Longer than their files, private with a page of its own and shared; one that begins beyond the end.
        let (f, past) = file(z, "past", 3, 1)?;
        let fd = f.as_raw_fd();
        let past_private = mmap(0, 8 * PAGE, RW, PRIVATE, fd, 0)?;
        let past_shared = mmap(0, 8 * PAGE, RW, SHARED, fd, 0)?;
        let beyond = mmap(0, 2 * PAGE, R, PRIVATE, fd, 5 * PAGE as i64)?;
        write(past_private, PAGE, !past[PAGE]);
        drop(f);

        // Cut while it is mapped: private pages of the part that is gone are gone too. Then another that grows.
        let (f, cut) = file(z, "cut", 6, 2)?;
        let cut_private = mmap(0, 6 * PAGE, RW, PRIVATE, f.as_raw_fd(), 0)?;
        write(cut_private, 7, !cut[7]);
        write(cut_private, 5 * PAGE, !cut[5 * PAGE]);
        text(f.set_len(2 * PAGE as u64 + 10))?;
        drop(f);
        let (f, mut grown) = file(z, "grown", 2, 3)?;
        let grown_shared = mmap(0, 6 * PAGE, RW, SHARED, f.as_raw_fd(), 0)?;
        text(f.set_len(4 * PAGE as u64))?;
        grown.resize(4 * PAGE, 0);
        write(grown_shared, 3 * PAGE, 77);
        grown[3 * PAGE] = 77;
        drop(f);

        // Names that are gone, or are another file's now.
        let (f, deleted) = file(z, "deleted", 4, 4)?;
        let deleted_shared = mmap(0, 4 * PAGE, RW, SHARED, f.as_raw_fd(), 0)?;
        let deleted_private = mmap(0, 4 * PAGE, RW, PRIVATE, f.as_raw_fd(), 0)?;
        write(deleted_private, PAGE, !deleted[PAGE]);
        text(std::fs::remove_file(z.path("deleted")))?;
        drop(f);
        let (f, replaced) = file(z, "replaced", 4, 5)?;
        let replaced_shared = mmap(0, 4 * PAGE, RW, SHARED, f.as_raw_fd(), 0)?;
        drop(f);
        file(z, "other", 4, 6)?;
        text(std::fs::rename(z.path("other"), z.path("replaced")))?;
        let (f, other) = {
            let mut content = vec![0; 4 * PAGE];
            Rng(6).fill(&mut content);
            (text(File::open(z.path("replaced")))?, content)
        };
        let other_private = mmap(0, 4 * PAGE, R, PRIVATE, f.as_raw_fd(), 0)?;
        drop(f);

        // Holes; a descriptor that cannot write.
        let f = text(
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(z.path("holes")),
        )?;
        text(f.set_len(1 << 30))?;
        let holes = mmap(0, 1 << 30, RW, PRIVATE, f.as_raw_fd(), 0)?;
        write(holes, 500 << 20, 5);
        drop(f);
        let f = text(File::open(z.path("past")))?;
        let unwritable = mmap(0, 3 * PAGE, R, SHARED, f.as_raw_fd(), 0)?;
        ensure!(!may_be_written(unwritable), "a mapping of a read-only descriptor can be written");

        // /dev/zero: private is anonymous memory, shared is a segment without a name.
        let zero = text(File::options().read(true).write(true).open("/dev/zero"))?;
        let zero_private = mmap(0, 4 * PAGE, RW, PRIVATE, zero.as_raw_fd(), 0)?;
        let zero_shared = mmap(0, 4 * PAGE, RW, SHARED, zero.as_raw_fd(), 0)?;
        write(zero_private, PAGE, 1);
        write(zero_shared, 2 * PAGE, 2);

        // Sealed, with mappings that were there before the seal and are read-only for ever after.
        let mut content = vec![0u8; 4 * PAGE];
        Rng(8).fill(&mut content);
        let sealed = memfd(libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK, &content)?;
        let sealed_shared = mmap(0, 4 * PAGE, R, SHARED, sealed.as_raw_fd(), 0)?;
        let sealed_private = mmap(0, 4 * PAGE, RW, PRIVATE, sealed.as_raw_fd(), 0)?;
        write(sealed_private, 3 * PAGE, !content[3 * PAGE]);
        let future = memfd(0, &content)?;
        let before_seal = mmap(0, 4 * PAGE, RW, SHARED, future.as_raw_fd(), 0)?;
        let seals = if z.param("ZOO_PLAIN", 0) != 0 { 0 } else { libc::F_SEAL_FUTURE_WRITE };
        // SAFETY: integers.
        check(unsafe { libc::fcntl(future.as_raw_fd(), libc::F_ADD_SEALS, seals) }, "seal")?;
        let after_seal = mmap(0, 4 * PAGE, R, SHARED, future.as_raw_fd(), 0)?;
        let nameless = memfd(0, &content)?;
        let nameless_shared = mmap(0, 2 * PAGE, RW, SHARED, nameless.as_raw_fd(), PAGE as i64)?;
        drop((f, zero, sealed, future, nameless));

        z.ready()?;
        z.wait_for_check();

        let mut want = past.clone();
        same(past_shared, &want, "the shared mapping past the end")?;
        want[PAGE] = !want[PAGE];
        same(past_private, &want, "the private mapping past the end")?;
        for p in [past_private, past_shared] {
            // SAFETY: within the mapping; not touched but asked for.
            ensure!(
                !readable(unsafe { p.add(4 * PAGE) })?,
                "a page past the end of the file can be read"
            );
        }
        ensure!(!readable(beyond)?, "a mapping beyond the end of the file can be read");
        let f = text(File::options().write(true).open(z.path("past")))?;
        text(f.set_len(6 * PAGE as u64))?;
        same(beyond, &[0; PAGE], "what the file has grown into")?;
        text(f.set_len(3 * PAGE as u64))?;

        let mut want = cut[..3 * PAGE].to_vec();
        want[2 * PAGE + 10..].fill(0);
        want[7] = !want[7];
        same(cut_private, &want, "the mapping of the cut file")?;
        // SAFETY: within the mapping; not touched but asked for.
        ensure!(
            !readable(unsafe { cut_private.add(5 * PAGE) })?,
            "a page that was cut off can be read"
        );
        same(grown_shared, &grown, "the mapping of the file that has grown")?;
        same(deleted_shared, &deleted, "the shared mapping of the deleted file")?;
        write(deleted_shared, 2 * PAGE, 99);
        let mut want = deleted.clone();
        want[2 * PAGE] = 99;
        want[PAGE] = !want[PAGE];
        same(deleted_private, &want, "the private mapping of the deleted file")?;
        ensure!(!z.path("deleted").exists(), "the deleted file has a name again");
        same(replaced_shared, &replaced, "the mapping of the replaced file")?;
        same(other_private, &other, "the mapping of its successor")?;
        same(unwritable, &past, "the mapping of a read-only descriptor")?;
        ensure!(!may_be_written(unwritable), "a mapping of a read-only descriptor can be written");
        // SAFETY: within the mapping.
        unsafe {
            ensure_eq!(*holes.add(500 << 20), 5, "the written page of the file with holes");
            ensure_eq!(*holes.add(501 << 20), 0, "a hole");
            ensure_eq!(*zero_private.add(PAGE), 1, "/dev/zero, private");
            ensure_eq!(*zero_private.add(2 * PAGE), 0, "/dev/zero, private, untouched");
            ensure_eq!(*zero_shared.add(2 * PAGE), 2, "/dev/zero, shared");
        }
        same(sealed_shared, &content, "the sealed memfd")?;
        ensure!(!may_be_written(sealed_shared), "a sealed memfd can be written");
        same(before_seal, &content, "the memfd sealed later")?;
        write(before_seal, 17, !content[17]);
        let mut want = content.clone();
        want[17] = !want[17];
        same(after_seal, &want, "the mapping made after the seal")?;
        ensure!(
            seals == 0 || !may_be_written(after_seal),
            "a mapping made after the seal can be written"
        );
        let mut want = content.clone();
        want[3 * PAGE] = !want[3 * PAGE];
        same(sealed_private, &want, "the private mapping of the sealed memfd")?;
        same(nameless_shared, &content[PAGE..3 * PAGE], "the window of a memfd")
    })
}
