//! Kernel state: System V shared memory: a segment attached by two processes, several times, read-only, in part, with a
//! protection taken away; one with a key and an owner of its own; one of an odd size; one marked for removal; one locked.
//! Ids, keys, contents and who sees whose writes survive. (Never the host's own segments: those here end with the program.)
//!
//! With `ZOO_OUTSIDE` a process outside the tree maps one too.
#![allow(unsafe_code, reason = "System V segments are raw memory")]

use std::sync::atomic::{AtomicU64, Ordering};
use zoo::{Check, Rng, Zoo, bytes, check, ensure, ensure_eq, ok};

const PAGE: usize = 4096;
const LEN: usize = 64 * PAGE;
const ODD: usize = 5 * PAGE + 56;

fn make(key: i32, size: usize) -> Result<i32, String> {
    // SAFETY: integers.
    let id = unsafe { libc::shmget(key, size, libc::IPC_CREAT | libc::IPC_EXCL | 0o640) };
    Ok(ok(i64::from(id), "shmget")? as i32)
}

fn attach(id: i32, flags: i32) -> Result<*mut u8, String> {
    // SAFETY: the kernel chooses the address.
    let p = unsafe { libc::shmat(id, std::ptr::null(), flags) };
    ensure!(p as isize != -1, "shmat: {}", std::io::Error::last_os_error());
    Ok(p.cast())
}

fn stat(id: i32) -> Result<libc::shmid_ds, String> {
    // SAFETY: the struct is the kernel's to write.
    let mut data: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    check(unsafe { libc::shmctl(id, libc::IPC_STAT, &mut data) }, "IPC_STAT")?;
    Ok(data)
}

fn remove(id: i32) -> Check {
    // SAFETY: integers and no struct.
    check(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }, "IPC_RMID")
}

fn word<'a>(p: *mut u8, page: usize) -> &'a AtomicU64 {
    // SAFETY: within the mapping, aligned, never borrowed otherwise.
    unsafe { &*p.add(page * PAGE).cast::<AtomicU64>() }
}

fn wait(p: *mut u8, page: usize, value: u64, what: &str) -> Check {
    let until = zoo::now() + 5_000_000_000;
    while word(p, page).load(Ordering::SeqCst) != value {
        ensure!(zoo::now() < until, "{what}: what the other process wrote is not seen");
        zoo::nap(1);
    }
    Ok(())
}

/// What ends with the program, whatever happens.
struct Segments(Vec<i32>);

impl Drop for Segments {
    fn drop(&mut self) {
        for id in &self.0 {
            let _ = remove(*id);
        }
    }
}

fn child(z: &Zoo, shared: *mut u8, odd: i32) -> Check {
    // Elsewhere than in the parent, and once more read-only.
    // SAFETY: the mapping is ours; the old address is not used any more.
    let moved = unsafe { libc::mremap(shared.cast(), LEN, LEN, libc::MREMAP_MAYMOVE) };
    ensure!(moved != libc::MAP_FAILED, "mremap");
    let shared: *mut u8 = moved.cast();
    let read_only = attach(odd, libc::SHM_RDONLY)?;
    z.publish("up", "");
    z.wait_for_check();
    wait(shared, 1, 1111, "shared")?;
    word(shared, 2).store(2222, Ordering::SeqCst);
    wait(read_only, 1, 4444, "read-only")?;
    // SAFETY: the read-only mapping; making it writable must not be possible.
    let got = unsafe { libc::mprotect(read_only.cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE) };
    ensure!(got != 0, "a read-only segment could be made writable");
    wait(shared, 3, 3333, "shared")
}

