//! Kernel state: credentials: real, effective, saved and file-system ids, groups, the five capability sets, securebits,
//! no_new_privs; other ones in a thread, others in children. Needs root. With ZOO_KEEP_IDS set the user and group ids stay root's.
#![allow(unsafe_code, reason = "raw credential system calls, which act on one thread")]

use zoo::{Check, Zoo, check, ensure_eq};

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAP_V3: u32 = 0x2008_0522;
const CAP_SETGID: u32 = 6;
const CAP_SETUID: u32 = 7;
const CAP_SETPCAP: u32 = 8;
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_CHROOT: u32 = 18;
const CAP_MKNOD: u32 = 27;
const CAP_SYSLOG: u32 = 34;

macro_rules! raw {
    ($what:expr, $($arg:expr),+) => { check(libc::syscall($($arg),+) as i32, $what) };
}

/// Everything the kernel tells of this thread's credentials.
#[derive(Debug, PartialEq)]
struct State {
    uids: [u32; 4],
    gids: [u32; 4],
    groups: Vec<u32>,
    caps: [CapData; 2],
    bounding: u64,
    ambient: u64,
    securebits: i32,
    no_new_privs: i32,
    keep_caps: i32,
    status: Vec<String>,
}

fn state() -> Result<State, String> {
    let mut s = State {
        uids: [0; 4],
        gids: [0; 4],
        groups: vec![0; 64],
        caps: [CapData::default(); 2],
        bounding: 0,
        ambient: 0,
        securebits: 0,
        no_new_privs: 0,
        keep_caps: 0,
        status: Vec::new(),
    };
    // SAFETY: all out-parameters are in `s` or locals and large enough.
    unsafe {
        let [a, b, c, d] = &mut s.uids;
        raw!("getresuid", libc::SYS_getresuid, a as *mut u32, b as *mut u32, c as *mut u32)?;
        *d = libc::syscall(libc::SYS_setfsuid, -1) as u32;
        let [a, b, c, d] = &mut s.gids;
        raw!("getresgid", libc::SYS_getresgid, a as *mut u32, b as *mut u32, c as *mut u32)?;
        *d = libc::syscall(libc::SYS_setfsgid, -1) as u32;
        let n =
            zoo::ok(libc::syscall(libc::SYS_getgroups, 64, s.groups.as_mut_ptr()), "getgroups")?;
        s.groups.truncate(n as usize);
        let header = CapHeader { version: CAP_V3, pid: 0 };
        raw!("capget", libc::SYS_capget, &raw const header, s.caps.as_mut_ptr())?;
        for cap in 0..64 {
            s.bounding |= ((libc::prctl(libc::PR_CAPBSET_READ, cap) == 1) as u64) << cap;
            s.ambient |=
                ((libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1)
                    as u64)
                    << cap;
        }
        s.securebits = libc::prctl(libc::PR_GET_SECUREBITS);
        s.no_new_privs = libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
        s.keep_caps = libc::prctl(libc::PR_GET_KEEPCAPS);
    }
    let text = std::fs::read_to_string("/proc/thread-self/status").map_err(|e| e.to_string())?;
    let keys = ["Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:"];
    s.status =
        text.lines().filter(|l| keys.iter().any(|k| l.starts_with(k))).map(String::from).collect();
    Ok(s)
}

