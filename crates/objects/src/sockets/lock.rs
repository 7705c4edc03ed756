//! Keeping packets of TCP connections away while their end is not there: one nftables transaction for all of them.
//!
//! Without a lock the kernel would answer a peer outside the tree with a reset as soon as the killed tree's sockets are gone.
//! While the dump runs, the lock belongs to the dumping process and goes with it, whatever happens to that; a lock that has
//! to stay until the restore is a table of the name that CRIU uses too, so that either can remove it.

use super::repair::Ends;
use super::{Survey, inet};
use crate::Problem;
use crate::files::open::Opener;
use rewake_image::messages::InventoryEntry;
use rewake_netlink::nftables::{self, Block, Connection};
use rewake_netlink::Error;
use std::net::SocketAddr;

/// `InventoryEntry::network_lock_method`: rules of iptables.
pub const IPTABLES: u32 = 0;
/// A table of nftables.
pub const NFTABLES: u32 = 1;
/// Nothing was locked.
pub const SKIP: u32 = 2;

/// The connections of a tree to peers outside, locked: until this is dropped, or for good.
#[derive(Debug)]
#[must_use = "the connections are locked until this is dropped"]
pub struct Lock {
    block: Block,
    connections: Vec<Connection>,
    run_id: String,
}

/// The name of the table that stays: CRIU has room for so much of the id.
fn table(run_id: &str) -> String {
    format!("CRIU-{}", run_id.get(..21).unwrap_or(run_id))
}

fn problem(e: Error) -> Problem {
    Problem::new("network lock", format!("nftables: {e}"))
        .remedy("--network-lock skip does without; then connections to peers outside may be reset")
}

impl Lock {
    /// Locks the connections that need it; `run_id` is the inventory's `dump_criu_run_id`.
    ///
    /// # Errors
    /// The kernel has no nftables, or `CAP_NET_ADMIN` is missing.
    pub fn take(survey: &Survey, run_id: &str) -> Result<Option<Lock>, Problem> {
        let connections = survey.outside();
        if connections.is_empty() {
            return Ok(None);
        }
        let short = run_id.get(..21).unwrap_or(run_id);
        let block = Block::new(&format!("rewake-{short}"), &connections).map_err(problem)?;
        Ok(Some(Lock { block, connections, run_id: run_id.to_owned() }))
    }

    /// Has the connections stay locked until a restore, whose inventory is to say [`NFTABLES`].
    ///
    /// # Errors
    /// As [`Lock::take`].
    pub fn keep(self) -> Result<(), Problem> {
        self.block.keep(&table(&self.run_id), &self.connections).map_err(problem)
    }
}

/// Removes what [`Lock::keep`] has left: for a dump that fails after it.
///
/// # Errors
/// `CAP_NET_ADMIN` is missing.
pub fn release(run_id: &str) -> Result<bool, Problem> {
    nftables::remove(&table(run_id)).map_err(problem)
}

/// Removes the lock of a checkpoint.
pub(super) fn unlock(opener: &Opener<'_>) -> Result<(), Problem> {
    let inventory: &InventoryEntry = opener.images.inventory();
    let run_id = inventory.dump_criu_run_id.as_deref().map(String::from_utf8_lossy);
    match (inventory.network_lock_method.unwrap_or(IPTABLES), run_id) {
        (NFTABLES, Some(run_id)) => release(&run_id).map(drop),
        (IPTABLES, _) => {
            let sockets = opener.files.values().filter_map(|file| file.isk.as_deref());
            let connections: Vec<Connection> = sockets
                .filter(|socket| socket.dst_port != 0)
                .filter_map(inet::ends_of)
                .map(|(own, peer): Ends| (SocketAddr::from(own), SocketAddr::from(peer)))
                .collect();
            if connections.is_empty() {
                return Ok(());
            }
            match nftables::remove_criu_rules(&connections) {
                Ok(count) => log::debug!("{count} rules of CRIU's network lock removed"),
                // A kernel without nftables: the rules, if any, are of the legacy kind.
                Err(e) => log::warn!(
                    "the checkpoint's connections may still be blocked by iptables rules that CRIU has left: {e}"
                ),
            }
            Ok(())
        }
        _ => Ok(()),
    }
}
