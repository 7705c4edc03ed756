//! What is registered with io_uring instances, and how these were made: their own `fdinfo` tells little of it.

use super::peek::{self, Members, half, word};
use super::{files, threads};
use rewake_sys::bpf::iter::Types;
use rewake_sys::io_uring as ring;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// A file that is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Its number in the table.
    pub number: u32,
    /// Its description ([`files::File::description`]).
    pub description: u64,
    /// What its end is told by, 0 if it is not.
    pub tag: u64,
}

/// Memory that is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    /// Its number in the table.
    pub number: u32,
    /// Where it was when it was registered.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// What its end is told by, 0 if it is not.
    pub tag: u64,
    /// Its pieces: number of the first page (`/proc/PID/pagemap`), bytes from the beginning of that, bytes.
    pub pieces: Vec<(u64, u32, u32)>,
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// `IORING_SETUP_*`
    pub flags: u32,
    /// The thread that alone may submit; `Err` if it is gone.
    pub issuer: Option<Result<i32, ()>>,
    /// Requests that are not done yet, whatever has become of their completions.
    pub in_flight: u32,
    /// Slots in the table of files.
    pub file_slots: u32,
    /// Those that are not empty.
    pub files: Vec<Slot>,
    /// Where files without a number of their own are put: from slot, to slot.
    pub file_range: (u32, u32),
    /// Slots in the table of buffers.
    pub buffer_slots: u32,
    /// Those that are not empty.
    pub buffers: Vec<Buffer>,
    /// The eventfd: its number, whether it is told only of what was not done at once, and whether others have it too.
    pub eventfd: Option<(i32, bool, bool)>,
    /// How many workers there may be: bounded, unbounded; 0: as the kernel likes.
    pub workers: Option<[u32; 2]>,
    /// By which clock is waited.
    pub clock: u32,
    /// What it has besides that nobody else tells.
    pub beyond: Option<&'static str>,
}

/// Where members of the kernel's structures are.
#[derive(Debug)]
struct Offsets {
    private: usize,
    ctx: usize,
    flags: usize,
    submitter: usize,
    restrictions: usize,
    workers_set: (usize, u8),
    workers: usize,
    clock: usize,
    allocated: usize,
    free: usize,
    overflow: usize,
    /// Number, then nodes, of files and buffers.
    files: [usize; 2],
    buffers: [usize; 2],
    range: [usize; 2],
    /// Roots of trees of what cannot be had again.
    trees: Vec<(usize, &'static str)>,
    /// Memory of the program's for waiting.
    region: Option<usize>,
    eventfd: usize,
    eventfd_context: usize,
    eventfd_async: (usize, u8),
    eventfd_id: usize,
    node_tag: usize,
    node_value: usize,
    node: usize,
    buffer: BufferOffsets,
    page: usize,
    task_pid: usize,
    level: usize,
    numbers: usize,
    number: usize,
}

#[derive(Debug)]
struct BufferOffsets {
    head: usize,
    address: usize,
    len: usize,
    pieces: usize,
    kernel: usize,
    vector: usize,
    /// Size of a piece, and where page, length and offset are in it.
    piece: [usize; 4],
}

const STRUCTS: &[&str] = &[
    "io_ring_ctx",
    "io_submit_state",
    "io_file_table",
    "io_rsrc_data",
    "io_rsrc_node",
    "io_mapped_ubuf",
    "io_mapped_region",
    "io_restriction",
    "io_ev_fd",
    "eventfd_ctx",
    "xarray",
    "bio_vec",
    "page",
    "file",
    "task_struct",
    "pid",
    "upid",
];

fn offsets() -> Result<&'static Offsets, String> {
    static OFFSETS: OnceLock<Result<Offsets, String>> = OnceLock::new();
    OFFSETS.get_or_init(look_up).as_ref().map_err(Clone::clone)
}

