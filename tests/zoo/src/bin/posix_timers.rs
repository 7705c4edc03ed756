//! Kernel state: POSIX timers: ids with gaps, several clocks, SIGEV_SIGNAL with values, SIGEV_NONE, SIGEV_THREAD_ID,
//! running ones, far ones, disarmed ones.
#![allow(unsafe_code, reason = "raw timer_create, so that the kernel's ids are seen")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use zoo::{Check, check, ensure, ensure_eq, timespec};

static FIRED: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
static BY: [AtomicI32; 64] = [const { AtomicI32::new(0) }; 64];
const MS: i64 = 1_000_000;
const SEC: i64 = 1000 * MS;

extern "C" fn fired(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: a valid siginfo of SI_TIMER or SI_QUEUE carries a value.
    let (code, value) = unsafe { ((*info).si_code, (*info).si_value().sival_ptr as usize) };
    if code == libc::SI_TIMER && value < FIRED.len() {
        FIRED[value].fetch_add(1, Ordering::SeqCst);
        BY[value].store(zoo::tid(), Ordering::SeqCst);
    }
}

#[derive(Clone, Debug)]
struct Timer {
    id: i32,
    value: usize,
    interval: i64,
    armed: i64,
    name: String,
}

fn create(clock: i32, notify: i32, signo: i32, value: usize, tid: i32) -> Result<i32, String> {
    // SAFETY: the event and the id are locals.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = notify;
        event.sigev_signo = signo;
        event.sigev_value = libc::sigval { sival_ptr: value as *mut _ };
        event.sigev_notify_thread_id = tid;
        let mut id = 0i32;
        check(
            libc::syscall(libc::SYS_timer_create, clock, &raw mut event, &raw mut id) as i32,
            "timer_create",
        )?;
        Ok(id)
    }
}

fn set(id: i32, value: i64, interval: i64, absolute: bool) -> Check {
    let t = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(value) };
    let flags = if absolute { libc::TIMER_ABSTIME } else { 0 };
    // SAFETY: `t` is a local.
    check(
        unsafe { libc::syscall(libc::SYS_timer_settime, id, flags, &raw const t, 0) } as i32,
        "timer_settime",
    )
}

fn get(id: i32) -> Result<(i64, i64), String> {
    // SAFETY: zeroed is valid, then written by the kernel.
    unsafe {
        let mut t: libc::itimerspec = std::mem::zeroed();
        check(
            libc::syscall(libc::SYS_timer_gettime, id, &raw mut t) as i32,
            &format!("timer_gettime({id})"),
        )?;
        let ns = |t: libc::timespec| t.tv_sec * SEC + t.tv_nsec;
        Ok((ns(t.it_value), ns(t.it_interval)))
    }
}

fn delete(id: i32) -> Check {
    // SAFETY: an integer.
    check(unsafe { libc::syscall(libc::SYS_timer_delete, id) } as i32, "timer_delete")
}

