//! The exact text of some images, as CRIU's crit 4.2 prints it. The images are made here.

mod common;

use prost::Message;
use rewake_crit::{Form, Layout, Payloads, decode, decode_as, encode, write_json};
use rewake_image::{
    kind::{self, Kind, KindInfo},
    messages::*,
};

fn frame(out: &mut Vec<u8>, message: &impl Message) {
    let bytes = message.encode_to_vec();
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
}

fn image<M: Message>(kind: Kind<M>, messages: &[M]) -> Vec<u8> {
    let mut out = common::header(kind.info());
    messages.iter().for_each(|message| frame(&mut out, message));
    out
}

fn line(image: &[u8]) -> String {
    text(image, Form::Plain, Payloads::Whole, Layout::Line)
}

/// The lines of the pretty form that have something in them, without indent.
fn pretty(image: &[u8], payloads: Payloads) -> Vec<String> {
    let text = text(image, Form::Pretty, payloads, Layout::Indented);
    let lines = text.lines().map(|line| line.trim().trim_end_matches(','));
    lines.filter(|line| line.len() > 2).map(str::to_owned).collect()
}

fn text(image: &[u8], form: Form, payloads: Payloads, layout: Layout) -> String {
    let json = decode_as(image, form, payloads).unwrap();
    if payloads == Payloads::Whole {
        assert_eq!(encode(&json).unwrap(), image);
    }
    let mut out = Vec::new();
    write_json(&mut out, &json, layout).unwrap();
    String::from_utf8(out).unwrap()
}

fn fown() -> FownEntry {
    FownEntry { uid: 0, euid: 0, signum: 0, pid_type: 0, pid: 0 }
}

#[test]
fn inventory() {
    let inventory = InventoryEntry {
        img_version: 2,
        lsmtype: Some(Lsmtype::Selinux.into()),
        dump_criu_run_id: Some("é\u{7f}/\"\t😀".into()),
        ..Default::default()
    };
    let image = image(kind::INVENTORY, &[inventory]);
    let want = r#"{"magic": "INVENTORY", "entries": [{"img_version": 2, "lsmtype": "SELINUX", "dump_criu_run_id": "\u00e9\u007f/\"\t\ud83d\ude00"}]}"#;
    assert_eq!(line(&image), want);
    let want = [
        "{",
        "    \"magic\": \"INVENTORY\",",
        "    \"entries\": [",
        "        {",
        "            \"img_version\": 2,",
        "            \"lsmtype\": \"SELINUX\",",
        r#"            "dump_criu_run_id": "\u00e9\u007f/\"\t\ud83d\ude00""#,
        "        }",
        "    ]",
        "}",
    ];
    assert_eq!(text(&image, Form::Pretty, Payloads::Whole, Layout::Indented), want.join("\n"));
}

#[test]
fn mappings() {
    let vma = VmaEntry {
        start: 0x1000,
        end: 0x2000,
        pgoff: 1,
        shmid: 2,
        prot: 7,
        flags: 50,
        status: 0x1_0201,
        fd: -1,
        madv: Some(5),
        ..Default::default()
    };
    let none =
        VmaEntry { prot: 0, flags: 0, status: 0, madv: None, fdflags: Some(0), ..vma.clone() };
    let image = image(kind::VMAS, &[vma, none]);
    let want = concat!(
        r#"{"magic": "VMAS", "entries": [{"start": 4096, "end": 8192, "pgoff": 1, "shmid": 2, "prot": 7, "flags": 50, "#,
        r#""status": 66049, "fd": -1, "madv": 5}, {"start": 4096, "end": 8192, "pgoff": 1, "shmid": 2, "prot": 0, "flags": 0, "#,
        r#""status": 0, "fd": -1, "fdflags": 0}]}"#
    );
    assert_eq!(line(&image), want);
    let want = [
        r#""magic": "VMAS""#,
        r#""entries": ["#,
        r#""start": "0x1000""#,
        r#""end": "0x2000""#,
        r#""pgoff": 1"#,
        r#""shmid": 2"#,
        r#""prot": "PROT_READ | PROT_WRITE | PROT_EXEC""#,
        r#""flags": "MAP_PRIVATE | MAP_ANON | 0x10""#,
        r#""status": "VMA_AREA_REGULAR | VMA_ANON_PRIVATE | 0x10000""#,
        r#""fd": -1"#,
        r#""madv": "0x5""#,
        r#""start": "0x1000""#,
        r#""end": "0x2000""#,
        r#""pgoff": 1"#,
        r#""shmid": 2"#,
        r#""prot": """#,
        r#""flags": """#,
        r#""status": """#,
        r#""fd": -1"#,
        r#""fdflags": "0x0""#,
    ];
    assert_eq!(pretty(&image, Payloads::Whole), want);
}

