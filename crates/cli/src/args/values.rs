//! Parsers of option arguments. Each is total: what is not understood is an error that says what would be.

use rewake_engine::Label;
use std::ffi::OsStr;

/// A pid: a positive decimal.
pub fn pid(text: &OsStr) -> Option<i32> {
    text.to_str()?.parse().ok().filter(|pid| *pid > 0)
}

/// A size in bytes: a decimal with an optional suffix that starts with K, M or G (powers of 1024).
pub fn size(text: &OsStr) -> Option<u64> {
    let text = text.to_str()?;
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let number: u64 = number.parse().ok()?;
    let factor: u64 = match suffix {
        "" | "B" => 1,
        "K" | "k" | "KB" | "KiB" => 1 << 10,
        "M" | "m" | "MB" | "MiB" => 1 << 20,
        "G" | "g" | "GB" | "GiB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(factor)
}

/// A label of a security module: `apparmor:NAME`, `selinux:NAME` or `none`.
pub fn label(text: &OsStr) -> Option<Label> {
    match text.to_str()?.split_once(':') {
        Some((module @ ("apparmor" | "selinux"), name)) if !name.is_empty() => {
            Some(Label::Named(module.to_owned(), name.to_owned()))
        }
        None if text == "none" => Some(Label::Ignored),
        _ => None,
    }
}

/// A verbosity: what `-v[ARG]` makes of the level before it.
pub fn verbosity(before: u32, arg: Option<&OsStr>) -> Option<u32> {
    let Some(arg) = arg else { return Some(before.saturating_add(1)) };
    let arg = arg.to_str()?;
    if !arg.is_empty() && arg.bytes().all(|b| b == b'v') {
        return before.checked_add(1)?.checked_add(u32::try_from(arg.len()).ok()?);
    }
    arg.parse().ok()
}

/// CPU capability bits of `--cpu-cap`.
pub mod cpu {
    /// Extended state (xsave) must be restorable.
    pub const FPU: u32 = 1;
    /// The very same CPU.
    pub const CPU: u32 = 2;
    /// The same instruction set.
    pub const INS: u32 = 4;
    /// Write or compare `cpuinfo.img`.
    pub const IMAGE: u32 = 8;
}

/// The mask of `--cpu-cap[=LIST]`. Any mask but none brings [`cpu::IMAGE`] with it.
pub fn cpu_cap(arg: Option<&OsStr>) -> Option<u32> {
    let Some(arg) = arg else { return Some(cpu::FPU | cpu::CPU | cpu::INS | cpu::IMAGE) };
    let mut mask = 0;
    for word in arg.to_str()?.split([',', ' ']).filter(|word| !word.is_empty()) {
        let (invert, word) = match word.strip_prefix('^') {
            Some(word) => (true, word),
            None => (false, word),
        };
        let bits = match word {
            "fpu" => cpu::FPU,
            "cpu" => cpu::CPU,
            "ins" => cpu::INS,
            "all" => cpu::FPU | cpu::CPU | cpu::INS,
            "none" if !invert => {
                mask = 0;
                continue;
            }
            _ => return None,
        };
        mask = if invert { mask & !bits } else { mask | bits };
    }
    Some(if mask == 0 { 0 } else { mask | cpu::IMAGE })
}

/// A list of decimal numbers with commas between; empty if there is no argument.
pub fn numbers(arg: Option<&OsStr>) -> Option<Vec<u32>> {
    let Some(arg) = arg else { return Some(Vec::new()) };
    arg.to_str()?.split(',').map(|number| number.parse().ok()).collect()
}

/// What `--external` can name.
#[derive(Debug, PartialEq, Eq)]
pub enum External {
    /// `unix[INODE]`
    Unix(u32),
    /// `file[MNT_ID:INODE]`, the whole of it.
    File(String),
    /// `tty[RDEV:DEV]`, the whole of it.
    Terminal(String),
}

/// The resource of `--external`; `None` for other kinds, and numbers that no key of the images could have.
pub fn external(arg: &OsStr) -> Option<External> {
    if let Some(inode) = bracketed(arg, "unix") {
        return Some(External::Unix(inode));
    }
    let arg = arg.to_str()?;
    // Keys are compared as they are: lower case, without zeros before.
    let pair = |kind: &str| {
        let (a, b) =
            arg.strip_prefix(kind)?.strip_prefix('[')?.strip_suffix(']')?.split_once(':')?;
        let number = |n: &str| u64::from_str_radix(n, 16).ok();
        Some(format!("{kind}[{:x}:{:x}]", number(a)?, number(b)?))
    };
    pair("file").map(External::File).or_else(|| pair("tty").map(External::Terminal))
}

/// The number in `KIND[NUMBER]`.
pub fn bracketed(arg: &OsStr, kind: &str) -> Option<u32> {
    arg.to_str()?.strip_prefix(kind)?.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
}

/// Descriptor number and resource in `fd[N]:RES`.
pub fn inherited(arg: &OsStr) -> Option<(i32, &OsStr)> {
    let (number, resource) = arg.to_str()?.strip_prefix("fd[")?.split_once("]:")?;
    let number = number.parse().ok().filter(|n| *n >= 0)?;
    Some((number, OsStr::new(resource))).filter(|_| !resource.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn os(s: &str) -> &OsStr {
        OsStr::new(s)
    }

    #[test]
    fn sizes() {
        for (text, want) in [
            ("0", Some(0)),
            ("512", Some(512)),
            ("3K", Some(3 << 10)),
            ("10M", Some(10 << 20)),
            ("2G", Some(2 << 30)),
            ("2GiB", Some(2 << 30)),
            ("", None),
            ("M", None),
            ("-1", None),
            ("1X", None),
            ("1M2", None),
            ("99999999999G", None),
        ] {
            assert_eq!(size(os(text)), want, "{text}");
        }
    }

    #[test]
    fn verbosities() {
        assert_eq!(verbosity(2, None), Some(3));
        assert_eq!(verbosity(2, Some(os("v"))), Some(4));
        assert_eq!(verbosity(2, Some(os("vvv"))), Some(6));
        assert_eq!(verbosity(2, Some(os("4"))), Some(4));
        assert_eq!(verbosity(2, Some(os("0"))), Some(0));
        assert_eq!(verbosity(2, Some(os("d"))), None);
        assert_eq!(verbosity(2, Some(os(""))), None);
    }

    #[test]
    fn pids() {
        assert_eq!(pid(os("17")), Some(17));
        for bad in ["0", "-4", "", "x", "17x", "99999999999"] {
            assert_eq!(pid(os(bad)), None, "{bad}");
        }
    }

    #[test]
    fn outside_resources() {
        assert_eq!(numbers(None), Some(vec![]));
        assert_eq!(numbers(Some(os("5,17"))), Some(vec![5, 17]));
        assert_eq!(numbers(Some(os("5,"))), None);
        assert_eq!(bracketed(os("unix[12]"), "unix"), Some(12));
        assert_eq!(bracketed(os("mnt[12]"), "unix"), None);
        assert_eq!(bracketed(os("unix[12]:x"), "unix"), None);
        assert_eq!(external(os("unix[12]")), Some(External::Unix(12)));
        let key = |s: &str| s.to_owned();
        assert_eq!(external(os("file[1f:0A2]")), Some(External::File(key("file[1f:a2]"))));
        assert_eq!(external(os("tty[8803:1a]")), Some(External::Terminal(key("tty[8803:1a]"))));
        for bad in ["file[1]", "file[x:1]", "tty[1:2", "mnt[1:2]", "file[1:2]:x"] {
            assert_eq!(external(os(bad)), None, "{bad}");
        }
        assert_eq!(inherited(os("fd[3]:socket:[9]")), Some((3, os("socket:[9]"))));
        for bad in ["fd[3]:", "fd[-1]:x", "fd[x]:y", "3:x", ""] {
            assert_eq!(inherited(os(bad)), None, "{bad}");
        }
    }

    #[test]
    fn cpu_caps() {
        assert_eq!(cpu_cap(None), Some(15));
        assert_eq!(cpu_cap(Some(os("none"))), Some(0));
        assert_eq!(cpu_cap(Some(os("fpu"))), Some(9));
        assert_eq!(cpu_cap(Some(os("fpu,ins"))), Some(13));
        assert_eq!(cpu_cap(Some(os("all,^fpu"))), Some(14));
        assert_eq!(cpu_cap(Some(os("all,none"))), Some(0));
        assert_eq!(cpu_cap(Some(os("fpux"))), None);
        assert_eq!(cpu_cap(Some(os("^none"))), None);
    }
}
