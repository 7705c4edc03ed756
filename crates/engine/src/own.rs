//! The controller's own address space.

use crate::error::{Error, Result};
use rewake_objects::memory::mm::Specials;
use std::ops::Range;

/// The controller's own special mappings, all its mappings, and the bytes of its vdso.
#[derive(Debug)]
pub struct AddressSpace {
    /// vvar and vdso.
    pub specials: Specials,
    /// Every mapping.
    pub maps: Vec<Range<u64>>,
    /// Contents of the vdso.
    pub vdso: Vec<u8>,
}

impl AddressSpace {
    /// Reads them.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn read() -> Result<AddressSpace> {
        let failed = |e: &dyn std::fmt::Display| Error::new(format!("own address space: {e}"));
        let mut text = Vec::with_capacity(16 * 1024);
        // Into a large buffer: the kernel writes anew what a small one has no room for.
        std::fs::File::open("/proc/self/maps")
            .and_then(|mut maps| std::io::Read::read_to_end(&mut maps, &mut text))
            .map_err(|e| failed(&e))?;
        let specials = Specials::find(&text).map_err(|e| failed(&e))?;
        let mut maps = Vec::new();
        for map in rewake_proc::maps::parse(&text) {
            let map = map.map_err(|e| failed(&e))?;
            maps.push(map.start..map.end);
        }
        let mut vdso = Vec::new();
        if let Some(range) = &specials.vdso {
            use std::os::unix::fs::FileExt;
            vdso.resize((range.end - range.start) as usize, 0);
            std::fs::File::open("/proc/self/mem")
                .and_then(|memory| memory.read_exact_at(&mut vdso, range.start))
                .map_err(|e| failed(&e))?;
        }
        Ok(AddressSpace { specials, maps, vdso })
    }
}
