//! What tcp(7) has for moving a connection: `TCP_REPAIR` and its options (linux/tcp.h).

use crate::call::Result;
use crate::sockets::{option, option_int, set_option, set_option_int};
use std::os::fd::BorrowedFd;

const TCP: i32 = libc::IPPROTO_TCP;
const TCP_REPAIR: i32 = 19;
/// Level and number of `TCP_REPAIR`, for those who set options by number.
pub const REPAIR_OPTION: (i32, i32) = (TCP, TCP_REPAIR);
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;

const TCPOPT_MSS: u32 = 2;
const TCPOPT_WINDOW: u32 = 3;
const TCPOPT_SACK_PERM: u32 = 4;
const TCPOPT_TIMESTAMP: u32 = 8;

/// `TCPI_OPT_TIMESTAMPS`
pub const TIMESTAMPS: u32 = 1;
/// `TCPI_OPT_SACK`
pub const SACK: u32 = 2;
/// `TCPI_OPT_WSCALE`
pub const WINDOW_SCALE: u32 = 4;

/// The start of `struct tcp_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// `TCP_*`
    pub state: u8,
    /// [`TIMESTAMPS`], [`SACK`], [`WINDOW_SCALE`] and others.
    pub options: u8,
    /// Window scale of the peer.
    pub send_scale: u8,
    /// Window scale of this end.
    pub receive_scale: u8,
    /// Of a listening socket: connections that wait for accept(2).
    pub unacked: u32,
    /// Of a listening socket: its backlog.
    pub sacked: u32,
}

/// Reads `TCP_INFO`.
///
/// # Errors
/// It is no TCP socket.
pub fn info(fd: BorrowedFd<'_>) -> Result<Info> {
    let (i, _) = option::<32>(fd, TCP, libc::TCP_INFO)?;
    let word = |at: usize| u32::from_ne_bytes([i[at], i[at + 1], i[at + 2], i[at + 3]]);
    // Two bit fields of four bits; the first one lies in the low bits on little-endian machines.
    let (low, high) = (i[6] & 0xf, i[6] >> 4);
    let (send_scale, receive_scale) =
        if cfg!(target_endian = "little") { (low, high) } else { (high, low) };
    Ok(Info {
        state: i[0],
        options: i[5],
        send_scale,
        receive_scale,
        unacked: word(24),
        sacked: word(28),
    })
}

/// Repair mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Repair {
    /// On: `SO_REUSEADDR` is forgotten, closing is silent.
    On = 1,
    /// Off; the peer gets a window probe, and both ends learn what the other has. `SO_REUSEADDR` is off afterwards.
    Off = 0,
    /// Off without a packet. `SO_REUSEADDR` is off afterwards.
    OffSilent = -1,
}

/// Switches repair mode.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` over the network namespace, or for a listening socket.
pub fn repair(fd: BorrowedFd<'_>, mode: Repair) -> Result<()> {
    set_option_int(fd, TCP, TCP_REPAIR, mode as i32)
}

/// Whether repair mode is on.
///
/// # Errors
/// It is no TCP socket.
pub fn in_repair(fd: BorrowedFd<'_>) -> Result<bool> {
    option_int(fd, TCP, TCP_REPAIR).map(|on| on == 1)
}

/// A queue of a socket in repair mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Queue {
    /// Neither.
    None = 0,
    /// What was received.
    Receive = 1,
    /// What is to be acknowledged or sent.
    Send = 2,
}

/// Chooses the queue that recv(2), send(2) and [`sequence`] deal with.
///
/// # Errors
/// `EPERM` if the socket is not in repair mode.
pub fn choose_queue(fd: BorrowedFd<'_>, queue: Queue) -> Result<()> {
    set_option_int(fd, TCP, TCP_REPAIR_QUEUE, queue as i32)
}

/// The sequence number after the chosen queue's end.
///
/// # Errors
/// `EINVAL` if no queue is chosen.
pub fn sequence(fd: BorrowedFd<'_>) -> Result<u32> {
    option_int(fd, TCP, TCP_QUEUE_SEQ).map(|s| s as u32)
}

/// Sets it.
///
/// # Errors
/// `EPERM` once the socket is connected.
pub fn set_sequence(fd: BorrowedFd<'_>, sequence: u32) -> Result<()> {
    set_option_int(fd, TCP, TCP_QUEUE_SEQ, sequence as i32)
}

/// `struct tcp_repair_window`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the kernel's names")]
pub struct Window {
    pub snd_wl1: u32,
    pub snd_wnd: u32,
    pub max_window: u32,
    pub rcv_wnd: u32,
    pub rcv_wup: u32,
}

/// Reads the windows.
///
/// # Errors
/// `EPERM` if the socket is not in repair mode.
pub fn window(fd: BorrowedFd<'_>) -> Result<Window> {
    let (bytes, _) = option::<20>(fd, TCP, TCP_REPAIR_WINDOW)?;
    let word = |i: usize| {
        u32::from_ne_bytes([bytes[i * 4], bytes[i * 4 + 1], bytes[i * 4 + 2], bytes[i * 4 + 3]])
    };
    Ok(Window {
        snd_wl1: word(0),
        snd_wnd: word(1),
        max_window: word(2),
        rcv_wnd: word(3),
        rcv_wup: word(4),
    })
}

/// Sets the windows.
///
/// # Errors
/// `EINVAL` if they contradict the sequence numbers.
pub fn set_window(fd: BorrowedFd<'_>, window: Window) -> Result<()> {
    let Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup } = window;
    set_words(fd, TCP_REPAIR_WINDOW, &[snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup])
}

/// The clock of the connection's timestamps.
///
/// # Errors
/// It is no TCP socket.
pub fn timestamp(fd: BorrowedFd<'_>) -> Result<u32> {
    option_int(fd, TCP, TCP_TIMESTAMP).map(|t| t as u32)
}

/// Sets it.
///
/// # Errors
/// `EPERM` if the socket is not in repair mode.
pub fn set_timestamp(fd: BorrowedFd<'_>, timestamp: u32) -> Result<()> {
    set_option_int(fd, TCP, TCP_TIMESTAMP, timestamp as i32)
}

/// What the ends of a connection agreed on at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// The peer's largest segment.
    pub mss: u32,
    /// Window scales of the peer and of this end.
    pub scales: Option<(u32, u32)>,
    /// Selective acknowledgements.
    pub sack: bool,
    /// Timestamps.
    pub timestamps: bool,
}

/// Sets what was agreed on, for a connection just made in repair mode.
///
/// # Errors
/// `EINVAL`, `EFBIG` for impossible values.
pub fn set_agreed(fd: BorrowedFd<'_>, agreed: &Agreed) -> Result<()> {
    let mut words = vec![TCPOPT_MSS, agreed.mss];
    if let Some((peer, own)) = agreed.scales {
        words.extend([TCPOPT_WINDOW, peer & 0xffff | own << 16]);
    }
    if agreed.sack {
        words.extend([TCPOPT_SACK_PERM, 0]);
    }
    if agreed.timestamps {
        words.extend([TCPOPT_TIMESTAMP, 0]);
    }
    set_words(fd, TCP_REPAIR_OPTIONS, &words)
}

fn set_words(fd: BorrowedFd<'_>, name: i32, words: &[u32]) -> Result<()> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    set_option(fd, TCP, name, &bytes)
}
