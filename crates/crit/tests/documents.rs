//! JSON that cannot become an image is refused, and the text says where the mistake is.

use rewake_crit::{decode, encode};
use serde_json::{Value, json};

fn told(document: Value) -> String {
    encode(&document).expect_err("was taken").to_string()
}

fn of(magic: &str, entry: Value) -> Value {
    json!({"magic": magic, "entries": [entry]})
}

#[test]
fn the_frame() {
    assert_eq!(told(json!([])), "the document: an object belongs here, not an array");
    assert_eq!(
        told(json!({"entries": []})),
        "the document: an image's JSON needs a member `magic`"
    );
    assert_eq!(
        told(json!({"magic": "FS"})),
        "the document: an image's JSON needs a member `entries`"
    );
    assert_eq!(told(json!({"magic": 1, "entries": []})), "magic: a string belongs here, not 1");
    assert_eq!(
        told(json!({"magic": "FOO", "entries": []})),
        "magic: no kind of image is called `FOO`"
    );
    assert_eq!(
        told(json!({"magic": "PAGES", "entries": []})),
        "magic: PAGES images are raw data, which have no JSON form"
    );
    assert_eq!(
        told(json!({"magic": "FS", "entries": {}})),
        "entries: an array belongs here, not an object"
    );
    assert_eq!(
        told(json!({"magic": "FS", "entries": [], "x": 1})),
        "x: an image's JSON has no such member"
    );
    assert_eq!(told(of("FS", json!(3))), "entries[0]: an object belongs here, not 3");
}

#[test]
fn fields() {
    let fdinfo = |member: &str, value: Value| {
        let mut entry = json!({"id": 1, "flags": 0, "type": "REG", "fd": 3});
        entry[member] = value;
        of("FDINFO", entry)
    };
    assert!(encode(&fdinfo("fd", json!(4))).is_ok());
    assert_eq!(told(fdinfo("fd", json!(-1))), "entries[0].fd: -1 is not within 0 to 4294967295");
    assert_eq!(
        told(fdinfo("fd", json!(4294967296u64))),
        "entries[0].fd: 4294967296 is not within 0 to 4294967295"
    );
    assert_eq!(told(fdinfo("fd", json!(0.5))), "entries[0].fd: an integer belongs here, not 0.5");
    assert_eq!(told(fdinfo("fd", json!(true))), "entries[0].fd: a number belongs here, not true");
    assert_eq!(told(fdinfo("fd", json!(null))), "entries[0].fd: a number belongs here, not null");
    assert_eq!(
        told(fdinfo("fd", json!("x"))),
        "entries[0].fd: `x` is neither a number nor a name that fits fd"
    );
    assert_eq!(
        told(fdinfo("type", json!("FOO"))),
        "entries[0].type: `FOO` is neither a number nor a name that fits type"
    );
    assert_eq!(told(fdinfo("type", json!(99))), "entries[0].type: 99 is no value of fd_types");
    assert_eq!(told(fdinfo("foo", json!(1))), "entries[0].foo: fdinfo_entry has no such field");
    assert_eq!(
        told(fdinfo("extra", json!(""))),
        "entries[0].extra: FDINFO images have nothing beside their fields"
    );
    assert_eq!(
        told(of("FDINFO", json!({"id": 1}))),
        "entries[0]: fdinfo_entry needs a field `flags`"
    );
}

#[test]
fn nested() {
    let mut vma = json!({"start": 0, "end": 1, "pgoff": 0, "shmid": 0, "prot": 3, "flags": 2, "status": 1, "fd": -1});
    let mut mm = json!({"exe_file_id": 1});
    for part in ["code", "data"] {
        mm[format!("mm_start_{part}")] = json!("0x10");
        mm[format!("mm_end_{part}")] = json!(32);
    }
    for name in [
        "mm_start_stack",
        "mm_start_brk",
        "mm_brk",
        "mm_arg_start",
        "mm_arg_end",
        "mm_env_start",
        "mm_env_end",
    ] {
        mm[name] = json!(0);
    }
    mm["vmas"] = json!([vma.clone(), vma.clone()]);
    assert!(encode(&of("MM", mm.clone())).is_ok());
    vma["prot"] = json!("PROT_READ | PROT_FOO");
    mm["vmas"][1] = vma;
    assert_eq!(
        told(of("MM", mm.clone())),
        "entries[0].vmas[1].prot: `PROT_FOO` is neither a number nor a name that fits prot"
    );
    mm["vmas"] = json!({});
    assert_eq!(told(of("MM", mm)), "entries[0].vmas: an array belongs here, not an object");
}

