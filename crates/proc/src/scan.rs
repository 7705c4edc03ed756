//! A cursor over a line, and the number forms that `/proc` uses.
//!
//! All steps return `None` instead of an error: the parser that calls knows the field's name and makes the error.

use std::borrow::Cow;

/// A position in a text. A failed step leaves it anywhere; callers give up then.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scan<'a> {
    pub(crate) rest: &'a [u8],
}

/// What [`HEX`] has for a byte that is no hexadecimal digit.
const NOT_HEX: u8 = 0xff;

/// Value of a hexadecimal digit, [`NOT_HEX`] for any other byte. A table because addresses are the bulk of what is parsed.
static HEX: [u8; 256] = {
    let mut table = [NOT_HEX; 256];
    let mut i = 0;
    while i < 10 {
        table[b'0' as usize + i] = i as u8;
        i += 1;
    }
    let mut i = 0;
    while i < 6 {
        table[b'a' as usize + i] = 10 + i as u8;
        table[b'A' as usize + i] = 10 + i as u8;
        i += 1;
    }
    table
};

impl<'a> Scan<'a> {
    pub(crate) fn new(rest: &'a [u8]) -> Self {
        Scan { rest }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Takes one byte.
    #[inline]
    pub(crate) fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(first)
    }

    /// Takes exactly this text.
    #[inline]
    pub(crate) fn tag(&mut self, tag: &[u8]) -> Option<()> {
        self.rest = self.rest.strip_prefix(tag)?;
        Some(())
    }

    /// Takes exactly this byte.
    #[inline]
    pub(crate) fn eat(&mut self, byte: u8) -> Option<()> {
        if self.byte()? == byte { Some(()) } else { None }
    }

    /// Skips spaces and tabs, if any.
    #[inline]
    pub(crate) fn blanks(&mut self) {
        while let [b' ' | b'\t', rest @ ..] = self.rest {
            self.rest = rest;
        }
    }

    /// Takes all up to a byte and the byte itself.
    #[inline]
    pub(crate) fn until(&mut self, byte: u8) -> Option<&'a [u8]> {
        let at = memchr::memchr(byte, self.rest)?;
        let taken = &self.rest[..at];
        self.rest = &self.rest[at + 1..];
        Some(taken)
    }

    /// Skips blanks and takes the run of non-blank bytes after them; `None` at the end.
    pub(crate) fn word(&mut self) -> Option<&'a [u8]> {
        self.blanks();
        let end = self.rest.iter().position(|b| b.is_ascii_whitespace()).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        if word.is_empty() { None } else { Some(word) }
    }

    /// Takes what is left if it is blank, to prove that a line has no more.
    pub(crate) fn end(&self) -> Option<()> {
        if self.rest.trim_ascii().is_empty() { Some(()) } else { None }
    }

    /// Takes a decimal number without sign.
    #[inline]
    pub(crate) fn dec_u64(&mut self) -> Option<u64> {
        let mut value = 0u64;
        let mut digits = 0;
        // 19 digits cannot overflow, so only the last possible one is checked.
        for d in self.rest.iter().take(19).map_while(|b| digit(*b)) {
            value = value * 10 + u64::from(d);
            digits += 1;
        }
        if digits == 0 {
            return None;
        }
        self.rest = &self.rest[digits..];
        while let Some(d) = self.rest.first().copied().and_then(digit) {
            value = value.checked_mul(10)?.checked_add(u64::from(d))?;
            self.rest = &self.rest[1..];
        }
        Some(value)
    }

    /// Takes a decimal number without sign that fits `T`.
    #[inline]
    pub(crate) fn dec<T: TryFrom<u64>>(&mut self) -> Option<T> {
        T::try_from(self.dec_u64()?).ok()
    }

    /// Takes a decimal number with an optional minus that fits `T`.
    pub(crate) fn sdec<T: TryFrom<i64>>(&mut self) -> Option<T> {
        let value = if let [b'-', rest @ ..] = self.rest {
            self.rest = rest;
            0i64.checked_sub_unsigned(self.dec_u64()?)?
        } else {
            i64::try_from(self.dec_u64()?).ok()?
        };
        T::try_from(value).ok()
    }

    /// Takes a hexadecimal number without `0x`.
    #[inline]
    pub(crate) fn hex_u64(&mut self) -> Option<u64> {
        let mut value = 0u64;
        let mut digits = 0;
        // Eight at once while there are as many bytes; numbers stand in the midst of lines, so there mostly are.
        while let Some(chunk) = self.rest.first_chunk() {
            let (part, taken) = hex8(*chunk);
            value = value.unbounded_shl(4 * taken as u32) | part;
            digits += taken;
            self.rest = &self.rest[taken..];
            if taken < 8
                || digits > 16
                || self.rest.first().is_none_or(|b| HEX[*b as usize] == NOT_HEX)
            {
                break;
            }
        }
        while let [b, rest @ ..] = self.rest {
            let d = HEX[*b as usize];
            if d == NOT_HEX {
                break;
            }
            value = value << 4 | u64::from(d);
            digits += 1;
            self.rest = rest;
        }
        // Up to 16 digits the shifts above lose nothing; the kernel never prints more.
        if digits == 0 || digits > 16 { None } else { Some(value) }
    }

    /// Takes exactly two hexadecimal digits.
    #[inline]
    pub(crate) fn hex2(&mut self) -> Option<u32> {
        let (&[high, low], rest) = self.rest.split_first_chunk()?;
        let (high, low) = (HEX[high as usize], HEX[low as usize]);
        self.rest = rest;
        if high == NOT_HEX || low == NOT_HEX { None } else { Some(u32::from(high << 4 | low)) }
    }

    /// Takes a hexadecimal number without `0x` that fits `T`.
    #[inline]
    pub(crate) fn hex<T: TryFrom<u64>>(&mut self) -> Option<T> {
        T::try_from(self.hex_u64()?).ok()
    }

    /// Takes a hexadecimal number with an optional `0x`.
    pub(crate) fn hex0x<T: TryFrom<u64>>(&mut self) -> Option<T> {
        if let Some(rest) = self.rest.strip_prefix(b"0x") {
            self.rest = rest;
        }
        self.hex()
    }

    /// Takes an octal number.
    pub(crate) fn oct<T: TryFrom<u64>>(&mut self) -> Option<T> {
        let mut value = 0u64;
        let mut digits = 0;
        while let [b @ b'0'..=b'7', rest @ ..] = self.rest {
            value = value.checked_mul(8)? | u64::from(b - b'0');
            digits += 1;
            self.rest = rest;
        }
        if digits == 0 { None } else { T::try_from(value).ok() }
    }
}