fn main() {
    zoo::run(|z| {
        let rt = libc::SIGRTMIN() + 1;
        zoo::on_signal(rt, fired as *const () as usize, libc::SA_SIGINFO | libc::SA_RESTART)?;
        static TID: AtomicI32 = AtomicI32::new(0);
        static STOP: zoo::Flag = zoo::Flag::new();
        let thread = std::thread::spawn(|| {
            TID.store(zoo::tid(), Ordering::SeqCst);
            while !STOP.is_set() {
                zoo::nap(5);
            }
        });
        while TID.load(Ordering::SeqCst) == 0 {
            zoo::nap(1);
        }
        let tid = TID.load(Ordering::SeqCst);
        let timers = Mutex::new(Vec::new());
        let mut next = 0;
        let mut add = |name: &str, clock, notify, value: i64, interval: i64, absolute| -> Check {
            next += 1;
            // Two ids are left free before each timer that stays.
            let free = [
                create(clock, libc::SIGEV_NONE, 0, 0, 0)?,
                create(clock, libc::SIGEV_NONE, 0, 0, 0)?,
            ];
            let id = create(
                clock,
                notify,
                rt,
                next,
                if notify == libc::SIGEV_THREAD_ID { tid } else { 0 },
            )?;
            for id in free {
                delete(id)?;
            }
            if value != 0 {
                let base = if absolute { zoo::clock(clock) } else { 0 };
                set(id, base + value, interval, absolute)?;
            }
            let t = Timer { id, value: next, interval, armed: value, name: name.into() };
            timers.lock().map_err(|e| e.to_string())?.push(t);
            Ok(())
        };
        use libc::{CLOCK_BOOTTIME, CLOCK_MONOTONIC, CLOCK_PROCESS_CPUTIME_ID, CLOCK_REALTIME};
        use libc::{SIGEV_NONE, SIGEV_SIGNAL, SIGEV_THREAD_ID};
        add("monotonic, periodic", CLOCK_MONOTONIC, SIGEV_SIGNAL, 20 * MS, 20 * MS, false)?;
        add("realtime, periodic", CLOCK_REALTIME, SIGEV_SIGNAL, 30 * MS, 30 * MS, false)?;
        add("boottime, periodic", CLOCK_BOOTTIME, SIGEV_SIGNAL, 25 * MS, 25 * MS, false)?;
        add("for a thread, periodic", CLOCK_MONOTONIC, SIGEV_THREAD_ID, 15 * MS, 15 * MS, false)?;
        add(
            "process CPU time, periodic",
            CLOCK_PROCESS_CPUTIME_ID,
            SIGEV_SIGNAL,
            10 * MS,
            10 * MS,
            false,
        )?;
        let periodic = 5;
        add("monotonic, far", CLOCK_MONOTONIC, SIGEV_SIGNAL, 3600 * SEC + 5, 17 * SEC + 3, false)?;
        add("realtime, far", CLOCK_REALTIME, SIGEV_NONE, 3600 * SEC, 0, false)?;
        add("boottime, far", CLOCK_BOOTTIME, SIGEV_NONE, 3600 * SEC, SEC, false)?;
        add("for a thread, far", CLOCK_REALTIME, SIGEV_THREAD_ID, 3600 * SEC, 2 * SEC, false)?;
        add(
            "process CPU time, far",
            CLOCK_PROCESS_CPUTIME_ID,
            SIGEV_SIGNAL,
            3600 * SEC,
            3 * SEC,
            false,
        )?;
        add("absolute monotonic, far", CLOCK_MONOTONIC, SIGEV_SIGNAL, 3600 * SEC, 0, true)?;
        add("disarmed", CLOCK_MONOTONIC, SIGEV_SIGNAL, 0, 0, false)?;
        let timers = timers.into_inner().map_err(|e| e.to_string())?;
        zoo::nap(60);
        z.ready()?;
        z.wait_for_check();

        for t in &timers {
            let (left, interval) = get(t.id)?;
            ensure_eq!(interval, t.interval, "interval of timer {} ({})", t.id, t.name);
            if t.armed == 0 {
                ensure_eq!(left, 0, "time left on the disarmed timer");
            } else {
                // A tick of the scheduler clock may be added to CPU timers.
                ensure!(
                    left > 0 && left <= t.armed + 20 * MS,
                    "{}: {left} ns left of {}",
                    t.name,
                    t.armed
                );
            }
            if t.armed > SEC {
                ensure!(left > 3500 * SEC, "{}: only {left} ns left of an hour", t.name);
                ensure_eq!(
                    FIRED[t.value].load(Ordering::SeqCst),
                    0,
                    "early expiries of {}",
                    t.name
                );
            }
        }
        let before: Vec<u64> = FIRED.iter().map(|f| f.load(Ordering::SeqCst)).collect();
        let times = |t: &Timer| FIRED[t.value].load(Ordering::SeqCst) - before[t.value];
        let until = zoo::now() + 5 * SEC;
        while zoo::now() < until && timers.iter().take(periodic).any(|t| times(t) < 3) {
            std::hint::spin_loop();
        }
        for t in timers.iter().take(periodic) {
            ensure!(times(t) >= 3, "{} fired {} times in 5 s of work", t.name, times(t));
        }
        let by = BY[timers[3].value].load(Ordering::SeqCst);
        ensure_eq!(by, tid, "thread that got the signal of its own timer");
        let disarmed = timers.last().ok_or("no timers")?;
        set(disarmed.id, 5 * MS, 0, false)?;
        zoo::nap(30);
        ensure_eq!(
            FIRED[disarmed.value].load(Ordering::SeqCst),
            1,
            "expiries of a timer armed after the check began"
        );
        for t in &timers {
            delete(t.id)?;
        }
        STOP.set();
        thread.join().map_err(|_| "thread panicked")?;
        Ok(())
    })
}
