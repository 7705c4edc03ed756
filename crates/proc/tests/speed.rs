//! Speed of the two parsers that matter. Not run by default: `cargo test --release -p rewake-proc --test speed -- --ignored --nocapture`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rewake_proc::smaps::Want;
use rewake_proc::{maps, smaps, stat, status};

const VMAS: usize = 20_000;

/// `maps` lines: half anonymous, half with a path of usual length.
fn header(i: usize) -> String {
    let start = 0x7f2c_0000_0000u64 + i as u64 * 0x2000;
    let (perms, end) =
        if i.is_multiple_of(2) { ("rw-p", start + 0x1000) } else { ("r-xp", start + 0x2000) };
    let head = format!("{start:x}-{end:x} {perms} {:08x} ", i % 4096 * 4096);
    match i % 4 {
        1 => format!(
            "{:73}/usr/lib/x86_64-linux-gnu/libpython{}.so\n",
            format!("{head}fe:00 10011195"),
            i % 7
        ),
        3 => format!(
            "{head}fe:00 21525                      /root/.local/lib/python3.11/lib-dynload/_struct.so\n"
        ),
        _ => format!("{head}00:00 0 \n"),
    }
}

/// Median of many runs.
fn median(mut run: impl FnMut()) -> Duration {
    let mut times: Vec<_> = (0..41)
        .map(|_| {
            let begin = Instant::now();
            run();
            begin.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

#[test]
#[ignore = "a measurement, for a release build on a quiet machine"]
fn speed() {
    let text: String = (0..VMAS).map(header).collect();
    let time = median(|| {
        let mut sum = 0;
        for map in maps::parse(black_box(text.as_bytes())) {
            let map = map.unwrap();
            sum += map.len() + map.raw_name.len() as u64;
        }
        black_box(sum);
    });
    println!("maps:  {VMAS} lines, {} KiB: {time:?} (limit 1.5 ms)", text.len() / 1024);
    assert!(time < Duration::from_micros(1500), "{time:?}");

    let body = include_str!("data/smaps-6.18");
    let body = body.split_once('\n').unwrap().1;
    let body = &body[..body.find("VmFlags").unwrap()];
    // Each hundredth VMA has a value that is wider than its column, which shifts the text.
    let rss = body.lines().find(|line| line.starts_with("Rss:")).unwrap();
    let wide = body.replace(rss, "Rss:            1234567890 kB");
    assert_ne!(wide.len(), body.len());
    let text: String = (0..VMAS)
        .map(|i| {
            let body = if i % 100 == 0 { &wide } else { body };
            format!("{}{body}VmFlags: rd wr mr mw me ac sd \n", header(i))
        })
        .collect();
    for (name, want) in [
        ("flags only", Want::FLAGS),
        (
            "with AnonHugePages and ProtectionKey",
            Want { anon_huge_pages: true, protection_key: true, ..Want::FLAGS },
        ),
        ("with all values", Want::ALL),
    ] {
        let time = median(|| {
            for vma in smaps::parse(black_box(text.as_bytes()), want) {
                black_box(vma.unwrap());
            }
        });
        println!(
            "smaps: {VMAS} VMAs, {} KiB, {name}: {time:?} (limit 6 ms for flags)",
            text.len() / 1024
        );
        assert!(want != Want::FLAGS || time < Duration::from_millis(6), "{time:?}");
    }

    let text = include_bytes!("data/status-6.18");
    let time = median(|| (0..1000).for_each(|_| drop(black_box(status::parse(black_box(text))))));
    println!("status: {:?} each", time / 1000);
    let text = std::fs::read("/proc/self/stat").unwrap();
    let time = median(|| (0..1000).for_each(|_| drop(black_box(stat::parse(black_box(&text))))));
    println!("stat: {:?} each", time / 1000);
}
