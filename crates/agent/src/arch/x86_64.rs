//! x86-64 machine code of the agent.
//!
//! None of it touches a stack, the FPU, or any memory but the ring and its own bytes, so the state of the process it
//! runs in is its general registers and its signal mask, both saved in the bootstrap's data. `syscall` itself
//! clobbers rax, rcx and r11 only; `rbx` holds the ring's header throughout.

use crate::layout::offset;
use core::arch::global_asm;

// The executor. Entered at its first byte with rbx = header; runs the batch that is already in the ring.
//   rbp current op   r12 return address of `exec`   r13 ops left (or the last op)   r14 flags of the op   r15 ops executed
global_asm!(
    ".pushsection .rodata.rewake_agent, \"a\", @progbits",
    // Visible to the other units that link-time optimisation makes, and to nobody else.
    ".globl rewake_executor_start", ".hidden rewake_executor_start",
    ".globl rewake_executor_end", ".hidden rewake_executor_end",
    ".balign 16",
    "rewake_executor_start:",
    "2:", // run a batch
    "mov r13d, [rbx + {COUNT}]",
    "mov rbp, [rbx + {OPS}]",
    "xor r15d, r15d",
    "3:",
    "test r13d, r13d",
    "jz 5f",
    "test dword ptr [rbp + {FLAGS}], {LAST}",
    "jnz 50f",
    "lea r12, [rip + 4f]",
    "jmp 20f",
    "4:",
    "inc r15d",
    "dec r13d",
    "test r14d, {EXPECT}",
    "jz 12f",
    "cmp rax, [rbp + {ARGS} + 40]",
    "jne 13f",
    "12:",
    "add rbp, {OP}",
    "test r14d, {STOP}",
    "jz 3b",
    "cmp rax, -4095", // unsigned: -4095..-1 are errors
    "jb 3b",
    "5:", // batch finished: publish, report
    "mov [rbx + {EXECUTED}], r15d",
    "mov eax, [rbx + {SEQ}]",
    "mov [rbx + {DONE}], eax",
    "lea rbp, [rbx + {REPORT}]",
    "lea r12, [rip + 6f]",
    "jmp 20f",
    "6:", // wait for the next one
    "lea rbp, [rbx + {WAIT}]",
    "lea r12, [rip + 7f]",
    "jmp 20f",
    "7:",
    "mov ecx, [rbx + {SEQ}]",
    "cmp ecx, [rbx + {DONE}]",
    "jne 2b",
    "cmp rax, -4", // EINTR
    "je 6b",
    "test r14d, {HANGUP}",
    "jz 6b",
    "test rax, rax",
    "jg 6b",
    // the controller is gone: undo, leave
    "13:",
    "mov r13d, [rbx + {UNDO_COUNT}]",
    "mov rbp, [rbx + {UNDO}]",
    "8:",
    "test r13d, r13d",
    "jz 40f",
    "lea r12, [rip + 9f]",
    "jmp 20f",
    "9:",
    "dec r13d",
    "add rbp, {OP}",
    "jmp 8b",
    "40:",
    "mov rax, [rbx + {EXIT}]",
    "test rax, rax",
    "jz 41f",
    "jmp rax",
    "41:",
    "mov edi, 137",
    "mov eax, 231", // exit_group
    "syscall",
    "jmp 41b",
    "50:", // the last operation: publish and report the batch before it, whose operation r13 keeps
    "mov r13, rbp",
    "mov [rbx + {EXECUTED}], r15d",
    "mov eax, [rbx + {SEQ}]",
    "mov [rbx + {DONE}], eax",
    "lea rbp, [rbx + {REPORT}]",
    "lea r12, [rip + 51f]",
    "jmp 20f",
    "51:",
    "mov rbp, r13",
    "lea r12, [rip + 52f]",
    "jmp 20f",
    "52:", // it is over: pause
    "mov eax, 34",
    "syscall",
    "jmp 52b",
    // exec: one operation at rbp, back to r12 with rax = result and r14d = flags
    "20:",
    "mov r14d, [rbp + {FLAGS}]",
    "mov rdi, [rbp + {ARGS}]",
    "mov rsi, [rbp + {ARGS} + 8]",
    "mov rdx, [rbp + {ARGS} + 16]",
    "mov r10, [rbp + {ARGS} + 24]",
    "mov r8, [rbp + {ARGS} + 32]",
    "mov r9, [rbp + {ARGS} + 40]",
    "test r14d, 0x7f3f",
    "jz 30f",
    // argument by argument: REF (result of another op plus addend), then DEREF (an i32 in memory)
    ".macro rewake_arg bit, reg, low",
    "test r14d, 1 << \\bit",
    "jz 31f",
    "movsxd rax, \\low",
    "shr \\reg, 32",
    "shl \\reg, 6", // times sizeof(Op)
    "add \\reg, [rbx + {OPS}]",
    "mov \\reg, [\\reg + {RES}]",
    "add \\reg, rax",
    "31:",
    "test r14d, 1 << (8 + \\bit)",
    "jz 32f",
    "movsxd \\reg, dword ptr [\\reg]",
    "32:",
    ".endm",
    "rewake_arg 0, rdi, edi",
    "rewake_arg 1, rsi, esi",
    "rewake_arg 2, rdx, edx",
    "rewake_arg 3, r10, r10d",
    "rewake_arg 4, r8, r8d",
    "rewake_arg 5, r9, r9d",
    ".purgem rewake_arg",
    "test r14d, {WIDE}",
    "jz 30f",
    "mov rdi, [rdi]",
    "30:",
    "xor eax, eax",
    "cmp dword ptr [rbp + {NR}], -1",
    "je 34f",
    "mov eax, [rbp + {NR}]",
    "syscall",
    "test r14d, {CLONE}",
    "jz 34f",
    "test rax, rax",
    "jnz 34f",
    "mov rbx, [rbp + {ARGS} + 40]", // the child: it must not store into the parent's op
    "jmp 2b",
    "34:",
    "mov [rbp + {RES}], rax",
    "test r14d, {STORE}",
    "jz 35f",
    "mov rcx, [rbp + {ARGS} + 40]",
    "mov [rcx], eax",
    "35:",
    "jmp r12",
    "rewake_executor_end:",
    ".popsection",
    COUNT = const offset::COUNT,
    OPS = const offset::OPS,
    OP = const offset::OP,
    EXECUTED = const offset::EXECUTED,
    SEQ = const offset::SEQ,
    DONE = const offset::DONE,
    REPORT = const offset::REPORT,
    WAIT = const offset::WAIT,
    UNDO_COUNT = const offset::UNDO_COUNT,
    UNDO = const offset::UNDO,
    EXIT = const offset::EXIT,
    FLAGS = const offset::FLAGS,
    ARGS = const offset::ARGS,
    RES = const offset::RES,
    NR = const offset::NR,
    EXPECT = const crate::layout::FLAG_EXPECT,
    LAST = const crate::layout::FLAG_LAST,
    STOP = const crate::layout::FLAG_STOP,
    CLONE = const crate::layout::FLAG_CLONE,
    STORE = const crate::layout::FLAG_STORE,
    WIDE = const crate::layout::FLAG_WIDE,
    HANGUP = const crate::layout::FLAG_HANGUP,
);