/// Gives up root's ids, keeps some capabilities, raises one ambient.
fn drop_to(uid: u32, caps: &[u32], inheritable: &[u32], securebits: i32) -> Check {
    // SAFETY: integers and locals.
    unsafe {
        let groups = [uid + 5, uid + 1, 10];
        raw!("setgroups", libc::SYS_setgroups, groups.len(), groups.as_ptr())?;
        for cap in [CAP_MKNOD, CAP_SYSLOG] {
            check(libc::prctl(libc::PR_CAPBSET_DROP, cap), "PR_CAPBSET_DROP")?;
        }
        if securebits != 0 {
            check(libc::prctl(libc::PR_SET_SECUREBITS, securebits), "PR_SET_SECUREBITS")?;
        }
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1), "PR_SET_KEEPCAPS")?;
        if std::env::var_os("ZOO_KEEP_IDS").is_none() {
            raw!("setresgid", libc::SYS_setresgid, uid + 10, uid + 11, uid + 12)?;
            raw!("setresuid", libc::SYS_setresuid, uid, uid + 1, uid + 2)?;
            libc::syscall(libc::SYS_setfsgid, uid + 13);
        }
        let bits = |set: &[u32], word: u32| {
            set.iter().filter(|c| *c / 32 == word).fold(0u32, |m, c| m | 1 << (c % 32))
        };
        let data = [0, 1].map(|w| CapData {
            effective: bits(&caps[1..], w),
            permitted: bits(caps, w),
            inheritable: bits(inheritable, w),
        });
        let header = CapHeader { version: CAP_V3, pid: 0 };
        raw!("capset", libc::SYS_capset, &raw const header, data.as_ptr())?;
        for &cap in inheritable.iter().filter(|c| caps.contains(c)).take(1) {
            let raise = libc::PR_CAP_AMBIENT_RAISE;
            check(libc::prctl(libc::PR_CAP_AMBIENT, raise, cap, 0, 0), "PR_CAP_AMBIENT_RAISE")?;
        }
    }
    Ok(())
}

fn stay(z: &Zoo, name: &str) -> Check {
    let before = state()?;
    z.publish(&format!("up.{name}"), "");
    z.wait_for_check();
    ensure_eq!(state()?, before, "{name}");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        // SAFETY: the program ends with this closure; integers only.
        let z: &'static Zoo = unsafe { &*(z as *const Zoo) };
        if unsafe { libc::geteuid() } != 0 || drop_possible().is_err() {
            z.skip("needs root with CAP_SETPCAP to have credentials to lose");
        }
        let root_caps = z.fork(|z| {
            // SAFETY: integers only.
            check(
                unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) },
                "PR_SET_NO_NEW_PRIVS",
            )?;
            stay(z, "child with no_new_privs")
        })?;
        let user = z.fork(|z| {
            drop_to(3000, &[CAP_NET_ADMIN], &[], 0)?;
            stay(z, "child of another user")
        })?;
        let nobody = z.fork(|z| {
            // No capability left, ids all the same: the plain unprivileged process.
            // SAFETY: integers and a null list.
            unsafe {
                raw!("setgroups", libc::SYS_setgroups, 0, 0)?;
                if std::env::var_os("ZOO_KEEP_IDS").is_none() {
                    raw!("setresgid", libc::SYS_setresgid, 65534, 65534, 65534)?;
                    raw!("setresuid", libc::SYS_setresuid, 65534, 65534, 65534)?;
                }
            }
            stay(z, "unprivileged child")
        })?;
        let thread = std::thread::spawn(|| {
            drop_to(2000, &[CAP_SETGID, CAP_SETUID], &[CAP_SETUID], 0)?;
            stay(z, "thread")
        });
        for name in
            ["child with no_new_privs", "child of another user", "unprivileged child", "thread"]
        {
            z.wait_for(&format!("up.{name}")).map_err(|e| format!("{e}; {:?}", z.complaints()))?;
        }
        // SECBIT_NOROOT, SECBIT_NO_SETUID_FIXUP and its lock.
        drop_to(
            1000,
            &[CAP_SETPCAP, CAP_SYS_CHROOT, CAP_NET_ADMIN],
            &[CAP_NET_ADMIN, CAP_SYS_CHROOT],
            0b1101,
        )?;
        let before = state()?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(state()?, before, "main thread");
        thread.join().map_err(|_| "thread panicked")??;
        for child in [root_caps, user, nobody] {
            z.join(child)?;
        }
        Ok(())
    })
}

fn drop_possible() -> Check {
    // SAFETY: reads only.
    let has = unsafe { libc::prctl(libc::PR_CAPBSET_READ, CAP_SETPCAP) };
    ensure_eq!(has, 1, "CAP_SETPCAP in the bounding set");
    Ok(())
}
