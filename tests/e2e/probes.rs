//! Questions asked from outside the tree.

use crate::harness::{Fail, Run};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Connects to the port in `DIR/port`, sends a line and expects it back.
pub fn echo(run: &Run) -> Result<(), Fail> {
    let port = std::fs::read_to_string(run.dir.join("port")).map_err(|e| format!("port: {e}"))?;
    let mut stream = TcpStream::connect(format!("127.0.0.1:{port}"))
        .map_err(|e| format!("connect to {port}: {e}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(|e| e.to_string())?;
    stream.write_all(b"who is there?").map_err(|e| format!("send: {e}"))?;
    let mut text = [0u8; 13];
    stream.read_exact(&mut text).map_err(|e| format!("echo: {e}"))?;
    if &text != b"who is there?" {
        return Err(format!("the echo is {:?}", String::from_utf8_lossy(&text)));
    }
    // A client that goes away at once must not leave a TIME_WAIT that holds the port: the client closes first.
    drop(stream);
    std::thread::sleep(Duration::from_millis(20));
    Ok(())
}
