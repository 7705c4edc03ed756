//! TCP servers with clients on other hosts: network namespaces joined by cables.

use crate::harness::{Fail, Fs, NotReady, Run, TIMEOUT, Tool};
use crate::netns::{Net, ip};
use crate::programs::by_name;
use crate::refusals::refused;
use crate::tcp::{ESTABLISHED, nothing_locked, progress, ready, wait_for};
use crate::view::View;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Two hosts that can have the address 10.77.0.2, and where this one, 10.77.0.1, looks for it.
struct Hosts {
    hosts: [Net; 2],
    dir: PathBuf,
}

impl Hosts {
    fn new() -> Result<Hosts, NotReady> {
        let hosts = [Net::new().map_err(NotReady::Skip)?, Net::new().map_err(NotReady::Skip)?];
        let dir = crate::harness::base(Fs::Memory);
        ip(&dir, "addr add 10.77.0.1/32 dev lo")?;
        for (n, host) in hosts.iter().enumerate() {
            host.cable(&dir, &format!("host{n}"), "eth0")?;
            host.within(|| -> Result<(), NotReady> {
                ip(&dir, "addr add 10.77.0.2/32 dev eth0")?;
                ip(&dir, "link set eth0 up")?;
                ip(&dir, "route add 10.77.0.1/32 dev eth0")
            })??;
        }
        let hosts = Hosts { hosts, dir };
        hosts.lead_to(0)?;
        Ok(hosts)
    }

    fn lead_to(&self, n: usize) -> Result<(), NotReady> {
        ip(&self.dir, &format!("route replace 10.77.0.2/32 dev host{n} src 10.77.0.1"))
    }

    /// Moves a server from one to the other. Until it is there, its new host would answer that it is not: packets go to the
    /// old one, where they are lost.
    fn carry(
        &self,
        tool: &Tool,
        server: &mut Run,
        before: &View,
        (n, options): (usize, &[&str]),
    ) -> Result<(), NotReady> {
        let (from, to) = (n % 2, (n + 1) % 2);
        let images = server.images(n)?;
        self.hosts[from].within(|| {
            server.dump(tool, &images, ESTABLISHED)?;
            server.gone(&before.pids(), "after dump")
        })??;
        if options.contains(&"--no-verify") {
            of_another_boot(&images)?;
        }
        self.hosts[to].within(|| server.restore(tool, &images, options).map(drop))??;
        self.lead_to(to)
    }
}

/// A server moves between two hosts, there and back again and again, with its address; its clients on a third one go on.
pub fn two_hosts(tool: &Tool) -> Result<(), NotReady> {
    let hosts = Hosts::new()?;
    let (mut server, before) = hosts.hosts[0].within(|| ready(&by_name("tcp_chaos_server")?))??;
    let (clients, outside) = ready(&by_name("tcp_chaos_clients")?)?;
    wait_for(&clients, "connected")?;
    for n in 0..10 {
        progress(&server)?;
        hosts.carry(tool, &mut server, &before, (n, ESTABLISHED))?;
    }
    progress(&server)?;
    // From now on connections may end.
    fs::write(server.dir.join("clients_done"), "").map_err(|e| e.to_string())?;
    clients.check(&outside)?;
    server.check(&before)?;
    Ok(())
}

/// Has images say that the machine has started anew since.
fn of_another_boot(images: &Path) -> Result<(), Fail> {
    let boot = fs::read("/proc/sys/kernel/random/boot_id").map_err(|e| e.to_string())?;
    let (boot, path) = (boot.trim_ascii(), images.join("rewake.img"));
    let mut bytes = fs::read(&path).map_err(|e| e.to_string())?;
    let at = bytes.windows(boot.len()).position(|window| window == boot);
    bytes[at.ok_or("rewake.img does not tell the boot")?] ^= 1;
    fs::write(&path, bytes).map_err(|e| e.to_string())
}

