//! Real servers with clients outside of the tree: Redis and memcached with connections that go on, nginx and haproxy with
//! `--tcp-close`, PostgreSQL. Each in a network namespace of its own, on port 7000.

use crate::flavours::{finish, unless_later};
use crate::harness::{Fail, Fs, NotReady, Run, Start, TIMEOUT, Tool, execute_for, kill, set_mode};
use crate::netns::Net;
use crate::real::{find, start};
use crate::view::{self, View};
use crate::{reaper, skip, trial};
use libtest_mimic::Trial;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const PORT: u16 = 7000;

/// All trials with servers.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("real::{name}"), move || {
            if tool.is_criu {
                return Ok(skip("real servers are tried with rewake"));
            }
            let done = Net::new().map_err(NotReady::Skip).and_then(|net| {
                net.within(|| body(&tool)).unwrap_or_else(|e| Err(NotReady::Skip(e)))
            });
            finish(unless_later(done))
        }));
    };
    add("redis", redis);
    add("memcached", memcached);
    add("nginx", nginx);
    add("nginx_copies", nginx_copies);
    add("haproxy", haproxy);
    add("postgresql", postgresql);
    all
}

/// A line-based client.
struct Client(BufReader<TcpStream>);

impl Client {
    /// Connects as soon as the server listens.
    fn new(run: &Run) -> Result<Client, Fail> {
        Client::at(run, PORT)
    }

    fn at(run: &Run, port: u16) -> Result<Client, Fail> {
        let until = Instant::now() + TIMEOUT;
        loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(TIMEOUT)).map_err(|e| e.to_string())?;
                    return Ok(Client(BufReader::new(stream)));
                }
                Err(e) if Instant::now() > until => return Err(run.fail(format!("connect: {e}"))),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn send(&mut self, text: &str) -> Result<(), Fail> {
        self.0.get_mut().write_all(text.as_bytes()).map_err(|e| format!("send of {text:?}: {e}"))
    }

    fn line(&mut self) -> Result<String, Fail> {
        let mut line = String::new();
        self.0.read_line(&mut line).map_err(|e| format!("answer: {e}"))?;
        Ok(line.trim_end().to_owned())
    }

    /// Sends a line and expects these lines.
    fn ask(&mut self, question: &str, answers: &[&str]) -> Result<(), Fail> {
        self.send(&format!("{question}\r\n"))?;
        for wanted in answers {
            let got = self.line()?;
            if got != *wanted {
                return Err(format!("{question:?} is answered by {got:?}, not {wanted:?}"));
            }
        }
        Ok(())
    }
}

/// Dump to death and restore; the tree may be of any shape.
fn cycle(run: &mut Run, tool: &Tool, n: usize, restore: &[&str]) -> Result<(), Fail> {
    let images = run.images(n)?;
    let pids = view::descendants(run.root);
    run.dump(tool, &images, &["--tcp-established"])?;
    run.gone(&pids, &format!("after dump {n}"))?;
    run.restore(tool, &images, restore)?;
    Ok(())
}

/// Ends the server.
fn end(run: &Run) -> Result<(), Fail> {
    let view: View = run.view()?;
    run.kill_tree(&view)
}

fn spawn(name: &str, argv: &[&Path], more: &[&str]) -> Result<Run, Fail> {
    let mut start: Start = start(argv);
    start.give_dir = false;
    start.argv.extend(more.iter().map(Into::into));
    Run::spawn(name, &start, Fs::Disk)
}

