//! What no call tells of internet sockets: the programs of their `SO_REUSEPORT` groups, who is in these in which order, by
//! which network interface they send to multicast groups, and the error that waits, which asking for it takes away.

use super::asm::{Helper, Program, R1, R2, R3, R6, R7, R8, R9, Size};
use super::{Members, kernel, of_sockets, offset, peek, read, words};
use rewake_proc::btf::Member;
use rewake_sys::bpf::iter::Whose;
use rewake_sys::bpf::{self, MapInfo, iter};
use rustix::fd::OwnedFd;
use std::collections::HashMap;

/// Words of a record: descriptor, `struct sock`, its group, members of that, its program, the instructions of the classic one that
/// it was made of, how many these are, interface, error, flags.
const WORDS: usize = 10;
const LEN: i32 = WORDS as i32 * 8;

/// The second of `enum sock_flags`.
const SOCK_DONE: u64 = 1 << 1;

/// Where members of the kernel's structures are.
#[derive(Debug)]
pub(super) struct Offsets {
    function: u32,
    inode: i16,
    mode: i16,
    private: i16,
    socket: i32,
    group: i32,
    count: i32,
    program: i32,
    members: i32,
    original: i32,
    len: i32,
    instructions: i32,
    interface: i32,
    error: i32,
    flags: i32,
}

impl Offsets {
    pub(super) fn new(function: u32, member: Members<'_>) -> Result<Offsets, String> {
        let of = |of, name| offset(member(of, name)?);
        let at = |of, name| member(of, name).map(|m: Member| m.offset as i32);
        Ok(Offsets {
            function,
            inode: of("file", "f_inode")?,
            mode: of("inode", "i_mode")?,
            private: of("file", "private_data")?,
            socket: at("socket", "sk")?,
            group: at("sock", "sk_reuseport_cb")?,
            count: at("sock_reuseport", "num_socks")?,
            program: at("sock_reuseport", "prog")?,
            members: at("sock_reuseport", "socks")?,
            original: at("bpf_prog", "orig_prog")?,
            len: at("sock_fprog_kern", "len")?,
            instructions: at("sock_fprog_kern", "filter")?,
            interface: at("inet_sock", "mc_index")?,
            error: at("sock", "sk_err")?,
            flags: at("sock_common", "skc_flags")?,
        })
    }

    /// Tells of each socket; the map has room for a record.
    fn program(&self, map: &OwnedFd) -> Vec<u64> {
        of_sockets(map, self.inode, self.mode, |p| {
            p.store(R8, 0, R9);
            p.load(Size::Double, R2, R7, self.private);
            p.store(R8, 8, R2);
            for word in 2..WORDS as i16 {
                p.store_value(R8, word * 8, 0);
            }
            // Behind a null pointer there is nothing to be read, which leaves zeros.
            for (to, from, at, len) in [
                (1, 1, self.socket, 8),
                (2, 1, self.group, 8),
                (3, 2, self.count, 2),
                (4, 2, self.program, 8),
                (5, 4, self.original, 8),
                (6, 5, self.len, 2),
                (5, 5, self.instructions, 8),
                (7, 1, self.interface, 4),
                (8, 1, self.error, 4),
                (9, 1, self.flags, 8),
            ] {
                get(p, to * 8, from * 8, at, len);
            }
            p.copy(R1, R6);
            p.copy(R2, R8);
            p.set(R3, LEN);
            p.call(Helper::SeqWrite);
        })
    }
}

/// Reads `len` bytes, `at` behind the pointer in the buffer at `from`, to `to` in the buffer.
fn get(p: &mut Program, to: i16, from: i16, at: i32, len: i32) {
    p.copy(R1, R8);
    p.add(R1, to.into());
    p.set(R2, len);
    p.load(Size::Double, R3, R8, from);
    p.add(R3, at);
    p.call(Helper::ProbeReadKernel);
}

fn offsets() -> Result<&'static Offsets, String> {
    kernel()?.hidden.as_ref().map_err(Clone::clone)
}

/// A program that decides which member of a group gets what arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decider {
    /// A classic one: where the kernel keeps its instructions, and how many they are.
    Classic(u64, usize),
    /// An eBPF one.
    Extended,
}

/// A socket's place in its `SO_REUSEPORT` group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// By which the kernel knows the group.
    pub address: u64,
    /// How many sockets are in it.
    pub count: usize,
    /// Its program.
    pub decider: Option<Decider>,
}

/// What is told of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hidden {
    /// By which the kernel knows it.
    pub address: u64,
    /// Its group, if it is in one.
    pub group: Option<Group>,
    /// The interface by which it sends to multicast groups; of what is no internet socket anything.
    pub interface: u32,
    /// The error that waits for the program.
    pub error: i32,
    /// Of a connection: its stream is at its end.
    pub done: bool,
}

