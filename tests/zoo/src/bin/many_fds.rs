//! Kernel state: many descriptors in two processes, some of them shared: eventfds, files at positions, pipes with something in
//! them. Also used by a trial that restores them where not all can be open at a time.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use zoo::{Check, Zoo, ensure_eq, ok};

const EACH: u64 = 200;
const SHARED: u64 = 100;

fn text(e: std::io::Error) -> String {
    e.to_string()
}

fn eventfd(count: u64) -> Result<File, String> {
    // SAFETY: integers; the descriptor is new.
    unsafe {
        let fd = libc::eventfd(count as u32, libc::EFD_CLOEXEC);
        Ok(File::from_raw_fd(ok(fd.into(), "eventfd")? as i32))
    }
}

fn count(mut file: &File) -> Result<u64, String> {
    let mut value = [0; 8];
    file.read_exact(&mut value).map_err(text)?;
    Ok(u64::from_ne_bytes(value))
}

struct Own {
    events: Vec<File>,
    files: Vec<File>,
    pipes: Vec<(File, File)>,
}

impl Own {
    fn new(z: &Zoo) -> Result<Own, String> {
        let path = z.path("text");
        let mut own = Own { events: Vec::new(), files: Vec::new(), pipes: Vec::new() };
        for n in 0..EACH {
            own.events.push(eventfd(n + 1)?);
            let mut file = File::open(&path).map_err(text)?;
            file.seek(SeekFrom::Start(n)).map_err(text)?;
            own.files.push(file);
            let (reader, mut writer) = std::io::pipe().map_err(text)?;
            writer.write_all(&[n as u8; 3]).map_err(text)?;
            let file = |fd: OwnedFd| File::from(fd);
            own.pipes.push((file(reader.into()), file(writer.into())));
        }
        Ok(own)
    }

    fn verify(&mut self) -> Check {
        for (n, file) in (0..).zip(&mut self.files) {
            ensure_eq!(file.stream_position().map_err(text)?, n, "position");
        }
        for (n, event) in (1..).zip(&self.events) {
            ensure_eq!(count(event)?, n, "count");
        }
        for (n, (reader, writer)) in (0..).zip(&mut self.pipes) {
            writer.write_all(b"x").map_err(text)?;
            let mut got = [0; 4];
            reader.read_exact(&mut got).map_err(text)?;
            ensure_eq!(got, [n, n, n, b'x'], "from a pipe");
        }
        Ok(())
    }
}

fn main() {
    zoo::run(|z| {
        std::fs::write(z.path("text"), [b'.'; 4096]).map_err(text)?;
        let shared = (0..SHARED).map(|_| eventfd(1)).collect::<Result<Vec<_>, _>>()?;
        let child = z.fork(|z| {
            let mut own = Own::new(z)?;
            z.publish("child", "");
            z.wait_for_check();
            own.verify()?;
            z.wait_for("added")?;
            for event in &shared {
                ensure_eq!(count(event)?, 4, "count that is shared");
            }
            Ok(())
        })?;
        let mut own = Own::new(z)?;
        z.wait_for("child")?;
        z.ready()?;
        z.wait_for_check();
        own.verify()?;
        for mut event in &shared {
            event.write_all(&3u64.to_ne_bytes()).map_err(text)?;
        }
        z.publish("added", "");
        z.join(child)
    })
}
