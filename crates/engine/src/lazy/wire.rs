//! What a restore tells the pager, on a stream socket, as CRIU 4.2 does: for each process its pid in the images (4 bytes)
//! and then, with a byte of its own, its userfaultfd; a negative number for a process that has no memory to come; a marker
//! when all processes are ready to go on.
//!
//! A pager that the restore has started itself gets a pidfd beside each userfaultfd, since the pid may mean something else
//! here, and answers the marker with a byte: whatever happens to it from then on, its guard knows the processes. A second byte
//! says that all memory is there.

use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;

/// The socket's name in the work directory.
pub const SOCKET: &str = "lazy-pages.socket";
/// All processes are ready.
const READY: i32 = 0x5253_5446;

type Io<T> = Result<T, Errno>;

/// What a restore says.
#[derive(Debug)]
pub enum Word {
    /// A process, its userfaultfd, and its pidfd if that is told.
    Process(i32, OwnedFd, Option<OwnedFd>),
    /// A process without memory to come.
    Nothing(i32),
    /// All are ready.
    Ready,
    /// The restore is gone.
    End,
}

fn send(to: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Io<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    rustix::net::sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// Tells of a process.
///
/// # Errors
/// The pager is gone (`EPIPE`).
pub fn send_process(to: BorrowedFd<'_>, pid: i32, fds: &[BorrowedFd<'_>]) -> Io<()> {
    send(to, &pid.to_ne_bytes(), &[])?;
    send(to, b"!", fds)
}

/// Tells of a process without memory to come.
///
/// # Errors
/// As of [`send_process`].
pub fn send_nothing(to: BorrowedFd<'_>, pid: i32) -> Io<()> {
    send(to, &(-pid).to_ne_bytes(), &[])
}

/// Tells that all are ready.
///
/// # Errors
/// As of [`send_process`].
pub fn send_ready(to: BorrowedFd<'_>) -> Io<()> {
    send(to, &READY.to_ne_bytes(), &[])
}

/// Receives exactly as many bytes, with the descriptors that come with them; fewer at the end of the stream.
fn receive(from: BorrowedFd<'_>, bytes: &mut [u8]) -> Io<(usize, Vec<OwnedFd>)> {
    let mut fds = Vec::new();
    let mut done = 0;
    while done < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let piece = &mut [IoSliceMut::new(&mut bytes[done..])];
        let got = match rustix::net::recvmsg(from, piece, &mut control, flags) {
            Err(Errno::INTR) => continue,
            Err(Errno::CONNRESET) => break,
            got => got?,
        };
        fds.extend(control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        }));
        if got.bytes == 0 {
            break;
        }
        done += got.bytes;
    }
    Ok((done, fds))
}

/// Receives what comes next.
///
/// # Errors
/// It is none of these (`EPROTO`), or a descriptor found no place in our table (`EMFILE`).
pub fn receive_word(from: BorrowedFd<'_>) -> Io<Word> {
    let mut number = [0; 4];
    let (got, _) = receive(from, &mut number)?;
    match (got, i32::from_ne_bytes(number)) {
        (0, _) => Ok(Word::End),
        (4, READY) => Ok(Word::Ready),
        (4, pid) if pid < 0 => Ok(Word::Nothing(pid.wrapping_neg())),
        (4, pid) if pid > 0 => {
            let (got, fds) = receive(from, &mut [0])?;
            let mut fds = fds.into_iter();
            match (got, fds.next()) {
                (0, _) => Ok(Word::End),
                (_, Some(uffd)) => Ok(Word::Process(pid, uffd, fds.next())),
                (_, None) => Err(Errno::MFILE),
            }
        }
        _ => Err(Errno::PROTO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::AsFd;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    #[test]
    fn words_arrive() {
        let flags = SocketFlags::CLOEXEC;
        let (one, two) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        send_process(one.as_fd(), 7, &[null.as_fd()]).unwrap();
        send_nothing(one.as_fd(), 8).unwrap();
        send_process(one.as_fd(), 9, &[null.as_fd(), null.as_fd()]).unwrap();
        send_ready(one.as_fd()).unwrap();
        send(one.as_fd(), &[0; 4], &[]).unwrap();
        drop(one);
        let next = || receive_word(two.as_fd());
        assert!(matches!(next(), Ok(Word::Process(7, _, None))));
        assert!(matches!(next(), Ok(Word::Nothing(8))));
        assert!(matches!(next(), Ok(Word::Process(9, _, Some(_)))));
        assert!(matches!(next(), Ok(Word::Ready)));
        assert_eq!(next().unwrap_err(), Errno::PROTO);
        assert!(matches!(next(), Ok(Word::End)));
    }
}
