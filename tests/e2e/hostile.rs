//! Images whose memory is not what anybody has saved, changed where no checksum tells: page stores cut, gone or too long, and
//! pagemaps and mappings that point elsewhere, overlap, or are of absurd sizes. A restore refuses them and leaves nothing.

use crate::flavours::{finish, started, with};
use crate::harness::{Fail, Fs, NotReady, Run, Tool, alive, execute, exists};
use crate::programs::by_name;
use crate::refusals::refused;
use crate::{no_excuses, trial_alone, view};
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;
use std::process::Command;

/// All trials of this kind.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    let (one, other) = (tool.clone(), tool.clone());
    vec![
        trial_alone("hostile::page_stores".into(), move || finish(page_stores(&one))),
        trial_alone("hostile::memory".into(), move || finish(memory(&other))),
    ]
}

fn is_criu(tool: &Tool) -> Result<(), NotReady> {
    if tool.is_criu && !no_excuses() {
        return Err(NotReady::Skip("CRIU checks no more than it needs".into()));
    }
    Ok(())
}

/// Fails unless a restore is refused, with these words, and leaves no process.
fn is_refused(
    run: &Run,
    tool: &Tool,
    images: &Path,
    words: &[&str],
    what: &str,
) -> Result<(), Fail> {
    let options = with(&[], "--no-verify");
    let done = run.try_restore(tool, images, &options).map_err(|e| format!("{what}: {e}"))?;
    refused(run, tool, &done, &images.join("restore.log"), words)
        .map_err(|e| format!("{what}: {e}"))?;
    nothing_left(run, what)
}

fn nothing_left(run: &Run, what: &str) -> Result<(), Fail> {
    let me = std::process::id() as i32;
    let left: Vec<i32> =
        view::descendants(me).into_iter().filter(|&p| p != me && alive(p)).collect();
    if left.is_empty() && !exists(run.root) {
        return Ok(());
    }
    let left = view::where_blocked(&left);
    Err(run.fail(format!("{what}: refused, but processes are left: {left}")))
}

fn page_stores(tool: &Tool) -> Result<(), NotReady> {
    is_criu(tool)?;
    let program = by_name("memory_private")?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after the dump")?;
    let path = images.join("pages-1.img");
    let good = fs::read(&path).map_err(|e| e.to_string())?;
    let n = good.len();
    for (len, what) in [
        (0, "an empty page store"),
        (4096, "a page store of one page"),
        (n / 2 / 4096 * 4096, "a page store cut in the middle"),
        (n - 1, "a page store without its last byte"),
    ] {
        fs::write(&path, &good[..len]).map_err(|e| e.to_string())?;
        is_refused(&run, tool, &images, &["pages"], what)?;
    }
    fs::remove_file(&path).map_err(|e| e.to_string())?;
    is_refused(&run, tool, &images, &["pages-1.img"], "no page store")?;
    // What nobody asks for does no harm.
    let longer = [&good[..], &[7; 8192]].concat();
    fs::write(&path, longer).map_err(|e| e.to_string())?;
    run.restore(tool, &images, &["--no-verify"])?;
    run.check(&before)?;
    Ok(())
}

/// JSON with the n-th value of a key replaced.
fn edited(json: &str, key: &str, n: usize, value: &str) -> Result<String, Fail> {
    let key = format!("\"{key}\":");
    let (at, _) =
        json.match_indices(&key).nth(n).ok_or_else(|| format!("no {n}-th {key} in {json:.400}"))?;
    let from = at + key.len();
    let len = json[from..].find([',', '}']).ok_or("no end of a value")?;
    Ok(format!("{}{value}{}", &json[..from], &json[from + len..]))
}

fn value(json: &str, key: &str, n: usize) -> Result<String, Fail> {
    let key = format!("\"{key}\":");
    let (at, _) = json.match_indices(&key).nth(n).ok_or_else(|| format!("no {key}"))?;
    let from = at + key.len();
    let len = json[from..].find([',', '}']).ok_or("no end of a value")?;
    Ok(json[from..from + len].trim().to_owned())
}

fn crit(run: &Run, tool: &Tool, args: &[&str]) -> Result<String, Fail> {
    let mut command = Command::new(&tool.path);
    command.arg("crit").args(args);
    let done = execute(command, &run.dir)?;
    if !done.success() {
        return Err(run.fail(format!("crit {args:?}: {}", done.text)));
    }
    Ok(done.text)
}

fn memory(tool: &Tool) -> Result<(), NotReady> {
    is_criu(tool)?;
    let program = by_name("memory_private")?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    let images = run.images(1)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after the dump")?;
    let json = run.dir.join("json").to_string_lossy().into_owned();
    for kind in ["mm", "pagemap"] {
        let path = images.join(format!("{kind}-{}.img", run.root));
        let good = fs::read(&path).map_err(|e| e.to_string())?;
        let name = path.to_string_lossy().into_owned();
        crit(&run, tool, &["decode", "-i", &name, "-o", &json])?;
        let text = fs::read_to_string(&json).map_err(|e| e.to_string())?;
        let start = value(&text, if kind == "mm" { "start" } else { "vaddr" }, 2)?;
        let above = (1u64 << 63).to_string();
        let last = (u64::MAX - 4095).to_string();
        let (all, most) = (u64::MAX.to_string(), (u64::MAX >> 12).to_string());
        let cases: Vec<(&str, usize, &str, &[&str])> = if kind == "mm" {
            vec![
                ("start", 3, &start, &["mapping", "overlaps"]),
                ("start", 3, "12345", &["mapping", "bounds"]),
                ("start", 3, &above, &["mapping"]),
                ("start", 3, &last, &["mapping"]),
                ("end", 3, &above, &["mapping", "outside user space"]),
                ("end", 3, &last, &["mapping", "outside user space"]),
                ("end", 3, "4096", &["mapping", "bounds"]),
                ("pgoff", 0, "1", &["mapping", "aligned"]),
                ("prot", 1, "255", &["mapping", "protection"]),
            ]
        } else {
            vec![
                ("vaddr", 3, "4096", &["pagemap"]),
                ("vaddr", 3, &start, &["pagemap"]),
                ("vaddr", 0, "65537", &["page"]),
                ("vaddr", 0, "0", &["page"]),
                ("vaddr", 0, &last, &["page"]),
                ("nr_pages", 3, &most, &["page"]),
                ("nr_pages", 3, &all, &["page"]),
                ("nr_pages", 3, "4294967296", &["page"]),
                ("pages_id", 0, "4711", &["4711"]),
            ]
        };
        for (key, n, bad, words) in cases {
            let what = format!("{kind}: {key} {n} is {bad}");
            fs::write(&json, edited(&text, key, n, bad)?).map_err(|e| e.to_string())?;
            crit(&run, tool, &["encode", "-i", &json, "-o", &name])?;
            is_refused(&run, tool, &images, words, &what)?;
        }
        fs::write(&path, good).map_err(|e| e.to_string())?;
    }
    run.restore(tool, &images, &["--no-verify"])?;
    run.check(&before)?;
    Ok(())
}
