//! Descriptors that only a process itself can make: made by its agent, sent here, closed there, in one batch. Whatever
//! happens to us meanwhile, the process is left without it.

use crate::live::Live;
use crate::ring::{Data, Doorbell, Results, Script};
use crate::{Error, Result};
use rewake_agent::layout::{FLAG_STORE, Op, offset};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;

/// Bytes of a control message with one descriptor: its header, the number, padding.
const CONTROL: usize = 24;
/// Where in it the number is.
const NUMBER: usize = 16;

impl Live {
    /// Has the agent make the system call `nr`, which takes at most five arguments and makes a descriptor, and brings that
    /// here. The process keeps none.
    ///
    /// # Errors
    /// The process is gone; the call failed there ([`Error::Inside`]).
    pub fn bring(&self, what: &'static str, nr: i64, args: &[u64]) -> Result<OwnedFd> {
        let socket = self.socket(what)?;
        let mut script = Script::new(self.data_base());
        let (control, message) = message(&mut script);
        let make = script.push(storing(Op::new(nr, args), control).stop());
        let send = self.send_made(&mut script, make, message);
        let results = self.run(&script)?;
        fetch(socket, what, &results, make, send)
    }

    /// As [`Live::bring`], where it takes a device that the process may not open: the agent is sent `device`, makes the
    /// ioctl(2) `request` with `argument` on it, and closes it.
    ///
    /// # Errors
    /// As there.
    pub fn bring_by(
        &self,
        device: BorrowedFd<'_>,
        what: &'static str,
        request: u64,
        argument: u64,
    ) -> Result<OwnedFd> {
        let socket = self.socket(what)?;
        let mut script = Script::new(self.data_base());
        let (given, message_in) = message(&mut script);
        let (control, message_out) = message(&mut script);
        let number = given.address + NUMBER as u64;
        // It comes after what rouses the agent. If we die before, the end of file does: then the number is none.
        let receive = Op::new(libc::SYS_recvmsg, &[0, message_in, libc::MSG_CMSG_CLOEXEC as u64]);
        script.push(receive.arg_deref(0, self.own_end()).stop());
        // What fails does not end the batch, for what was opened is to be closed.
        let make = Op::new(libc::SYS_ioctl, &[0, request, argument]).arg_deref(0, number);
        let make = script.push(storing(make, control));
        script.push(Op::new(libc::SYS_close, &[0]).arg_deref(0, number));
        let send = self.send_made(&mut script, make, message_out);
        let results = self.run_with(&script, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut rights = SendAncillaryBuffer::new(&mut space);
            let devices = [device];
            rights.push(SendAncillaryMessage::ScmRights(&devices));
            let flags = SendFlags::NOSIGNAL;
            rustix::net::sendmsg(socket, &[IoSlice::new(b" ")], &mut rights, flags)
                .map(drop)
                .map_err(Error::errno("sending a descriptor", "sendmsg"))
        })?;
        fetch(socket, what, &results, make, send)
    }

    fn socket(&self, what: &'static str) -> Result<&OwnedFd> {
        match self.ring.doorbell() {
            Doorbell::Socket(socket) => Ok(socket),
            _ => Err(Error::Inside { what, errno: rewake_sys::Errno::NOTSOCK }),
        }
    }

    /// Address of the number of the agent's end of the socket.
    fn own_end(&self) -> u64 {
        self.ring.header_address() + offset::SOCKETS as u64
    }

    /// Adds sending the descriptor that operation `make` has made, and closing it there.
    fn send_made(&self, script: &mut Script, make: usize, message: u64) -> usize {
        let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;
        let send = Op::new(libc::SYS_sendmsg, &[0, message, flags]).arg_deref(0, self.own_end());
        let send = script.push(send);
        script.push(Op::new(libc::SYS_close, &[0]).arg_result(0, make as u32, 0));
        send
    }
}

/// The operation stores its result as the descriptor of a control message.
fn storing(mut make: Op, control: Data) -> Op {
    make.flags |= FLAG_STORE;
    make.args[5] = control.address + NUMBER as u64;
    make
}

/// A message of one byte and one descriptor: its control message, and its address.
fn message(script: &mut Script) -> (Data, u64) {
    let control = control(script);
    let byte = script.data(b"!");
    let piece = words(script, &[byte.address, 1]);
    let words = words(script, &[0, 0, piece.address, 1, control.address, CONTROL as u64, 0]);
    (control, words.address)
}

/// Takes what was sent.
fn fetch(
    socket: &OwnedFd,
    what: &'static str,
    results: &Results,
    make: usize,
    send: usize,
) -> Result<OwnedFd> {
    let failed = |what| move |errno| Error::Inside { what, errno };
    results.value(make).map_err(failed(what))?;
    results.value(send).map_err(failed("sendmsg"))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received =
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)
            .map_err(Error::errno("fetching a descriptor", "recvmsg"))?;
    let truncated = received.flags.contains(ReturnFlags::CTRUNC);
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fd.ok_or_else(|| {
        let errno = if truncated { rewake_sys::Errno::MFILE } else { rewake_sys::Errno::BADF };
        Error::errno("fetching a descriptor", "recvmsg")(errno)
    })
}

/// `struct cmsghdr` of `SCM_RIGHTS` with room for one descriptor; so far it has none.
fn control(script: &mut Script) -> Data {
    let mut bytes = [0; CONTROL];
    bytes[..8].copy_from_slice(&(NUMBER as u64 + 4).to_ne_bytes());
    bytes[8..12].copy_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
    bytes[12..16].copy_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
    bytes[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
    script.data(&bytes)
}

fn words(script: &mut Script, words: &[u64]) -> Data {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    script.data(&bytes)
}
