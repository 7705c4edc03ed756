//! Kernel state: a session whose leader has exited and process groups whose leader has exited: ids that live on though
//! no process has that pid any more. The root is a subreaper, so the orphans stay in the tree.
#![allow(unsafe_code, reason = "fork, setsid and setpgid through the C library")]

use zoo::{Zoo, check, ensure, ensure_eq};

fn ids() -> [i32; 3] {
    // SAFETY: integers only.
    unsafe { [libc::getppid(), libc::getpgid(0), libc::getsid(0)] }
}

/// A process that stays: tells its pid, waits, and finds its ids unchanged.
fn member(z: &Zoo, name: &str) -> zoo::Check {
    z.publish(&format!("up.{name}"), &zoo::pid().to_string());
    z.wait_for("orphaned")?;
    let before = ids();
    z.publish(&format!("settled.{name}"), "");
    z.wait_for_check();
    ensure_eq!(ids(), before, "{name}: ppid, pgid, sid");
    z.publish(&format!("ok.{name}"), "");
    z.wait_for("done")
}

fn read(z: &Zoo, name: &str) -> Result<i32, String> {
    z.wait_for(&format!("up.{name}"))?;
    let text = std::fs::read_to_string(z.path(&format!("up.{name}"))).map_err(|e| e.to_string())?;
    text.parse().map_err(|e| format!("{name}: {e}"))
}

fn main() {
    zoo::run(|z| {
        // SAFETY: integers only.
        check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, "PR_SET_CHILD_SUBREAPER")?;
        let session = z.fork(|z| {
            check(unsafe { libc::setsid() }, "setsid")?;
            z.fork(|z| member(z, "m1"))?;
            z.fork(|z| {
                check(unsafe { libc::setpgid(0, 0) }, "setpgid")?;
                z.fork(|z| member(z, "m3"))?;
                member(z, "m2")
            })?;
            z.wait_for("up.m1")?;
            z.wait_for("up.m3")
        })?;
        let group = z.fork(|z| {
            check(unsafe { libc::setpgid(0, 0) }, "setpgid")?;
            z.fork(|z| member(z, "g1"))?;
            z.fork(|z| member(z, "g2"))?;
            z.wait_for("up.g1")?;
            z.wait_for("up.g2")
        })?;
        z.join(session)?;
        z.join(group)?;
        let names = ["m1", "m2", "g1", "g2"];
        let pids = names.iter().map(|n| read(z, n)).collect::<Result<Vec<_>, _>>()?;
        let me = zoo::pid();
        z.publish("orphaned", "");
        for name in ["m1", "m2", "m3", "g1", "g2"] {
            z.wait_for(&format!("settled.{name}"))?;
        }
        // SAFETY: integers only.
        let look = || unsafe {
            pids.iter().map(|&p| (libc::getpgid(p), libc::getsid(p))).collect::<Vec<_>>()
        };
        let before = look();
        ensure_eq!(
            before,
            [(session, session), (pids[1], session), (group, me), (group, me)],
            "set-up"
        );
        ensure!(
            zoo::state_of(session).is_none() && zoo::state_of(group).is_none(),
            "a leader is still there"
        );
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(look(), before, "(pgid, sid) of the orphans");
        ensure!(
            zoo::state_of(session).is_none(),
            "pid {session}, the dead session leader's, is in use"
        );
        ensure!(zoo::state_of(group).is_none(), "pid {group}, the dead group leader's, is in use");
        for name in ["m1", "m2", "m3", "g1", "g2"] {
            z.wait_for(&format!("ok.{name}")).map_err(|e| format!("{e}; {:?}", z.complaints()))?;
        }
        z.publish("done", "");
        for pid in pids {
            z.join(pid)?;
        }
        Ok(())
    })
}
