//! Device numbers as `major:minor`, from the two encodings that images hold.

/// How major and minor are packed into 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// The kernel's own: twelve bits of major above twenty bits of minor.
    Kernel,
    /// What `makedev(3)` makes and `stat(2)` reports, as far as it fits 32 bits: bits 8 to 19 are the major, the others the minor.
    Stat,
}

/// The text of a device number.
pub fn to_text(dev: u32, encoding: Encoding) -> String {
    let (major, minor) = match encoding {
        Encoding::Kernel => (dev >> 20, dev & 0xf_ffff),
        Encoding::Stat => (dev >> 8 & 0xfff, dev & 0xff | dev >> 12 & 0xf_ff00),
    };
    format!("{major}:{minor}")
}

/// The device number of a text; `None` if it is not of the form `major:minor` or a part is too large for the encoding.
pub fn from_text(text: &str, encoding: Encoding) -> Option<u32> {
    let (major, minor) = text.split_once(':')?;
    let (major, minor) = (major.trim().parse::<u32>().ok()?, minor.trim().parse::<u32>().ok()?);
    if major >= 1 << 12 || minor >= 1 << 20 {
        return None;
    }
    Some(match encoding {
        Encoding::Kernel => major << 20 | minor,
        Encoding::Stat => major << 8 | minor & 0xff | (minor & 0xf_ff00) << 12,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        assert_eq!(to_text(19_922_946, Encoding::Kernel), "19:2");
        assert_eq!(to_text(1_048_833, Encoding::Stat), "1:257");
        assert_eq!(to_text(2049, Encoding::Stat), "8:1");
        for dev in [0, 1, 0x1300002, 0x100101, 0x8801, u32::MAX, 0x1234_5678] {
            for encoding in [Encoding::Kernel, Encoding::Stat] {
                assert_eq!(from_text(&to_text(dev, encoding), encoding), Some(dev));
            }
        }
    }

    #[test]
    fn refused() {
        for text in ["", "8", "8:", ":1", "8:1:2", "4096:0", "0:1048576", "-1:0", "a:b"] {
            assert_eq!(from_text(text, Encoding::Kernel), None, "{text}");
        }
    }
}
