//! Kernel state: threads blocked on kinds of descriptors that sleepers.rs leaves out: epoll_wait, accept, recv on a
//! Unix socket pair, read of a timerfd, msgrcv of a System V queue. Same rules: no return before the check.
#![allow(unsafe_code, reason = "raw system calls")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use zoo::{Zoo, check, ensure_eq, ok};

static RELEASED: AtomicBool = AtomicBool::new(false);

type Call = Box<dyn Fn() -> i64 + Send>;

struct Sleeper {
    name: &'static str,
    tid: Arc<AtomicI32>,
    thread: std::thread::JoinHandle<Result<i64, String>>,
}

fn raw(ret: i64) -> i64 {
    if ret < 0 { -(zoo::errno() as i64) } else { ret }
}

fn sleeper(z: &'static Zoo, name: &'static str, call: Call) -> Result<Sleeper, String> {
    let tid = Arc::new(AtomicI32::new(0));
    let mine = tid.clone();
    let body = move || {
        mine.store(zoo::tid(), Ordering::SeqCst);
        loop {
            let ret = call();
            if RELEASED.load(Ordering::SeqCst) {
                return Ok(ret);
            }
            ensure_eq!(ret, -(libc::EINTR as i64), "{name} returned before the check");
            z.note("eintr", name);
        }
    };
    let thread = std::thread::Builder::new().name(name.into()).stack_size(128 << 10).spawn(body);
    Ok(Sleeper { name, tid, thread: thread.map_err(|e| e.to_string())? })
}

#[repr(C)]
struct Message {
    kind: libc::c_long,
    text: [u8; 8],
}

fn main() {
    zoo::run(|z| {
        // SAFETY: the program ends with this closure.
        let z: &'static Zoo = unsafe { &*(z as *const Zoo) };
        let listener = zoo::net::listener("127.0.0.1")?;
        let address = listener.local_addr().map_err(|e| e.to_string())?;
        use std::os::fd::AsRawFd;
        let listening = listener.as_raw_fd();
        let mut pair = [0; 2];
        // SAFETY (all below): out-parameters are locals that outlive the calls.
        let (event, epoll, timer, queue) = unsafe {
            check(
                libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()),
                "socketpair",
            )?;
            let event = libc::eventfd(0, 0);
            let epoll = libc::epoll_create1(0);
            let mut item = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 99 };
            check(libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, event, &mut item), "epoll_ctl")?;
            let timer = libc::timerfd_create(libc::CLOCK_MONOTONIC, 0);
            let hour = libc::itimerspec {
                it_interval: zoo::timespec(0),
                it_value: zoo::timespec(3_600_000_000_000),
            };
            check(libc::timerfd_settime(timer, 0, &hour, std::ptr::null_mut()), "timerfd_settime")?;
            let queue = ok(libc::msgget(libc::IPC_PRIVATE, 0o600) as i64, "msgget")? as i32;
            (event, epoll, timer, queue)
        };
        let [recv_from, send_to] = pair;
        let all = [
            sleeper(
                z,
                "epoll_wait",
                Box::new(move || unsafe {
                    let mut e = libc::epoll_event { events: 0, u64: 0 };
                    let n = raw(libc::epoll_wait(epoll, &mut e, 1, -1) as i64);
                    if n == 1 { e.u64 as i64 } else { n }
                }),
            )?,
            sleeper(
                z,
                "epoll_wait_timed",
                Box::new(move || unsafe {
                    let mut e = libc::epoll_event { events: 0, u64: 0 };
                    let n = raw(libc::epoll_wait(epoll, &mut e, 1, 3_600_000) as i64);
                    if n == 1 { e.u64 as i64 } else { n }
                }),
            )?,
            sleeper(
                z,
                "accept",
                Box::new(move || unsafe {
                    let fd =
                        raw(libc::accept(listening, std::ptr::null_mut(), std::ptr::null_mut())
                            as i64);
                    if fd >= 0 { 0 } else { fd }
                }),
            )?,
            sleeper(
                z,
                "recv",
                Box::new(move || unsafe {
                    let mut buf = [0u8; 8];
                    raw(libc::recv(recv_from, buf.as_mut_ptr().cast(), 8, 0) as i64)
                }),
            )?,
            sleeper(
                z,
                "read_timerfd",
                Box::new(move || unsafe {
                    let mut buf = [0u8; 8];
                    raw(libc::read(timer, buf.as_mut_ptr().cast(), 8) as i64)
                }),
            )?,
            sleeper(
                z,
                "msgrcv",
                Box::new(move || unsafe {
                    let mut m = Message { kind: 0, text: [0; 8] };
                    raw(libc::msgrcv(queue, &mut m as *mut Message as *mut _, 8, 5, 0) as i64)
                }),
            )?,
        ];
        for s in &all {
            while s.tid.load(Ordering::SeqCst) == 0 {
                zoo::nap(1);
            }
            zoo::wait_state(s.tid.load(Ordering::SeqCst), 'S')?;
        }
        zoo::nap(5);
        z.ready()?;
        z.wait_for_check();
        for s in &all {
            // Just resumed it may still be on its way back into the call.
            let blocked = zoo::wait_state(s.tid.load(Ordering::SeqCst), 'S');
            blocked.map_err(|e| format!("{}: {e}", s.name))?;
        }
        RELEASED.store(true, Ordering::SeqCst);
        let _client = std::net::TcpStream::connect(address).map_err(|e| format!("connect: {e}"))?;
        // SAFETY: buffers are locals.
        unsafe {
            libc::write(event, &1u64 as *const u64 as *const _, 8);
            libc::write(send_to, c"wake".as_ptr().cast(), 4);
            let soon = libc::itimerspec {
                it_interval: zoo::timespec(0),
                it_value: zoo::timespec(1_000_000),
            };
            check(libc::timerfd_settime(timer, 0, &soon, std::ptr::null_mut()), "timerfd_settime")?;
            let m = Message { kind: 5, text: *b"message!" };
            check(libc::msgsnd(queue, &m as *const Message as *const _, 6, 0), "msgsnd")?;
        }
        let want = [99, 99, 0, 4, 8, 6];
        for (s, want) in all.into_iter().zip(want) {
            let got = s.thread.join().map_err(|_| format!("{} panicked", s.name))??;
            ensure_eq!(got, want, "what {} returned when woken", s.name);
        }
        // SAFETY: removes our own queue.
        check(unsafe { libc::msgctl(queue, libc::IPC_RMID, std::ptr::null_mut()) }, "msgctl")
    })
}
