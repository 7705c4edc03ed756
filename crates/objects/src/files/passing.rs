//! Names that a restore gives for a moment to what has none: it can only be opened by one.

use crate::Problem;
use crate::problem::text;
use rustix::fs::{AtFlags, CWD, Mode};
use rustix::io::Errno;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

#[derive(Debug)]
struct Name {
    path: PathBuf,
    is_dir: bool,
    /// A directory that was only made for what was in it.
    spare: bool,
}

impl Name {
    fn take_away(&self) -> rustix::io::Result<()> {
        let flags = if self.is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(CWD, &self.path, flags)
    }
}

/// All of them; dropping this takes them away.
#[derive(Debug, Default)]
pub struct Names(Vec<Name>);

impl Names {
    /// Notes a name that was given.
    pub fn add(&mut self, path: PathBuf, is_dir: bool) {
        self.0.push(Name { path, is_dir, spare: false });
    }

    /// Was this name given?
    #[must_use]
    pub fn has(&self, path: &Path) -> bool {
        self.0.iter().any(|name| name.path == path)
    }

    /// Is there a directory that was made for what was in it? It is another's from now on.
    pub fn take_directory(&mut self, path: &Path) -> bool {
        let spare = self.0.iter_mut().find(|name| name.spare && name.path == path);
        spare.map(|name| name.spare = false).is_some()
    }

    /// Makes the directories above `path` that are gone.
    ///
    /// # Errors
    /// One cannot be made.
    pub fn make_parents(&mut self, path: &Path) -> Result<(), Problem> {
        let Some(parent) = path.parent() else { return Ok(()) };
        match rustix::fs::stat(parent) {
            Err(Errno::NOENT) => {}
            // Whatever is wrong with it, the file is told to be in the way of.
            _ => return Ok(()),
        }
        self.make_parents(parent)?;
        rustix::fs::mkdir(parent, Mode::RWXU).map_err(|e| {
            Problem::new(
                text(parent.as_os_str().as_bytes()),
                format!("the directory of a deleted file cannot be made for a moment: {e}"),
            )
        })?;
        self.0.push(Name { path: parent.to_owned(), is_dir: true, spare: true });
        Ok(())
    }

    /// Takes them away: who needs them has opened what they lead to.
    ///
    /// # Errors
    /// One cannot be removed; it was tried twice.
    pub fn end(&mut self) -> Result<(), Problem> {
        self.inmost_first();
        while let Some(name) = self.0.last() {
            name.take_away().map_err(|e| {
                Problem::new(
                    text(name.path.as_os_str().as_bytes()),
                    format!("a deleted file cannot be rid of the name it has for a moment: {e}"),
                )
            })?;
            self.0.pop();
        }
        Ok(())
    }

    /// Sorts them so that what is in a directory is after it.
    fn inmost_first(&mut self) {
        self.0.sort_by_key(|name| (!name.is_dir, name.path.components().count()));
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.inmost_first();
        while let Some(name) = self.0.pop() {
            if let Err(e) = name.take_away() {
                log::warn!("the name {} stays behind: {e}", name.path.display());
            }
        }
    }
}

/// `path`, or a name beside it if that is taken by another file now.
#[must_use]
pub fn unused(path: &Path) -> PathBuf {
    let mut tried = path.to_owned();
    let mut count = 0u32;
    while rustix::fs::lstat(&tried).is_ok() {
        let mut name = path.as_os_str().to_owned();
        match count {
            0 => name.push(format!(".{}.ghost", std::process::id())),
            _ => name.push(format!(".{}.{count}.ghost", std::process::id())),
        }
        tried = PathBuf::from(name);
        count += 1;
    }
    tried
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_go() {
        let top = std::env::temp_dir().join(format!("rewake-passing-{}", std::process::id()));
        let file = top.join("b/c/file");
        for fails in [false, true] {
            let mut names = Names::default();
            names.make_parents(&file).unwrap();
            names.make_parents(&file).unwrap();
            assert!(names.has(&top) && names.take_directory(&top.join("b/c")));
            assert!(!names.take_directory(&top.join("b/c")));
            std::fs::write(&file, "").unwrap();
            names.add(file.clone(), false);
            assert_ne!(unused(&file), file);
            if !fails {
                names.end().unwrap();
            }
            drop(names);
            assert!(!top.exists());
        }
    }
}
