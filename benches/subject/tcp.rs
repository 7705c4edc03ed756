//! TCP connections on the loopback.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

/// What waits in each queue.
const QUEUED: [u8; 1000] = [7; 1000];

fn text(e: io::Error) -> String {
    format!("TCP: {e}")
}

/// So many connections with both ends here, and data in all their receive queues.
pub fn within(count: usize) -> Result<Vec<(TcpStream, TcpStream)>, String> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    let address = listener.local_addr().map_err(text)?;
    let pair = || -> io::Result<(TcpStream, TcpStream)> {
        let mut client = TcpStream::connect(address)?;
        let (mut server, _) = listener.accept()?;
        client.write_all(&QUEUED)?;
        server.write_all(&QUEUED)?;
        Ok((client, server))
    };
    (0..count).map(|_| pair().map_err(text)).collect()
}

/// The server's ends of so many connections; the clients are in a process of their own, which is no child of this one and
/// ends with the first connection.
pub fn server(count: usize) -> Result<Vec<TcpStream>, String> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    let address = listener.local_addr().map_err(text)?;
    outside(move || clients(address, count))?;
    let accept = || -> io::Result<TcpStream> {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(&QUEUED)?;
        Ok(stream)
    };
    (0..count).map(|_| accept().map_err(text)).collect()
}

fn clients(address: SocketAddr, count: usize) -> io::Result<()> {
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(TcpStream::connect(address)?);
    }
    if let Some(first) = all.first_mut() {
        while first.read(&mut [0; 4096])? != 0 {}
    }
    Ok(())
}

/// Runs `body` in a grandchild in a session of its own.
fn outside(body: impl FnOnce() -> io::Result<()>) -> Result<(), String> {
    // SAFETY: there is one thread, so that the children may go on as the parent would; then integers only.
    unsafe {
        let child = libc::fork();
        if child < 0 {
            return Err(format!("fork: {}", io::Error::last_os_error()));
        }
        if child > 0 {
            libc::waitpid(child, std::ptr::null_mut(), 0);
            return Ok(());
        }
        libc::setsid();
        if libc::fork() == 0 {
            libc::close_range(3, u32::MAX, 0);
            // The pipe to the bench must not stay open here.
            libc::dup2(0, 1);
            let _ = body();
        }
        libc::_exit(0)
    }
}
