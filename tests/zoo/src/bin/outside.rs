//! Kernel state: what belongs to the outside. Pipes whose other ends nobody in the tree has, a file, a memfd, a bound socket
//! and a terminal, all of which a restore puts others in the place of (`--inherit-fd`). Used by a trial of its own, which
//! names them: ZOO_IN, ZOO_OUT, ZOO_FILE, ZOO_LOG, ZOO_TTY.
#![allow(unsafe_code, reason = "raw descriptors")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use zoo::{ensure, ensure_eq};

fn flags(fd: RawFd) -> i32 {
    // SAFETY: no memory is passed.
    unsafe { libc::fcntl(fd, libc::F_GETFL) }
}

fn settings(fd: RawFd) -> Result<libc::termios, String> {
    // SAFETY: plain numbers, which the call fills.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `termios` outlives the call.
    zoo::check(unsafe { libc::tcgetattr(fd, &mut termios) }, "tcgetattr")?;
    Ok(termios)
}

fn main() {
    zoo::run(|z| {
        let name = |key: &str| std::env::var(key).ok();
        let (Some(reads), Some(writes), Some(file), Some(log), Some(tty)) =
            (name("ZOO_IN"), name("ZOO_OUT"), name("ZOO_FILE"), name("ZOO_LOG"), name("ZOO_TTY"))
        else {
            z.skip("it needs things of the outside");
        };
        let text = |e: std::io::Error| e.to_string();
        let mut reads = File::open(reads).map_err(text)?;
        let mut open = OpenOptions::new();
        let open = open.write(true).custom_flags(libc::O_NONBLOCK);
        let mut writes = open.open(writes).map_err(text)?;
        let again = writes.try_clone().map_err(text)?;
        let mut file = OpenOptions::new().read(true).write(true).open(file).map_err(text)?;
        file.seek(SeekFrom::Start(7)).map_err(text)?;
        let mut log = OpenOptions::new().append(true).open(log).map_err(text)?;
        // SAFETY: the name lives on; the descriptor is nobody else's.
        let memory = unsafe {
            let fd = libc::memfd_create(c"zoo_outside".as_ptr(), 0);
            zoo::check(fd, "memfd_create")?;
            File::from_raw_fd(fd)
        };
        memory.write_all_at(b"mine", 0).map_err(text)?;
        let socket = UdpSocket::bind("127.0.0.1:0").map_err(text)?;
        let mut open = OpenOptions::new();
        let open = open.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let mut tty = open.open(tty).map_err(text)?;
        let mut termios = settings(tty.as_raw_fd())?;
        termios.c_lflag &= !(libc::ECHO | libc::ICANON);
        // SAFETY: `termios` outlives the call.
        zoo::check(
            unsafe { libc::tcsetattr(tty.as_raw_fd(), libc::TCSANOW, &termios) },
            "tcsetattr",
        )?;
        writes.write_all(b"before\n").map_err(text)?;
        let all = [
            ("in", reads.as_raw_fd()),
            ("out", writes.as_raw_fd()),
            ("file", file.as_raw_fd()),
            ("socket", socket.as_raw_fd()),
        ];
        for (name, fd) in all {
            z.publish(name, &fd.to_string());
        }
        z.ready()?;
        z.wait_for_check();

        writes.write_all(b"after\n").map_err(text)?;
        ensure!(flags(writes.as_raw_fd()) & libc::O_NONBLOCK != 0, "the end blocks");
        ensure!(flags(reads.as_raw_fd()) & libc::O_NONBLOCK == 0, "the end does not block");
        // Still one description.
        let plain = flags(writes.as_raw_fd()) & !libc::O_NONBLOCK;
        // SAFETY: no memory is passed.
        zoo::check(unsafe { libc::fcntl(writes.as_raw_fd(), libc::F_SETFL, plain) }, "F_SETFL")?;
        ensure!(flags(again.as_raw_fd()) & libc::O_NONBLOCK == 0, "the copy has flags of its own");
        let mut got = [0; 6];
        reads.read_exact(&mut got).map_err(text)?;
        ensure_eq!(&got, b"given\n", "from the pipe");
        let mut rest = String::new();
        file.read_to_string(&mut rest).map_err(text)?;
        // Its position is that of the descriptor that was given.
        ensure_eq!(rest, "file given", "from the file");
        log.write_all(b"more\n").map_err(text)?;
        ensure!(flags(log.as_raw_fd()) & libc::O_APPEND != 0, "the log is not appended to");
        let mut got = [0; 6];
        memory.read_exact_at(&mut got, 0).map_err(text)?;
        ensure_eq!(&got, b"theirs", "from memory");
        let address = socket.local_addr().map_err(text)?;
        z.publish("address", &address.to_string());
        let termios = settings(tty.as_raw_fd())?;
        ensure_eq!(termios.c_lflag & (libc::ECHO | libc::ICANON), 0, "settings of the terminal");
        tty.write_all(b"hello\n").map_err(text)?;
        Ok(())
    })
}
