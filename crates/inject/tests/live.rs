//! An agent goes into a live process, works, and leaves no trace. Needs no privilege beyond tracing one's own child.

use rewake_agent::layout::Op;
use rewake_inject::enter::Target;
use rewake_inject::live::Live;
use rewake_inject::ring::Script;
use rewake_inject::tracee::{Running, Stopped};
use std::fs::{File, read_to_string};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

fn sleeper() -> Child {
    let child = Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sleep runs");
    // Wait until it sleeps, past exec and the dynamic loader.
    while !read_to_string(format!("/proc/{}/syscall", child.id()))
        .unwrap_or_default()
        .starts_with("230 ")
    {
        std::thread::yield_now();
    }
    child
}

fn freeze(pid: i32) -> Stopped {
    let running = Running::seize(pid, rewake_sys::ptrace::O_TRACESYSGOOD).expect("seize");
    running.interrupt().expect("interrupt");
    running.wait_stop().expect("stop")
}

fn vdso(pid: i32) -> (u64, u64) {
    let maps = read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let line = maps.lines().find(|l| l.ends_with("[vdso]")).expect("a vdso");
    let (start, rest) = line.split_once('-').expect("a range");
    let end = rest.split(' ').next().expect("an end");
    (u64::from_str_radix(start, 16).expect("hex"), u64::from_str_radix(end, 16).expect("hex"))
}

fn view(pid: i32) -> (String, Vec<String>, String) {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("fds")
        .map(|e| e.expect("entry").file_name().into_string().expect("number"))
        .collect();
    let status = read_to_string(format!("/proc/{pid}/status")).expect("status");
    let status: String = status
        .lines()
        .filter(|l| l.starts_with("Sig") && !l.starts_with("SigQ") || l.starts_with("Tracer"))
        .collect();
    (read_to_string(format!("/proc/{pid}/maps")).expect("maps"), fds, status)
}

#[test]
fn an_agent_works_and_leaves_no_trace() {
    let mut child = sleeper();
    let pid = child.id() as i32;
    let pidfd = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(pid).expect("a pid"),
        rustix::process::PidfdFlags::empty(),
    )
    .expect("pidfd");
    let before = view(pid);
    // Telling by a signal, and by none.
    for signal in [libc::SIGURG, 0].into_iter().cycle().take(50) {
        let leader = freeze(pid);
        let start = Instant::now();
        let memory =
            File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).expect("mem");
        let target = Target {
            pidfd: std::os::fd::AsFd::as_fd(&pidfd),
            memory: std::sync::Arc::new(memory),
            candidates: &[vdso(pid)],
            signal,
            start: (
                leader.registers().expect("registers"),
                rewake_sys::ptrace::signal_mask(pid).expect("its mask"),
            ),
        };
        let mut name = None;
        let (live, results) = Live::inject(leader, target, |base| {
            let mut script = Script::new(base);
            script.push(Op::new(libc::SYS_getpid, &[]));
            let data = script.space(16);
            script.push(Op::new(libc::SYS_prctl, &[16, data.address]));
            name = Some(data);
            script
        })
        .expect("inject");
        assert_eq!(results.value(0), Ok(i64::from(pid)));
        assert_eq!(&results.bytes(name.expect("built"))[..6], b"sleep\0");
        let mut script = Script::new(live.data_base());
        script.push(Op::new(libc::SYS_getppid, &[]));
        script.push(Op::new(libc::SYS_close, &[9999]).stop());
        script.push(Op::new(libc::SYS_getpid, &[]));
        let results = live.run(&script).expect("second batch");
        assert_eq!(results.value(0), Ok(i64::from(std::process::id())));
        assert_eq!(results.value(1), Err(rewake_sys::Errno::BADF));
        assert_eq!(results.ops.len(), 2, "the batch stops at a failed operation that says so");
        let made = live.bring("eventfd2", libc::SYS_eventfd2, &[7, 0]).expect("a descriptor");
        let mut counter = [0; 8];
        rustix::io::read(&made, &mut counter).expect("it is the eventfd");
        assert_eq!(u64::from_ne_bytes(counter), 7);
        assert!(live.bring("close", libc::SYS_close, &[9999]).is_err(), "no descriptor is made");
        let leader = live.cure().expect("cure");
        eprintln!("agent in and out: {:?}", start.elapsed());
        leader.detach(0).expect("detach");
    }
    while !read_to_string(format!("/proc/{pid}/syscall"))
        .expect("syscall")
        .starts_with(|c: char| c.is_ascii_digit())
    {}
    assert_eq!(view(pid), before);
    let syscall = read_to_string(format!("/proc/{pid}/syscall")).expect("syscall");
    // clock_nanosleep (230) itself or restart_syscall (219)
    assert!(syscall.starts_with("230 ") || syscall.starts_with("219 "), "{syscall}");
    assert!(child.try_wait().expect("wait").is_none(), "it still sleeps");
    child.kill().expect("kill");
    child.wait().expect("reap");
}
