//! Random histories of processes on paper, and whether the plans bring about what they led to.

use super::paper::{Kernel, OUTSIDE, comes_out};
use super::{Lineage, Member};
use rewake_objects::task::sharing::Objects;

/// The tree below a root, parents before children.
fn tree(kernel: &Kernel, root: i32) -> Vec<Member> {
    let mut members = Vec::new();
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        let p = kernel.processes[&pid];
        let ppid = if pid == root { 0 } else { p.parent };
        let own = pid as u32;
        let objects = Objects { vm: own, files: own, fs: own, sighand: own };
        members.push(Member { pid, ppid, pgid: p.pgid, sid: p.sid, zombie: p.zombie, objects });
        let mut children: Vec<i32> = kernel.processes.keys().copied().collect();
        children.retain(|c| *c != pid && kernel.processes[c].parent == pid);
        children.sort_unstable();
        next.extend(children);
    }
    members
}

/// A random history: what is left of it below its root.
fn history(random: &mut impl FnMut(usize) -> usize, length: usize) -> Vec<Member> {
    const ROOT: i32 = 100;
    let mut kernel = Kernel::new(50);
    kernel.fork(OUTSIDE, false, ROOT);
    // A shell's job has a root that leads nothing.
    if random(4) != 0 {
        kernel.setsid(ROOT);
    }
    kernel.reaper(ROOT, random(4) != 0);
    let mut next = ROOT;
    for _ in 0..length {
        let all = tree(&kernel, ROOT);
        let alive: Vec<i32> = all.iter().filter(|m| !m.zombie).map(|m| m.pid).collect();
        let pid = alive[random(alive.len())];
        match random(12) {
            0..=4 => {
                next += 1;
                kernel.fork(pid, false, next).expect("a number that nobody has");
            }
            5 => {
                kernel.setsid(pid);
            }
            6 => {
                let group = if random(2) == 0 { pid } else { all[random(all.len())].pgid };
                kernel.setpgid(pid, pid, group);
            }
            7 | 8 => {
                kernel.reaper(pid, random(2) == 0);
            }
            _ if pid == ROOT => {}
            _ => {
                kernel.exit(pid).expect("it was alive");
                if random(4) != 0 {
                    kernel.reap(pid);
                }
            }
        }
    }
    tree(&kernel, ROOT)
}

#[test]
fn any_history_is_explained() {
    let (mut quick, mut long) = (0, 0);
    for seed in 1..=SEEDS {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as usize % below.max(1)
        };
        let length = 8 + random(90);
        let members = history(&mut random, length);
        let init = random(2) == 0;
        let lineage = Lineage::plan(&members, true, init)
            .unwrap_or_else(|e| panic!("seed {seed}: {}: {}", e.message, show(&members)));
        assert!(comes_out(&members, &lineage), "seed {seed}: {}", show(&members));
        // The longer way is always one.
        let longer = super::creation::explain(&members, init)
            .unwrap_or_else(|| panic!("seed {seed}, no longer way: {}", show(&members)));
        assert!(comes_out(&members, &longer), "seed {seed}, the longer way: {}", show(&members));
        if lineage.sequence.is_empty() { quick += 1 } else { long += 1 }
    }
    assert!(quick > 0 && long > 0, "{quick} quick, {long} long");
    eprintln!("{quick} quick, {long} long");
}

const SEEDS: u64 = 1_500;

fn show(members: &[Member]) -> String {
    let mut text = String::from("\n");
    for m in members {
        let zombie = if m.zombie { " zombie" } else { "" };
        text += &format!("m({}, {}, {}, {}){zombie}\n", m.pid, m.ppid, m.pgid, m.sid);
    }
    text
}
