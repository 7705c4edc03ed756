//! TCP sockets among our own descriptors: whether their options are alike.
//!
//! What getsockopt(2) tells of an option is in a few fields of the kernel's structures. Where these are equal, so are the
//! options, and need be asked for once only. Which options it is true of, [`crate::sockets`] finds out by experiment.

use super::asm::{Helper, R1, R2, R3, R6, R7, R8, R9, Size};
use super::{Members, kernel, of_sockets, offset, read, words};
use rewake_proc::btf::{Bits, Member};
use rewake_sys::bpf::iter::Whose;
use rewake_sys::bpf::{self, MapInfo, iter};
use rustix::fd::OwnedFd;
use std::collections::HashMap;

/// Words of a record before the socket.
const WORDS: usize = 2;
const HEAD: i32 = WORDS as i32 * 8;

/// Fields with options, by the structure they are in.
const FIELDS: &[(&str, &[&str])] = &[
    (
        "sock_common",
        &[
            "skc_family",
            "skc_reuse",
            "skc_reuseport",
            "skc_ipv6only",
            "skc_bound_dev_if",
            "skc_flags",
        ],
    ),
    (
        "sock",
        &[
            "sk_peek_off",
            "sk_ll_usec",
            "sk_prefer_busy_poll",
            "sk_userlocks",
            "sk_filter",
            "sk_rcvtimeo",
            "sk_rcvlowat",
            "sk_reserved_mem",
            "sk_tsflags",
            "sk_max_pacing_rate",
            "sk_sndtimeo",
            "sk_priority",
            "sk_mark",
            "sk_no_check_tx",
            "sk_lingertime",
            "sk_bind_phc",
            "sk_txrehash",
            "sk_clockid",
            "sk_txtime_deadline_mode",
            "sk_txtime_report_errors",
        ],
    ),
    (
        "inet_sock",
        &[
            "inet_flags",
            "uc_ttl",
            "inet_opt",
            "tos",
            "min_ttl",
            "mc_ttl",
            "pmtudisc",
            "convert_csum",
            "uc_index",
            "mc_index",
            "mc_addr",
            "local_port_range",
        ],
    ),
    (
        "inet_connection_sock",
        &[
            "icsk_rto_min",
            "icsk_rto_max",
            "icsk_delack_max",
            "icsk_ca_ops",
            "icsk_ulp_ops",
            "icsk_syn_retries",
            "icsk_user_timeout",
        ],
    ),
    ("request_sock_queue", &["rskq_defer_accept"]),
    (
        "tcp_sock",
        &[
            "notsent_lowat",
            "recvmsg_inq",
            "nonagle",
            "thin_lto",
            "fastopen_connect",
            "fastopen_no_cookie",
            "save_syn",
            "keepalive_probes",
            "keepalive_time",
            "keepalive_intvl",
            "linger2",
            "tcp_tx_delay",
        ],
    ),
    (
        "ipv6_pinfo",
        &[
            "flow_label",
            "opt",
            "hop_limit",
            "pmtudisc",
            "tclass",
            "mcast_hops",
            "frag_size",
            "ucast_oif",
            "mcast_oif",
            "rxopt",
            "srcprefs",
            "min_hopcount",
            "sticky_pktinfo",
        ],
    ),
];

/// Where members of the kernel's structures are.
#[derive(Debug)]
pub(super) struct Offsets {
    function: u32,
    inode: i16,
    mode: i16,
    private: i16,
    socket: i32,
    /// Where the part that IPv6 has begins; the other ends there.
    inet6: i32,
    inet6_len: i32,
    family: usize,
    /// In the order of [`FIELDS`]; those of IPv6 come last.
    fields: Vec<Bits>,
    /// How many of the fields sockets of IPv4 have.
    plain: usize,
}

impl Offsets {
    pub(super) fn new(
        function: u32,
        member: Members<'_>,
        bits: &dyn Fn(&str, &str) -> Result<Bits, String>,
    ) -> Result<Offsets, String> {
        let of = |of, name| offset(member(of, name)?);
        let at = |of, name| Ok::<u32, String>(member(of, name)?.offset);
        let inet6: Member = member("tcp6_sock", "inet6")?;
        let queue = at("inet_connection_sock", "icsk_accept_queue")?;
        let mut fields = Vec::new();
        let mut plain = 0;
        for (of, names) in FIELDS {
            // The others begin with the one before.
            let base = match *of {
                "request_sock_queue" => queue,
                "ipv6_pinfo" => inet6.offset,
                _ => 0,
            };
            if *of == "ipv6_pinfo" {
                plain = fields.len();
            }
            for name in *names {
                let bits = bits(of, name)?;
                fields.push(Bits { offset: bits.offset + base, ..bits });
            }
        }
        let end = |fields: &[Bits]| fields.iter().map(|f| f.offset + f.len).max().unwrap_or(0);
        let nested = [
            ("sock", "__sk_common"),
            ("inet_sock", "sk"),
            ("inet_connection_sock", "icsk_inet"),
            ("tcp_sock", "inet_conn"),
            ("tcp6_sock", "tcp"),
        ];
        for (of, first) in nested {
            if at(of, first)? != 0 {
                return Err(format!("{of}.{first} is not at its beginning"));
            }
        }
        const MOST: u32 = 1 << 14;
        if end(&fields[..plain]) > inet6.offset || end(&fields) > MOST {
            return Err("a TCP socket is not as it was".to_owned());
        }
        Ok(Offsets {
            function,
            inode: of("file", "f_inode")?,
            mode: of("inode", "i_mode")?,
            private: of("file", "private_data")?,
            socket: of("socket", "sk")?.into(),
            inet6: inet6.offset as i32,
            inet6_len: (end(&fields) - inet6.offset) as i32,
            family: at("sock_common", "skc_family")? as usize,
            fields,
            plain,
        })
    }

