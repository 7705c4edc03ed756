//! Real programs, as in the README's walkthrough: a bash loop, a threaded Python, servers on Node and Java.

use crate::flavours::{finish, unless_later};
use crate::harness::{Fail, Fs, NotReady, Run, Start, Tool, execute_for, kill};
use crate::real_files;
use crate::reaper;
use crate::trial;
use crate::view::{self, View};
use libtest_mimic::Trial;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// All trials with real programs.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let mut all = Vec::new();
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        // Servers hold kinds of descriptors that come later: see `Program::later`.
        let later = name.ends_with("_server");
        let name = format!("real::{name}");
        all.push(trial(name, move || {
            finish(if later { unless_later(body(&tool)) } else { body(&tool) })
        }));
    };
    add("bash_loop", bash_loop);
    add("python_threads", python_threads);
    add("python_handles", python_handles);
    add("sqlite_transaction", real_files::sqlite_transaction);
    add("tail_follow", real_files::tail_follow);
    add("python_temporary", real_files::python_temporary);
    add("dbus_session", dbus_session);
    add("node_server", node_server);
    add("java_server", java_server);
    add("java_http_server", java_http_server);
    all
}

/// The first of the paths that exists, else what PATH finds.
pub fn find(name: &str) -> Result<PathBuf, NotReady> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut places = vec![PathBuf::from("/usr/bin"), PathBuf::from("/bin")];
    places.extend(path.split(':').map(PathBuf::from));
    let found = places.into_iter().map(|p| p.join(name)).find(|p| p.is_file());
    found.ok_or_else(|| NotReady::Skip(format!("{name} is not installed")))
}

pub fn start(argv: &[&Path]) -> Start {
    Start {
        argv: argv.iter().map(|p| p.as_os_str().to_owned()).collect(),
        env: Vec::new(),
        give_dir: true,
    }
}

/// A directory for scripts, gone with it.
pub struct Scripts(pub PathBuf);

