//! Kernel state: connected TCP sockets, both ends in the tree (in different processes), with data queued both ways, with
//! options, and one half closed. Dumped with --tcp-established.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use zoo::{Rng, ensure, ensure_eq};

fn err(e: std::io::Error) -> String {
    e.to_string()
}

fn data(seed: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    Rng(seed).fill(&mut data);
    data
}

fn receive(stream: &mut TcpStream, seed: u64, len: usize, what: &str) -> zoo::Check {
    let mut got = vec![0; len];
    stream.read_exact(&mut got).map_err(|e| format!("{what}: {e}"))?;
    ensure!(got == data(seed, len), "{what} differs");
    Ok(())
}

fn main() {
    zoo::run(|z| {
        let listener = zoo::net::listener("127.0.0.1")?;
        let pair = || -> Result<(TcpStream, TcpStream), String> {
            let client = TcpStream::connect(listener.local_addr().map_err(err)?).map_err(err)?;
            let (server, _) = listener.accept().map_err(err)?;
            for s in [&client, &server] {
                s.set_read_timeout(Some(std::time::Duration::from_secs(10))).map_err(err)?;
            }
            Ok((client, server))
        };
        let (mut quiet, mut quiet_peer) = pair()?;
        let (mut near, mut far) = pair()?;
        let (mut half, mut half_peer) = pair()?;
        near.set_nodelay(true).map_err(err)?;
        near.write_all(&data(1, 50_000)).map_err(err)?;
        far.write_all(&data(2, 30_000)).map_err(err)?;
        half.write_all(b"no more").map_err(err)?;
        half.shutdown(Shutdown::Write).map_err(err)?;
        let addresses = |s: &TcpStream| (s.local_addr().ok(), s.peer_addr().ok());
        let before = [&quiet, &near, &far, &half].map(addresses);
        let child = z.fork(|z| {
            z.publish("up", "");
            z.wait_for_check();
            receive(&mut far, 1, 50_000, "queue towards the child")?;
            far.write_all(&data(3, 400_000)).map_err(err)?;
            let mut text = String::new();
            half_peer.read_to_string(&mut text).map_err(err)?;
            ensure_eq!(text, "no more", "what the closed half had sent");
            half_peer.write_all(b"still open").map_err(err)?;
            z.publish("answered", "");
            z.wait_for("end")
        })?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!([&quiet, &near, &far, &half].map(addresses), before, "addresses");
        ensure!(near.nodelay().map_err(err)?, "TCP_NODELAY");
        ensure!(!quiet.nodelay().map_err(err)?, "TCP_NODELAY of the quiet one");
        quiet.write_all(b"first words").map_err(err)?;
        let mut text = [0u8; 11];
        quiet_peer.read_exact(&mut text).map_err(err)?;
        ensure_eq!(&text, b"first words", "what the quiet pair says");
        receive(&mut near, 2, 30_000, "queue towards the root")?;
        receive(&mut near, 3, 400_000, "what the child sent after")?;
        z.wait_for("answered").map_err(|e| format!("{e}; {:?}", z.complaints()))?;
        let mut text = [0u8; 10];
        half.read_exact(&mut text).map_err(err)?;
        ensure_eq!(&text, b"still open", "what came through the open half");
        ensure!(listener.as_raw_fd() >= 0, "listener");
        z.publish("end", "");
        z.join(child)
    })
}
