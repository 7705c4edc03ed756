//! Kernel state: connections that never stand still. A server sends back what clients outside of the tree write, a stream
//! in which every byte tells its place; both sides check all of it, while the harness checkpoints the server again and
//! again. With `ZOO_CLOSE=1` connections may end, by end of file or a reset, and are made anew: never may a byte be wrong.
//!
//! `ZOO_BIND` is where the server listens, `ZOO_CLIENTS=0`: clients come from elsewhere (see `ZOO_SERVER`).
//! `ZOO_SERVER=ADDRESS`: this is the clients only, a program of its own.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};
use zoo::net::err;
use zoo::{Check, Rng, Zoo, ensure, ensure_eq};

const CONNECTIONS: u8 = 12;
/// How far a client may be ahead of what has come back.
const AHEAD: u64 = 300_000;

/// The byte of a client's stream at a place; the first one tells whose it is.
fn byte(client: u8, at: u64) -> u8 {
    match at {
        0 => client,
        at => Rng((at / 8) ^ (u64::from(client) << 56)).next().to_le_bytes()[(at % 8) as usize],
    }
}

fn ends(e: &std::io::Error) -> bool {
    matches!(
        e.kind(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted
    )
}

struct Served {
    stream: TcpStream,
    client: u8,
    received: u64,
    back: Vec<u8>,
}

/// What became of a look at a connection.
enum Look {
    Idle,
    Moved,
    Over,
}

impl Served {
    fn serve(&mut self, buffer: &mut [u8]) -> Result<Look, String> {
        let mut look = Look::Idle;
        if self.back.len() < AHEAD as usize {
            match self.stream.read(buffer) {
                Ok(0) => return Ok(Look::Over),
                Ok(n) => {
                    for b in &buffer[..n] {
                        if self.received == 0 {
                            self.client = *b;
                        }
                        let place = format!("client {}, byte {}", self.client, self.received);
                        ensure_eq!(*b, byte(self.client, self.received), "at the server: {place}");
                        self.received += 1;
                    }
                    self.back.extend_from_slice(&buffer[..n]);
                    look = Look::Moved;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) if ends(&e) => return Ok(Look::Over),
                Err(e) => return Err(format!("the server's read: {e}")),
            }
        }
        if !self.back.is_empty() {
            match self.stream.write(&self.back) {
                Ok(n) => {
                    self.back.drain(..n);
                    look = Look::Moved;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) if ends(&e) => return Ok(Look::Over),
                Err(e) => return Err(format!("the server's write: {e}")),
            }
        }
        Ok(look)
    }
}

fn server(z: &Zoo, listener: &TcpListener, may_end: bool) -> Check {
    listener.set_nonblocking(true).map_err(err)?;
    let mut all: Vec<Served> = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let mut told = Instant::now();
    let mut total = 0u64;
    loop {
        let mut idle = true;
        while let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true).map_err(err)?;
            all.push(Served { stream, client: 0, received: 0, back: Vec::new() });
        }
        let mut failed = Ok(());
        let mut over = 0;
        all.retain_mut(|served| {
            let before = served.received;
            match served.serve(&mut buffer) {
                Ok(Look::Idle) => {}
                Ok(Look::Moved) => idle = false,
                Ok(Look::Over) => over += 1,
                Err(e) => failed = Err(e),
            }
            total += served.received - before;
            true
        });
        failed?;
        if over > 0 {
            let done = z.path("clients_done").exists() || z.path("check").exists();
            ensure!(may_end || done, "{over} connections have ended");
            all.retain_mut(|s| !matches!(s.serve(&mut buffer), Ok(Look::Over)));
        }
        if told.elapsed() > Duration::from_millis(3) {
            told = Instant::now();
            z.publish("total", &total.to_string());
            if z.path("clients_done").exists() && all.is_empty() {
                return Ok(());
            }
        }
        if idle {
            zoo::nap(1);
        }
    }
}

struct Client {
    stream: TcpStream,
    sent: u64,
    back: u64,
}