/// Saved general registers in the bootstrap: the first 20 words of `user_regs_struct` (r15 … rsp).
pub const SAVED_WORDS: usize = 20;
/// Most thread visitors that fit: how many threads of one process can be visited at the same time.
pub const VISITORS: usize = 6;

// The bootstrap. Every path through it that the controller does not actively redirect ends in `restore registers`,
// so its death at any instant sends the process back to where it was. The two places where it must not go on by
// itself ("gate") fall through to the way back; the controller moves rip past them with one PTRACE_SETREGSET. It has the
// thread stop there by a signal that the thread sends itself ("tell"): one that the process ignores, so that it is
// nothing at all once the tracer is gone. Signal number 0 sends nothing; then the controller follows the system calls.
//   r12 memfd   rbx header (mapping + 4096) or 0   r13 result of mmap   r14 result of socketpair   r15 mmap flags
global_asm!(
    ".pushsection .rodata.rewake_bootstrap, \"a\", @progbits",
    ".globl rewake_bootstrap_start", ".hidden rewake_bootstrap_start",
    ".globl rewake_bootstrap_saved", ".hidden rewake_bootstrap_saved",
    ".globl rewake_bootstrap_mask", ".hidden rewake_bootstrap_mask",
    ".globl rewake_bootstrap_quiet", ".hidden rewake_bootstrap_quiet",
    ".globl rewake_bootstrap_size", ".hidden rewake_bootstrap_size",
    ".globl rewake_bootstrap_memfd_flags", ".hidden rewake_bootstrap_memfd_flags",
    ".globl rewake_bootstrap_signal", ".hidden rewake_bootstrap_signal",
    ".globl rewake_bootstrap_entry", ".hidden rewake_bootstrap_entry",
    ".globl rewake_bootstrap_map", ".hidden rewake_bootstrap_map",
    ".globl rewake_bootstrap_run", ".hidden rewake_bootstrap_run",
    ".globl rewake_bootstrap_depart", ".hidden rewake_bootstrap_depart",
    ".globl rewake_bootstrap_leave", ".hidden rewake_bootstrap_leave",
    ".globl rewake_bootstrap_end", ".hidden rewake_bootstrap_end",
    ".globl rewake_visitor_entry", ".hidden rewake_visitor_entry",
    ".globl rewake_visitor_slots", ".hidden rewake_visitor_slots",
    ".globl rewake_visitor_end", ".hidden rewake_visitor_end",
    ".balign 16",
    ".macro rewake_tell", // tkill(gettid(), signal)
    "mov eax, 186",
    "syscall",
    "mov edi, eax",
    "mov esi, [rip + rewake_bootstrap_signal]",
    "mov eax, 200",
    "syscall",
    ".endm",
    // rt_sigprocmask(SIG_SETMASK, quiet, NULL, 8): the controller does so, too, but it may die before, and if the thread blocked
    // the signal that it tells by, that would be pending for good.
    ".macro rewake_hush",
    "mov eax, 14",
    "mov edi, 2",
    "lea rsi, [rip + rewake_bootstrap_quiet]",
    "mov edx, 0",
    "mov r10d, 8",
    "syscall",
    ".endm",
    "rewake_bootstrap_start:",
    "rewake_bootstrap_saved: .fill 20, 8, 0",
    "rewake_bootstrap_mask: .quad 0",
    "rewake_bootstrap_quiet: .quad 0",
    "rewake_bootstrap_size: .quad 0",
    "rewake_bootstrap_memfd_flags: .long 0",
    "rewake_bootstrap_signal: .long 0",
    "rewake_bootstrap_name: .asciz \"rewake\"",
    ".balign 8",
    "rewake_bootstrap_entry:",
    "rewake_hush",
    "xor ebx, ebx",
    "mov eax, 319", // memfd_create(name, flags)
    "lea rdi, [rip + rewake_bootstrap_name]",
    "mov esi, [rip + rewake_bootstrap_memfd_flags]",
    "syscall",
    "mov r12, rax",
    "rewake_tell",
    "jmp rewake_bootstrap_undo_memfd", // gate 1: the controller fills the ring first
    "rewake_bootstrap_map:",
    "mov eax, 9", // mmap(NULL, size, RW, r15: MAP_SHARED, or private and anonymous without a memfd, memfd, 0)
    "xor edi, edi",
    "mov rsi, [rip + rewake_bootstrap_size]",
    "mov edx, 3",
    "mov r10d, r15d",
    "mov r8, r12",
    "xor r9d, r9d",
    "syscall",
    "mov r13, rax",
    "cmp rax, -4095",
    "jae 2f",
    "lea rbx, [rax + 4096]",
    "mov qword ptr [rbx + {SOCKETS}], -1", // whatever happens, nobody else's are closed
    "mov rdi, rax", // mmap(it, 4096, RX, r15 | MAP_FIXED, memfd, 0): no page is both, for PR_SET_MDWE
    "mov eax, 9",
    "mov esi, 4096",
    "mov edx, 5",
    "lea r10d, [r15 + 0x10]",
    "syscall",
    "mov r13, rax",
    "cmp rax, -4095",
    "jae 2f", // the way back closes -1 twice and unmaps
    "mov eax, 53", // socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, header.sockets)
    "mov edi, 1",
    "mov esi, 0x80005",
    "xor edx, edx",
    "lea r10, [rbx + {SOCKETS}]",
    "syscall",
    "mov r14, rax",
    "2:",
    "rewake_tell",
    "test rbx, rbx",
    "jz rewake_bootstrap_undo_memfd",
    "jmp rewake_bootstrap_undo_pair", // gate 2: the controller takes its end first
    "rewake_bootstrap_run:",
    "mov eax, 3", // close(memfd)
    "mov edi, r12d",
    "syscall",
    "mov eax, 3", // close(controller's end); from now on its death is our EOF
    "mov edi, [rbx + {SOCKETS} + 4]",
    "syscall",
    "mov dword ptr [rbx + {SOCKETS} + 4], -1",
    "lea rax, [rbx - 4096]",
    "jmp rax", // the executor stands at the start of the mapping
    "rewake_bootstrap_undo_pair:",
    "mov eax, 3",
    "mov edi, [rbx + {SOCKETS} + 4]",
    "syscall",
    "mov eax, 3",
    "mov edi, [rbx + {SOCKETS}]",
    "syscall",
    "rewake_bootstrap_undo_memfd:",
    "test r12, r12",
    "js rewake_bootstrap_leave",
    "mov eax, 3",
    "mov edi, r12d",
    "syscall",
    "jmp rewake_bootstrap_leave",
    "rewake_bootstrap_depart:", // the controller's own way out: close the agent's end, unmap, say so
    "mov eax, 3",
    "mov edi, r12d",
    "syscall",
    "mov eax, 11", // munmap
    "lea rdi, [rbx - 4096]",
    "mov rsi, [rip + rewake_bootstrap_size]",
    "syscall",
    "rewake_tell",
    "jmp 3f",
    "rewake_bootstrap_leave:", // rbx = header, or 0 if nothing is mapped
    "test rbx, rbx",
    "jz 3f",
    "mov eax, 11", // munmap
    "lea rdi, [rbx - 4096]",
    "mov rsi, [rip + rewake_bootstrap_size]",
    "syscall",
    "3:",
    "mov eax, 14", // rt_sigprocmask(SIG_SETMASK, saved, NULL, 8)
    "mov edi, 2",
    "lea rsi, [rip + rewake_bootstrap_mask]",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    "lea rsp, [rip + rewake_bootstrap_saved + 18*8]",
    "popfq",
    "mov r15, [rip + rewake_bootstrap_saved + 0*8]",
    "mov r14, [rip + rewake_bootstrap_saved + 1*8]",
    "mov r13, [rip + rewake_bootstrap_saved + 2*8]",
    "mov r12, [rip + rewake_bootstrap_saved + 3*8]",
    "mov rbp, [rip + rewake_bootstrap_saved + 4*8]",
    "mov rbx, [rip + rewake_bootstrap_saved + 5*8]",
    "mov r11, [rip + rewake_bootstrap_saved + 6*8]",
    "mov r10, [rip + rewake_bootstrap_saved + 7*8]",
    "mov r9, [rip + rewake_bootstrap_saved + 8*8]",
    "mov r8, [rip + rewake_bootstrap_saved + 9*8]",
    "mov rax, [rip + rewake_bootstrap_saved + 10*8]",
    "mov rcx, [rip + rewake_bootstrap_saved + 11*8]",
    "mov rdx, [rip + rewake_bootstrap_saved + 12*8]",
    "mov rsi, [rip + rewake_bootstrap_saved + 13*8]",
    "mov rdi, [rip + rewake_bootstrap_saved + 14*8]",
    "mov rsp, [rip + rewake_bootstrap_saved + 19*8]",
    "jmp [rip + rewake_bootstrap_saved + 16*8]",
    ".balign 8",
    "rewake_bootstrap_end:",
    // The thread visitor: asks a thread what only it can tell, and tells; r13 = its slot. The kernel's stores fail softly
    // (EFAULT) if the ring is gone, so a visitor never outlives its memory. No instruction here changes a flag, and
    // only the registers in the slot are used.
    "rewake_visitor_entry:",
    "rewake_hush",
    "mov eax, 131", // sigaltstack(NULL, out)
    "mov edi, 0",
    "mov rsi, [r13 + {OUT}]",
    "syscall",
    "mov eax, 157", // prctl(PR_GET_TID_ADDRESS, out + 24)
    "mov edi, 40",
    "lea rsi, [rsi + 24]",
    "syscall",
    "mov eax, 157", // prctl(PR_GET_PDEATHSIG, out + 32)
    "mov edi, 2",
    "lea rsi, [rsi + 8]",
    "syscall",
    "mov eax, 157", // prctl(PR_GET_SECUREBITS): its result is read off rdx
    "mov edi, 27",
    "syscall",
    "mov rdx, rax",
    "mov eax, 157", // prctl(PR_GET_TIMERSLACK): its result is read off r10
    "mov edi, 30",
    "syscall",
    "mov r10, rax",
    "mov eax, 157", // prctl(PR_SET_TIMERSLACK, 0): back to the default …
    "mov edi, 29",
    "mov esi, 0",
    "syscall",
    "mov eax, 157", // … which is asked for (read off r8) …
    "mov edi, 30",
    "syscall",
    "mov r8, rax",
    "mov eax, 157", // … and left again, by the same hand: whoever dies meanwhile
    "mov edi, 29",
    "mov rsi, r10",
    "syscall",
    "rewake_tell",
    "mov eax, 14", // rt_sigprocmask(SIG_SETMASK, saved, NULL, 8)
    "mov edi, 2",
    "lea rsi, [r13 + {SLOT_MASK}]",
    "mov edx, 0",
    "mov r10d, 8",
    "syscall",
    "mov rax, [r13 + 0*8]",
    "mov rdi, [r13 + 1*8]",
    "mov rsi, [r13 + 2*8]",
    "mov rdx, [r13 + 3*8]",
    "mov r10, [r13 + 4*8]",
    "mov rcx, [r13 + 5*8]",
    "mov r11, [r13 + 6*8]",
    "mov r8, [r13 + 9*8]",
    "jmp [r13 + {TAIL}]",
    ".balign 8",
    "rewake_visitor_slots:",
    ".rept {VISITORS}",
    "2: .fill {SLOT_WORDS}, 8, 0",
    "mov r13, [rip + 2b + 7*8]", // the tail, which ends the use of r13
    "jmp [rip + 2b + 8*8]",
    ".balign 8",
    ".endr",
    "rewake_visitor_end:",
    ".purgem rewake_tell",
    ".purgem rewake_hush",
    ".popsection",
    SOCKETS = const offset::SOCKETS,
    VISITORS = const VISITORS,
    SLOT_WORDS = const size_of::<VisitorSlot>() / 8,
    SLOT_MASK = const core::mem::offset_of!(VisitorSlot, mask),
    OUT = const core::mem::offset_of!(VisitorSlot, out),
    TAIL = const core::mem::offset_of!(VisitorSlot, tail),
);

