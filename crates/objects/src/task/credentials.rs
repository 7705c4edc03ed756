//! Credentials of a thread: ids, groups, capabilities, securebits (`credentials(7)`, `capabilities(7)`).
//!
//! Read from `/proc/PID/task/TID/status`, but for securebits, which only the thread can tell. Set by each thread with
//! raw system calls, last of all, because they take away the rights that the other steps need.

use crate::steps::{Label, Steps};
use rewake_agent::layout::Op;
use rewake_image::messages::CredsEntry;
use rewake_proc::status::Status;

fn words(caps: u64) -> Vec<u32> {
    vec![caps as u32, (caps >> 32) as u32]
}

fn caps(words: &[u32]) -> u64 {
    words.first().map_or(0, |w| u64::from(*w)) | words.get(1).map_or(0, |w| u64::from(*w) << 32)
}

/// The image's form of a thread's credentials.
#[must_use]
pub fn survey(status: &Status, securebits: u32) -> CredsEntry {
    CredsEntry {
        uid: status.uid.real,
        gid: status.gid.real,
        euid: status.uid.effective,
        egid: status.gid.effective,
        suid: status.uid.saved,
        sgid: status.gid.saved,
        fsuid: status.uid.fs,
        fsgid: status.gid.fs,
        cap_inh: words(status.cap_inh),
        cap_prm: words(status.cap_prm),
        cap_eff: words(status.cap_eff),
        cap_bnd: words(status.cap_bnd),
        secbits: securebits,
        groups: status.groups.clone(),
        no_new_privs: status.no_new_privs.then_some(1),
        cap_amb: words(status.cap_amb),
        ..CredsEntry::default()
    }
}

const PR_SET_SECUREBITS: u64 = 28;
const PR_CAPBSET_DROP: u64 = 24;
const PR_CAP_AMBIENT: u64 = 47;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const KEEP_CAPS: u64 = 1 << 4;
const CAPSET_V3: u32 = 0x2008_0522;

/// Sets the thread's credentials; `had` is what it has now.
pub fn restore(steps: &mut Steps, creds: &CredsEntry, had: &CredsEntry) {
    if creds == had {
        return;
    }
    let prctl = |steps: &mut Steps, what: &'static str, args: &[u64]| {
        steps.must(Label::Text(what), Op::new(libc::SYS_prctl, args));
    };
    let groups: Vec<u8> = creds.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
    if creds.groups != had.groups {
        let data = steps.data(&groups);
        steps.must(
            Label::Text("setting supplementary groups"),
            Op::new(libc::SYS_setgroups, &[creds.groups.len() as u64, data.address]),
        );
    }
    for (cap, bit) in (0..64u64).map(|c| (c, 1u64 << c)) {
        if caps(&had.cap_bnd) & bit != 0 && caps(&creds.cap_bnd) & bit == 0 {
            prctl(
                steps,
                "dropping a capability from the bounding set",
                &[PR_CAPBSET_DROP, cap, 0, 0, 0],
            );
        }
    }
    // Ids must not take the capabilities away before capset does; KEEP_CAPS is part of the securebits.
    prctl(
        steps,
        "keeping capabilities",
        &[PR_SET_SECUREBITS, u64::from(had.secbits) | KEEP_CAPS, 0, 0, 0],
    );
    let id = |v: u32| u64::from(v);
    steps.must(
        Label::Text("setting group ids"),
        Op::new(libc::SYS_setresgid, &[id(creds.gid), id(creds.egid), id(creds.sgid)]),
    );
    steps.may(
        Label::Text("setting the file-system group id"),
        Op::new(libc::SYS_setfsgid, &[id(creds.fsgid)]),
    );
    steps.must(
        Label::Text("setting user ids"),
        Op::new(libc::SYS_setresuid, &[id(creds.uid), id(creds.euid), id(creds.suid)]),
    );
    // Leaving root cleared the effective set, which setfsuid, securebits and the rest may need: raise it once more.
    let permitted = caps(&had.cap_prm);
    capset(steps, permitted, permitted, caps(&creds.cap_inh));
    steps.may(
        Label::Text("setting the file-system user id"),
        Op::new(libc::SYS_setfsuid, &[id(creds.fsuid)]),
    );
    prctl(steps, "setting securebits", &[PR_SET_SECUREBITS, u64::from(creds.secbits), 0, 0, 0]);
    capset(steps, caps(&creds.cap_prm), caps(&creds.cap_eff), caps(&creds.cap_inh));
    for cap in (0..64u64).filter(|c| caps(&creds.cap_amb) & (1 << c) != 0) {
        prctl(steps, "raising an ambient capability", &[PR_CAP_AMBIENT, 2, cap, 0, 0]);
    }
    if creds.no_new_privs == Some(1) && had.no_new_privs != Some(1) {
        prctl(steps, "setting no_new_privs", &[PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0]);
    }
}

fn capset(steps: &mut Steps, permitted: u64, effective: u64, inheritable: u64) {
    let header: Vec<u8> = CAPSET_V3.to_ne_bytes().into_iter().chain(0u32.to_ne_bytes()).collect();
    let header = steps.data(&header);
    let sets = [effective, permitted, inheritable];
    let data: Vec<u8> = sets
        .iter()
        .map(|s| *s as u32)
        .chain(sets.iter().map(|s| (*s >> 32) as u32))
        .flat_map(u32::to_ne_bytes)
        .collect();
    let data = steps.data(&data);
    steps.must(
        Label::Text("setting capabilities"),
        Op::new(libc::SYS_capset, &[header.address, data.address]),
    );
}