impl Client {
    fn new(server: SocketAddr) -> Result<Client, std::io::Error> {
        let stream = TcpStream::connect_timeout(&server, Duration::from_secs(10))?;
        stream.set_nonblocking(true)?;
        Ok(Client { stream, sent: 0, back: 0 })
    }

    /// Writes a piece and reads one; whether the connection is over.
    fn talk(&mut self, number: u8, rng: &mut Rng, writes: bool) -> Result<bool, String> {
        if writes && self.sent < self.back + AHEAD {
            let len = rng.next() % 20_000 + 1;
            let piece: Vec<u8> = (self.sent..self.sent + len).map(|at| byte(number, at)).collect();
            match self.stream.write(&piece) {
                Ok(n) => self.sent += n as u64,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) if ends(&e) => return Ok(true),
                Err(e) => return Err(format!("client {number}'s write: {e}")),
            }
        }
        let mut buffer = vec![0; 30_000];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(n) => {
                for b in &buffer[..n] {
                    ensure_eq!(
                        *b,
                        byte(number, self.back),
                        "at client {number}: byte {}",
                        self.back
                    );
                    self.back += 1;
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) if ends(&e) => return Ok(true),
            Err(e) => return Err(format!("client {number}'s read: {e}")),
        }
        Ok(false)
    }
}

/// Connects to a server that may be away just now.
fn call_again(server: SocketAddr) -> Result<Client, String> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match Client::new(server) {
            Ok(client) => return Ok(client),
            Err(e) if e.kind() == ErrorKind::ConnectionRefused || ends(&e) => {}
            Err(e) => return Err(format!("cannot connect again: {e}")),
        }
        ensure!(Instant::now() < until, "the server does not come back");
        zoo::nap(2);
    }
}

fn clients(z: &Zoo, server: SocketAddr, may_end: bool) -> Check {
    let mut rng = Rng(7);
    let mut all: HashMap<u8, Client> = HashMap::new();
    for number in 1..=CONNECTIONS {
        all.insert(number, Client::new(server).map_err(err)?);
    }
    z.publish("connected", "");
    let mut ended = 0;
    let mut until = None;
    loop {
        let last = z.path("check").exists();
        if last && until.is_none() {
            until = Some(Instant::now() + Duration::from_secs(15));
        }
        for number in 1..=CONNECTIONS {
            let Some(client) = all.get_mut(&number) else { continue };
            let over = client.talk(number, &mut rng, !last)?;
            let complete = last && client.back == client.sent;
            if over && !complete {
                ensure!(may_end, "connection {number} has ended after {} bytes", client.back);
                ended += 1;
                all.remove(&number);
                all.insert(number, call_again(server)?);
            } else if complete {
                all.remove(&number);
            }
        }
        if all.is_empty() {
            z.note("ended", &ended.to_string());
            z.publish("clients_done", "");
            return Ok(());
        }
        ensure!(
            until.is_none_or(|u| Instant::now() < u),
            "the rest of {} streams does not come",
            all.len()
        );
        if z.is_over() {
            return Ok(());
        }
        zoo::nap(1);
    }
}

fn main() {
    zoo::run(|z| {
        let may_end = z.param("ZOO_CLOSE", 0) == 1;
        if let Ok(address) = std::env::var("ZOO_SERVER") {
            z.ready()?;
            return clients(z, address.parse().map_err(|e| format!("{address}: {e}"))?, may_end);
        }
        let listener = match std::env::var("ZOO_BIND") {
            Ok(bind) => TcpListener::bind(&bind).map_err(|e| format!("{bind}: {e}"))?,
            Err(_) => zoo::net::listener("127.0.0.1")?,
        };
        let address = listener.local_addr().map_err(err)?;
        if z.param("ZOO_CLIENTS", 1) == 1 {
            z.outside(move |z| clients(z, address, may_end))?;
        }
        z.ready()?;
        server(z, &listener, may_end)
    })
}