// The init of a PID namespace that holds a restored tree: reaps whoever is left to it, passes signals on to the tree's
// root, and ends as the root ended. All signals are blocked, so each is taken by rt_sigtimedwait(2), and none is lost.
//   ebx pid of the root   r12 address of four bytes to write to
global_asm!(
    ".pushsection .rodata.rewake_init, \"a\", @progbits",
    ".globl rewake_init_start",
    ".hidden rewake_init_start",
    ".globl rewake_init_end",
    ".hidden rewake_init_end",
    ".balign 16",
    "rewake_init_start:",
    "2:", // reap all who have ended: wait4(-1, status, WNOHANG | __WALL, NULL)
    "mov eax, 61",
    "mov rdi, -1",
    "mov rsi, r12",
    "mov edx, 0x40000001",
    "xor r10d, r10d",
    "syscall",
    "test eax, eax",
    "jle 3f", // nobody has, or nobody is left
    "cmp eax, ebx",
    "jne 2b",
    "mov edi, [r12]", // the root: its exit code, or 128 and the signal, as a shell says it
    "mov eax, edi",
    "and eax, 0x7f",
    "jz 4f",
    "lea edi, [rax + 128]",
    "jmp 5f",
    "4:",
    "shr edi, 8",
    "movzx edi, dil",
    "5:",
    "mov eax, 231", // exit_group
    "syscall",
    "3:", // rt_sigtimedwait(all, NULL, NULL, 8)
    "mov eax, 128",
    "lea rdi, [rip + 6f]",
    "xor esi, esi",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    "cmp eax, 17", // SIGCHLD
    "je 2b",
    "test eax, eax",
    "jle 2b",
    "mov edi, ebx", // kill(root, signal)
    "mov esi, eax",
    "mov eax, 62",
    "syscall",
    "jmp 2b",
    ".balign 8",
    "6: .quad -1",
    "rewake_init_end:",
    ".popsection",
);