fn look_up() -> Result<Offsets, String> {
    let types = Types::of_kernel().map_err(|e| e.to_string())?;
    let members = Members::new(&types, STRUCTS)?;
    let at = |of: &str, name: &str| members.at(of, name);
    let ctx = |name: &str| at("io_ring_ctx", name);
    let table = |start: usize| {
        Ok([start + at("io_rsrc_data", "nr")?, start + at("io_rsrc_data", "nodes")?])
    };
    let files: Result<[usize; 2], String> =
        table(ctx("file_table")? + at("io_file_table", "data")?);
    let buffers: Result<[usize; 2], String> = table(ctx("buf_table")?);
    let head = at("xarray", "xa_head")?;
    let mut trees = vec![
        (ctx("io_bl_xa")? + head, BUFFER_GROUPS),
        (ctx("personalities")? + head, PERSONALITIES),
    ];
    // Newer ones: what is not there cannot be used.
    let received = "with received memory of a network device (IORING_REGISTER_ZCRX_IFQ)";
    trees.extend(ctx("zcrx_ctxs").ok().map(|at| (at + head, received)));
    let region = ctx("param_region").ok();
    let region = match region {
        Some(start) => Some(start + at("io_mapped_region", "nr_pages")?),
        None => None,
    };
    Ok(Offsets {
        private: at("file", "private_data")?,
        ctx: members.size("io_ring_ctx")?,
        flags: ctx("flags")?,
        submitter: ctx("submitter_task")?,
        restrictions: ctx("restrictions")? + at("io_restriction", "registered")?,
        workers_set: members.bit("io_ring_ctx", "iowq_limits_set")?,
        workers: ctx("iowq_limits")?,
        clock: ctx("clockid")?,
        allocated: ctx("nr_req_allocated")?,
        free: ctx("submit_state")? + at("io_submit_state", "free_list")?,
        overflow: ctx("cq_overflow_list")?,
        files: files?,
        buffers: buffers?,
        range: [ctx("file_alloc_start")?, ctx("file_alloc_end")?],
        trees,
        region,
        eventfd: ctx("io_ev_fd")?,
        eventfd_context: at("io_ev_fd", "cq_ev_fd")?,
        eventfd_async: members.bit("io_ev_fd", "eventfd_async")?,
        eventfd_id: at("eventfd_ctx", "id")?,
        node_tag: at("io_rsrc_node", "tag")?,
        node_value: at("io_rsrc_node", "file_ptr")?,
        node: members.size("io_rsrc_node")?,
        buffer: BufferOffsets {
            head: members.size("io_mapped_ubuf")?,
            address: at("io_mapped_ubuf", "ubuf")?,
            len: at("io_mapped_ubuf", "len")?,
            pieces: at("io_mapped_ubuf", "nr_bvecs")?,
            kernel: at("io_mapped_ubuf", "is_kbuf")?,
            vector: at("io_mapped_ubuf", "bvec")?,
            piece: [
                members.size("bio_vec")?,
                at("bio_vec", "bv_page")?,
                at("bio_vec", "bv_len")?,
                at("bio_vec", "bv_offset")?,
            ],
        },
        page: members.size("page")?,
        task_pid: at("task_struct", "thread_pid")?,
        level: at("pid", "level")?,
        numbers: at("pid", "numbers")? + at("upid", "nr")?,
        number: members.size("upid")?,
    })
}

/// Words of [`Instance::beyond`].
const BUFFER_GROUPS: &str =
    "with groups of buffers (IORING_REGISTER_PBUF_RING, IORING_OP_PROVIDE_BUFFERS)";
const PERSONALITIES: &str = "with personalities (IORING_REGISTER_PERSONALITY)";

/// Most slots of a table, and most requests: the kernel allows 32,768 and 16,384 of these.
const MOST: usize = 1 << 16;

