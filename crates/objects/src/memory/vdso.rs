//! The dumped vdso under another kernel: its functions are made to lead to the running kernel's own.
//!
//! A process calls the vdso (vdso(7)) through addresses it looked up once: glibc caches them at start-up, other runtimes
//! do the same. If the running kernel's vdso is byte for byte the dumped one, [`mm`](super::mm) moves it to the old
//! address and nothing is left to do here. Otherwise (another kernel, or another CPU, for which the kernel patched other
//! instructions in) the dumped bytes are kept at their address as ordinary private memory, so that the addresses stay
//! good, the ELF symbols there stay readable (`AT_SYSINFO_EHDR` goes on pointing at them), and the running kernel's own
//! vdso lives elsewhere, with its data. [`proxy`] yields what to write over the dumped bytes: a jump at the entry of
//! every function, or, where this kernel's vdso lacks the function, the plain system call.
//!
//! A process restored that way can be dumped again: what was the vdso is now memory like any other, and the vdso to look
//! at is the one the kernel calls `[vdso]`. A further kernel makes the chain of jumps one longer.
//!
//! # Layouts
//!
//! Code in the vdso reads its data relative to itself, at a distance fixed when the kernel was built, therefore the data
//! mappings may only be moved together with it. What lies below the code on x86-64, in pages:
//!
//! | kernels     | `[vvar]`                                  | `[vvar_vclock]`       | functions                        |
//! |-------------|-------------------------------------------|-----------------------|----------------------------------|
//! | 6.1 – 6.10  | 4: data, pvclock, hvclock, time namespace | –                     | clock_gettime, clock_getres, gettimeofday, time, getcpu; sgx_enter_enclave if configured |
//! | 6.11 – 6.12 | same                                      | –                     | and getrandom                    |
//! | from 6.13   | data, time namespace; 4 since 6.15, when generator and architecture got pages of their own | 2: pvclock, hvclock | same |
//!
//! The image format knows one VVAR mapping, in which the two are merged ([`vma`](super::vma)); it says nothing about
//! which layout the data had, which does not matter here: data of another layout is never mapped below the dumped code.
//! Every function is exported twice, as `__vdso_NAME` and, weak, as `NAME` (`__vdso_sgx_enter_enclave` only once).
//!
//! # Threads stopped inside
//!
//! A thread whose instruction pointer is inside the dumped vdso would go on reading data that is not there. A dump
//! should therefore let such a thread out first ([`is_inside`]): it waits for nobody there, so that some hundred single
//! steps (`PTRACE_SINGLESTEP`) end in its caller. Only getrandom with a large buffer takes more; letting the thread run
//! for a moment and stopping it anew is then cheaper. An image with a thread inside is restored if nothing is lost by it
//! ([`may_continue`]): at the entry of a function there is the jump, and around a `syscall` instruction only the way out
//! follows, without the data.
//!
//! What nobody can see is a signal handler that interrupted the vdso and will return into it; its thread gets a SIGSEGV
//! when it does, unless it was interrupted at one of those two places.

use crate::Problem;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// The bytes are not those of a vdso.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the ELF image of an x86-64 vdso: {0} missing, out of bounds or of another kind")]
pub struct Malformed(&'static str);

/// A function of a vdso.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function<'a> {
    /// Its name without `__vdso_`.
    pub name: &'a [u8],
    /// Where it begins, in bytes from the beginning of the vdso.
    pub start: usize,
    /// Its length in bytes; 0 if the symbol table does not tell.
    pub size: usize,
}

/// The functions of a vdso, as mapped (elf(5)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vdso<'a> {
    /// Its functions, ascending by beginning; those with two names are there twice unless the names differ by the
    /// prefix only.
    pub functions: Vec<Function<'a>>,
    /// All of it.
    pub bytes: &'a [u8],
}

/// No kernel's vdso is anywhere near.
const LARGEST: usize = 1 << 20;

