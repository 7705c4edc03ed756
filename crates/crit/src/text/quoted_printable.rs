//! Quoted-printable text (RFC 2045 §6.7) in the flavour of Python's `quopri` codec, the form crit gives to unix socket names.
//!
//! What the RFC leaves open: tabs and spaces stay as they are unless they end a line or the text, line breaks stay line breaks, and
//! a soft line break (`=` and a newline) comes before a line would reach 76 characters.

/// The longest line, the `=` of a soft line break included.
const LINE: usize = 76;

/// Bytes as text; the result is ASCII.
///
/// Line ends stay as they are, but if they are of both kinds, the codec would make them all of one: then they are quoted.
pub fn encode(bytes: &[u8]) -> String {
    let text = encode_as(bytes, false);
    if decode(text.as_bytes()) == bytes { text } else { encode_as(bytes, true) }
}

fn encode_as(bytes: &[u8], quote_line_ends: bool) -> String {
    // A text whose first line ends in CR LF keeps that style for all of its line breaks.
    let newline = bytes.iter().position(|&b| b == b'\n');
    let crlf = newline.is_some_and(|at| at > 0 && bytes[at - 1] == b'\r');
    let mut out = String::with_capacity(bytes.len() + bytes.len() / 4);
    let mut column = 0;
    let soft_break = |out: &mut String, column: &mut usize| {
        out.push_str(if crlf { "=\r\n" } else { "=\n" });
        *column = 0;
    };
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let next = bytes.get(at + 1).copied();
        if must_quote(byte, next, column) || (quote_line_ends && matches!(byte, b'\n' | b'\r')) {
            if column + 3 >= LINE {
                soft_break(&mut out, &mut column);
            }
            push_quoted(&mut out, byte);
            column += 3;
            at += 1;
        } else if byte == b'\n' || (byte == b'\r' && next == Some(b'\n')) {
            if let Some(blank) = out.chars().next_back().filter(|c| matches!(c, ' ' | '\t')) {
                out.pop();
                push_quoted(&mut out, blank as u8);
            }
            out.push_str(if crlf { "\r\n" } else { "\n" });
            column = 0;
            at += if byte == b'\r' { 2 } else { 1 };
        } else {
            if next.is_some_and(|n| n != b'\n') && column + 1 >= LINE {
                soft_break(&mut out, &mut column);
            }
            out.push(char::from(byte));
            column += 1;
            at += 1;
        }
    }
    out
}

/// Text back to bytes. A `=` that begins nothing known stands for itself.
pub fn decode(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'=' {
            out.push(first);
            continue;
        }
        match rest {
            [] => {}
            [b'\n' | b'\r', ..] => {
                let end = rest.iter().position(|&b| b == b'\n').map_or(rest.len(), |at| at + 1);
                rest = &rest[end..];
            }
            [b'=', tail @ ..] => {
                out.push(b'=');
                rest = tail;
            }
            [high, low, tail @ ..] => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => {
                    out.push(high << 4 | low);
                    rest = tail;
                }
                _ => out.push(b'='),
            },
            [_] => out.push(b'='),
        }
    }
    out
}

fn must_quote(byte: u8, next: Option<u8>, column: usize) -> bool {
    match byte {
        b'=' | 127.. => true,
        // A line that is nothing but a dot would end a mail.
        b'.' => column == 0 && matches!(next, None | Some(b'\n' | b'\r' | 0)),
        b' ' | b'\t' => next.is_none(),
        b'\n' | b'\r' => false,
        ..32 => true,
        _ => false,
    }
}

fn push_quoted(out: &mut String, byte: u8) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    out.push('=');
    out.push(char::from(DIGITS[usize::from(byte >> 4)]));
    out.push(char::from(DIGITS[usize::from(byte & 15)]));
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|d| u8::try_from(d).ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn socket_names() {
        assert_eq!(encode(b""), "");
        assert_eq!(encode(b"\0abstract"), "=00abstract");
        assert_eq!(encode(b"/tmp/a b=c.sock\0"), "/tmp/a b=3Dc.sock=00");
        assert_eq!(encode(b"/tmp/\xff\x7f "), "/tmp/=FF=7F=20");
        assert_eq!(encode(b"a \nb\t\nc"), "a=20\nb=09\nc");
        assert_eq!(encode(b".\n..\n."), "=2E\n..\n=2E");
    }

    #[test]
    fn long_names_are_folded() {
        let text = encode(&[b'a'; 108]);
        assert_eq!(text, format!("{}=\n{}", "a".repeat(75), "a".repeat(33)));
        let text = encode(&[0; 30]);
        assert_eq!(text, format!("{}=\n{}", "=00".repeat(25), "=00".repeat(5)));
    }

    #[test]
    fn oddities_of_decoding() {
        assert_eq!(decode(b"a=\nb=\r\nc"), b"abc");
        assert_eq!(decode(b"=3d=3D===A"), b"====A");
        assert_eq!(decode(b"=zz=4"), b"=zz=4");
    }

    #[test]
    fn line_ends_of_both_kinds() {
        assert_eq!(encode(b"a\r\nb\r\n"), "a\r\nb\r\n");
        assert_eq!(encode(b"a\nb\r\n"), "a=0Ab=0D=0A");
        assert_eq!(encode(b"a\r\nb\n"), "a=0D=0Ab=0A");
    }

    proptest! {
        #[test]
        fn round_trip_of_lines(bytes in proptest::collection::vec(proptest::sample::select(&b"a.=\r\n \t\0"[..]), 0..200)) {
            prop_assert_eq!(decode(encode(&bytes).as_bytes()), bytes);
        }

        #[test]
        fn round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(decode(encode(&bytes).as_bytes()), bytes);
        }

        #[test]
        fn any_text_decodes(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode(&text).len() <= text.len());
        }
    }
}
