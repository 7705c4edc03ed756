//! In which order a restored tree touched its pages: noted at one restore, brought first at the next.
//!
//! `rewake.working-set` in the images directory is text: a line for each range, with the pid of the images and the
//! addresses, in the order in which they were touched.

use crate::error::{Error, Result};
use rewake_objects::memory::PAGE;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;

/// The file's name.
pub const FILE: &str = "rewake.working-set";
const HEAD: &str = "rewake working set 1\n";
/// More than a terabyte of memory in blocks would need.
const LARGEST: u64 = 1 << 30;

/// A range that should come early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its process in the images.
    pub pid: i32,
    /// Addresses.
    pub range: Range<u64>,
}

/// What was touched, in order.
#[derive(Debug, Default)]
pub struct Order(Vec<Wanted>);

impl Order {
    /// Notes that a range was touched.
    pub fn touched(&mut self, pid: i32, address: u64, len: u64) {
        let end = address + len;
        match self.0.last_mut() {
            Some(last) if last.pid == pid && last.range.end == address => last.range.end = end,
            _ => self.0.push(Wanted { pid, range: address..end }),
        }
    }

    /// Bytes in it.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|w| w.range.end - w.range.start).sum()
    }

    /// Writes it beside the images.
    ///
    /// # Errors
    /// The directory cannot be written to.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut text = HEAD.to_owned();
        for Wanted { pid, range } in &self.0 {
            let _ = writeln!(text, "{pid} {:x}-{:x}", range.start, range.end);
        }
        let (new, path) = (dir.join(format!("{FILE}.new")), dir.join(FILE));
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)).map_err(|e| {
            Error::new(format!("the working set cannot be noted in {}: {e}", path.display()))
        })
    }
}

/// Reads what was noted; nothing if nothing was.
///
/// # Errors
/// The file is none of ours. A restore works without it.
pub fn read(dir: &Path) -> Result<Vec<Wanted>> {
    let path = dir.join(FILE);
    let failed = |e: &dyn std::fmt::Display| Error::new(format!("{}: {e}", path.display()));
    match std::fs::metadata(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(&e)),
        Ok(about) if !about.is_file() || about.len() > LARGEST => {
            return Err(failed(&"it is no working set"));
        }
        Ok(_) => {}
    }
    let text = std::fs::read_to_string(&path).map_err(|e| failed(&e))?;
    parse(&text).ok_or_else(|| failed(&"it is no working set"))
}

fn parse(text: &str) -> Option<Vec<Wanted>> {
    let lines = text.strip_prefix(HEAD)?.lines();
    lines
        .map(|line| {
            let (pid, range) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let page = |hex| u64::from_str_radix(hex, 16).ok().filter(|a| a % PAGE == 0);
            let range = page(start)?..page(end)?;
            (range.start < range.end).then_some(Wanted { pid: pid.parse().ok()?, range })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = std::env::temp_dir().join(format!("rewake-working-set-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        assert!(read(&dir).unwrap().is_empty());
        let mut order = Order::default();
        order.touched(7, 0x5000, 0x2000);
        order.touched(7, 0x7000, 0x1000);
        order.touched(8, 0x8000, 0x1000);
        order.touched(7, 0x1000, 0x1000);
        assert_eq!(order.bytes(), 0x5000);
        order.write(&dir).unwrap();
        assert_eq!(read(&dir).unwrap(), order.0);
        assert_eq!(order.0[0], Wanted { pid: 7, range: 0x5000..0x8000 });
        std::fs::write(dir.join(FILE), format!("{HEAD}7 5001-6000\n")).unwrap();
        assert!(read(&dir).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
