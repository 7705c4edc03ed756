//! Pages that younger images have are punched out of the stores of older ones.

use crate::error::{Error, Result};
use std::path::Path;

/// Punches out of the parents of `dir` what it has itself. Returns how many bytes were freed.
///
/// # Errors
/// Images cannot be read or changed.
pub fn dedup(dir: &Path) -> Result<u64> {
    let freed = rewake_image::dedup(dir).map_err(|e| {
        Error::new(e.to_string()).hint("give a directory whose link `parent` leads to older images")
    })?;
    log::info!("{} KiB punched out of the parents", freed / 1024);
    Ok(freed)
}

/// The same after a dump, which is complete whatever comes of it: what went wrong.
pub fn after_dump(dir: &Path) -> Option<String> {
    dedup(dir).err().map(|e| format!("older images are as they were: {e}"))
}
