//! Huge pages for trials: as many more in the pool of 2 MiB pages as a trial needs, while it runs, and a mount of hugetlbfs.

use crate::harness::{Fs, NotReady, base};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Pages that were added to the pool (or taken from it, if negative); the pool is as it was when this is dropped.
#[derive(Debug)]
pub struct HugePages(i64);

/// Changes the pool's size, by itself: other test runs on the machine do the same.
fn change(by: impl FnOnce(u64) -> u64) -> std::io::Result<(u64, u64)> {
    let pool = File::options().read(true).write(true).open(POOL)?;
    // SAFETY: a descriptor of our own; the lock ends with it.
    unsafe { libc::flock(pool.as_raw_fd(), libc::LOCK_EX) };
    let size = || fs::read_to_string(POOL)?.trim().parse::<u64>().map_err(std::io::Error::other);
    let before = size()?;
    fs::write(POOL, by(before).to_string())?;
    Ok((before, size()?))
}

impl HugePages {
    /// Adds `n` pages.
    pub fn add(n: u64) -> Result<HugePages, NotReady> {
        let skip = |why: String| NotReady::Skip(format!("no huge pages: {why}"));
        let (before, after) = change(|size| size + n).map_err(|e| skip(format!("{POOL}: {e}")))?;
        let pages = HugePages(after as i64 - before as i64);
        if pages.0 < n as i64 {
            return Err(skip(format!("the kernel finds {} instead of {n}", pages.0)));
        }
        Ok(pages)
    }

    /// Takes away all that nobody has or has reserved.
    pub fn remove_free() -> Result<HugePages, NotReady> {
        let (before, after) = change(|_| 0).map_err(|e| NotReady::Skip(format!("{POOL}: {e}")))?;
        Ok(HugePages(after as i64 - before as i64))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = change(|size| size.saturating_add_signed(-self.0));
    }
}

/// A mounted hugetlbfs, unmounted when dropped.
#[derive(Debug)]
pub struct Hugetlbfs(PathBuf);

impl Hugetlbfs {
    /// Where this test run has it.
    pub fn path() -> PathBuf {
        base(Fs::Disk).join(format!("rewake-e2e-{}-huge", std::process::id()))
    }

    /// Mounts it.
    pub fn mount() -> Result<Hugetlbfs, NotReady> {
        let path = Hugetlbfs::path();
        let failed = |e: std::io::Error| NotReady::Skip(format!("no mount of hugetlbfs: {e}"));
        fs::create_dir_all(&path).map_err(failed)?;
        let target = zoo::cstring(&path);
        // SAFETY: NUL-terminated strings.
        let ret = unsafe {
            libc::mount(
                c"zoo".as_ptr(),
                target.as_ptr(),
                c"hugetlbfs".as_ptr(),
                0,
                c"pagesize=2M".as_ptr().cast(),
            )
        };
        if ret != 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        Ok(Hugetlbfs(path))
    }
}

impl Drop for Hugetlbfs {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

fn unmount(path: &Path) {
    let target = zoo::cstring(path);
    // SAFETY: a NUL-terminated string.
    unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    let _ = fs::remove_dir(path);
}
