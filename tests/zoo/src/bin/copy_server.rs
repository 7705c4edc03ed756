//! Kernel state: a warmed server: much private memory, a listening socket, a deleted file, memory shared with its workers
//! (as many as the environment variable ZOO_WORKERS says). It answers one question a connection, in a line of its pid, how
//! often it was asked, how often its tree was asked, what the deleted file says, and whether its memory is what it was;
//! the question `w` has it write a mebibyte first. Its port is in the file `port`.
#![allow(unsafe_code, reason = "poll, shared anonymous memory")]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use zoo::{Rng, Zoo, ensure, ensure_eq, pid};

const MIB: usize = 1 << 20;

fn err(e: std::io::Error) -> String {
    e.to_string()
}

fn sum(memory: &[u8]) -> u64 {
    memory.chunks_exact(8).fold(0u64, |sum, chunk| {
        let word = chunk.try_into().map_or(0, u64::from_ne_bytes);
        (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(5)
    })
}

struct Server<'a> {
    memory: Vec<u8>,
    sum: u64,
    listener: &'a TcpListener,
    deleted: &'a File,
    tree: &'a AtomicU64,
    asked: u64,
}

impl Server<'_> {
    /// Answers until the harness asks for the check.
    fn run(&mut self, z: &Zoo) -> zoo::Check {
        while !z.checking() {
            let mut poll =
                libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            if unsafe { libc::poll(&mut poll, 1, 10) } <= 0 {
                continue;
            }
            // Another worker may have been faster.
            if let Ok((mut stream, _)) = self.listener.accept() {
                stream.set_nonblocking(false).map_err(err)?;
                let mut question = [0];
                if stream.read_exact(&mut question).is_ok() {
                    let answer = self.answer(question[0])?;
                    let _ = stream.write_all(answer.as_bytes());
                }
            }
        }
        ensure_eq!(sum(&self.memory), self.sum, "sum of the memory");
        Ok(())
    }

    fn answer(&mut self, question: u8) -> Result<String, String> {
        if question == b'w' {
            Rng(self.asked + 99).fill(&mut self.memory[..MIB]);
            self.sum = sum(&self.memory);
        }
        self.asked += 1;
        let tree = self.tree.fetch_add(1, Ordering::SeqCst) + 1;
        let mut file = self.deleted;
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).map_err(err)?;
        file.read_to_string(&mut text).map_err(err)?;
        file.seek(SeekFrom::Start(0)).map_err(err)?;
        write!(file, "{tree}").map_err(err)?;
        let whole = if sum(&self.memory) == self.sum { "whole" } else { "DAMAGED" };
        Ok(format!("{} {} {tree} {text} {whole}\n", pid(), self.asked))
    }
}

fn main() {
    zoo::run(|z| {
        let mut memory = vec![0; z.param("ZOO_MIB", 8) * MIB];
        Rng(7).fill(&mut memory);
        let listener = zoo::net::listener("127.0.0.1")?;
        listener.set_nonblocking(true).map_err(err)?;
        let path = z.path("deleted");
        let mut options = File::options();
        let deleted = options.read(true).write(true).create_new(true).open(&path).map_err(err)?;
        std::fs::remove_file(&path).map_err(err)?;
        write!(&deleted, "0").map_err(err)?;
        // SAFETY: a new mapping.
        let page = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        ensure!(page != libc::MAP_FAILED, "mmap");
        // SAFETY: zeroed memory, mapped until the end.
        let tree: &AtomicU64 = unsafe { &*page.cast() };
        let mut server = Server {
            sum: sum(&memory),
            memory,
            listener: &listener,
            deleted: &deleted,
            tree,
            asked: 0,
        };
        let mut workers = Vec::new();
        for i in 0..z.param("ZOO_WORKERS", 0) {
            server.memory[i * 4096] ^= 1;
            server.sum = sum(&server.memory);
            workers.push(z.fork(|z| server.run(z))?);
        }
        z.publish("port", &listener.local_addr().map_err(err)?.port().to_string());
        z.ready()?;
        server.run(z)?;
        workers.into_iter().try_for_each(|worker| z.join(worker))
    })
}
