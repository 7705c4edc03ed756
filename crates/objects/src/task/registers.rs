//! Registers of a thread: `NT_PRSTATUS` and `NT_X86_XSTATE` (ptrace(2)) and the image's form of them.
//!
//! The image names the parts of the XSAVE area one by one; where they lie in it is each CPU's own affair (CPUID leaf
//! 13). Parts a CPU lacks are absent.

use crate::Problem;
use rewake_image::messages::{
    ThreadInfoX86, UserDescT, UserX86FpregsEntry, UserX86RegsEntry, UserX86RegsMode,
    UserX86XsaveEntry,
};
use rewake_sys::cpu::xsave_component;
use rewake_sys::ptrace::Registers;

/// Largest XSAVE area of current CPUs is 11 KiB (with AMX); reading needs a buffer of this size.
pub const XSAVE_MAX: usize = 16 * 1024;

/// FXSAVE area.
const LEGACY: usize = 512;
/// XSAVE header: `xstate_bv`, `xcomp_bv`.
const HEADER: usize = 64;

/// One part of the XSAVE area: its feature bit, and its size where the CPU has it.
#[derive(Debug, Clone, Copy)]
struct Part {
    bit: u32,
    size: usize,
}

const YMM: Part = Part { bit: 2, size: 256 };
const BNDREGS: Part = Part { bit: 3, size: 64 };
const BNDCSR: Part = Part { bit: 4, size: 64 };
const OPMASK: Part = Part { bit: 5, size: 64 };
const ZMM_HI256: Part = Part { bit: 6, size: 512 };
const HI16_ZMM: Part = Part { bit: 7, size: 1024 };
const PKRU: Part = Part { bit: 9, size: 8 };

/// Where this CPU has a part: a function of its feature bit, so that tests can be another CPU.
type Places<'a> = &'a dyn Fn(u32) -> Option<(usize, usize)>;

impl Part {
    fn range(self, places: Places<'_>, area: usize) -> Option<std::ops::Range<usize>> {
        let (offset, size) = places(self.bit)?;
        (size >= self.size && offset + self.size <= area).then(|| offset..offset + self.size)
    }
}
/// Features the image format has a place for (x87, SSE and the parts above).
const KNOWN: u64 = 0b10_1111_1111;

fn words32(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|c| u32::from_ne_bytes([c[0], c[1], c[2], c[3]])).collect()
}

fn words64(bytes: &[u8]) -> Vec<u64> {
    bytes
        .chunks_exact(8)
        .map(|c| u64::from_ne_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]))
        .collect()
}

fn u16_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    words32(&bytes[at..at + 4])[0]
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    words64(&bytes[at..at + 8])[0]
}

/// The image's form of a thread's registers. `xsave` is what `NT_X86_XSTATE` gave, or the 512 bytes of `NT_PRFPREG`.
///
/// # Errors
/// The area is shorter than FXSAVE, or a feature is in use that the format cannot hold (AMX tiles).
pub fn survey(regs: &Registers, xsave: &[u8], tid_address: u64) -> Result<ThreadInfoX86, Problem> {
    survey_at(regs, xsave, tid_address, &xsave_component)
}

fn survey_at(
    regs: &Registers,
    xsave: &[u8],
    tid_address: u64,
    places: Places<'_>,
) -> Result<ThreadInfoX86, Problem> {
    if xsave.len() < LEGACY {
        return Err(Problem::new("FPU registers", format!("{} bytes are too few", xsave.len())));
    }
    let mut fp = UserX86FpregsEntry {
        cwd: u16_at(xsave, 0),
        swd: u16_at(xsave, 2),
        twd: u16_at(xsave, 4),
        fop: u16_at(xsave, 6),
        rip: u64_at(xsave, 8),
        rdp: u64_at(xsave, 16),
        mxcsr: u32_at(xsave, 24),
        mxcsr_mask: u32_at(xsave, 28),
        st_space: words32(&xsave[32..160]),
        xmm_space: words32(&xsave[160..416]),
        padding: vec![0; 24],
        xsave: None,
    };
    if xsave.len() >= LEGACY + HEADER {
        let features = u64_at(xsave, LEGACY);
        let unknown = features & !KNOWN;
        if unknown != 0 {
            return Err(Problem::new(
                "FPU registers",
                format!(
                    "the CPU features {unknown:#x} are in use, for which the image format has no place"
                ),
            ));
        }
        let part = |p: &Part| p.range(places, xsave.len()).map_or(&[][..], |range| &xsave[range]);
        fp.xsave = Some(UserX86XsaveEntry {
            xstate_bv: features,
            ymmh_space: words32(part(&YMM)),
            bndreg_state: words64(part(&BNDREGS)),
            bndcsr_state: words64(part(&BNDCSR)),
            opmask_reg: words64(part(&OPMASK)),
            zmm_upper: words64(part(&ZMM_HI256)),
            hi16_zmm: words64(part(&HI16_ZMM)),
            pkru: words32(part(&PKRU)),
            cet: None,
        });
    }
    let unused = |entry_number| UserDescT {
        entry_number,
        read_exec_only: true,
        seg_not_present: true,
        ..UserDescT::default()
    };
    Ok(ThreadInfoX86 {
        clear_tid_addr: tid_address,
        gpregs: general(regs),
        fpregs: fp,
        tls: vec![unused(12), unused(13), unused(14)],
    })
}

