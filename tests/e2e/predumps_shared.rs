//! Shared memory in chains made by `pre-dump`: compared with what the parent images hold, it is stored again only where it
//! differs. Of a program that changes it in every way all the time, and of some that leave it as it is; and what becomes of
//! it where the parent images are damaged or of something else.

use crate::flavours::finish;
use crate::harness::{Fail, Fs, NotReady, Run, Tool, execute};
use crate::pools::HugePages;
use crate::predumps::{command, save, some_time};
use crate::programs::by_name;
use crate::{trial, trial_alone};
use libtest_mimic::Trial;
use rewake_image::kind;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use zoo::Rng;

const PAGE: u64 = 4096;

/// All trials about shared memory in chains; with CRIU, it restores them too.
pub fn trials(tool: &Tool, criu: Option<&Tool>) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    for rounds in [1usize, 5] {
        for (word, options, restore) in [
            ("", &[][..], &[][..]),
            ("_dedup", &["--auto-dedup"][..], &[][..]),
            ("_lazy", &[][..], &["--lazy-pages"][..]),
        ] {
            let ours = tool.clone();
            let body =
                move || finish(changing(&ours, &ours, "shared_written", rounds, options, restore));
            all.push(trial(format!("predumps::shared_{rounds}{word}"), body));
            if let Some(criu) = criu.filter(|_| restore.is_empty()) {
                let (ours, criu) = (tool.clone(), criu.clone());
                let body = move || {
                    let program = "shared_written_plain";
                    finish(changing(&ours, &criu, program, rounds, options, restore))
                };
                all.push(trial(format!("predumps::shared_{rounds}{word}::to_criu"), body));
            }
        }
    }
    for program in ["memory_shared", "memfd", "sysv_shm", "hugetlb", "hugetlb_sysv"] {
        let tool = tool.clone();
        let name = format!("predumps::shared_unchanged_{program}");
        let body = move || finish(unchanged(&tool, program));
        all.push(if program.starts_with("huge") {
            trial_alone(name, body)
        } else {
            trial(name, body)
        });
    }
    for (word, options) in
        [("", &[][..]), ("_criu", &["--format", "criu"][..]), ("_lz4", &["--compress"][..])]
    {
        for program in ["shared_written_large", "shared_written_large_sysv"] {
            let tool = tool.clone();
            let name = format!("predumps::{program}{word}");
            all.push(trial(name, move || finish(large(&tool, program, options))));
        }
    }
    let mut add = |name: &str, body: fn(&Tool) -> Result<(), NotReady>| {
        let tool = tool.clone();
        all.push(trial(format!("predumps::shared_{name}"), move || finish(body(&tool))));
    };
    add("leave_running", leave_running);
    add("parent_cut_off", cut_off);
    add("parent_spoiled", spoiled);
    add("parent_of_others", of_others);
    add("grandparent_gone", grandparent_gone);
    all
}

fn start(program: &str) -> Result<Run, NotReady> {
    let program = by_name(program)?;
    Run::ready(program.name, &program.start(), Fs::Memory)
}

/// Pages of shared memory left to the parent and stored, as the statistics have it.
fn pages(run: &Run, n: usize) -> Result<(u64, u64), Fail> {
    let stats = rewake_image::read_file(&run.images(n)?.join("stats-dump"), kind::STATS_DUMP);
    let stats = stats.map_err(|e| run.fail(e.to_string()))?;
    let dump = stats.first().and_then(|s| s.dump.as_ref()).ok_or("no statistics")?;
    let of = |pages: Option<u64>| pages.ok_or("statistics without shared memory");
    Ok((of(dump.shpages_skipped_parent)?, of(dump.shpages_written)?))
}

/// The page stores of shared memory in images, each with how many pages its pagemap says it has.
fn stores(dir: &Path) -> Result<Vec<(PathBuf, u64)>, Fail> {
    let options = rewake_image::OpenOptions { pre_dump: true, verify: false };
    let images = rewake_image::ImageDir::open_with(dir, options).map_err(|e| e.to_string())?;
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| e.to_string())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let id = name.strip_prefix("pagemap-shmem-").and_then(|n| n.strip_suffix(".img"));
        let Some(id) = id.and_then(|id| id.parse::<u64>().ok()) else { continue };
        let map = images.read_pagemap_shmem(id).map_err(|e| e.to_string())?.ok_or("no pagemap")?;
        let path = dir.join(kind::PAGES.file_name(map.pages_id));
        found.push((path, map.stored_bytes() / PAGE));
    }
    Ok(found)
}

