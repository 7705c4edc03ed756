//! Descriptors of which the kernel has told all that is to be saved ([`crate::iterators::files`]): nobody need look at them.

use super::collect::{Collector, Known, nobody};
use super::{eventfd, pipe};
use crate::iterators::files::File as Told;
use rewake_image::messages::FdTypes;

impl Collector {
    /// As [`Collector::descriptor`], of a descriptor that thread `tid` has, if what was told is enough.
    pub fn told(&mut self, tid: i32, told: &Told) -> Option<(u32, FdTypes)> {
        if told.locked || told.may_be_owned {
            return None;
        }
        if let Some(known) = self.described.get(&told.description) {
            return Some(*known);
        }
        let is_event = told.link == eventfd::LINK;
        // What is in a pipe has to be copied, once.
        let is_copied = told.link.starts_with(b"pipe:[") && self.pipes.contains(&told.inode);
        if !is_event && !is_copied {
            return None;
        }
        let number = is_event.then_some(told.event.2);
        let key = (told.device, told.inode, told.flags, number);
        // If there are others like it they are kept in an order of their own.
        if number.is_some_and(|number| number < 0) || self.known.contains_key(&key) {
            return None;
        }
        let (id, kind) = if is_event {
            eventfd::add_told(self, told, nobody()?)
        } else {
            (pipe::add(self, told.inode as u32, told.flags, nobody()?), FdTypes::Pipe)
        };
        self.known.insert(key, vec![Known { tid, number: told.number, id, kind }]);
        self.described.insert(told.description, (id, kind));
        Some((id, kind))
    }
}
