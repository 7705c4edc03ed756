//! Every message of the format, declared once, by topic.
//!
//! Names: the struct of `user_x86_regs_entry` is [`UserX86RegsEntry`]; fields are called as in CRIU's `.proto` files. Types:
//! a required field is a plain value, an optional one an `Option`, a repeated one a `Vec`; `string` and `bytes` are both
//! `Vec<u8>`, since paths and command names on Linux need not be UTF-8; an enum field is an `i32` (the wire knows values
//! that this code does not), with a Rust enum of the same name beside it that converts both ways.
//!
//! Decode with [`crate::wire::decode`], which checks what prost does not: that required fields are there.

use crate::descriptor::MessageDesc;

pub(crate) mod declare;

mod aarch64;
mod arm;
mod bpf;
mod cgroup;
mod core;
mod cpuinfo;
mod events;
mod files;
mod fsnotify;
mod ghost;
mod inet;
mod inventory;
mod ipc;
mod loongarch64;
mod memfd;
mod mips;
mod mm;
mod mounts;
mod namespaces;
mod net;
mod options;
mod pagemap;
mod pipes;
mod ppc64;
mod rewake;
mod riscv64;
mod s390;
mod security;
mod signals;
mod sockets;
mod stats;
mod stream;
mod timers;
mod tty;
mod x86;

pub use aarch64::*;
pub use arm::*;
pub use bpf::*;
pub use cgroup::*;
pub use core::*;
pub use cpuinfo::*;
pub use events::*;
pub use files::*;
pub use fsnotify::*;
pub use ghost::*;
pub use inet::*;
pub use inventory::*;
pub use ipc::*;
pub use loongarch64::*;
pub use memfd::*;
pub use mips::*;
pub use mm::*;
pub use mounts::*;
pub use namespaces::*;
pub use net::*;
pub use options::*;
pub use pagemap::*;
pub use pipes::*;
pub use ppc64::*;
pub use rewake::*;
pub use riscv64::*;
pub use s390::*;
pub use security::*;
pub use signals::*;
pub use sockets::*;
pub use stats::*;
pub use stream::*;
pub use timers::*;
pub use tty::*;
pub use x86::*;

/// A message type of the format.
pub trait ImageMessage: prost::Message + Default {
    /// Its descriptor.
    fn desc() -> &'static MessageDesc;
}

/// The descriptors of all message types, nested ones and those that are never in a file included.
pub fn all() -> impl Iterator<Item = &'static MessageDesc> {
    [
        aarch64::ALL,
        arm::ALL,
        bpf::ALL,
        cgroup::ALL,
        core::ALL,
        cpuinfo::ALL,
        events::ALL,
        files::ALL,
        fsnotify::ALL,
        ghost::ALL,
        inet::ALL,
        inventory::ALL,
        ipc::ALL,
        loongarch64::ALL,
        memfd::ALL,
        mips::ALL,
        mm::ALL,
        mounts::ALL,
        namespaces::ALL,
        net::ALL,
        options::ALL,
        pagemap::ALL,
        pipes::ALL,
        ppc64::ALL,
        rewake::ALL,
        riscv64::ALL,
        s390::ALL,
        security::ALL,
        signals::ALL,
        sockets::ALL,
        stats::ALL,
        stream::ALL,
        timers::ALL,
        tty::ALL,
        x86::ALL,
    ]
    .into_iter()
    .flatten()
    .map(|desc| desc())
}

/// Decodes a message through its struct and encodes it again.
#[cfg(test)]
type Recode = fn(&[u8]) -> Result<Vec<u8>, prost::DecodeError>;

#[cfg(test)]
fn recode<M: ImageMessage>(bytes: &[u8]) -> Result<Vec<u8>, prost::DecodeError> {
    Ok(M::decode(bytes)?.encode_to_vec())
}

/// All message types with [`recode`] for each.
#[cfg(test)]
pub(crate) fn all_recode() -> impl Iterator<Item = (&'static MessageDesc, Recode)> {
    [
        aarch64::RECODE,
        arm::RECODE,
        bpf::RECODE,
        cgroup::RECODE,
        core::RECODE,
        cpuinfo::RECODE,
        events::RECODE,
        files::RECODE,
        fsnotify::RECODE,
        ghost::RECODE,
        inet::RECODE,
        inventory::RECODE,
        ipc::RECODE,
        loongarch64::RECODE,
        memfd::RECODE,
        mips::RECODE,
        mm::RECODE,
        mounts::RECODE,
        namespaces::RECODE,
        net::RECODE,
        options::RECODE,
        pagemap::RECODE,
        pipes::RECODE,
        ppc64::RECODE,
        rewake::RECODE,
        riscv64::RECODE,
        s390::RECODE,
        security::RECODE,
        signals::RECODE,
        sockets::RECODE,
        stats::RECODE,
        stream::RECODE,
        timers::RECODE,
        tty::RECODE,
        x86::RECODE,
    ]
    .into_iter()
    .flatten()
    .map(|(desc, recode)| (desc(), *recode))
}
