//! Rings of packet sockets (`PACKET_RX_RING`, `PACKET_TX_RING`): memory that a program and the kernel share, in which each of
//! them goes round by itself. What is in it can be read and written; where the kernel is it does not tell.
//!
//! # How it is found out
//! The kernel says that something can be read (poll(2)) if the frame before the one that it will fill is the program's; blocks
//! (`TPACKET_V3`) are numbered. Of a send ring it is the frame that it looks at when it is told to send: one that cannot be
//! sent, since it is too long, gets a mark.
//!
//! # How it is brought there
//! By frames of a protocol for experiments, on the loopback, which nobody gets but who listens to everything there. Then the
//! memory gets its contents.

use super::interface_index;
use super::options::Making;
use crate::Problem;
use rewake_image::messages::{PacketRing, RewakePacketPieceEntry, RewakePacketRingsEntry};
use rewake_sys::io_uring::Memory;
use rewake_sys::message;
use rewake_sys::sockets::{bind_to, option, set_option};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::time::{Duration, Instant};

const LEVEL: i32 = libc::SOL_PACKET;
const PACKET_STATISTICS: i32 = 6;
/// `TPACKET_V1`, `TPACKET_V3`
const V1: u32 = 0;
const V3: u32 = 2;
/// `TP_STATUS_KERNEL`, `TP_STATUS_AVAILABLE`: the other side may use it.
const FREE: u32 = 0;
/// `TP_STATUS_USER`
const USER: u32 = 1;
/// `TP_STATUS_SEND_REQUEST`, `TP_STATUS_SENDING`, `TP_STATUS_WRONG_FORMAT`
const SEND: u32 = 1;
const SENDING: u32 = 2;
const WRONG: u32 = 4;
/// Those of a frame to be sent, without what tells of time stamps.
const SEND_STATES: u32 = SEND | SENDING | WRONG;
/// `ETH_P_802_EX1`, for experiments.
const PROTOCOL: u16 = 0x88b5;
/// A frame of it, without anything in it.
const SHORT: usize = 60;
/// The longest frame on the loopback.
const LONG: usize = 60_000;
const PIECE: usize = 4096;
/// More than anybody has.
const LARGEST: u64 = 1 << 30;
const PATIENCE: Duration = Duration::from_secs(2);
/// `struct tpacket_block_desc`: status, number of packets, where the first is, length, number of the block.
const BLOCK_STATUS: usize = 8;
const BLOCK_PACKETS: usize = 12;
const BLOCK_FIRST: usize = 16;
const BLOCK_NUMBER: usize = 24;
const BLOCK_HEADER: usize = 48;

/// One ring, and where it lies in the memory of both.
#[derive(Debug, Clone, Copy)]
struct Ring<'a> {
    memory: &'a Memory,
    at: usize,
    version: u32,
    shape: Shape,
    sends: bool,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    block_size: usize,
    blocks: usize,
    frame_size: usize,
    frames: usize,
}

impl Shape {
    fn of(ring: &PacketRing) -> Option<Shape> {
        let shape = Shape {
            block_size: ring.block_size as usize,
            blocks: ring.block_nr as usize,
            frame_size: ring.frame_size as usize,
            frames: ring.frame_nr as usize,
        };
        let sound = ring.block_size >= ring.frame_size
            && ring.frame_size >= BLOCK_HEADER as u32
            && ring.frame_size.is_multiple_of(16)
            && u64::from(ring.block_size) * u64::from(ring.block_nr) <= LARGEST
            && shape.frames == shape.blocks * (shape.block_size / shape.frame_size)
            && shape.frames > 0;
        sound.then_some(shape)
    }

    fn bytes(self) -> usize {
        self.block_size * self.blocks
    }
}