/// Reads an instance, by a descriptor of ours. Nobody may use it meanwhile.
///
/// # Errors
/// Why this kernel does not tell, or not us.
pub fn of(fd: BorrowedFd<'_>) -> Result<Instance, String> {
    let offsets = offsets()?;
    let ctx = context(fd, offsets)?;
    let bytes = peek::bytes(ctx, offsets.ctx)?;
    let value = |at: usize| half(&bytes, at);
    let (file_slots, nodes) = (value(offsets.files[0])?, word(&bytes, offsets.files[1])?);
    let files = table(nodes, file_slots, offsets)?;
    let files = files
        .into_iter()
        // The lowest bits are flags.
        .map(|(number, tag, file)| Slot { number, description: file & !7, tag })
        .collect();
    let (buffer_slots, nodes) = (value(offsets.buffers[0])?, word(&bytes, offsets.buffers[1])?);
    let mut beyond = None;
    let mut buffers = Vec::new();
    for (number, tag, at) in table(nodes, buffer_slots, offsets)? {
        match buffer(at, offsets)? {
            Some((address, len, pieces)) => {
                buffers.push(Buffer { number, address, len, tag, pieces });
            }
            None => beyond = Some("with buffers of the kernel's (of a block device in user space)"),
        }
    }
    let is_set = |(at, mask): (usize, u8)| bytes.get(at).is_some_and(|byte| byte & mask != 0);
    let workers = is_set(offsets.workers_set)
        .then(|| Ok::<_, String>([value(offsets.workers)?, value(offsets.workers + 4)?]))
        .transpose()?;
    if bytes.get(offsets.restrictions).is_none_or(|byte| *byte != 0) {
        beyond = Some("with restrictions (IORING_REGISTER_RESTRICTIONS)");
    }
    for (at, what) in &offsets.trees {
        if word(&bytes, *at)? != 0 {
            beyond = Some(*what);
        }
    }
    if let Some(at) = offsets.region
        && value(at)? != 0
    {
        beyond = Some("with a region of memory for waiting (IORING_REGISTER_MEM_REGION)");
    }
    let allocated = value(offsets.allocated)?;
    let free = peek::length(ctx + offsets.free as u64, allocated as usize)?;
    let late = word(&bytes, offsets.overflow)? != ctx + offsets.overflow as u64;
    let eventfd = match word(&bytes, offsets.eventfd)? {
        0 => None,
        at => Some(eventfd(at, offsets)?),
    };
    let issuer = match word(&bytes, offsets.submitter)? {
        0 => None,
        task => Some(thread(task, offsets)?),
    };
    Ok(Instance {
        flags: value(offsets.flags)?,
        issuer,
        in_flight: allocated.saturating_sub(free as u32).max(late.into()),
        file_slots,
        files,
        file_range: (value(offsets.range[0])?, value(offsets.range[1])?),
        buffer_slots,
        buffers,
        eventfd,
        workers,
        clock: value(offsets.clock)?,
        beyond,
    })
}

/// Where the kernel has what it knows of an instance.
fn context(fd: BorrowedFd<'_>, offsets: &Offsets) -> Result<u64, String> {
    let files = files::of(std::process::id() as i32)?;
    let file = files.iter().find(|file| file.number == fd.as_raw_fd());
    let file = file.ok_or("a descriptor of our own is not told")?.description;
    word(&peek::bytes(file + offsets.private as u64, 8)?, 0)
}

/// Slots of a table that are not empty: number, tag, what is there.
fn table(nodes: u64, slots: u32, offsets: &Offsets) -> Result<Vec<(u32, u64, u64)>, String> {
    if slots == 0 {
        return Ok(Vec::new());
    }
    let slots = slots as usize;
    if slots > MOST || offsets.node > 64 {
        return Err(format!("a table of {slots} slots"));
    }
    let pointers = peek::bytes(nodes, slots * 8)?;
    let places: Vec<(u32, u64)> = pointers
        .as_chunks::<8>()
        .0
        .iter()
        .zip(0..)
        .map(|(place, number)| (number, u64::from_ne_bytes(*place)))
        .filter(|(_, place)| *place != 0)
        .collect();
    let addresses: Vec<u64> = places.iter().map(|(_, place)| *place).collect();
    let found = peek::pieces(&addresses)?;
    let read = |((number, _), node): (&(u32, u64), [u8; 64])| {
        Ok((*number, word(&node, offsets.node_tag)?, word(&node, offsets.node_value)?))
    };
    places.iter().zip(found).map(read).collect()
}

/// Address, length and pieces of a buffer; none if it is the kernel's own.
#[allow(clippy::type_complexity, reason = "three values, named where they are used")]
fn buffer(at: u64, offsets: &Offsets) -> Result<Option<(u64, u32, Vec<(u64, u32, u32)>)>, String> {
    let of = &offsets.buffer;
    let head = peek::bytes(at, of.head)?;
    if head.get(of.kernel).is_none_or(|byte| *byte != 0) {
        return Ok(None);
    }
    let (address, len) = (word(&head, of.address)?, half(&head, of.len)?);
    let [size, page, length, offset] = of.piece;
    let count = half(&head, of.pieces)? as usize;
    if count > (len as usize).div_ceil(4096) + 1 {
        return Err(format!("a buffer of {len} bytes in {count} pieces"));
    }
    let vector = peek::bytes(at + of.vector as u64, count * size)?;
    let pieces = vector
        .chunks_exact(size)
        .map(|piece| Ok((word(piece, page)?, half(piece, offset)?, half(piece, length)?)));
    let pieces: Result<Vec<_>, String> = pieces.collect();
    let mut pieces = pieces?;
    if let Some(first) = pages(offsets)? {
        for (page, ..) in &mut pieces {
            *page = page.wrapping_sub(first) / offsets.page as u64;
        }
    }
    Ok(Some((address, len, pieces)))
}

