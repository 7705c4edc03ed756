//! `/proc/PID/smaps`, read while the process runs. What takes long there is counting pages, for which a stopped process had to
//! wait; of all that only the flags are wanted. So the counts are those of before, and `maps`, which is quick, tells whether
//! the mappings are still the same. Where the kernel tells flags by a BPF iterator, it is asked for them at the instant itself,
//! and of before only what the bits mean and which pages may be shared is needed.

use rewake_objects::iterators::mappings::{self, Area, Codes};
use rewake_objects::memory::vma::{self, Vma};
use rewake_proc::read::{ProcDir, ReadError};
use std::collections::{HashMap, HashSet};

/// The mappings of a process.
#[derive(Debug, Default)]
pub struct Glance {
    /// The text of each, by its first line, which is that of `maps`.
    mappings: HashMap<Vec<u8>, Vec<u8>>,
    /// Where those are that may be read in any way ([`Vma::readable`]).
    readable: HashSet<(u64, u64)>,
    /// What the kernel's flags mean, if it tells them.
    codes: Option<Codes>,
}

impl Glance {
    /// Those of a process, now.
    ///
    /// # Errors
    /// It is gone.
    pub fn at(dir: &ProcDir) -> Result<Glance, ReadError> {
        let pid = dir.pid();
        let mut buffer = Vec::with_capacity(64 * 1024);
        let before = mappings::of(pid);
        let text = dir.read("smaps", &mut buffer)?;
        let mut glance = Glance::parse(text);
        if let (Ok(before), Ok(after)) = (before, mappings::of(pid)) {
            glance.learn(text, &before, &after);
        }
        Ok(glance)
    }

    /// Learns what flags mean from a text of `smaps`, and from what the kernel told before and after it was read.
    fn learn(&mut self, smaps: &[u8], before: &[Area], after: &[Area]) {
        let Ok(vmas) = vma::survey(smaps, &mut Vec::new()) else { return };
        let readable = vmas.iter().filter(|vma| vma.readable);
        self.readable = readable.map(|vma| (vma.entry.start, vma.entry.end)).collect();
        // The process runs: what has changed meanwhile may be told as it was or as it is.
        let after: HashSet<(u64, u64, u64)> =
            after.iter().map(|a| (a.start, a.end, a.flags)).collect();
        let same = |area: &&Area| after.contains(&(area.start, area.end, area.flags));
        let same: Vec<Area> = before.iter().filter(same).copied().collect();
        let mut codes = Codes::default();
        match codes.learn(smaps, &same) {
            Ok(()) => self.codes = Some(codes),
            Err(e) => log::debug!("flags of mappings are not learned: {e}"),
        }
    }

    /// What the kernel's flags mean, if it tells them.
    pub fn codes(&self) -> Option<&Codes> {
        self.codes.as_ref()
    }

    /// May the pages of a mapping be read in any way ([`Vma::readable`]), as far as is known?
    pub fn is_readable(&self, vma: &Vma) -> bool {
        self.readable.contains(&(vma.entry.start, vma.entry.end))
    }

    fn parse(smaps: &[u8]) -> Glance {
        let mut mappings = HashMap::new();
        let mut lines = smaps.split_inclusive(|byte| *byte == b'\n').peekable();
        while let Some(first) = lines.next() {
            let mut rest = Vec::new();
            // Names of values have a capital, addresses have none.
            while let Some(line) = lines.next_if(|line| line[0].is_ascii_uppercase()) {
                rest.extend_from_slice(line);
            }
            mappings.insert(first.to_vec(), rest);
        }
        Glance { mappings, ..Glance::default() }
    }

    /// The `smaps` text of a process that has these `maps`; `None` if one of the mappings is new.
    pub fn of(&self, maps: &[u8]) -> Option<Vec<u8>> {
        let mut text = Vec::with_capacity(maps.len() * 8);
        for line in maps.split_inclusive(|byte| *byte == b'\n') {
            text.extend_from_slice(line);
            text.extend_from_slice(self.mappings.get(line)?);
        }
        Some(text)
    }

    /// Do mappings that both have seen have the same flags in both?
    pub fn agrees(&self, other: &Glance) -> bool {
        self.mappings.iter().all(|(line, text)| {
            other.mappings.get(line).is_none_or(|before| flags(before).eq(flags(text)))
        })
    }
}

/// The flags of a mapping; whether it is registered with a userfaultfd we know best.
fn flags(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let line = text.split(|byte| *byte == b'\n').find(|line| line.starts_with(b"VmFlags:"));
    line.unwrap_or_default()
        .split(|byte| *byte == b' ')
        .filter(|flag| !flag.is_empty() && *flag != b"uw")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &[u8] = b"1000-2000 rw-p 0 00:00 0 \nRss: 4 kB\nVmFlags: rd wr uw\n\
        3000-4000 r--p 0 00:00 0 [x]\nRss: 0 kB\nVmFlags: rd\n";

    #[test]
    fn mappings_that_are_the_same_are_known() {
        let glance = Glance::parse(SMAPS);
        let both = b"1000-2000 rw-p 0 00:00 0 \n3000-4000 r--p 0 00:00 0 [x]\n";
        assert_eq!(glance.of(both).as_deref(), Some(SMAPS));
        let one = b"3000-4000 r--p 0 00:00 0 [x]\n";
        let second = SMAPS.iter().position(|byte| *byte == b'3').unwrap_or(0);
        assert_eq!(glance.of(one).as_deref(), Some(&SMAPS[second..]));
        assert_eq!(glance.of(b"3000-5000 r--p 0 00:00 0 [x]\n"), None);
    }

    #[test]
    fn flags_that_changed_are_noticed() {
        let with = |flags: &str| {
            Glance::parse(format!("1000-2000 rw-p 0 00:00 0 \nVmFlags: {flags}\n").as_bytes())
        };
        let other = Glance::parse(b"3000-4000 rw-p 0 00:00 0 \nVmFlags: rd wr\n");
        assert!(with("rd wr").agrees(&with("rd wr uw")));
        assert!(!with("rd wr").agrees(&with("rd wr dc")));
        assert!(with("rd wr").agrees(&other));
    }
}