impl Ring<'_> {
    fn frame(&self, i: usize) -> usize {
        let each = self.shape.block_size / self.shape.frame_size;
        self.at + i / each * self.shape.block_size + i % each * self.shape.frame_size
    }

    fn block(&self, i: usize) -> usize {
        self.at + i * self.shape.block_size
    }

    /// Where a frame has its status and its length.
    fn fields(&self) -> (usize, usize) {
        match self.version {
            V1 => (0, 8),
            V3 => (20, 16),
            _ => (0, 4),
        }
    }

    /// Where a frame has its bytes, if it is to be sent: behind its header.
    fn header(&self) -> usize {
        if self.version == V3 { 48 } else { 32 }
    }

    fn status(&self, i: usize) -> u32 {
        self.memory.word(self.frame(i) + self.fields().0)
    }

    fn set_status(&self, i: usize, status: u32) {
        self.memory.set_word(self.frame(i) + self.fields().0, status);
    }

    /// When a frame was filled; two versions have it at different places and in different units, which does not matter.
    fn time(&self, i: usize) -> (u32, u32) {
        let at = self.frame(i) + if self.version == V1 { 20 } else { 16 };
        (self.memory.word(at), self.memory.word(at + 4))
    }

    fn has_blocks(&self) -> bool {
        self.version == V3 && !self.sends
    }

    fn statuses(&self) -> Vec<u32> {
        (0..self.shape.frames).map(|i| self.status(i)).collect()
    }

    fn number(&self, block: usize) -> u64 {
        let at = self.block(block) + BLOCK_NUMBER;
        u64::from(self.memory.word(at)) | u64::from(self.memory.word(at + 4)) << 32
    }

    /// The block that is being filled: the last one that was begun, or the one after it if that is full already.
    fn active_block(&self) -> usize {
        let last = (0..self.shape.blocks).max_by_key(|i| self.number(*i)).unwrap_or(0);
        let full = self.memory.word(self.block(last) + BLOCK_STATUS) != FREE;
        if full { (last + 1) % self.shape.blocks } else { last }
    }

    /// Which frame the kernel fills next.
    fn receives_at(&self, fd: BorrowedFd<'_>) -> usize {
        if self.has_blocks() {
            return self.active_block();
        }
        let n = self.shape.frames;
        let statuses = self.statuses();
        let before = |i: usize| (i + n - 1) % n;
        let begins = |i: &usize| statuses[*i] == FREE && statuses[before(*i)] != FREE;
        if statuses.iter().all(|status| *status != FREE) {
            return (0..n).min_by_key(|i| self.time(*i)).unwrap_or(0);
        }
        if let Some(at) = (0..n).filter(begins).max_by_key(|i| self.time(before(*i))) {
            return at;
        }
        let newest = (0..n).max_by_key(|i| self.time(*i)).unwrap_or(0);
        let likely = if self.time(newest) == (0, 0) { 0 } else { (newest + 1) % n };
        if readable(fd) {
            // Something that went past the ring: nothing can be learnt.
            return likely;
        }
        let is_among = |from: usize, to: usize| {
            let set = |status| (from..to).for_each(|i| self.set_status(before(i), status));
            set(USER);
            let found = readable(fd);
            set(FREE);
            found
        };
        if is_among(likely, likely + 1) {
            return likely;
        }
        let (mut from, mut to) = (0, n);
        while to - from > 1 {
            let middle = usize::midpoint(from, to);
            if is_among(from, middle) { to = middle } else { from = middle }
        }
        from
    }

    /// Which frame the kernel sends next; `loss`: it passes over those that it cannot send (`PACKET_LOSS`).
    fn sends_at(&self, making: Making<'_>, loss: bool) -> Result<usize, Problem> {
        let n = self.shape.frames;
        let begun = Instant::now();
        while self.statuses().contains(&SENDING) && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        let statuses: Vec<u32> = self.statuses().iter().map(|s| s & SEND_STATES).collect();
        let before = |i: usize| (i + n - 1) % n;
        if let Some(at) = (0..n).find(|i| statuses[*i] == WRONG) {
            return Ok(at);
        }
        if let Some(at) = (0..n).find(|i| statuses[*i] == SEND && statuses[before(*i)] != SEND) {
            return Ok(at);
        }
        if statuses.iter().all(|s| *s == SEND) {
            return Err(making
                .problem("its whole send ring is to be sent: where the kernel is cannot be told")
                .remedy("try again once it is sent"));
        }
        // A frame that is too long to be sent, in the place of each of `some`; what the kernel made of them.
        let attempt = |some: &mut dyn Iterator<Item = usize>| {
            let (status, length) = self.fields();
            let some: Vec<usize> = some.collect();
            let words: Vec<[u32; 2]> = some
                .iter()
                .map(|i| [status, length].map(|field| self.memory.word(self.frame(*i) + field)))
                .collect();
            for i in &some {
                self.memory.set_word(self.frame(*i) + length, u32::MAX >> 1);
                self.set_status(*i, SEND);
            }
            let sent = on_loopback(making.fd, PROTOCOL).map(|to| transmit(making.fd, &[], &to));
            let changed: Vec<usize> =
                some.iter().copied().filter(|i| self.status(*i) != SEND).collect();
            for (i, words) in some.iter().zip(words) {
                self.memory.set_word(self.frame(*i) + length, words[1]);
                self.set_status(*i, words[0]);
            }
            log::debug!("{}: frames that cannot be sent: {sent:?}, {changed:?}", making.object);
            changed
        };
        if !loss {
            return match attempt(&mut (0..n)).first() {
                Some(at) => Ok(*at),
                None if self.is_untouched() => Ok(0),
                None => Err(making
                    .problem("where the kernel is in its send ring (PACKET_TX_RING) cannot be told: it does not send on the loopback")
                    .remedy("bring the loopback interface up")),
            };
        }
        // It goes round as far as it is let: up to the last frame, and from there back to where it was.
        let Some(at) = attempt(&mut (0..n - 1)).first().copied() else { return Ok(n - 1) };
        if n > 1 {
            attempt(&mut std::iter::once(n - 1).chain(0..at));
        }
        Ok(at)
    }

    fn is_untouched(&self) -> bool {
        self.memory.bytes(self.at, self.shape.bytes()).iter().all(|byte| *byte == 0)
    }
}

