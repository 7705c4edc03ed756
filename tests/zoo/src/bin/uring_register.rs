//! Kernel state: what is registered with an io_uring instance: files in a table with empty slots (one of which only a child
//! has a descriptor of), tags, a range for new ones; buffers, private and shared; an eventfd (with ZOO_ASYNC for what is not
//! done at once, with ZOO_NOBODY one without descriptor); limits of workers; a clock. With ZOO_FLAGS it is made with these flags, with ZOO_THREAD by another thread than the first.
//! With ZOO_ONLY a file has no other descriptor, with ZOO_MOVED a buffer is not mapped any more, with ZOO_GROUP there is a
//! group of buffers, with ZOO_POLL network devices are polled (a dump must be refused).
#![allow(unsafe_code, reason = "io_uring has no library functions here")]

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use zoo::uring::{FIXED_FILE, OP_NOP, OP_READ_FIXED, OP_SOCKET, OP_WRITE_FIXED, Request, Ring};
use zoo::{Check, Zoo, check, ensure, ensure_eq, errno, mmap_anon, ok};

const FILES: u32 = 13;
const FILES_UPDATE: u32 = 14;
const BUFFERS: u32 = 15;
const BUFFERS_UPDATE: u32 = 16;
const SPARSE: u64 = 1 << 32;
const PAGE: usize = 4096;

fn table(ring: &Ring, what: u32, slots: u64) -> Check {
    let table = [slots | SPARSE, 0, 0, 0];
    ok(ring.register(what, &table, 32), "a sparse table").map(drop)
}

fn update(ring: &Ring, what: u32, slot: u64, value: *const libc::c_void, tag: u64) -> Check {
    let update = [slot, value as u64, (&raw const tag) as u64, 1];
    ok(ring.register(what, &update, 32), "an update of a table").map(drop)
}

fn file(ring: &Ring, slot: u64, fd: i32, tag: u64) -> Check {
    update(ring, FILES_UPDATE, slot, (&raw const fd).cast(), tag)
}

fn buffer(ring: &Ring, slot: u64, start: *mut u8, len: usize, tag: u64) -> Check {
    let vector = libc::iovec { iov_base: start.cast(), iov_len: len };
    update(ring, BUFFERS_UPDATE, slot, (&raw const vector).cast(), tag)
}

/// Makes a request and returns its result.
fn request(ring: &Ring, r: Request) -> Result<i32, String> {
    ring.put(Request { user_data: 5, ..r });
    ensure_eq!(ring.enter(1, 1)?, 1, "requests made");
    match ring.take() {
        Some((5, result)) => Ok(result),
        other => Err(format!("completion {other:?}")),
    }
}

/// Reads or writes part of a registered buffer, from or to a registered file.
fn fixed(ring: &Ring, op: u8, slot: i32, index: u16, at: *mut u8, len: u32) -> Result<i32, String> {
    let buffer = at as u64;
    let offset = u64::MAX;
    request(
        ring,
        Request {
            op,
            flags: FIXED_FILE,
            fd: slot,
            offset,
            buffer,
            len,
            index,
            ..Request::default()
        },
    )
}