fn main() {
    zoo::run(|z| {
        let key = 0x5a6f_0000 | zoo::pid() & 0xffff;
        let mut made = Segments(Vec::new());
        let mut new = |key, size| {
            let id = make(key, size)?;
            made.0.push(id);
            Ok::<i32, String>(id)
        };
        let (shared, odd) = (new(key, LEN)?, new(libc::IPC_PRIVATE, ODD)?);
        let (dying, locked) = (new(libc::IPC_PRIVATE, LEN)?, new(libc::IPC_PRIVATE, PAGE)?);
        let p = attach(shared, 0)?;
        let odd_p = attach(odd, 0)?;
        let dying_p = attach(dying, 0)?;
        let locked_p = attach(locked, 0)?;
        let again = attach(shared, 0)?;
        let window = attach(shared, libc::SHM_RDONLY)?;
        // SAFETY: parts of our own mappings.
        unsafe {
            // Of the second only the middle, with a page that cannot be touched.
            check(libc::munmap(again.cast(), 8 * PAGE), "munmap")?;
            check(libc::munmap(again.add(32 * PAGE).cast(), 32 * PAGE), "munmap")?;
            check(libc::mprotect(again.add(20 * PAGE).cast(), PAGE, libc::PROT_NONE), "mprotect")?;
        }
        remove(dying)?;
        // SAFETY: integers and no struct.
        check(unsafe { libc::shmctl(locked, libc::SHM_LOCK, std::ptr::null_mut()) }, "SHM_LOCK")?;
        let mut owner = stat(shared)?;
        owner.shm_perm.uid = 12345;
        owner.shm_perm.gid = 54321;
        // SAFETY: the struct is live.
        check(unsafe { libc::shmctl(shared, libc::IPC_SET, &mut owner) }, "IPC_SET")?;
        for (i, p) in [p, dying_p].into_iter().enumerate() {
            // Content in the middle; holes elsewhere.
            // SAFETY: attached above.
            Rng(i as u64).fill(unsafe { bytes(p.add(8 * PAGE), 10 * PAGE) });
        }
        // Up to the end of the last page, which is beyond its size.
        // SAFETY: attached above.
        Rng(7).fill(unsafe { bytes(odd_p.add(4 * PAGE), 2 * PAGE) });
        // SAFETY: attached above.
        Rng(8).fill(unsafe { bytes(locked_p, PAGE) });
        let pid = z.fork(|z| child(z, p, odd))?;
        z.wait_for("up")?;
        if z.param("ZOO_OUTSIDE", 0) != 0 {
            z.outside(|z| {
                attach(odd, 0)?;
                z.publish("outside", "");
                while !z.is_over() {
                    zoo::nap(5);
                }
                Ok(())
            })?;
            z.wait_for("outside")?;
        }
        let facts = |id| {
            let s = stat(id)?;
            let perm = s.shm_perm;
            Ok::<_, String>((
                (perm.__key, perm.uid, perm.gid, perm.cuid, perm.cgid, perm.mode),
                (s.shm_segsz, s.shm_nattch),
            ))
        };
        let all = [shared, odd, dying, locked];
        let before = all.map(facts);
        z.ready()?;
        z.wait_for_check();

        for ((id, then), what) in all.iter().zip(before).zip(["keyed", "odd", "removed", "locked"])
        {
            ensure_eq!(facts(*id)?, then?, "owner, mode, size and users of the {what} segment");
        }
        // SAFETY: integers.
        let found = unsafe { libc::shmget(key, 0, 0) };
        ensure_eq!(found, shared, "the segment found by its key");
        for (i, (p, what)) in [(p, "keyed"), (dying_p, "removed")].into_iter().enumerate() {
            // SAFETY: attached above.
            Rng(i as u64).verify(unsafe { bytes(p.add(8 * PAGE), 10 * PAGE) }, what)?;
            ensure_eq!(word(p, 40).load(Ordering::SeqCst), 0, "an untouched word of {what}");
        }
        // SAFETY: attached above.
        unsafe {
            Rng(7).verify(bytes(odd_p.add(4 * PAGE), 2 * PAGE), "odd")?;
            Rng(8).verify(bytes(locked_p, PAGE), "locked")?;
            let whole = bytes(p, LEN);
            ensure!(bytes(window, LEN) == whole, "the read-only mapping differs");
            ensure!(
                bytes(again.add(8 * PAGE), 12 * PAGE) == &whole[8 * PAGE..20 * PAGE],
                "the mapping of a part differs"
            );
            // The page without permissions is where it was, and the same.
            check(
                libc::mprotect(
                    again.add(20 * PAGE).cast(),
                    PAGE,
                    libc::PROT_READ | libc::PROT_WRITE,
                ),
                "mprotect",
            )?;
        }
        word(again, 20).store(77, Ordering::SeqCst);
        ensure_eq!(
            word(window, 20).load(Ordering::SeqCst),
            77,
            "written by one mapping, read by another"
        );
        word(p, 1).store(1111, Ordering::SeqCst);
        wait(p, 2, 2222, "shared").map_err(|e| format!("{e}; {:?}", z.complaints()))?;
        word(odd_p, 1).store(4444, Ordering::SeqCst);
        word(p, 3).store(3333, Ordering::SeqCst);
        z.join(pid)?;
        // The removed one ends with its last mapping.
        // SAFETY: attached above, not used any more.
        check(unsafe { libc::shmdt(dying_p.cast()) }, "shmdt")?;
        ensure!(stat(dying).is_err(), "the removed segment outlives its last mapping");
        Ok(())
    })
}
