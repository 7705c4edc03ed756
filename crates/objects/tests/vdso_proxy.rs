//! Copies of a vdso are made to lead to this machine's own one, and then called.
#![allow(unsafe_code, reason = "calls machine code it has written")]

use rewake_objects::memory::mm::Specials;
use rewake_objects::memory::vdso::{self, Patch, Vdso};
use std::ffi::c_void;
use std::fs::File;
use std::os::unix::fs::FileExt;

const NAMES: [&str; 6] =
    ["clock_getres", "clock_gettime", "getcpu", "getrandom", "gettimeofday", "time"];
const FAR: u64 = 0x1200_0000_0000;

/// This process's own vdso.
fn own() -> (Vec<u8>, u64) {
    let maps = std::fs::read("/proc/self/maps").expect("maps");
    let range = Specials::find(&maps).expect("maps").vdso.expect("a vdso");
    let mut bytes = vec![0; (range.end - range.start) as usize];
    File::open("/proc/self/mem")
        .expect("mem")
        .read_exact_at(&mut bytes, range.start)
        .expect("vdso");
    (bytes, range.start)
}

/// An ELF file of two pages with these functions (name, offset, size), whose code, from 0x1000 to `end`, is all traps.
fn elf(functions: &[(&str, u64, u64)], end: usize, gnu_hash: bool, base: u64) -> Vec<u8> {
    let mut bytes = vec![0; 0x2000];
    let mut put = |at: usize, words: &[u64]| {
        for (i, word) in words.iter().enumerate() {
            bytes[at + i * 8..][..8].copy_from_slice(&word.to_le_bytes());
        }
    };
    put(0, &[0x0001_0102_464c_457f, 0, 3 | 62 << 16 | 1 << 32, 0, 64, 0, 64 << 32 | 56 << 48, 2]);
    put(64, &[1 | 5 << 32, 0, base, 0, end as u64, end as u64, 0x1000]);
    put(120, &[2 | 4 << 32, 0x100, base.wrapping_add(0x100), 0, 0x60, 0x60, 8]);
    put(0x100, &[if gnu_hash { 0x6fff_fef5 } else { 4 }, base.wrapping_add(0x200)]);
    put(0x110, &[5, base.wrapping_add(0x800), 6, base.wrapping_add(0x300), 10, 0x400]);
    let count = functions.len() as u64 + 1;
    if gnu_hash {
        // One bucket, symbols from 1, one filter word, a chain of even hashes but for the last one.
        put(0x200, &[1 | 1 << 32, 1, 0, 1]);
        for i in 0..count - 1 {
            put(0x21c + i as usize * 4, &[u64::from(i == count - 2)]);
        }
    } else {
        put(0x200, &[1 | count << 32]);
    }
    let mut names = vec![0];
    for (i, (name, offset, size)) in functions.iter().enumerate() {
        let value = base.wrapping_add(*offset);
        put(0x318 + i * 24, &[names.len() as u64 | 0x12 << 32 | 5 << 48, value, *size]);
        names.extend(name.as_bytes());
        names.push(0);
    }
    bytes[0x800..][..names.len()].copy_from_slice(&names);
    bytes[0x1000..end].fill(0xcc);
    bytes
}

/// Code mapped for reading and executing only, patched through `/proc/self/mem`.
struct Mapped<'a> {
    vdso: Vdso<'a>,
    address: u64,
}

