//! `/proc/PID/smaps`, read while the process runs. What takes long there is counting pages, for which a stopped process had to
//! wait; of all that only the flags are wanted. So the counts are those of before, and `maps`, which is quick, tells whether
//! the mappings are still the same.

use rewake_proc::read::{ProcDir, ReadError};
use std::collections::HashMap;

/// The mappings of a process.
#[derive(Debug, Default)]
pub struct Glance {
    /// The text of each, by its first line, which is that of `maps`.
    mappings: HashMap<Vec<u8>, Vec<u8>>,
}

impl Glance {
    /// Those of a process, now.
    ///
    /// # Errors
    /// It is gone.
    pub fn at(dir: &ProcDir) -> Result<Glance, ReadError> {
        Ok(Glance::parse(dir.read("smaps", &mut Vec::with_capacity(64 * 1024))?))
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
        Glance { mappings }
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
