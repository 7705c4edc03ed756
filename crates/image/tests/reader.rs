//! What is in a directory is read as it is, or refused with a reason.

mod common;

use std::{fs, os::unix::fs::FileExt};

use common::*;
use rewake_image::{
    ImageDir, ImageError, ImageWriter, OpenOptions, PageRun, PageSource, SEVERAL_STORES, StorePage,
    kind, messages::*, read_file, write_file,
};

/// A directory with an inventory of this version, written without this crate's writer.
fn dir_of_version(version: u8) -> TempDir {
    let dir = TempDir::new();
    dir.put("inventory.img", [0x16, 0x31, 0x31, 0x58, 2, 0, 0, 0, 8, version]);
    dir
}

fn frame(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u32).to_le_bytes()[..], message].concat()
}

const FS_V2: &[u8] = b"\x19\x43\x56\x54\x12\x39\x40\x51";

fn fs_image(content: &[u8]) -> Vec<u8> {
    [FS_V2, content].concat()
}

/// Reads `fs-7.img` of this content, and gives the error's text without the directory.
fn refusal(content: &[u8]) -> String {
    let dir = dir_of_version(2);
    dir.put("fs-7.img", content);
    let images = ImageDir::open(dir.path()).unwrap();
    let error = images.read_one(kind::FS, 7).unwrap_err();
    error.to_string().replace(dir.path().to_str().unwrap(), "DIR")
}

#[test]
fn versions() {
    let dir = dir_of_version(1);
    dir.put("fs-7.img", [&FS_V2[4..], &frame(&[8, 1, 16, 2])].concat());
    let entry = ImageDir::open(dir.path()).unwrap().read_one(kind::FS, 7).unwrap();
    assert_eq!(entry, FsEntry { cwd_id: 1, root_id: 2, umask: None });

    let dir = dir_of_version(3);
    assert!(matches!(ImageDir::open(dir.path()), Err(ImageError::Version { version: 3, .. })));

    let dir = TempDir::new();
    dir.put("inventory.img", [0x16, 0x31, 0x31, 0x58, 4, 0, 0, 0, 8, 0, 0x48, 1]);
    assert!(matches!(ImageDir::open(dir.path()), Err(ImageError::PreDump(_))));
    ImageDir::open_with(dir.path(), OpenOptions { pre_dump: true, ..Default::default() }).unwrap();
}

#[test]
fn a_missing_file_is_an_empty_list() {
    let dir = dir_of_version(2);
    let images = ImageDir::open(dir.path()).unwrap();
    assert_eq!(images.read_all(kind::FILES, ()).unwrap(), []);
    assert_eq!(images.read_opt(kind::CORE, 1).unwrap(), None);
    assert_eq!(images.read_pagemap(1).unwrap(), None);
    assert!(matches!(images.read_one(kind::CORE, 1), Err(ImageError::Missing(_))));
}

#[test]
fn a_parent_is_found_by_its_link() {
    let dir = dir_of_version(2);
    let images = ImageDir::open(dir.path()).unwrap();
    assert!(images.parent().unwrap().is_none());
    let parent = TempDir::new();
    parent.put("inventory.img", [0x16, 0x31, 0x31, 0x58, 4, 0, 0, 0, 8, 0, 0x48, 1]);
    std::os::unix::fs::symlink(parent.path(), dir.join("parent")).unwrap();
    assert_eq!(images.parent().unwrap().unwrap().inventory().pre_dump_mode, Some(1));
}

