//! Who handles the page faults of a mapping. A userfaultfd does not tell whose memory it is about, but the kernel has its own
//! address of that in the mapping and in every descriptor.

use super::asm::{Helper, Program, R1, R2, R3, R6, R7, R8, Reg, STACK, Size};
use super::{kernel, peek, read, words};
use rewake_sys::bpf::iter::{self, Types, Whose};

/// What is written of an object: two words.
const RECORD: i16 = 16;

/// Where members of the kernel's structures are; looked up for each question, since only an error asks it.
struct Offsets {
    start: i16,
    with: i16,
    private: i16,
    leader: i16,
    pid: i16,
    number: i16,
}

impl Offsets {
    fn look_up() -> Result<Offsets, String> {
        const STRUCTS: &[&str] = &["vm_area_struct", "file", "task_struct", "pid", "upid"];
        let types = Types::of_kernel().map_err(|e| e.to_string())?;
        let members = peek::Members::new(&types, STRUCTS)?;
        let short = |at: usize| i16::try_from(at).map_err(|e| e.to_string());
        let at = |of: &str, name: &str| members.at(of, name).and_then(short);
        let level = super::threads::own_level()? * members.size("upid")?;
        Ok(Offsets {
            start: at("vm_area_struct", "vm_start")?,
            with: at("vm_area_struct", "vm_userfaultfd_ctx")?,
            private: at("file", "private_data")?,
            leader: at("task_struct", "group_leader")?,
            pid: at("task_struct", "thread_pid")?,
            number: short(level)? + at("pid", "numbers")? + at("upid", "nr")?,
        })
    }

    /// For each mapping its first address, and what it is registered with.
    fn of_mappings(&self) -> Vec<u64> {
        let mut p = begin(16);
        p.read((STACK, -RECORD), 8, (R7, self.start));
        p.read((STACK, -8), 8, (R7, self.with));
        end(p)
    }

    /// For each descriptor what is behind it, and the number of the process that has it.
    fn of_descriptors(&self) -> Vec<u64> {
        let mut p = begin(24);
        p.read((STACK, -RECORD), 8, (R7, self.private));
        let mut follow = |from: Reg, member| {
            p.read((STACK, -8), 8, (from, member));
            p.load(Size::Double, R7, STACK, -8);
        };
        follow(R8, self.leader);
        follow(R7, self.pid);
        p.store_value(STACK, -8, 0);
        p.read((STACK, -8), 4, (R7, self.number));
        end(p)
    }
}

/// Begins a program: R6 is where to write, R7 the object, which is at `object` of what it is given, R8 the thread.
pub(super) fn begin(object: i16) -> Program {
    let mut p = Program::default();
    p.load(Size::Double, R7, R1, object);
    p.end_if_null(R7);
    p.load(Size::Double, R8, R1, 8);
    p.end_if_null(R8);
    p.load(Size::Double, R6, R1, 0);
    p
}

/// Ends it: the record is written.
pub(super) fn end(mut p: Program) -> Vec<u64> {
    p.load(Size::Double, R1, R6, 0);
    p.copy(R2, STACK);
    p.add(R2, (-RECORD).into());
    p.set(R3, RECORD.into());
    p.call(Helper::SeqWrite);
    p.end()
}

/// Gives `take` what a program writes, until that has had enough.
pub(super) fn each(
    program: &[u64],
    function: u32,
    whose: Whose,
    mut take: impl FnMut([u64; 2]) -> bool,
) -> Result<(), String> {
    let program = iter::load(program, function).map_err(|e| e.to_string())?;
    read(&program, whose, |text| {
        let (records, rest) = text.as_chunks::<{ RECORD as usize }>();
        match rest {
            [] => Ok(records.iter().all(|record| take(words(record)))),
            _ => Err("a record is not whole".to_owned()),
        }
    })
}

/// The processes, by their numbers in our own process id namespace, that have a descriptor of the userfaultfd which a mapping
/// is registered with; `start` is its first address, `tid` a thread that has it.
///
/// # Errors
/// Why this kernel does not tell, or not us; the mapping is not there, or not registered any more.
pub fn handlers(tid: i32, start: u64) -> Result<Vec<i32>, String> {
    let (kernel, offsets) = (kernel()?, Offsets::look_up()?);
    let (mut with, mut last) = (0, 0);
    each(
        &offsets.of_mappings(),
        kernel.mappings.function,
        Whose::Thread(tid),
        |[address, its]| {
            with = if address == start { its } else { 0 };
            // Having come to its end, the kernel begins anew.
            let goes_on = address > last;
            last = address;
            goes_on && address < start
        },
    )?;
    if with == 0 {
        return Err(format!("nothing at {start:#x} is registered with a userfaultfd"));
    }
    let mut found = Vec::new();
    each(&offsets.of_descriptors(), kernel.files.function, Whose::All, |[private, pid]| {
        // Those of other namespaces have no number in ours.
        if private == with && pid != 0 && !found.contains(&(pid as i32)) {
            found.push(pid as i32);
        }
        true
    })?;
    Ok(found)
}
