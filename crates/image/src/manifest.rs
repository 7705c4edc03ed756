//! The manifest: what a checkpoint consists of, to tell a damaged file from a good one.
//!
//! A text file beside the images, `rewake.manifest`, which CRIU ignores:
//!
//! ```text
//! rewake-manifest 1
//! core-7.img 2034 5f3a9c01
//! pages-1.img 40960 1b3f00d7
//! end 1c291ca3
//! ```
//!
//! A line has a file's name, its size in bytes and the CRC-32 of its content, or `-` where that was not made. The last line
//! has the CRC-32 of all before it.

use std::{collections::BTreeMap, fmt::Write};

/// The manifest's file name.
pub const FILE_NAME: &str = "rewake.manifest";

const FIRST_LINE: &str = "rewake-manifest 1";

/// Size and checksum of each file of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    files: BTreeMap<String, FileSum>,
}

/// What a manifest says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSum {
    /// Size in bytes.
    pub size: u64,
    /// CRC-32 of the content; none where somebody else wrote it.
    pub crc: Option<u32>,
}

impl Manifest {
    /// What it says of a file.
    pub fn get(&self, name: &str) -> Option<FileSum> {
        self.files.get(name).copied()
    }

    /// The names of all files.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Parses a manifest, or says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let body_end = text.trim_end_matches('\n').rfind('\n').map_or(0, |at| at + 1);
        let (body, last) = text.split_at(body_end);
        let sum = last.strip_prefix("end ").and_then(|sum| parse_crc(sum.strip_suffix('\n')?));
        if sum != Some(crc32fast::hash(body.as_bytes())) {
            return Err("its text does not have the checksum its last line says".to_owned());
        }
        let mut lines = body.lines();
        if lines.next() != Some(FIRST_LINE) {
            return Err(format!("it does not start with `{FIRST_LINE}`"));
        }
        let files = lines
            .map(|line| parse_line(line).ok_or_else(|| format!("a line makes no sense: {line}")));
        Ok(Manifest { files: files.collect::<Result<_, _>>()? })
    }
}

impl FromIterator<(String, FileSum)> for Manifest {
    fn from_iter<I: IntoIterator<Item = (String, FileSum)>>(files: I) -> Self {
        Manifest { files: files.into_iter().collect() }
    }
}

/// The text of a manifest of these files.
pub(crate) fn format<'a>(files: impl Iterator<Item = (&'a str, FileSum)>) -> String {
    let mut text = format!("{FIRST_LINE}\n");
    for (name, sum) in files {
        put_line(&mut text, name, sum);
    }
    put_end(&mut text);
    text
}

/// The text of a manifest in which a file has another sum, or is not mentioned; everything else is as in `text`.
pub(crate) fn with_sum(text: &str, name: &str, sum: Option<FileSum>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut mentioned = false;
    for line in text.lines().filter(|l| !l.starts_with("end ")) {
        if line.split(' ').next() != Some(name) {
            out.push_str(line);
            out.push('\n');
        } else if let Some(sum) = sum {
            put_line(&mut out, name, sum);
            mentioned = true;
        }
    }
    if let Some(sum) = sum.filter(|_| !mentioned) {
        put_line(&mut out, name, sum);
    }
    put_end(&mut out);
    out
}

fn put_line(text: &mut String, name: &str, FileSum { size, crc }: FileSum) {
    // writing to a string does not fail
    let _ = match crc {
        Some(crc) => writeln!(text, "{name} {size} {crc:08x}"),
        None => writeln!(text, "{name} {size} -"),
    };
}

fn put_end(text: &mut String) {
    let crc = crc32fast::hash(text.as_bytes());
    let _ = writeln!(text, "end {crc:08x}");
}

/// Whether a name can stand in a manifest (and is a name at all).
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
}

fn parse_line(line: &str) -> Option<(String, FileSum)> {
    let mut words = line.split(' ');
    let (name, size, crc) = (words.next()?, words.next()?.parse().ok()?, words.next()?);
    let crc = if crc == "-" { None } else { Some(parse_crc(crc)?) };
    (is_plain_name(name) && words.next().is_none())
        .then(|| (name.to_owned(), FileSum { size, crc }))
}

fn parse_crc(text: &str) -> Option<u32> {
    (text.len() == 8).then(|| u32::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        let sums = [("core-7.img", 2034, Some(0x0f3a_9c01)), ("pages-1.img", 40960, None)];
        sums.map(|(name, size, crc)| (name.to_owned(), FileSum { size, crc })).into_iter().collect()
    }

    fn text() -> String {
        format(sample().files.iter().map(|(name, sum)| (name.as_str(), *sum)))
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Manifest::parse(&text()), Ok(sample()));
    }

    #[test]
    fn one_sum_changes_and_the_rest_stays() {
        let sum = FileSum { size: 7, crc: Some(1) };
        let changed = with_sum(&text(), "core-7.img", Some(sum));
        let parsed = Manifest::parse(&changed).unwrap();
        assert_eq!(parsed.get("core-7.img"), Some(sum));
        assert_eq!(parsed.get("pages-1.img"), sample().get("pages-1.img"));
        let without = with_sum(&text(), "core-7.img", None);
        assert_eq!(Manifest::parse(&without).unwrap().get("core-7.img"), None);
        assert_eq!(with_sum(&text(), "core-7.img", sample().get("core-7.img")), text());
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let good = text();
        for at in 0..good.len() {
            let mut bad = good.clone().into_bytes();
            bad[at] ^= 1;
            let bad = String::from_utf8(bad).unwrap();
            assert!(Manifest::parse(&bad).is_err(), "byte {at}:\n{bad}");
        }
    }

    #[test]
    fn every_cut_is_noticed() {
        let good = text();
        for end in 0..good.len() {
            assert!(Manifest::parse(&good[..end]).is_err(), "cut at {end}");
        }
    }
}