impl Mapped<'_> {
    fn new<'a>(
        bytes: &'a [u8],
        near: u64,
        own: &[u8],
        own_address: u64,
    ) -> (Mapped<'a>, Vec<Patch>) {
        let mut at = near;
        let address = loop {
            // SAFETY: a new mapping where nothing is.
            let address = unsafe {
                let (rx, flags) = (
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                );
                libc::mmap(at as *mut c_void, bytes.len(), rx, flags, -1, 0)
            };
            if address != libc::MAP_FAILED {
                break address as u64;
            }
            at -= 0x10_0000;
        };
        let memory = File::options().read(true).write(true).open("/proc/self/mem").expect("mem");
        memory.write_all_at(bytes, address).expect("our own memory");
        let patches = vdso::proxy(bytes, address, own, own_address).expect("a proxy");
        vdso::write(&memory, &patches).expect("our own memory");
        (Mapped { vdso: Vdso::parse(bytes).expect("a vdso"), address }, patches)
    }

    fn find(&self, name: &str) -> Option<u64> {
        Some(self.address + self.vdso.find(name.as_bytes())? as u64)
    }

    fn call(&self, name: &str, arguments: [u64; 5]) -> i64 {
        let function = self.find(name).unwrap_or_else(|| panic!("no {name}"));
        let [a, b, c, d, e] = arguments;
        // SAFETY: the address is that of a function of the vdso, which takes at most five words.
        unsafe {
            let function: extern "C" fn(u64, u64, u64, u64, u64) -> i64 =
                std::mem::transmute(function as *const c_void);
            function(a, b, c, d, e)
        }
    }

    /// Results of all but getrandom are of type int.
    fn call_int(&self, name: &str, arguments: [u64; 5]) -> i32 {
        self.call(name, arguments) as i32
    }

    fn clock(&self, clock: i32) -> i128 {
        let mut time = [0i64; 2];
        let to = time.as_mut_ptr() as u64;
        assert_eq!(self.call_int("clock_gettime", [clock as u64, to, 0, 0, 0]), 0);
        i128::from(time[0]) * 1_000_000_000 + i128::from(time[1])
    }

    /// Calls all functions but getrandom and compares with what the kernel says.
    fn check(&self) {
        for clock in [
            libc::CLOCK_REALTIME,
            libc::CLOCK_MONOTONIC,
            libc::CLOCK_BOOTTIME,
            libc::CLOCK_MONOTONIC_COARSE,
            libc::CLOCK_THREAD_CPUTIME_ID,
        ] {
            let before = kernel_clock(clock);
            let between = self.clock(clock);
            assert!((before..=kernel_clock(clock)).contains(&between), "clock {clock}");
        }
        assert_eq!(self.call_int("clock_gettime", [12345, 0, 0, 0, 0]), -libc::EINVAL);
        let mut resolution = [7i64; 2];
        let to = resolution.as_mut_ptr() as u64;
        assert_eq!(self.call_int("clock_getres", [libc::CLOCK_MONOTONIC as u64, to, 0, 0, 0]), 0);
        assert_eq!(resolution, [0, 1]);

        // The coarse clock is what time(2) reads.
        let before = kernel_clock(libc::CLOCK_REALTIME_COARSE) / 1_000_000_000;
        let mut stored = 0i64;
        let time = self.call("time", [&raw mut stored as u64, 0, 0, 0, 0]);
        assert_eq!(time, stored);
        assert!((before..=before + 2).contains(&i128::from(time)));

        let before = kernel_clock(libc::CLOCK_REALTIME) / 1000;
        let mut time = [0i64; 2];
        assert_eq!(self.call_int("gettimeofday", [time.as_mut_ptr() as u64, 0, 0, 0, 0]), 0);
        let between = i128::from(time[0]) * 1_000_000 + i128::from(time[1]);
        assert!((before..=kernel_clock(libc::CLOCK_REALTIME) / 1000).contains(&between));

        let mut here = [u32::MAX; 2];
        loop {
            let before = kernel_cpu();
            let to = here.as_mut_ptr() as u64;
            assert_eq!(self.call_int("getcpu", [to, to + 4, 0, 0, 0]), 0);
            if before == kernel_cpu() {
                assert_eq!(here, before);
                break;
            }
        }
    }
}

fn kernel_clock(clock: i32) -> i128 {
    let mut time = [0i64; 2];
    // SAFETY: the kernel writes a timespec.
    assert_eq!(unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time.as_mut_ptr()) }, 0);
    i128::from(time[0]) * 1_000_000_000 + i128::from(time[1])
}

fn kernel_cpu() -> [u32; 2] {
    let mut here = [0u32; 2];
    let [cpu, node] = &mut here;
    // SAFETY: the kernel writes two numbers.
    assert_eq!(unsafe { libc::syscall(libc::SYS_getcpu, &raw mut *cpu, &raw mut *node, 0) }, 0);
    here
}

#[test]
fn own_functions_are_found() {
    let (bytes, address) = own();
    let vdso = Vdso::parse(&bytes).expect("a vdso");
    for name in ["clock_getres", "clock_gettime", "getcpu", "gettimeofday", "time"] {
        let start = vdso.find(name.as_bytes()).unwrap_or_else(|| panic!("no {name}"));
        let symbol = std::ffi::CString::new(format!("__vdso_{name}")).expect("a name");
        // SAFETY: looks a symbol up.
        let expected = unsafe {
            let flags = libc::RTLD_NOW | libc::RTLD_NOLOAD;
            libc::dlsym(libc::dlopen(c"linux-vdso.so.1".as_ptr(), flags), symbol.as_ptr())
        };
        assert_eq!(address + start as u64, expected as u64, "{name}");
    }
    assert!(vdso.functions.is_sorted_by_key(|f| f.start));
    assert!(vdso.functions.iter().all(|f| f.size > 0 && !f.name.starts_with(b"__")));
}