/// The page store of shared memory that holds most.
fn largest(dir: &Path) -> Result<PathBuf, Fail> {
    let most = stores(dir)?.into_iter().max_by_key(|(_, pages)| *pages);
    Ok(most.filter(|(_, pages)| *pages > 1).ok_or("no shared memory in the images")?.0)
}

fn restored(run: &mut Run, to: &Tool, n: usize, options: &[&str]) -> Result<(), NotReady> {
    let dir = run.images(n)?;
    run.restore(to, &dir, options)?;
    std::thread::sleep(std::time::Duration::from_millis(50));
    let view = run.view()?;
    run.check(&view)?;
    Ok(())
}

fn changing(
    tool: &Tool,
    to: &Tool,
    program: &str,
    rounds: usize,
    options: &[&str],
    restore: &[&str],
) -> Result<(), NotReady> {
    let mut run = start(program)?;
    let mut rng = Rng(rounds as u64);
    for n in 0..rounds {
        save(&run, tool, "pre-dump", n, if n == 0 { &[] } else { options })?;
        some_time(&mut rng);
    }
    save(&run, tool, "dump", rounds, options)?;
    let (left, stored) = pages(&run, rounds)?;
    if left < 50 {
        let text = format!("only {left} shared pages were left to the parent, {stored} stored");
        return Err(run.fail(text).into());
    }
    restored(&mut run, to, rounds, restore)
}

/// What is as it was costs nothing.
fn unchanged(tool: &Tool, program: &str) -> Result<(), NotReady> {
    let program = by_name(program)?;
    let _pool = (program.huge_pages > 0).then(|| HugePages::add(program.huge_pages)).transpose()?;
    let (mut run, before) = crate::flavours::started(&program, Fs::Memory)?;
    save(&run, tool, "pre-dump", 0, program.dump_options)?;
    let first = pages(&run, 0)?;
    save(&run, tool, "pre-dump", 1, program.dump_options)?;
    save(&run, tool, "dump", 2, program.dump_options)?;
    let (second, last) = (pages(&run, 1)?, pages(&run, 2)?);
    // Of a segment of odd size only the dump knows what is behind its end, in one page.
    if first.1 < 10 || second != (first.1, 0) || last.0 + 1 < first.1 || last.1 > 1 {
        let text = format!("pages left to the parent and stored: {first:?}, {second:?}, {last:?}");
        return Err(run.fail(text).into());
    }
    for (path, _) in stores(&run.images(1)?)? {
        let size = path.metadata().map_or(0, |m| m.len());
        if size > 0 {
            return Err(run.fail(format!("{} has {size} bytes", path.display())).into());
        }
    }
    run.gone(&before.pids(), "after the dump")?;
    let dir = run.images(2)?;
    run.restore(tool, &dir, program.restore_options)?;
    run.same(&before, "after restore of the chain", &program.ignored(tool))?;
    run.check(&before)?;
    Ok(())
}

/// Whole dumps and pre-dumps in turns, whose tree runs on.
fn leave_running(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start("shared_written")?;
    let mut rng = Rng(5);
    for n in 0..4 {
        let (word, options): (_, &[&str]) =
            if n % 2 == 0 { ("dump", &["--leave-running"]) } else { ("pre-dump", &[]) };
        save(&run, tool, word, n, options)?;
        some_time(&mut rng);
    }
    save(&run, tool, "dump", 4, &[])?;
    restored(&mut run, tool, 4, &[])
}

/// A dump that must fail: what it says. The tree runs on.
fn refused(run: &Run, tool: &Tool, n: usize, wanted: &[&str]) -> Result<(), Fail> {
    let done = execute(command(run, tool, "dump", n, &[])?, &run.dir)?;
    let log = fs::read_to_string(run.images(n)?.join("dump.log")).unwrap_or_default() + &done.text;
    if done.success() || wanted.iter().any(|text| !log.contains(text)) {
        return Err(run.fail(format!("the dump does not fail with {wanted:?}: {log}")));
    }
    if run.images(n)?.join("inventory.img").exists() {
        return Err(run.fail("the failed dump left images".into()));
    }
    Ok(())
}

