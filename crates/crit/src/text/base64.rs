//! Base64 in lines, as Python's `base64.encodebytes` writes it: 76 characters and a newline, also after the last line.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// The bytes that make a line of 76 characters.
const LINE: usize = 57;

/// Bytes as text; no bytes are no text.
pub fn encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(LINE).saturating_mul(77));
    for line in bytes.chunks(LINE) {
        STANDARD.encode_string(line, &mut out);
        out.push('\n');
    }
    out
}

/// Text back to bytes; white space anywhere is skipped.
///
/// # Errors
/// What is not base64, and where.
pub fn decode(text: &str) -> Result<Vec<u8>, base64::DecodeError> {
    let dense: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    STANDARD.decode(dense)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        assert_eq!(encode(b""), "");
        assert_eq!(encode(b"hello"), "aGVsbG8=\n");
        assert_eq!(encode(&[0; 57]), format!("{}\n", "A".repeat(76)));
        assert_eq!(encode(&[0; 58]), format!("{}\nAA==\n", "A".repeat(76)));
    }

    #[test]
    fn way_back() {
        for len in [0, 1, 2, 3, 56, 57, 58, 114, 1000] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            assert_eq!(decode(&encode(&bytes)).unwrap(), bytes);
        }
        assert_eq!(decode(" aGVs\r\n\tbG8=").unwrap(), b"hello");
        assert!(decode("aGVsbG8").is_err());
        assert!(decode("aGVs!G8=").is_err());
    }
}
