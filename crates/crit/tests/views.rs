//! `crit x`: the exact text of the views, as CRIU's crit 4.2 has it, of a checkpoint that is made here.

mod common;

use std::{fs, path::PathBuf};

use prost::Message;
use rewake_crit::{View, explore};
use rewake_image::{
    kind::{self, Id, Kind, KindInfo},
    messages::*,
};

struct Checkpoint(PathBuf);

impl Checkpoint {
    fn new(name: &str) -> Self {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("views-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Checkpoint(dir)
    }

    fn put<M: Message>(&self, kind: Kind<M>, id: impl Into<Id>, messages: &[M]) {
        self.write(kind.info(), id.into(), messages.iter().map(Message::encode_to_vec));
    }

    fn write(&self, kind: &KindInfo, id: Id, messages: impl IntoIterator<Item = Vec<u8>>) {
        let mut out = common::header(kind);
        for message in messages {
            out.extend((message.len() as u32).to_le_bytes());
            out.extend(message);
        }
        fs::write(self.0.join(kind.file_name(id)), out).unwrap();
    }

    fn view(&self, view: View) -> Result<String, rewake_crit::Error> {
        let mut out = Vec::new();
        explore(&self.0, view, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn shows(&self, view: View, lines: &[&str]) {
        let found = self.view(view).unwrap();
        assert_eq!(found.lines().collect::<Vec<_>>(), lines);
        assert!(found.ends_with('\n'));
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn process(pid: u32, ppid: u32, pgid: u32, sid: u32) -> PstreeEntry {
    PstreeEntry { pid, ppid, pgid, sid, threads: vec![pid] }
}

fn core(comm: &str) -> CoreEntry {
    let tc = TaskCoreEntry { task_state: 1, comm: comm.into(), ..Default::default() };
    CoreEntry { mtype: 1, tc: Some(tc), ..Default::default() }
}

fn regular(id: u32, name: &str) -> FileEntry {
    let reg = RegFileEntry { id, name: name.into(), ..Default::default() };
    FileEntry { r#type: FdTypes::Reg.into(), id, reg: Some(reg.into()), ..Default::default() }
}

fn unix(id: u32, ino: u32, peer: u32, name: &[u8]) -> FileEntry {
    let usk = UnixSkEntry { id, ino, peer, name: name.to_vec(), ..Default::default() };
    FileEntry { r#type: FdTypes::Unixsk.into(), id, usk: Some(usk.into()), ..Default::default() }
}

fn vma(start: u64, pages: u64, status: u32) -> VmaEntry {
    VmaEntry {
        start,
        end: start + pages * 4096,
        prot: 3,
        flags: 0x22,
        status,
        fd: -1,
        ..Default::default()
    }
}

#[test]
fn ps() {
    let dir = Checkpoint::new("ps");
    let tree = [
        process(10, 0, 10, 10),
        process(30, 10, 10, 10),
        process(20, 10, 10, 10),
        process(5, 30, 5, 5),
        process(1234567, 20, 12345678, 0),
    ];
    dir.put(kind::PSTREE, (), &tree);
    for p in &tree {
        dir.put(kind::CORE, p.pid, &[core(&format!("c {} é", p.pid))]);
    }
    dir.shows(
        View::Ps,
        &[
            "    PID   PGID    SID   COMM",
            "     10     10     10   c 10 é",
            "     30     10     10       c 30 é",
            "      5      5      5           c 5 é",
            "     20     10     10       c 20 é",
            "123456712345678      0           c 1234567 é",
        ],
    );
}

#[test]
fn ps_of_odd_trees() {
    let dir = Checkpoint::new("odd");
    let tree = [
        process(10, 0, 1, 1),
        process(11, 9, 1, 1),
        process(12, 12, 1, 1),
        process(13, 14, 1, 1),
        process(14, 13, 1, 1),
    ];
    dir.put(kind::PSTREE, (), &tree);
    dir.put(kind::CORE, 10u32, &[core("\u{1b}[2J")]);
    // Orphans head trees of their own, a missing core has no name, a loop has no head, and an escape is not sent to the terminal.
    dir.shows(
        View::Ps,
        &[
            "    PID   PGID    SID   COMM",
            "     10      1      1   \\x1b[2J",
            "     11      1      1   ",
            "     12      1      1   ",
        ],
    );
}

fn files(dir: &Checkpoint) {
    let pipe = PipeEntry { id: 8, pipe_id: 77, ..Default::default() };
    let pipe = FileEntry {
        r#type: FdTypes::Pipe.into(),
        id: 8,
        pipe: Some(pipe.into()),
        ..Default::default()
    };
    dir.put(
        kind::FILES,
        (),
        &[
            regular(1, "/home"),
            regular(2, "/"),
            unix(4, 100, 0, b"/tmp/s\0"),
            unix(5, 101, 102, b""),
            pipe,
        ],
    );
    dir.put(
        kind::REG_FILES,
        (),
        &[RegFileEntry { id: 3, name: b"/old\xff".into(), ..Default::default() }],
    );
}

#[test]
fn fds() {
    let dir = Checkpoint::new("fds");
    files(&dir);
    dir.put(kind::PSTREE, (), &[process(10, 0, 10, 10), process(11, 10, 10, 10)]);
    dir.put(kind::IDS, 10u32, &[TaskKobjIdsEntry { files_id: 7, ..Default::default() }]);
    dir.put(kind::FS, 10u32, &[FsEntry { cwd_id: 1, root_id: 2, umask: None }]);
    let fds = [
        (FdTypes::Reg, 1, 0),
        (FdTypes::Reg, 99, 1),
        (FdTypes::Unixsk, 4, 2),
        (FdTypes::Unixsk, 5, 3),
        (FdTypes::Pipe, 8, 4),
        (FdTypes::Inetsk, 9, 255),
        (FdTypes::AutofsPipe, 9, 100_000_000),
    ];
    let fds = fds.map(|(kind, id, fd)| FdinfoEntry {
        id,
        flags: 0,
        r#type: kind.into(),
        fd,
        ..Default::default()
    });
    dir.put(kind::FDINFO, 7u32, &fds);
    // 11 is a zombie: it has no images of its own.
    dir.shows(
        View::Fds,
        &[
            "10",
            "\t      0: /home",
            "\t      1: unknown path",
            "\t      2: unix[100 (0) /tmp/s=00]",
            "\t      3: unix[101 (102)]",
            "\t      4: pipe[77]",
            "\t    255: INETSK.9",
            "\t100000000: AUTOFS_PIPE.9",
            "\t    cwd: /home",
            "\t   root: /",
        ],
    );
}

fn memory(dir: &Checkpoint) {
    files(dir);
    dir.put(
        kind::PSTREE,
        (),
        &[process(10, 0, 10, 10), process(11, 10, 10, 10), process(12, 10, 10, 10)],
    );
    let mapped = |mut vma: VmaEntry, shmid, pgoff| {
        (vma.shmid, vma.pgoff) = (shmid, pgoff);
        vma
    };
    let vmas = vec![
        mapped(vma(0x40_0000, 4, 0x41), 1, 0),
        mapped(vma(0x40_4000, 4, 0x81), 1, 0x1000),
        vma(0x50_0000, 2, 0x221),
        mapped(vma(0x60_0000, 1, 0x501), 5000, 0),
        mapped(vma(0x70_0000, 1, 0x101), 6000, 0),
        mapped(vma(0x80_0000, 1, 0x801), 5000, 0),
        VmaEntry { prot: 5, ..vma(0x7f00_0000_0000, 2, 0x209) },
        VmaEntry { flags: 0x122, ..vma(0x7ffc_0000_0000, 33, 0x201) },
        VmaEntry { prot: 4, ..vma(0xffff_ffff_ff60_0000, 1, 0x204) },
    ];
    dir.put(
        kind::MM,
        10u32,
        &[MmEntry { exe_file_id: 1, vmas: vmas.clone(), ..Default::default() }],
    );
    dir.put(
        kind::MM,
        12u32,
        &[MmEntry { exe_file_id: 77, vmas: vmas[4..5].to_vec(), ..Default::default() }],
    );
}

#[test]
fn mems() {
    let dir = Checkpoint::new("mems");
    memory(&dir);
    dir.shows(
        View::Mems,
        &[
            "10",
            "\texe                                     /home",
            "\t00400000-00404000                   rw- /home",
            "\t00404000-00408000                   rw- /home + 0x1000 (s)",
            "\t00500000-00502000                   rw-",
            "\t00600000-00601000                   rw- ips[1]",
            "\t00700000-00701000                   rw- shmem[2]",
            "\t00800000-00801000                   rw- packet[1]",
            "\t7f0000000000-7f0000002000           r-x [vdso]",
            "\t7ffc00000000-7ffc00021000           rw- [stack?]",
            "\tffffffffff600000-ffffffffff601000   --x [vsyscall] *",
            "12",
            "\texe                                     unknown path",
            "\t00700000-00701000                   rw- shmem[2]",
        ],
    );
}

#[test]
fn rss() {
    let dir = Checkpoint::new("rss");
    memory(&dir);
    let run = |vaddr, pages| {
        PagemapEntry { vaddr, nr_pages: Some(pages), ..Default::default() }.encode_to_vec()
    };
    let old =
        PagemapEntry { vaddr: 0x50_1000, compat_nr_pages: 7, ..Default::default() }.encode_to_vec();
    let runs = [
        PagemapHead { pages_id: 1 }.encode_to_vec(),
        run(0x40_1000, 2),
        run(0x40_3000, 2),
        run(0x40_6000, 1),
        old,
        run(0x60_0000, 700),
        run(0xffff_ffff_ff60_0000, u64::MAX),
    ];
    dir.write(kind::PAGEMAP.info(), 10u32.into(), runs);
    let blank = "\t                       ";
    dir.shows(
        View::Rss,
        &[
            "10",
            "\t401000 / 2              00400000 / 4        /home",
            blank,
            "\t403000 / 2              ~",
            "\t                        00404000 / 4        /home",
            blank,
            "\t406000 / 1              ~",
            blank,
            "\t501000 / 7              00500000 / 2       ",
            blank,
            "\t600000 / 700            00600000 / 1       ",
            "\t                        00700000 / 1       ",
            "\t                        00800000 / 1       ",
            blank,
            "\tffffffffff600000 / 18446744073709551615 ffffffffff600000 / 1       ",
            blank,
        ],
    );
}

#[test]
fn damage_is_told_with_the_file() {
    let dir = Checkpoint::new("damage");
    let told = |view| dir.view(view).unwrap_err().to_string();
    assert!(told(View::Ps).contains("pstree.img: No such file"), "{}", told(View::Ps));
    memory(&dir);
    fs::write(dir.0.join("mm-10.img"), b"\x19\x43\x56\x54\x20\x28\x49\x57\x08\0\0\0\x08").unwrap();
    assert!(told(View::Mems).contains("mm-10.img: entry 0, byte 12: "), "{}", told(View::Mems));
    fs::copy(dir.0.join("pstree.img"), dir.0.join("mm-10.img")).unwrap();
    assert!(
        told(View::Rss).ends_with("mm-10.img is a PSTREE image, not MM"),
        "{}",
        told(View::Rss)
    );
}
