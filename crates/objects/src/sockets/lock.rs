//! Keeping packets of TCP connections away while their end is not there: one nftables transaction for all of them.
//!
//! Without a lock the kernel would answer a peer outside the tree with a reset as soon as the killed tree's sockets are gone.
//! While the dump runs, the lock belongs to the dumping process and goes with it, whatever happens to that. A lock that has
//! to stay (until the restore, or until a stopped tree goes on) has the form that CRIU's has, so that either can remove it:
//! a table `inet CRIU-…` or rules in the tables of iptables. It carries a [`Note`] of who made it and for which tree, by
//! which [`leftovers`] knows the lock of a dump that was killed before its tree was.

use super::note::{Note, Standing};
use super::repair::Ends;
use super::{Survey, inet};
use crate::Problem;
use rewake_image::messages::{FileEntry, InventoryEntry};
use rewake_netlink::nftables::{self, Block};
use rewake_netlink::{Error, iptables};
use std::collections::HashSet;
use std::net::SocketAddr;

/// How connections are locked: `--network-lock`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Method {
    /// Rules as iptables makes them on top of nftables, one a connection and direction.
    Iptables,
    /// A table of nftables with a set of connections.
    #[default]
    Nftables,
    /// Not at all.
    Skip,
}

impl Method {
    /// `InventoryEntry::network_lock_method`
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Method::Iptables => 0,
            Method::Nftables => 1,
            Method::Skip => 2,
        }
    }

    /// That of an inventory; those that do not say are of times when there was one only.
    #[must_use]
    pub fn of(inventory: &InventoryEntry) -> Method {
        match inventory.network_lock_method {
            None | Some(0) => Method::Iptables,
            Some(1) => Method::Nftables,
            Some(_) => Method::Skip,
        }
    }
}

/// The lock of a dump: on connections to peers outside while the dump runs, and on what has to stay locked when it ends.
/// Dropping it unlocks.
#[derive(Debug)]
#[must_use = "dropping it unlocks"]
pub struct Lock {
    block: Option<Block>,
    run_id: String,
    method: Method,
    note: Note,
    stays: bool,
}

/// The name of the table that stays: CRIU has room for so much of the id.
fn table(run_id: &str) -> String {
    format!("{CRIU_TABLE}{}", run_id.get(..21).unwrap_or(run_id))
}

const CRIU_TABLE: &str = "CRIU-";
const OWN_TABLE: &str = "rewake-";

fn problem(e: Error) -> Problem {
    let what = match e {
        Error::Call { call: "socket", .. } => format!("the kernel has no nftables: {e}"),
        e => format!("nftables: {e}"),
    };
    Problem::new("network lock", what)
        .remedy("--network-lock skip does without; then connections to peers outside may be reset")
}

impl Lock {
    /// Locks the connections to peers outside; `run_id` is the inventory's `dump_criu_run_id`, `root` the root of the tree.
    /// To be called before [`read`](super::read).
    ///
    /// # Errors
    /// The kernel has no nftables, or `CAP_NET_ADMIN` is missing.
    pub fn take(survey: &Survey, run_id: &str, method: Method, root: i32) -> Result<Lock, Problem> {
        let connections = survey.outside();
        let short = run_id.get(..21).unwrap_or(run_id);
        let block = match connections.as_slice() {
            [] => None,
            _ if method == Method::Skip => None,
            some => Some(Block::new(&format!("{OWN_TABLE}{short}"), some).map_err(problem)?),
        };
        let note = Note::new(root, run_id);
        Ok(Lock { block, run_id: run_id.to_owned(), method, note, stays: false })
    }

    /// Has the connections stay locked: the tree is about to be killed or left stopped. A controller that is killed between
    /// that and [`Lock::leave`] leaves a lock without reason, which [`leftovers`] finds.
    ///
    /// # Errors
    /// As [`Lock::take`].
    pub fn stay(&mut self, survey: &Survey) -> Result<(), Problem> {
        let connections = survey.to_lock();
        if connections.is_empty() {
            return Ok(());
        }
        let note = self.note.to_string();
        match self.method {
            Method::Nftables => Block::stay(&table(&self.run_id), &connections, &note),
            Method::Iptables => iptables::block(&connections, &note),
            Method::Skip => return Ok(()),
        }
        .map_err(problem)?;
        self.stays = true;
        Ok(())
    }

    /// Leaves the connections locked, if they were to stay so.
    pub fn leave(mut self) {
        self.stays = false;
    }

    /// What the inventory of a checkpoint is to say of a lock that stays. To be asked after [`read`](super::read).
    #[must_use]
    pub fn method(&self, survey: &Survey) -> Method {
        if survey.to_lock().is_empty() { Method::Skip } else { self.method }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.stays {
            let note = self.note.to_string();
            let removed = match self.method {
                Method::Iptables => iptables::remove_commented(|c| c == note).map(drop),
                _ => nftables::remove(&table(&self.run_id)).map(drop),
            };
            if let Err(e) = removed {
                log::error!("the network lock cannot be removed (try rewake unlock --all): {e}");
            }
        }
        // Connections to the outside are free only now.
        drop(self.block.take());
    }
}

