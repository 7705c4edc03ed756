//! Other addresses: a tree that is restored where its internet addresses or ports are not.
//!
//! - [`rule`]: what `OLD=NEW` means and which addresses it changes;
//! - [`rewrite()`]: the rules applied to the sockets of a checkpoint, in memory, and [`rewrite_extra()`] to what `rewake.img`
//!   says of them;
//! - [`edit()`]: the same in a directory of images.
//!
//! Pure but for [`edit()`], which touches no socket either: whether an address exists on this host is for others to say.

mod edit;
mod extra;
mod rewrite;
pub mod rule;
#[cfg(test)]
mod tests;

pub use edit::edit;
pub use extra::rewrite_extra;
pub use rewrite::{Change, Outcome, rewrite};
pub use rule::{BadRule, Rule, Template};