impl<'a> Vdso<'a> {
    /// Reads the dynamic symbols. `bytes` may be anything.
    ///
    /// # Errors
    /// It is not a vdso of this architecture, or refers to places outside of itself.
    pub fn parse(bytes: &'a [u8]) -> Result<Vdso<'a>, Malformed> {
        const MACHINE_X86_64: u16 = 62;
        let elf = Elf { bytes, base: 0 };
        // Magic, 64 bits, little endian.
        if bytes.len() > LARGEST || !bytes.starts_with(b"\x7fELF\x02\x01") {
            return Err(Malformed("its header is"));
        }
        if elf.u16(18).ok_or(Malformed("its header is"))? != MACHINE_X86_64 {
            return Err(Malformed("its machine is"));
        }
        let segments = elf.segments().ok_or(Malformed("a program header is"))?;
        let find = |kind| segments.iter().find(|s| s.kind == kind);
        let load = find(PT_LOAD).ok_or(Malformed("the loaded segment is"))?;
        let dynamic = find(PT_DYNAMIC).ok_or(Malformed("the dynamic section is"))?;
        // Addresses in the file may be meant for some other place than 0; offsets count.
        let elf = Elf { bytes, base: load.address.wrapping_sub(load.offset) };
        let mut functions = elf.functions(dynamic, load).ok_or(Malformed("the symbol table is"))?;
        functions.sort_unstable_by_key(|f| (f.start, f.name, f.size));
        functions.dedup_by_key(|f| (f.start, f.name));
        Ok(Vdso { functions, bytes })
    }

    /// Where the function of this name (without `__vdso_`) begins.
    #[must_use]
    pub fn find(&self, name: &[u8]) -> Option<usize> {
        self.functions.iter().find(|f| f.name == name).map(|f| f.start)
    }

    /// Bytes that belong to `function` or to nothing.
    fn room(&self, function: &Function<'_>, all_aligned: bool) -> usize {
        let next = self.functions.partition_point(|f| f.start <= function.start);
        let next = self.functions.get(next).map_or(self.bytes.len(), |f| f.start);
        let size = match function.size {
            0 => usize::MAX,
            // Up to where the next function may begin there is padding.
            size if all_aligned => size.saturating_add(ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT,
            size => size,
        };
        size.min(next - function.start)
    }
}

/// Functions of the kernel begin at multiples of this, unless it was configured otherwise.
const ALIGNMENT: usize = 16;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

struct Elf<'a> {
    bytes: &'a [u8],
    base: u64,
}

impl<'a> Elf<'a> {
    fn array<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        self.bytes.get(usize::try_from(at).ok()?..)?.first_chunk().copied()
    }

