//! A directory for a test, and the smallest checkpoint.

#![allow(dead_code, unreachable_pub)] // each test binary uses a part

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use rewake_image::{ImageWriter, kind, messages::*};

/// A directory that is removed with everything in it.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "rewake-image-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        TempDir(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The names of what is in it.
    pub fn names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    pub fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.join(name), content).unwrap();
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

pub fn inventory() -> InventoryEntry {
    InventoryEntry { img_version: 2, fdinfo_per_id: Some(true), ..Default::default() }
}

pub fn fs_entry(cwd_id: u32) -> FsEntry {
    FsEntry { cwd_id, root_id: 2, umask: Some(0) }
}

/// A checkpoint of two messages and a page.
pub fn write_checkpoint(dir: &Path, pid: u32) {
    let writer = ImageWriter::create(dir).unwrap();
    fill(&writer, pid);
    writer.commit(&inventory()).unwrap();
}

pub fn fill(writer: &ImageWriter, pid: u32) {
    let process = PstreeEntry { pid, ppid: 0, pgid: pid, sid: pid, threads: vec![pid] };
    writer.write_all(kind::PSTREE, (), [&process]).unwrap();
    writer.write_one(kind::FS, pid, &fs_entry(1)).unwrap();
    let pages = writer.create_raw("pages-1.img").unwrap();
    std::os::unix::fs::FileExt::write_all_at(&pages, &[7; 4096], 0).unwrap();
}
