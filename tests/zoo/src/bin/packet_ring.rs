//! Kernel state: the rings of packet sockets (PACKET_RX_RING, PACKET_TX_RING), of the version `ZOO_VERSION` (1 to 3). Program
//! and kernel have gone round a part of them, and some packets wait to be read. With `ZOO_QUIET=1` none does. Frames sent on
//! the loopback reach the sockets.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use zoo::net::{poll, recv, set, set_int};
use zoo::{Check, check, ensure, ensure_eq, ok};

/// `ETH_P_802_EX1`, for experiments, and the one after it.
const IN: u16 = 0x88b5;
const OUT: u16 = 0x88b6;
const LO: i32 = 1;
const P: i32 = libc::SOL_PACKET;
const BLOCK: usize = 4096;
const BLOCKS: usize = 4;
const FRAME: usize = 1024;
const FRAMES: usize = BLOCK * BLOCKS / FRAME;
/// Where a frame to be sent has its bytes in each version, its status, its length; a received one where its bytes begin.
const SEND_AT: [usize; 3] = [32, 32, 48];
const STATUS: [usize; 3] = [0, 0, 20];
const LENGTH: [usize; 3] = [8, 4, 16];
const MAC: [usize; 3] = [16, 12, 24];

fn socket() -> Result<OwnedFd, String> {
    // SAFETY: integers; the descriptor is new.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        Ok(OwnedFd::from_raw_fd(ok(fd as i64, "socket(AF_PACKET)")? as i32))
    }
}

fn bind(fd: &OwnedFd, protocol: u16) -> Check {
    // SAFETY: all-zero is a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = LO;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is live for its length.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) }, "bind")
}

fn ethernet(protocol: u16, text: &str) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend(protocol.to_be_bytes());
    frame.extend(text.as_bytes());
    frame
}

/// Sends a frame to ourselves.
fn arrive(sender: &OwnedFd, text: &str) -> Check {
    ensure_eq!(
        zoo::net::send(sender, &ethernet(IN, text), 0),
        14 + text.len() as i64,
        "a frame for the ring"
    );
    Ok(())
}

struct Rings {
    base: *mut u8,
    version: usize,
}

