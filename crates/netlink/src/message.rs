//! Messages and attributes: `struct nlmsghdr`, `struct nlattr`.

const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// `NLA_F_NESTED | NLA_F_NET_BYTEORDER`
const TYPE_FLAGS: u16 = 0xc000;

/// Messages that are being built, one after the other.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    bytes: Vec<u8>,
    /// Where the message that is being built starts; without one these are attributes only.
    start: Option<usize>,
}

/// Where a nested attribute starts.
#[derive(Debug)]
#[must_use = "a nested attribute has to be ended"]
pub struct Nest(usize);

impl Builder {
    /// No message.
    #[must_use]
    pub fn new() -> Builder {
        Builder::default()
    }

    /// Begins a message; `flags` are `NLM_F_*`.
    pub fn begin(&mut self, kind: u16, flags: u16, sequence: u32) -> &mut Builder {
        self.start = Some(self.bytes.len());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.seal();
        self
    }

    /// Appends the fixed part that follows the header, or more of it.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Builder {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Appends an attribute.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Builder {
        self.bytes.extend_from_slice(&((ATTRIBUTE_HEADER + value.len()) as u16).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Begins an attribute that holds attributes.
    pub fn nest(&mut self, kind: u16) -> Nest {
        let at = self.bytes.len();
        self.attribute(kind | libc::NLA_F_NESTED as u16, &[]);
        Nest(at)
    }

    /// Ends it.
    pub fn end(&mut self, nest: Nest) -> &mut Builder {
        let len = (self.bytes.len() - nest.0) as u16;
        self.bytes[nest.0..nest.0 + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    /// All messages.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.seal();
    }

    /// Writes the length of the message so far.
    fn seal(&mut self) {
        let Some(start) = self.start else { return };
        let len = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }
}

/// A message as received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// `nlmsg_type`
    pub kind: u16,
    /// `nlmsg_flags`
    pub flags: u16,
    /// `nlmsg_seq`
    pub sequence: u32,
    /// What follows the header.
    pub body: &'a [u8],
}

/// The messages of a datagram. What is cut off at its end is left out.
pub fn messages(bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = u32_at(rest, 0)? as usize;
        let message = rest.get(..len).filter(|_| len >= HEADER)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Message {
            kind: u16_at(message, 4)?,
            flags: u16_at(message, 6)?,
            sequence: u32_at(message, 8)?,
            body: &message[HEADER..],
        })
    })
}

/// The attributes in `bytes`: type (without flags) and value.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(rest, 0)?);
        let attribute = rest.get(..len).filter(|_| len >= ATTRIBUTE_HEADER)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((u16_at(attribute, 2)? & !TYPE_FLAGS, &attribute[ATTRIBUTE_HEADER..]))
    })
}

/// The `u16` at `at`, in the machine's order.
#[must_use]
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The `u32` at `at`, in the machine's order.
#[must_use]
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_is_read() {
        let mut builder = Builder::new();
        builder.begin(20, 0x301, 7).bytes(&[1, 2, 3]);
        builder.begin(21, 5, 8).bytes(&[9; 4]).attribute(3, b"abcde");
        let nest = builder.nest(4);
        builder.attribute(1, &[7]).end(nest);
        let all: Vec<_> = messages(builder.as_bytes()).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].kind, all[0].flags, all[0].sequence), (20, 0x301, 7));
        assert_eq!(all[0].body, [1, 2, 3, 0]);
        let found: Vec<_> = attributes(&all[1].body[4..]).collect();
        assert_eq!(found[0], (3, &b"abcde"[..]));
        assert_eq!(found[1].0, 4);
        assert_eq!(attributes(found[1].1).collect::<Vec<_>>(), [(1, &[7u8][..])]);
    }

    #[test]
    fn attributes_need_no_message() {
        let mut builder = Builder::new();
        builder.attribute(1, b"abc").attribute(2, b"d");
        let found: Vec<_> = attributes(builder.as_bytes()).collect();
        assert_eq!(found, [(1, &b"abc"[..]), (2, &b"d"[..])]);
    }

    #[test]
    fn damaged_messages_end_the_list() {
        let mut builder = Builder::new();
        builder.begin(20, 0, 7).bytes(&[1, 2, 3, 4]).attribute(2, b"xy");
        for cut in 0..builder.as_bytes().len() {
            assert_eq!(messages(&builder.as_bytes()[..cut]).count(), 0, "cut at {cut}");
        }
        assert_eq!(attributes(&[2, 0, 1, 0]).count(), 0, "shorter than its header");
        assert_eq!(attributes(&[9, 0, 1, 0, 5]).count(), 0, "longer than what there is");
    }
}