#[test]
fn a_copy_leads_to_the_own_vdso() {
    let (bytes, address) = own();
    for (near, first) in [(address - 0x100_0000, 0xe9), (FAR, 0x48)] {
        let (copy, patches) = Mapped::new(&bytes, near, &bytes, address);
        assert_eq!(patches.len(), copy.vdso.functions.len(), "two names are one function");
        assert!(patches.iter().all(|p| p.bytes[0] == first));
        copy.check();
        if copy.find("getrandom").is_some() {
            let mut parameters = [0u32; 16];
            let to = parameters.as_mut_ptr() as u64;
            assert_eq!(copy.call("getrandom", [0, 0, 0, to, u64::MAX]), 0);
            assert!(parameters[0] >= 64, "size of a state: {parameters:?}");
            let mut state = vec![0u64; 4096 / 8 * 2];
            let state = (state.as_mut_ptr() as u64).next_multiple_of(4096);
            let mut random = [0u8; 32];
            let to = random.as_mut_ptr() as u64;
            assert_eq!(copy.call("getrandom", [to, 32, 0, state, u64::from(parameters[0])]), 32);
            assert_ne!(random, [0; 32]);
        }
    }
}

#[test]
fn without_an_own_vdso_the_kernel_is_called() {
    let (bytes, _) = own();
    let (copy, patches) = Mapped::new(&bytes, FAR - 0x1_0000_0000, &[], 0);
    assert!(patches.iter().all(|p| p.bytes.ends_with(&[0x0f, 0x05, 0xc3])));
    copy.check();
    if copy.find("getrandom").is_some() {
        let mut parameters = [0u32; 16];
        let to = parameters.as_mut_ptr() as u64;
        assert_eq!(copy.call("getrandom", [0, 0, 0, to, u64::MAX]), -i64::from(libc::ENOSYS));
        assert_eq!(parameters, [0; 16]);
        let mut random = [0u8; 32];
        let to = random.as_mut_ptr() as u64;
        assert_eq!(copy.call("getrandom", [to, 32, 0, 0, 0]), 32);
        assert_ne!(random, [0; 32]);
    }
}

#[test]
fn short_functions_lead_through_the_unused_end() {
    let (own, address) = own();
    let in_own = Vdso::parse(&own).expect("a vdso");
    // Not aligned, so that nothing is known to be padding: five bytes are the least.
    let mut functions: Vec<_> =
        (0x1003..).step_by(5).zip(NAMES).map(|(at, n)| (n, at, 5)).collect();
    functions.push(("__vdso_of_the_future", 0x1003 + 5 * NAMES.len() as u64, 5));
    let mut near = FAR - 0x2_0000_0000;
    for (gnu_hash, base) in [(false, 0), (true, 0), (false, 0xffff_ffff_ff70_0000)] {
        let bytes = elf(&functions, 0x1100, gnu_hash, base);
        let (copy, patches) = Mapped::new(&bytes, near, &own, address);
        for name in NAMES {
            let entry = copy.find(name).expect("a name");
            let patch = patches.iter().find(|p| p.address == entry).expect("its patch");
            assert_eq!((patch.bytes[0], patch.bytes.len()), (0xe9, 5));
            if let Some(start) = in_own.find(name.as_bytes()) {
                let to = (address + start as u64).to_le_bytes();
                assert!(patches.iter().any(|p| p.bytes.get(2..10) == Some(&to)), "{name}");
            }
        }
        assert_eq!(patches.len(), 2 * functions.len(), "a jump and what it leads to");
        copy.check();
        assert_eq!(copy.call("of_the_future", [0; 5]), -i64::from(libc::ENOSYS));
        disjoint(&patches, copy.address, bytes.len());

        let (copy, patches) = Mapped::new(&bytes, near - 0x1_0000_0000, &[], 0);
        copy.check();
        disjoint(&patches, copy.address, bytes.len());
        near -= 0x2_0000_0000;
    }
}

