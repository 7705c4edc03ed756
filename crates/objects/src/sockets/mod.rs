//! Sockets, by family.

use crate::Problem;
use crate::files::collect::{Collector, View};
use rewake_image::messages::FdTypes;

/// Surveys a socket of any family.
///
/// # Errors
/// Why it cannot be saved.
pub fn survey(_collector: &mut Collector, view: &View<'_>) -> Result<(u32, FdTypes), Problem> {
    Err(view.problem("sockets of this family cannot be saved yet"))
}