impl Scripts {
    /// Makes it.
    pub fn new(name: &str) -> Result<Scripts, Fail> {
        let dir = crate::harness::base(Fs::Disk)
            .join(format!("rewake-e2e-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(Scripts(dir))
    }
    /// Puts a script there.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf, Fail> {
        let path = self.0.join(name);
        fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Waits until a file of the run holds what is wanted.
pub fn wait_for(run: &Run, name: &str, wanted: impl Fn(&str) -> bool) -> Result<String, Fail> {
    let until = Instant::now() + Duration::from_secs(40);
    loop {
        let text = fs::read_to_string(run.dir.join(name)).unwrap_or_default();
        if wanted(&text) {
            return Ok(text);
        }
        if reaper::wait(run.root, run.mark, Duration::ZERO).is_some() || Instant::now() > until {
            let at = view::where_blocked(&view::descendants(run.root));
            return Err(run.fail(format!("waited in vain for {name}: {text:?}; {at}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Dump to death and restore.
pub fn cycle(run: &mut Run, tool: &Tool, n: usize, options: &[&str]) -> Result<(), Fail> {
    let images = run.images(n)?;
    // The tree may change until the dump has it; what vanishes on its own is no matter.
    let pids = view::descendants(run.root);
    run.dump(tool, &images, options)?;
    run.gone(&pids, &format!("after dump {n}"))?;
    run.restore(tool, &images, options)?;
    let _ = fs::remove_dir_all(images);
    Ok(())
}

const BASH: &str = r#"
# Writes a numbered line again and again, through a descriptor that stays open; sleeps in a child process.
exec 3>>"$1/out"
i=0
while [ ! -e "$1/check" ]; do
    i=$((i + 1))
    echo "$i" >&3
    sleep 0.01
done
printf PASS > "$1/result"
"#;

fn bash_loop(tool: &Tool) -> Result<(), NotReady> {
    let bash = find("bash")?;
    let scripts = Scripts::new("bash")?;
    let script = scripts.write("loop.sh", BASH)?;
    let mut run = Run::spawn("bash_loop", &start(&[&bash, &script]), Fs::Disk)?;
    let lines = |text: &str| text.lines().count();
    wait_for(&run, "out", |t| lines(t) >= 3)?;
    for n in 1..=10 {
        let before = lines(&fs::read_to_string(run.dir.join("out")).map_err(|e| e.to_string())?);
        cycle(&mut run, tool, n, &[])?;
        wait_for(&run, "out", |t| lines(t) > before + 2)?;
        // Another instant of the loop each time.
        std::thread::sleep(Duration::from_millis(n as u64 * 3));
    }
    run.check(&View::default())?;
    let text = fs::read_to_string(run.dir.join("out")).map_err(|e| e.to_string())?;
    for (at, line) in text.lines().enumerate() {
        if line != (at + 1).to_string() {
            return Err(run
                .fail(format!("line {} says {line:?}: a number was lost or doubled", at + 1))
                .into());
        }
    }
    Ok(())
}

const PYTHON: &str = r#"
import os, signal, sys, threading, time, hashlib
d = sys.argv[1]
errors = []

# A deleted temporary file with known content, half read.
tmp = open(d + "/temporary", "w+b")
os.unlink(d + "/temporary")
content = bytes((i * 7 + i // 256) % 256 for i in range(200000))
tmp.write(content); tmp.flush(); tmp.seek(100000)

# A child that counts through a pipe.
r, w = os.pipe()
child = os.fork()
if child == 0:
    os.close(r)
    i = 0
    while not os.path.exists(d + "/check"):
        i += 1
        os.write(w, b"%d\n" % i)
        time.sleep(0.003)
    os._exit(7)
os.close(w)
seen = 0
def reader():
    global seen
    for line in os.fdopen(r, "rb"):
        if int(line) != seen + 1:
            errors.append("pipe: %d after %d" % (int(line), seen))
        seen = int(line)

ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)

# Threads that compute, and check what they computed.
rounds = [0] * 4
def work(n):
    while not os.path.exists(d + "/check"):
        h = hashlib.sha256()
        total = 0
        for i in range(2000):
            total += i * (n + 1)
            h.update(b"%d" % i)
        if total != 1999000 * (n + 1):
            errors.append("thread %d: %d" % (n, total))
        rounds[n] += 1
        time.sleep(0.001)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)] + [threading.Thread(target=reader)]
lock = threading.Condition()
for t in threads: t.start()
with open(d + "/ready.tmp", "w") as f: f.write(str(os.getpid()))
os.rename(d + "/ready.tmp", d + "/ready")

last = time.monotonic()
while not os.path.exists(d + "/check"):
    now = time.monotonic()
    if now < last: errors.append("the clock went back by %g" % (last - now))
    last = now
    with lock: lock.wait(0.01)
before = ticks
time.sleep(0.1)
if ticks <= before: errors.append("the timer is silent")
signal.setitimer(signal.ITIMER_REAL, 0)  # Python takes its handlers away before it is gone
for t in threads: t.join()
pid, status = os.waitpid(child, 0)
if pid != child or status != 7 << 8: errors.append("child: %d %x" % (pid, status))
if tmp.tell() != 100000: errors.append("position %d" % tmp.tell())
if tmp.read() != content[100000:]: errors.append("rest of the temporary file")
tmp.seek(0)
if tmp.read(100000) != content[:100000]: errors.append("start of the temporary file")
if not seen or not all(rounds): errors.append("somebody never ran: %r %r" % (seen, rounds))
print(rounds, seen, ticks)
with open(d + "/result.tmp", "w") as f: f.write("FAIL: " + "; ".join(errors[:5]) if errors else "PASS")
os.rename(d + "/result.tmp", d + "/result")
sys.exit(1 if errors else 0)
"#;

fn python_threads(tool: &Tool) -> Result<(), NotReady> {
    let python = find("python3")?;
    let scripts = Scripts::new("python")?;
    let script = scripts.write("threads.py", PYTHON)?;
    let mut run = Run::spawn("python_threads", &start(&[&python, &script]), Fs::Disk)?;
    wait_for(&run, "ready", |t| !t.is_empty())?;
    for n in 1..=5 {
        std::thread::sleep(Duration::from_millis(20 + n as u64 * 7));
        cycle(&mut run, tool, n, &[])?;
    }
    // And dumped while it runs on.
    for n in 6..=8 {
        run.dump(tool, &run.images(n)?, &["--leave-running"])?;
        std::thread::sleep(Duration::from_millis(15));
    }
    run.check(&View::default())?;
    Ok(())
}

/// Asks an HTTP server on the loopback for its counter.
fn get(port: u16) -> Result<u64, Fail> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))
        .map_err(|e| format!("connect to port {port}: {e}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(15))).map_err(|e| e.to_string())?;
    let request = "GET /count HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).map_err(|e| format!("request: {e}"))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(|e| format!("answer: {e}"))?;
    let last = text.split_whitespace().last().unwrap_or("");
    last.parse().map_err(|_| format!("the answer is no number: {text:?}"))
}

/// A server that counts: cycles, dumps with every final state; it answers, and the count never goes back and always goes on.
fn serve(tool: &Tool, run: &mut Run) -> Result<(), NotReady> {
    let port = wait_for(run, "port", |t| t.trim().parse::<u16>().is_ok())?;
    let port: u16 = port.trim().parse().map_err(|e| format!("port: {e}"))?;
    let mut last = get(port).map_err(|e| run.fail(e))?;
    let more = |run: &Run, last: u64, when: &str| -> Result<u64, Fail> {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let count = get(port).map_err(|e| run.fail(format!("{when}: {e}")))?;
            if count < last || Instant::now() > until {
                return Err(run.fail(format!("{when} the count is {count}, it was {last}")));
            }
            if count > last {
                return Ok(count);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    for n in 1..=4 {
        last = more(run, last, "before a dump")?;
        cycle(run, tool, n, &["--tcp-established"])?;
        last = more(run, last, &format!("after cycle {n}"))?;
    }
    for n in 5..=6 {
        run.dump(tool, &run.images(n)?, &["--tcp-established", "--leave-running"])?;
        last = more(run, last, "after a --leave-running dump")?;
    }
    for n in 7..=8 {
        run.dump(tool, &run.images(n)?, &["--tcp-established", "--leave-stopped"])?;
        let pids = view::descendants(run.root);
        run.all_stopped(&pids, "after a --leave-stopped dump")?;
        run.resume(tool, &pids)?;
        last = more(run, last, "after resume")?;
    }
    kill(run.root, libc::SIGTERM);
    let ended = reaper::wait(run.root, run.mark, crate::harness::TIMEOUT);
    let Some(status) = ended else {
        return Err(run.fail("SIGTERM does not end the server".into()).into());
    };
    // 7 by its own handler: the server ended as it was told, it did not crash.
    if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7 {
        return Ok(());
    }
    Err(run.fail(format!("the server ended with {}", reaper::describe(status))).into())
}

const NODE: &str = r#"
const http = require('http'), fs = require('fs'), dir = process.argv[2];
let count = 0;
setInterval(() => { count++; }, 5);
process.on('SIGTERM', () => process.exit(7));
const server = http.createServer((q, a) => a.end(String(count)));
server.listen(Number(process.env.ZOO_PORTS), '127.0.0.1', () => fs.writeFileSync(dir + '/port', String(server.address().port)));
"#;

fn node_server(tool: &Tool) -> Result<(), NotReady> {
    let node = find("node")?;
    let scripts = Scripts::new("node")?;
    let script = scripts.write("server.js", NODE)?;
    let mut run = Run::spawn("node_server", &start(&[&node, &script]), Fs::Disk)?;
    serve(tool, &mut run)
}

const HANDLES: &str = r#"
# multiprocessing: the parent has sent descriptors of pipes to a child, which receives them after the checkpoints.
import multiprocessing, os, sys, time
from multiprocessing import reduction

def wait():
    while not os.path.exists(sys.argv[1] + "/check"):
        time.sleep(0.01)

def child(connection):
    wait()
    total = 0
    while True:
        fd = reduction.recv_handle(connection)
        total += int(os.read(fd, 100))
        os.close(fd)
        if not connection.poll(0.5):
            break
    connection.send(total)

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=child, args=(theirs,))
    process.start()
    for number in range(40):
        reader, writer = os.pipe()
        os.write(writer, str(number).encode())
        reduction.send_handle(ours, reader, process.pid)
        os.close(reader)
        os.close(writer)
    open(sys.argv[1] + "/up", "w").write("up")
    wait()
    total = ours.recv()
    process.join()
    open(sys.argv[1] + "/result", "w").write("PASS" if total == sum(range(40)) else f"FAIL: {total}")
"#;

fn python_handles(tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu {
        return Err(NotReady::Skip("CRIU cannot: it merges messages with descriptors".into()));
    }
    let python = find("python3")?;
    let scripts = Scripts::new("handles")?;
    let script = scripts.write("handles.py", HANDLES)?;
    let mut run = Run::spawn("python_handles", &start(&[&python, &script]), Fs::Disk)?;
    wait_for(&run, "up", |t| t == "up")?;
    for n in 1..=3 {
        cycle(&mut run, tool, n, &[])?;
    }
    run.check(&View::default())?;
    Ok(())
}

const DBUS: &str = r#"
# A message bus of its own with one client that stays and one after the other that come and go.
dbus-monitor --session >"$1/monitor" 2>&1 &
i=0
while [ ! -e "$1/check" ]; do
    i=$((i + 1))
    dbus-send --session --type=signal / org.example.Tick uint32:$i || { echo "FAIL: send" >"$1/result"; exit 1; }
    echo $i >"$1/ticks.new" && mv "$1/ticks.new" "$1/ticks"
    sleep 0.02
done
sleep 0.5
if grep -q "uint32 $i\$" "$1/monitor"; then printf PASS >"$1/result"; else echo "FAIL: tick $i was not seen" >"$1/result"; fi
"#;

fn dbus_session(tool: &Tool) -> Result<(), NotReady> {
    let (session, shell) = (find("dbus-run-session")?, find("sh")?);
    find("dbus-monitor")?;
    let scripts = Scripts::new("dbus")?;
    let script = scripts.write("bus.sh", DBUS)?;
    let argv = [&*session, Path::new("--"), &*shell, &*script];
    let mut run = Run::spawn("dbus_session", &start(&argv), Fs::Disk)?;
    let ticks = |text: &str| text.trim().parse().unwrap_or(0);
    wait_for(&run, "ticks", |t| ticks(t) >= 3)?;
    for n in 1..=5 {
        let before: u32 = ticks(&wait_for(&run, "ticks", |t| ticks(t) > 0)?);
        let images = run.images(n)?;
        let pids = view::descendants(run.root);
        // What a client sends before it is accepted, nobody can read: then another instant.
        for attempt in 1.. {
            let done = run.try_dump(tool, run.root, &images, &[])?;
            if done.success() {
                break;
            }
            if attempt == 50 || !done.text.contains("waits to be accepted") {
                return Err(run.fail(format!("dump {n} failed: {}", done.text)).into());
            }
        }
        run.gone(&pids, &format!("after dump {n}"))?;
        run.restore(tool, &images, &[])?;
        let _ = fs::remove_dir_all(images);
        wait_for(&run, "ticks", |t| ticks(t) > before + 2)?;
    }
    run.check(&View::default())?;
    Ok(())
}

const JAVA: &str = r#"
import java.io.*;
import java.net.*;
import java.nio.file.*;
import java.util.concurrent.atomic.AtomicLong;

public class Server {
    public static void main(String[] args) throws Exception {
        AtomicLong count = new AtomicLong();
        Thread counter = new Thread(() -> {
            try {
                while (true) {
                    count.incrementAndGet();
                    byte[] garbage = new byte[100000];
                    garbage[count.intValue() % garbage.length] = 1;
                    Thread.sleep(2);
                }
            } catch (InterruptedException e) { }
        });
        counter.setDaemon(true);
        counter.start();
        Runtime.getRuntime().addShutdownHook(new Thread(() -> Runtime.getRuntime().halt(7)));
        ServerSocket server = new ServerSocket(Integer.parseInt(System.getenv("ZOO_PORTS")), 50, InetAddress.getByName("127.0.0.1"));
        Files.writeString(Path.of(args[0], "port"), String.valueOf(server.getLocalPort()));
        while (true) {
            try (Socket s = server.accept()) {
                BufferedReader in = new BufferedReader(new InputStreamReader(s.getInputStream()));
                for (String line = in.readLine(); line != null && !line.isEmpty(); line = in.readLine()) { }
                s.getOutputStream().write(("HTTP/1.1 200 OK\r\n\r\n" + count).getBytes());
            }
        }
    }
}
"#;

const JAVA_HTTP: &str = r#"
import com.sun.net.httpserver.HttpServer;
import java.net.*;
import java.nio.file.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicLong;

// The JDK's own server: a selector (epoll), a pool of threads, a scheduled task.
public class Server {
    public static void main(String[] args) throws Exception {
        AtomicLong count = new AtomicLong();
        Executors.newScheduledThreadPool(1)
            .scheduleAtFixedRate(count::incrementAndGet, 0, 3, TimeUnit.MILLISECONDS);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> Runtime.getRuntime().halt(7)));
        InetAddress loopback = InetAddress.getByName("127.0.0.1");
        HttpServer server = HttpServer.create(new InetSocketAddress(loopback, 0), 50);
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.createContext("/count", exchange -> {
            byte[] answer = String.valueOf(count.get()).getBytes();
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.start();
        Files.writeString(Path.of(args[0], "port"), String.valueOf(server.getAddress().getPort()));
    }
}
"#;

fn java_server(tool: &Tool) -> Result<(), NotReady> {
    java(tool, "java_server", JAVA)
}

fn java_http_server(tool: &Tool) -> Result<(), NotReady> {
    java(tool, "java_http_server", JAVA_HTTP)
}

fn java(tool: &Tool, name: &str, source: &str) -> Result<(), NotReady> {
    let (java, javac) = (find("java")?, find("javac")?);
    let scripts = Scripts::new(name)?;
    let source = scripts.write("Server.java", source)?;
    let mut compile = Command::new(javac);
    compile.arg("-d").arg(&scripts.0).arg(source);
    let done = execute_for(compile, &scripts.0, Duration::from_secs(60))?;
    if !done.success() {
        return Err(NotReady::Skip(format!("javac cannot compile: {}", done.text.trim())));
    }
    let mut start = start(&[&java]);
    // Without the statistics file in /tmp, which any other JVM removes while this one is away.
    start.argv.extend(["-XX:-UsePerfData", "-Xmx64m", "-cp"].map(Into::into));
    start.argv.push(scripts.0.clone().into());
    start.argv.push("Server".into());
    let mut run = Run::spawn(name, &start, Fs::Disk)?;
    serve(tool, &mut run)
}
