//! Kernel state: descriptors of memory devices: null, zero, full, random, urandom, with flags and a position; of a block
//! device, if there is one that can be read.
//! `ZOO_EVASIVE`: one whose node another of the same device has replaced.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileTypeExt as _;
use zoo::{Zoo, check, cstring, ensure_eq, errno, ok};

fn replaced(z: &Zoo) -> zoo::Check {
    let path = cstring(z.path("null"));
    // SAFETY: NUL-terminated.
    let make = || unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)) };
    if make() != 0 {
        z.skip("device nodes cannot be made");
    }
    let mut options = std::fs::File::options();
    let Ok(mut null) = options.read(true).write(true).open(z.path("null")) else {
        z.skip("devices cannot be opened here");
    };
    std::fs::hard_link(z.path("null"), z.path("other")).map_err(|e| e.to_string())?;
    std::fs::remove_file(z.path("null")).map_err(|e| e.to_string())?;
    check(make(), "mknod")?;
    z.ready()?;
    z.wait_for_check();
    std::io::Write::write_all(&mut null, b"gone").map_err(|e| e.to_string())?;
    let rdev = std::os::unix::fs::MetadataExt::rdev(&null.metadata().map_err(|e| e.to_string())?);
    ensure_eq!(rdev, libc::makedev(1, 3), "the device");
    Ok(())
}

/// The first block device that can be read.
fn block_device() -> Option<std::fs::File> {
    let devices = std::fs::read_dir("/sys/class/block").ok()?;
    let mut names: Vec<_> = devices.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    names.into_iter().find_map(|name| {
        let mut file = std::fs::File::open(std::path::Path::new("/dev").join(name)).ok()?;
        file.read_exact(&mut [0; 1024]).ok()?;
        Some(file)
    })
}

fn main() {
    zoo::run(|z| {
        if z.param("ZOO_EVASIVE", 0) == 1 {
            return replaced(z);
        }
        let open = |name: &str, flags: i32| -> Result<i32, String> {
            let path = cstring(name);
            // SAFETY: NUL-terminated.
            Ok(ok(unsafe { libc::open(path.as_ptr(), flags) } as i64, name)? as i32)
        };
        let null = open("/dev/null", libc::O_RDWR | libc::O_APPEND | libc::O_CLOEXEC)?;
        let zero = open("/dev/zero", libc::O_RDONLY)?;
        let full = open("/dev/full", libc::O_RDWR | libc::O_NONBLOCK)?;
        let random = open("/dev/random", libc::O_RDONLY)?;
        let urandom = open("/dev/urandom", libc::O_RDWR)?;
        let autofs = open("/dev/autofs", libc::O_RDONLY).ok();
        let mut block = block_device();
        if let Some(block) = &mut block {
            block.seek(SeekFrom::Start(512)).map_err(|e| e.to_string())?;
        }
        z.ready()?;
        z.wait_for_check();
        if let Some(block) = &mut block {
            ensure_eq!(block.stream_position().map_err(|e| e.to_string())?, 512, "its position");
            let kind = block.metadata().map_err(|e| e.to_string())?.file_type();
            ensure_eq!(kind.is_block_device(), true, "it is a block device");
            block.read_exact(&mut [0; 512]).map_err(|e| format!("the block device: {e}"))?;
            block.seek(SeekFrom::Start(512)).map_err(|e| e.to_string())?;
        }
        if let Some(autofs) = autofs {
            // AUTOFS_DEV_IOCTL_VERSION, with its structure of sizes and versions.
            let mut version = [1u32, 1, 24, u32::MAX, 0, 0];
            // SAFETY: a structure of the size that it says.
            let told = unsafe { libc::ioctl(autofs, 0xc018_9371, version.as_mut_ptr()) };
            ensure_eq!((told, version[0]), (0, 1), "what /dev/autofs says of its version");
        }
        let mut buf = [7u8; 64];
        // SAFETY: the buffer is valid for the lengths given.
        unsafe {
            ensure_eq!(libc::read(null, buf.as_mut_ptr().cast(), 64), 0, "read of /dev/null");
            ensure_eq!(libc::write(null, buf.as_ptr().cast(), 64), 64, "write to /dev/null");
            ensure_eq!(libc::read(zero, buf.as_mut_ptr().cast(), 64), 64, "read of /dev/zero");
            ensure_eq!(buf, [0; 64], "what /dev/zero gives");
            ensure_eq!(
                (libc::write(full, buf.as_ptr().cast(), 64), errno()),
                (-1, libc::ENOSPC),
                "write to /dev/full"
            );
            ensure_eq!(libc::read(random, buf.as_mut_ptr().cast(), 64), 64, "read of /dev/random");
            let first = buf;
            ensure_eq!(
                libc::read(urandom, buf.as_mut_ptr().cast(), 64),
                64,
                "read of /dev/urandom"
            );
            ensure_eq!(first != buf, true, "two random reads differ");
            ensure_eq!(
                libc::fcntl(full, libc::F_GETFL) & libc::O_NONBLOCK,
                libc::O_NONBLOCK,
                "O_NONBLOCK"
            );
            ensure_eq!(libc::fcntl(null, libc::F_GETFD), libc::FD_CLOEXEC, "close-on-exec");
            ensure_eq!(
                libc::write(zero, buf.as_ptr().cast(), 1),
                -1,
                "write to a read-only descriptor"
            );
        }
        Ok(())
    })
}
