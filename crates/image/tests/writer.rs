//! A checkpoint appears whole or not at all.

mod common;

use std::{ffi::CStr, fs, os::unix::fs::symlink, thread};

use common::*;
use rewake_image::{ImageDir, ImageError, ImageWriter, OpenOptions, kind, messages::*};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

#[test]
fn a_commit_makes_a_checkpoint() {
    let dir = TempDir::new();
    dir.put("dump.log", "foreign");
    let writer = ImageWriter::create(dir.path()).unwrap();
    fill(&writer, 7);
    assert!(!dir.names().contains("inventory.img"));
    let error = ImageDir::open(dir.path()).unwrap_err();
    assert!(matches!(error, ImageError::NoCheckpoint(_)), "{error}");
    writer.commit(&inventory()).unwrap();

    let whole = names([
        "dump.log",
        "fs-7.img",
        "inventory.img",
        "pages-1.img",
        "pstree.img",
        "rewake.manifest",
    ]);
    assert_eq!(dir.names(), whole);
    let images = ImageDir::open(dir.path()).unwrap();
    assert_eq!(*images.inventory(), inventory());
    assert_eq!(images.read_one(kind::FS, 7).unwrap(), fs_entry(1));
    assert_eq!(images.open_raw("pages-1.img").unwrap().metadata().unwrap().len(), 4096);
}

#[test]
fn the_bytes_are_those_of_criu() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    writer.write_one(kind::FS, 7, &FsEntry { cwd_id: 3, root_id: 0, umask: Some(0) }).unwrap();
    writer.write_one(kind::SECCOMP, (), &SeccompEntry::default()).unwrap();
    writer.commit(&inventory()).unwrap();
    // both magic numbers, a length, and all three fields, two of them 0
    let fs_image = b"\x19\x43\x56\x54\x12\x39\x40\x51\x06\0\0\0\x08\x03\x10\0\x18\0";
    assert_eq!(fs::read(dir.join("fs-7.img")).unwrap(), fs_image);
    assert_eq!(
        fs::read(dir.join("seccomp.img")).unwrap(),
        b"\x19\x43\x56\x54\x49\x30\x41\x64\0\0\0\0"
    );
    assert_eq!(
        fs::read(dir.join("inventory.img")).unwrap(),
        b"\x16\x31\x31\x58\x04\0\0\0\x08\x02\x10\x01"
    );
}

#[test]
fn an_abort_removes_what_was_written() {
    let dir = TempDir::new();
    dir.put("dump.log", "foreign");
    let writer = ImageWriter::create(dir.path()).unwrap();
    fill(&writer, 7);
    writer.abort().unwrap();
    assert_eq!(dir.names(), names(["dump.log"]));

    let writer = ImageWriter::create(dir.path()).unwrap();
    fill(&writer, 7);
    drop(writer);
    assert_eq!(dir.names(), names(["dump.log"]));
}

#[test]
fn an_older_checkpoint_stays_until_the_commit() {
    let dir = TempDir::new();
    write_checkpoint(dir.path(), 7);
    let before = dir.names();
    let writer = ImageWriter::create(dir.path()).unwrap();
    fill(&writer, 8);
    assert_eq!(ImageDir::open(dir.path()).unwrap().read_one(kind::FS, 7).unwrap(), fs_entry(1));
    drop(writer);
    assert_eq!(dir.names(), before);
    assert_eq!(ImageDir::open(dir.path()).unwrap().read_one(kind::FS, 7).unwrap(), fs_entry(1));
}

#[test]
fn a_commit_replaces_an_older_checkpoint_and_nothing_else() {
    let dir = TempDir::new();
    write_checkpoint(dir.path(), 7);
    for name in ["dump.log", "stats-dump", "irmap-cache", "disk.img", "amdgpu-kfd-1.img"] {
        dir.put(name, "foreign");
    }
    symlink("../elsewhere", dir.join("parent")).unwrap();
    let writer = ImageWriter::create(dir.path()).unwrap();
    fill(&writer, 8);
    writer.commit(&inventory()).unwrap();

    let mut whole =
        names(["fs-8.img", "inventory.img", "pages-1.img", "pstree.img", "rewake.manifest"]);
    // The link to a parent is the older checkpoint's.
    whole.extend(names(["dump.log", "stats-dump", "irmap-cache", "disk.img", "amdgpu-kfd-1.img"]));
    assert_eq!(dir.names(), whole);
    let images = ImageDir::open(dir.path()).unwrap();
    assert_eq!(images.read_all(kind::PSTREE, ()).unwrap()[0].pid, 8);
    assert_eq!(images.read_opt(kind::FS, 7).unwrap(), None);
}

