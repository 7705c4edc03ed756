//! Properties that hold for every message type and every kind of file, over random content.

use std::path::Path;

use proptest::{collection::vec, prelude::*, sample::Index};

use crate::{
    descriptor::{FieldDesc, FieldKind, Label, MessageDesc},
    dynamic::{DynMessage, Value},
    error::ImageError,
    ghost,
    kind::{self, Count, KindInfo, Payload},
    messages::{self, GhostChunkEntry, IpcMsg},
    pagemap::Pagemap,
    raw::{IpcMessages, RawImage},
    wire,
};

/// A message of the type, legal in all its values. Deeper than `depth`, only required fields are there.
fn message(desc: &'static MessageDesc, depth: u32) -> BoxedStrategy<DynMessage> {
    let fields: Vec<_> = desc.fields.iter().map(|field| values(field, depth)).collect();
    fields
        .prop_map(move |fields| {
            let mut message = DynMessage::new(desc);
            for (field, values) in desc.fields.iter().zip(fields) {
                values.into_iter().for_each(|value| message.push(field, value));
            }
            message
        })
        .boxed()
}

fn values(field: &'static FieldDesc, depth: u32) -> BoxedStrategy<Vec<Value>> {
    let nested = matches!(field.kind, FieldKind::Message(_));
    let count = match field.label {
        Label::Required => 1..=1,
        _ if nested && depth == 0 => return Just(Vec::new()).boxed(),
        Label::Optional => 0..=1,
        Label::Repeated => 0..=3,
    };
    vec(value(field.kind, depth), count).boxed()
}

fn value(kind: FieldKind, depth: u32) -> BoxedStrategy<Value> {
    use FieldKind::*;
    match kind {
        Int32 | Sint32 => any::<i32>().prop_map(|v| Value::Int(v.into())).boxed(),
        Int64 | Sint64 => any::<i64>().prop_map(Value::Int).boxed(),
        Uint32 => any::<u32>().prop_map(|v| Value::Uint(v.into())).boxed(),
        Uint64 | Fixed64 => any::<u64>().prop_map(Value::Uint).boxed(),
        Bool => any::<bool>().prop_map(Value::Bool).boxed(),
        String | Bytes => vec(any::<u8>(), 0..20).prop_map(Value::Bytes).boxed(),
        Enum(desc) => prop::sample::select(desc.values).prop_map(|(v, _)| Value::Enum(v)).boxed(),
        Message(desc) => message(desc(), depth.saturating_sub(1)).prop_map(Value::Message).boxed(),
    }
}

/// A file of the kind, with the payloads that its messages call for.
fn file(info: &'static KindInfo) -> BoxedStrategy<Vec<u8>> {
    let Some(desc) = info.message else { return Just(info.header_bytes()).boxed() };
    let count = if info.count == Count::One { 1..=1 } else { 0..=4 };
    let head =
        info.head.map_or(Just(None).boxed(), |head| message(head(), 2).prop_map(Some).boxed());
    (head, vec((message(desc(), 2), vec(any::<u8>(), 40)), count))
        .prop_map(move |(head, entries)| {
            let mut bytes = info.header_bytes();
            if let Some(head) = head {
                put_frame(&mut bytes, &head);
            }
            for (mut message, noise) in entries {
                let payload = payload(info.payload, &mut message, &noise);
                put_frame(&mut bytes, &message);
                bytes.extend(payload);
            }
            bytes
        })
        .boxed()
}

