//! `--link-remap`: open files whose own name is gone while they have others. A dump gives such a file one more name, beside
//! the one that is gone; a restore finds it by that, and takes the name away once the tree is back.

use super::collect::{Collector, Contents, View};
use super::regular;
use crate::Problem;
use crate::problem::text;
use rewake_image::messages::{RemapFilePathEntry, RemapType};
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, Stat};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// How the names begin, as CRIU calls them.
const PREFIX: &str = "link_remap.";

/// Has the file of `view`, whose name `plain` is gone, saved behind regular-file id `id`.
///
/// # Errors
/// The option is not given, or the directory is gone too.
pub fn survey(
    collector: &mut Collector,
    id: u32,
    view: &View<'_>,
    plain: &[u8],
) -> Result<(), Problem> {
    if !collector.options.link_remap {
        return Err(view
            .problem("its name is gone or leads to another file now, but the file has other names")
            .remedy(
                "use --link-remap: it is given one more name beside that, until it is restored",
            ));
    }
    let key = (view.stat.st_dev, view.stat.st_ino);
    let remap_id = match collector.links.get(&key) {
        Some(id) => *id,
        None => {
            let path = free_name(plain, &view.stat).map_err(|e| {
                view.problem(format!("it cannot be given another name in its directory: {e}"))
                    .remedy("make the directory again, or close the file")
            })?;
            let remap_id = collector.new_id();
            let name = path.as_os_str().as_bytes().to_vec();
            collector.push(regular::entry_of_name(remap_id, name, &view.stat));
            let file = view.fd.try_clone().map_err(|e| view.problem(e.to_string()))?;
            collector.contents.push(Contents::Link { file, path });
            collector.links.insert(key, remap_id);
            remap_id
        }
    };
    let remap_type = Some(RemapType::Linked as i32);
    collector.remaps.push(RemapFilePathEntry { orig_id: id, remap_id, remap_type });
    Ok(())
}

/// A name in the directory of `plain` that is free, or leads to the file already.
fn free_name(plain: &[u8], stat: &Stat) -> Result<PathBuf, Errno> {
    let directory = Path::new(OsStr::from_bytes(plain)).parent().unwrap_or(Path::new("/"));
    rustix::fs::stat(directory)?;
    let number = stat.st_ino;
    let names = (0u32..).map(|i| match i {
        0 => directory.join(format!("{PREFIX}{number}")),
        i => directory.join(format!("{PREFIX}{number}.{i}")),
    });
    for path in names {
        match rustix::fs::lstat(&path) {
            Err(Errno::NOENT) => return Ok(path),
            // An earlier dump's: whoever takes it away, the file needs it no more then.
            Ok(other) if (other.st_dev, other.st_ino) == (stat.st_dev, stat.st_ino) => {
                return Ok(path);
            }
            Ok(_) => {}
            Err(e) => return Err(e),
        }
    }
    Err(Errno::EXIST)
}

/// Names that a dump has made; dropping this takes them away again.
#[derive(Debug, Default)]
pub struct Links(Vec<PathBuf>);

impl Links {
    /// Gives the files of a collection their names.
    ///
    /// # Errors
    /// A directory is not writable, or its file system knows no links.
    pub fn make(contents: &[Contents]) -> Result<Links, Problem> {
        let mut links = Links::default();
        for contents in contents {
            let Contents::Link { file, path } = contents else { continue };
            match link(file, path) {
                Ok(()) => {
                    log::info!("{} keeps an open file whose name is gone", path.display());
                    links.0.push(path.clone());
                }
                Err(Errno::EXIST) if is_same(file, path) => {}
                Err(e) => {
                    return Err(Problem::new(
                        text(path.as_os_str().as_bytes()),
                        format!("a file whose name is gone cannot be given this one: {e}"),
                    )
                    .remedy("close the file, or bring its name back"));
                }
            }
        }
        Ok(links)
    }

    /// Lets them stay: the images are complete.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn link(file: &OwnedFd, path: &Path) -> Result<(), Errno> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)
}

fn is_same(file: &OwnedFd, path: &Path) -> bool {
    match (rustix::fs::fstat(file), rustix::fs::lstat(path)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => false,
    }
}

/// Is this the name of a link that a dump has made?
#[must_use]
pub fn is_ours(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_bytes().starts_with(PREFIX.as_bytes()))
}

/// Takes names away, of which somebody else may have taken some.
pub fn remove(paths: &[PathBuf]) {
    for path in paths {
        match rustix::fs::unlink(path) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => log::warn!("{} stays behind: {e}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_go_with_a_failed_dump() {
        let dir = std::env::temp_dir().join(format!("rewake-links-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let (old, other) = (dir.join("old"), dir.join("other"));
        let file = std::fs::File::create(&old).unwrap();
        std::fs::hard_link(&old, &other).unwrap();
        std::fs::remove_file(&old).unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        let path = free_name(old.as_os_str().as_bytes(), &stat).unwrap();
        assert!(is_ours(&path) && !is_ours(&other));
        let contents = [Contents::Link { file: file.into(), path: path.clone() }];
        let links = Links::make(&contents).unwrap();
        assert!(path.exists());
        // The next dump takes what is there, and leaves it.
        assert_eq!(free_name(old.as_os_str().as_bytes(), &stat).unwrap(), path);
        drop(Links::make(&contents).unwrap());
        assert!(path.exists());
        drop(links);
        assert!(!path.exists());
        std::fs::write(&path, "somebody else's").unwrap();
        assert_ne!(free_name(old.as_os_str().as_bytes(), &stat).unwrap(), path);
        assert!(Links::make(&contents).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
