//! Kernel state: epoll instances: items on pipes, eventfds and another epoll, with their events and data, edge-triggered
//! and one-shot ones; descriptors above and below the instance's own number.
#![allow(unsafe_code, reason = "raw descriptors")]

use zoo::{check, ensure_eq, ok};

fn wait(epoll: i32) -> Result<Vec<(u32, u64)>, String> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    // SAFETY: room for 16.
    let n =
        ok(unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), 16, 0) } as i64, "epoll_wait")?;
    let mut found: Vec<_> = events[..n as usize].iter().map(|e| (e.events, e.u64)).collect();
    found.sort_by_key(|e| e.1);
    Ok(found)
}

fn control(epoll: i32, op: i32, fd: i32, events: i32, data: u64) -> zoo::Check {
    let mut e = libc::epoll_event { events: events as u32, u64: data };
    // SAFETY: `e` is a local.
    check(unsafe { libc::epoll_ctl(epoll, op, fd, &mut e) }, &format!("epoll_ctl {op} of fd {fd}"))
}

fn main() {
    zoo::run(|z| {
        let (add, modify) = (libc::EPOLL_CTL_ADD, libc::EPOLL_CTL_MOD);
        let mut pipe = [0; 2];
        // SAFETY: room for two descriptors; integers.
        let (low, epoll, inner, event, edge, once) = unsafe {
            check(libc::pipe(pipe.as_mut_ptr()), "pipe")?;
            let low = libc::eventfd(1, 0);
            let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
            (
                low,
                epoll,
                libc::epoll_create1(0),
                libc::eventfd(0, 0),
                libc::eventfd(7, 0),
                libc::eventfd(8, 0),
            )
        };
        let (input, output) = (libc::EPOLLIN, libc::EPOLLOUT);
        control(epoll, add, low, input, 1)?;
        control(epoll, add, pipe[0], input | libc::EPOLLRDHUP, u64::MAX - 5)?;
        control(epoll, add, pipe[1], output, 3)?;
        control(epoll, add, inner, input, 4)?;
        control(inner, add, event, input, 5)?;
        control(epoll, add, edge, input | libc::EPOLLET, 6)?;
        control(epoll, add, once, input | libc::EPOLLONESHOT, 7)?;
        // A high number, as event loops of large programs have.
        // SAFETY: integers.
        let high = unsafe { libc::fcntl(event, libc::F_DUPFD, 500) };
        control(epoll, add, high, input, 8)?;
        // How it polls network devices: 64 µs, 16 packets, preferably.
        let polls = z.param("ZOO_POLLS", 0) != 0;
        let params = [64u8, 0, 0, 0, 16, 0, 1, 0];
        // SAFETY: eight bytes, as the request has.
        if polls && unsafe { libc::ioctl(epoll, 0x4008_8a01, params.as_ptr()) } != 0 {
            z.skip("epoll instances do not poll network devices here");
        }
        z.ready()?;
        z.wait_for_check();
        if polls {
            let mut now = [0u8; 8];
            // SAFETY: room for eight bytes.
            zoo::check(
                unsafe { libc::ioctl(epoll, 0x8008_8a02, now.as_mut_ptr()) },
                "EPIOCGPARAMS",
            )?;
            ensure_eq!(now, params, "how it polls network devices");
        }
        let (input, output) = (input as u32, output as u32);
        ensure_eq!(wait(epoll)?, [(input, 1), (output, 3), (input, 6), (input, 7)], "first events");
        // Edge and one-shot have had their turn.
        ensure_eq!(wait(epoll)?, [(input, 1), (output, 3)], "events after the edge");
        let n = 1u64;
        // SAFETY: eight bytes of a local, one byte of a literal.
        unsafe {
            libc::write(event, (&raw const n).cast(), 8);
            libc::write(pipe[1], c"x".as_ptr().cast(), 1);
        }
        let all = [(input, 1), (output, 3), (input, 4), (input, 8), (input, u64::MAX - 5)];
        ensure_eq!(wait(epoll)?, all, "events after writing");
        ensure_eq!(wait(inner)?, [(input, 5)], "events of the inner one");
        control(epoll, modify, once, input as i32, 70)?;
        control(epoll, libc::EPOLL_CTL_DEL, high, 0, 0)?;
        let all = [(input, 1), (output, 3), (input, 4), (input, 70), (input, u64::MAX - 5)];
        ensure_eq!(wait(epoll)?, all, "events after changing items");
        Ok(())
    })
}
