//! The subjects: programs that hold what is measured and then sleep.
//!
//! A subject prints `ready` (and for `heap1g` the address and length of its memory), points its standard output to
//! `/dev/null` as the other two are, and sleeps for good.

mod tcp;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Duration;

const PAGE: usize = 4096;

/// Bytes of `heap1g`.
pub const HEAP: usize = 1 << 30;

/// Bytes that `cow30` shares.
const COW: usize = 64 << 20;

/// How much of it `SIGUSR1` has it write.
pub const WRITTEN: usize = 16 << 20;

static MEMORY: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// Writes to the beginning of the memory, a byte a page.
extern "C" fn write_some(_: libc::c_int) {
    let memory = MEMORY.load(Ordering::Relaxed);
    for offset in (0..WRITTEN).step_by(PAGE) {
        // SAFETY: the memory is longer than that, mapped for good, and the other thread of control sleeps.
        unsafe { memory.add(offset).write_volatile(7) };
    }
}

/// Becomes the subject of that name. `dir` is a directory for its files that outlives it.
pub fn run(name: &str, dir: &Path) -> ExitCode {
    match hold(name, dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("subject {name}: {text}");
            ExitCode::FAILURE
        }
    }
}

fn hold(name: &str, dir: &Path) -> Result<(), String> {
    match name {
        "tiny" => ready(""),
        "procs200" => {
            children(199)?;
            ready("")
        }
        "threads500" => {
            threads(499)?;
            ready("")
        }
        "vmas20k" => {
            mappings(10_000)?;
            ready("")
        }
        "fds3k" => {
            let _open = descriptors(dir)?;
            ready("")
        }
        "tcp500" => {
            let _open = tcp::within(500)?;
            ready("")
        }
        "tcp9k" => {
            let _open = tcp::within(9_000)?;
            ready("")
        }
        "tcp10k" => {
            let _open = tcp::server(10_000)?;
            ready("")
        }
        "pause256" => writer(256 << 20, dir),
        "pause1g" => writer(1 << 30, dir),
        "heap1g" => {
            let address = map(HEAP)?;
            // SAFETY: mapped just now, of that length, and known to nobody else.
            fill(unsafe { std::slice::from_raw_parts_mut(address.cast(), HEAP / 8) });
            MEMORY.store(address, Ordering::Relaxed);
            // SAFETY: the handler does nothing but write to that memory.
            unsafe { libc::signal(libc::SIGUSR1, write_some as *const () as usize) };
            ready(&format!(" {} {HEAP}", address as usize))
        }
        "cow30" => {
            let address = map(COW)?;
            // SAFETY: mapped just now, of that length, and known to nobody else.
            fill(unsafe { std::slice::from_raw_parts_mut(address.cast(), COW / 8) });
            children(30)?;
            ready(&format!(" {} {COW}", address as usize))
        }
        "smallvmas" => {
            scattered(10_000)?;
            ready("")
        }
        _ => Err("no such subject".into()),
    }
}

/// Says that all is set up, lets go of the pipe this was said through, and sleeps.
fn ready(more: &str) -> Result<(), String> {
    announce(more)?;
    sleep()
}

fn announce(more: &str) -> Result<(), String> {
    let text = |e: io::Error| e.to_string();
    let mut out = io::stdout();
    writeln!(out, "ready{more}").and_then(|()| out.flush()).map_err(text)?;
    let null = File::options().write(true).open("/dev/null").map_err(text)?;
    // SAFETY: dup2 of an open descriptor over another changes no memory.
    if unsafe { libc::dup2(null.as_raw_fd(), 1) } < 0 {
        return Err(text(io::Error::last_os_error()));
    }
    drop(null);
    Ok(())
}

fn sleep() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn children(count: usize) -> Result<(), String> {
    for _ in 0..count {
        // SAFETY: there is one thread, so that the child may go on as the parent would.
        match unsafe { libc::fork() } {
            0 => {
                // The pipe to the bench must not stay open here: its end would never come.
                // SAFETY: closing a descriptor nobody uses any more.
                unsafe { libc::dup2(0, 1) };
                sleep()
            }
            pid if pid < 0 => return Err(format!("fork: {}", io::Error::last_os_error())),
            _ => {}
        }
    }
    Ok(())
}