/// A `struct sockaddr_ll` of the loopback.
fn on_loopback(fd: BorrowedFd<'_>, protocol: u16) -> Result<[u8; 20], String> {
    let mut address = [0; 20];
    address[..2].copy_from_slice(&(libc::AF_PACKET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&protocol.to_be_bytes());
    address[4..8].copy_from_slice(&interface_index(fd, b"lo")?.to_ne_bytes());
    address[11] = 6;
    Ok(address)
}

/// Sends, or has the kernel look at the send ring.
fn transmit(fd: BorrowedFd<'_>, data: &[u8], to: &[u8]) -> Result<usize, String> {
    message::send(fd, data, &[], None, to, 0, None).map_err(|e| e.to_string())
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut wanted = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut wanted, Some(&at_once)).is_ok() && wanted[0].revents().contains(PollFlags::IN)
}

/// The rings of a socket in its memory: that of received packets comes first.
fn rings<'m>(
    memory: &'m Memory,
    version: u32,
    receive: Option<&PacketRing>,
    send: Option<&PacketRing>,
) -> Option<[Option<Ring<'m>>; 2]> {
    let shapes = [receive, send].map(|ring| ring.map(Shape::of));
    let first = match shapes[0] {
        Some(shape) => shape?.bytes(),
        None => 0,
    };
    let ring = |shape: Option<Option<Shape>>, at, sends| match shape {
        Some(shape) => Some(Some(Ring { memory, at, version, shape: shape?, sends })),
        None => Some(None),
    };
    Some([ring(shapes[0], 0, false)?, ring(shapes[1], first, true)?])
}

fn bytes(rings: [Option<&PacketRing>; 2]) -> Option<usize> {
    let each = rings.into_iter().flatten().map(Shape::of);
    each.map(|shape| shape.map(Shape::bytes)).sum()
}

fn map(making: Making<'_>, rings: [Option<&PacketRing>; 2]) -> Result<Memory, Problem> {
    let len = bytes(rings).ok_or_else(|| making.problem("its rings have an impossible shape"))?;
    let memory = Memory::map(making.fd, len, 0)
        .map_err(|e| making.problem(format!("its rings cannot be mapped: {e}")))?;
    if memory.len() != len {
        return Err(making.problem("its rings are not as long as they should be"));
    }
    Ok(memory)
}

/// What is in the rings of a socket, and where the kernel is in them.
///
/// # Errors
/// The latter cannot be told.
pub(super) fn survey(
    making: Making<'_>,
    version: u32,
    loss: bool,
    [receive, send]: [Option<&PacketRing>; 2],
) -> Result<RewakePacketRingsEntry, Problem> {
    let memory = map(making, [receive, send])?;
    let [receiving, sending] = rings(&memory, version, receive, send)
        .ok_or_else(|| making.problem("its rings have an impossible shape"))?;
    let mut entry = RewakePacketRingsEntry::default();
    if let Some(ring) = receiving {
        let at = ring.receives_at(making.fd);
        entry.receive_at = Some(at as u32);
        if ring.has_blocks() {
            let waiting = memory.word(ring.block(at) + BLOCK_PACKETS);
            if waiting > 0 {
                log::warn!(
                    "{}: {waiting} packets in the block that is being filled are not saved",
                    making.object
                );
            }
        }
    }
    if let Some(ring) = sending {
        entry.send_at = Some(ring.sends_at(making, loss)? as u32);
    }
    for at in (0..memory.len()).step_by(PIECE) {
        let data = memory.bytes(at, PIECE);
        if data.iter().any(|byte| *byte != 0) {
            entry.pieces.push(RewakePacketPieceEntry { at: at as u64, data });
        }
    }
    Ok(entry)
}

