//! Descriptors that only a process itself can make: made by its agent, sent here, closed there, in one batch. Whatever
//! happens to us meanwhile, the process is left without it.

use crate::live::Live;
use crate::ring::{Data, Doorbell, Script};
use crate::{Error, Result};
use rewake_agent::layout::{FLAG_STORE, Op, offset};
use rustix::fd::OwnedFd;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use std::io::IoSliceMut;
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
        let Doorbell::Socket(socket) = self.ring.doorbell() else {
            return Err(Error::Inside { what, errno: rewake_sys::Errno::NOTSOCK });
        };
        let mut script = Script::new(self.data_base());
        let control = control(&mut script);
        let byte = script.data(b"!");
        let piece = words(&mut script, &[byte.address, 1]);
        let message =
            words(&mut script, &[0, 0, piece.address, 1, control.address, CONTROL as u64, 0]);
        let mut make = Op::new(nr, args).stop();
        make.flags |= FLAG_STORE;
        make.args[5] = control.address + NUMBER as u64;
        let make = script.push(make);
        let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as u64;
        let own_end = self.ring.header_address() + offset::SOCKETS as u64;
        let send = Op::new(libc::SYS_sendmsg, &[0, message.address, flags]).arg_deref(0, own_end);
        let send = script.push(send);
        script.push(Op::new(libc::SYS_close, &[0]).arg_result(0, make as u32, 0));
        let results = self.run(&script)?;
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
}

/// `struct cmsghdr` of `SCM_RIGHTS` with room for one descriptor.
fn control(script: &mut Script) -> Data {
    let mut bytes = [0; CONTROL];
    bytes[..8].copy_from_slice(&(NUMBER as u64 + 4).to_ne_bytes());
    bytes[8..12].copy_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
    bytes[12..16].copy_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
    script.data(&bytes)
}

fn words(script: &mut Script, words: &[u64]) -> Data {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    script.data(&bytes)
}
