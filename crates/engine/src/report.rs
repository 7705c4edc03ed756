//! What a dump or a restore tells its caller when it is done.

use std::time::Duration;

pub use rewake_objects::{Obstacle, Passing};

/// Figures of a dump, in the terms of CRIU's `dump_stats_entry`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DumpReport {
    /// From the first stop to the last one.
    pub freezing_time: Duration,
    /// From the first stop until the tree got its final state.
    pub frozen_time: Duration,
    /// Surveying and copying memory.
    pub memdump_time: Duration,
    /// Writing page files.
    pub memwrite_time: Duration,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages left out because a parent image holds them.
    pub pages_skipped_parent: u64,
    /// Pages written.
    pub pages_written: u64,
    /// Pages of shared memory looked at.
    pub shpages_scanned: u64,
    /// Shared memory pages left to the parent images.
    pub shpages_skipped_parent: u64,
    /// Pages of shared memory written.
    pub shpages_written: u64,
    /// Tasks saved.
    pub tasks: usize,
    /// Threads saved (all tasks).
    pub threads: usize,
    /// Set when a `post-dump` action failed: the images are complete, the tree runs on, and the command exits 255.
    pub post_dump_failed: Option<String>,
    /// Things worth knowing that did not stop the dump.
    pub warnings: Vec<String>,
}

/// Figures of a restore, in the terms of CRIU's `restore_stats_entry`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RestoreReport {
    /// Pid of the root task as the caller sees it; of several copies, that of the first.
    pub root: i32,
    /// Pids of the root tasks of all copies.
    pub roots: Vec<i32>,
    /// Creating the tree.
    pub forking_time: Duration,
    /// The whole restore.
    pub restore_time: Duration,
    /// Pages compared with a parent's copy.
    pub pages_compared: u64,
    /// Pages left shared copy-on-write.
    pub pages_skipped_cow: u64,
    /// Pages filled.
    pub pages_restored: u64,
    /// Tasks restored.
    pub tasks: usize,
    /// Threads restored (all tasks).
    pub threads: usize,
    /// Things worth knowing that did not stop the restore.
    pub warnings: Vec<String>,
}