/// The number that the hexadecimal digits at the beginning of eight bytes make, and how many they are: all bytes are
/// tested and combined at once, each in its own lane of a word.
#[inline]
fn hex8(chunk: [u8; 8]) -> (u64, usize) {
    const fn lanes(byte: u8) -> u64 {
        u64::from_ne_bytes([byte; 8])
    }
    const TOP: u64 = lanes(0x80);
    let text = u64::from_le_bytes(chunk);
    // With the top bits off, no sum below carries into the next lane. A sum's top bit says "not less than".
    let ascii = text & !TOP;
    let not_digit = (ascii ^ lanes(b'0')) + lanes(0x80 - 10);
    let lower = ascii | lanes(0x20);
    let letter = (lower + lanes(0x80 - b'a')) & !(lower + lanes(0x80 - b'g'));
    let bad = (text | not_digit & !letter) & TOP;
    let count = bad.trailing_zeros() as usize / 8;
    if count == 0 {
        return (0, 0);
    }
    // The first digit is the lowest lane; move the last one to the top lane and zeros in below.
    let text = text << (8 * (8 - count));
    let values = (text & lanes(0x0f)) + 9 * (text >> 6 & lanes(1));
    let pairs = (values << 4 | values >> 8) & 0x00ff_00ff_00ff_00ff;
    let quads = (pairs << 8 | pairs >> 16) & 0x0000_ffff_0000_ffff;
    ((quads << 16 | quads >> 32) & 0xffff_ffff, count)
}

#[inline]
fn digit(b: u8) -> Option<u8> {
    let d = b.wrapping_sub(b'0');
    if d < 10 { Some(d) } else { None }
}

/// The lines of a text with their numbers from 1, without their newline.
pub(crate) fn lines(text: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut rest = text;
    let mut number = 0;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        number += 1;
        let end = memchr::memchr(b'\n', rest);
        let line = &rest[..end.unwrap_or(rest.len())];
        rest = end.map_or(&[][..], |end| &rest[end + 1..]);
        Some((number, line))
    })
}

