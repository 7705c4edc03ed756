//! ptrace(2), as far as a checkpoint needs it. All requests name a thread; the caller's thread must be its tracer.

use crate::call::{Result, pid_arg, syscall};

const SEIZE: usize = 0x4206;
const INTERRUPT: usize = 0x4207;
const CONT: usize = 7;
const SYSCALL: usize = 24;
const DETACH: usize = 17;
const SETOPTIONS: usize = 0x4200;
const GETSIGINFO: usize = 0x4202;
const GETREGSET: usize = 0x4204;
const SETREGSET: usize = 0x4205;
const PEEKSIGINFO: usize = 0x4209;
const GETSIGMASK: usize = 0x420a;
const SETSIGMASK: usize = 0x420b;
const SECCOMP_GET_FILTER: usize = 0x420c;
const SECCOMP_GET_METADATA: usize = 0x420d;
const GET_RSEQ_CONFIGURATION: usize = 0x420f;
const GET_SYSCALL_USER_DISPATCH: usize = 0x4211;
const SET_SYSCALL_USER_DISPATCH: usize = 0x4210;

/// `PTRACE_O_TRACESYSGOOD`: system-call stops are told from SIGTRAP.
pub const O_TRACESYSGOOD: u32 = 1;
/// `PTRACE_O_EXITKILL`: the tracee is killed when the tracer goes.
pub const O_EXITKILL: u32 = 1 << 20;
/// `PTRACE_O_SUSPEND_SECCOMP`: filters do not apply while traced (needs `CAP_SYS_ADMIN`).
pub const O_SUSPEND_SECCOMP: u32 = 1 << 21;

/// `NT_PRSTATUS`: general registers.
pub const NT_PRSTATUS: u32 = 1;
/// `NT_PRFPREG`: FPU without extensions.
pub const NT_PRFPREG: u32 = 2;
/// `NT_X86_XSTATE`: XSAVE area in its standard form.
pub const NT_X86_XSTATE: u32 = 0x202;

fn request(
    name: &'static str,
    request: usize,
    tid: i32,
    addr: usize,
    data: usize,
) -> Result<usize> {
    // SAFETY: used below only with requests whose `data` points to memory that the caller of this private function
    // keeps alive and correctly sized, or is a plain number.
    unsafe { syscall(name, libc::SYS_ptrace, [request, pid_arg(tid), addr, data, 0, 0]) }
}

/// `PTRACE_SEIZE`: attaches to `tid` without stopping it.
///
/// # Errors
/// `EPERM` if it is traced already or not ours to trace, `ESRCH` if it is gone.
pub fn seize(tid: i32, options: u32) -> Result<()> {
    request("PTRACE_SEIZE", SEIZE, tid, 0, options as usize).map(drop)
}

/// `PTRACE_INTERRUPT`: asks for a `PTRACE_EVENT_STOP`.
///
/// # Errors
/// `ESRCH` if it is gone.
pub fn interrupt(tid: i32) -> Result<()> {
    request("PTRACE_INTERRUPT", INTERRUPT, tid, 0, 0).map(drop)
}

/// `PTRACE_CONT`, delivering `signal` if it is not 0.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn cont(tid: i32, signal: i32) -> Result<()> {
    request("PTRACE_CONT", CONT, tid, 0, signal as usize).map(drop)
}

/// `PTRACE_SYSCALL`: continues to the next entry to or exit from a system call.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn cont_syscall(tid: i32) -> Result<()> {
    request("PTRACE_SYSCALL", SYSCALL, tid, 0, 0).map(drop)
}

/// `PTRACE_DETACH`, delivering `signal` if it is not 0.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn detach(tid: i32, signal: i32) -> Result<()> {
    request("PTRACE_DETACH", DETACH, tid, 0, signal as usize).map(drop)
}

