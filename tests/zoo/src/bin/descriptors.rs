//! Kernel state: many descriptors in several processes: files at positions, eventfds, pipes with content, duplicates, some
//! shared with the parent. `ZOO_CHILDREN`, `ZOO_EACH`: how many.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use zoo::{Check, Zoo, check, ensure, ensure_eq, ok};

struct Held {
    files: Vec<File>,
    events: Vec<File>,
    pipes: Vec<(File, File)>,
    doubles: Vec<OwnedFd>,
}

fn err(e: std::io::Error) -> String {
    e.to_string()
}

fn hold(z: &Zoo, who: usize, count: usize) -> Result<Held, String> {
    let part = count / 5;
    let mut held =
        Held { files: Vec::new(), events: Vec::new(), pipes: Vec::new(), doubles: Vec::new() };
    for i in 0..part {
        let path = z.path(&format!("file {}", i % 100));
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(err)?;
        file.seek(SeekFrom::Start((who * 100_000 + i) as u64)).map_err(err)?;
        held.files.push(file);
        // SAFETY: numbers; a new descriptor is owned by the file.
        let event = unsafe { libc::eventfd((who * 100_000 + i + 1) as u32, libc::EFD_NONBLOCK) };
        held.events.push(unsafe { File::from_raw_fd(ok(event as i64, "eventfd")? as i32) });
        let mut ends = [0; 2];
        // SAFETY: two numbers of a local.
        check(unsafe { libc::pipe(ends.as_mut_ptr()) }, "pipe")?;
        // SAFETY: new descriptors, owned by the files.
        let mut pipe = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
        pipe.1.write_all(format!("{who:03} {i:06}").as_bytes()).map_err(err)?;
        held.pipes.push(pipe);
        let double = held.events[i / 2].try_clone().map_err(err)?;
        held.doubles.push(double.into());
    }
    Ok(held)
}

fn verify(held: &mut Held, who: usize) -> Check {
    for (i, file) in held.files.iter_mut().enumerate() {
        let at = file.stream_position().map_err(err)?;
        ensure_eq!(at, (who * 100_000 + i) as u64, "position of file {i}");
    }
    for (i, pipe) in held.pipes.iter_mut().enumerate() {
        let mut text = [0; 10];
        pipe.0.read_exact(&mut text).map_err(err)?;
        let wanted = format!("{who:03} {i:06}");
        ensure_eq!(text[..], *wanted.as_bytes(), "content of pipe {i}");
    }
    let number = |mut file: &File| {
        let mut value = [0; 8];
        file.read_exact(&mut value).map(|()| u64::from_ne_bytes(value))
    };
    for (i, event) in held.events.iter().enumerate() {
        let value = number(event).map_err(err)?;
        ensure_eq!(value, (who * 100_000 + i + 1) as u64, "value of eventfd {i}");
    }
    for (i, double) in std::mem::take(&mut held.doubles).into_iter().enumerate() {
        let mut double = File::from(double);
        ensure!(number(&double).is_err(), "the double {i} has a value of its own");
        double.write_all(&7u64.to_ne_bytes()).map_err(err)?;
        let seen = number(&held.events[i / 2]).map_err(err)?;
        ensure_eq!(seen, 7, "what is written to the double {i}");
    }
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let (children, each) = (z.param("ZOO_CHILDREN", 2), z.param("ZOO_EACH", 500));
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: a live local.
        unsafe {
            check(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), "getrlimit")?;
            limit.rlim_cur = limit.rlim_max;
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), "setrlimit")?;
        }
        if limit.rlim_max < (each + 200) as u64 {
            z.skip(&format!("only {} descriptors are allowed", limit.rlim_max));
        }
        let mut shared = File::create_new(z.path("shared")).map_err(err)?;
        let mut pids = Vec::new();
        for who in 1..=children {
            let shared = &shared;
            pids.push(z.fork(|z| {
                let mut held = hold(z, who, each)?;
                z.publish(&format!("up {who}"), "");
                z.wait_for("told")?;
                let mut shared = shared;
                ensure_eq!(shared.stream_position().map_err(err)?, 77, "the parent's position");
                verify(&mut held, who)
            })?);
        }
        for who in 1..=children {
            z.wait_for(&format!("up {who}"))?;
        }
        let mut held = hold(z, 0, each)?;
        z.ready()?;
        z.wait_for_check();
        shared.seek(SeekFrom::Start(77)).map_err(err)?;
        z.publish("told", "");
        verify(&mut held, 0)?;
        pids.into_iter().try_for_each(|pid| z.join(pid))
    })
}