/// Gives a socket its rings; it is not bound yet, and has no filter. `saved` is absent in CRIU's images, which say nothing of
/// what is in the rings.
///
/// # Errors
/// The kernel refuses them, or cannot be brought to where it was.
pub(super) fn restore(
    making: Making<'_>,
    version: u32,
    virtio: usize,
    [receive, send]: [Option<&PacketRing>; 2],
    saved: Option<&RewakePacketRingsEntry>,
) -> Result<(), Problem> {
    for (ring, name, what) in [
        (receive, libc::PACKET_RX_RING, "PACKET_RX_RING"),
        (send, libc::PACKET_TX_RING, "PACKET_TX_RING"),
    ] {
        let Some(ring) = ring else { continue };
        // struct tpacket_req, and what is more in struct tpacket_req3.
        let mut words = vec![ring.block_size, ring.block_nr, ring.frame_size, ring.frame_nr];
        if version == V3 {
            words.extend([ring.retire_tmo, ring.sizeof_priv, ring.features]);
        }
        let request: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        set_option(making.fd, LEVEL, name, &request)
            .map_err(|e| making.problem(format!("{what}: {e}")))?;
    }
    let Some(saved) = saved else { return Ok(()) };
    let memory = map(making, [receive, send])?;
    let [receiving, sending] = rings(&memory, version, receive, send)
        .ok_or_else(|| making.problem("the image has rings of an impossible shape"))?;
    let failed = |why: String| {
        making
            .problem(format!("the kernel cannot be brought to where it was in its rings: {why}"))
            .remedy("bring the loopback interface up")
    };
    if let (Some(ring), Some(at)) = (sending, saved.send_at.filter(|at| *at > 0)) {
        advance_sending(making, &ring, virtio, at as usize).map_err(failed)?;
    }
    let mut begun = None;
    if let (Some(ring), Some(at)) = (receiving, saved.receive_at) {
        if at > 0 {
            advance_receiving(making, &ring, at as usize).map_err(failed)?;
            // They count in the statistics, which a look sets back.
            let _ = option::<12>(making.fd, LEVEL, PACKET_STATISTICS);
        }
        // The kernel's own notes on the block it fills stay.
        begun = ring.has_blocks().then(|| ring.block(ring.active_block()));
    }
    let header = BLOCK_HEADER + receive.map_or(0, |ring| ring.sizeof_priv as usize);
    let kept = begun.map(|at| (at, memory.bytes(at, header)));
    let zeros = [0; PIECE];
    (0..memory.len()).step_by(PIECE).for_each(|at| memory.write(at, &zeros));
    for piece in &saved.pieces {
        let at = usize::try_from(piece.at).unwrap_or(usize::MAX);
        if at >= memory.len() || piece.data.len() > memory.len() - at {
            return Err(making.problem("the image has more in its rings than goes into them"));
        }
        memory.write(at, &piece.data);
    }
    if let Some((at, header)) = kept {
        memory.write(at, &header);
    }
    Ok(())
}

