//! Kernel state: alternate signal stacks: of the main thread, which is ON it (inside a handler) while it is dumped, of a
//! thread that is not on its own, and of one with SS_AUTODISARM. The signal frame under the handler must still return.
#![allow(unsafe_code, reason = "handlers and stacks through the C library")]

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use zoo::{Zoo, check, ensure, ensure_eq};

const SIZE: usize = 256 << 10;
const SS_AUTODISARM: i32 = 1 << 31;
static ZOO: AtomicPtr<Zoo> = AtomicPtr::new(std::ptr::null_mut());
static WHERE: AtomicUsize = AtomicUsize::new(0);
static INSIDE: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];
static BAD: AtomicBool = AtomicBool::new(false);

fn current() -> (usize, usize, i32) {
    // SAFETY: only asks.
    unsafe {
        let mut s: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &mut s);
        (s.ss_sp as usize, s.ss_size, s.ss_flags)
    }
}

fn install(flags: i32) -> Result<usize, String> {
    let p = zoo::mmap_anon(SIZE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)?;
    let s = libc::stack_t { ss_sp: p.cast(), ss_flags: flags, ss_size: SIZE };
    // SAFETY: the mapping stays for good.
    check(unsafe { libc::sigaltstack(&s, std::ptr::null_mut()) }, "sigaltstack")?;
    Ok(p as usize)
}

/// Main's handler: the whole wait happens in here, on the alternate stack.
extern "C" fn wait_here(_: i32) {
    let mark = 0x5eed_5eed_u64;
    let here = &raw const mark as usize;
    WHERE.store(here, Ordering::SeqCst);
    let before = current();
    // SAFETY: set before the signal is raised; raise() is synchronous, so nothing is interrupted half-way.
    let z = unsafe { &*ZOO.load(Ordering::SeqCst) };
    if z.ready().is_err() {
        BAD.store(true, Ordering::SeqCst);
    }
    z.wait_for_check();
    // SAFETY: `mark` is alive; volatile, so that it is read from memory.
    let intact = unsafe { std::ptr::read_volatile(&mark) } == 0x5eed_5eed;
    if !intact || current() != before || before.2 & libc::SS_ONSTACK == 0 {
        BAD.store(true, Ordering::SeqCst);
    }
}

extern "C" fn note(signo: i32) {
    let local = 0u8;
    INSIDE[(signo == libc::SIGUSR2) as usize].store(&raw const local as usize, Ordering::SeqCst);
    INSIDE[2].store((current().2 & libc::SS_DISABLE != 0) as usize, Ordering::SeqCst);
}

fn main() {
    zoo::run(|z| {
        ZOO.store(z as *const Zoo as *mut Zoo, Ordering::SeqCst);
        let main_stack = install(0)?;
        zoo::on_signal(libc::SIGHUP, wait_here as *const () as usize, libc::SA_ONSTACK)?;
        zoo::on_signal(libc::SIGUSR1, note as *const () as usize, libc::SA_ONSTACK)?;
        zoo::on_signal(libc::SIGUSR2, note as *const () as usize, libc::SA_ONSTACK)?;
        static UP: AtomicI32 = AtomicI32::new(0);
        // SAFETY: the program ends with this closure.
        let z: &'static Zoo = unsafe { &*(z as *const Zoo) };
        let mut threads = Vec::new();
        for (i, flags) in [0, SS_AUTODISARM].into_iter().enumerate() {
            threads.push(std::thread::spawn(move || -> zoo::Check {
                let stack = install(flags)?;
                let before = current();
                ensure_eq!(before, (stack, SIZE, flags), "set-up of thread {i}");
                UP.fetch_add(1, Ordering::SeqCst);
                z.wait_for_check();
                ensure_eq!(current(), before, "alternate stack of thread {i}");
                while UP.load(Ordering::SeqCst) != 10 + i as i32 {
                    zoo::nap(1);
                }
                // SAFETY: a signal with a handler, to this thread.
                unsafe {
                    libc::syscall(
                        libc::SYS_tgkill,
                        zoo::pid(),
                        zoo::tid(),
                        [libc::SIGUSR1, libc::SIGUSR2][i],
                    )
                };
                let at = INSIDE[i].load(Ordering::SeqCst);
                ensure!(
                    (stack..stack + SIZE).contains(&at),
                    "thread {i}'s handler ran at {at:#x}, not on its stack"
                );
                ensure_eq!(
                    INSIDE[2].load(Ordering::SeqCst),
                    i,
                    "stack disarmed inside thread {i}'s handler"
                );
                ensure_eq!(current(), before, "alternate stack of thread {i} after the handler");
                let off = libc::stack_t {
                    ss_sp: std::ptr::null_mut(),
                    ss_flags: libc::SS_DISABLE,
                    ss_size: 0,
                };
                // SAFETY: disables.
                check(unsafe { libc::sigaltstack(&off, std::ptr::null_mut()) }, "sigaltstack off")
            }));
        }
        while UP.load(Ordering::SeqCst) != 2 {
            zoo::nap(1);
        }
        let mut on_heap = vec![7u8; 1000];
        let local = std::hint::black_box([9u64; 16]);
        // SAFETY: SIGHUP has a handler; raise returns when it has.
        unsafe { libc::raise(libc::SIGHUP) };
        on_heap.push(8);
        ensure!(
            !BAD.load(Ordering::SeqCst),
            "inside the handler the stack was not what it had been"
        );
        ensure!(
            (main_stack..main_stack + SIZE).contains(&WHERE.load(Ordering::SeqCst)),
            "not on the alternate stack"
        );
        ensure_eq!(std::hint::black_box(local), [9u64; 16], "locals under the handler");
        ensure_eq!(current(), (main_stack, SIZE, 0), "main's alternate stack after the handler");
        for (i, thread) in threads.into_iter().enumerate() {
            UP.store(10 + i as i32, Ordering::SeqCst);
            thread.join().map_err(|_| format!("thread {i} panicked"))??;
        }
        Ok(())
    })
}