/// Makes a payload of the given noise, and the message agree with it.
fn payload(kind: Payload, message: &mut DynMessage, noise: &[u8]) -> Vec<u8> {
    let few = u64::from(noise[0] % 5);
    match kind {
        Payload::Nothing => Vec::new(),
        Payload::Lengths(numbers) => {
            numbers.iter().for_each(|&number| set(message, number, Value::Uint(few)));
            noise[..few as usize * numbers.len()].to_vec()
        }
        Payload::Semaphores => {
            set(message, 2, Value::Uint(few));
            noise[..(2 * few as usize).next_multiple_of(8)].to_vec()
        }
        Payload::SharedMemory => {
            set(message, 2, Value::Uint(few));
            set(message, 3, Value::Bool(noise[1] & 1 != 0));
            noise[..if noise[1] & 1 != 0 { 0 } else { (few as usize).next_multiple_of(4) }].to_vec()
        }
        Payload::Messages => {
            set(message, 3, Value::Uint(few));
            let mut bytes = Vec::new();
            for length in 0..few as usize {
                crate::raw::put_frame(&mut bytes, &IpcMsg { mtype: few, msize: length as u32 });
                bytes.extend(&noise[..length.next_multiple_of(8)]);
            }
            bytes
        }
        Payload::GhostContent => {
            let chunks = noise[1] & 1 != 0;
            set(message, 9, Value::Bool(chunks));
            set(message, 10, Value::Uint(1000));
            if !chunks {
                return noise.to_vec();
            }
            let mut bytes = Vec::new();
            for at in 0..few {
                crate::raw::put_frame(&mut bytes, &GhostChunkEntry { len: at, off: 10 * at });
                bytes.extend(&noise[..at as usize]);
            }
            bytes
        }
    }
}

fn set(message: &mut DynMessage, number: u32, value: Value) {
    let field = message.desc.field(number).unwrap();
    message.fields.retain(|(f, _)| f.number != number);
    message.push(field, value);
}

fn put_frame(bytes: &mut Vec<u8>, message: &DynMessage) {
    let message = message.encode().unwrap();
    bytes.extend((message.len() as u32).to_le_bytes());
    bytes.extend(message);
}

const NAME: &str = "some.img";

/// Reads the whole file in all the ways there are, and gives it back as it was understood.
fn read(info: &'static KindInfo, bytes: &[u8]) -> Result<Vec<u8>, ImageError> {
    let path = Path::new(NAME);
    let mut image = RawImage::new(path, info, 2, bytes)?;
    if info.message.is_none() {
        return Ok(bytes.to_vec());
    }
    if info.head.is_some() {
        // may well be refused for its values
        let _ = Pagemap::parse(&mut image.clone());
    }
    let mut again = info.header_bytes();
    while let Some(entry) = image.next_entry()? {
        let message = DynMessage::decode(entry.desc, entry.message).expect("was checked");
        let (_, recode) = messages::all_recode().find(|(desc, _)| desc == &entry.desc).unwrap();
        recode(entry.message).expect("prost accepts what was checked");
        if info.payload == Payload::Messages {
            let mut inner = IpcMessages::new(&image, &entry);
            while inner.next_message().expect("was checked").is_some() {}
        }
        put_frame(&mut again, &message);
        again.extend(entry.payload);
    }
    if info.payload == Payload::GhostContent {
        ghost::scan(path, bytes.len() as u64, 8, |at, buf| {
            buf.copy_from_slice(&bytes[at as usize..][..buf.len()]);
            Ok(())
        })?;
    }
    Ok(again)
}

/// A refusal must say where: the file, and for faults within it an offset that exists.
fn names_the_place(error: &ImageError, bytes: &[u8]) {
    match error {
        ImageError::Malformed { path, entry, fault } => {
            assert_eq!(path, Path::new(NAME));
            assert!(fault.offset <= bytes.len() as u64, "{error}");
            assert!(*entry <= bytes.len() / 4, "{error}");
        }
        ImageError::Magic { path, .. } => assert_eq!(path, Path::new(NAME)),
        _ => panic!("an error of another sort: {error}"),
    }
}

fn any_kind() -> impl Strategy<Value = &'static KindInfo> {
    prop::sample::select(kind::all())
}

#[test]
fn descriptors_are_in_order() {
    for desc in messages::all() {
        let numbers: Vec<u32> = desc.fields.iter().map(|f| f.number).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "{}: {numbers:?}", desc.name);
        assert!(numbers.len() <= 64, "{}: `wire::check` has a bit for 64", desc.name);
        assert!(desc.fields.iter().all(|f| !f.name.starts_with("r#")), "{}", desc.name);
    }
    let ours = |desc: &&MessageDesc| desc.name.starts_with("rewake_");
    let theirs: Vec<_> = messages::all().filter(|desc| !ours(desc)).collect();
    assert_eq!(theirs.len(), 158, "message types of CRIU 4.2");
    // Fields of ours in messages of theirs start at 1000.
    let fields = theirs.iter().flat_map(|desc| desc.fields).filter(|field| field.number < 1000);
    assert_eq!(fields.count(), 1045, "fields of CRIU 4.2");
}