#[test]
fn refusals_name_the_place() {
    let good = frame(&[8, 1, 16, 2]);
    for (content, text) in [
        (fs_image(&[]), "DIR/fs-7.img: holds no messages where one belongs"),
        (
            fs_image(&[&good[..], &good].concat()),
            "DIR/fs-7.img: holds several messages where one belongs",
        ),
        (
            fs_image(&good[..2]),
            "DIR/fs-7.img: entry 0, byte 8: the bytes end within a message's length",
        ),
        (
            fs_image(&[0xff, 0xff, 0xff, 0xff, 0]),
            "DIR/fs-7.img: entry 0, byte 12: the message: a length of 4294967295 bytes where 1 are left",
        ),
        (
            fs_image(&frame(&[8, 1])),
            "DIR/fs-7.img: entry 0, byte 12: root_id: the required field is missing",
        ),
        (
            fs_image(&[&good[..], &frame(&[8, 1, 16, 2, 0x1a, 0])].concat()),
            "DIR/fs-7.img: entry 1, byte 24: umask: encoded as a length and bytes, but the field is a varint",
        ),
        (
            fs_image(&frame(&[8, 1, 16, 0xff, 0xff, 0xff, 0xff, 0x1f])),
            "DIR/fs-7.img: entry 0, byte 14: root_id: 8589934591 is out of the field's range",
        ),
        (
            fs_image(&frame(&[8, 1, 8, 1])),
            "DIR/fs-7.img: entry 0, byte 14: cwd_id: a second value for the field",
        ),
        (
            b"\x19\x43\x56\x54\x12\x39\x40\x52".to_vec(),
            "DIR/fs-7.img: starts with 0x52403912 instead of 0x51403912, so this is not a FS image",
        ),
        (
            b"\x19\x43\x56".to_vec(),
            "DIR/fs-7.img: entry 0, byte 0: the bytes end within the magic number",
        ),
    ] {
        assert_eq!(refusal(&content), text);
    }
}

#[test]
fn faults_in_nested_messages_name_the_way() {
    let mut core = CoreEntry { mtype: March::X8664.into(), ..Default::default() };
    core.thread_core =
        Some(ThreadCoreEntry { creds: Some(CredsEntry::default()), ..Default::default() });
    let mut bytes = prost::Message::encode_to_vec(&core);
    // the last field of the credentials, `secbits`, is required
    assert_eq!(bytes[bytes.len() - 2..], [0x68, 0]);
    let end = bytes.len();
    bytes[end - 2] = 0x78 | 2; // becomes `lsm_profile`, empty
    let fault = rewake_image::wire::decode::<CoreEntry>(&bytes).unwrap_err();
    assert_eq!(fault.field, "thread_core.creds.secbits");

    core.mtype = 77;
    let fault =
        rewake_image::wire::decode::<CoreEntry>(&prost::Message::encode_to_vec(&core)).unwrap_err();
    assert_eq!(fault.to_string(), "byte 0: mtype: 77 is not a value of march");
}

#[test]
fn unknown_fields_are_passed_over() {
    let dir = dir_of_version(2);
    dir.put("fs-7.img", fs_image(&frame(b"\x08\x01\x10\x02\xf2\x3f\x02hi\xf8\x3f\x05")));
    let entry = ImageDir::open(dir.path()).unwrap().read_one(kind::FS, 7).unwrap();
    assert_eq!(entry, FsEntry { cwd_id: 1, root_id: 2, umask: None });
}

#[test]
fn names_need_not_be_text() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    let entry = UtsnsEntry { nodename: b"\xff\xfe".to_vec(), domainname: vec![] };
    writer.write_one(kind::UTSNS, 1, &entry).unwrap();
    writer.commit(&inventory()).unwrap();
    assert_eq!(ImageDir::open(dir.path()).unwrap().read_one(kind::UTSNS, 1).unwrap(), entry);
}

#[test]
fn messages_do_not_nest_without_end() {
    let mut bytes = vec![0x0a, 0];
    for _ in 0..2000 {
        let mut outer = vec![0x0a, 0, 0x1a];
        prost::encoding::encode_varint(bytes.len() as u64, &mut outer);
        outer.extend(&bytes);
        bytes = outer;
    }
    let fault = rewake_image::wire::decode::<AaNamespace>(&bytes).unwrap_err();
    assert_eq!(fault.reason, rewake_image::wire::Reason::Depth);
}

#[test]
fn only_regular_files_are_images() {
    let dir = dir_of_version(2);
    fs::create_dir(dir.join("fs-1.img")).unwrap();
    let fifo = dir.join("fs-2.img");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o644)).unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.join("fs-3.img")).unwrap();
    let images = ImageDir::open(dir.path()).unwrap();
    for id in [1, 2, 3] {
        assert!(matches!(images.read_one(kind::FS, id), Err(ImageError::NotRegular(_))), "{id}");
    }
}

