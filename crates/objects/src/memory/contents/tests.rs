//! Chains of images of memory that changes at random.

use super::*;
use rewake_image::OpenOptions;
use rewake_image::messages::InventoryEntry;
use rustix::fs::{FallocateFlags, MemfdFlags};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// A directory that goes with the test.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let path = std::env::temp_dir().join(format!("rewake-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Place(path)
    }

    fn dir(&self, n: u64) -> PathBuf {
        let dir = self.0.join(n.to_string());
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn memfd() -> File {
    rustix::fs::memfd_create("contents", MemfdFlags::CLOEXEC).unwrap().into()
}

fn open(dir: &Path) -> ImageDir {
    let options = OpenOptions { pre_dump: true, verify: true };
    ImageDir::open_with(dir, options).unwrap().with_parents().unwrap()
}

/// Makes the images of a round; those of the round before are its parent.
fn save(place: &Place, n: u64, files: &[File], tail: &[u8], workers: usize) -> Written {
    save_to(place, n, files, tail, workers, None)
}

/// The same with several page stores for what is large.
fn save_to(
    place: &Place,
    n: u64,
    files: &[File],
    tail: &[u8],
    workers: usize,
    further: Option<u32>,
) -> Written {
    let images = ImageWriter::create(&place.dir(n)).unwrap();
    let parent = n.checked_sub(1).map(|before| {
        images.link_parent(Path::new(&format!("../{before}"))).unwrap();
        open(&place.dir(before))
    });
    let mut sources = Vec::new();
    for (file, shmid) in files.iter().zip(0..) {
        let size = file.metadata().unwrap().len();
        let (object, file) = (String::from("memory"), file.as_fd());
        sources.push(Source { object, file, size, shmid, tail, huge: None });
    }
    let (parent, pages_id) = (parent.as_ref(), 1);
    let target = Target { images: &images, parent, pages_id, further, workers, runs: false };
    let written = write(&sources, &target).unwrap();
    let pre_dump = InventoryEntry { pre_dump_mode: Some(2), ..InventoryEntry::default() };
    images.commit(&pre_dump).unwrap();
    written
}

/// What a restore would find.
fn content(dir: &Path, shmid: u64, size: u64) -> Vec<u8> {
    let images = open(dir);
    let mut content = vec![0; size.next_multiple_of(PAGE) as usize];
    for run in images.stored_pages_shmem(shmid).unwrap().unwrap().runs {
        let to = &mut content[run.vaddr as usize..run.end() as usize];
        images.open_store(run.store).unwrap().read_exact_at(to, run.offset).unwrap();
    }
    content
}

#[test]
fn a_chain_has_what_there_was() {
    let place = Place::new("contents");
    let mut rng = Rng(88_172_645);
    let mut files: Vec<File> = (0..3).map(|_| memfd()).collect();
    let mut left = 0;
    for round in 0..30 {
        for file in &files {
            let mut size = file.metadata().unwrap().len();
            // Of any size, and larger than what is compared at a time.
            if size == 0 || rng.below(4) == 0 {
                size = rng.below(3 * PIECE);
                file.set_len(size).unwrap();
            }
            for _ in 0..rng.below(40) {
                let at = rng.below(size.max(1));
                let len = (rng.below(20 * PAGE)).min(size - at);
                match rng.below(4) {
                    0 => {
                        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                        rustix::fs::fallocate(file, flags, at, len.max(1)).unwrap();
                    }
                    1 => file.write_all_at(&vec![0; len as usize], at).unwrap(),
                    _ => {
                        let byte = rng.below(256) as u8;
                        file.write_all_at(&vec![byte; len as usize], at).unwrap();
                    }
                }
            }
        }
        // Under each other's numbers at times.
        if round % 7 == 6 {
            files.rotate_left(1);
        }
        let tail = [round as u8 % 3; 5];
        left += save(&place, round, &files, &tail, 1 + round as usize % 3).skipped;
        for (file, shmid) in files.iter().zip(0..) {
            let size = file.metadata().unwrap().len();
            let mut want = vec![0; size.next_multiple_of(PAGE) as usize];
            file.read_exact_at(&mut want[..size as usize], 0).unwrap();
            let found = content(&place.dir(round), shmid, size);
            // Behind the end there may be nothing, if the page is a hole.
            let rest = &mut want[size as usize..];
            let known = rest.len().min(tail.len());
            if found.get(size as usize).is_some_and(|byte| *byte != 0) {
                rest[..known].copy_from_slice(&tail[..known]);
            }
            assert!(found == want, "round {round}, memory {shmid}");
        }
    }
    assert!(left > 1000, "only {left} pages were left to parents");
}

#[test]
fn what_is_as_it_was_is_left_to_the_parent() {
    let place = Place::new("unchanged");
    let file = memfd();
    file.write_all_at(&vec![3; 700 * PAGE as usize], 5 * PAGE).unwrap();
    file.write_all_at(&vec![0; 9 * PAGE as usize], 900 * PAGE).unwrap();
    let files = [file];
    let all = 709;
    assert_eq!(save(&place, 0, &files, &[], 2).written, all);
    let Written { skipped, written, .. } = save(&place, 1, &files, &[], 2);
    assert_eq!((skipped, written), (all, 0));
    assert_eq!(place.dir(1).join("pages-1.img").metadata().unwrap().len(), 0);
    files[0].write_all_at(&[4], 300 * PAGE).unwrap();
    let Written { skipped, written, .. } = save(&place, 2, &files, &[], 2);
    assert_eq!((skipped, written), (all - 1, 1));
}

#[test]
fn numbers_are_told_apart() {
    let mut numbers = [5, 7, 5, 9];
    number_apart(&HashSet::from([7, u32::MAX - 1]), numbers.iter_mut());
    assert_eq!((numbers[0], numbers[3]), (5, 9));
    let all: HashSet<u32> = numbers.iter().copied().chain([7, u32::MAX - 1]).collect();
    assert_eq!(all.len(), 6);
}

#[test]
fn what_is_large_has_several_stores() {
    const MIB: u64 = 1 << 20;
    let place = Place::new("large");
    let files = [memfd(), memfd()];
    for n in 0..90 {
        files[1].write_all_at(&vec![n as u8 + 1; MIB as usize], n * MIB).unwrap();
    }
    // With a hole.
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&files[1], flags, 20 * MIB, 7 * PAGE).unwrap();
    files[0].write_all_at(&[1; 5000], 0).unwrap();
    let plain = save_to(&place, 0, &files, &[], 2, None);
    let divided = save_to(&place, 1, &files, &[], 2, Some(9));
    assert!(plain.further + divided.further == 0, "all is in the parent");
    std::fs::remove_dir_all(place.dir(0)).unwrap();
    let divided = save_to(&place, 0, &files, &[], 2, Some(9));
    assert_eq!(divided.further, 3);
    assert_eq!(divided.written, plain.written);
    let names = [1, 2, 9, 10, 11].map(|n| place.dir(0).join(format!("pages-{n}.img")));
    let sizes = names.map(|name| name.metadata().map_or(0, |m| m.len()));
    assert!(sizes.iter().all(|size| *size > 0), "{sizes:?}");
    assert_eq!(sizes.iter().sum::<u64>(), plain.written * PAGE);
    let mut want = vec![0; 90 * MIB as usize];
    files[1].read_exact_at(&mut want, 0).unwrap();
    assert!(content(&place.dir(0), 1, 90 * MIB) == want);
    let few = save_to(&place, 2, &files[..1], &[], 2, Some(9));
    assert_eq!(few.further, 0);
}