/// Tells of the sockets among the descriptors of a thread, by number.
///
/// # Errors
/// Why this kernel does not tell, or not us.
pub fn of(tid: i32) -> Result<HashMap<i32, Hidden>, String> {
    const ARRAY: u32 = 2;
    let offsets = offsets()?;
    let info = MapInfo {
        kind: ARRAY,
        key_size: 4,
        value_size: LEN as u32,
        max_entries: 1,
        ..MapInfo::default()
    };
    let map = bpf::map_create(&info).map_err(|e| e.to_string())?;
    let program = iter::load(&offsets.program(&map), offsets.function);
    let program = program.map_err(|e| e.to_string())?;
    let mut all = HashMap::new();
    read(&program, Whose::Thread(tid), |text| {
        let records = text.chunks_exact(LEN as usize);
        let whole = records.remainder().is_empty();
        for record in records {
            let [fd, address, group, count, program, classic, len, interface, error, flags]: [u64;
                WORDS] = words(record);
            let decider = match classic {
                0 => Decider::Extended,
                at => Decider::Classic(at, len as usize),
            };
            let group = Group {
                address: group,
                count: count as usize,
                decider: (program != 0).then_some(decider),
            };
            let hidden = Hidden {
                address,
                group: (group.address != 0).then_some(group),
                interface: interface as u32,
                error: error as i32,
                done: flags & SOCK_DONE != 0,
            };
            all.insert(fd as i32, hidden);
        }
        if whole { Ok(true) } else { Err("a record is not whole".to_owned()) }
    })?;
    Ok(all)
}

/// The members of a group, by which the kernel knows them, in their order.
///
/// # Errors
/// The kernel does not tell.
pub fn members(group: &Group) -> Result<Vec<u64>, String> {
    let first = group.address.wrapping_add_signed(offsets()?.members.into());
    let bytes = peek::bytes(first, group.count * 8)?;
    Ok(bytes.as_chunks().0.iter().map(|b| u64::from_ne_bytes(*b)).collect())
}

/// The `len` instructions of a classic program ([`Decider::Classic`]): each `code << 48 | jt << 40 | jf << 32 | k`.
///
/// # Errors
/// The kernel does not tell.
pub fn program(at: u64, len: usize) -> Result<Vec<u64>, String> {
    let bytes = peek::bytes(at, len * 8)?;
    let instruction = |b: &[u8; 8]| {
        let [c, d, jt, jf, k @ ..] = *b;
        u64::from(u16::from_ne_bytes([c, d])) << 48
            | u64::from(jt) << 40
            | u64::from(jf) << 32
            | u64::from(u32::from_ne_bytes(k))
    };
    Ok(bytes.as_chunks().0.iter().map(instruction).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewake_sys::sockets::{attach_reuseport_filter, set_option, set_option_int};
    use rustix::fd::{AsFd, AsRawFd};
    use std::net::{SocketAddr, UdpSocket};

    fn bound(to: Option<SocketAddr>) -> UdpSocket {
        use rustix::net::{AddressFamily, SocketType, bind, socket};
        let fd = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
        set_option_int(fd.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEPORT, 1).unwrap();
        bind(&fd, &to.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap())).unwrap();
        UdpSocket::from(fd)
    }

    #[test]
    fn a_group_and_its_program_are_told() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let first = bound(None);
        let address = first.local_addr().unwrap();
        let all = [first, bound(Some(address)), bound(Some(address))];
        let told = match of(tid) {
            Ok(told) => told,
            Err(e) => return println!("not here: {e}"),
        };
        let group = |s: &UdpSocket| told[&s.as_raw_fd()].group.unwrap();
        let one = group(&all[0]);
        assert_eq!((one.count, one.decider), (3, None));
        let order: Vec<u64> = all.iter().map(|s| told[&s.as_raw_fd()].address).collect();
        assert_eq!(members(&one), Ok(order));
        // As long as one may be: it returns 2 in the end.
        let mut filter = vec![0x0000_0000_0000_0007_u64; 4095];
        filter.push(0x0006_0000_0000_0002);
        attach_reuseport_filter(all[1].as_fd(), &filter).unwrap();
        let group = of(tid).unwrap()[&all[0].as_raw_fd()].group.unwrap();
        let Some(Decider::Classic(at, 4096)) = group.decider else {
            panic!("{:?}", group.decider);
        };
        assert_eq!(program(at, 4096), Ok(filter));
    }

    #[test]
    fn the_interface_for_multicast_is_told() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let interface = || of(tid).map(|told| told[&socket.as_raw_fd()].interface);
        match interface() {
            Ok(interface) => assert_eq!(interface, 0),
            Err(e) => return println!("not here: {e}"),
        }
        let request = [[0; 4], [0; 4], 1u32.to_ne_bytes()].concat();
        set_option(socket.as_fd(), libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &request).unwrap();
        assert_eq!(interface(), Ok(1));
    }
}