#[test]
fn padding_is_used_only_where_it_is_known_to_be_padding() {
    let (own, address) = own();
    let aligned = elf(&[("time", 0x1010, 3), ("getcpu", 0x1020, 3)], 0x2000, false, 0);
    let (copy, patches) = Mapped::new(&aligned, FAR - 0x10_0000_0000, &own, address);
    assert_eq!(patches.iter().map(|p| p.bytes.len()).collect::<Vec<_>>(), [12, 12]);
    disjoint(&patches, copy.address, aligned.len());
    assert!(copy.call("time", [0; 5]) > 1_700_000_000);

    let tight = elf(&[("time", 0x1010, 3), ("getcpu", 0x1021, 3)], 0x1100, false, 0);
    let problem = vdso::proxy(&tight, FAR, &own, address).expect_err("three bytes");
    assert_eq!(problem.object, "function time of the vdso of the image");
    assert!(problem.reason.contains("3 bytes") && problem.remedy.is_some());
    // Enough for a near jump, but it leads nowhere: every byte is in use.
    let full = elf(&[("time", 0x1010, 5), ("getcpu", 0x1021, 5)], 0x2000, false, 0);
    assert!(vdso::proxy(&full, FAR, &own, address).is_err());
    // The next function bounds what an exaggerated size claims.
    let overlapping = elf(&[("time", 0x1010, 500), ("getcpu", 0x1016, 500)], 0x1800, false, 0);
    disjoint(&vdso::proxy(&overlapping, FAR, &own, address).expect("a proxy"), FAR, 0x2000);
    // Functions among the zeros, where jumps of others would go.
    let mut beyond = elf(&[("time", 0x1001, 5), ("getcpu", 0x1022, 80)], 0x1020, false, 0);
    beyond[64 + 32] = 0xff;
    let patches = vdso::proxy(&beyond, FAR, &own, address).expect("a proxy");
    assert_eq!(patches.len(), 3);
    disjoint(&patches, FAR, 0x2000);
}

fn disjoint(patches: &[Patch], start: u64, len: usize) {
    let mut ranges: Vec<_> =
        patches.iter().map(|p| (p.address, p.address + p.bytes.len() as u64)).collect();
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0), "{ranges:x?}");
    assert!(ranges.iter().all(|r| r.0 >= start && r.1 <= start + len as u64), "{ranges:x?}");
}

#[test]
fn threads_inside_may_go_on_only_without_the_data() {
    let (bytes, address) = own();
    let patches = vdso::proxy(&bytes, FAR, &bytes, address).expect("a proxy");
    let may = |rip| vdso::may_continue(&bytes, FAR, &patches, rip).is_ok();
    let range = FAR..FAR + bytes.len() as u64;
    for rip in [0, FAR - 1, range.end, u64::MAX] {
        assert!(may(rip) && !vdso::is_inside(rip, &range), "{rip:#x} is outside");
    }
    for function in &Vdso::parse(&bytes).expect("a vdso").functions {
        let entry = FAR + function.start as u64;
        assert!(vdso::is_inside(entry, &range) && may(entry));
        assert!(!may(entry + 1) && !may(entry + 12));
    }
    let call = bytes.windows(2).position(|w| w == [0x0f, 0x05]).expect("a system call") as u64;
    assert!(may(FAR + call) && !may(FAR + call + 1) && may(FAR + call + 2) && !may(FAR + call + 3));
    // Where a patch was written, there is nothing to go on with.
    let over = [Patch { address: FAR + call - 3, bytes: vec![0x90; 6] }];
    assert!(vdso::may_continue(&bytes, FAR, &over, FAR + call).is_err());
    assert!(vdso::may_continue(&bytes, FAR, &over, FAR + call + 2).is_err());
}

#[test]
fn any_bytes_are_borne() {
    let (bytes, address) = own();
    let synthetic = elf(&[("time", 0x1003, 5), ("getcpu", 0x1010, 40)], 0x1100, true, 0);
    let mut accepted = 0;
    let mut rejected = 0;
    let mut feed = |dumped: &[u8]| match vdso::proxy(dumped, FAR, &bytes, address) {
        Ok(patches) => {
            disjoint(&patches, FAR, dumped.len());
            accepted += 1;
        }
        Err(_) => rejected += 1,
    };
    for good in [&bytes, &synthetic] {
        for len in 0..good.len() {
            feed(&good[..len]);
        }
        // Headers, tables and names end before the code.
        for at in 0..0x840 {
            for value in [0, 1, 0x10, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                feed(&bad);
                bad[at & !7..][..8].fill(value);
                feed(&bad);
            }
        }
    }
    assert!(accepted > 1000 && rejected > 1000, "{accepted} accepted, {rejected} rejected");
    assert!(vdso::proxy(&bytes, u64::MAX - 100, &bytes, address).is_err());
    assert!(vdso::proxy(&bytes, FAR, &bytes, u64::MAX - 100).is_err());
    assert!(vdso::proxy(&vec![0x7f; 2 << 20], FAR, &bytes, address).is_err());
}
