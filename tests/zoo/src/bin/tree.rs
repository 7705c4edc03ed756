//! Kernel state: a tree of processes: children of children, sessions, process groups, a child forked by a thread that
//! is not the main one, siblings in number.
#![allow(unsafe_code, reason = "fork, setsid and setpgid through the C library")]

use zoo::{Check, Zoo, check, ensure_eq};

/// (pid, ppid, pgid, sid)
fn ids() -> [i32; 4] {
    // SAFETY: these calls take integers and only ask.
    unsafe { [zoo::pid(), libc::getppid(), libc::getpgid(0), libc::getsid(0)] }
}

/// What a process does before it says it is there.
enum Place {
    Stay,
    OwnGroup,
    OwnSession,
    /// Joins the group of the named process (of the same session).
    GroupOf(&'static str),
}

/// A process of the tree and its children.
struct Node(&'static str, Place, Vec<Node>);

fn live(z: &Zoo, node: &Node) -> Check {
    let Node(name, place, children) = node;
    // SAFETY: integers only.
    unsafe {
        match place {
            Place::Stay => {}
            Place::OwnGroup => check(libc::setpgid(0, 0), "setpgid")?,
            Place::OwnSession => check(libc::setsid(), "setsid")?,
            Place::GroupOf(leader) => {
                z.wait_for(&format!("up.{leader}"))?;
                let text = std::fs::read_to_string(z.path(&format!("up.{leader}")))
                    .map_err(|e| e.to_string())?;
                let leader: i32 = text.parse().map_err(|e| format!("{leader}: {e}"))?;
                check(libc::setpgid(0, leader), "setpgid to another's group")?;
            }
        }
    }
    let before = ids();
    let mut pids = Vec::new();
    z.publish(&format!("up.{name}"), &before[0].to_string());
    for child in children {
        if child.0 == "of-thread" {
            // Its parent, in the kernel's books, is a thread; the process tree must keep it all the same.
            let pid = std::thread::scope(|s| {
                let t = s.spawn(|| {
                    let pid = z.fork(|z| live(z, child));
                    z.wait_for("done")?;
                    pid
                });
                while !z.path("up.of-thread").exists() {
                    zoo::nap(1);
                }
                z.publish("up.thread", "");
                wait(z, name, &before)?;
                t.join().map_err(|_| "thread panicked".to_string())?
            })?;
            pids.push(pid);
        } else {
            pids.push(z.fork(|z| live(z, child))?);
        }
    }
    wait(z, name, &before)?;
    for pid in pids {
        z.join(pid)?;
    }
    Ok(())
}

/// Waits for the end of the test; nobody leaves before all have looked at their ids.
fn wait(z: &Zoo, name: &str, before: &[i32; 4]) -> Check {
    z.wait_for_check();
    ensure_eq!(ids(), *before, "{name}: pid, ppid, pgid, sid");
    z.publish(&format!("ok.{name}"), "");
    z.wait_for("done")
}

fn count(node: &Node, names: &mut Vec<&'static str>) {
    names.push(node.0);
    node.2.iter().for_each(|n| count(n, names));
}

fn main() {
    zoo::run(|z| {
        use Place::*;
        let many = ["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9"]
            .map(|n| Node(n, Stay, vec![]));
        let nodes = vec![
            Node(
                "a",
                OwnGroup,
                vec![
                    Node("a1", Stay, vec![]),
                    Node(
                        "a2",
                        OwnSession,
                        vec![Node("a2x", OwnGroup, vec![Node("a2y", GroupOf("a2x"), vec![])])],
                    ),
                ],
            ),
            Node("b", GroupOf("a"), vec![Node("b1", GroupOf("a"), vec![])]),
            Node(
                "c",
                OwnSession,
                vec![Node("c1", OwnGroup, vec![]), Node("c2", GroupOf("c1"), vec![])],
            ),
            Node("d", Stay, vec![Node("of-thread", Stay, vec![])]),
            Node(
                "deep1",
                Stay,
                vec![Node(
                    "deep2",
                    OwnSession,
                    vec![Node(
                        "deep3",
                        Stay,
                        vec![Node("deep4", OwnSession, vec![Node("deep5", OwnGroup, vec![])])],
                    )],
                )],
            ),
            Node("wide", Stay, many.into()),
        ];
        let mut names = Vec::new();
        nodes.iter().for_each(|n| count(n, &mut names));
        let before = ids();
        let mut pids = Vec::new();
        for node in &nodes {
            pids.push(z.fork(|z| live(z, node))?);
        }
        for name in &names {
            z.wait_for(&format!("up.{name}"))?;
        }
        z.wait_for("up.thread")?;
        zoo::nap(10);
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(ids(), before, "root: pid, ppid, pgid, sid");
        for name in &names {
            z.wait_for(&format!("ok.{name}")).map_err(|e| format!("{e}; {:?}", z.complaints()))?;
        }
        z.publish("done", "");
        for pid in pids {
            z.join(pid)?;
        }
        Ok(())
    })
}
