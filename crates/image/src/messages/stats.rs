//! Times and counts of a run: `stats-dump`, `stats-restore`.

use super::declare::messages;

messages! {
    /// Statistics of a dump or a restore.
    message StatsEntry "stats_entry" {
        optional message DumpStatsEntry dump = 1;
        optional message RestoreStatsEntry restore = 2;
    }

    /// Statistics of a dump. Times in microseconds.
    message DumpStatsEntry "dump_stats_entry" {
        required uint32 freezing_time = 1;
        required uint32 frozen_time = 2;
        required uint32 memdump_time = 3;
        required uint32 memwrite_time = 4;
        required uint64 pages_scanned = 5;
        required uint64 pages_skipped_parent = 6;
        required uint64 pages_written = 7;
        optional uint32 irmap_resolve = 8;
        required uint64 pages_lazy = 9;
        optional uint64 page_pipes = 10;
        optional uint64 page_pipe_bufs = 11;
        optional uint64 shpages_scanned = 12;
        optional uint64 shpages_skipped_parent = 13;
        optional uint64 shpages_written = 14;
    }

    /// Statistics of a restore. Times in microseconds.
    message RestoreStatsEntry "restore_stats_entry" {
        required uint64 pages_compared = 1;
        required uint64 pages_skipped_cow = 2;
        required uint32 forking_time = 3;
        required uint32 restore_time = 4;
        optional uint64 pages_restored = 5;
    }
}
