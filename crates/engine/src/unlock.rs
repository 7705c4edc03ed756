//! Removing network locks: what a killed dump has left, those of one checkpoint, or all.

use crate::error::{Error, Result};
use rewake_image::{ImageDir, kind};
use rewake_objects::sockets::lock;
use std::path::PathBuf;

pub use rewake_objects::sockets::lock::Found;

/// Which locks are to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Locks {
    /// Those that nobody needs: of dumps that were killed while their tree goes on.
    Leftovers,
    /// The one that the checkpoint in this directory needs until it is restored.
    Of(PathBuf),
    /// All, CRIU's too.
    All,
}

/// Removes network locks in the calling thread's network namespace, and says what became of those there are.
///
/// # Errors
/// The images cannot be read, the kernel has no nftables, or `CAP_NET_ADMIN` is missing.
pub fn unlock(locks: &Locks) -> Result<Found> {
    let failed = |problem: rewake_objects::Problem| Error::new(problem.to_string());
    match locks {
        Locks::Leftovers => lock::leftovers().map_err(failed),
        Locks::All => lock::all().map_err(failed),
        Locks::Of(dir) => {
            let images = ImageDir::open(dir)?;
            let files = images.read_all(kind::FILES, ())?;
            let removed = lock::unlock(images.inventory(), files.iter()).map_err(failed)?;
            let what = match removed {
                0 => Vec::new(),
                n => vec![format!("the lock of {} ({n} tables or rules)", dir.display())],
            };
            Ok(Found { removed: what, kept: Vec::new() })
        }
    }
}
