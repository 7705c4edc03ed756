//! What the flavours do not reach of sockets other than TCP: dumps that must be refused, each in its own words, and
//! restores where an address or an interface is taken or not there. Each trial has a network namespace of its own.

use crate::flavours::{finish, started};
use crate::harness::{Fs, NotReady, Run, Tool, exists};
use crate::netns::{Net, ip};
use crate::programs::by_name;
use crate::refusals::{held_by_us, refused};
use crate::trial;
use libtest_mimic::Trial;
use std::net::UdpSocket;

/// Programs that a dump refuses, and words of the refusal.
const REFUSED: &[(&str, &[&str])] = &[
    ("socket_cork", &["UDP_CORK", "try again once the program has sent it"]),
    ("socket_more", &["MSG_MORE", "try again once the program has sent it"]),
    ("socket_ebpf", &["eBPF filter", "SO_ATTACH_BPF"]),
    (
        "socket_reuseport",
        &["UDP socket 127.0.0.1:", "an eBPF program decides", "SO_DETACH_REUSEPORT_BPF"],
    ),
    ("socket_ring", &["of a socket", "a part only of its rings", "unmap it"]),
    ("socket_xdp", &["AF_XDP"]),
    ("socket_alg", &["kernel crypto sockets (AF_ALG)"]),
    ("socket_can", &["CAN bus sockets (AF_CAN)"]),
    ("socket_tipc", &["TIPC sockets (AF_TIPC)"]),
    ("socket_sctp", &["SCTP sockets"]),
    ("socket_bluetooth", &["Bluetooth sockets (AF_BLUETOOTH)"]),
    ("socket_answer", &["an answer", "try again once the program has read it", "--skip-in-flight"]),
];

type Body = Box<dyn FnOnce(&Tool) -> Result<(), NotReady> + Send>;

/// All trials about such sockets.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: String, body: Body| {
        let tool = tool.clone();
        all.push(trial(format!("sockets::{name}"), move || {
            finish(
                Net::new()
                    .map_err(NotReady::Skip)
                    .and_then(|net| net.within(|| body(&tool)).map_err(NotReady::Fail)?),
            )
        }));
    };
    for (program, words) in REFUSED {
        let name = program.replace("socket_", "refused_");
        add(name, Box::new(move |tool| is_refused(tool, program, words)));
    }
    add("udp_port_in_use".to_owned(), Box::new(udp_port_in_use));
    add("netlink_address_in_use".to_owned(), Box::new(netlink_address_in_use));
    for (name, program, words) in [
        (
            "address_is_missing",
            "socket_address",
            "no network interface here has the address 10.78.0.1",
        ),
        ("device_is_missing", "socket_device", "network interface zoo0"),
        (
            "interface_of_a_group_is_missing",
            "socket_group",
            "239.7.7.7 on a missing network interface zoo0",
        ),
        ("interface_of_packets_is_missing", "socket_packet", "a missing network interface zoo0"),
    ] {
        add(name.to_owned(), Box::new(move |tool| missing(tool, program, words)));
    }
    all
}

/// A program that cannot be saved is told why, and goes on.
fn is_refused(tool: &Tool, program: &str, words: &[&str]) -> Result<(), NotReady> {
    let (run, before) = started(&by_name(program)?, Fs::Memory)?;
    let images = run.images(1)?;
    let done = run.try_dump(tool, run.root, &images, &[])?;
    refused(&run, tool, &done, &images.join("dump.log"), words)?;
    run.same(&before, "after the refused dump", &[])?;
    run.check(&before)?;
    Ok(())
}

/// Dumps the program, lets `spoil` be in the way of the restore, and restores it once that is undone.
fn spoiled<T>(
    tool: &Tool,
    program: &str,
    spoil: impl FnOnce(&Run) -> Result<T, NotReady>,
    words: &[&str],
    mend: impl FnOnce(T) -> Result<(), NotReady>,
) -> Result<(), NotReady> {
    let (mut run, before) = started(&by_name(program)?, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after dump")?;
    let obstacle = spoil(&run)?;
    let done = run.try_restore(tool, &images, &[])?;
    refused(&run, tool, &done, &images.join("restore.log"), words)?;
    if let Some(pid) = before.pids().iter().find(|pid| exists(**pid)) {
        return Err(run.fail(format!("process {pid} is left")).into());
    }
    mend(obstacle)?;
    // A trial beside this one may have forked: until its child executes a program, that has what we have let go of.
    std::thread::sleep(std::time::Duration::from_millis(100));
    run.restore(tool, &images, &[])?;
    run.check(&before)?;
    Ok(())
}

fn udp_port_in_use(tool: &Tool) -> Result<(), NotReady> {
    let [held, us] = held_by_us();
    let take = |run: &Run| {
        let port = std::fs::read_to_string(run.dir.join("port")).map_err(|e| e.to_string())?;
        let address = format!("127.0.0.1:{}", port.trim());
        Ok(UdpSocket::bind(&address).map_err(|e| format!("{address}: {e}"))?)
    };
    spoiled(tool, "socket_udp", take, &["127.0.0.1:", &held, &us], |socket| {
        drop(socket);
        Ok(())
    })
}

fn netlink_address_in_use(tool: &Tool) -> Result<(), NotReady> {
    let [held, us] = held_by_us();
    let held = format!("its address 7000000 is {held}");
    let take = |_: &Run| {
        use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
        // SAFETY: integers; the descriptor is new. The address is live for its length.
        unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE);
            let fd = OwnedFd::from_raw_fd(zoo::ok(fd as i64, "socket")? as i32);
            let mut address: libc::sockaddr_nl = std::mem::zeroed();
            address.nl_family = libc::AF_NETLINK as u16;
            address.nl_pid = 7_000_000;
            let len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
            zoo::check(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len), "bind")?;
            Ok(fd)
        }
    };
    spoiled(tool, "socket_netlink", take, &[&held, &us], |fd| {
        drop(fd);
        Ok(())
    })
}

/// The interface zoo0 with its address 10.78.0.1 is gone at the restore.
fn missing(tool: &Tool, program: &str, words: &str) -> Result<(), NotReady> {
    let other = Net::new().map_err(NotReady::Skip)?;
    let dir = crate::harness::base(Fs::Memory);
    let connect = || -> Result<(), NotReady> {
        other.cable(&dir, "zoo0", "zoo1")?;
        ip(&dir, "addr add 10.78.0.1/24 dev zoo0")
    };
    connect()?;
    let cut = |_: &Run| ip(&dir, "link del zoo0");
    spoiled(tool, program, cut, &[words], |()| connect())
}
