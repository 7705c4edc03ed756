//! `stats-dump` and `stats-restore`, and `--display-stats`.

use std::path::Path;
use std::time::Duration;

use rewake_engine::{DumpReport, RestoreReport};
use rewake_image::kind::{STATS_DUMP, STATS_RESTORE};
use rewake_image::messages::{DumpStatsEntry, RestoreStatsEntry, StatsEntry};
use rewake_image::write_file;

/// Microseconds, as many as the field holds.
fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// Writes `stats-dump` to the work directory.
///
/// # Errors
/// The file cannot be written.
pub fn write_dump(report: &DumpReport, work_dir: &Path) -> rewake_image::Result<()> {
    let entry = StatsEntry {
        dump: Some(DumpStatsEntry {
            freezing_time: micros(report.freezing_time),
            frozen_time: micros(report.frozen_time),
            memdump_time: micros(report.memdump_time),
            memwrite_time: micros(report.memwrite_time),
            pages_scanned: report.pages_scanned,
            pages_skipped_parent: report.pages_skipped_parent,
            pages_written: report.pages_written,
            pages_lazy: 0,
            shpages_scanned: Some(report.shpages_scanned),
            shpages_skipped_parent: Some(report.shpages_skipped_parent),
            shpages_written: Some(report.shpages_written),
            ..DumpStatsEntry::default()
        }),
        ..StatsEntry::default()
    };
    write_file(&work_dir.join(STATS_DUMP.file_name(())), STATS_DUMP, [&entry])
}

/// Writes `stats-restore` to the work directory.
///
/// # Errors
/// The file cannot be written.
pub fn write_restore(report: &RestoreReport, work_dir: &Path) -> rewake_image::Result<()> {
    let entry = StatsEntry {
        restore: Some(RestoreStatsEntry {
            pages_compared: report.pages_compared,
            pages_skipped_cow: report.pages_skipped_cow,
            forking_time: micros(report.forking_time),
            restore_time: micros(report.restore_time),
            pages_restored: Some(report.pages_restored),
        }),
        ..StatsEntry::default()
    };
    write_file(&work_dir.join(STATS_RESTORE.file_name(())), STATS_RESTORE, [&entry])
}

/// The text of `dump --display-stats`.
pub fn show_dump(report: &DumpReport) -> String {
    format!(
        "Displaying dump stats:\n\
         Freezing time: {} us\n\
         Frozen time: {} us\n\
         Memory dump time: {} us\n\
         Memory write time: {} us\n\
         Memory pages scanned: {} (0x{:x})\n\
         Memory pages skipped from parent: {} (0x{:x})\n\
         Memory pages written: {} (0x{:x})\n\
         Lazy memory pages: 0 (0x0)\n",
        report.freezing_time.as_micros(),
        report.frozen_time.as_micros(),
        report.memdump_time.as_micros(),
        report.memwrite_time.as_micros(),
        report.pages_scanned,
        report.pages_scanned,
        report.pages_skipped_parent,
        report.pages_skipped_parent,
        report.pages_written,
        report.pages_written,
    )
}

/// The text of `restore --display-stats`.
pub fn show_restore(report: &RestoreReport) -> String {
    format!(
        "Displaying restore stats:\n\
         Pages compared: {} (0x{:x})\n\
         Pages skipped COW: {} (0x{:x})\n\
         Pages restored: {} (0x{:x})\n\
         Restore time: {} us\n\
         Forking time: {} us\n",
        report.pages_compared,
        report.pages_compared,
        report.pages_skipped_cow,
        report.pages_skipped_cow,
        report.pages_restored,
        report.pages_restored,
        report.restore_time.as_micros(),
        report.forking_time.as_micros(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_files_come_back() {
        let dir = std::env::temp_dir().join(format!("rewake-stats-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let dump = DumpReport {
            frozen_time: Duration::from_micros(1234),
            freezing_time: Duration::from_secs(1 << 40),
            pages_written: 7,
            ..DumpReport::default()
        };
        write_dump(&dump, &dir).unwrap();
        let read = rewake_image::read_file(&dir.join("stats-dump"), STATS_DUMP).unwrap();
        let entry = read[0].dump.as_ref().unwrap();
        assert_eq!((entry.frozen_time, entry.pages_written), (1234, 7));
        assert_eq!(entry.freezing_time, u32::MAX, "what does not fit is the most that does");
        assert!(read[0].restore.is_none());

        let restore = RestoreReport {
            forking_time: Duration::from_millis(2),
            pages_restored: 9,
            ..RestoreReport::default()
        };
        write_restore(&restore, &dir).unwrap();
        let read = rewake_image::read_file(&dir.join("stats-restore"), STATS_RESTORE).unwrap();
        let entry = read[0].restore.as_ref().unwrap();
        assert_eq!((entry.forking_time, entry.pages_restored), (2000, Some(9)));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn texts() {
        let dump = DumpReport {
            pages_written: 26,
            frozen_time: Duration::from_micros(5),
            ..DumpReport::default()
        };
        let text = show_dump(&dump);
        assert!(
            text.starts_with("Displaying dump stats:\nFreezing time: 0 us\nFrozen time: 5 us\n")
        );
        assert!(text.contains("Memory pages written: 26 (0x1a)\n"));
        assert!(show_restore(&RestoreReport::default()).contains("\nForking time: 0 us\n"));
    }
}