fn threads(count: usize) -> Result<(), String> {
    for _ in 0..count {
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(|| sleep())
            .map_err(|e| format!("thread: {e}"))?;
    }
    Ok(())
}

/// Fresh private memory.
fn map(len: usize) -> Result<*mut u8, String> {
    // SAFETY: a new mapping at an address the kernel chooses.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(format!("mmap of {len} bytes: {}", io::Error::last_os_error()));
    }
    Ok(address.cast())
}

/// Mappings of two pages; the first page is written to, the second is read-only.
fn mappings(count: usize) -> Result<(), String> {
    for n in 0..count {
        let address = map(2 * PAGE)?;
        // SAFETY: the mapping is ours, of two pages, and the first stays writable.
        let done = unsafe {
            address.cast::<usize>().write(n + 1);
            libc::mprotect(address.add(PAGE).cast(), PAGE, libc::PROT_READ)
        };
        if done != 0 {
            return Err(format!("mprotect of mapping {n}: {}", io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Mappings of three pages with one between them that is not mapped; all are written to.
fn scattered(count: usize) -> Result<(), String> {
    let address = map(4 * PAGE * count)?;
    for n in 0..count {
        // SAFETY: the four pages are within the mapping, and the last of them is given back by nobody else.
        let done = unsafe {
            let start = address.add(4 * PAGE * n);
            (0..3).for_each(|page| start.add(page * PAGE).cast::<usize>().write(n + page + 1));
            libc::munmap(start.add(3 * PAGE).cast(), PAGE)
        };
        if done != 0 {
            return Err(format!("munmap of page {n}: {}", io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// 1,000 regular files at different positions, 1,000 eventfds, 500 pipes with something in them.
fn descriptors(dir: &Path) -> Result<Vec<File>, String> {
    let mut files = Vec::new();
    for n in 0..1000 {
        let path = dir.join(format!("file.{n}"));
        let mut file = File::create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        write!(file, "this is file {n}").map_err(|e| format!("{}: {e}", path.display()))?;
        files.push(file);
    }
    for n in 0..1000 {
        // SAFETY: makes a descriptor, touches no memory.
        let fd = unsafe { libc::eventfd(n, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(format!("eventfd: {}", io::Error::last_os_error()));
        }
        // Left open on purpose, for as long as the process lives.
    }
    for n in 0..500 {
        let (reader, mut writer) = io::pipe().map_err(|e| format!("pipe: {e}"))?;
        write!(writer, "this is pipe {n}").map_err(|e| format!("pipe: {e}"))?;
        std::mem::forget((reader, writer));
    }
    Ok(files)
}

/// Numbers without a pattern (splitmix64).
pub fn fill(memory: &mut [u64]) {
    let mut state = 1u64;
    for word in memory {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        *word = z ^ (z >> 31);
    }
}

/// Writes to random pages of all its memory for good, and tells the longest time between two writes.
fn writer(len: usize, dir: &Path) -> Result<(), String> {
    let memory: *mut u8 = map(len)?.cast();
    // Small pages: the more of them, the longer it takes.
    // SAFETY: mapped just now, of that length.
    if unsafe { libc::madvise(memory.cast(), len, libc::MADV_NOHUGEPAGE) } != 0 {
        return Err("madvise".to_owned());
    }
    // SAFETY: mapped just now, of that length, and known to nobody else.
    fill(unsafe { std::slice::from_raw_parts_mut(memory.cast(), len / 8) });
    let path = dir.join(crate::pause::FILE);
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
    let file = file.map_err(|e| e.to_string())?;
    file.set_len(PAGE as u64).map_err(|e| e.to_string())?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let gap = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if gap == libc::MAP_FAILED {
        return Err("mmap".to_owned());
    }
    let gap: *mut u64 = gap.cast();
    drop(file);
    announce("")?;
    let pages = (len / PAGE) as u64;
    let (mut random, mut last) = (88_172_645_463_325_252u64, std::time::Instant::now());
    loop {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // SAFETY: within the memory; the gap's page is mapped for good.
        unsafe {
            memory.add((random % pages) as usize * PAGE).write_volatile(random as u8);
            let now = std::time::Instant::now();
            let waited = (now - last).as_nanos() as u64;
            if waited > gap.read_volatile() {
                gap.write_volatile(waited);
            }
            last = now;
        }
    }
}
