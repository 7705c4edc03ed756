//! A blocking netlink socket: one request, all its answers.

use crate::message::{Builder, Message, messages, u32_at};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const NLM_F_DUMP_INTR: u16 = 0x10;
/// What the kernel fills at most in one receive of a dump.
const BUFFER: usize = 64 << 10;
/// How often a dump is made again that changed under way.
const ATTEMPTS: u32 = 5;

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("netlink {call}: {errno}")]
    Call {
        /// Which.
        call: &'static str,
        /// Why.
        errno: Errno,
    },
    /// The kernel refused the request.
    #[error("netlink request refused: {0}")]
    Refused(Errno),
    /// What was listed changed each time while it was listed.
    #[error("what netlink lists changes too fast")]
    Unsteady,
}

fn failed(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Call { call, errno }
}

/// A netlink socket, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Socket {
    /// Opens one; `protocol` is `NETLINK_*`.
    ///
    /// # Errors
    /// The kernel does not have the protocol.
    pub fn open(protocol: i32) -> Result<Socket, Error> {
        // 0 is NETLINK_ROUTE, and what rustix calls no protocol.
        let protocol =
            rustix::net::RawProtocol::new(protocol as u32).map(rustix::net::Protocol::from_raw);
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )
        .map_err(failed("socket"))?;
        Ok(Socket { fd, buffer: vec![0; BUFFER], sequence: 0 })
    }

    /// Makes a dump request (`NLM_F_DUMP`) and hands every record of the answer to `each`; from the start if the
    /// table changed meanwhile.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn dump<T: Default>(
        &mut self,
        kind: u16,
        request: &[u8],
        mut each: impl FnMut(&mut T, Message<'_>),
    ) -> Result<T, Error> {
        for _ in 0..ATTEMPTS {
            self.sequence += 1;
            let mut builder = Builder::new();
            let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
            builder.begin(kind, flags, self.sequence).bytes(request);
            self.send(builder.as_bytes())?;
            let mut result = T::default();
            if self.answers(&mut |message| each(&mut result, message))? {
                return Ok(result);
            }
        }
        Err(Error::Unsteady)
    }

    /// A sequence number that no request has had.
    pub(crate) fn next_sequence(&mut self) -> u32 {
        // Batches take many: the numbers of one do not meet those of the next.
        self.sequence = self.sequence.wrapping_add(1 << 16);
        self.sequence
    }

    /// Sends messages of which those numbered `from` until `to` ask for acknowledgement, and awaits all of them.
    ///
    /// # Errors
    /// The kernel refuses one.
    pub(crate) fn transact(&mut self, bytes: &[u8], from: u32, to: u32) -> Result<(), Error> {
        let room = i32::try_from(bytes.len()).unwrap_or(i32::MAX).saturating_mul(2);
        if room > 1 << 17 {
            // Without the capability the send says whether it was too much.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(
                self.fd.as_fd(),
                room as usize,
            );
        }
        self.send(bytes)?;
        let mut missing = to - from;
        let mut refused = None;
        while missing > 0 {
            let (len, _) =
                rustix::net::recv(self.fd.as_fd(), self.buffer.as_mut_slice(), RecvFlags::empty())
                    .map_err(failed("receive"))?;
            for message in messages(&self.buffer[..len]) {
                if i32::from(message.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                match u32_at(message.body, 0).unwrap_or_default() as i32 {
                    0 => {}
                    code => {
                        refused.get_or_insert(Errno::from_raw_os_error(-code));
                        // For the batch as a whole, or what follows may not be answered at all.
                        missing = 1;
                    }
                }
                missing = missing.saturating_sub(u32::from(message.sequence >= from));
            }
        }
        match refused {
            None => Ok(()),
            Some(errno) => Err(Error::Refused(errno)),
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(self.fd.as_fd(), bytes, SendFlags::empty(), &kernel)
            .map_err(failed("send"))
            .map(drop)
    }

    /// Receives until the answer ends: whether it is consistent.
    fn answers(&mut self, each: &mut dyn FnMut(Message<'_>)) -> Result<bool, Error> {
        let mut steady = true;
        loop {
            let (len, _) =
                rustix::net::recv(self.fd.as_fd(), self.buffer.as_mut_slice(), RecvFlags::empty())
                    .map_err(failed("receive"))?;
            for message in messages(&self.buffer[..len]) {
                // A late answer to a request that was given up.
                if message.sequence != self.sequence {
                    continue;
                }
                steady &= message.flags & NLM_F_DUMP_INTR == 0;
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => return Ok(steady),
                    libc::NLMSG_ERROR => {
                        let code = u32_at(message.body, 0).unwrap_or_default() as i32;
                        return match code {
                            0 => Ok(steady),
                            code => Err(Error::Refused(Errno::from_raw_os_error(-code))),
                        };
                    }
                    _ => each(message),
                }
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> rustix::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