#[test]
fn what_a_killed_dump_left_is_removed() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    fill(&writer, 7);
    dir.put(".rewake-inventory", "half");
    // as if killed: nothing is undone, and the lock goes with the last descriptor of the directory
    let copy = TempDir::new();
    for name in dir.names() {
        fs::copy(dir.join(&name), copy.join(&name)).unwrap();
    }
    fs::create_dir(copy.join(".rewake-0123abcd")).unwrap();
    fs::write(copy.join(".rewake-0123abcd/core-1.img"), "half").unwrap();
    copy.put("dump.log", "foreign");

    let writer = ImageWriter::create(copy.path()).unwrap();
    assert_eq!(copy.names(), names(["dump.log"]));
    fill(&writer, 9);
    writer.commit(&inventory()).unwrap();
    assert_eq!(ImageDir::open(copy.path()).unwrap().read_all(kind::PSTREE, ()).unwrap()[0].pid, 9);
}

#[test]
fn two_dumps_do_not_share_a_directory() {
    let dir = TempDir::new();
    let first = ImageWriter::create(dir.path()).unwrap();
    let error = ImageWriter::create(dir.path()).unwrap_err();
    assert!(matches!(error, ImageError::Busy(_)), "{error}");
    drop(first);
    ImageWriter::create(dir.path()).unwrap();
}

#[test]
fn threads_write_at_once() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    thread::scope(|scope| {
        for thread in 0..4u32 {
            let writer = &writer;
            scope.spawn(move || {
                for n in 0..100 {
                    writer.write_one(kind::FS, thread * 100 + n, &fs_entry(n)).unwrap();
                }
            });
        }
    });
    writer.commit(&inventory()).unwrap();
    let images = ImageDir::open(dir.path()).unwrap();
    for n in 0..400u32 {
        assert_eq!(images.read_one(kind::FS, n).unwrap(), fs_entry(n % 100));
    }
}

#[test]
fn a_stream_makes_a_file_with_its_first_message() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    writer.stream(kind::FIFO_DATA, ()).finish().unwrap();
    writer.write_all(kind::TTY_INFO, (), []).unwrap();
    assert!(dir.names().is_empty());

    let mut stream = writer.stream(kind::PIPES_DATA, ());
    let contents = [vec![1; 10], vec![], vec![2; 1 << 20], vec![3; 70_000], vec![4; 200_000]];
    let entry =
        |n: usize| PipeDataEntry { pipe_id: n as u32, bytes: contents[n].len() as u32, size: None };
    for (n, content) in contents.iter().enumerate() {
        stream.push(&entry(n)).unwrap();
        stream.payload(content).unwrap();
    }
    stream.finish().unwrap();
    writer.commit(&inventory()).unwrap();
    let read = ImageDir::open(dir.path()).unwrap().read_with_payload(kind::PIPES_DATA, ()).unwrap();
    let expected: Vec<_> = (0..contents.len()).map(|n| (entry(n), contents[n].clone())).collect();
    assert!(read == expected);
}

#[test]
fn ipc_payloads_are_padded() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    let desc = IpcDescEntry { id: 5, ..Default::default() };
    let mut sems = writer.stream(kind::IPCNS_SEM, 1);
    sems.push(&IpcSemEntry { desc: desc.clone(), nsems: 3 }).unwrap();
    sems.payload_padded(&[1, 0, 2, 0, 3, 0], 8).unwrap();
    sems.finish().unwrap();
    let queue = IpcMsgEntry { desc, qbytes: 16384, qnum: 2 };
    let messages = [(1, &b"hello"[..]), (2, b"")]
        .map(|(mtype, text)| (IpcMsg { mtype, msize: text.len() as u32 }, text.to_vec()));
    let mut queues = writer.stream(kind::IPCNS_MSG, 1);
    queues.push(&queue).unwrap();
    for (message, text) in &messages {
        queues.push_other(message).unwrap();
        queues.payload_padded(text, 8).unwrap();
    }
    queues.finish().unwrap();
    writer.commit(&inventory()).unwrap();

    let images = ImageDir::open(dir.path()).unwrap();
    assert_eq!(
        images.read_with_payload(kind::IPCNS_SEM, 1).unwrap()[0].1,
        [1, 0, 2, 0, 3, 0, 0, 0]
    );
    assert_eq!(images.read_ipc_queues(1).unwrap(), [(queue, messages.to_vec())]);
}

