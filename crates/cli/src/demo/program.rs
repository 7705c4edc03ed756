//! The program that is checkpointed: two processes that would notice if anything of them were lost.
//!
//! The *counter* counts thousandths of a second (about). A thread of it writes each number to the file `numbers`, to a pipe,
//! and to a deleted file that it reads back before; another thread is a TCP server that tells the number when asked. The
//! *client*, a child process, takes every number from the pipe, and for every few asks the server over one connection; it
//! writes each answer to the file `answers`. Both write what is wrong to standard error and end.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::ROLE;

/// The counter ends here, so that nothing is left running when the demonstration was killed.
const LIFE: u64 = 60_000;

/// Where the client finds the server.
const PORT: &str = "REWAKE_DEMO_PORT";

/// The directory of the program's files.
pub const DIR: &str = "REWAKE_DEMO_DIR";

/// The role of the root of the tree.
pub const COUNTER: &str = "counter";

const CLIENT: &str = "client";

/// Becomes one of the program's processes.
pub fn run(role: &OsStr) -> ExitCode {
    let dir = std::env::var_os(DIR).unwrap_or_default();
    let done = match role.to_str() {
        Some(COUNTER) => counter(dir.as_ref()),
        Some(CLIENT) => client(dir.as_ref()),
        _ => Err(format!("no such role: {}", role.display())),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("{}: {text}", role.display());
            ExitCode::FAILURE
        }
    }
}

/// Names what went wrong.
fn at<T>(what: &str, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|e| format!("{what}: {e}"))
}

fn counter(dir: &Path) -> Result<(), String> {
    // A session of its own: a tree that needs no terminal needs no --shell-job.
    at("setsid", rustix::process::setsid().map_err(io::Error::from))?;
    at("name", rustix::thread::set_name(c"demo-counter").map_err(io::Error::from))?;
    let listener = at("listen", TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    let port = at("listen", listener.local_addr())?.port();
    let (reader, writer) = at("pipe", io::pipe())?;
    let mut client = at("client", spawn_client(reader, port))?;

    let count = Arc::new(AtomicU64::new(0));
    let shown = Arc::clone(&count);
    let server = thread::Builder::new().name("server".into());
    at("thread", server.spawn(move || end_if("server", serve(&listener, &shown))))?;
    let files = Files::open(dir, writer)?;
    let ticker = thread::Builder::new().name("ticker".into());
    at("thread", ticker.spawn(move || end_if("ticker", tick(files, &count))))?;

    let status = at("client", client.wait())?;
    Err(format!("the client ended: {status}"))
}

/// A thread that fails ends the process.
fn end_if(name: &str, done: Result<(), String>) {
    if let Err(text) = done {
        eprintln!("{name}: {text}");
    }
    std::process::exit(1);
}

fn spawn_client(pipe: PipeReader, port: u16) -> io::Result<std::process::Child> {
    Command::new(std::env::current_exe()?)
        .arg0("rewake")
        .arg("demo")
        .env(ROLE, CLIENT)
        .env(PORT, port.to_string())
        .stdin(Stdio::from(pipe))
        .spawn()
}

/// Where the ticker writes to.
struct Files {
    numbers: File,
    pipe: PipeWriter,
    /// Deleted: there is only this descriptor.
    scratch: File,
}

impl Files {
    fn open(dir: &Path, pipe: PipeWriter) -> Result<Files, String> {
        let path = dir.join("scratch");
        let mut options = File::options();
        let scratch = at("scratch", options.read(true).write(true).create_new(true).open(&path))?;
        at("scratch", std::fs::remove_file(&path))?;
        let numbers = at("numbers", File::create_new(dir.join("numbers")))?;
        at("scratch", scratch.write_all_at(&0u64.to_ne_bytes(), 0))?;
        Ok(Files { numbers, pipe, scratch })
    }
}

fn tick(mut files: Files, count: &AtomicU64) -> Result<(), String> {
    for number in 1..LIFE {
        thread::sleep(Duration::from_millis(1));
        let mut last = [0; 8];
        at("scratch", files.scratch.read_exact_at(&mut last, 0))?;
        let last = u64::from_ne_bytes(last);
        if last + 1 != number {
            return Err(format!("the deleted file says {last} before {number}"));
        }
        at("scratch", files.scratch.write_all_at(&number.to_ne_bytes(), 0))?;
        count.store(number, Ordering::Relaxed);
        let line = format!("{number}\n");
        at("numbers", files.numbers.write_all(line.as_bytes()))?;
        at("pipe", files.pipe.write_all(line.as_bytes()))?;
    }
    Err("nobody ended the demonstration, so it ends by itself".into())
}

/// Answers each question, which is a number, with that number and the counter's.
fn serve(listener: &TcpListener, count: &AtomicU64) -> Result<(), String> {
    let (mut connection, _) = at("accept", listener.accept())?;
    at("connection", connection.set_nodelay(true))?;
    let questions = BufReader::new(at("connection", connection.try_clone())?);
    for question in questions.lines() {
        let question = at("connection", question)?;
        let answer = format!("{question} {}\n", count.load(Ordering::Relaxed));
        at("connection", connection.write_all(answer.as_bytes()))?;
    }
    Err("the client is gone".into())
}

fn client(dir: &Path) -> Result<(), String> {
    at("name", rustix::thread::set_name(c"demo-client").map_err(io::Error::from))?;
    let port =
        std::env::var(PORT).ok().and_then(|port| port.parse::<u16>().ok()).ok_or("no port")?;
    let mut connection = at("connect", TcpStream::connect((Ipv4Addr::LOCALHOST, port)))?;
    at("connection", connection.set_nodelay(true))?;
    let mut replies = BufReader::new(at("connection", connection.try_clone())?).lines();
    let mut answers = at("answers", File::create_new(dir.join("answers")))?;
    let mut questions = 0;
    for (line, expected) in io::stdin().lock().lines().zip(1u64..) {
        let line = at("pipe", line)?;
        if line != expected.to_string() {
            return Err(format!("the pipe brought {line} instead of {expected}"));
        }
        if expected % 4 != 0 {
            continue;
        }
        questions += 1;
        at("connection", connection.write_all(format!("{questions}\n").as_bytes()))?;
        let reply = at("connection", replies.next().ok_or("the server is gone")?)?;
        let numbers = reply.split_once(' ').and_then(|(question, count)| {
            question.parse::<u64>().ok().zip(count.parse::<u64>().ok())
        });
        match numbers {
            // What came through the pipe was counted before.
            Some((question, count)) if question == questions && count >= expected => {}
            _ => {
                return Err(format!(
                    "question {questions} at number {expected} was answered by {reply:?}"
                ));
            }
        }
        at("answers", answers.write_all(format!("{reply}\n").as_bytes()))?;
    }
    Err("the counter is gone".into())
}
