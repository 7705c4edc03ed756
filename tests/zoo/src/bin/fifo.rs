//! Kernel state: FIFOs: content of one that is open in the root and in a child, one that is open for reading only with
//! its last writer gone, one that is open for both.
#![allow(unsafe_code, reason = "mkfifo and raw open flags")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use zoo::{Zoo, check, cstring, ensure, ensure_eq};

fn make(z: &Zoo, name: &str) -> zoo::Check {
    let path = cstring(z.path(name));
    // SAFETY: NUL-terminated.
    check(unsafe { libc::mkfifo(path.as_ptr(), 0o640) }, "mkfifo")
}

/// Never blocks in open: flags are cleared by whoever wants to wait.
fn open(z: &Zoo, name: &str, read: bool, write: bool) -> Result<File, String> {
    let mut options = File::options();
    options.read(read).write(write).custom_flags(libc::O_NONBLOCK);
    options.open(z.path(name)).map_err(|e| format!("open {name}: {e}"))
}

fn main() {
    zoo::run(|z| {
        for name in ["shared", "left", "both"] {
            make(z, name)?;
        }
        let mut shared = open(z, "shared", true, false)?;
        let mut shared_writer = open(z, "shared", false, true)?;
        let mut left = open(z, "left", true, false)?;
        open(z, "left", false, true)?.write_all(b"left behind").map_err(|e| e.to_string())?;
        let mut both = open(z, "both", true, true)?;
        both.write_all(b"in the fifo").map_err(|e| e.to_string())?;
        shared_writer.write_all(b"from before, ").map_err(|e| e.to_string())?;
        let child = z.fork(|z| {
            z.publish("up", "");
            z.wait_for_check();
            shared_writer.write_all(b"from after").map_err(|e| e.to_string())?;
            z.publish("written", "");
            z.wait_for("end")
        })?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        z.wait_for("written")?;
        let mut text = [0u8; 23];
        shared.read_exact(&mut text).map_err(|e| format!("shared: {e}"))?;
        ensure_eq!(&text, b"from before, from after", "content of the shared one");
        let mut rest = String::new();
        left.read_to_string(&mut rest).map_err(|e| format!("left: {e}"))?;
        ensure_eq!(rest, "left behind", "content up to the end, the last writer being gone");
        let mut text = [0u8; 11];
        both.read_exact(&mut text).map_err(|e| format!("both: {e}"))?;
        ensure_eq!(&text, b"in the fifo", "content of the one open for both");
        let kind = std::fs::metadata(z.path("both")).map_err(|e| e.to_string())?.file_type();
        ensure!(kind.is_fifo(), "the name is something else now");
        z.publish("end", "");
        z.join(child)
    })
}