#[test]
fn every_message_type_survives_a_round_trip() {
    for (desc, recode) in messages::all_recode() {
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(64));
        let result = runner.run(&message(desc, 3), |message| {
            let bytes = message.encode().unwrap();
            prop_assert_eq!(wire::check(desc, &bytes), Ok(()));
            prop_assert_eq!(&DynMessage::decode(desc, &bytes).unwrap(), &message);
            // through the struct, byte by byte the same
            prop_assert_eq!(recode(&bytes).unwrap(), bytes);
            Ok(())
        });
        result.unwrap_or_else(|e| panic!("{}: {e}", desc.name));
    }
}

#[test]
fn a_message_without_a_required_field_is_refused() {
    for desc in messages::all() {
        let required = desc.fields.iter().filter(|f| f.label == Label::Required);
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(4));
        for field in required {
            let result = runner.run(&message(desc, 1), |mut message| {
                let full = message.encode().unwrap();
                message.fields.retain(|(f, _)| f.number != field.number);
                // what is left is a legal encoding, only incomplete
                let mut bytes = Vec::new();
                for part in &message.fields {
                    let single = DynMessage { desc, fields: vec![part.clone()] };
                    bytes.extend(encode_unchecked(&single));
                }
                prop_assert!(bytes.len() < full.len());
                let fault = wire::check(desc, &bytes).unwrap_err();
                prop_assert_eq!(fault.reason, wire::Reason::Missing);
                prop_assert_eq!(fault.field, field.name);
                Ok(())
            });
            result.unwrap_or_else(|e| panic!("{}.{}: {e}", desc.name, field.name));
        }
    }
}

/// Encodes a message of one field, whatever else its type requires.
fn encode_unchecked(message: &DynMessage) -> Vec<u8> {
    let (field, values) = &message.fields[0];
    let copy = FieldDesc { label: Label::Repeated, ..copy_of(field) };
    let fields: &'static [FieldDesc] = Box::leak(Box::new([copy]));
    let desc: &'static MessageDesc = Box::leak(Box::new(MessageDesc { name: "part", fields }));
    DynMessage { desc, fields: vec![(&fields[0], values.clone())] }.encode().unwrap()
}

fn copy_of(field: &FieldDesc) -> FieldDesc {
    FieldDesc {
        number: field.number,
        name: field.name,
        label: field.label,
        kind: field.kind,
        hint: field.hint,
        default: field.default,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn a_good_file_is_read_back((info, bytes) in any_kind().prop_flat_map(|k| (Just(k), file(k)))) {
        prop_assert_eq!(read(info, &bytes).unwrap(), bytes);
    }

    #[test]
    fn a_cut_file_is_shorter_or_refused(
        (info, bytes) in any_kind().prop_flat_map(|k| (Just(k), file(k))),
        cut in any::<Index>(),
    ) {
        prop_assume!(!bytes.is_empty());
        let cut = &bytes[..cut.index(bytes.len())];
        match read(info, cut) {
            Ok(again) => prop_assert_eq!(again, cut),
            Err(e) => names_the_place(&e, cut),
        }
    }

    #[test]
    fn a_damaged_file_is_legal_or_refused(
        (info, mut bytes) in any_kind().prop_flat_map(|k| (Just(k), file(k))),
        flips in vec((any::<Index>(), 0..8u8), 1..4),
    ) {
        prop_assume!(!bytes.is_empty());
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        if let Err(e) = read(info, &bytes) {
            names_the_place(&e, &bytes);
        }
    }

    #[test]
    fn noise_is_legal_or_refused(info in any_kind(), noise in vec(any::<u8>(), 0..200)) {
        let mut bytes = info.header_bytes();
        bytes.extend(noise);
        if let Err(e) = read(info, &bytes) {
            names_the_place(&e, &bytes);
        }
    }

    #[test]
    fn file_names_and_kinds_agree(info in any_kind(), number in any::<u64>()) {
        let has_id = info.pattern.contains('%');
        let id = if has_id { number.into() } else { ().into() };
        let name = info.file_name(id);
        let (found, found_id) = kind::by_file_name(&name).unwrap();
        prop_assert_eq!(found_id, id);
        // two kinds share `pages-%d.img`
        prop_assert_eq!(found.pattern, info.pattern);
    }
}