#[test]
fn pagemaps() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    let run = |vaddr, nr_pages, source| PageRun { vaddr, nr_pages, source, place: None };
    let runs = [
        run(0x1000, 2, PageSource::Stored),
        run(0x3000, 1, PageSource::Parent),
        run(0x8000, 3, PageSource::StoredLazy),
        run(0x7fff_ffff_f000, 1 << 40, PageSource::Lazy),
    ];
    writer.write_pagemap(7, 1, &runs).unwrap();
    writer.write_pagemap_shmem(7, 2, &[]).unwrap();
    writer.commit(&inventory()).unwrap();
    let images = ImageDir::open(dir.path()).unwrap();
    let pagemap = images.read_pagemap(7).unwrap().unwrap();
    assert_eq!((pagemap.pages_id, &pagemap.entries[..]), (1, &runs[..]));
    assert_eq!(pagemap.stored_bytes(), 5 * 4096);
    let places: Vec<_> = pagemap.with_places().map(|(_, place)| place).collect();
    let own = |page| Some(StorePage { store: 1, page });
    assert_eq!(places, [own(0), None, own(2), None]);
    assert_eq!(images.read_pagemap_shmem(7).unwrap().unwrap().entries, []);
}

#[test]
fn pagemaps_of_several_stores() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    let run = |vaddr, place| PageRun { vaddr, nr_pages: 2, source: PageSource::Stored, place };
    let place = |store, page| Some(StorePage { store, page });
    // A page may be there twice: it is the same for both addresses.
    let runs =
        [run(0x1000, None), run(0x3000, place(9, 5)), run(0x5000, None), run(0x8000, place(9, 6))];
    writer.write_pagemap(7, 1, &runs).unwrap();
    let version = InventoryEntry { img_version: SEVERAL_STORES, ..inventory() };
    writer.commit(&version).unwrap();
    let images = ImageDir::open(dir.path()).unwrap();
    let pagemap = images.read_pagemap(7).unwrap().unwrap();
    assert_eq!(pagemap.entries, runs);
    // What names a place takes none in the pagemap's own store.
    let places: Vec<_> = pagemap.with_places().map(|(_, place)| place).collect();
    assert_eq!(places, [place(1, 0), place(9, 5), place(1, 2), place(9, 6)]);
    assert_eq!(pagemap.stored_bytes(), 4 * 4096);
    let stored = images.stored_pages(7).unwrap().unwrap();
    let found: Vec<_> = stored.runs.iter().map(|r| (r.store.pages_id, r.offset)).collect();
    assert_eq!(found, [(1, 0), (9, 5 * 4096), (1, 2 * 4096), (9, 6 * 4096)]);
}

#[test]
fn old_pagemaps() {
    let entry = PagemapEntry { vaddr: 0x1000, compat_nr_pages: 2, ..Default::default() };
    let parent = PagemapEntry { vaddr: 0x3000, in_parent: Some(true), ..entry.clone() };
    let pagemap = pagemap_of(&[entry, parent]).unwrap();
    let sources: Vec<_> = pagemap.iter().map(|run| (run.nr_pages, run.source)).collect();
    assert_eq!(sources, [(2, PageSource::Stored), (2, PageSource::Parent)]);
}

