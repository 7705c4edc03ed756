//! Integers as text: decimal, or with `0x`, `0o` or `0b`, with a sign if need be, blanks around.

/// The number that a text says.
pub fn from_text(text: &str) -> Option<i128> {
    let text = text.trim();
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let radix = match digits.as_bytes().get(..2) {
        Some(b"0x" | b"0X") => 16,
        Some(b"0o" | b"0O") => 8,
        Some(b"0b" | b"0B") => 2,
        _ => 10,
    };
    let digits = if radix == 10 { digits } else { &digits[2..] };
    // `from_str_radix` would take a second sign.
    if !digits.as_bytes().first()?.is_ascii_alphanumeric() {
        return None;
    }
    let value = i128::from_str_radix(digits, radix).ok()?;
    Some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        assert_eq!(from_text(" 17 "), Some(17));
        assert_eq!(from_text("-0x11"), Some(-17));
        assert_eq!(from_text("+0b11"), Some(3));
        assert_eq!(from_text("0o17"), Some(15));
        assert_eq!(from_text("0xffffffffffffffff"), Some(i128::from(u64::MAX)));
        for text in [
            "",
            " ",
            "-",
            "0x",
            "--1",
            "0x-1",
            "0x+1",
            "1.0",
            "é",
            "-é",
            "0é",
            "99999999999999999999999999999999999999999",
        ] {
            assert_eq!(from_text(text), None, "{text}");
        }
    }
}
