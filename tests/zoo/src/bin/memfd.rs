//! Kernel state: memfd descriptors: content, position, seals, mappings of it, shared with a child, one opened anew
//! read-only through /proc.
#![allow(unsafe_code, reason = "memfd_create and seals through the C library")]

use zoo::{Rng, bytes, check, cstring, ensure, ensure_eq, mmap, ok};

const LEN: usize = 256 << 10;

fn main() {
    zoo::run(|z| {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY (all below): NUL-terminated names, descriptors of our own, buffers of the lengths given.
        let fd =
            ok(unsafe { libc::memfd_create(c"zoo data".as_ptr(), flags) } as i64, "memfd_create")?
                as i32;
        let mut content = vec![0u8; LEN];
        Rng(1).fill(&mut content[..LEN / 2]);
        let written = unsafe { libc::write(fd, content.as_ptr().cast(), LEN) };
        ensure_eq!(written, LEN as isize, "write");
        ok(unsafe { libc::lseek(fd, 777, libc::SEEK_SET) }, "lseek")?;
        let map = mmap(0, LEN, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        check(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) }, "F_ADD_SEALS")?;
        let path = cstring(format!("/proc/self/fd/{fd}"));
        let again =
            ok(unsafe { libc::open(path.as_ptr(), libc::O_RDONLY) } as i64, "open anew")? as i32;
        let frozen = ok(
            unsafe { libc::memfd_create(c"zoo frozen".as_ptr(), flags) } as i64,
            "memfd_create",
        )? as i32;
        unsafe { libc::write(frozen, c"as it is".as_ptr().cast(), 8) };
        let all = seals | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL;
        check(unsafe { libc::fcntl(frozen, libc::F_ADD_SEALS, all) }, "F_ADD_SEALS")?;
        let child = z.fork(|z| {
            z.publish("up", "");
            z.wait_for("written")?;
            ensure_eq!(
                unsafe { bytes(map, LEN) }[5],
                123,
                "what the parent wrote, in the child's mapping"
            );
            ensure_eq!(unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) }, 888, "shared position");
            Ok(())
        })?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        unsafe {
            ensure_eq!(libc::lseek(fd, 0, libc::SEEK_CUR), 777, "position");
            ensure!(bytes(map, LEN) == content, "content of the mapping");
            let mut read = vec![0u8; LEN + 1];
            ensure_eq!(
                libc::pread(again, read.as_mut_ptr().cast(), LEN + 1, 0),
                LEN as isize,
                "size"
            );
            ensure!(read[..LEN] == content, "content read through the second descriptor");
            ensure!(
                libc::pwrite(again, c"x".as_ptr().cast(), 1, 0) < 0,
                "the read-only one can be written"
            );
            ensure_eq!(libc::fcntl(fd, libc::F_GET_SEALS), seals, "seals");
            ensure_eq!(libc::fcntl(frozen, libc::F_GET_SEALS), all, "seals of the frozen one");
            ensure!(libc::ftruncate(fd, 1) < 0, "a sealed memfd could be shrunk");
            ensure_eq!(libc::fcntl(fd, libc::F_GETFD), libc::FD_CLOEXEC, "close-on-exec");
            let mut eight = [0u8; 8];
            ensure_eq!(
                libc::pread(frozen, eight.as_mut_ptr().cast(), 8, 0),
                8,
                "read of the frozen one"
            );
            ensure_eq!(&eight, b"as it is", "content of the frozen one");
            bytes(map, LEN)[5] = 123;
            let mut one = [0u8; 1];
            libc::pread(again, one.as_mut_ptr().cast(), 1, 5);
            ensure_eq!(one[0], 123, "mapping and descriptor are one file");
            libc::lseek(fd, 888, libc::SEEK_SET);
        }
        z.publish("written", "");
        z.join(child)
    })
}