/// Splits `key:value` at the first colon and drops the blanks around the value.
pub(crate) fn key_value(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = memchr::memchr(b':', line)?;
    Some((&line[..at], line[at + 1..].trim_ascii()))
}

/// Undoes the kernel's octal escapes (`\012` for a newline): any backslash with three octal digits ≤ `\377`.
pub(crate) fn unescape_octal(text: &[u8]) -> Cow<'_, [u8]> {
    let Some(first) = memchr::memchr(b'\\', text) else { return Cow::Borrowed(text) };
    let mut out = Vec::with_capacity(text.len());
    out.extend_from_slice(&text[..first]);
    let mut rest = &text[first..];
    loop {
        match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            [b, tail @ ..] => {
                out.push(*b);
                rest = tail;
            }
            [] => return Cow::Owned(out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_range() {
        assert_eq!(Scan::new(b"18446744073709551615 ").dec_u64(), Some(u64::MAX));
        assert_eq!(Scan::new(b"18446744073709551616").dec_u64(), None);
        assert_eq!(Scan::new(b"").dec_u64(), None);
        assert_eq!(Scan::new(b"-9223372036854775808").sdec::<i64>(), Some(i64::MIN));
        assert_eq!(Scan::new(b"-9223372036854775809").sdec::<i64>(), None);
        assert_eq!(Scan::new(b"9223372036854775808").sdec::<i64>(), None);
        assert_eq!(Scan::new(b"-1").sdec::<i32>(), Some(-1));
        assert_eq!(Scan::new(b"--1").sdec::<i32>(), None);
        assert_eq!(Scan::new(b"4294967296").dec::<u32>(), None);
        assert_eq!(Scan::new(b"ffffffffffffffff-").hex_u64(), Some(u64::MAX));
        assert_eq!(Scan::new(b"00000000000000001").hex_u64(), None);
        assert_eq!(Scan::new(b"g").hex_u64(), None);
        assert_eq!(Scan::new(b"000000000000000000000000").hex_u64(), None);
        assert_eq!(Scan::new(b"0000000000000000:").hex_u64(), Some(0));
        assert_eq!(
            Scan::new(b"00000000000000000000000018446744073709551615").dec_u64(),
            Some(u64::MAX)
        );
        assert_eq!(
            (Scan::new(b"fe:").hex2(), Scan::new(b"f:").hex2(), Scan::new(b"f").hex2()),
            (Some(0xfe), None, None)
        );
        assert_eq!(Scan::new(b"02000002").oct::<u32>(), Some(0o2000002));
        assert_eq!(Scan::new(b"1777777777777777777777").oct::<u64>(), Some(u64::MAX));
        assert_eq!(Scan::new(b"2000000000000000000000").oct::<u64>(), None);
    }

    #[test]
    fn eight_hexadecimal_digits_at_once_are_as_one_by_one() {
        // Each byte at each place, among digits and at the end of the text.
        for byte in 0..=255u8 {
            for at in 0..17 {
                let mut text = *b"09afAF9012345678";
                if let Some(slot) = text.get_mut(at) {
                    *slot = byte;
                }
                for end in [16, at.min(16), (at + 1).min(16), (at + 3).min(16)] {
                    let text = &text[..end];
                    let length = text.iter().position(|b| !b.is_ascii_hexdigit()).unwrap_or(end);
                    let wanted =
                        u64::from_str_radix(std::str::from_utf8(&text[..length]).unwrap(), 16).ok();
                    let mut scan = Scan::new(text);
                    assert_eq!(scan.hex_u64(), wanted, "{}", text.escape_ascii());
                    assert_eq!(scan.rest.len(), end - length);
                }
            }
        }
    }

    #[test]
    fn escapes() {
        assert!(matches!(unescape_octal(b"/a b"), Cow::Borrowed(b"/a b")));
        assert_eq!(&*unescape_octal(b"/a\\012b\\134\\040"), b"/a\nb\\ ");
        // Not an escape of the kernel: kept as it stands.
        assert_eq!(&*unescape_octal(b"\\9\\01\\777\\"), b"\\9\\01\\777\\");
    }

    #[test]
    fn line_ends() {
        let all: Vec<_> = lines(b"a\n\nb").collect();
        assert_eq!(all, [(1, &b"a"[..]), (2, b""), (3, b"b")]);
        assert_eq!(lines(b"a\n").count(), 1);
    }
}