fn body(z: &Zoo, own: UnixStream, childs: UnixStream) -> Check {
    let has = |name: &str| z.param(name, 0) != 0;
    let ring = Ring::new(16, z.param("ZOO_FLAGS", 0) as u32).unwrap_or_else(|why| z.skip(&why));
    table(&ring, FILES, 10)?;
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe(pipe.as_mut_ptr()) }, "pipe")?;
    let temporary = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(z.path("file"))
        .map_err(|e| e.to_string())?;
    file(&ring, 1, pipe[0], 0)?;
    file(&ring, 2, pipe[1], 0)?;
    file(&ring, 3, childs.as_raw_fd(), 0)?;
    drop(childs);
    file(&ring, 5, temporary.as_raw_fd(), 77)?;
    // File range: from slot 6 on.
    let range = [6u64 | 4 << 32, 0];
    ok(ring.register(25, &range, 0), "IORING_REGISTER_FILE_ALLOC_RANGE")?;
    if has("ZOO_ONLY") {
        file(
            &ring,
            0,
            std::fs::File::open("/dev/null").map_err(|e| e.to_string())?.as_raw_fd(),
            0,
        )?;
    }
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let private = mmap_anon(3 * PAGE, both, libc::MAP_PRIVATE)?;
    let shared = mmap_anon(4 * PAGE, both, libc::MAP_SHARED)?;
    let fill = |to: *mut u8, len: usize, what: u8| {
        // SAFETY: inside the mappings above.
        unsafe { std::slice::from_raw_parts_mut(to, len) }.fill(what);
    };
    fill(private, 3 * PAGE, 1);
    fill(shared, 4 * PAGE, 2);
    table(&ring, BUFFERS, 70)?;
    // Neither begins nor ends with a page.
    let odd = private.wrapping_add(100);
    buffer(&ring, 0, odd, 2 * PAGE + 50, 0)?;
    buffer(&ring, 2, shared, 4 * PAGE, 88)?;
    for slot in 3..68 {
        buffer(&ring, slot, shared.wrapping_add(PAGE), 64, 0)?;
    }
    // SAFETY: plain numbers.
    let eventfd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    check(eventfd, "eventfd")?;
    let which = if has("ZOO_ASYNC") { 7 } else { 4 };
    ok(ring.register(which, &eventfd, 1), "IORING_REGISTER_EVENTFD")?;
    if has("ZOO_NOBODY") {
        // SAFETY: ours.
        check(unsafe { libc::close(eventfd) }, "close")?;
    }
    let limits = [3u32, 5];
    ok(ring.register(19, &limits, 2), "IORING_REGISTER_IOWQ_MAX_WORKERS")?;
    let clock = [libc::CLOCK_BOOTTIME as u64, 0];
    let by_clock = ring.register(29, &clock, 0);
    ensure!(by_clock == 0 || errno() == libc::EINVAL, "IORING_REGISTER_CLOCK: errno {}", errno());
    for _ in 0..100 {
        ensure_eq!(request(&ring, Request { op: OP_NOP, ..Request::default() })?, 0, "NOP");
    }
    if has("ZOO_MOVED") {
        // SAFETY: a part of our own mapping; the ring keeps the pages.
        check(unsafe { libc::munmap(private.cast(), PAGE) }, "munmap")?;
    }
    if has("ZOO_GROUP") {
        // PROVIDE_BUFFERS: a buffer, number 3, of group 9.
        let start = Request {
            op: 31,
            fd: 1,
            offset: 3,
            buffer: shared as u64,
            len: 64,
            index: 9,
            ..Request::default()
        };
        ensure_eq!(request(&ring, start)?, 0, "IORING_OP_PROVIDE_BUFFERS");
    }
    if has("ZOO_POLL") {
        let napi = [50u64, 0];
        ok(ring.register(27, &napi, 1), "IORING_REGISTER_NAPI")?;
    }
    let mut count = [0u8; 8];
    let told = |count: &mut [u8; 8]| {
        // SAFETY: room for a count.
        let got = unsafe { libc::read(eventfd, count.as_mut_ptr().cast(), 8) };
        if got == 8 { u64::from_ne_bytes(*count) } else { 0 }
    };
    let aside = has("ZOO_ASYNC") || has("ZOO_NOBODY");
    if !aside {
        ensure_eq!(told(&mut count), 100 + u64::from(has("ZOO_GROUP")), "completions before");
        ensure_eq!(request(&ring, Request { op: OP_NOP, ..Request::default() })?, 0, "NOP");
    }
    z.ready()?;
    z.wait_for_check();
    if has("ZOO_MOVED") {
        return Ok(());
    }
    if !aside {
        ensure_eq!(told(&mut count), 1, "completions that the eventfd had been told of");
    }
    ensure_eq!(request(&ring, Request { op: OP_NOP, ..Request::default() })?, 0, "NOP");
    if !has("ZOO_NOBODY") {
        let expected = u64::from(!has("ZOO_ASYNC"));
        ensure_eq!(told(&mut count), expected, "completions that the eventfd is told of");
    }
    // Through the pipe, out of the private buffer and into the shared one.
    fill(odd, 2 * PAGE + 50, 7);
    ensure_eq!(fixed(&ring, OP_WRITE_FIXED, 2, 0, odd, 5000)?, 5000, "written to the pipe");
    ensure_eq!(fixed(&ring, OP_READ_FIXED, 1, 2, shared, 5000)?, 5000, "read from the pipe");
    // SAFETY: inside the mapping.
    let there = unsafe { std::slice::from_raw_parts(shared, 4 * PAGE) };
    ensure!(there[..5000].iter().all(|b| *b == 7), "the shared buffer is not what was read into");
    ensure!(there[5000..].iter().all(|b| *b == 2), "the rest of the shared buffer has changed");
    ensure_eq!(
        fixed(&ring, OP_WRITE_FIXED, 3, 67, shared.wrapping_add(PAGE), 64)?,
        64,
        "to the child's socket"
    );
    let mut got = [0; 64];
    (&own).read_exact(&mut got).map_err(|e| e.to_string())?;
    ensure_eq!(got, [7; 64], "what came through the child's socket");
    ensure_eq!(fixed(&ring, OP_WRITE_FIXED, 5, 0, odd, 10)?, 10, "written to the file");
    ensure_eq!(std::fs::read(z.path("file")).map_err(|e| e.to_string())?, [7; 10], "the file");
    // An empty slot, and beyond the table.
    ensure_eq!(fixed(&ring, OP_WRITE_FIXED, 4, 0, odd, 1)?, -libc::EBADF, "an empty slot");
    ensure_eq!(fixed(&ring, OP_WRITE_FIXED, 10, 0, odd, 1)?, -libc::EBADF, "beyond the table");
    ensure_eq!(fixed(&ring, OP_WRITE_FIXED, 5, 1, odd, 1)?, -libc::EFAULT, "an empty buffer");
    ensure_eq!(fixed(&ring, OP_WRITE_FIXED, 5, 0, private, 1)?, -libc::EFAULT, "before the buffer");
    let socket = Request {
        op: OP_SOCKET,
        fd: libc::AF_UNIX,
        offset: libc::SOCK_STREAM as u64,
        file_index: u32::MAX,
        ..Request::default()
    };
    ensure_eq!(request(&ring, socket)?, 6, "the slot of a new socket");
    // What tags tell.
    file(&ring, 5, -1, 0)?;
    ring.enter(0, 1)?;
    ensure_eq!(ring.take(), Some((77, 0)), "the end of the file's registration");
    buffer(&ring, 2, std::ptr::null_mut(), 0, 0)?;
    ring.enter(0, 1)?;
    ensure_eq!(ring.take(), Some((88, 0)), "the end of the buffer's registration");
    let before = [0u32, 0];
    ok(ring.register(19, &before, 2), "IORING_REGISTER_IOWQ_MAX_WORKERS")?;
    // SAFETY: a local, which the kernel has written to.
    let before = unsafe { std::ptr::read_volatile(&raw const before) };
    ensure_eq!(before, [3, 5], "limits of workers");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let (own, childs) = UnixStream::pair().map_err(|e| e.to_string())?;
        let child = z.fork(|z| {
            // It has the other end only.
            // SAFETY: the descriptor is not used any more in this process.
            check(unsafe { libc::close(own.as_raw_fd()) }, "close")?;
            z.publish("up", "");
            z.wait_for("child.go")
        })?;
        z.wait_for("up")?;
        let done = if z.param("ZOO_THREAD", 0) != 0 {
            let body = || body(z, own, childs);
            std::thread::scope(|s| s.spawn(body).join()).unwrap_or_else(|_| Err("panic".into()))
        } else {
            body(z, own, childs)
        };
        z.publish("child.go", "");
        z.join(child)?;
        done
    })
}