/// What a visitor needs to send its thread back alone. The thread's other registers are not touched.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VisitorSlot {
    /// rax, rdi, rsi, rdx, r10, rcx, r11, r13, rip, r8 with which the thread goes on.
    pub registers: [u64; 10],
    /// Its signal mask.
    pub mask: u64,
    /// Address of a [`VisitorResult`].
    pub out: u64,
    /// Address of this slot's tail: the instructions right after it.
    pub tail: u64,
}

unsafe extern "C" {
    static rewake_executor_start: u8;
    static rewake_executor_end: u8;
    static rewake_init_start: u8;
    static rewake_init_end: u8;
    static rewake_bootstrap_start: u8;
    static rewake_bootstrap_saved: u8;
    static rewake_bootstrap_mask: u8;
    static rewake_bootstrap_quiet: u8;
    static rewake_bootstrap_size: u8;
    static rewake_bootstrap_memfd_flags: u8;
    static rewake_bootstrap_signal: u8;
    static rewake_bootstrap_entry: u8;
    static rewake_bootstrap_map: u8;
    static rewake_bootstrap_run: u8;
    static rewake_bootstrap_depart: u8;
    static rewake_bootstrap_leave: u8;
    static rewake_bootstrap_end: u8;
    static rewake_visitor_entry: u8;
    static rewake_visitor_slots: u8;
    static rewake_visitor_end: u8;
}

fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both symbols lie in one read-only section written above, `end` after `start`, and are never unmapped.
    unsafe { core::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// The executor's code, position independent, entered at its first byte with rbx = address of the header.
#[must_use]
pub fn executor() -> &'static [u8] {
    between(&raw const rewake_executor_start, &raw const rewake_executor_end)
}

/// The code of the init of a restored PID namespace, position independent, entered at its first byte with rbx = pid of
/// the tree's root, r12 = address of a writable word, and all signals blocked.
#[must_use]
pub fn init() -> &'static [u8] {
    between(&raw const rewake_init_start, &raw const rewake_init_end)
}

/// The bootstrap's code and where its parts lie, as offsets from its first byte.
#[derive(Debug, Clone, Copy)]
pub struct Bootstrap {
    /// Code and data with `VISITORS` visitors; the first [`Bootstrap::len`]`(n)` bytes suffice for `n` of them.
    pub bytes: &'static [u8],
    /// Saved general registers, [`SAVED_WORDS`] words.
    pub saved: usize,
    /// Saved signal mask (u64).
    pub mask: usize,
    /// The signal mask under which it runs.
    pub quiet: usize,
    /// Size of the mapping in bytes (u64).
    pub size: usize,
    /// Flags of `memfd_create` (u32).
    pub memfd_flags: usize,
    /// The signal by which threads tell (u32); 0 for none.
    pub signal: usize,
    /// First instruction.
    pub entry: usize,
    /// Where the controller continues after `memfd_create` (rbx = 0, r12 = memfd, r15 = flags of the mapping).
    pub map: usize,
    /// Where the controller continues after `socketpair` (rbx = header, r12 = memfd).
    pub run: usize,
    /// Closes descriptor r12, unmaps, tells, restores (rbx = header).
    pub depart: usize,
    /// Unmaps and restores; what [`crate::layout::Header::exit`] points at.
    pub leave: usize,
    /// Where a visitor begins (r13 = its slot).
    pub visitor: usize,
    /// The first visitor's slot; see [`Bootstrap::slot`].
    slots: usize,
    slot_len: usize,
    end: usize,
}

