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
use rewake_netlink::Error;
use rewake_netlink::nftables::{self, Block, Connection};
use std::net::SocketAddr;

/// `InventoryEntry::network_lock_method`: rules of iptables.
pub const IPTABLES: u32 = 0;
/// A table of nftables.
pub const NFTABLES: u32 = 1;
/// Nothing was locked.
pub const SKIP: u32 = 2;

/// The lock of a dump: on connections to peers outside while the dump runs, and on what a restore needs locked once the
/// tree is dead. Dropping it unlocks.
#[derive(Debug)]
#[must_use = "dropping it unlocks"]
pub struct Lock {
    block: Option<Block>,
    run_id: String,
    stays: bool,
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
    /// Locks the connections to peers outside; `run_id` is the inventory's `dump_criu_run_id`. To be called before
    /// [`Survey::read`].
    ///
    /// # Errors
    /// The kernel has no nftables, or `CAP_NET_ADMIN` is missing.
    pub fn take(survey: &Survey, run_id: &str) -> Result<Lock, Problem> {
        let connections = survey.outside();
        let short = run_id.get(..21).unwrap_or(run_id);
        let block = match connections.as_slice() {
            [] => None,
            some => Some(Block::new(&format!("rewake-{short}"), some).map_err(problem)?),
        };
        Ok(Lock { block, run_id: run_id.to_owned(), stays: false })
    }

    /// Has the connections stay locked until the restore. To be called just before the tasks are killed; a controller that
    /// is killed between that and [`Lock::leave`] leaves a lock without reason.
    ///
    /// # Errors
    /// As [`Lock::take`].
    pub fn stay(&mut self, survey: &Survey) -> Result<(), Problem> {
        let connections = survey.to_lock();
        if connections.is_empty() {
            return Ok(());
        }
        Block::stay(&table(&self.run_id), &connections).map_err(problem)?;
        self.stays = true;
        Ok(())
    }

    /// Leaves the connections locked, if they were to stay so: the tasks are dead.
    pub fn leave(mut self) {
        self.stays = false;
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.stays
            && let Err(e) = release(&self.run_id)
        {
            log::error!(
                "the network lock cannot be removed (nft delete table inet {}): {e}",
                table(&self.run_id)
            );
        }
        // Connections to the outside are free only now.
        drop(self.block.take());
    }
}

/// What the inventory of a checkpoint is to say of its lock, [`NFTABLES`] or [`SKIP`], if its tasks are killed. To be asked
/// after [`Survey::read`].
#[must_use]
pub fn method(survey: &Survey) -> u32 {
    if survey.to_lock().is_empty() { SKIP } else { NFTABLES }
}

/// Removes what [`Lock::leave`] has left.
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