/// Clients that talk, one that waits for another's word (BLPOP), and one that has sent half of a command.
fn redis(tool: &Tool) -> Result<(), NotReady> {
    let server = find("redis-server")?;
    let port = PORT.to_string();
    let options = ["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
    let mut run = spawn("redis", &[&server], &options)?;
    let mut talker = Client::new(&run)?;
    let mut waiter = Client::new(&run)?;
    let mut half = Client::new(&run)?;
    let result = (|| -> Result<(), Fail> {
        talker.ask("SET key value", &["+OK"])?;
        half.send("GET k")?;
        for n in 1..=5 {
            waiter.send("BLPOP list 0\r\n")?;
            talker.ask("INCR count", &[&format!(":{}", n * 2 - 1)])?;
            cycle(&mut run, tool, n, &["--tcp-established"])?;
            talker.ask("INCR count", &[&format!(":{}", n * 2)])?;
            talker.ask("LPUSH list word", &[":1"])?;
            for wanted in ["*2", "$4", "list", "$4", "word"] {
                let got = waiter.line()?;
                if got != wanted {
                    return Err(format!("who waited is told {got:?}, not {wanted:?}"));
                }
            }
        }
        for n in 6..=8 {
            run.dump(tool, &run.images(n)?, &["--tcp-established", "--leave-running"])?;
            talker.ask("GET key", &["$5", "value"])?;
        }
        half.ask("ey", &["$5", "value"])?;
        Client::new(&run)?.ask("PING", &["+PONG"])
    })();
    result.map_err(|e| run.fail(e))?;
    end(&run)?;
    Ok(())
}

fn memcached(tool: &Tool) -> Result<(), NotReady> {
    let server = find("memcached")?;
    let port = PORT.to_string();
    let mut run =
        spawn("memcached", &[&server], &["-l", "127.0.0.1", "-p", &port, "-u", "root", "-t", "4"])?;
    let mut clients = (0..8).map(|_| Client::new(&run)).collect::<Result<Vec<_>, _>>()?;
    let result = (|| -> Result<(), Fail> {
        clients[0].ask("set n 0 0 1\r\n0", &["STORED"])?;
        let mut count = 0;
        for n in 1..=5 {
            cycle(&mut run, tool, n, &["--tcp-established"])?;
            for client in &mut clients {
                count += 1;
                client.ask("incr n 1", &[&count.to_string()])?;
            }
        }
        Client::new(&run)?.ask("get n", &["VALUE n 0 2", "40", "END"])
    })();
    result.map_err(|e| run.fail(e))?;
    end(&run)?;
    Ok(())
}

/// Asks a server of HTTP on a connection that stays open: the body.
fn get(client: &mut Client) -> Result<String, Fail> {
    client.send("GET / HTTP/1.1\r\nHost: zoo\r\n\r\n")?;
    let status = client.line()?;
    if !status.starts_with("HTTP/1.1 200") {
        return Err(format!("the answer is {status:?}"));
    }
    let mut len = 0;
    loop {
        let line = client.line()?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            len = value.trim().parse().map_err(|e| format!("{line:?}: {e}"))?;
        }
    }
    let mut body = vec![0; len];
    client.0.read_exact(&mut body).map_err(|e| format!("body: {e}"))?;
    Ok(String::from_utf8_lossy(&body).trim().to_owned())
}

/// A server of HTTP is restored with `--tcp-close`: who was connected learns it and connects again.
fn serves_again(tool: &Tool, run: &mut Run) -> Result<(), Fail> {
    let body = |client: &mut Client, when: &str| match get(client) {
        Ok(body) if body == "hello" => Ok(()),
        other => Err(format!("{when}: {other:?}")),
    };
    for n in 1..=3 {
        let mut kept = Client::new(run)?;
        let mut idle = Client::new(run)?;
        body(&mut kept, "before the dump")?;
        cycle(run, tool, n, &["--tcp-close"])?;
        for client in [&mut kept, &mut idle] {
            // The first words go to a host that knows nothing of the connection, which then says so.
            let _ = client.send("GET / HTTP/1.1\r\nHost: zoo\r\n\r\n");
            match client.0.read(&mut [0; 16]) {
                Ok(0) => {}
                Err(e)
                    if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
                other => return Err(format!("an old connection after restore {n}: {other:?}")),
            }
        }
        body(&mut Client::new(run)?, "a new connection")?;
    }
    Ok(())
}

fn nginx(tool: &Tool) -> Result<(), NotReady> {
    let (mut run, _place) = start_nginx()?;
    let result = serves_again(tool, &mut run);
    result.map_err(|e| run.fail(e))?;
    end(&run)?;
    Ok(())
}