#[test]
fn an_unfinished_stream_forbids_the_commit() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    let mut stream = writer.stream(kind::PIPES_DATA, ());
    stream.push(&PipeDataEntry { pipe_id: 1, bytes: 5, size: None }).unwrap();
    drop(stream);
    let error = writer.commit(&inventory()).unwrap_err();
    assert!(matches!(error, ImageError::Unfinished(_)), "{error}");
    assert!(dir.names().is_empty());
}

#[test]
fn names_that_are_taken_or_reserved_are_refused() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    for name in
        ["../x", "a/b", "", ".", "..", "a b", "inventory.img", "rewake.manifest", ".rewake-x"]
    {
        assert!(matches!(writer.create_raw(name), Err(ImageError::BadName(_))), "{name}");
    }
    writer.write_raw("iptables-1.img", b"").unwrap();
    assert!(matches!(writer.write_raw("iptables-1.img", b"again"), Err(ImageError::Io { .. })));
}

#[test]
fn a_changed_file_is_noticed() {
    let dir = TempDir::new();
    write_checkpoint(dir.path(), 7);
    let image = dir.join("fs-7.img");
    let good = fs::read(&image).unwrap();

    let mut other = good.clone();
    *other.last_mut().unwrap() = 1; // the umask
    fs::write(&image, &other).unwrap();
    let images = ImageDir::open(dir.path()).unwrap();
    let error = images.read_one(kind::FS, 7).unwrap_err();
    assert!(matches!(&error, ImageError::Damaged { path, .. } if *path == image), "{error}");
    let unverified = OpenOptions { verify: false, ..Default::default() };
    let edited =
        ImageDir::open_with(dir.path(), unverified).unwrap().read_one(kind::FS, 7).unwrap();
    assert_eq!(edited.umask, Some(1));

    fs::write(&image, &good[..good.len() - 1]).unwrap();
    assert!(matches!(images.read_one(kind::FS, 7), Err(ImageError::Damaged { .. })));
    fs::remove_file(&image).unwrap();
    assert!(matches!(images.read_opt(kind::FS, 7), Err(ImageError::Damaged { .. })));
    fs::write(dir.join("pages-1.img"), [0; 4095]).unwrap();
    assert!(matches!(images.open_raw("pages-1.img"), Err(ImageError::Damaged { .. })));

    let mut manifest = fs::read(dir.join("rewake.manifest")).unwrap();
    manifest[30] ^= 1;
    fs::write(dir.join("rewake.manifest"), manifest).unwrap();
    assert!(matches!(ImageDir::open(dir.path()), Err(ImageError::Damaged { .. })));
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let dir = TempDir::new();
    let Some(_mounted) = mount_tmpfs(&dir, c"size=64k") else {
        eprintln!("skipped: no right to mount a tmpfs");
        return;
    };
    write_checkpoint(dir.path(), 7);
    let before = dir.names();
    let writer = ImageWriter::create(dir.path()).unwrap();
    let error = (0..100u32)
        .find_map(|n| writer.write_raw(&format!("iptables-{n}.img"), &[1; 4000]).err())
        .expect("64 KiB hold no 400 KiB");
    let text = error.to_string();
    assert!(matches!(error, ImageError::NoSpace { .. }), "{text}");
    assert!(text.contains("iptables-") && text.contains(dir.path().to_str().unwrap()), "{text}");
    drop(writer);
    assert_eq!(dir.names(), before);
    assert_eq!(ImageDir::open(dir.path()).unwrap().read_one(kind::FS, 7).unwrap(), fs_entry(1));
}

/// Mounts a tmpfs, if that is allowed, until the returned value is dropped.
fn mount_tmpfs<'d>(dir: &'d TempDir, options: &CStr) -> Option<Mounted<'d>> {
    let mounted = mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), Some(options));
    mounted.ok().map(|()| Mounted(dir))
}

struct Mounted<'d>(&'d TempDir);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}