    fn u16(&self, at: u64) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: u64) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: u64) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    fn segments(&self) -> Option<Vec<Segment>> {
        let (table, size, count) = (self.u64(32)?, self.u16(54)?, self.u16(56)?);
        (0..u64::from(count))
            .map(|i| {
                let at = table.checked_add(i * u64::from(size))?;
                // The fields lie within 40 bytes, so none of the sums below overflows if the last one is in bounds.
                self.array::<40>(at)?;
                Some(Segment {
                    kind: self.u32(at)?,
                    offset: self.u64(at + 8)?,
                    address: self.u64(at + 16)?,
                    size: self.u64(at + 32)?,
                })
            })
            .collect()
    }

    /// A table the dynamic section points to.
    fn table(&self, dynamic: &Segment, tag: u64) -> Option<u64> {
        (0..dynamic.size / 16)
            .map_while(|i| {
                let at = dynamic.offset.checked_add(i * 16)?;
                Some((self.u64(at)?, self.u64(at.checked_add(8)?)?))
            })
            .take_while(|(t, _)| *t != 0)
            .find(|(t, _)| *t == tag)
            .map(|(_, value)| value)
    }

    fn functions(&self, dynamic: &Segment, load: &Segment) -> Option<Vec<Function<'a>>> {
        const DT_STRTAB: u64 = 5;
        const DT_SYMTAB: u64 = 6;
        const DT_STRSZ: u64 = 10;
        let place = |tag| Some(self.table(dynamic, tag)?.wrapping_sub(self.base));
        let (symbols, names) = (place(DT_SYMTAB)?, place(DT_STRTAB)?);
        let names = self.bytes.get(usize::try_from(names).ok()?..)?;
        let names = names.get(..usize::try_from(self.table(dynamic, DT_STRSZ)?).ok()?)?;
        let count = self.symbol_count(dynamic)?;
        let symbols = self.bytes.get(usize::try_from(symbols).ok()?..)?;
        let symbols = symbols.get(..usize::try_from(count).ok()?.checked_mul(24)?)?;
        let mut functions = Vec::new();
        for symbol in symbols.as_chunks::<24>().0 {
            const FUNCTION: u8 = 2;
            let symbol = Elf { bytes: symbol, base: 0 };
            if symbol.array::<5>(0)?[4] & 0xf != FUNCTION || symbol.u16(6)? == 0 {
                continue;
            }
            let name = names.get(symbol.u32(0)? as usize..)?;
            let name = &name[..name.iter().position(|b| *b == 0)?];
            let start = symbol.u64(8)?.wrapping_sub(self.base);
            let end = load.offset.checked_add(load.size)?.min(self.bytes.len() as u64);
            if !(load.offset..end).contains(&start) {
                return None;
            }
            functions.push(Function {
                name: name.strip_prefix(b"__vdso_").unwrap_or(name),
                start: start as usize,
                size: symbol.u64(16)?.min(end - start) as usize,
            });
        }
        Some(functions)
    }

    /// How many symbols there are can only be told from the hash tables; kernels have one of them or both.
    fn symbol_count(&self, dynamic: &Segment) -> Option<u64> {
        const DT_HASH: u64 = 4;
        const DT_GNU_HASH: u64 = 0x6fff_fef5;
        let word =
            |table: u64, i: u64| self.u32(table.checked_add(i.checked_mul(4)?)?).map(u64::from);
        if let Some(hash) = self.table(dynamic, DT_HASH) {
            return word(hash.wrapping_sub(self.base), 1);
        }
        let hash = self.table(dynamic, DT_GNU_HASH)?.wrapping_sub(self.base);
        let (buckets, first, filters) = (word(hash, 0)?, word(hash, 1)?, word(hash, 2)?);
        let at = 4 + filters * 2;
        let mut last = 0;
        for i in 0..buckets {
            last = last.max(word(hash, at + i)?);
        }
        if last == 0 {
            return Some(first);
        }
        // The chain of the last bucket ends at a hash with its lowest bit set.
        while word(hash, at + buckets + last.checked_sub(first)?)? & 1 == 0 {
            last += 1;
        }
        Some(last + 1)
    }
}

/// Bytes to be written into the memory of the restored process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// Address.
    pub address: u64,
    /// Machine code.
    pub bytes: Vec<u8>,
}

