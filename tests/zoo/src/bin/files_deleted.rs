//! Kernel state: files without a name: a deleted open file with content and holes, one that is also mapped, O_TMPFILE,
//! one deleted while a child has it too, one whose name was taken by another file, a deleted directory.
#![allow(unsafe_code, reason = "raw descriptors and mappings")]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use zoo::{Rng, Zoo, bytes, cstring, ensure, ensure_eq, mmap, ok};

const LEN: usize = 100_000;

fn err(e: std::io::Error) -> String {
    e.to_string()
}

fn create(z: &Zoo, name: &str, seed: u64) -> Result<(File, Vec<u8>), String> {
    let mut options = File::options();
    let mut file = options
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(z.path(name))
        .map_err(err)?;
    let mut content = vec![0u8; LEN];
    Rng(seed).fill(&mut content);
    file.write_all(&content).map_err(err)?;
    Ok((file, content))
}

fn whole(file: &File) -> Result<Vec<u8>, String> {
    let mut content = vec![0u8; file.metadata().map_err(err)?.len() as usize];
    file.read_exact_at(&mut content, 0).map_err(err)?;
    Ok(content)
}

fn main() {
    zoo::run(|z| {
        let (mut plain, content) = create(z, "plain", 1)?;
        plain.seek(SeekFrom::Start(4321)).map_err(err)?;
        let (holes, _) = create(z, "holes", 2)?;
        holes.write_all_at(b"far away", 10 << 20).map_err(err)?;
        let (mapped, mapped_content) = create(z, "mapped", 3)?;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let map = mmap(0, LEN, rw, libc::MAP_SHARED, mapped.as_raw_fd(), 0)?;
        // Mapped only: no descriptor is left.
        let (only, only_content) = create(z, "only mapped", 4)?;
        let only_map = mmap(0, LEN, libc::PROT_READ, libc::MAP_PRIVATE, only.as_raw_fd(), 0)?;
        drop(only);
        let (replaced, replaced_content) = create(z, "replaced", 5)?;
        std::fs::remove_file(z.path("replaced")).map_err(err)?;
        std::fs::write(z.path("replaced"), "somebody else").map_err(err)?;
        let dir = cstring(z.dir());
        // SAFETY: NUL-terminated; the descriptor is owned by the file made of it.
        let tmp = unsafe { libc::open(dir.as_ptr(), libc::O_TMPFILE | libc::O_RDWR, 0o600) };
        let mut tmp = unsafe { File::from_raw_fd(ok(tmp as i64, "O_TMPFILE")? as i32) };
        tmp.write_all(b"never had a name").map_err(err)?;
        let read_only = File::open(z.path("plain")).map_err(err)?;
        std::fs::create_dir(z.path("gone dir")).map_err(err)?;
        let gone = File::open(z.path("gone dir")).map_err(err)?;
        std::fs::remove_dir(z.path("gone dir")).map_err(err)?;
        for name in ["plain", "holes", "mapped", "only mapped"] {
            std::fs::remove_file(z.path(name)).map_err(err)?;
        }
        let child = z.fork(|z| {
            z.publish("up", "");
            z.wait_for("written")?;
            let mut c = [0u8; 7];
            plain.read_exact_at(&mut c, 50_000).map_err(err)?;
            ensure_eq!(&c, b"written", "what the parent wrote, through the inherited descriptor");
            Ok(())
        })?;
        z.wait_for("up")?;
        let blocks = holes.metadata().map_err(err)?.blocks();
        z.ready()?;
        z.wait_for_check();

        for name in ["plain", "holes", "mapped", "only mapped", "gone dir"] {
            ensure!(!z.path(name).exists(), "{name} has its name back");
        }
        for (file, what) in
            [(&plain, "plain"), (&holes, "holes"), (&tmp, "O_TMPFILE"), (&replaced, "replaced")]
        {
            ensure_eq!(file.metadata().map_err(err)?.nlink(), 0, "links of {what}");
        }
        ensure_eq!(plain.metadata().map_err(err)?.mode() & 0o7777, 0o640, "mode");
        ensure_eq!(plain.stream_position().map_err(err)?, 4321, "position");
        ensure!(whole(&plain)? == content, "content of the plain one");
        ensure!(whole(&read_only)? == content, "content through the read-only descriptor");
        let there = whole(&holes)?;
        ensure!(
            there.len() == (10 << 20) + 8 && there.ends_with(b"far away"),
            "content after the hole"
        );
        ensure!(there[LEN..10 << 20].iter().all(|&b| b == 0), "the hole is not zero");
        let now = holes.metadata().map_err(err)?.blocks();
        ensure!(now <= blocks + 64, "the hole was filled: {now} blocks, {blocks} before");
        // SAFETY: mapped above.
        unsafe {
            ensure!(bytes(map, LEN) == mapped_content, "content of the mapping");
            bytes(map, LEN)[77] = 7;
            ensure_eq!(whole(&mapped)?[77], 7, "mapping and descriptor are one file");
            ensure!(
                bytes(only_map, LEN) == only_content,
                "content of the file that is only mapped"
            );
        }
        ensure!(whole(&replaced)? == replaced_content, "content of the replaced one");
        let other = std::fs::read(z.path("replaced")).map_err(err)?;
        ensure_eq!(other, b"somebody else", "the file that took the name");
        let mut text = String::new();
        tmp.seek(SeekFrom::Start(0)).map_err(err)?;
        tmp.read_to_string(&mut text).map_err(err)?;
        ensure_eq!(text, "never had a name", "content of the O_TMPFILE file");
        ensure!(gone.metadata().map_err(err)?.is_dir(), "the deleted directory is no directory");
        plain.write_all_at(b"written", 50_000).map_err(err)?;
        let mut seen = [0u8; 7];
        read_only.read_exact_at(&mut seen, 50_000).map_err(err)?;
        ensure_eq!(&seen, b"written", "the two descriptions are one file");
        z.publish("written", "");
        z.join(child)
    })
}
