//! Comparing the page stores with their checksums: small ones before anything else, large ones while the tasks fill their
//! memory from them, by threads of their own. No task is released before it is done.

use crate::error::{Error, Result};
use rewake_image::{ImageDir, RawCheck};
use std::thread::JoinHandle;

/// So much is read in less time than a thread takes to start and the tasks take to come into being.
const AT_ONCE: u64 = 4 << 20;

/// What is still to be checked.
#[derive(Debug)]
pub struct PageCheck(Option<RawCheck>);

impl PageCheck {
    /// Checks small page stores.
    ///
    /// # Errors
    /// One is damaged.
    pub fn new(images: &ImageDir) -> Result<PageCheck> {
        let check = images.raw_check()?;
        if check.bytes() > AT_ONCE {
            return Ok(PageCheck(Some(check)));
        }
        check.run(1)?;
        Ok(PageCheck(None))
    }

    /// Leaves it to a pager.
    pub fn by_others() -> PageCheck {
        PageCheck(None)
    }

    /// Begins with large ones. To be called when the tree exists: some things that creating it needs (a time namespace)
    /// only a process with a single thread may do.
    pub fn start(self) -> Checking {
        let Some(check) = self.0 else { return Checking::Done };
        // The other CPUs fill memory.
        let workers = std::thread::available_parallelism().map_or(1, usize::from).div_ceil(2);
        match std::thread::Builder::new().spawn(move || check.run(workers)) {
            Ok(thread) => Checking::Running(thread),
            Err(e) => Checking::Failed(Error::new(format!("no thread to check pages with: {e}"))),
        }
    }
}

/// A check that is under way.
#[derive(Debug)]
pub enum Checking {
    /// There was nothing left to do.
    Done,
    /// By this thread.
    Running(JoinHandle<rewake_image::Result<()>>),
    /// It could not be begun.
    Failed(Error),
}

impl Checking {
    /// Waits for its end.
    ///
    /// # Errors
    /// A page store is damaged.
    pub fn finish(self) -> Result<()> {
        match self {
            Checking::Done => Ok(()),
            Checking::Failed(e) => Err(e),
            Checking::Running(thread) => match thread.join() {
                Ok(result) => Ok(result?),
                Err(_) => Err(Error::new("the thread that checks pages died")),
            },
        }
    }
}
