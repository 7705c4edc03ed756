//! Synthetic images of every kind, made along the descriptors.

use rewake_image::{
    descriptor::{FieldDesc, FieldKind, Hint, Label, MessageDesc},
    dynamic::{DynMessage, Value},
    kind::{self, KindInfo, Payload},
    messages::{GhostChunkEntry, ImageMessage, IpcMsg},
};

use crate::common::header;

/// A source of numbers that look random and are the same each time (splitmix64).
#[derive(Debug, Clone)]
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.roll() % n
    }

    /// Small, large and odd numbers of up to this many bits.
    fn number(&mut self, bits: u32) -> u64 {
        let max = u64::MAX >> (64 - bits);
        match self.below(6) {
            0 => 0,
            1 => max,
            2 => 1 << self.below(bits.into()),
            3 => self.below(20),
            _ => self.roll() & max,
        }
    }

    fn bytes(&mut self, alphabet: &[u8]) -> Vec<u8> {
        let length = [0, 1, 7, 57, 58, 108, 200][self.below(7) as usize];
        (0..length).map(|_| alphabet[self.below(alphabet.len() as u64) as usize]).collect()
    }
}

/// A message with random values. With `full`, every field has one (nested ones as far as `depth` goes).
pub fn message(desc: &'static MessageDesc, dice: &mut Dice, full: bool, depth: u32) -> DynMessage {
    let mut message = DynMessage::new(desc);
    for field in desc.fields {
        let wanted = full || dice.below(2) == 0;
        let too_deep = depth == 0 && matches!(field.kind, FieldKind::Message(_));
        let count = match field.label {
            Label::Required => 1,
            _ if too_deep || !wanted => 0,
            Label::Optional => 1,
            // An address has one word or four.
            Label::Repeated if field.hint == Hint::Ip => [1, 4][dice.below(2) as usize],
            Label::Repeated => 1 + dice.below(3),
        };
        for _ in 0..count {
            let value = value(field, dice, full, depth.saturating_sub(1));
            message.push(field, value);
        }
    }
    message
}

fn value(field: &FieldDesc, dice: &mut Dice, full: bool, depth: u32) -> Value {
    match field.kind {
        FieldKind::Uint32 => Value::Uint(dice.number(32)),
        FieldKind::Uint64 | FieldKind::Fixed64 => Value::Uint(dice.number(64)),
        FieldKind::Int32 | FieldKind::Sint32 => Value::Int((dice.number(32) as i32).into()),
        FieldKind::Int64 | FieldKind::Sint64 => Value::Int(dice.number(64) as i64),
        FieldKind::Bool => Value::Bool(dice.below(2) == 1),
        FieldKind::Enum(desc) => {
            Value::Enum(desc.values[dice.below(desc.values.len() as u64) as usize].0)
        }
        FieldKind::String => {
            let text = dice.bytes("/aé😀\"\\\n\t \u{7f}\u{1}".as_bytes());
            Value::Bytes(String::from_utf8_lossy(&text).into_owned().into_bytes())
        }
        FieldKind::Bytes => {
            let all: Vec<u8> = (0..=255).collect();
            Value::Bytes(dice.bytes(&all))
        }
        FieldKind::Message(nested) => Value::Message(self::message(nested(), dice, full, depth)),
    }
}

/// Kinds of files with messages in them.
pub fn kinds() -> impl Iterator<Item = &'static KindInfo> {
    kind::all().iter().copied().filter(|kind| kind.message.is_some())
}

/// An image of this kind with random content.
pub fn image(kind: &KindInfo, dice: &mut Dice, full: bool) -> Vec<u8> {
    let mut out = header(kind);
    let entries = 1 + dice.below(3) as usize;
    for index in 0..entries {
        let desc = kind.message_at(index).unwrap();
        let mut entry = message(desc, dice, full, 3);
        match kind.payload {
            Payload::Nothing => put(&mut out, &entry),
            Payload::Lengths(fields) => {
                let lengths: Vec<u64> = fields.iter().map(|_| dice.below(200)).collect();
                for (number, length) in fields.iter().zip(&lengths) {
                    set(&mut entry, desc.field(*number).unwrap().name, Value::Uint(*length));
                }
                put(&mut out, &entry);
                fill(&mut out, dice, lengths.iter().sum());
            }
            Payload::Semaphores => {
                let count = dice.below(20);
                set(&mut entry, "nsems", Value::Uint(count));
                put(&mut out, &entry);
                fill(&mut out, dice, 2 * count);
                pad(&mut out, 2 * count, 8);
            }
            Payload::Messages => {
                let count = dice.below(4);
                set(&mut entry, "qnum", Value::Uint(count));
                put(&mut out, &entry);
                for _ in 0..count {
                    let mut inner = message(IpcMsg::desc(), dice, full, 0);
                    let size = dice.below(100);
                    set(&mut inner, "msize", Value::Uint(size));
                    put(&mut out, &inner);
                    fill(&mut out, dice, size);
                    pad(&mut out, size, 8);
                }
            }
            Payload::SharedMemory => {
                let size = dice.below(100);
                set(&mut entry, "size", Value::Uint(size));
                let elsewhere = dice.below(2) == 1;
                set(&mut entry, "in_pagemaps", Value::Bool(elsewhere));
                put(&mut out, &entry);
                if !elsewhere {
                    fill(&mut out, dice, size);
                    pad(&mut out, size, 4);
                }
            }
            Payload::GhostContent => {
                ghost(&mut out, entry, dice, full);
                break;
            }
        }
    }
    out
}

fn ghost(out: &mut Vec<u8>, mut entry: DynMessage, dice: &mut Dice, full: bool) {
    let chunks = dice.below(2) == 1;
    set(&mut entry, "chunks", Value::Bool(chunks));
    put(out, &entry);
    if !chunks {
        let size = dice.below(300);
        return fill(out, dice, size);
    }
    for _ in 0..dice.below(4) {
        let mut chunk = message(GhostChunkEntry::desc(), dice, full, 0);
        let size = dice.below(100);
        set(&mut chunk, "len", Value::Uint(size));
        put(out, &chunk);
        fill(out, dice, size);
    }
}

/// Appends a frame.
pub fn put(out: &mut Vec<u8>, message: &DynMessage) {
    let bytes = message.encode().unwrap();
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
}

fn set(message: &mut DynMessage, name: &str, value: Value) {
    let field = message.desc.field_named(name).unwrap();
    message.fields.retain(|(f, _)| f.number != field.number);
    message.push(field, value);
}

fn fill(out: &mut Vec<u8>, dice: &mut Dice, length: u64) {
    out.extend((0..length).map(|_| dice.roll() as u8));
}

fn pad(out: &mut Vec<u8>, length: u64, unit: u64) {
    out.extend((length..length.next_multiple_of(unit)).map(|_| 0));
}