#[test]
fn impossible_pagemaps() {
    let entry = |vaddr, nr_pages, flags| PagemapEntry {
        vaddr,
        nr_pages: Some(nr_pages),
        flags: Some(flags),
        ..Default::default()
    };
    let placed =
        |flags, store, store_page| PagemapEntry { store, store_page, ..entry(0x1000, 1, flags) };
    for (entries, text) in [
        (vec![entry(0x1001, 1, 4)], "entry 1, byte 18: vaddr: 0x1001 is not page-aligned"),
        (vec![entry(0x1000, 0, 4)], "entry 1, byte 18: nr_pages: a run of no pages"),
        (vec![entry(0x1000, 1, 5)], "flags: 0x5 is no combination of page flags"),
        (vec![entry(0x1000, 1, 0)], "flags: 0x0 is no combination of page flags"),
        (vec![entry(0x1000, 2, 4), entry(0x2000, 1, 4)], "entry 2, byte "),
        (vec![entry(0x2000, 1, 4), entry(0x1000, 1, 4)], "0x1000 is not above the run before it"),
        (vec![entry(0x2000, 1, 4), entry(0x2000, 1, 4)], "0x2000 is not above the run before it"),
        (vec![entry(0x1000, 1 << 52, 2)], "pages reach beyond the address space"),
        (vec![entry(0x1000, u64::MAX, 2)], "pages reach beyond the address space"),
        (vec![entry(0, 1 << 52, 4)], "more pages than a pages file can hold"),
        (vec![entry(0, 1 << 52, 2), entry(0x1000, 1, 2)], "0x1000 is not above the run before it"),
        (
            vec![entry(0, 1 << 50, 4), entry(1 << 62, 1 << 50, 4)],
            "more pages than a pages file can hold",
        ),
        (vec![placed(4, Some(2), None)], "store: a place without pages, or half of one"),
        (vec![placed(4, None, Some(2))], "store: a place without pages, or half of one"),
        (vec![placed(1, Some(2), Some(2))], "store: a place without pages, or half of one"),
        (vec![placed(4, Some(2), Some(1 << 51))], "is beyond what a pages file can hold"),
        (vec![placed(4, Some(2), Some(u64::MAX))], "is beyond what a pages file can hold"),
    ] {
        let error = pagemap_of(&entries).unwrap_err().to_string();
        assert!(error.contains(text), "{error}\nshould have: {text}");
    }
    // the very last page
    assert_eq!(pagemap_of(&[entry(u64::MAX - 4095, 1, 2)]).unwrap()[0].end(), 0);
}

/// Reads a pagemap of these entries, written as they are.
fn pagemap_of(entries: &[PagemapEntry]) -> Result<Vec<PageRun>, ImageError> {
    let dir = dir_of_version(2);
    let mut bytes = b"\x19\x43\x56\x54\x25\x40\x08\x56\x02\0\0\0\x08\x01".to_vec();
    entries.iter().for_each(|entry| bytes.extend(frame(&prost::Message::encode_to_vec(entry))));
    dir.put("pagemap-7.img", bytes);
    let pagemap = ImageDir::open(dir.path()).unwrap().read_pagemap(7)?;
    Ok(pagemap.unwrap().entries)
}

#[test]
fn ghosts_of_both_layouts() {
    let dir = TempDir::new();
    let writer = ImageWriter::create(dir.path()).unwrap();
    let whole = GhostFileEntry { mode: 0o100_644, ..Default::default() };
    let mut stream = writer.stream(kind::GHOST_FILE, 0x1a);
    stream.push_other(&whole).unwrap();
    stream.payload(b"content").unwrap();
    stream.finish().unwrap();
    let sparse = GhostFileEntry { chunks: Some(true), size: Some(1 << 30), ..whole.clone() };
    let mut stream = writer.stream(kind::GHOST_FILE, 0x1b);
    stream.push_other(&sparse).unwrap();
    for (off, content) in [(0, &b"start"[..]), ((1 << 30) - 3, b"end")] {
        stream.push_other(&GhostChunkEntry { len: content.len() as u64, off }).unwrap();
        stream.payload(content).unwrap();
    }
    stream.finish().unwrap();
    writer.commit(&inventory()).unwrap();
    assert!(dir.names().contains("ghost-file-1a.img"));

    let images = ImageDir::open(dir.path()).unwrap();
    let content = |id: u32| {
        let ghost = images.read_ghost(id).unwrap();
        let chunk = |chunk: &rewake_image::GhostChunk| {
            let mut content = vec![0; chunk.length as usize];
            ghost.file.read_exact_at(&mut content, chunk.image_offset).unwrap();
            (chunk.offset, content)
        };
        (ghost.entry.clone(), ghost.chunks.iter().map(chunk).collect::<Vec<_>>())
    };
    assert_eq!(content(0x1a), (whole, vec![(0, b"content".to_vec())]));
    let expected = vec![(0, b"start".to_vec()), ((1 << 30) - 3, b"end".to_vec())];
    assert_eq!(content(0x1b), (sparse, expected));

    // damage in the content is noticed too
    let path = dir.join("ghost-file-1b.img");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(matches!(images.read_ghost(0x1b), Err(ImageError::Damaged { .. })));
}

