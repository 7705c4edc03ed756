//! Writing JSON exactly as Python's `json.dumps` does, which is what crit's output has always looked like.
//!
//! Two forms: everything on one line with `", "` and `": "` between the parts, or one value per line, indented by four.
//! Anything outside printable ASCII is escaped, characters beyond U+FFFF as two surrogates.

use std::io::{self, Write};

use serde_json::{Number, Value};

/// How the text is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// All on one line.
    Line,
    /// One value a line, indented by four spaces a level.
    Indented,
}

/// Writes a value, without a newline at the end.
///
/// # Errors
/// What `out` reports.
pub fn write<W: Write + ?Sized>(out: &mut W, value: &Value, layout: Layout) -> io::Result<()> {
    Writer { out, layout, depth: 0 }.value(value)
}

struct Writer<'a, W: ?Sized> {
    out: &'a mut W,
    layout: Layout,
    depth: usize,
}

impl<W: Write + ?Sized> Writer<'_, W> {
    fn value(&mut self, value: &Value) -> io::Result<()> {
        match value {
            Value::Null => self.out.write_all(b"null"),
            Value::Bool(true) => self.out.write_all(b"true"),
            Value::Bool(false) => self.out.write_all(b"false"),
            Value::Number(number) => self.number(number),
            Value::String(text) => self.string(text),
            Value::Array(items) if items.is_empty() => self.out.write_all(b"[]"),
            Value::Array(items) => {
                self.open(b"[")?;
                for (i, item) in items.iter().enumerate() {
                    self.separate(i)?;
                    self.value(item)?;
                }
                self.close(b"]")
            }
            Value::Object(members) if members.is_empty() => self.out.write_all(b"{}"),
            Value::Object(members) => {
                self.open(b"{")?;
                for (i, (key, item)) in members.iter().enumerate() {
                    self.separate(i)?;
                    self.string(key)?;
                    self.out.write_all(b": ")?;
                    self.value(item)?;
                }
                self.close(b"}")
            }
        }
    }

    fn number(&mut self, number: &Number) -> io::Result<()> {
        write!(self.out, "{number}")
    }

    fn string(&mut self, text: &str) -> io::Result<()> {
        self.out.write_all(b"\"")?;
        let mut plain_from = 0;
        for (at, c) in text.char_indices() {
            if matches!(c, ' '..='~') && c != '"' && c != '\\' {
                continue;
            }
            self.out.write_all(&text.as_bytes()[plain_from..at])?;
            plain_from = at + c.len_utf8();
            match c {
                '"' => self.out.write_all(b"\\\"")?,
                '\\' => self.out.write_all(b"\\\\")?,
                '\n' => self.out.write_all(b"\\n")?,
                '\r' => self.out.write_all(b"\\r")?,
                '\t' => self.out.write_all(b"\\t")?,
                '\u{8}' => self.out.write_all(b"\\b")?,
                '\u{c}' => self.out.write_all(b"\\f")?,
                _ => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.out, "\\u{unit:04x}")?;
                    }
                }
            }
        }
        self.out.write_all(&text.as_bytes()[plain_from..])?;
        self.out.write_all(b"\"")
    }

    fn open(&mut self, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.out.write_all(bracket)
    }

    fn close(&mut self, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        self.break_line()?;
        self.out.write_all(bracket)
    }

    /// Comes before the item with this index.
    fn separate(&mut self, index: usize) -> io::Result<()> {
        match (index, self.layout) {
            (0, _) => {}
            (_, Layout::Line) => self.out.write_all(b", ")?,
            (_, Layout::Indented) => self.out.write_all(b",")?,
        }
        self.break_line()
    }

    fn break_line(&mut self) -> io::Result<()> {
        if self.layout == Layout::Indented {
            self.out.write_all(b"\n")?;
            for _ in 0..self.depth {
                self.out.write_all(b"    ")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(value: &Value, layout: Layout) -> String {
        let mut out = Vec::new();
        write(&mut out, value, layout).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn one_line() {
        let value = json!({"a": [1, -2, u64::MAX], "b": {}, "c": [], "d": [true, false, null], "e": [[{"f": "g"}]]});
        assert_eq!(
            text(&value, Layout::Line),
            r#"{"a": [1, -2, 18446744073709551615], "b": {}, "c": [], "d": [true, false, null], "e": [[{"f": "g"}]]}"#
        );
    }

    #[test]
    fn indented() {
        let value = json!({"a": [1, {"b": "c"}], "d": {}, "e": []});
        let want = "{\n    \"a\": [\n        1,\n        {\n            \"b\": \"c\"\n        }\n    ],\n    \"d\": {},\n    \"e\": []\n}";
        assert_eq!(text(&value, Layout::Indented), want);
    }

    #[test]
    fn escapes() {
        let value = json!("\"\\/\u{8}\u{c}\n\r\t\u{1}\u{7f}é\u{2028}😀~ z");
        assert_eq!(
            text(&value, Layout::Line),
            r#""\"\\/\b\f\n\r\t\u0001\u007f\u00e9\u2028\ud83d\ude00~ z""#
        );
    }

    #[test]
    fn reads_back() {
        let value = json!({"k\u{7f}": ["é😀", {"x": -5}], "e": ""});
        for layout in [Layout::Line, Layout::Indented] {
            assert_eq!(serde_json::from_str::<Value>(&text(&value, layout)).unwrap(), value);
        }
    }
}