/// Has the kernel send `count` frames of the send ring on the loopback.
fn advance_sending(
    making: Making<'_>,
    ring: &Ring<'_>,
    virtio: usize,
    count: usize,
) -> Result<(), String> {
    let count = count % ring.shape.frames;
    let (_, length) = ring.fields();
    let to = on_loopback(making.fd, PROTOCOL)?;
    let bytes = SHORT + virtio;
    if ring.header() + bytes > ring.shape.frame_size {
        return Err("its frames are too short".to_owned());
    }
    for i in 0..count {
        let at = ring.frame(i);
        // Where the bytes begin, if the socket wants to be told (PACKET_TX_HAS_OFF).
        let offsets = if ring.version == V1 {
            16
        } else if ring.version == V3 {
            24
        } else {
            12
        };
        let begin = ring.header() as u16;
        ring.memory.write(at + offsets, &[begin.to_ne_bytes(), begin.to_ne_bytes()].concat());
        ring.memory.write(at + ring.header() + virtio + 12, &PROTOCOL.to_be_bytes());
        ring.memory.set_word(at + length, bytes as u32);
        ring.set_status(i, SEND);
    }
    let begun = Instant::now();
    let mut last = Ok(0);
    while (0..count).any(|i| ring.status(i) & SEND_STATES != FREE) {
        if begun.elapsed() > PATIENCE {
            return Err(last.err().unwrap_or_else(|| "its frames are not sent".to_owned()));
        }
        last = transmit(making.fd, &[], &to);
        if last.is_err() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    Ok(())
}

/// Has the socket receive from the loopback until the kernel is at frame (or block) `at`.
fn advance_receiving(making: Making<'_>, ring: &Ring<'_>, at: usize) -> Result<(), String> {
    let to = on_loopback(making.fd, PROTOCOL)?;
    bind_to(making.fd, &to).map_err(|e| e.to_string())?;
    let result = match ring.has_blocks() {
        true => advance_blocks(ring, at % ring.shape.blocks, &to),
        false => advance_frames(ring, at % ring.shape.frames, &to),
    };
    // Of no protocol again, nothing more is received.
    let mut nowhere = [0; 20];
    nowhere[..2].copy_from_slice(&to[..2]);
    let unbound = bind_to(making.fd, &nowhere).map_err(|e| e.to_string());
    result.and(unbound)
}

/// A socket that sends.
fn sender() -> Result<OwnedFd, String> {
    let (family, flags) = (AddressFamily::PACKET, SocketFlags::CLOEXEC);
    rustix::net::socket_with(family, SocketType::RAW, flags, None).map_err(|e| e.to_string())
}

fn experiment(length: usize) -> Vec<u8> {
    let mut frame = vec![0; length];
    frame[12..14].copy_from_slice(&PROTOCOL.to_be_bytes());
    frame
}

fn wait_until(done: impl Fn() -> bool) -> Result<(), String> {
    let begun = Instant::now();
    while !done() {
        if begun.elapsed() > PATIENCE {
            return Err("nothing arrives on the loopback".to_owned());
        }
        std::thread::yield_now();
    }
    Ok(())
}

fn advance_frames(ring: &Ring<'_>, count: usize, to: &[u8]) -> Result<(), String> {
    let (sender, frame) = (sender()?, experiment(SHORT));
    for i in 0..count {
        transmit(sender.as_fd(), &frame, to)?;
        wait_until(|| ring.status(i) != FREE)?;
    }
    Ok(())
}

fn advance_blocks(ring: &Ring<'_>, block: usize, to: &[u8]) -> Result<(), String> {
    let frame = experiment((ring.shape.block_size / 2).clamp(SHORT, LONG));
    let sender = sender()?;
    let packets = |block: usize| ring.memory.word(ring.block(block) + BLOCK_PACKETS);
    while ring.active_block() != block {
        let active = ring.active_block();
        let before = packets(active);
        transmit(sender.as_fd(), &frame, to)?;
        wait_until(|| ring.active_block() != active || packets(active) != before)?;
    }
    // The frame that did not go into the block before is in this one: it is passed over.
    let at = ring.block(block);
    if packets(block) > 0 {
        let first = ring.memory.word(at + BLOCK_FIRST);
        let length = ring.memory.word(at + first as usize);
        let next = if length == 0 { used(ring, at, first as usize) } else { length };
        ring.memory.set_word(at + BLOCK_FIRST, first + next);
        ring.memory.set_word(at + BLOCK_PACKETS, 0);
    }
    Ok(())
}

/// How much the only packet of a block takes: `tp_mac` and `tp_snaplen` tell.
fn used(ring: &Ring<'_>, block: usize, packet: usize) -> u32 {
    let word = |at: usize| ring.memory.word(block + packet + at);
    let (captured, offsets) = (word(12), word(24));
    ((offsets & 0xffff) + captured).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_shapes_are_refused() {
        let ring = |block_size, block_nr, frame_size, frame_nr| PacketRing {
            block_size,
            block_nr,
            frame_size,
            frame_nr,
            ..PacketRing::default()
        };
        assert!(Shape::of(&ring(4096, 2, 1024, 8)).is_some());
        for bad in [
            ring(4096, 2, 1024, 7),
            ring(0, 2, 0, 0),
            ring(1024, 2, 4096, 0),
            ring(4096, u32::MAX, 1024, 4),
            ring(4096, 1, 1, 4096),
        ] {
            assert!(Shape::of(&bad).is_none(), "{bad:?}");
        }
    }
}
