//! The readers, on live processes that the test starts.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

use rewake_proc::link::{FdLink, NsKind};
use rewake_proc::read::{ProcDir, ProcRoot, ReadError};
use rewake_proc::stat::TaskState;
use rewake_proc::{auxv, children, fdinfo, link, maps, pagemap, single, timens};
use rustix::fs::OFlags;

/// A `sleep` that ends with the test.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Sleeper {
        Sleeper(Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_process_that_ends_is_gone() {
    let mut sleeper = Sleeper::start();
    let pid = sleeper.pid();
    let dir = ProcDir::open(pid).unwrap();
    let mut buffer = Vec::new();
    assert_eq!(dir.stat(&mut buffer).unwrap().ppid, std::process::id() as i32);
    sleeper.0.kill().unwrap();

    // A zombie: still there, with nothing but its death to tell.
    let stat = loop {
        let stat = dir.stat(&mut buffer).unwrap();
        if stat.state == TaskState::Zombie {
            break stat;
        }
        std::thread::yield_now();
    };
    assert_eq!(stat.exit_code, 9);
    let error = dir.read_single("auxv", &mut buffer).unwrap_err();
    assert!(matches!(error, ReadError::Absent { .. }), "{error}");
    assert!(dir.read("maps", &mut buffer).unwrap().is_empty());
    let zombie = dir.status(&mut buffer).unwrap();
    assert_eq!((zombie.state, zombie.vm_rss, zombie.umask), (TaskState::Zombie, None, None));

    assert_eq!(sleeper.0.wait().unwrap().signal(), Some(9));
    for file in ["stat", "status", "maps", "smaps", "auxv", "nonsense", "fdinfo/0"] {
        let error = dir.read(file, &mut buffer).unwrap_err();
        assert!(error.is_gone(), "{file}: {error}");
        assert!(error.to_string().contains(&pid.to_string()));
    }
    assert!(dir.link("exe", &mut buffer).unwrap_err().is_gone());
    assert!(dir.tids().unwrap_err().is_gone());
    assert!(dir.fds().unwrap_err().is_gone());
    assert!(dir.open_file("pagemap", OFlags::RDONLY).unwrap_err().is_gone());
    assert!(dir.task(pid).unwrap_err().is_gone());
    assert!(ProcRoot::open().unwrap().pid(pid).unwrap_err().is_gone());
}

#[test]
fn a_missing_file_is_not_a_missing_process() {
    let dir = ProcDir::open(std::process::id() as i32).unwrap();
    let error = dir.read("nonsense", &mut Vec::new()).unwrap_err();
    assert!(matches!(error, ReadError::Absent { .. }), "{error}");
    let error = ProcRoot::open().unwrap().read("nonsense", &mut Vec::new()).unwrap_err();
    assert!(matches!(error, ReadError::Io { .. }), "{error}");
}

#[test]
fn lists_and_links() {
    let sleeper = Sleeper::start();
    let root = ProcRoot::open().unwrap();
    let pids = root.pids().unwrap();
    assert!(pids.contains(&sleeper.pid()) && pids.contains(&(std::process::id() as i32)));
    assert!(pids.is_sorted());
    let dir = root.pid(sleeper.pid()).unwrap();
    assert_eq!((dir.tids().unwrap(), dir.pid()), (vec![sleeper.pid()], sleeper.pid()));
    let mut buffer = Vec::new();
    // Until exec is done it shows this test's descriptors and name.
    while single::comm(dir.read_single("comm", &mut buffer).unwrap()).unwrap() != b"sleep" {
        std::thread::yield_now();
    }
    assert!(dir.fds().unwrap().starts_with(&[0, 1, 2]));
    assert_eq!(link::classify(dir.link("fd/0", &mut buffer).unwrap()), FdLink::Path(b"/dev/null"));
    let info = fdinfo::parse(dir.read_single("fdinfo/0", &mut buffer).unwrap()).unwrap();
    assert_eq!((info.pos, info.flags & 3), (0, 0));
    assert_eq!(link::parse_ns(dir.link("ns/pid", &mut buffer).unwrap()).unwrap().kind, NsKind::Pid);
    let vector = auxv::parse(dir.read_single("auxv", &mut buffer).unwrap()).unwrap();
    assert_eq!(vector.get(6), Some(rustix::param::page_size() as u64)); // AT_PAGESZ
    if let Ok(text) = dir.read_single("timens_offsets", &mut buffer) {
        timens::parse(text).unwrap();
    }

    let own = root.pid(std::process::id() as i32).unwrap();
    let mut found = Vec::new();
    for tid in own.tids().unwrap() {
        match own.task(tid).and_then(|task| {
            task.read("children", &mut buffer).map(|t| children::parse(t).unwrap())
        }) {
            Ok(pids) => found.extend(pids),
            Err(ReadError::Absent { .. }) => return, // a kernel without CONFIG_PROC_CHILDREN
            Err(error) => assert!(error.is_gone(), "{error}"),
        }
    }
    assert!(found.contains(&sleeper.pid()), "{found:?}");
}

#[test]
fn a_text_that_comes_in_many_pieces_is_whole() {
    // Each second page read-only: as many VMAs as pages, several hundred kilobytes of text.
    const PAGES: usize = 4000;
    let page = rustix::param::page_size();
    let text = {
        use std::io::Write;
        let script = format!(
            "import ctypes,mmap,sys\n\
             libc=ctypes.CDLL(None)\n\
             m=mmap.mmap(-1,{PAGES}*{page},flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS)\n\
             a=ctypes.addressof(ctypes.c_char.from_buffer(m))\n\
             [libc.mprotect(ctypes.c_void_p(a+i*{page}),{page},1) for i in range(0,{PAGES},2)]\n\
             print('ready',flush=True)\n\
             sys.stdin.read()\n"
        );
        let started = Command::new("python3")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = started else {
            eprintln!("no python3 here: skipped");
            return;
        };
        let mut ready = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(child.stdout.take().unwrap()),
            &mut ready,
        )
        .unwrap();
        assert_eq!(ready, "ready\n");
        let mut buffer = Vec::new();
        ProcDir::open(child.id() as i32).unwrap().read("maps", &mut buffer).unwrap();
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        child.wait().unwrap();
        buffer
    };
    let all: Vec<_> = maps::parse(&text).collect::<Result<_, _>>().unwrap();
    let single_pages =
        all.windows(2).filter(|w| w[0].end == w[1].start && w[0].len() == page as u64).count();
    assert!(all.len() >= PAGES && single_pages >= PAGES - 2, "{} {single_pages}", all.len());
}

#[test]
fn pagemap_of_this_process() {
    let value = Box::new([1u8; 8192]);
    let page = rustix::param::page_size() as u64;
    let file = ProcDir::open(std::process::id() as i32)
        .unwrap()
        .open_file("pagemap", OFlags::RDONLY)
        .unwrap();
    let mut bytes = [0; 8];
    let at = value.as_ptr().addr() as u64 / page * 8;
    assert_eq!(rustix::io::pread(&file, &mut bytes, at).unwrap(), 8);
    let entry = pagemap::entries(&bytes).next().unwrap();
    assert!(entry.has(pagemap::PRESENT) && entry.populated(), "{entry:?}");
}