/// General registers as the images have them.
#[must_use]
pub fn general(r: &Registers) -> UserX86RegsEntry {
    UserX86RegsEntry {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        bp: r.rbp,
        bx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        ax: r.rax,
        cx: r.rcx,
        dx: r.rdx,
        si: r.rsi,
        di: r.rdi,
        orig_ax: r.orig_rax,
        ip: r.rip,
        cs: r.cs,
        flags: r.eflags,
        sp: r.rsp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        mode: Some(UserX86RegsMode::Native as i32),
    }
}

/// General registers from the image.
///
/// # Errors
/// They are those of a 32-bit task, or of no user mode at all (hostile segment selectors).
pub fn restore_general(info: &ThreadInfoX86) -> Result<Registers, Problem> {
    let g = &info.gpregs;
    if g.mode.is_some_and(|m| m != UserX86RegsMode::Native as i32) {
        return Err(Problem::new("registers", "a 32-bit task cannot be restored yet"));
    }
    if g.cs & 3 != 3 || g.ss & 3 != 3 {
        return Err(Problem::new(
            "registers",
            format!(
                "code and stack segments {:#x} and {:#x} are not those of a program",
                g.cs, g.ss
            ),
        ));
    }
    Ok(Registers {
        r15: g.r15,
        r14: g.r14,
        r13: g.r13,
        r12: g.r12,
        rbp: g.bp,
        rbx: g.bx,
        r11: g.r11,
        r10: g.r10,
        r9: g.r9,
        r8: g.r8,
        rax: g.ax,
        rcx: g.cx,
        rdx: g.dx,
        rsi: g.si,
        rdi: g.di,
        // The image's registers are already those to go on with: the kernel must not look for a call to restart.
        orig_rax: u64::MAX,
        rip: g.ip,
        cs: g.cs,
        eflags: g.flags,
        rsp: g.sp,
        ss: g.ss,
        fs_base: g.fs_base,
        gs_base: g.gs_base,
        ds: g.ds,
        es: g.es,
        fs: g.fs,
        gs: g.gs,
    })
}

/// What XSAVE area this machine's kernel exchanges: its size in bytes and the features it has (`XCR0`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XsaveFormat {
    /// Size of the `NT_X86_XSTATE` register set.
    pub size: usize,
    /// Feature bits the kernel allows.
    pub features: u64,
}

impl XsaveFormat {
    /// Reads the format off any thread's `NT_X86_XSTATE`: the kernel puts XCR0 into the software bytes at 464.
    #[must_use]
    pub fn of(xsave: &[u8]) -> XsaveFormat {
        let features = if xsave.len() >= LEGACY + HEADER { u64_at(xsave, 464) } else { 0b11 };
        XsaveFormat { size: xsave.len(), features }
    }
}

/// The XSAVE area for `NT_X86_XSTATE` from the image.
///
/// # Errors
/// The image uses CPU features that this machine lacks (unless `check` is off), or a part has the wrong size.
pub fn restore_xsave(
    info: &ThreadInfoX86,
    format: XsaveFormat,
    check: bool,
) -> Result<Vec<u8>, Problem> {
    restore_xsave_at(info, format, check, &xsave_component)
}

