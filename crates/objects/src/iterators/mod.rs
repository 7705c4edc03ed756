//! What the kernel tells of all descriptors, all mappings or all threads of a process at once, by a program that it runs for each of them
//! (BPF iterators): a few hundred nanoseconds each, where the texts of `/proc` take microseconds.
//!
//! It pays for processes that have thousands, since to look up where the members of the kernel's structures are takes
//! milliseconds. It needs `CAP_BPF`, `CAP_PERFMON` and a kernel that describes its types; everything that asks here has another
//! way, and takes that if the answer is an error.

mod asm;
pub mod faults;
pub mod files;
pub mod hidden;
pub mod mappings;
mod peek;
pub mod rings;
pub mod sharers;
pub mod sockets;
pub mod threads;

use asm::{Program, R1, R2, R6, R7, R8, R9, Size};
use rewake_proc::btf::{Bits, Btf, Member};
use rewake_sys::bpf::iter::{self, Types, Whose};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use std::io::Read;
use std::sync::OnceLock;

/// Where things are in this kernel's structures.
#[derive(Debug)]
struct Kernel {
    mappings: mappings::Offsets,
    files: files::Offsets,
    /// A kernel that tells less of these may tell the rest.
    sockets: Result<sockets::Offsets, String>,
    threads: Result<threads::Offsets, String>,
    /// The function of the iterator over tasks.
    of_tasks: Result<u32, String>,
    hidden: Result<hidden::Offsets, String>,
    sharers: Result<sharers::Offsets, String>,
}

/// As it is here; looked up by the first who asks.
fn kernel() -> Result<&'static Kernel, String> {
    static KERNEL: OnceLock<Result<Kernel, String>> = OnceLock::new();
    KERNEL.get_or_init(look_up).as_ref().map_err(Clone::clone)
}

fn look_up() -> Result<Kernel, String> {
    const STRUCTS: &[&str] = &[
        "vm_area_struct",
        "anon_vma",
        "file",
        "inode",
        "super_block",
        "file_lock_context",
        "eventfd_ctx",
        "fown_struct",
        "socket",
        "sock_common",
        "sock",
        "inet_sock",
        "inet_connection_sock",
        "request_sock_queue",
        "tcp_sock",
        "ipv6_pinfo",
        "tcp6_sock",
        "sock_reuseport",
        "bpf_prog",
        "sock_fprog_kern",
        "task_struct",
        "pid",
        "upid",
        "cred",
        "seccomp",
        "address_space",
        "rb_node",
    ];
    const FUNCTIONS: &[&str] = &["bpf_iter_task_vma", "bpf_iter_task_file", "bpf_iter_task"];
    let types = Types::of_kernel().map_err(|e| e.to_string())?;
    let found = Btf::new(types.bytes()).and_then(|btf| btf.find(STRUCTS, FUNCTIONS));
    let found = found.map_err(|e| e.to_string())?;
    let function = |name: &str| {
        let which = FUNCTIONS.iter().position(|f| *f == name);
        which.and_then(|which| found.function(which)).ok_or_else(|| format!("there is no {name}"))
    };
    let member = |of: &str, name: &str| {
        let which = STRUCTS.iter().position(|s| *s == of);
        let member: Option<Member> = which.and_then(|which| found.member(which, name));
        member.ok_or_else(|| format!("there is no {of}.{name}"))
    };
    let bits = |of: &str, name: &str| {
        let which = STRUCTS.iter().position(|s| *s == of);
        let bits: Option<Bits> = which.and_then(|which| found.bits(which, name));
        bits.ok_or_else(|| format!("there is no {of}.{name}"))
    };
    let size = |of: &str| {
        let which = STRUCTS.iter().position(|s| *s == of);
        which.and_then(|which| found.size(which)).ok_or_else(|| format!("there is no {of}"))
    };
    Ok(Kernel {
        sockets: sockets::Offsets::new(function("bpf_iter_task_file")?, &member, &bits),
        mappings: mappings::Offsets::new(function("bpf_iter_task_vma")?, &member)?,
        files: files::Offsets::new(function("bpf_iter_task_file")?, &member)?,
        of_tasks: function("bpf_iter_task"),
        threads: function("bpf_iter_task")
            .and_then(|f| threads::Offsets::new(f, &member, size("upid")?)),
        hidden: hidden::Offsets::new(function("bpf_iter_task_file")?, &member),
        sharers: size("upid").and_then(|number| sharers::Offsets::new(&member, number)),
    })
}

/// Finds a member of a structure.
type Members<'a> = &'a dyn Fn(&str, &str) -> Result<Member, String>;

/// An offset as instructions have it.
fn offset(member: Member) -> Result<i16, String> {
    i16::try_from(member.offset).map_err(|e| e.to_string())
}

/// A program that does `what` for each descriptor that is a socket: R6 is where to write, R7 the file, R8 the value of `map`, R9 the
/// number. `inode` and `mode` are where the file and the inode have these.
fn of_sockets(map: &OwnedFd, inode: i16, mode: i16, what: impl FnOnce(&mut Program)) -> Vec<u64> {
    /// `S_IFSOCK`, the last of all types.
    const SOCKET: i32 = 0o140_000;
    let mut p = Program::default();
    p.load(Size::Double, R7, R1, 24);
    p.end_if_null(R7);
    p.load(Size::Word, R9, R1, 16);
    p.load(Size::Double, R6, R1, 0);
    p.load(Size::Double, R6, R6, 0);
    p.load(Size::Double, R2, R7, inode);
    p.load(Size::Half, R2, R2, mode);
    p.value_of_map(R8, map.as_raw_fd());
    p.unless_less(R2, SOCKET, what);
    p.end()
}

/// Gives `take` what a program writes, a number of whole records at a time, until that has had enough.
fn read(
    program: &OwnedFd,
    whose: Whose,
    mut take: impl FnMut(&[u8]) -> Result<bool, String>,
) -> Result<(), String> {
    // Twice what the kernel has ready at a time.
    const ROOM: usize = 64 << 10;
    let file = iter::of(program.as_fd(), whose).map_err(|e| e.to_string())?;
    let mut file = std::fs::File::from(file);
    let mut buffer = vec![0; ROOM];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(got) => {
                if !take(&buffer[..got])? {
                    return Ok(());
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.to_string()),
        }
    }
}

/// Gets the 64-bit words of a record.
fn words<const N: usize>(record: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(record.as_chunks::<8>().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    words
}