/// Where the description of page 0 would be: learnt from a page of our own.
fn pages(offsets: &Offsets) -> Result<Option<u64>, String> {
    static FIRST: OnceLock<Result<u64, String>> = OnceLock::new();
    thread_local! {
        static LEARNING: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    if LEARNING.get() {
        return Ok(None);
    }
    let learn = || {
        let page = ring::Page::new().map_err(|e| e.to_string())?;
        let number = frames(std::process::id() as i32, page.address(), 1)?;
        let number = number.first().copied().flatten().ok_or("pages are not numbered for us")?;
        LEARNING.set(true);
        let own = of(page.instance().as_fd());
        LEARNING.set(false);
        let own = own?;
        let piece = own.buffers.first().and_then(|b| b.pieces.first());
        let (at, ..) = piece.ok_or("a buffer of our own is not told")?;
        Ok(at.wrapping_sub(number.wrapping_mul(offsets.page as u64)))
    };
    FIRST.get_or_init(learn).as_ref().map(|first| Some(*first)).map_err(Clone::clone)
}

/// The numbers of the pages of a process from `address` on; none for one that is not there.
///
/// # Errors
/// They are not told.
pub fn frames(pid: i32, address: u64, count: usize) -> Result<Vec<Option<u64>>, String> {
    use std::os::unix::fs::FileExt;
    const PRESENT: u64 = 1 << 63;
    const NUMBER: u64 = (1 << 55) - 1;
    let path = format!("/proc/{pid}/pagemap");
    let file = std::fs::File::open(&path).map_err(|e| format!("{path}: {e}"))?;
    let mut bytes = vec![0; count * 8];
    file.read_exact_at(&mut bytes, address / 4096 * 8).map_err(|e| format!("{path}: {e}"))?;
    let frame = |entry: &[u8; 8]| {
        let entry = u64::from_ne_bytes(*entry);
        let number = entry & NUMBER;
        (entry & PRESENT != 0 && number != 0).then_some(number)
    };
    Ok(bytes.as_chunks::<8>().0.iter().map(frame).collect())
}

/// Number of an eventfd, whether it is asynchronous, whether others have it too.
fn eventfd(at: u64, offsets: &Offsets) -> Result<(i32, bool, bool), String> {
    let (place, mask) = offsets.eventfd_async;
    let flags = peek::bytes(at + place as u64, 1)?;
    let context = word(&peek::bytes(at + offsets.eventfd_context as u64, 8)?, 0)?;
    let id = half(&peek::bytes(context + offsets.eventfd_id as u64, 4)?, 0)?;
    // References are counted first.
    let references = half(&peek::bytes(context, 4)?, 0)?;
    let is_async = flags.first().is_some_and(|byte| byte & mask != 0);
    Ok((id as i32, is_async, references > 1))
}

/// The number of a thread, in our own process id namespace.
fn thread(task: u64, offsets: &Offsets) -> Result<Result<i32, ()>, String> {
    let pid = word(&peek::bytes(task + offsets.task_pid as u64, 8)?, 0)?;
    if pid == 0 {
        return Ok(Err(()));
    }
    let own = threads::own_level()?;
    let level = half(&peek::bytes(pid + offsets.level as u64, 4)?, 0)? as usize;
    if level < own {
        return Err("its thread is outside of our process id namespace".to_owned());
    }
    let number = pid + (offsets.numbers + own * offsets.number) as u64;
    Ok(Ok(half(&peek::bytes(number, 4)?, 0)? as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An instance of our own is told as it was made.
    #[test]
    fn the_kernel_tells_what_was_registered() {
        let Ok(page) = ring::Page::new() else { return println!("there is no io_uring here") };
        let fd = page.instance();
        let told = match of(fd.as_fd()) {
            Ok(told) => told,
            Err(e) => return println!("not here: {e}"),
        };
        assert_eq!((told.in_flight, told.issuer, told.eventfd, told.beyond), (0, None, None, None));
        assert_eq!((told.buffer_slots, told.file_slots, told.workers), (1, 0, None));
        let [buffer] = &told.buffers[..] else { panic!("one buffer: {:?}", told.buffers) };
        assert_eq!((buffer.address, buffer.len, buffer.tag), (page.address(), 4096, 0));
        let frame = frames(std::process::id() as i32, page.address(), 1).unwrap()[0].unwrap();
        assert_eq!(buffer.pieces, [(frame, 0, 4096)]);
        assert_eq!(told.clock, libc::CLOCK_MONOTONIC as u32);
    }
}