/// What a visitor has the kernel store: `stack_t`, `clear_child_tid`, parent-death signal.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VisitorResult {
    /// `stack_t.ss_sp`.
    pub ss_sp: u64,
    /// `stack_t.ss_flags` (and padding).
    pub ss_flags: u64,
    /// `stack_t.ss_size`.
    pub ss_size: u64,
    /// `PR_GET_TID_ADDRESS`.
    pub tid_address: u64,
    /// `PR_GET_PDEATHSIG`.
    pub pdeath_sig: u64,
}

impl Bootstrap {
    /// The bootstrap of this architecture.
    #[must_use]
    pub fn get() -> Bootstrap {
        let start = &raw const rewake_bootstrap_start;
        let at = |symbol: *const u8| between(start, symbol).len();
        Bootstrap {
            bytes: between(start, &raw const rewake_visitor_end),
            saved: at(&raw const rewake_bootstrap_saved),
            mask: at(&raw const rewake_bootstrap_mask),
            quiet: at(&raw const rewake_bootstrap_quiet),
            size: at(&raw const rewake_bootstrap_size),
            memfd_flags: at(&raw const rewake_bootstrap_memfd_flags),
            signal: at(&raw const rewake_bootstrap_signal),
            entry: at(&raw const rewake_bootstrap_entry),
            map: at(&raw const rewake_bootstrap_map),
            run: at(&raw const rewake_bootstrap_run),
            depart: at(&raw const rewake_bootstrap_depart),
            leave: at(&raw const rewake_bootstrap_leave),
            visitor: at(&raw const rewake_visitor_entry),
            slots: at(&raw const rewake_visitor_slots),
            slot_len: between(&raw const rewake_visitor_slots, &raw const rewake_visitor_end).len()
                / VISITORS,
            end: at(&raw const rewake_bootstrap_end),
        }
    }

    /// Where the slot of visitor `n` is: a [`VisitorSlot`], and right after it its tail.
    #[must_use]
    pub fn slot(&self, n: usize) -> usize {
        self.slots + n * self.slot_len
    }

    /// Bytes needed with `visitors` thread visitors.
    #[must_use]
    pub fn len(&self, visitors: usize) -> usize {
        match visitors {
            0 => self.end,
            n => self.slot(n.min(VISITORS)),
        }
    }
}
