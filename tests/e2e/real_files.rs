//! Real programs that live on files: SQLite in a transaction, `tail -f`, temporary files and watches of a Python program.

use crate::harness::{Fail, Fs, NotReady, Run, Tool, execute};
use crate::real::{Scripts, cycle, find, start, wait_for};
use crate::view::View;
use std::fs;
use std::path::Path;
use std::process::Command;

const SQLITE: &str = r#"
import os, sqlite3, sys, time
d = sys.argv[1]
db = sqlite3.connect(d + "/db", isolation_level=None)
db.execute("create table numbers (n integer)")
db.execute("begin immediate")
n = 0
while not os.path.exists(d + "/check"):
    n += 1
    db.execute("insert into numbers values (?)", (n,))
    with open(d + "/at.new", "w") as at:
        at.write(str(n))
    os.rename(d + "/at.new", d + "/at")
    time.sleep(0.005)
db.execute("commit")
found = db.execute("select count(*), sum(n) from numbers").fetchone()
sound = db.execute("pragma integrity_check").fetchone()[0]
good = found == (n, n * (n + 1) // 2) and sound == "ok"
with open(d + "/result", "w") as result:
    result.write("PASS" if good else "FAIL: %r after %d, %s" % (found, n, sound))
"#;

const OTHER: &str = r#"
import sqlite3, sys
try:
    sqlite3.connect(sys.argv[1], timeout=0).execute("begin immediate")
    print("free")
except sqlite3.OperationalError as e:
    print(e)
"#;

/// A transaction that is open keeps its locks, and others out.
pub fn sqlite_transaction(tool: &Tool) -> Result<(), NotReady> {
    let python = find("python3")?;
    let scripts = Scripts::new("sqlite")?;
    let (script, other) = (scripts.write("db.py", SQLITE)?, scripts.write("other.py", OTHER)?);
    let mut run = Run::spawn("sqlite", &start(&[&python, &script]), Fs::Disk)?;
    let at = |text: &str| text.trim().parse::<u64>().unwrap_or(0);
    let mut last = at(&wait_for(&run, "at", |t| at(t) >= 3)?);
    for n in 1..=3 {
        cycle(&mut run, tool, n, &["--file-locks"])?;
        last = at(&wait_for(&run, "at", |t| at(t) > last + 2)?);
        let mut command = Command::new(&python);
        command.arg(&other).arg(run.dir.join("db"));
        let said = execute(command, &run.dir)?.text;
        if said.trim() != "database is locked" {
            return Err(run.fail(format!("another process found the database: {said:?}")).into());
        }
    }
    run.check(&View::default())?;
    Ok(())
}

const TAIL: &str = r#"
: >"$1/input"
tail -n +1 -f "$1/input" >"$1/out" &
while [ ! -e "$1/check" ]; do sleep 0.02; done
kill $!
printf PASS >"$1/result"
"#;

fn append(path: &Path, line: &str) -> Result<(), Fail> {
    use std::io::Write;
    let file = fs::OpenOptions::new().append(true).create(true).open(path);
    file.and_then(|mut file| writeln!(file, "{line}")).map_err(|e| e.to_string())
}

/// `tail -f` goes on with the next line.
pub fn tail_follow(tool: &Tool) -> Result<(), NotReady> {
    let (bash, _) = (find("bash")?, find("tail")?);
    let scripts = Scripts::new("tail")?;
    let script = scripts.write("tail.sh", TAIL)?;
    let mut run = Run::spawn("tail", &start(&[&bash, &script]), Fs::Disk)?;
    wait_for(&run, "out", |_| run.dir.join("out").exists())?;
    let mut wanted = String::new();
    for n in 1..=5 {
        append(&run.dir.join("input"), &format!("line {n}"))?;
        wanted += &format!("line {n}\n");
        wait_for(&run, "out", |t| t == wanted)?;
        cycle(&mut run, tool, n, &[])?;
    }
    append(&run.dir.join("input"), "the last")?;
    wait_for(&run, "out", |t| t == format!("{wanted}the last\n"))?;
    run.check(&View::default())?;
    Ok(())
}

const TEMPORARY: &str = r#"
import ctypes, os, select, struct, sys, tempfile
d = sys.argv[1]
os.mkdir(d + "/watched")
os.mkdir(d + "/tmp")
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
assert libc.inotify_add_watch(fd, (d + "/watched").encode(), 0x100) == 1
nameless = tempfile.TemporaryFile(dir=d + "/tmp")
named = tempfile.NamedTemporaryFile(dir=d + "/tmp")
spooled = tempfile.SpooledTemporaryFile(max_size=4, dir=d + "/tmp")
inside = tempfile.TemporaryDirectory(dir=d + "/tmp")
here = open(inside.name + "/file", "w+b")
inside.cleanup()
files = [nameless, named, spooled, here]
count = 0
open(d + "/seen", "w").close()
while not os.path.exists(d + "/check"):
    if not select.select([fd], [], [], 0.02)[0]:
        continue
    events = os.read(fd, 65536)
    while events:
        _, _, _, length = struct.unpack_from("iIII", events)
        name = events[16:16 + length].rstrip(b"\0").decode()
        events = events[16 + length:]
        count += 1
        for file in files:
            file.write(b"%08d" % count)
            file.flush()
        with open(d + "/seen", "a") as seen:
            seen.write(name + "\n")
wanted = b"".join(b"%08d" % n for n in range(1, count + 1))
bad = []
for file in files:
    file.seek(0)
    if file.read() != wanted:
        bad.append(repr(file))
left = os.listdir(d + "/tmp")
if left != [os.path.basename(named.name)]:
    bad.append("files: %r" % left)
named.close()
with open(d + "/result", "w") as result:
    result.write("FAIL: " + ", ".join(bad) if bad else "PASS")
"#;

/// Temporary files keep their content without getting names, and watches tell what comes.
pub fn python_temporary(tool: &Tool) -> Result<(), NotReady> {
    let python = find("python3")?;
    let scripts = Scripts::new("temporary")?;
    let script = scripts.write("temporary.py", TEMPORARY)?;
    let mut run = Run::spawn("temporary", &start(&[&python, &script]), Fs::Disk)?;
    wait_for(&run, "seen", |_| run.dir.join("seen").exists())?;
    let mut wanted = String::new();
    for n in 1..=4 {
        fs::write(run.dir.join(format!("watched/{n}")), "").map_err(|e| e.to_string())?;
        wanted += &format!("{n}\n");
        wait_for(&run, "seen", |t| t == wanted)?;
        cycle(&mut run, tool, n, &[])?;
    }
    fs::write(run.dir.join("watched/last"), "").map_err(|e| e.to_string())?;
    wait_for(&run, "seen", |t| t == format!("{wanted}last\n"))?;
    run.check(&View::default())?;
    Ok(())
}
