//! Chains of images: a checkpoint's pages are scattered over directories that are each other's parents, with older contents
//! of the same pages in the older ones; a restore must find the youngest of each. Made by hand, so no dump need write them.

use crate::flavours::{finish, started};
use crate::harness::{Fs, NotReady, Tool};
use crate::programs::by_name;
use crate::trial;
use libtest_mimic::Trial;
use rewake_image::{ImageDir, ImageWriter, PageRun, PageSource, Pagemap, kind};
use std::fs;
use std::path::{Path, PathBuf};
use zoo::Rng;

const PAGE: usize = 4096;

/// All trials about chains; with CRIU, it restores them too.
pub fn trials(tool: &Tool, criu: Option<&Tool>) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let mut all = Vec::new();
    for program in ["memory_private", "memory_shared", "tree"] {
        for levels in [2usize, 5] {
            let mut add = |word: &str, to: &Tool| {
                let (tool, to) = (tool.clone(), to.clone());
                all.push(trial(format!("chains::{program}_{levels}{word}"), move || {
                    finish(restored(&tool, &to, program, levels))
                }));
            };
            add("", tool);
            if let Some(criu) = criu {
                add("::to_criu", criu);
            }
        }
    }
    let tool = tool.clone();
    all.push(trial("chains::a_parent_lacks_a_page".into(), move || finish(lacking(&tool))));
    all
}

fn restored(tool: &Tool, to: &Tool, program: &str, levels: usize) -> Result<(), NotReady> {
    let program = by_name(program)?;
    let (mut run, before) = started(&program, Fs::Disk)?;
    let images = run.images(0)?;
    // Chains are in CRIU's format.
    run.dump(tool, &images, &[program.dump_options, &["--format", "criu"]].concat())?;
    run.gone(&before.pids(), "after dump")?;
    let dirs = (1..=levels).map(|n| run.images(n)).collect::<Result<Vec<_>, _>>()?;
    scatter(&images, &dirs).map_err(|e| run.fail(e))?;
    run.restore(to, &dirs[0], program.restore_options)?;
    let ignored = program.ignored(if to.is_criu { to } else { tool });
    run.same(&before, "after restore of the chain", &ignored)?;
    run.check(&before)?;
    Ok(())
}

fn lacking(tool: &Tool) -> Result<(), NotReady> {
    let (run, before) = started(&by_name("counter")?, Fs::Disk)?;
    let images = run.images(0)?;
    run.dump(tool, &images, &[])?;
    run.gone(&before.pids(), "after dump")?;
    let dirs = [run.images(1)?, run.images(2)?];
    scatter(&images, &dirs).map_err(|e| run.fail(e))?;
    fs::remove_file(dirs[1].join(format!("pagemap-{}.img", run.root)))
        .map_err(|e| run.fail(e.to_string()))?;
    let done = run.try_restore(tool, &dirs[0], &["--no-verify"])?;
    let log = fs::read_to_string(dirs[0].join("restore.log")).unwrap_or_default() + &done.text;
    if done.success() || !log.contains("pagemap-") {
        return Err(run.fail(format!("a restore without the parent's pages: {log}")).into());
    }
    run.gone(&before.pids(), "after the failed restore")?;
    Ok(())
}

/// Divides a checkpoint among `dirs`, the youngest first.
fn scatter(from: &Path, dirs: &[PathBuf]) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let images = ImageDir::open(from).map_err(|e| text(&e))?;
    let names: Vec<String> = fs::read_dir(from)
        .map_err(|e| text(&e))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".img") && *name != "inventory.img")
        .collect();
    let mut rng = Rng(4711);
    let writers = dirs
        .iter()
        .map(|dir| ImageWriter::create(dir).map_err(|e| text(&e)))
        .collect::<Result<Vec<_>, _>>()?;
    for name in &names {
        if let Some(id) = name.strip_prefix("pagemap-").and_then(|n| n.strip_suffix(".img")) {
            let (id, shared) = match id.strip_prefix("shmem-") {
                Some(id) => (id, true),
                None => (id, false),
            };
            let id: u64 = id.parse().map_err(|e| format!("{name}: {e}"))?;
            let map = if shared { images.read_pagemap_shmem(id) } else { images.read_pagemap(id) };
            let map = map.map_err(|e| text(&e))?.ok_or("no pagemap")?;
            divide(from, &map, id, shared, &writers, &mut rng)?;
        } else if !name.starts_with("pages-") {
            let bytes = fs::read(from.join(name)).map_err(|e| text(&e))?;
            writers[0].write_raw(name, &bytes).map_err(|e| text(&e))?;
        }
    }
    for (n, writer) in writers.into_iter().enumerate() {
        writer.commit(images.inventory()).map_err(|e| text(&e))?;
        if let Some(parent) = dirs.get(n + 1) {
            std::os::unix::fs::symlink(parent, dirs[n].join("parent")).map_err(|e| text(&e))?;
        }
    }
    Ok(())
}

/// Divides one pagemap: each page is in one directory, left to the parent by younger ones, and with wrong contents or not at
/// all in older ones.
fn divide(
    from: &Path,
    map: &Pagemap,
    id: u64,
    shared: bool,
    writers: &[ImageWriter],
    rng: &mut Rng,
) -> Result<(), String> {
    let pages = fs::read(from.join(kind::PAGES.file_name(map.pages_id))).unwrap_or_default();
    let mut runs: Vec<Vec<PageRun>> = vec![Vec::new(); writers.len()];
    let mut stores: Vec<Vec<u8>> = vec![Vec::new(); writers.len()];
    for (run, place) in map.with_places() {
        let place = place.filter(|p| p.store == map.pages_id).ok_or("a page is not stored")?;
        let offset = place.offset() as usize;
        let mut home = 0;
        for n in 0..run.nr_pages as usize {
            // Pages stay together for a while, as they do in life.
            if n == 0 || rng.next().is_multiple_of(3) {
                home = (rng.next() % writers.len() as u64) as usize;
            }
            let old = rng.next().is_multiple_of(2);
            for (level, (runs, store)) in runs.iter_mut().zip(&mut stores).enumerate() {
                let source = match level {
                    _ if level < home => PageSource::Parent,
                    _ if level > home && !old => continue,
                    _ => run.source,
                };
                let vaddr = run.vaddr + (n * PAGE) as u64;
                match runs.last_mut() {
                    Some(last) if last.end() == vaddr && last.source == source => {
                        last.nr_pages += 1;
                    }
                    _ => runs.push(PageRun { vaddr, nr_pages: 1, source, place: None }),
                }
                let at = offset + n * PAGE;
                match level.cmp(&home) {
                    std::cmp::Ordering::Less => {}
                    std::cmp::Ordering::Equal => store.extend_from_slice(&pages[at..at + PAGE]),
                    std::cmp::Ordering::Greater => store.extend_from_slice(&[0xa5; PAGE]),
                }
            }
        }
    }
    for ((writer, runs), store) in writers.iter().zip(&runs).zip(&stores) {
        let name = kind::PAGES.file_name(map.pages_id);
        writer.write_raw(&name, store).map_err(|e| e.to_string())?;
        if shared {
            writer.write_pagemap_shmem(id, map.pages_id, runs).map_err(|e| e.to_string())?;
        } else {
            writer.write_pagemap(id, map.pages_id, runs).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}
