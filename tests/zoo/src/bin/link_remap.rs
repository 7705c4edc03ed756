//! Kernel state: open files whose own name is gone while they have another: one that is open twice and in a child, one whose
//! name was taken by another file, one that is only mapped.
#![allow(unsafe_code, reason = "a mapping")]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use zoo::{Zoo, bytes, ensure, ensure_eq, mmap};

fn err(e: std::io::Error) -> String {
    e.to_string()
}

/// A file whose name is gone; it is still there under `name` with "kept" before it.
fn create(z: &Zoo, name: &str, content: &str) -> Result<(File, File), String> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let mut file = options.open(z.path(name)).map_err(err)?;
    file.write_all(content.as_bytes()).map_err(err)?;
    let again = File::open(z.path(name)).map_err(err)?;
    std::fs::hard_link(z.path(name), z.path(&format!("kept {name}"))).map_err(err)?;
    std::fs::remove_file(z.path(name)).map_err(err)?;
    Ok((file, again))
}

/// Names that dumps have made and no restore has taken away: of those after which the program ran on.
fn left(z: &Zoo) -> Result<u64, String> {
    let names = std::fs::read_dir(z.dir()).map_err(err)?.flatten();
    let ours = names.filter(|e| e.file_name().as_encoded_bytes().starts_with(b"link_remap"));
    Ok(ours.count() as u64)
}

fn main() {
    zoo::run(|z| {
        let (mut gone, again) = create(z, "gone", "content of the gone one")?;
        gone.seek(SeekFrom::Start(11)).map_err(err)?;
        let (replaced, _) = create(z, "replaced", "the old one")?;
        std::fs::write(z.path("replaced"), "somebody else").map_err(err)?;
        let (mapped, _) = create(z, "mapped", "only mapped")?;
        let map = mmap(0, 11, libc::PROT_READ, libc::MAP_SHARED, mapped.as_raw_fd(), 0)?;
        drop(mapped);
        let child = z.fork(|z| {
            z.publish("up", "");
            z.wait_for("written")?;
            let mut text = [0u8; 7];
            again.read_exact_at(&mut text, 0).map_err(err)?;
            ensure_eq!(&text, b"changed", "what the parent wrote");
            Ok(())
        })?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();

        let mut text = String::new();
        gone.read_to_string(&mut text).map_err(err)?;
        ensure_eq!(text, "the gone one", "content from the position on");
        for (file, name) in [(&gone, "gone"), (&again, "gone"), (&replaced, "replaced")] {
            let (open, kept) = (file.metadata(), z.path(&format!("kept {name}")).metadata());
            let (open, kept) = (open.map_err(err)?, kept.map_err(err)?);
            ensure_eq!((open.dev(), open.ino()), (kept.dev(), kept.ino()), "the file of {name}");
        }
        // SAFETY: mapped above.
        ensure_eq!(unsafe { &bytes(map, 11)[..] }, b"only mapped", "content of the mapping");
        std::fs::write(z.path("kept mapped"), "still a map").map_err(err)?;
        ensure_eq!(unsafe { &bytes(map, 11)[..] }, b"still a map", "the mapping is of the file");
        let other = std::fs::read(z.path("replaced")).map_err(err)?;
        ensure_eq!(other, b"somebody else", "the file that took the name");
        for name in ["gone", "mapped"] {
            ensure!(!z.path(name).exists(), "{name} has its name back");
        }
        let left = left(z)?;
        ensure!(left == 0 || left == 3, "{left} names are left of dumps");
        let links = gone.metadata().map_err(err)?.nlink();
        ensure_eq!(links, 1 + left / 3, "names of the file");
        gone.write_all_at(b"changed", 0).map_err(err)?;
        z.publish("written", "");
        z.join(child)
    })
}