/// A tree of several processes that share a listening socket, several times, each at a port of its own.
fn nginx_copies(tool: &Tool) -> Result<(), NotReady> {
    const COPIES: u16 = 3;
    let (run, _place) = start_nginx()?;
    let result = (|| -> Result<(), Fail> {
        get(&mut Client::new(&run)?)?;
        let pids = view::descendants(run.root);
        let images = run.images(1)?;
        run.dump(tool, &images, &["--tcp-established"])?;
        run.gone(&pids, "after the dump")?;
        let (count, first) = (COPIES.to_string(), PORT + 1);
        let rule = format!(":{PORT}=:{{{first}+i}}");
        let done =
            run.try_restore(tool, &images, &["--copies", &count, "--replace-address", &rule])?;
        if !done.success() {
            return Err(format!("restore --copies {COPIES}: {}", done.text));
        }
        for round in 0..3 {
            for i in 0..COPIES {
                let body = get(&mut Client::at(&run, first + i)?)?;
                if body != "hello" {
                    return Err(format!("copy {i} in round {round} says {body:?}"));
                }
            }
        }
        let roots: Vec<i32> = done.text.lines().filter_map(|line| line.parse().ok()).collect();
        let sizes: Vec<usize> = roots.iter().map(|root| view::descendants(*root).len()).collect();
        // With its root each namespace ends.
        roots.iter().for_each(|root| crate::harness::kill(*root, libc::SIGKILL));
        if sizes != vec![pids.len(); usize::from(COPIES)] {
            return Err(format!("trees of {sizes:?} processes, not {}", pids.len()));
        }
        Ok(())
    })();
    result.map_err(|e| run.fail(e))?;
    Ok(())
}

fn start_nginx() -> Result<(Run, Place), NotReady> {
    let server = find("nginx")?;
    let place = Place::new("nginx")?;
    fs::create_dir_all(place.0.join("html")).map_err(|e| e.to_string())?;
    fs::write(place.0.join("html/index.html"), "hello\n").map_err(|e| e.to_string())?;
    let conf = place.0.join("nginx.conf");
    let dir = place.0.display();
    let text = format!(
        "daemon off; user root; worker_processes 2; pid {dir}/pid; error_log {dir}/error.log;\n\
         events {{}}\n\
         http {{ access_log off; client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2;\n\
         fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;\n\
         server {{ listen 127.0.0.1:{PORT}; root {dir}/html; }} }}\n"
    );
    fs::write(&conf, text).map_err(|e| e.to_string())?;
    Ok((spawn("nginx", &[&server, Path::new("-c"), &conf], &[])?, place))
}

fn haproxy(tool: &Tool) -> Result<(), NotReady> {
    let server = find("haproxy").or_else(|_| find("../sbin/haproxy"))?;
    let place = Place::new("haproxy")?;
    let conf = place.0.join("haproxy.cfg");
    let text = format!(
        "global\n  nbthread 2\ndefaults\n  mode http\n  timeout client 1m\n  timeout server 1m\n  timeout connect 5s\n\
         frontend zoo\n  bind 127.0.0.1:{PORT}\n  http-request return status 200 content-type text/plain string hello\n"
    );
    fs::write(&conf, text).map_err(|e| e.to_string())?;
    let mut run = spawn("haproxy", &[&server, Path::new("-db"), Path::new("-f"), &conf], &[])?;
    let result = serves_again(tool, &mut run);
    result.map_err(|e| run.fail(e))?;
    end(&run)?;
    Ok(())
}

