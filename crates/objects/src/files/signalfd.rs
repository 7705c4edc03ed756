//! signalfd(2): a mask. Which task's signals it reads is decided by who reads.

use super::collect::{Collector, View};
use crate::Problem;
use rewake_image::messages::{FdTypes, FileEntry, SignalfdEntry};
use rustix::fd::OwnedFd;

/// Surveys a signalfd.
///
/// # Errors
/// `/proc` does not tell its mask.
pub fn survey(collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    let text = (view.fdinfo)()?;
    let info = rewake_proc::fdinfo::parse(&text).map_err(|e| view.problem(e.to_string()))?;
    let Some(sigmask) = info.signalfd else {
        return Err(view.problem("fdinfo does not tell its mask"));
    };
    let id = collector.new_id();
    let entry = SignalfdEntry { id, flags: view.flags, fown: view.owner()?, sigmask };
    collector.push(FileEntry {
        r#type: FdTypes::Signalfd as i32,
        id,
        sgfd: Some(Box::new(entry)),
        ..FileEntry::default()
    });
    Ok((id, FdTypes::Signalfd))
}

/// Makes a signalfd of the image.
///
/// # Errors
/// None in practice.
pub fn open(entry: &SignalfdEntry) -> Result<OwnedFd, Problem> {
    rewake_sys::descriptors::signalfd(entry.sigmask)
        .map_err(|e| Problem::new(format!("signalfd {}", entry.id), e.to_string()))
}
