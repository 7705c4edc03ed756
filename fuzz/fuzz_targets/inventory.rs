//! Inventory messages. Whatever is accepted comes out the same after another round.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rewake_image::{dynamic::DynMessage, messages::*, wire};

fuzz_target!(|data: &[u8]| {
    let Ok(inventory) = wire::decode::<InventoryEntry>(data) else { return };
    let bytes = DynMessage::decode(InventoryEntry::desc(), data)
        .and_then(|m| m.encode())
        .expect("was checked");
    assert_eq!(wire::decode::<InventoryEntry>(&bytes).expect("was encoded"), inventory);
});
