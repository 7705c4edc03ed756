//! Internet addresses. An image holds the bytes of the address in network order, four at a time as numbers of this machine.

use std::net::{Ipv4Addr, Ipv6Addr};

/// The text of an address of one word (IPv4) or four (IPv6); `None` for any other count.
pub fn to_text(words: &[u32]) -> Option<String> {
    match *words {
        [word] => Some(Ipv4Addr::from(word.to_ne_bytes()).to_string()),
        [a, b, c, d] => {
            let mut bytes = [0; 16];
            for (four, word) in bytes.chunks_exact_mut(4).zip([a, b, c, d]) {
                four.copy_from_slice(&word.to_ne_bytes());
            }
            let address = Ipv6Addr::from(bytes);
            // Rust shows the low half of a mapped address in the dotted form, crit does not.
            Some(match address.segments() {
                [0, 0, 0, 0, 0, 0xffff, high, low] => format!("::ffff:{high:x}:{low:x}"),
                _ => address.to_string(),
            })
        }
        _ => None,
    }
}

/// The words of an address.
pub fn from_text(text: &str) -> Option<Vec<u32>> {
    if let Ok(address) = text.parse::<Ipv4Addr>() {
        return Some(vec![u32::from_ne_bytes(address.octets())]);
    }
    let address: Ipv6Addr = text.parse().ok()?;
    Some(
        address
            .octets()
            .chunks_exact(4)
            .map(|four| u32::from_ne_bytes([four[0], four[1], four[2], four[3]]))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        let texts = [
            "127.0.0.1",
            "0.0.0.0",
            "::",
            "::1",
            "::ffff:102:304",
            "::102:304",
            "1::",
            "fe80::1",
            "1:0:0:2::3",
            "1:2:3:4:5:6:7:8",
            "1:0:3:4:5:6:7:8",
            "::3:4:5:6:0:0",
            "64:ff9b::102:304",
            "1::4:5:0:0:8",
            "0:1::",
        ];
        for text in texts {
            assert_eq!(to_text(&from_text(text).unwrap()).as_deref(), Some(text));
        }
        assert_eq!(from_text("::ffff:1.2.3.4"), from_text("::ffff:102:304"));
    }

    #[test]
    fn refused() {
        assert_eq!(from_text("localhost"), None);
        assert_eq!(from_text("1.2.3"), None);
        assert_eq!(to_text(&[]), None);
        assert_eq!(to_text(&[1, 2]), None);
    }
}
