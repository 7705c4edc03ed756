//! A vdso of another kernel: that of the images is made another one, whose functions do nothing but trap. Whoever still calls
//! them at their old addresses must come out in those of this kernel.

use crate::flavours::{finish, started};
use crate::harness::{Fail, Fs, NotReady, Run, TIMEOUT, Tool, alive};
use crate::programs::by_name;
use crate::trial;
use libtest_mimic::Trial;
use rewake_image::{ImageDir, kind};
use rewake_objects::memory::vdso::Vdso;
use rewake_objects::memory::vma::status;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

/// All trials with another vdso.
pub fn trials(tool: &Tool) -> Vec<Trial> {
    if tool.is_criu {
        return Vec::new();
    }
    let tool = tool.clone();
    vec![trial("vdso_of_another_kernel".into(), move || finish(cycles(&tool)))]
}

const CYCLES: usize = 3;

fn cycles(tool: &Tool) -> Result<(), NotReady> {
    let program = by_name("vdso_rounds")?;
    let (mut run, before) = started(&program, Fs::Memory)?;
    for cycle in 0..CYCLES {
        let images = run.images(cycle)?;
        run.dump(tool, &images, &[])?;
        run.gone(&before.pids(), "after dump")?;
        let changed = another(&images, run.root).map_err(|e| run.fail(e))?;
        // Without the option it is noticed that somebody changed them.
        let done = run.try_restore(tool, &images, &[])?;
        if done.success() {
            return Err(run.fail("changed images were restored".into()).into());
        }
        run.restore(tool, &images, &["--no-verify"])?;
        called(&run, cycle).map_err(|e| format!("cycle {cycle}, {changed} functions: {e}"))?;
    }
    run.check(&before)?;
    Ok(())
}

/// Has the program's threads call, and waits until each has found that the answers are right.
fn called(run: &Run, round: usize) -> Result<(), Fail> {
    fs::write(run.dir.join(format!("round.{round}")), "").map_err(|e| e.to_string())?;
    let until = Instant::now() + TIMEOUT;
    for thread in 0..3 {
        while !run.dir.join(format!("agreed.{round}.{thread}")).exists() {
            if Instant::now() > until || !alive(run.root) {
                return Err(run.fail(format!("thread {thread} does not come back from the vdso")));
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    Ok(())
}

/// Makes every function of the vdso in the images trap; returns how many there are.
fn another(images: &Path, pid: i32) -> Result<usize, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let dir = ImageDir::open(images).map_err(|e| text(&e))?;
    let mm = dir.read_one(kind::MM, pid).map_err(|e| text(&e))?;
    let vma = mm.vmas.iter().find(|v| v.status & status::VDSO != 0).ok_or("there is no vdso")?;
    let map = dir.read_pagemap(pid).map_err(|e| text(&e))?.ok_or("there is no pagemap")?;
    let store = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(images.join(kind::PAGES.file_name(map.pages_id)))
        .map_err(|e| text(&e))?;
    // Where each page of it is in the file.
    let mut places = Vec::new();
    for (run, place) in map.with_places() {
        let Some(place) = place else { continue };
        let pages = (0..run.nr_pages).map(|n| n * 4096);
        let inside = pages.filter(|n| (vma.start..vma.end).contains(&(run.vaddr + n)));
        places.extend(inside.map(|n| (run.vaddr + n - vma.start, place.offset() + n)));
    }
    let mut bytes = vec![0; (vma.end - vma.start) as usize];
    if places.len() * 4096 != bytes.len() {
        return Err(format!("{} pages of {} bytes are stored", places.len(), bytes.len()));
    }
    for (at, offset) in &places {
        let page = &mut bytes[*at as usize..*at as usize + 4096];
        store.read_exact_at(page, *offset).map_err(|e| text(&e))?;
    }
    let functions: Vec<_> = Vdso::parse(&bytes)
        .map_err(|e| text(&e))?
        .functions
        .iter()
        .map(|f| f.start..f.start + f.size)
        .collect();
    for function in &functions {
        bytes[function.clone()].fill(0xcc);
    }
    for (at, offset) in places {
        let page = &bytes[at as usize..at as usize + 4096];
        store.write_all_at(page, offset).map_err(|e| text(&e))?;
    }
    Ok(functions.len())
}
