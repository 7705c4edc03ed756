//! Open namespaces (`/proc/PID/ns/…`, namespaces(7)), as far as they are those that the tree lives in: these are there
//! again when it is restored.

use super::collect::{Collector, View};
use super::open::Opener;
use crate::Problem;
use rewake_image::messages::{FdTypes, FileEntry, NsFileEntry};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};

/// Name in `/proc/PID/ns`, flag of clone(2), and the number that the images have for the namespace the command runs in.
const KINDS: [(&str, i32, u32); 8] = [
    ("pid", libc::CLONE_NEWPID, 1),
    ("net", libc::CLONE_NEWNET, 2),
    ("ipc", libc::CLONE_NEWIPC, 3),
    ("uts", libc::CLONE_NEWUTS, 4),
    ("time", libc::CLONE_NEWTIME, 5),
    ("mnt", libc::CLONE_NEWNS, 6),
    ("user", libc::CLONE_NEWUSER, 7),
    ("cgroup", libc::CLONE_NEWCGROUP, 8),
];

/// The number that images have for the namespace of this name that the command runs in.
#[must_use]
pub fn id(name: &str) -> Option<u32> {
    KINDS.iter().find(|kind| kind.0 == name).map(|kind| kind.2)
}

/// The kind of namespace whose link in `/proc/PID/fd` this is: `net:[4026531833]`.
#[must_use]
pub fn kind(link: &[u8]) -> Option<&'static str> {
    let is = |name: &str| link.strip_prefix(name.as_bytes()).is_some_and(|l| l.starts_with(b":["));
    KINDS.iter().map(|kind| kind.0).find(|name| is(name))
}

/// Surveys an open namespace.
///
/// # Errors
/// It is not the one that the tree lives in.
pub fn survey(
    collector: &mut Collector,
    view: &View<'_>,
    name: &str,
) -> Result<(u32, FdTypes), Problem> {
    let kind = KINDS.iter().find(|kind| kind.0 == name);
    let kind = kind.ok_or_else(|| view.problem("it is an unknown kind of namespace"))?;
    let own = rustix::fs::readlink(format!("/proc/self/ns/{name}"), Vec::new())
        .map_err(|e| view.problem(format!("our own {name} namespace cannot be examined: {e}")))?;
    if own.as_bytes() != view.link {
        return Err(view
            .problem(format!(
                "it is another {name} namespace than ours, and those cannot be saved yet"
            ))
            .remedy("close it for the time of the dump"));
    }
    let id = collector.new_id();
    let entry = NsFileEntry {
        id,
        ns_id: kind.2,
        ns_cflag: kind.1 as u32,
        flags: view.flags & !(libc::O_CLOEXEC as u32),
    };
    collector.push(FileEntry {
        r#type: FdTypes::Ns as i32,
        id,
        nsf: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Ns))
}

/// Opens the namespace that the tree lives in by now.
///
/// # Errors
/// It is of a kind that nobody knows.
pub fn open(opener: &Opener<'_>, entry: &NsFileEntry) -> Result<OwnedFd, Problem> {
    let object = format!("namespace {} (file id {})", entry.ns_id, entry.id);
    let kind = KINDS.iter().find(|kind| kind.1 as u32 == entry.ns_cflag);
    let (name, ..) = kind.ok_or_else(|| {
        let unknown = format!("its kind {:#x} is unknown", entry.ns_cflag);
        Problem::new(object.clone(), unknown)
    })?;
    // A tree with a PID namespace of its own may have others of its own too: those of its init.
    let place = match &opener.pids {
        crate::pids::Pids::Same => "self".to_owned(),
        inside @ crate::pids::Pids::Inside(_) => inside.outer(1).unwrap_or(0).to_string(),
    };
    let flags = OFlags::from_bits_retain(entry.flags) | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/{place}/ns/{name}"), flags, Mode::empty())
        .map_err(|e| Problem::new(object, format!("cannot be opened: {e}")))
}

#[cfg(test)]
mod tests {
    #[test]
    fn links() {
        let known = |link: &str| super::kind(link.as_bytes());
        assert_eq!(known("net:[4026531833]"), Some("net"));
        assert_eq!(known("cgroup:[1]"), Some("cgroup"));
        for other in ["socket:[5]", "/run/netns/net:[1]", "net", "nets:[1]", "mqueue:[1]"] {
            assert_eq!(known(other), None, "{other}");
        }
    }
}
