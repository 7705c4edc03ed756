//! Kernel state: open files of /proc about what the process itself has: a descriptor, a thread, a mapping.
#![allow(unsafe_code, reason = "a raw descriptor")]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use zoo::{ensure, ensure_eq};

fn text(file: &mut File) -> Result<String, String> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).map_err(|e| e.to_string())?;
    file.read_to_string(&mut text).map_err(|e| e.to_string())?;
    Ok(text)
}

fn main() {
    zoo::run(|z| {
        let open = |path: &str| File::open(path).map_err(|e| format!("{path}: {e}"));
        // SAFETY: integers.
        let event = unsafe { libc::eventfd(4711, libc::EFD_CLOEXEC) };
        zoo::check(event, "eventfd")?;
        let mut info = open(&format!("/proc/self/fdinfo/{event}"))?;
        let info_again = info.try_clone().map_err(|e| e.to_string())?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name("zoo_other".into())
            .spawn(move || {
                let _ = sender.send(zoo::tid());
                loop {
                    zoo::nap(1000);
                }
            })
            .map_err(|e| e.to_string())?;
        let tid = receiver.recv().map_err(|e| e.to_string())?;
        let mut comm = open(&format!("/proc/self/task/{tid}/comm"))?;
        let mut maps = open("/proc/self/maps")?;
        let directory = open("/proc/self/fdinfo")?;
        let mut half = open(&format!("/proc/self/fdinfo/{event}"))?;
        let mut start = [0; 4];
        half.read_exact(&mut start).map_err(|e| e.to_string())?;
        ensure_eq!(&start, b"pos:", "the beginning");
        z.ready()?;
        z.wait_for_check();
        let info_text = text(&mut info)?;
        // 4711 in hexadecimal.
        ensure!(info_text.contains("eventfd-count:             1267"), "{info_text}");
        // SAFETY: integers.
        let at = unsafe { libc::lseek(info_again.as_raw_fd(), 0, libc::SEEK_CUR) };
        ensure!(at > 0, "the copy has a position of its own");
        ensure_eq!(text(&mut comm)?, "zoo_other\n", "name of the thread");
        ensure!(text(&mut maps)?.contains("[stack]"), "maps");
        let count = std::fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        ensure!(count.map_err(|e| e.to_string())?.count() > 5, "the directory");
        let mut rest = String::new();
        half.read_to_string(&mut rest).map_err(|e| e.to_string())?;
        ensure!(rest.starts_with("\t0\nflags:"), "the rest: {rest:?}");
        Ok(())
    })
}