impl Rings {
    fn new(fd: &OwnedFd, version: usize) -> Result<Rings, String> {
        set_int(fd, P, libc::PACKET_VERSION, version as i32 - 1)?;
        let mut words = vec![BLOCK, BLOCKS, FRAME, FRAMES];
        let mut request = |more: &[usize]| {
            words.truncate(4);
            words.extend(more);
            words.iter().flat_map(|w| (*w as u32).to_ne_bytes()).collect::<Vec<u8>>()
        };
        let (receive, send) = match version {
            3 => (request(&[20, 0, 0]), request(&[0, 0, 0])),
            _ => (request(&[]), request(&[])),
        };
        set(fd, P, libc::PACKET_RX_RING, &receive)?;
        set(fd, P, libc::PACKET_TX_RING, &send)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let len = 2 * BLOCK * BLOCKS;
        let at = std::ptr::null_mut();
        // SAFETY: a new mapping.
        let base = unsafe { libc::mmap(at, len, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        ensure!(base != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(Rings { base: base.cast(), version: version - 1 })
    }

    fn word(&self, at: usize) -> u32 {
        // SAFETY: inside the mapping and aligned.
        unsafe { self.base.add(at).cast::<u32>().read_volatile() }
    }

    fn set_word(&self, at: usize, value: u32) {
        // SAFETY: as above.
        unsafe { self.base.add(at).cast::<u32>().write_volatile(value) };
    }

    fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        // SAFETY: inside the mapping; nobody writes to what is ours.
        unsafe { std::slice::from_raw_parts(self.base.add(at), len) }.to_vec()
    }

    fn wait(&self, at: usize, what: &str, done: impl Fn(u32) -> bool) -> Check {
        let begun = Instant::now();
        while !done(self.word(at)) {
            ensure!(
                begun.elapsed() < Duration::from_secs(10),
                "{what}: status {:#x}",
                self.word(at)
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The text of the packet in frame `i`, which is given back to the kernel.
    fn take_frame(&self, i: usize) -> Result<String, String> {
        let at = i % FRAMES * FRAME;
        self.wait(at, &format!("frame {i}"), |status| status & 1 != 0)?;
        let length = self.word(at + LENGTH[self.version]) as usize;
        let begin = self.word(at + MAC[self.version]) as usize & 0xffff;
        let text = String::from_utf8_lossy(&self.bytes(at + begin + 14, length - 14)).into_owned();
        self.set_word(at, 0);
        Ok(text)
    }

    /// The texts of the packets in block `i`, which is given back to the kernel, and its number.
    fn take_block(&self, i: usize) -> Result<(Vec<String>, u32), String> {
        let block = i % BLOCKS * BLOCK;
        self.wait(block + 8, &format!("block {i}"), |status| status & 1 != 0)?;
        let mut at = block + self.word(block + 16) as usize;
        let mut texts = Vec::new();
        for _ in 0..self.word(block + 12) {
            let (length, begin) =
                (self.word(at + 12) as usize, self.word(at + 24) as usize & 0xffff);
            let text = self.bytes(at + begin + 14, length - 14);
            texts.push(String::from_utf8_lossy(&text).into_owned());
            at += self.word(at) as usize;
        }
        let number = self.word(block + 24);
        self.set_word(block + 8, 0);
        Ok((texts, number))
    }

    /// Sends by frame `i` of the send ring.
    fn send(&self, fd: &OwnedFd, i: usize, text: &str) -> Check {
        let at = BLOCK * BLOCKS + i % FRAMES * FRAME;
        let frame = ethernet(OUT, text);
        let status = at + STATUS[self.version];
        self.wait(status, &format!("send frame {i}"), |status| status & 7 == 0)?;
        for (n, byte) in frame.iter().enumerate() {
            // SAFETY: inside the mapping.
            unsafe { self.base.add(at + SEND_AT[self.version] + n).write_volatile(*byte) };
        }
        self.set_word(at + LENGTH[self.version], frame.len() as u32);
        self.set_word(status, 1);
        // SAFETY: integers and nothing to be read.
        let sent = unsafe { libc::send(fd.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT) };
        ok(sent as i64, "send")?;
        self.wait(status, &format!("send frame {i}"), |status| status & 7 == 0)
    }
}

fn sent(listener: &OwnedFd, text: &str) -> Check {
    ensure!(poll(listener, 10_000)? & libc::POLLIN != 0, "{text:?} is not sent");
    let mut data = [0; 200];
    let got = recv(listener, &mut data, 0);
    ensure!(got >= 14, "recv: {got}");
    ensure_eq!(String::from_utf8_lossy(&data[14..got as usize]), text, "what was sent");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let version = z.param("ZOO_VERSION", 2);
        let quiet = z.param("ZOO_QUIET", 0) == 1;
        let fd = socket()?;
        if z.param("ZOO_LOSS", 0) == 1 {
            set_int(&fd, P, libc::PACKET_LOSS, 1)?;
        }
        let rings = Rings::new(&fd, version)?;
        bind(&fd, IN)?;
        let listener = socket()?;
        bind(&listener, OUT)?;
        let sender = socket()?;
        // Of a protocol that nobody sends, so that it hears nothing.
        bind(&sender, 0x88b7)?;

        // Round more than once: where the kernel is has nothing to do with how much there was.
        let mut next = 0;
        let mut number = 0;
        let rounds = if version == 3 { BLOCKS + 2 } else { FRAMES + 5 };
        for i in 0..rounds {
            arrive(&sender, &format!("packet {i}"))?;
            let text = match version {
                3 => {
                    let (texts, seen) = rings.take_block(i)?;
                    number = seen;
                    texts.join(" ")
                }
                _ => rings.take_frame(i)?,
            };
            ensure_eq!(text, format!("packet {i}"), "a packet");
            next = i + 1;
        }
        if !quiet {
            for text in ["waits", "waits too"] {
                arrive(&sender, text)?;
            }
            if version == 3 {
                let block = next % BLOCKS * BLOCK;
                rings.wait(block + 8, "the block that waits", |status| status & 1 != 0)?;
            }
        }
        for i in 0..FRAMES + 3 {
            rings.send(&fd, i, &format!("sent {i}"))?;
            sent(&listener, &format!("sent {i}"))?;
        }
        z.ready()?;
        z.wait_for_check();

        if !quiet && version == 3 {
            let (texts, seen) = rings.take_block(next)?;
            ensure_eq!(texts, ["waits", "waits too"], "the packets that wait");
            ensure_eq!(seen, number + 1, "the number of their block");
            next += 1;
        } else if !quiet {
            ensure!(poll(&fd, 0)? & libc::POLLIN != 0, "poll tells of no packets");
            ensure_eq!(rings.take_frame(next)?, "waits", "a packet that waits");
            ensure_eq!(rings.take_frame(next + 1)?, "waits too", "a packet that waits");
            next += 2;
        }
        for i in 0..2 * BLOCKS {
            arrive(&sender, &format!("later {i}"))?;
            let text = match version {
                3 => rings.take_block(next)?.0.join(" "),
                _ => rings.take_frame(next)?,
            };
            ensure_eq!(text, format!("later {i}"), "a later packet");
            next += 1;
        }
        for i in FRAMES + 3..2 * FRAMES {
            rings.send(&fd, i, &format!("sent {i}"))?;
            sent(&listener, &format!("sent {i}"))?;
        }
        Ok(())
    })
}
