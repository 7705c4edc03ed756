//! `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).

use std::borrow::Cow;

use crate::ParseError;
use crate::scan::{Scan, lines, unescape_octal};

const FILE: &str = "mountinfo";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount<'a> {
    /// Mount id, unique while the mount lives.
    pub id: u32,
    /// Id of the mount it is on; its own for the root of the tree.
    pub parent: u32,
    /// Device (major, minor): `st_dev` of files in it.
    pub dev: (u32, u32),
    /// Directory of the file system that is mounted; for `nsfs` as `net:[4026531833]`. Escapes undone.
    /// A removed one ends in `//deleted`, see [`Mount::root_deleted`].
    pub root: Cow<'a, [u8]>,
    /// Where it is mounted, seen from the process's root. Escapes undone.
    pub mount_point: Cow<'a, [u8]>,
    /// Options of the mount (`rw,nosuid,relatime`).
    pub options: &'a [u8],
    /// `shared:N`: peer group it belongs to.
    pub shared: Option<u32>,
    /// `master:N`: peer group it receives from.
    pub master: Option<u32>,
    /// `propagate_from:N`: nearest dominant peer group under the process's root.
    pub propagate_from: Option<u32>,
    /// `unbindable`.
    pub unbindable: bool,
    /// Optional fields that are not known.
    pub unknown: Vec<&'a [u8]>,
    /// File system type, with a subtype as `fuse.sshfs`. Escapes undone.
    pub fs_type: Cow<'a, [u8]>,
    /// Source; may be empty. Escapes undone.
    pub source: Cow<'a, [u8]>,
    /// Options of the file system, as printed: see [`Mount::super_options`].
    pub super_options: &'a [u8],
}

impl<'a> Mount<'a> {
    /// Was the mounted directory removed?
    pub fn root_deleted(&self) -> bool {
        self.root.ends_with(b"//deleted")
    }

    /// Has the mount this option (`ro`, `nosuid` …)?
    pub fn has_option(&self, name: &[u8]) -> bool {
        self.options.split(|b| *b == b',').any(|o| o == name)
    }

    /// The file system's options one by one, each with its value. They are split before the escapes are undone: a
    /// comma within a value is escaped as `\054`.
    pub fn super_options(
        &self,
    ) -> impl Iterator<Item = (Cow<'a, [u8]>, Option<Cow<'a, [u8]>>)> + use<'a> {
        self.super_options.split(|b| *b == b',').filter(|o| !o.is_empty()).map(|option| {
            match memchr::memchr(b'=', option) {
                Some(at) => {
                    (unescape_octal(&option[..at]), Some(unescape_octal(&option[at + 1..])))
                }
                None => (unescape_octal(option), None),
            }
        })
    }
}

/// Parses the text of `/proc/PID/mountinfo`.
///
/// # Errors
/// If a line is malformed.
pub fn parse(text: &[u8]) -> Result<Vec<Mount<'_>>, ParseError> {
    let one = |(number, line)| {
        mount(line).map_err(|field| ParseError::malformed(FILE, field, number, line))
    };
    lines(text).map(one).collect()
}

fn mount(line: &[u8]) -> Result<Mount<'_>, &'static str> {
    // Exactly one blank stands between fields, and a source may be empty: runs of blanks must not be merged.
    let mut scan = Scan::new(line);
    let id = scan.dec().ok_or("mount ID")?;
    scan.eat(b' ').ok_or("mount ID")?;
    let parent = scan.dec().ok_or("parent ID")?;
    scan.eat(b' ').ok_or("parent ID")?;
    let major = scan.dec().ok_or("major:minor")?;
    scan.eat(b':').ok_or("major:minor")?;
    let minor = scan.dec().ok_or("major:minor")?;
    scan.eat(b' ').ok_or("major:minor")?;
    let root = unescape_octal(scan.until(b' ').ok_or("root")?);
    let mount_point = unescape_octal(scan.until(b' ').ok_or("mount point")?);
    let options = scan.until(b' ').ok_or("mount options")?;
    let mut mount = Mount {
        id,
        parent,
        dev: (major, minor),
        root,
        mount_point,
        options,
        shared: None,
        master: None,
        propagate_from: None,
        unbindable: false,
        unknown: Vec::new(),
        fs_type: Cow::Borrowed(b""),
        source: Cow::Borrowed(b""),
        super_options: b"",
    };
    loop {
        let field = scan.until(b' ').ok_or("optional fields")?;
        if field == b"-" {
            break;
        }
        if field == b"unbindable" {
            mount.unbindable = true;
        } else if let Some(group) = field.strip_prefix(b"shared:") {
            mount.shared = Some(number(group).ok_or("shared")?);
        } else if let Some(group) = field.strip_prefix(b"master:") {
            mount.master = Some(number(group).ok_or("master")?);
        } else if let Some(group) = field.strip_prefix(b"propagate_from:") {
            mount.propagate_from = Some(number(group).ok_or("propagate_from")?);
        } else {
            mount.unknown.push(field);
        }
    }
    mount.fs_type = unescape_octal(scan.until(b' ').ok_or("filesystem type")?);
    mount.source = unescape_octal(scan.until(b' ').ok_or("mount source")?);
    mount.super_options = scan.rest;
    Ok(mount)
}

fn number(text: &[u8]) -> Option<u32> {
    let mut scan = Scan::new(text);
    let number = scan.dec()?;
    scan.is_empty().then_some(number)
}