#[test]
fn both_forms_are_taken() {
    let ghost = |dev: Value, rdev: Value| {
        let entry = json!({"uid": "0x10", "gid": "0o17", "mode": 33188.0, "dev": dev, "rdev": rdev, "chunks": 0, "extra": "aGVs\n\nbG8K"});
        decode(&encode(&of("GHOST_FILE", entry)).unwrap()).unwrap()["entries"][0].clone()
    };
    let want = json!({"uid": 16, "gid": 15, "mode": 33188, "dev": 19922946, "rdev": 1048833, "chunks": false, "extra": "aGVsbG8K\n"});
    assert_eq!(ghost(json!("19:2"), json!("1:257")), want);
    assert_eq!(ghost(json!(19922946), json!("0x100101")), want);
    let refused = json!({"uid": 0, "gid": 0, "mode": 0, "dev": "4096:0"});
    assert_eq!(
        told(of("GHOST_FILE", refused)),
        "entries[0].dev: `4096:0` is neither a number nor a name that fits dev"
    );
}

#[test]
fn payloads() {
    let pipe = |extra: Value| of("PIPES_DATA", json!({"pipe_id": 1, "bytes": 5, "extra": extra}));
    assert!(encode(&pipe(json!("aGVsbG8="))).is_ok());
    assert_eq!(
        told(pipe(json!("aGVs"))),
        "entries[0].extra: 3 bytes are here, but the entry says 5"
    );
    assert!(told(pipe(json!("!"))).starts_with("entries[0].extra: not base64: "));
    assert_eq!(told(pipe(json!(1))), "entries[0].extra: a base64 string belongs here, not 1");
    assert_eq!(
        told(pipe(json!("... <5B>"))),
        "entries[0].extra: only the size is here: the JSON was made without payloads (--nopl)"
    );
    let none = json!({"pipe_id": 1, "bytes": 5});
    assert_eq!(
        told(of("PIPES_DATA", none)),
        "entries[0].extra: 0 bytes are here, but the entry says 5"
    );

    let desc = json!({"key": 1, "uid": 0, "gid": 0, "cuid": 0, "cgid": 0, "mode": 384, "id": 5});
    let sem = |extra: Value| of("IPCNS_SEM", json!({"desc": desc, "nsems": 2, "extra": extra}));
    assert!(encode(&sem(json!([1, 65535]))).is_ok());
    assert_eq!(told(sem(json!([1]))), "entries[0].extra: 1 values are here, but the entry says 2");
    assert_eq!(
        told(sem(json!([1, 65536]))),
        "entries[0].extra[1]: a number up to 65535 belongs here, not 65536"
    );

    let msg = |extra: Value| {
        of("IPCNS_MSG", json!({"desc": desc, "qbytes": 100, "qnum": 1, "extra": extra}))
    };
    assert!(encode(&msg(json!([{"mtype": 1, "msize": 3}, "aGVs"]))).is_ok());
    assert_eq!(told(msg(json!([]))), "entries[0].extra: 0 messages are here, but the entry says 1");
    assert!(
        told(msg(json!([{"mtype": 1, "msize": 3}])))
            .starts_with("entries[0].extra: a message's header and its text")
    );
    assert_eq!(
        told(msg(json!([{"mtype": 1, "msize": 4}, "aGVs"]))),
        "entries[0].extra[1]: 3 bytes are here, but the entry says 4"
    );
    assert_eq!(
        told(msg(json!([{"msize": 3}, "aGVs"]))),
        "entries[0].extra[0]: ipc_msg needs a field `mtype`"
    );

    let whole = json!({"uid": 0, "gid": 0, "mode": 0});
    let two = json!({"magic": "GHOST_FILE", "entries": [whole, whole]});
    assert!(told(two).starts_with("entries[1]: more than one entry"));
}

#[test]
fn nesting_has_an_end() {
    let mut dir = json!({"dir_name": "x"});
    for _ in 0..200 {
        dir = json!({"dir_name": "x", "children": [dir]});
    }
    let told = told(of("CGROUP", json!({"controllers": [{"cnames": [""], "dirs": [dir]}]})));
    assert!(
        told.starts_with("entries[0]: ") && told.contains("deep"),
        "{}",
        &told[told.len() - 100..]
    );
}