/// A page store of the parent that is too short is told, with a checksum file and without; the dump without it works.
fn cut_off(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start("shared_written")?;
    save(&run, tool, "pre-dump", 0, &[])?;
    let parent = run.images(0)?;
    let store = largest(&parent)?;
    let file = fs::File::options().write(true).open(&store).map_err(|e| e.to_string())?;
    file.set_len(PAGE).map_err(|e| e.to_string())?;
    let name = store.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let help = "dump without --prev-images-dir";
    refused(&run, tool, 1, &[&name, "it has 4096 bytes, and had ", help])?;
    fs::remove_file(parent.join("rewake.manifest")).map_err(|e| e.to_string())?;
    refused(&run, tool, 1, &[&name, "it ends before a page that it should hold", help])?;
    fs::remove_file(&store).map_err(|e| e.to_string())?;
    refused(&run, tool, 1, &[&name, help])?;
    let images = run.images(2)?;
    run.dump(tool, &images, &[])?;
    restored(&mut run, tool, 2, &[])
}

/// A byte in a page store of the parent is another one: pages are compared with what is there, so that memory would be right.
/// But nobody should trust the rest.
fn spoiled(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start("shared_written")?;
    save(&run, tool, "pre-dump", 0, &[])?;
    let store = largest(&run.images(0)?)?;
    let file =
        fs::File::options().read(true).write(true).open(&store).map_err(|e| e.to_string())?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000).map_err(|e| e.to_string())?;
    file.write_all_at(&[byte[0] ^ 0x10], 5000).map_err(|e| e.to_string())?;
    save(&run, tool, "dump", 1, &[])?;
    let images = run.images(1)?;
    let done = run.try_restore(tool, &images, &[])?;
    let log = fs::read_to_string(images.join("restore.log")).unwrap_or_default() + &done.text;
    let name = store.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if done.success() || !log.contains(&name) || !log.contains("checksum") {
        return Err(run.fail(format!("a restore with a spoiled parent: {log}")).into());
    }
    restored(&mut run, tool, 1, &["--no-verify"])
}

/// The parent has other memory under the number of each segment: it is saved as it is, whatever that be.
fn of_others(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start("shared_written")?;
    save(&run, tool, "pre-dump", 0, &[])?;
    let parent = run.images(0)?;
    let maps: Vec<PathBuf> = fs::read_dir(&parent)
        .map_err(|e| e.to_string())?
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("pagemap-shmem-"))
        .map(|e| e.path())
        .collect();
    fs::remove_file(parent.join("rewake.manifest")).map_err(|e| e.to_string())?;
    let contents = maps.iter().map(fs::read).collect::<Result<Vec<_>, _>>();
    let contents = contents.map_err(|e| e.to_string())?;
    for (n, path) in maps.iter().enumerate() {
        let other = &contents[(n + 1) % maps.len()];
        fs::write(path, other).map_err(|e| e.to_string())?;
    }
    save(&run, tool, "dump", 1, &[])?;
    restored(&mut run, tool, 1, &[])
}

/// A parent without its own is of no use, which is said before anything is done.
fn grandparent_gone(tool: &Tool) -> Result<(), NotReady> {
    let mut run = start("shared_written")?;
    save(&run, tool, "pre-dump", 0, &[])?;
    save(&run, tool, "pre-dump", 1, &[])?;
    let (there, away) = (run.images(0)?, run.dir.join("away"));
    fs::rename(&there, &away).map_err(|e| e.to_string())?;
    refused(&run, tool, 2, &["--prev-images-dir", "img.1/parent", "need all of their parents"])?;
    fs::rename(&away, &there).map_err(|e| e.to_string())?;
    save(&run, tool, "dump", 2, &[])?;
    restored(&mut run, tool, 2, &[])
}

/// A large segment has several page stores, unless CRIU is to read them.
fn large(tool: &Tool, program: &str, options: &[&str]) -> Result<(), NotReady> {
    let mut run = start(program)?;
    let dir = run.images(0)?;
    run.dump(tool, &dir, options)?;
    let images = rewake_image::ImageDir::open(&dir).map_err(|e| e.to_string())?;
    let mut divided = false;
    for entry in fs::read_dir(&dir).map_err(|e| e.to_string())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let id = name.strip_prefix("pagemap-shmem-").and_then(|n| n.strip_suffix(".img"));
        if let Some(id) = id.and_then(|id| id.parse::<u64>().ok()) {
            let map = images.read_pagemap_shmem(id).map_err(|e| e.to_string())?;
            divided |= map.is_some_and(|map| map.has_places());
        }
    }
    let several = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
    let wanted = several && !options.contains(&"criu");
    let version = images.inventory().img_version;
    if divided != wanted || (version == 2) == (wanted || options.contains(&"--compress")) {
        let text = format!("divided: {divided}, images of version {version}");
        return Err(run.fail(text).into());
    }
    restored(&mut run, tool, 0, &[])
}