#[test]
fn unix_socket() {
    let socket = UnixSkEntry {
        r#type: 5,
        state: 10,
        name: b"\0a b=\xff ".to_vec(),
        fown: fown(),
        shutdown: Some(SkShutdown::Both.into()),
        ..Default::default()
    };
    let image = image(kind::UNIXSK, &[socket]);
    let lines = pretty(&image, Payloads::Whole);
    for want in [
        r#""type": "SEQPACKET""#,
        r#""state": "LISTEN""#,
        r#""flags": "0x0""#,
        r#""name": "=00a b=3D=FF=20""#,
        r#""shutdown": "BOTH""#,
    ] {
        assert!(lines.iter().any(|line| line == want), "{want} is not in {lines:#?}");
    }
    assert!(line(&image).contains(r#""type": 5, "state": 10, "flags": 0"#));
}

#[test]
fn internet_socket() {
    let socket = InetSkEntry {
        family: 10,
        r#type: 1,
        proto: 6,
        state: 11,
        src_addr: vec![u32::from_ne_bytes([127, 0, 0, 1])],
        dst_addr: vec![
            0,
            0,
            u32::from_ne_bytes([0, 0, 0xff, 0xff]),
            u32::from_ne_bytes([127, 0, 0, 1]),
        ],
        fown: fown(),
        ..Default::default()
    };
    let image = image(kind::INETSK, &[socket]);
    let lines = pretty(&image, Payloads::Whole);
    for want in [
        r#""family": "INET6""#,
        r#""proto": "TCP""#,
        r#""state": 11"#,
        r#""127.0.0.1""#,
        r#""::ffff:7f00:1""#,
    ] {
        assert!(lines.iter().any(|line| line == want), "{want} is not in {lines:#?}");
    }
    assert!(
        line(&image)
            .contains(r#""src_addr": [16777343], "dst_addr": [0, 0, 4294901760, 16777343]"#)
    );
}

#[test]
fn registers_are_hexadecimal() {
    let regs = UserX86RegsEntry { ip: 1 << 63, mode: Some(2), ..Default::default() };
    let info = ThreadInfoX86 { gpregs: regs, ..Default::default() };
    let tc = TaskCoreEntry { task_state: 3, comm: b"x\xff".to_vec(), ..Default::default() };
    let core = CoreEntry { mtype: 1, thread_info: Some(info), tc: Some(tc), ..Default::default() };
    let image = image(kind::CORE, &[core]);
    let lines = pretty(&image, Payloads::Whole);
    for want in [
        r#""mtype": "X86_64""#,
        r#""ip": "0x8000000000000000""#,
        r#""cs": "0x0""#,
        r#""mode": "COMPAT""#,
        r#""cwd": 0"#,
        r#""task_state": "Zombie""#,
        r#""base64": "eP8=\n""#,
    ] {
        assert!(lines.iter().any(|line| line == want), "{want} is not in {lines:#?}");
    }
}

fn payload_json(kind: &KindInfo, image: &[u8], want: &str, sizes: &[&str]) {
    let plain = line(image);
    assert!(plain.starts_with(&format!(r#"{{"magic": "{}", "#, kind.name)), "{plain}");
    assert!(plain.contains(want), "{plain}");
    let short = decode_as(image, Form::Pretty, Payloads::Sizes).unwrap();
    let found: Vec<_> = short["entries"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|entry| entry["extra"].as_str())
        .collect();
    assert_eq!(found, sizes);
}

#[test]
fn pipe_content() {
    let mut out =
        image(kind::PIPES_DATA, &[PipeDataEntry { pipe_id: 1, bytes: 5, size: Some(4096) }]);
    out.extend(b"hello");
    frame(&mut out, &PipeDataEntry { pipe_id: 2, bytes: 0, size: None });
    let want = r#"[{"pipe_id": 1, "bytes": 5, "size": 4096, "extra": "aGVsbG8=\n"}, {"pipe_id": 2, "bytes": 0, "extra": ""}]"#;
    payload_json(kind::PIPES_DATA.info(), &out, want, &["... <5B>", "... <0B>"]);
}

#[test]
fn tcp_queues() {
    let mut out = image(
        kind::TCP_STREAM,
        &[TcpStreamEntry { inq_len: 5, outq_len: 3, ..Default::default() }],
    );
    out.extend(b"hellohel");
    let want = r#""extra": {"inq": "aGVsbG8=\n", "outq": "aGVs\n"}}]"#;
    payload_json(kind::TCP_STREAM.info(), &out, want, &["... <8B>"]);
}

#[test]
fn semaphores() {
    let mut out = image(kind::IPCNS_SEM, &[IpcSemEntry { nsems: 3, ..Default::default() }]);
    out.extend([1, 0, 2, 0, 255, 255, 0, 0]);
    payload_json(
        kind::IPCNS_SEM.info(),
        &out,
        r#""nsems": 3, "extra": [1, 2, 65535]}]"#,
        &["... <6B>"],
    );
}

#[test]
fn message_queue() {
    let mut out = image(kind::IPCNS_MSG, &[IpcMsgEntry { qnum: 2, ..Default::default() }]);
    frame(&mut out, &IpcMsg { mtype: 1, msize: 5 });
    out.extend(b"hello\0\0\0");
    frame(&mut out, &IpcMsg { mtype: 2, msize: 8 });
    out.extend(b"12345678");
    let want = r#""extra": [{"mtype": 1, "msize": 5}, "aGVsbG8=\n", {"mtype": 2, "msize": 8}, "MTIzNDU2Nzg=\n"]}]"#;
    payload_json(kind::IPCNS_MSG.info(), &out, want, &["... <21B>"]);
}

#[test]
fn shared_memory() {
    let elsewhere = IpcShmEntry { size: 5, in_pagemaps: Some(true), ..Default::default() };
    let mut out = image(kind::IPCNS_SHM, &[elsewhere.clone(), elsewhere]);
    frame(&mut out, &IpcShmEntry { size: 5, ..Default::default() });
    out.extend(b"hello\0\0\0");
    let want = r#""size": 5, "extra": "aGVsbG8=\n"}]"#;
    payload_json(kind::IPCNS_SHM.info(), &out, want, &["... <5B>"; 3]);
    assert!(line(&out).contains(r#""in_pagemaps": true, "extra": ""}"#));
}

#[test]
fn ghost_files() {
    let ghost = GhostFileEntry {
        mode: 0o100644,
        dev: Some(0x130_0002),
        rdev: Some(0x10_0101),
        ..Default::default()
    };
    let mut out = common::header(kind::GHOST_FILE.info());
    frame(&mut out, &ghost);
    out.extend(b"hello\n");
    payload_json(kind::GHOST_FILE.info(), &out, r#""rdev": 1048833, "extra": "aGVsbG8K\n"}]"#, &[]);
    let lines = pretty(&out, Payloads::Whole);
    assert!(
        lines.contains(&r#""dev": "19:2""#.to_owned())
            && lines.contains(&r#""rdev": "1:257""#.to_owned()),
        "{lines:?}"
    );

    let mut out = common::header(kind::GHOST_FILE.info());
    frame(&mut out, &GhostFileEntry { chunks: Some(true), size: Some(20000), ..ghost });
    frame(&mut out, &GhostChunkEntry { len: 5, off: 4096 });
    out.extend(b"hello");
    frame(&mut out, &GhostChunkEntry { len: 3, off: 16384 });
    out.extend(b"hel");
    let want = r#""size": 20000}, {"len": 5, "off": 4096, "extra": "aGVsbG8=\n"}, {"len": 3, "off": 16384, "extra": "aGVs\n"}]"#;
    payload_json(kind::GHOST_FILE.info(), &out, want, &[]);
}

#[test]
fn pagemap_has_a_head() {
    let mut out = common::header(kind::PAGEMAP.info());
    frame(&mut out, &PagemapHead { pages_id: 3 });
    frame(
        &mut out,
        &PagemapEntry { vaddr: 0x1000, flags: Some(6), nr_pages: Some(2), ..Default::default() },
    );
    let want = r#"{"magic": "PAGEMAP", "entries": [{"pages_id": 3}, {"vaddr": 4096, "compat_nr_pages": 0, "flags": 6, "nr_pages": 2}]}"#;
    assert_eq!(line(&out), want);
    assert!(
        pretty(&out, Payloads::Whole).contains(&r#""flags": "PE_LAZY | PE_PRESENT""#.to_owned())
    );
}

#[test]
fn a_value_unknown_to_an_optional_enum_stays_a_number() {
    let inventory = InventoryEntry { img_version: 2, lsmtype: Some(77), ..Default::default() };
    let image = image(kind::INVENTORY, &[inventory]);
    assert_eq!(
        line(&image),
        r#"{"magic": "INVENTORY", "entries": [{"img_version": 2, "lsmtype": 77}]}"#
    );
}

#[test]
fn damage_is_told_with_its_place() {
    let image = image(
        kind::PSTREE,
        &[PstreeEntry { pid: 7, ..Default::default() }, PstreeEntry::default()],
    );
    let told = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
    assert_eq!(told(b"\x19\x43"), "the image ends before its magic number does");
    assert_eq!(told(&image[..6]), "the image ends before its magic number does");
    assert!(told(b"\x19\x43\x56\x54\x32\x37\x21\x57").starts_with("Unknown magic 0x57213732: "));
    assert!(told(&[1; 4096]).starts_with("Unknown magic 0x1010101: "));
    for length in 9..image.len() {
        match decode(&image[..length]) {
            Ok(json) => assert_eq!(json["entries"].as_array().unwrap().len(), 1, "cut at {length}"),
            Err(e) => {
                assert!(e.to_string().starts_with("the image: entry "), "cut at {length}: {e}")
            }
        }
    }
    let told = told(&image[..image.len() - 1]);
    assert!(told.contains("entry 1, byte ") && told.contains("the message"), "{told}");
}

#[test]
fn a_length_that_lies_is_refused() {
    let mut out =
        image(kind::PIPES_DATA, &[PipeDataEntry { pipe_id: 1, bytes: u32::MAX, size: None }]);
    out.extend(b"hello");
    let told = decode(&out).unwrap_err().to_string();
    assert!(told.contains("4294967295 bytes where 5 are left"), "{told}");
}
