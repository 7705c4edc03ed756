//! Image files of every kind, as crit and a restore read them. The first byte chooses the kind.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rewake_image::{
    dynamic::DynMessage,
    kind::{self, Payload},
    messages::*,
    raw::{IpcMessages, RawEntry, RawImage},
    wire,
};

fuzz_target!(|data: &[u8]| {
    let Some((&choice, content)) = data.split_first() else { return };
    let path = Path::new("fuzzed.img");
    if let Ok(image) = RawImage::detect(path, content) {
        read(image);
    }
    let kinds = kind::all();
    let kind = kinds[usize::from(choice) % kinds.len()];
    // saves the fuzzer from finding out the magic numbers
    let file = [header(kind.header), content.to_vec()].concat();
    if let Ok(image) = RawImage::new(path, kind, 2, &file) {
        read(image);
    }
});

fn header(header: kind::Header) -> Vec<u8> {
    let numbers = match header {
        kind::Header::Inventory => vec![kind::INVENTORY_MAGIC],
        kind::Header::Image(magic) => vec![kind::IMAGE_MAGIC, magic],
        kind::Header::Service(magic) => vec![kind::SERVICE_MAGIC, magic],
        kind::Header::Unmarked => vec![],
    };
    numbers.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn read(mut image: RawImage<'_>) {
    while let Ok(Some(entry)) = image.next_entry() {
        let message = DynMessage::decode(entry.desc, entry.message).expect("was checked");
        let again = message.encode().expect("what was decoded can be encoded");
        assert_eq!(DynMessage::decode(entry.desc, &again).expect("was encoded"), message);
        typed(&entry);
        if image.kind().payload == Payload::Messages {
            let mut messages = IpcMessages::new(&image, &entry);
            while messages.next_message().expect("was checked").is_some() {}
        }
    }
}

/// What was checked decodes as its struct, for the types with the most in them.
fn typed(entry: &RawEntry<'_>) {
    fn decode<M: ImageMessage>(entry: &RawEntry<'_>) {
        if *entry.desc == *M::desc() {
            wire::decode::<M>(entry.message).expect("was checked");
        }
    }
    decode::<CoreEntry>(entry);
    decode::<MmEntry>(entry);
    decode::<FileEntry>(entry);
    decode::<CgroupEntry>(entry);
    decode::<ApparmorEntry>(entry);
    decode::<NetDeviceEntry>(entry);
    decode::<TtyInfoEntry>(entry);
    decode::<TcpStreamEntry>(entry);
    decode::<MntEntry>(entry);
}
