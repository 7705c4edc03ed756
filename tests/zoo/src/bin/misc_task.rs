//! Kernel state: odds and ends of a task: oom_score_adj, umask, dumpable, parent-death signal, subreaper, name, THP
//! disable, membarrier registrations.
#![allow(unsafe_code, reason = "prctl through the C library")]

use zoo::{check, ensure, ensure_eq};

fn get(option: i32, what: &str) -> Result<i32, String> {
    let mut value = 0i32;
    // SAFETY: `value` is a local; the options used here write one int.
    check(unsafe { libc::prctl(option, &raw mut value, 0, 0, 0) }, what)?;
    Ok(value)
}

fn name() -> String {
    let mut name = [0u8; 16];
    // SAFETY: room for 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    String::from_utf8_lossy(&name).trim_end_matches('\0').to_string()
}

const MEMBARRIER_REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;
const MEMBARRIER_PRIVATE_EXPEDITED: i32 = 1 << 3;

fn main() {
    zoo::run(|z| {
        std::fs::write("/proc/self/oom_score_adj", "321")
            .map_err(|e| format!("oom_score_adj: {e}"))?;
        // SAFETY (all below): integers and NUL-terminated strings.
        unsafe {
            libc::umask(0o037);
            check(libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1), "PR_SET_CHILD_SUBREAPER")?;
            check(libc::prctl(libc::PR_SET_NAME, c"odd (name) \xff".as_ptr()), "PR_SET_NAME")?;
            check(libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0), "PR_SET_THP_DISABLE")?;
            let register = MEMBARRIER_REGISTER_PRIVATE_EXPEDITED;
            check(
                libc::syscall(libc::SYS_membarrier, register, 0, 0) as i32,
                "membarrier registration",
            )?;
        }
        let child = z.fork(|z| {
            // SAFETY: integers only.
            unsafe {
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR2), "PR_SET_PDEATHSIG")?;
                check(libc::prctl(libc::PR_SET_DUMPABLE, 0), "PR_SET_DUMPABLE")?;
                libc::umask(0o111);
            }
            z.publish("up", "");
            z.wait_for_check();
            ensure_eq!(
                get(libc::PR_GET_PDEATHSIG, "PR_GET_PDEATHSIG")?,
                libc::SIGUSR2,
                "parent-death signal"
            );
            ensure_eq!(
                get(libc::PR_GET_CHILD_SUBREAPER, "PR_GET_CHILD_SUBREAPER")?,
                0,
                "subreaper in the child"
            );
            // SAFETY: integers only.
            unsafe {
                ensure_eq!(libc::prctl(libc::PR_GET_DUMPABLE), 0, "dumpable of the child");
                ensure_eq!(libc::umask(0o111), 0o111, "umask of the child");
            }
            Ok(())
        })?;
        z.wait_for("up")?;
        let before = name();
        z.ready()?;
        z.wait_for_check();
        let oom = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        ensure_eq!(oom.trim(), "321", "oom_score_adj");
        ensure_eq!(get(libc::PR_GET_CHILD_SUBREAPER, "PR_GET_CHILD_SUBREAPER")?, 1, "subreaper");
        ensure_eq!(
            get(libc::PR_GET_PDEATHSIG, "PR_GET_PDEATHSIG")?,
            0,
            "parent-death signal of the root"
        );
        ensure_eq!(name(), before, "name");
        // SAFETY: integers only.
        unsafe {
            ensure_eq!(libc::umask(0o037), 0o037, "umask");
            ensure_eq!(libc::prctl(libc::PR_GET_DUMPABLE), 1, "dumpable");
            ensure_eq!(libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0), 1, "THP disable");
            let done = libc::syscall(libc::SYS_membarrier, MEMBARRIER_PRIVATE_EXPEDITED, 0, 0);
            ensure!(done == 0, "membarrier registration lost: {}", std::io::Error::last_os_error());
        }
        z.join(child)
    })
}
