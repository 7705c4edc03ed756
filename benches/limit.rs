//! What the machine can do at most for a gibibyte: the figures that stand beside `heap1g`.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::{cycle::HEAP, machine, subject};

/// How much one read or write moves, as a dump would.
const PIECE: usize = 4 << 20;

/// Median times for [`HEAP`] bytes.
#[derive(Debug)]
pub struct Limits {
    /// memcpy from touched memory to touched memory.
    pub copy_warm: Duration,
    /// memcpy from touched memory to memory that was never touched.
    pub copy_fresh: Duration,
    /// write(2) of the bytes to a new file beside the images.
    pub write: Duration,
    /// read(2) of that file to memory that was never touched.
    pub read: Duration,
}

/// Measures `runs` times each, on one processor, with the memory warmed as before the commands.
pub fn measure(dir: &Path, runs: usize) -> Result<Limits, String> {
    let mut words = vec![0u64; HEAP / 8];
    subject::fill(&mut words);
    // SAFETY: any u64 is eight valid bytes.
    let source: &[u8] = unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), HEAP) };
    let mut target = vec![1u8; HEAP];
    let path = dir.join(format!("rewake-bench.{}.limit", std::process::id()));
    let mut times: [Vec<Duration>; 4] = Default::default();
    for _ in 0..runs {
        times[0].push(timed(|| target.copy_from_slice(source)));
        black_box(&target);

        machine::warm(4 << 30)?;
        times[1].push(timed(|| drop(black_box(source.to_vec()))));

        machine::warm(4 << 30)?;
        let _ = fs::remove_file(&path);
        let mut done = Ok(());
        times[2].push(timed(|| done = write(&path, source)));
        done.map_err(|e| format!("{}: {e}", path.display()))?;

        machine::warm(4 << 30)?;
        let mut done = Ok(());
        times[3].push(timed(|| done = read(&path)));
        done.map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let _ = fs::remove_file(&path);
    let [copy_warm, copy_fresh, write, read] = times.map(median);
    Ok(Limits { copy_warm, copy_fresh, write, read })
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    bytes.chunks(PIECE).try_for_each(|piece| file.write_all(piece))
}

/// How long write(2) of [`HEAP`] bytes takes, by as many threads as there are processors, each to a file of its own.
pub fn write_all(dir: &Path) -> Result<Duration, String> {
    let mut words = vec![0u64; HEAP / 8];
    subject::fill(&mut words);
    // SAFETY: any u64 is eight valid bytes.
    let source: &[u8] = unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), HEAP) };
    machine::warm(4 << 30)?;
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let parts: Vec<&[u8]> = source.chunks(HEAP.div_ceil(workers)).collect();
    let path = |n: usize| dir.join(format!("rewake-bench.{}.limit.{n}", std::process::id()));
    let start = Instant::now();
    let done: Vec<std::io::Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = parts
            .iter()
            .enumerate()
            .map(|(n, part)| scope.spawn(move || write(&path(n), part)))
            .collect();
        let died = |_| Err(std::io::Error::other("a thread died"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(died)).collect()
    });
    let took = start.elapsed();
    for n in 0..parts.len() {
        let _ = fs::remove_file(path(n));
    }
    done.into_iter().collect::<std::io::Result<()>>().map_err(|e| format!("plain write: {e}"))?;
    Ok(took)
}

fn read(path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    // Zeroed memory of this size comes from the kernel untouched, so that the read is what touches it.
    let mut memory = vec![0u8; HEAP];
    memory.chunks_mut(PIECE).try_for_each(|piece| file.read_exact(piece))?;
    black_box(&memory);
    Ok(())
}
