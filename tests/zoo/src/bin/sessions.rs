//! Kernel state: sessions that are led by nobody who is alive, with members under several parents: how subreapers, which
//! come and go, have spread them. And a zombie that leads a session whose members have other parents.
#![allow(unsafe_code, reason = "fork, setsid and prctl through the C library")]

use zoo::{Zoo, check, ensure_eq};

fn ids() -> [i32; 3] {
    // SAFETY: integers only.
    unsafe { [libc::getppid(), libc::getpgid(0), libc::getsid(0)] }
}

/// A process that stays: tells its pid, waits until everybody is where it belongs, and finds its ids unchanged.
fn member(z: &Zoo, name: &str) -> zoo::Check {
    z.publish(&format!("up.{name}"), &zoo::pid().to_string());
    z.wait_for("settled")?;
    let before = ids();
    z.publish(&format!("seen.{name}"), &before[0].to_string());
    z.wait_for_check();
    ensure_eq!(ids(), before, "{name}: ppid, pgid, sid");
    z.publish(&format!("ok.{name}"), "");
    z.wait_for("done")
}

fn number(z: &Zoo, name: &str) -> Result<i32, String> {
    z.wait_for(name)?;
    let text = std::fs::read_to_string(z.path(name)).map_err(|e| e.to_string())?;
    text.parse().map_err(|e| format!("{name}: {e}"))
}

fn reaper(on: bool) -> zoo::Check {
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, i32::from(on)) }, "subreaper")
        .map(drop)
}

fn session() -> zoo::Check {
    // SAFETY: no arguments.
    check(unsafe { libc::setsid() }, "setsid")
}

/// Forks a child that forks a member and exits.
fn orphan(z: &Zoo, name: &'static str) -> zoo::Check {
    let middle = z.fork(|z| {
        z.fork(|z| member(z, name))?;
        z.wait_for(&format!("up.{name}"))
    })?;
    z.join(middle)
}

/// The leader is gone: one of its session has the root as parent, another a process between them.
fn two_parents(z: &Zoo) -> Result<i32, String> {
    z.fork(|z| {
        let leader = z.fork(|z| {
            session()?;
            orphan(z, "a.root")?;
            z.fork(|z| member(z, "a.between"))?;
            z.wait_for("up.a.between")?;
            z.wait_for("a.end")
        })?;
        z.wait_for("up.a.between")?;
        reaper(true)?;
        z.publish("a.end", "");
        z.join(leader)?;
        member(z, "between")
    })
}

/// The leader is gone, and its session has members under two processes that are siblings now: one was above the other once.
fn siblings(z: &Zoo) -> Result<i32, String> {
    z.fork(|z| {
        reaper(true)?;
        let middle = z.fork(|z| {
            z.fork(|z| {
                let leader = z.fork(|z| {
                    session()?;
                    orphan(z, "c.first")?;
                    z.fork(|z| member(z, "c.second"))?;
                    z.wait_for("up.c.second")?;
                    z.wait_for("c.end")
                })?;
                z.wait_for("c.ceased")?;
                reaper(true)?;
                z.publish("c.end", "");
                z.join(leader)?;
                z.publish("c.over", "");
                member(z, "second")
            })?;
            z.wait_for("c.over")
        })?;
        z.wait_for("up.c.second")?;
        reaper(false)?;
        z.publish("c.ceased", "");
        z.join(middle)?;
        member(z, "first")
    })
}

const MEMBERS: [&str; 8] =
    ["between", "a.root", "a.between", "b", "first", "second", "c.first", "c.second"];

fn main() {
    zoo::run(|z| {
        reaper(true)?;
        let me = zoo::pid();
        let between = two_parents(z)?;
        // Nobody waits for this leader before the end.
        let zombie = z.fork(|z| {
            session()?;
            z.fork(|z| member(z, "b"))?;
            z.wait_for("up.b")
        })?;
        zoo::wait_state(zombie, 'Z')?;
        let first = siblings(z)?;
        let mut pids = Vec::new();
        for name in MEMBERS {
            pids.push(number(z, &format!("up.{name}"))?);
        }
        z.publish("settled", "");
        let mut parents = Vec::new();
        for name in MEMBERS {
            parents.push(number(z, &format!("seen.{name}"))?);
        }
        let second = pids[5];
        ensure_eq!(parents, [me, me, between, me, me, me, first, second], "set-up: parents");
        // SAFETY: integers only.
        let look = || unsafe {
            pids.iter().map(|&p| (libc::getpgid(p), libc::getsid(p))).collect::<Vec<_>>()
        };
        let before = look();
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(look(), before, "(pgid, sid) of the members");
        for name in MEMBERS {
            z.wait_for(&format!("ok.{name}")).map_err(|e| format!("{e}; {:?}", z.complaints()))?;
        }
        z.join(zombie)?;
        z.publish("done", "");
        for pid in [between, first, second, pids[1], pids[3]] {
            z.join(pid)?;
        }
        Ok(())
    })
}