    fn record(&self) -> i32 {
        HEAD + (self.inet6 + self.inet6_len + 7) / 8 * 8
    }

    fn program(&self, map: &OwnedFd) -> Vec<u64> {
        of_sockets(map, self.inode, self.mode, |p| {
            p.store(R8, 0, R9);
            p.load(Size::Double, R3, R7, self.private);
            p.add(R3, self.socket);
            p.copy(R1, R8);
            p.add(R1, 8);
            p.set(R2, 8);
            p.call(Helper::ProbeReadKernel);
            // A socket of another kind may end before, and then it is all zeros.
            for (to, from, len) in
                [(HEAD, 0, self.inet6), (HEAD + self.inet6, self.inet6, self.inet6_len)]
            {
                p.copy(R1, R8);
                p.add(R1, to);
                p.set(R2, len);
                p.load(Size::Double, R3, R8, 8);
                p.add(R3, from);
                p.call(Helper::ProbeReadKernel);
            }
            p.copy(R1, R6);
            p.copy(R2, R8);
            p.set(R3, self.record());
            p.call(Helper::SeqWrite);
        })
    }

    /// The fields one after the other.
    fn print(&self, socket: &[u8]) -> Option<Vec<u8>> {
        let family = u16::from_ne_bytes(*socket.get(self.family..)?.first_chunk()?);
        let fields = match i32::from(family) {
            libc::AF_INET => &self.fields[..self.plain],
            libc::AF_INET6 => &self.fields[..],
            _ => return Some(Vec::new()),
        };
        let mut print = Vec::with_capacity(512);
        for field in fields {
            let start = field.offset as usize;
            let bytes = socket.get(start..start + field.len as usize)?;
            print.extend(bytes.iter().map(|byte| byte & field.mask));
        }
        Some(print)
    }
}

/// A program that tells of sockets.
#[derive(Debug)]
pub struct Teller {
    program: OwnedFd,
    _map: OwnedFd,
}

impl Teller {
    /// Makes it ready.
    ///
    /// # Errors
    /// Why this kernel does not tell, or not us.
    pub fn new() -> Result<Teller, String> {
        const ARRAY: u32 = 2;
        let offsets = kernel()?.sockets.as_ref().map_err(Clone::clone)?;
        let info = MapInfo {
            kind: ARRAY,
            key_size: 4,
            value_size: offsets.record() as u32,
            max_entries: 1,
            ..MapInfo::default()
        };
        let map = bpf::map_create(&info).map_err(|e| e.to_string())?;
        let program = iter::load(&offsets.program(&map), offsets.function);
        Ok(Teller { program: program.map_err(|e| e.to_string())?, _map: map })
    }

    /// Prints of our own sockets, by descriptor: two TCP sockets with equal ones have equal options, as far as they are in these
    /// fields. One at a time may be asked.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn prints(&mut self) -> Result<HashMap<i32, Vec<u8>>, String> {
        let offsets = kernel()?.sockets.as_ref().map_err(Clone::clone)?;
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let mut prints = HashMap::new();
        read(&self.program, Whose::Thread(own), |text| {
            let records = text.chunks_exact(offsets.record() as usize);
            let whole = records.remainder().is_empty();
            for record in records {
                let (head, socket) = record.split_at(HEAD as usize);
                let [number, _]: [u64; WORDS] = words(head);
                let print = offsets.print(socket).ok_or("a record is not whole")?;
                prints.insert(number as i32, print);
            }
            if whole { Ok(true) } else { Err("a record is not whole".to_owned()) }
        })?;
        Ok(prints)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::AsRawFd;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn connections_are_alike_until_an_option_is_set() {
        let mut teller = match Teller::new() {
            Ok(teller) => teller,
            Err(e) => return println!("not here: {e}"),
        };
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let [a, b, c] = [connect(), connect(), connect()];
            c.set_nodelay(true).unwrap();
            let prints = teller.prints().unwrap();
            let print = |s: &TcpStream| prints[&s.as_raw_fd()].clone();
            assert!(!print(&a).is_empty());
            assert_eq!(print(&a), print(&b));
            assert_ne!(print(&a), print(&c));
        }
    }
}