/// What makes every function of the `dumped` vdso, mapped at `dumped_address`, lead to the function of the same name of
/// this kernel's `own`, mapped at `own_address` for as long as the process lives. An empty `own` stands for a kernel
/// without vdso. A function this kernel lacks makes the system call instead; one that is none returns `-ENOSYS`.
///
/// Only the register RAX, which no function takes anything in, is used on the way. Patches lie inside the dumped vdso
/// and do not overlap; [`write`](fn@write) applies them.
///
/// # Errors
/// One of them is not a vdso, or a function of the dumped one is too short to be replaced.
pub fn proxy(
    dumped: &[u8],
    dumped_address: u64,
    own: &[u8],
    own_address: u64,
) -> Result<Vec<Patch>, Problem> {
    let object = |of: &str, at: u64| format!("vdso of {of} at {at:#x}");
    let parse = |bytes, of: &str, at: u64| {
        let vdso = Vdso::parse(bytes).map_err(|e| Problem::new(object(of, at), e.to_string()))?;
        match at.checked_add(bytes.len() as u64) {
            Some(end) if end <= super::TASK_SIZE => Ok(vdso),
            _ => Err(Problem::new(object(of, at), "it lies outside user space")),
        }
    };
    let theirs = parse(dumped, "the image", dumped_address)?;
    let ours = match own {
        [] => Vdso::default(),
        _ => parse(own, "this kernel", own_address)?,
    };
    let all_aligned = theirs.functions.iter().all(|f| f.start % ALIGNMENT == 0);
    let mut cave = unused_end(&theirs);
    let mut patches = Vec::with_capacity(theirs.functions.len());
    for names in theirs.functions.chunk_by(|a, b| a.start == b.start) {
        let Some(first) = names.first() else { continue };
        let entry = dumped_address + first.start as u64;
        let target = Target::choose(names, &ours, own_address);
        let room = names.iter().map(|f| theirs.room(f, all_aligned)).min().unwrap_or(0);
        let code = target.code(entry);
        if code.len() <= room {
            patches.push(Patch { address: entry, bytes: code });
            continue;
        }
        // By way of the unused end, which is as near as a jump of five bytes needs.
        let at = dumped_address + cave.start as u64;
        let code = target.code(at);
        let Some(jump) =
            near_jump(entry, at).filter(|j| j.len() <= room && code.len() <= cave.len())
        else {
            return Err(Problem::new(
                format!("function {} of the vdso of the image", crate::problem::text(first.name)),
                format!("its {room} bytes have no room for a jump to this kernel's vdso"),
            )
            .remedy("restore it under the kernel and on the kind of CPU it was dumped on"));
        };
        cave.start += code.len();
        patches.push(Patch { address: entry, bytes: jump });
        patches.push(Patch { address: at, bytes: code });
    }
    Ok(patches)
}

/// The zeros between the end of the file and the end of its last page.
fn unused_end(vdso: &Vdso<'_>) -> Range<usize> {
    // More than any code put at an entry, in case somebody's functions begin among the zeros.
    const LONGEST: usize = 32;
    let used = vdso.bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    let used = used.max(vdso.functions.last().map_or(0, |f| f.start + LONGEST));
    let end = vdso.bytes.len();
    used.next_multiple_of(ALIGNMENT).min(end)..end
}

/// Where a function is to lead.
enum Target {
    /// A function of this kernel's vdso.
    Function(u64),
    /// A system call with the same parameters and the same result.
    Call(libc::c_long),
    /// getrandom(2), with its two further parameters.
    GetRandom,
    /// Nothing here does the same.
    Nothing,
}

