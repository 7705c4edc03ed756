//! What all tests of images need.

use rewake_image::kind::{self, Header, KindInfo};

/// The numbers an image of this kind starts with.
pub fn header(kind: &KindInfo) -> Vec<u8> {
    let numbers: &[u32] = match kind.header {
        Header::Inventory => &[kind::INVENTORY_MAGIC],
        Header::Image(magic) => &[kind::IMAGE_MAGIC, magic],
        Header::Service(magic) => &[kind::SERVICE_MAGIC, magic],
        Header::Unmarked => &[],
    };
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}
