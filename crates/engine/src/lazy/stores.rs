//! The images as the pager sees them: which pages come later, and the files they are in.

use super::missing::Piece;
use crate::error::{Error, Result};
use crate::restore::read_memory;
use rewake_image::{ImageDir, PageStore, kind};
use rewake_objects::memory::lazy;
use rewake_objects::problem::text;
use rewake_sys::mapped::Mapped;
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

/// The page stores of a checkpoint and its parents, mapped as they are needed.
pub struct Stores {
    images: ImageDir,
    mapped: Mutex<HashMap<PageStore, Arc<Mapped>>>,
}

impl Stores {
    /// Those of a checkpoint.
    pub fn new(images: ImageDir) -> Stores {
        Stores { images, mapped: Mutex::default() }
    }

    /// The checkpoint.
    pub fn images(&self) -> &ImageDir {
        &self.images
    }

    /// How many processes a restore will tell of.
    ///
    /// # Errors
    /// The images are damaged.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let tree = self.images.read_all(kind::PSTREE, ())?;
        Ok(tree.iter().map(|entry| entry.pid as i32).collect())
    }

    /// The command of a process, what of it comes later, and the mappings this belongs to.
    ///
    /// # Errors
    /// The images are damaged.
    pub fn of(&self, pid: i32) -> Result<(String, Vec<Piece>, Vec<Range<u64>>)> {
        let core = self.images.read_one(kind::CORE, pid as u32)?;
        let comm = core.tc.map(|tc| tc.comm).unwrap_or_default();
        let memory = read_memory(&self.images, pid as u32, &comm)?;
        let Some((mm, Some(pages))) = memory else {
            return Ok((text(&comm), Vec::new(), Vec::new()));
        };
        let (_, later) = lazy::divide(&mm, &pages, &[]);
        let mut pieces = Vec::with_capacity(later.runs.len());
        for run in &later.runs {
            let store = self.mapped(run.store)?;
            if run.offset.checked_add(run.bytes()).is_none_or(|end| end > store.len()) {
                return Err(Error::new(format!(
                    "process {pid} ({}): page {:#x} of the images is past the end of its pages file",
                    text(&comm),
                    run.vaddr
                )));
            }
            let (address, len, offset) = (run.vaddr, run.bytes(), run.offset);
            pieces.push(Piece { address, len, store, offset });
        }
        Ok((text(&comm), pieces, lazy::mappings(&mm, &later)))
    }

    fn mapped(&self, store: PageStore) -> Result<Arc<Mapped>> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = mapped.get(&store) {
            return Ok(Arc::clone(known));
        }
        let failed =
            |e: &dyn std::fmt::Display| Error::new(format!("pages-{}.img: {e}", store.pages_id));
        let file = self.images.open_store(store)?;
        let size = file.metadata().map_err(|e| failed(&e))?.len();
        let new = Arc::new(Mapped::new(file.as_fd(), size).map_err(|e| failed(&e))?);
        mapped.insert(store, Arc::clone(&new));
        Ok(new)
    }
}