#[test]
fn impossible_ghosts() {
    let magic = b"\x19\x43\x56\x54\x05\x36\x58\x52";
    let entry = GhostFileEntry { chunks: Some(true), size: Some(100), ..Default::default() };
    for (chunk, text) in [
        (GhostChunkEntry { len: 50, off: 0 }, "len: a length of 50 bytes where 10 are left"),
        (GhostChunkEntry { len: u64::MAX, off: 0 }, "len: a length of 18446744073709551615 bytes"),
        (GhostChunkEntry { len: 10, off: 91 }, "off: 91 is out of the field's range"),
        (
            GhostChunkEntry { len: 10, off: u64::MAX },
            "off: 18446744073709551615 is out of the field's range",
        ),
    ] {
        let dir = dir_of_version(2);
        let frames =
            [&prost::Message::encode_to_vec(&entry), &prost::Message::encode_to_vec(&chunk)]
                .map(|m| frame(m));
        dir.put("ghost-file-1.img", [&magic[..], &frames.concat(), &[0; 10]].concat());
        let error = ImageDir::open(dir.path()).unwrap().read_ghost(1).unwrap_err().to_string();
        assert!(
            error.contains("ghost-file-1.img: entry 1, byte 26: ") && error.contains(text),
            "{error}"
        );
    }
}

#[test]
fn single_files() {
    let dir = TempDir::new();
    let entry = StatsEntry {
        restore: Some(RestoreStatsEntry { restore_time: 5, ..Default::default() }),
        dump: None,
    };
    let path = dir.join("stats-restore");
    for _ in 0..2 {
        write_file(&path, kind::STATS_RESTORE, [&entry]).unwrap();
        assert_eq!(read_file(&path, kind::STATS_RESTORE).unwrap(), std::slice::from_ref(&entry));
    }
    assert_eq!(fs::read(&path).unwrap()[..8], *b"\x40\x59\x10\x55\x06\x33\x09\x57");
}

#[test]
fn kinds_by_magic_and_name() {
    let name =
        |first, second| kind::by_magic(first, second).map(|(info, length)| (info.name, length));
    assert_eq!(name(kind::INVENTORY_MAGIC, 0), Some(("INVENTORY", 4)));
    assert_eq!(name(kind::IMAGE_MAGIC, 0x5505_3847), Some(("CORE", 8)));
    assert_eq!(name(0x5505_3847, 0), Some(("CORE", 4)));
    assert_eq!(name(kind::IMAGE_MAGIC, 0x5608_4025), Some(("PAGEMAP", 8)));
    assert_eq!(name(kind::IMAGE_MAGIC, 0x5925_5647), Some(("SIGNAL", 8)));
    assert_eq!(name(kind::IMAGE_MAGIC, 0x6734_3323), Some(("BINFMT_MISC", 8)));
    assert_eq!(name(kind::SERVICE_MAGIC, 0x5709_3306), Some(("STATS", 8)));
    assert_eq!(name(1, 2), None);

    let by_name = |name: &str| kind::by_file_name(name).map(|(info, id)| (info.name, id.number()));
    assert_eq!(by_name("core-12.img"), Some(("CORE", Some(12))));
    assert_eq!(by_name("tcp-stream-1f.img"), Some(("TCP_STREAM", Some(0x1f))));
    assert_eq!(by_name("pagemap-shmem-3.img"), Some(("SHMEM_PAGEMAP", Some(3))));
    assert_eq!(by_name("tmpfs-dev-45.tar.gz.img"), Some(("TMPFS_DEV", Some(45))));
    assert_eq!(by_name("files.img"), Some(("FILES", None)));
    assert_eq!(by_name("stats-dump"), Some(("STATS", None)));
    for no in [
        "core-.img",
        "core-007.img",
        "core-+1.img",
        "core-1",
        "core-1.img2",
        "tcp-stream-1F.img",
        "disk.img",
    ] {
        assert_eq!(by_name(no), None, "{no}");
    }
    assert_eq!(kind::CORE.file_name(5), "core-5.img");
    assert_eq!(kind::GHOST_FILE.file_name(0xab_u64), "ghost-file-ab.img");
    assert_eq!(kind::FILES.file_name(()), "files.img");
}