/// A directory for a server's files, gone with it.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Result<Place, Fail> {
        static PLACES: AtomicU32 = AtomicU32::new(0);
        let n = PLACES.fetch_add(1, Ordering::Relaxed);
        let dir = crate::harness::base(Fs::Disk)
            .join(format!("rewake-e2e-{}-{name}.{n}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        set_mode(&dir, 0o777)?;
        Ok(Place(dir))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The newest installed PostgreSQL.
fn postgres_programs() -> Result<PathBuf, NotReady> {
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("bin"))
        .filter(|bin| bin.join("pgbench").is_file() && bin.join("initdb").is_file())
        .collect();
    found.sort();
    found.pop().ok_or_else(|| NotReady::Skip("PostgreSQL is not installed".into()))
}

/// pgbench whose clients stay connected while the server is saved and restored twice.
fn bench_across(tool: &Tool, run: &mut Run, mut pgbench: Command, log: &Path) -> Result<(), Fail> {
    let file = fs::File::create(log).map_err(|e| format!("{}: {e}", log.display()))?;
    let copy = file.try_clone().map_err(|e| e.to_string())?;
    pgbench.args(["-h", "127.0.0.1", "-p", &PORT.to_string(), "-U", "postgres", "-n"]);
    pgbench.args(["-c", "3", "-T", "6", "postgres"]).stdout(copy).stderr(file);
    let mark = reaper::mark();
    let child = pgbench.spawn().map_err(|e| format!("pgbench: {e}"))?;
    let clients = child.id() as i32;
    let until = Instant::now() + Duration::from_secs(40);
    let result = (|| {
        // Servers of those before it may still be ending.
        std::thread::sleep(Duration::from_millis(500));
        let serves = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains("127.0.0.1(")
        };
        while view::descendants(run.root).iter().filter(|pid| serves(pid)).count() < 3 {
            if Instant::now() > until {
                return Err("its clients do not connect".to_owned());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        for n in 3..=4 {
            cycle(run, tool, n, &["--tcp-established"])?;
            std::thread::sleep(Duration::from_millis(200));
        }
        match reaper::wait(clients, mark, Duration::ZERO) {
            None => Ok(()),
            Some(_) => Err("it had ended before the last restore".to_owned()),
        }
    })();
    let patience = if result.is_ok() { Duration::from_secs(40) } else { Duration::ZERO };
    let status = reaper::wait(clients, mark, patience);
    if status.is_none() {
        kill(clients, libc::SIGKILL);
    }
    let text = fs::read_to_string(log).unwrap_or_default();
    result.map_err(|e| format!("pgbench across a dump: {e}; it says:\n{text}"))?;
    if status != Some(0) || text.contains("aborted") {
        return Err(format!("pgbench across a dump: {status:?}:\n{text}"));
    }
    Ok(())
}

/// pgbench before and after, when its clients have gone, and across.
fn postgresql(tool: &Tool) -> Result<(), NotReady> {
    let programs = postgres_programs()?;
    let setpriv = find("setpriv")?;
    let place = Place::new("postgresql")?;
    let data = place.0.join("data");
    // PostgreSQL does not run as root.
    let as_postgres = |program: &str| {
        let mut command = Command::new(&setpriv);
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        command.arg(programs.join(program)).env("HOME", &place.0);
        command
    };
    let run_to_end = |command: Command| -> Result<(), Fail> {
        let done = execute_for(command, &place.0, Duration::from_secs(90))?;
        if done.success() { Ok(()) } else { Err(done.text) }
    };
    let mut initdb = as_postgres("initdb");
    initdb.args(["-A", "trust", "-N", "-D"]).arg(&data);
    run_to_end(initdb).map_err(|e| NotReady::Skip(format!("initdb: {e}")))?;
    let postgres = programs.join("postgres");
    let options = ["--reuid=postgres", "--regid=postgres", "--clear-groups"].map(Path::new);
    let argv = [&[setpriv.as_path()], &options[..], &[&postgres, Path::new("-D"), &data]].concat();
    let port = format!("port={PORT}");
    let settings = [
        "listen_addresses=127.0.0.1",
        &port,
        "unix_socket_directories=",
        "shared_memory_type=mmap",
        "dynamic_shared_memory_type=mmap",
        "huge_pages=off",
        "fsync=off",
        "jit=off",
    ];
    let settings: Vec<&str> = settings.iter().flat_map(|s| ["-c", s]).collect();
    let mut run = spawn("postgresql", &argv, &settings)?;
    drop(Client::new(&run)?);
    let bench = |arguments: &[&str]| -> Result<(), Fail> {
        let mut pgbench = as_postgres("pgbench");
        pgbench.args(["-h", "127.0.0.1", "-p", &PORT.to_string(), "-U", "postgres"]);
        pgbench.args(arguments).arg("postgres");
        run_to_end(pgbench).map_err(|e| format!("pgbench {arguments:?}: {e}"))
    };
    let result = (|| -> Result<(), Fail> {
        // It listens before it lets anybody in.
        let patience = Instant::now() + Duration::from_secs(30);
        while let Err(e) = bench(&["-i", "-q", "-s", "1"]) {
            if !e.contains("is starting up") || Instant::now() > patience {
                return Err(e);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        for n in 1..=2 {
            bench(&["-c", "4", "-t", "100", "-n"])?;
            cycle(&mut run, tool, n, &["--tcp-established"])?;
        }
        bench(&["-c", "4", "-t", "100", "-n"])?;
        bench_across(tool, &mut run, as_postgres("pgbench"), &place.0.join("bench.log"))
    })();
    result.map_err(|e| run.fail(e))?;
    end(&run)?;
    Ok(())
}