fn restore_xsave_at(
    info: &ThreadInfoX86,
    format: XsaveFormat,
    check: bool,
    places: Places<'_>,
) -> Result<Vec<u8>, Problem> {
    let fp = &info.fpregs;
    let wrong = |part: &str, have: usize, want: usize| {
        Problem::new("FPU registers", format!("{part} has {have} words instead of {want}"))
    };
    let mut area = vec![0u8; format.size.max(LEGACY)];
    let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
    for (at, value) in [(0, fp.cwd), (2, fp.swd), (4, fp.twd), (6, fp.fop)] {
        put(at, &(value as u16).to_ne_bytes());
    }
    put(8, &fp.rip.to_ne_bytes());
    put(16, &fp.rdp.to_ne_bytes());
    put(24, &fp.mxcsr.to_ne_bytes());
    put(28, &fp.mxcsr_mask.to_ne_bytes());
    if fp.st_space.len() != 32 {
        return Err(wrong("st_space", fp.st_space.len(), 32));
    }
    if fp.xmm_space.len() != 64 {
        return Err(wrong("xmm_space", fp.xmm_space.len(), 64));
    }
    let bytes32 = |w: &[u32]| w.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<u8>>();
    let bytes64 = |w: &[u64]| w.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<u8>>();
    put(32, &bytes32(&fp.st_space));
    put(160, &bytes32(&fp.xmm_space));
    if format.size < LEGACY + HEADER {
        return Ok(area);
    }
    let Some(x) = &fp.xsave else {
        // Only FXSAVE was saved: x87 and SSE are what there is.
        put(LEGACY, &0b11u64.to_ne_bytes());
        return Ok(area);
    };
    let missing = x.xstate_bv & !format.features;
    if missing != 0 && check {
        return Err(Problem::new(
            "FPU registers",
            format!("the image uses CPU features {missing:#x} that this machine lacks"),
        )
        .remedy("restore on a CPU that has them, or drop them with --cpu-cap=none"));
    }
    put(LEGACY, &(x.xstate_bv & format.features).to_ne_bytes());
    let parts = [
        ("ymmh_space", YMM, bytes32(&x.ymmh_space)),
        ("bndreg_state", BNDREGS, bytes64(&x.bndreg_state)),
        ("bndcsr_state", BNDCSR, bytes64(&x.bndcsr_state)),
        ("opmask_reg", OPMASK, bytes64(&x.opmask_reg)),
        ("zmm_upper", ZMM_HI256, bytes64(&x.zmm_upper)),
        ("hi16_zmm", HI16_ZMM, bytes64(&x.hi16_zmm)),
        ("pkru", PKRU, bytes32(&x.pkru)),
    ];
    for (name, part, bytes) in parts {
        if bytes.is_empty() || format.features & x.xstate_bv & (1 << part.bit) == 0 {
            continue;
        }
        let range = part.range(places, format.size).filter(|_| bytes.len() == part.size);
        let Some(range) = range else {
            return Err(wrong(name, bytes.len() / 4, part.size / 4));
        };
        put(range.start, &bytes);
    }
    Ok(area)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xsave_survives_the_image() {
        let intel = |bit| match bit {
            2 => Some((576, 256)),
            5 => Some((1088, 64)),
            6 => Some((1152, 512)),
            7 => Some((1664, 1024)),
            9 => Some((2688, 8)),
            _ => None,
        };
        let mut area = vec![0u8; 2696];
        for (i, byte) in area.iter_mut().enumerate() {
            *byte = (i * 7 + 3) as u8;
        }
        area[416..512].fill(0);
        area[464..472].copy_from_slice(&0b10_1110_0111u64.to_ne_bytes());
        area[512..520].copy_from_slice(&0b10_1110_0111u64.to_ne_bytes());
        area[520..576].fill(0);
        area[832..1088].fill(0); // alignment gap, and MPX, which this machine lacks
        let format = XsaveFormat::of(&area);
        let info = survey_at(&Registers::default(), &area, 0, &intel).unwrap();
        let mut back = restore_xsave_at(&info, format, true, &intel).unwrap();
        back[464..472].copy_from_slice(&area[464..472]);
        assert!(back == area);
        // AMD's order is another, the contents are the same.
        let amd = |bit| match bit {
            2 => Some((576, 256)),
            5 => Some((832, 64)),
            6 => Some((896, 512)),
            7 => Some((1408, 1024)),
            9 => Some((2432, 8)),
            _ => None,
        };
        let there =
            restore_xsave_at(&info, XsaveFormat { size: 2440, ..format }, true, &amd).unwrap();
        assert_eq!(there[896..1408], area[1152..1664]);
        let lacking = XsaveFormat { size: 832, features: 0b111 };
        assert!(restore_xsave(&info, lacking, true).unwrap_err().reason.contains("0x2e0"));
        assert!(restore_xsave(&info, lacking, false).is_ok());
    }

    #[test]
    fn kernel_segments_are_refused() {
        let regs = Registers { cs: 0x33, ss: 0x2b, ..Registers::default() };
        let mut info = survey(&regs, &[0; 512], 0).unwrap();
        assert!(restore_general(&info).is_ok());
        info.gpregs.cs = 0x10;
        assert!(restore_general(&info).is_err());
    }
}