/// Removes the lock of a checkpoint, of CRIU's as well: how many tables or rules. Its connections are also taken out of
/// locks that older checkpoints have left here: a program that has been elsewhere in the meantime comes back.
///
/// # Errors
/// `CAP_NET_ADMIN` is missing.
pub fn unlock<'a>(
    inventory: &InventoryEntry,
    files: impl Iterator<Item = &'a FileEntry>,
) -> Result<usize, Problem> {
    let run_id = inventory.dump_criu_run_id.as_deref().map(String::from_utf8_lossy);
    let mut listens = false;
    let ends: Vec<Ends> = files
        .filter_map(|file| file.isk.as_deref())
        .inspect(|socket| listens |= socket.state == inet::LISTEN)
        .filter(|socket| socket.dst_port != 0)
        .filter_map(inet::ends_of)
        .collect();
    match (Method::of(inventory), run_id) {
        (Method::Nftables, Some(run_id)) => {
            let own = nftables::remove(&table(&run_id)).map_err(problem)?;
            Ok(usize::from(own) + older(&ends).map_err(problem)?)
        }
        // Handshakes that were not done are locked, and not saved.
        (Method::Iptables, run_id) if listens || !ends.is_empty() => {
            let both: HashSet<Ends> =
                ends.iter().flat_map(|(own, peer)| [(*own, *peer), (*peer, *own)]).collect();
            // By the note, too: the addresses in the images may have been replaced.
            let of_run = |comment: &str| {
                let note = Note::parse(comment);
                note.zip(run_id.as_ref()).is_some_and(|(note, run_id)| note.is_of_run(run_id))
            };
            let removed = iptables::remove_commented(of_run).and_then(|noted| {
                iptables::remove_connections(|ends| both.contains(ends)).map(|more| noted + more)
            });
            if !matches!(removed, Ok(1..)) && has_legacy_rules() {
                log::warn!(
                    "the checkpoint's connections may be blocked by rules of iptables-legacy, which only that can remove"
                );
            }
            match removed {
                // A kernel without nftables has no such rules.
                Err(Error::Call { call: "socket", .. }) => Ok(0),
                // There may be nothing to be removed, and no right to do so.
                Err(e) if ends.is_empty() => {
                    log::debug!("locks by iptables are not looked for: {e}");
                    Ok(0)
                }
                removed => removed.map_err(problem),
            }
        }
        _ => Ok(0),
    }
}

/// Takes connections out of the locks that are still there: out of how many.
fn older(ends: &[Ends]) -> Result<usize, Error> {
    let connections: Vec<nftables::Connection> =
        ends.iter().map(|(own, peer)| (SocketAddr::from(*own), SocketAddr::from(*peer))).collect();
    let mut count = 0;
    for lock in nftables::tables()? {
        if lock.name.starts_with(CRIU_TABLE) && lock.owner.is_none() {
            count += usize::from(nftables::release(&lock.name, &connections)? != 0);
        }
    }
    Ok(count)
}

/// Whether there is a table of the kind that iptables-legacy makes. The kernel has the file only while there is one.
fn has_legacy_rules() -> bool {
    ["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"]
        .iter()
        .any(|file| std::fs::read_to_string(file).is_ok_and(|names| names.contains("filter")))
}

/// What has become of the locks that were found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Those that were removed, in words.
    pub removed: Vec<String>,
    /// Those that are still there, in words, and why.
    pub kept: Vec<String>,
}

/// Goes through the locks of the thread's network namespace and removes those that are `unwanted`.
fn go_through(unwanted: impl Fn(Option<&Note>) -> bool) -> Result<Found, Problem> {
    let mut found = Found::default();
    for lock in nftables::tables().map_err(problem)? {
        if ![CRIU_TABLE, OWN_TABLE].iter().any(|prefix| lock.name.starts_with(prefix)) {
            continue;
        }
        let note = lock.comment.as_deref().and_then(Note::parse);
        let name = format!("nftables table inet {}", lock.name);
        if lock.owner.is_some() {
            found.kept.push(format!("{name}: a dump is under way, with which it goes"));
        } else if unwanted(note.as_ref()) {
            nftables::remove(&lock.name).map_err(problem)?;
            found.removed.push(name);
        } else {
            found.kept.push(format!("{name}: {}", reason(note.as_ref())));
        }
    }
    for (comment, count) in iptables::comments().map_err(problem)? {
        let note = comment.as_deref().and_then(Note::parse);
        let name = format!("{count} iptables rules");
        if let Some(comment) = comment
            && unwanted(note.as_ref())
        {
            iptables::remove_commented(|c| c == comment).map_err(problem)?;
            found.removed.push(name);
        } else {
            found.kept.push(format!("{name}: {}", reason(note.as_ref())));
        }
    }
    Ok(found)
}

fn reason(note: Option<&Note>) -> String {
    match note {
        None => "of CRIU, which does not say for which tree (--images-dir or --all removes it)"
            .to_owned(),
        Some(note) => note.reason(),
    }
}

/// Removes the locks of dumps that were killed before they were done: their trees run on.
///
/// # Errors
/// The kernel has no nftables, or `CAP_NET_ADMIN` is missing.
pub fn leftovers() -> Result<Found, Problem> {
    go_through(|note| note.is_some_and(|note| note.standing() == Standing::Stale))
}

/// Removes the lock of a tree that goes on, by the pid and start time of its root.
///
/// # Errors
/// As [`leftovers`].
pub fn of_tree(root: i32, start: u64) -> Result<Found, Problem> {
    go_through(|note| note.is_some_and(|note| note.is_of(root, start)))
}

/// Removes all locks, CRIU's too.
///
/// # Errors
/// As [`leftovers`].
pub fn all() -> Result<Found, Problem> {
    // Those without a note too.
    let rules = iptables::remove_all().map_err(problem)?;
    let mut found = go_through(|_| true)?;
    if rules != 0 {
        found.removed.push(format!("{rules} iptables rules"));
    }
    if has_legacy_rules() {
        found.kept.push(
            "rules of iptables-legacy, if there are any of CRIU's: only that can remove them"
                .to_owned(),
        );
    }
    Ok(found)
}