/// `PTRACE_SETOPTIONS`.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn set_options(tid: i32, options: u32) -> Result<()> {
    request("PTRACE_SETOPTIONS", SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// `user_regs_struct` of x86-64, as `NT_PRSTATUS` carries it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names of the registers")]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

impl Registers {
    /// The first 20 words (r15 … rsp), as the bootstrap saves them.
    #[must_use]
    pub fn words(&self) -> [u64; 20] {
        [
            self.r15,
            self.r14,
            self.r13,
            self.r12,
            self.rbp,
            self.rbx,
            self.r11,
            self.r10,
            self.r9,
            self.r8,
            self.rax,
            self.rcx,
            self.rdx,
            self.rsi,
            self.rdi,
            self.orig_rax,
            self.rip,
            self.cs,
            self.eflags,
            self.rsp,
        ]
    }
}

fn iovec_call(
    name: &'static str,
    req: usize,
    tid: i32,
    set: u32,
    base: *mut u8,
    len: usize,
) -> Result<usize> {
    let mut iov = libc::iovec { iov_base: base.cast(), iov_len: len };
    request(name, req, tid, set as usize, (&raw mut iov) as usize)?;
    Ok(iov.iov_len)
}

/// Reads the general registers.
///
/// # Errors
/// `ESRCH` if it is not stopped; `EIO` for a 32-bit task, whose register set has another size.
pub fn registers(tid: i32) -> Result<Registers> {
    let mut regs = Registers::default();
    let size = size_of::<Registers>();
    let got =
        iovec_call("PTRACE_GETREGSET", GETREGSET, tid, NT_PRSTATUS, (&raw mut regs).cast(), size)?;
    if got != size {
        return Err(crate::SyscallError::new("PTRACE_GETREGSET", crate::Errno::IO));
    }
    Ok(regs)
}

/// Writes the general registers.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn set_registers(tid: i32, regs: &Registers) -> Result<()> {
    let mut copy = *regs;
    iovec_call(
        "PTRACE_SETREGSET",
        SETREGSET,
        tid,
        NT_PRSTATUS,
        (&raw mut copy).cast(),
        size_of::<Registers>(),
    )
    .map(drop)
}

/// Reads register set `set` into `buffer` and returns its size in bytes.
///
/// # Errors
/// `ENODEV`/`EINVAL` if the machine has no such set, `ESRCH` if the thread is not stopped.
pub fn regset(tid: i32, set: u32, buffer: &mut [u8]) -> Result<usize> {
    iovec_call("PTRACE_GETREGSET", GETREGSET, tid, set, buffer.as_mut_ptr(), buffer.len())
}

/// Writes register set `set`.
///
/// # Errors
/// `EINVAL`/`EFAULT` if the kernel refuses the contents or the size.
pub fn set_regset(tid: i32, set: u32, contents: &[u8]) -> Result<()> {
    // The kernel only reads through this iovec; it is declared mutable because one type serves both directions.
    let base = contents.as_ptr().cast_mut();
    iovec_call("PTRACE_SETREGSET", SETREGSET, tid, set, base, contents.len()).map(drop)
}

/// The blocked-signal mask (the real one, even inside sigsuspend(2)).
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn signal_mask(tid: i32) -> Result<u64> {
    let mut mask = 0u64;
    request("PTRACE_GETSIGMASK", GETSIGMASK, tid, 8, (&raw mut mask) as usize)?;
    Ok(mask)
}

/// Sets the blocked-signal mask.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn set_signal_mask(tid: i32, mask: u64) -> Result<()> {
    request("PTRACE_SETSIGMASK", SETSIGMASK, tid, 8, (&raw const mask) as usize).map(drop)
}

/// A raw `siginfo_t`.
pub type SigInfo = [u8; 128];

/// The siginfo of the current signal-delivery or group stop.
///
/// # Errors
/// `EINVAL` in a group stop, `ESRCH` if it is not stopped.
pub fn siginfo(tid: i32) -> Result<SigInfo> {
    let mut info = [0u8; 128];
    request("PTRACE_GETSIGINFO", GETSIGINFO, tid, 0, info.as_mut_ptr() as usize)?;
    Ok(info)
}