impl Target {
    fn choose(names: &[Function<'_>], ours: &Vdso<'_>, own_address: u64) -> Target {
        if let Some(start) = names.iter().find_map(|f| ours.find(f.name)) {
            return Target::Function(own_address + start as u64);
        }
        names.iter().find_map(|f| Target::call(f.name)).unwrap_or_else(|| {
            let name = names.first().map(|f| crate::problem::text(f.name)).unwrap_or_default();
            log::warn!("vdso: this kernel has no {name}; from now on it will fail with ENOSYS");
            Target::Nothing
        })
    }

    /// The system call behind a function.
    fn call(name: &[u8]) -> Option<Target> {
        Some(Target::Call(match name {
            b"clock_gettime" => libc::SYS_clock_gettime,
            b"clock_getres" => libc::SYS_clock_getres,
            b"gettimeofday" => libc::SYS_gettimeofday,
            b"time" => libc::SYS_time,
            b"getcpu" => libc::SYS_getcpu,
            b"getrandom" => return Some(Target::GetRandom),
            _ => return None,
        }))
    }

    /// Code that leads there from the beginning of a function, to be placed at `at`.
    fn code(&self, at: u64) -> Vec<u8> {
        // mov $-ENOSYS, %rax; ret
        const NO_SYSTEM_CALL: [u8; 8] =
            [0x48, 0xc7, 0xc0, -libc::ENOSYS as u8, 0xff, 0xff, 0xff, 0xc3];
        match *self {
            Target::Function(to) => near_jump(at, to).unwrap_or_else(|| {
                // movabs $to, %rax; jmp *%rax
                [&[0x48, 0xb8][..], &to.to_le_bytes(), &[0xff, 0xe0]].concat()
            }),
            // mov $number, %eax; syscall; ret
            Target::Call(number) => {
                [&[0xb8][..], &(number as u32).to_le_bytes(), &[0x0f, 0x05, 0xc3]].concat()
            }
            // With -1 as fifth parameter it is asked for the size of its state, and must say that it has none: a
            // success would leave the answer unwritten. cmp $-1, %r8; jne to the call; there the other two.
            Target::GetRandom => [
                &[0x49, 0x83, 0xf8, 0xff, 0x75, NO_SYSTEM_CALL.len() as u8][..],
                &NO_SYSTEM_CALL,
                &Target::Call(libc::SYS_getrandom).code(at),
            ]
            .concat(),
            Target::Nothing => NO_SYSTEM_CALL.to_vec(),
        }
    }
}

/// `jmp to`, if it is within two gigabytes.
fn near_jump(at: u64, to: u64) -> Option<Vec<u8>> {
    let distance = i32::try_from(to.wrapping_sub(at).wrapping_sub(5) as i64).ok()?;
    Some([&[0xe9][..], &distance.to_le_bytes()].concat())
}

/// Writes the patches through `/proc/PID/mem` of the restored process, before it runs. Its memory need not be
/// writable any more (the kernel's `proc_mem.force_override` may ask for the writer to be the tracer).
///
/// # Errors
/// The memory is not mapped, or the kernel forbids writing to it.
pub fn write(memory: &File, patches: &[Patch]) -> Result<(), Problem> {
    patches.iter().try_for_each(|patch| {
        memory.write_all_at(&patch.bytes, patch.address).map_err(|e| {
            Problem::new(format!("vdso of the image, code at {:#x}", patch.address), e.to_string())
        })
    })
}

/// Is the instruction pointer inside the vdso, mapped at `range`? Such a thread is to be let out before it is dumped.
#[must_use]
pub fn is_inside(rip: u64, range: &Range<u64>) -> bool {
    range.contains(&rip)
}

/// May a thread that was dumped with its instruction pointer at `rip` go on in the `dumped` vdso, mapped at
/// `dumped_address`, after the `patches` were written? Outside of it, it may.
///
/// # Errors
/// It would read data that is not there, or its code is overwritten.
pub fn may_continue(
    dumped: &[u8],
    dumped_address: u64,
    patches: &[Patch],
    rip: u64,
) -> Result<(), Problem> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let Some(offset) = rip.checked_sub(dumped_address).map(|o| o as usize) else { return Ok(()) };
    let Some((before, after)) = dumped.split_at_checked(offset).filter(|(_, a)| !a.is_empty())
    else {
        return Ok(());
    };
    if patches.iter().any(|p| p.address == rip) {
        return Ok(());
    }
    let overwritten =
        patches.iter().any(|p| rip > p.address && rip - p.address < p.bytes.len() as u64);
    if !overwritten && (before.ends_with(&SYSCALL) || after.starts_with(&SYSCALL)) {
        return Ok(());
    }
    Err(Problem::new(
        format!("instruction pointer {rip:#x}"),
        "the thread was dumped in the middle of a function of its kernel's vdso, which this kernel does not have",
    )
    .remedy("restore it under the kernel and on the kind of CPU it was dumped on, or dump it once more"))
}