/// The same of connections that the server has not accepted yet. To a machine that has started anew they go without their
/// timestamps, which would go back.
pub fn backlog_moves(tool: &Tool) -> Result<(), NotReady> {
    let hosts = Hosts::new()?;
    for options in [ESTABLISHED, &["--tcp-established", "--no-verify"]] {
        hosts.lead_to(0)?;
        let program = by_name("tcp_backlog_server")?;
        let mut server =
            hosts.hosts[0].within(|| Run::spawn(program.name, &program.start(), Fs::Memory))??;
        wait_for(&server, "address")?;
        let mut start = program.start();
        let of = server.dir.to_string_lossy().into_owned();
        start.env = vec![("ZOO_SERVER".to_owned(), of)];
        let clients = Run::ready("tcp_backlog_clients", &start, Fs::Memory)?;
        let outside = clients.view()?;
        wait_for(&server, "ready")?;
        let before = server.view()?;
        for n in 0..3 {
            hosts.carry(tool, &mut server, &before, (n, options))?;
        }
        server.check(&before)?;
        clients.check(&outside)?;
    }
    Ok(())
}

/// A client whose handshake is not done when the server is saved is not told that there is nobody: it tries again, and the
/// restored server has it.
pub fn half_open(tool: &Tool, method: &str) -> Result<(), NotReady> {
    let hosts = Hosts::new()?;
    let server = by_name("tcp_listen_host")?;
    let dir = &hosts.dir;
    // The server's answers go astray.
    hosts.hosts[0].within(|| {
        ip(dir, "neigh replace 10.77.0.1 lladdr 02:00:00:00:00:77 nud permanent dev eth0")
    })??;
    let (mut run, before) = hosts.hosts[0].within(|| ready(&server))??;
    let port = fs::read_to_string(run.dir.join("port")).map_err(|e| e.to_string())?;
    let address = format!("10.77.0.2:{}", port.trim());
    let net = Net::current()?;
    let done = std::thread::scope(|scope| -> Result<(), NotReady> {
        // It sends its SYN again after one second and after three.
        let client = scope.spawn(|| net.within(|| TcpStream::connect(&address)));
        std::thread::sleep(Duration::from_millis(300));
        let images = run.images(1)?;
        hosts.hosts[0].within(|| {
            let options = ["--tcp-established", "--network-lock", method];
            run.dump(tool, &images, &options)?;
            run.gone(&before.pids(), "after dump")
        })??;
        std::thread::sleep(Duration::from_millis(1300));
        hosts.hosts[0].within(|| ip(dir, "neigh del 10.77.0.1 dev eth0"))??;
        hosts.hosts[0].within(|| run.restore(tool, &images, ESTABLISHED).map(drop))??;
        let connected = client.join().map_err(|_| "the client panicked".to_owned())??;
        let mut stream = connected.map_err(|e| format!("{method}: the client: {e}"))?;
        stream.set_read_timeout(Some(TIMEOUT)).map_err(|e| e.to_string())?;
        stream.write_all(b"x").map_err(|e| e.to_string())?;
        let mut answer = [0];
        stream.read_exact(&mut answer).map_err(|e| format!("{method}: answer: {e}"))?;
        hosts.hosts[0].within(|| nothing_locked(&run, tool))??;
        Ok(())
    });
    done?;
    run.check(&before)?;
    Ok(())
}

/// Packets of our own do not reach a listening socket that is bound to an interface.
pub fn backlog_of_an_interface(tool: &Tool) -> Result<(), NotReady> {
    let other = Net::new().map_err(NotReady::Skip)?;
    let dir = crate::harness::base(Fs::Memory);
    other.cable(&dir, "zoo0", "zoo1")?;
    ip(&dir, "addr add 10.78.0.1/24 dev zoo0")?;
    other.within(|| {
        ip(&dir, "addr add 10.78.0.2/24 dev zoo1")?;
        ip(&dir, "link set zoo1 up")
    })??;
    let (run, before) = ready(&by_name("tcp_listen_device_still")?)?;
    let port = fs::read_to_string(run.dir.join("port")).map_err(|e| e.to_string())?;
    let address = format!("10.78.0.1:{}", port.trim());
    let client = other.within(|| TcpStream::connect(&address).map_err(|e| e.to_string()))??;
    let images = run.images(1)?;
    let done = run.try_dump(tool, run.root, &images, ESTABLISHED)?;
    let words = ["1 connection waits to be accepted", "SO_BINDTODEVICE", "--skip-in-flight"];
    refused(&run, tool, &done, &images.join("dump.log"), &words)?;
    drop(client);
    run.same(&before, "after the refused dump", &[])?;
    Ok(())
}