/// The queued signals of the thread, or of its process (`shared`), in queue order.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn queued_signals(tid: i32, shared: bool) -> Result<Vec<SigInfo>> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let mut all = Vec::new();
    loop {
        let mut buffer = [[0u8; 128]; 16];
        let args = Args { off: all.len() as u64, flags: u32::from(shared), nr: 16 };
        let got = request(
            "PTRACE_PEEKSIGINFO",
            PEEKSIGINFO,
            tid,
            (&raw const args) as usize,
            buffer.as_mut_ptr() as usize,
        )?;
        all.extend_from_slice(&buffer[..got.min(16)]);
        if got < 16 {
            return Ok(all);
        }
    }
}

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RseqConfig {
    /// Address of `struct rseq`, 0 if none is registered.
    pub pointer: u64,
    /// Registered size.
    pub size: u32,
    /// Signature before abort handlers.
    pub signature: u32,
    /// Always 0.
    pub flags: u32,
    /// Padding.
    pub pad: u32,
}

/// The thread's rseq registration.
///
/// # Errors
/// `EIO` on kernels without rseq.
pub fn rseq_config(tid: i32) -> Result<RseqConfig> {
    let mut config = RseqConfig::default();
    request(
        "PTRACE_GET_RSEQ_CONFIGURATION",
        GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<RseqConfig>(),
        (&raw mut config) as usize,
    )?;
    Ok(config)
}

/// `struct ptrace_sud_config`: syscall user dispatch.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SudConfig {
    /// `PR_SYS_DISPATCH_ON` or `_OFF`.
    pub mode: u64,
    /// Address of the selector byte.
    pub selector: u64,
    /// Start of the always-allowed range.
    pub offset: u64,
    /// Its length.
    pub len: u64,
}

/// Syscall-user-dispatch settings of the thread.
///
/// # Errors
/// `EIO` on kernels before 6.4.
pub fn sud_config(tid: i32) -> Result<SudConfig> {
    let mut config = SudConfig::default();
    request(
        "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG",
        GET_SYSCALL_USER_DISPATCH,
        tid,
        size_of::<SudConfig>(),
        (&raw mut config) as usize,
    )?;
    Ok(config)
}

/// Sets syscall user dispatch of the thread.
///
/// # Errors
/// `EINVAL` for impossible settings.
pub fn set_sud_config(tid: i32, config: &SudConfig) -> Result<()> {
    request(
        "PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG",
        SET_SYSCALL_USER_DISPATCH,
        tid,
        size_of::<SudConfig>(),
        std::ptr::from_ref(config) as usize,
    )
    .map(drop)
}

/// Seccomp filter `index` (0 is the one installed first) as classic BPF instructions of 8 bytes; `None` past the last one.
///
/// # Errors
/// `EACCES` without `CAP_SYS_ADMIN` or when seccomp applies to the caller; `EMEDIUMTYPE` for a filter that is not BPF.
pub fn seccomp_filter(tid: i32, index: usize) -> Result<Option<Vec<u8>>> {
    let count = match request("PTRACE_SECCOMP_GET_FILTER", SECCOMP_GET_FILTER, tid, index, 0) {
        Ok(count) => count,
        Err(e) if e.errno == crate::Errno::NOENT || e.errno == crate::Errno::INVAL => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let mut code = vec![0u8; count * 8];
    request(
        "PTRACE_SECCOMP_GET_FILTER",
        SECCOMP_GET_FILTER,
        tid,
        index,
        code.as_mut_ptr() as usize,
    )?;
    Ok(Some(code))
}

/// `SECCOMP_FILTER_FLAG_*` of filter `index`.
///
/// # Errors
/// As [`seccomp_filter`].
pub fn seccomp_metadata(tid: i32, index: usize) -> Result<u64> {
    let mut data = [index as u64, 0u64];
    request(
        "PTRACE_SECCOMP_GET_METADATA",
        SECCOMP_GET_METADATA,
        tid,
        16,
        data.as_mut_ptr() as usize,
    )?;
    Ok(data[1])
}
