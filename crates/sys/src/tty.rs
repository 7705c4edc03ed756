//! Terminals: ioctl_tty(2), with the kernel's own `struct termios` (no C library's view of it).

use crate::Errno;
use crate::call::{Result, syscall};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct termios2` of the kernel (asm-generic/termbits.h), which begins as its `struct termios`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the kernel's field names")]
pub struct Termios {
    pub c_iflag: u32,
    pub c_oflag: u32,
    pub c_cflag: u32,
    pub c_lflag: u32,
    pub c_line: u8,
    pub c_cc: [u8; 19],
    pub c_ispeed: u32,
    pub c_ospeed: u32,
}

impl Termios {
    /// Is a speed told by its number (`BOTHER`), and not by a constant in `c_cflag`?
    #[must_use]
    pub fn has_numbers(&self) -> bool {
        const BOTHER: u32 = 0x1000;
        const CBAUD: u32 = 0x100f;
        const INPUT: u32 = 16;
        self.c_cflag & CBAUD == BOTHER || self.c_cflag >> INPUT & CBAUD == BOTHER
    }
}

/// `TCGETS2` and `TCSETS2`
const GET_WITH_NUMBERS: u64 = 0x802c_542a;
const SET_WITH_NUMBERS: u64 = 0x402c_542b;

/// `struct winsize`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the kernel's field names")]
pub struct WinSize {
    pub ws_row: u16,
    pub ws_col: u16,
    pub ws_xpixel: u16,
    pub ws_ypixel: u16,
}

/// Which settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settings {
    /// `TCGETS2`, `TCSETS` or `TCSETS2`: the current ones.
    Current,
    /// `TIOCGLCKTRMIOS`, `TIOCSLCKTRMIOS`: a bit set here locks that of the current ones.
    Locked,
}

fn ioctl(name: &'static str, fd: BorrowedFd<'_>, request: u64, arg: usize) -> Result<usize> {
    // SAFETY: used below only with pointers to live structs of the request's type, or numbers.
    unsafe {
        syscall(name, libc::SYS_ioctl, [fd.as_raw_fd() as usize, request as usize, arg, 0, 0, 0])
    }
}

/// Reads settings; speeds only if they are told by their numbers.
///
/// # Errors
/// `ENOTTY`; `EIO` if the terminal is hung up.
pub fn settings(fd: BorrowedFd<'_>, which: Settings) -> Result<Termios> {
    let mut termios = Termios::default();
    let (name, request) = match which {
        Settings::Current => ("ioctl(TCGETS2)", GET_WITH_NUMBERS),
        Settings::Locked => ("ioctl(TIOCGLCKTRMIOS)", libc::TIOCGLCKTRMIOS),
    };
    ioctl(name, fd, request, (&raw mut termios) as usize)?;
    if !termios.has_numbers() {
        (termios.c_ispeed, termios.c_ospeed) = (0, 0);
    }
    Ok(termios)
}

/// Changes settings at once. A process in the background may do so too (SIGTTOU is held back).
///
/// # Errors
/// `ENOTTY`; `EIO` if the terminal is hung up; `EPERM` for the locked ones without `CAP_SYS_ADMIN`.
pub fn set_settings(fd: BorrowedFd<'_>, which: Settings, termios: &Termios) -> Result<()> {
    let (name, request) = match which {
        // Images of others say that there are numbers, and have none.
        Settings::Current if termios.has_numbers() && termios.c_ospeed != 0 => {
            ("ioctl(TCSETS2)", SET_WITH_NUMBERS)
        }
        Settings::Current => ("ioctl(TCSETS)", libc::TCSETS),
        Settings::Locked => ("ioctl(TIOCSLCKTRMIOS)", libc::TIOCSLCKTRMIOS),
    };
    without_ttou(|| ioctl(name, fd, request, (&raw const *termios) as usize).map(drop))
}

/// Reads the window size.
///
/// # Errors
/// `ENOTTY`; `EIO` if the terminal is hung up.
pub fn window(fd: BorrowedFd<'_>) -> Result<WinSize> {
    let mut size = WinSize::default();
    ioctl("ioctl(TIOCGWINSZ)", fd, libc::TIOCGWINSZ, (&raw mut size) as usize)?;
    Ok(size)
}

/// Changes the window size; the foreground group gets SIGWINCH if it differs.
///
/// # Errors
/// As [`window`].
pub fn set_window(fd: BorrowedFd<'_>, size: WinSize) -> Result<()> {
    ioctl("ioctl(TIOCSWINSZ)", fd, libc::TIOCSWINSZ, (&raw const size) as usize).map(drop)
}

/// The number of the pseudoterminal that `fd` is the master of (`TIOCGPTN`).
///
/// # Errors
/// `ENOTTY` if it is no master.
pub fn pty_index(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut index = 0u32;
    ioctl("ioctl(TIOCGPTN)", fd, 0x8004_5430, (&raw mut index) as usize)?;
    Ok(index)
}

/// Opens the slave of the pseudoterminal that `fd` is the master of (`TIOCGPTPEER`), wherever its file system is mounted.
///
/// # Errors
/// `EIO` if it is locked.
pub fn peer(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    let slave = ioctl("ioctl(TIOCGPTPEER)", fd, 0x5441, flags as usize)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(slave as i32) })
}

/// The session that a terminal controls and its foreground process group, 0 for none: what a master tells of its slave,
/// or the caller's controlling terminal of itself.
///
/// # Errors
/// `EIO` if the terminal is hung up.
pub fn session(fd: BorrowedFd<'_>) -> Result<(i32, i32)> {
    let (mut sid, mut group) = (0i32, 0i32);
    match ioctl("ioctl(TIOCGSID)", fd, libc::TIOCGSID, (&raw mut sid) as usize) {
        Ok(_) => {}
        Err(e) if e.errno == Errno::NOTTY => return Ok((0, 0)),
        Err(e) => return Err(e),
    }
    ioctl("ioctl(TIOCGPGRP)", fd, libc::TIOCGPGRP, (&raw mut group) as usize)?;
    Ok((sid, group))
}

/// The device number of the terminal behind `fd`, which may be `/dev/tty` (`TIOCGDEV`), in the kernel's encoding.
///
/// # Errors
/// `ENOTTY`
pub fn device(fd: BorrowedFd<'_>) -> Result<u32> {
    let mut device = 0u32;
    ioctl("ioctl(TIOCGDEV)", fd, 0x8004_5432, (&raw mut device) as usize)?;
    Ok(device)
}

/// Puts bytes into the input of `fd` as if they had come from its other side, one after the other and at once
/// (`TIOCSTI`). More than 4095 that wait are lost.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn insert(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    bytes.iter().try_for_each(|byte| {
        ioctl("ioctl(TIOCSTI)", fd, libc::TIOCSTI, std::ptr::from_ref(byte) as usize).map(drop)
    })
}

/// Stops (`TCOOFF`) or continues (`TCOON`) output.
///
/// # Errors
/// `EIO` if the terminal is hung up.
pub fn set_flow(fd: BorrowedFd<'_>, on: bool) -> Result<()> {
    let action = if on { libc::TCOON } else { libc::TCOOFF };
    without_ttou(|| ioctl("ioctl(TCXONC)", fd, libc::TCXONC, action as usize).map(drop))
}

/// A yes-or-no property.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Property {
    /// `TIOCGPTLCK`, `TIOCSPTLCK`: the slave cannot be opened yet (of a master).
    Locked,
    /// `TIOCGEXCL`, `TIOCEXCL`/`TIOCNXCL`: it cannot be opened again.
    Exclusive,
    /// `TIOCGPKT`, `TIOCPKT`: packet mode (of a master).
    Packet,
}

/// Reads a property.
///
/// # Errors
/// `ENOTTY` if this side has none.
pub fn property(fd: BorrowedFd<'_>, property: Property) -> Result<bool> {
    // _IOR('T', 0x39, int), _IOR('T', 0x40, int), _IOR('T', 0x38, int)
    let (name, request) = match property {
        Property::Locked => ("ioctl(TIOCGPTLCK)", 0x8004_5439),
        Property::Exclusive => ("ioctl(TIOCGEXCL)", 0x8004_5440),
        Property::Packet => ("ioctl(TIOCGPKT)", 0x8004_5438),
    };
    let mut value = 0i32;
    ioctl(name, fd, request, (&raw mut value) as usize)?;
    Ok(value != 0)
}

/// Sets a property.
///
/// # Errors
/// `ENOTTY` if this side has none.
pub fn set_property(fd: BorrowedFd<'_>, property: Property, on: bool) -> Result<()> {
    let value = i32::from(on);
    let pointer = (&raw const value) as usize;
    match property {
        Property::Locked => ioctl("ioctl(TIOCSPTLCK)", fd, libc::TIOCSPTLCK, pointer),
        Property::Exclusive if on => ioctl("ioctl(TIOCEXCL)", fd, libc::TIOCEXCL, 0),
        Property::Exclusive => ioctl("ioctl(TIOCNXCL)", fd, libc::TIOCNXCL, 0),
        Property::Packet => ioctl("ioctl(TIOCPKT)", fd, libc::TIOCPKT, pointer),
    }
    .map(drop)
}

/// Makes `pgrp` the foreground process group of the caller's controlling terminal `fd`.
///
/// # Errors
/// `ENOTTY` if it is not the caller's controlling terminal, `EPERM` if the group is of another session.
pub fn set_foreground(fd: BorrowedFd<'_>, pgrp: i32) -> Result<()> {
    without_ttou(|| {
        ioctl("ioctl(TIOCSPGRP)", fd, libc::TIOCSPGRP, (&raw const pgrp) as usize).map(drop)
    })
}

/// Runs `change` with SIGTTOU held back: a process in the background would be stopped for changing a terminal.
fn without_ttou<T>(change: impl FnOnce() -> Result<T>) -> Result<T> {
    let mask: u64 = 1 << (libc::SIGTTOU - 1);
    let mut old = 0u64;
    let set = |how: i32, new: &u64, old: *mut u64| {
        let args =
            [how as usize, std::ptr::from_ref(new) as usize, old as usize, size_of::<u64>(), 0, 0];
        // SAFETY: both words are live (or null for `old`) and of the size given.
        unsafe { syscall("rt_sigprocmask", libc::SYS_rt_sigprocmask, args) }
    };
    set(libc::SIG_BLOCK, &mask, &raw mut old)?;
    let result = change();
    set(libc::SIG_SETMASK, &old, std::ptr::null_mut())?;
    result
}
