//! Numbers that have names: sets of bits (`PROT_READ | PROT_EXEC`) and plain numbers (`STREAM`).
//!
//! An image's descriptor says which table a field belongs to: `mmap.prot` and the like for bits, `sk` or `gen` together with the
//! field's own name for numbers. The names are those of CRIU's crit, so not every number that could have one has one.

use super::number;

type Table = &'static [(u32, &'static str)];

const PROT: Table = &[(0x1, "PROT_READ"), (0x2, "PROT_WRITE"), (0x4, "PROT_EXEC")];

const MAP: Table = &[
    (0x1, "MAP_SHARED"),
    (0x2, "MAP_PRIVATE"),
    (0x8, "MAP_DROPPABLE"),
    (0x20, "MAP_ANON"),
    (0x100, "MAP_GROWSDOWN"),
];

const VMA_STATUS: Table = &[
    (1 << 0, "VMA_AREA_REGULAR"),
    (1 << 1, "VMA_AREA_STACK"),
    (1 << 2, "VMA_AREA_VSYSCALL"),
    (1 << 3, "VMA_AREA_VDSO"),
    (1 << 5, "VMA_AREA_HEAP"),
    (1 << 6, "VMA_FILE_PRIVATE"),
    (1 << 7, "VMA_FILE_SHARED"),
    (1 << 8, "VMA_ANON_SHARED"),
    (1 << 9, "VMA_ANON_PRIVATE"),
    (1 << 10, "VMA_AREA_SYSVIPC"),
    (1 << 11, "VMA_AREA_SOCKET"),
    (1 << 12, "VMA_AREA_VVAR"),
    (1 << 13, "VMA_AREA_AIORING"),
    (1 << 14, "VMA_AREA_MEMFD"),
    (1 << 15, "VMA_AREA_SHSTK"),
    (1 << 17, "VMA_AREA_UPROBES"),
    (1 << 31, "VMA_UNSUPP"),
];

const OPEN: Table = &[
    (0o1, "O_WRONLY"),
    (0o2, "O_RDWR"),
    (0o100, "O_CREAT"),
    (0o200, "O_EXCL"),
    (0o400, "O_NOCTTY"),
    (0o1000, "O_TRUNC"),
    (0o2000, "O_APPEND"),
    (0o4000, "O_NONBLOCK"),
    (0o10000, "O_DSYNC"),
    (0o20000, "FASYNC"),
    (0o40000, "O_DIRECT"),
    (0o100000, "O_LARGEFILE"),
    (0o200000, "O_DIRECTORY"),
    (0o400000, "O_NOFOLLOW"),
    (0o1000000, "O_NOATIME"),
    (0o2000000, "O_CLOEXEC"),
];

const PAGEMAP: Table = &[(0x1, "PE_PARENT"), (0x2, "PE_LAZY"), (0x4, "PE_PRESENT")];

const SEALS: Table = &[
    (0x1, "F_SEAL_SEAL"),
    (0x2, "F_SEAL_SHRINK"),
    (0x4, "F_SEAL_GROW"),
    (0x8, "F_SEAL_WRITE"),
    (0x10, "F_SEAL_FUTURE_WRITE"),
];

const SOCKET_FAMILY: Table =
    &[(1, "UNIX"), (2, "INET"), (10, "INET6"), (16, "NETLINK"), (17, "PACKET")];

const SOCKET_TYPE: Table =
    &[(1, "STREAM"), (2, "DGRAM"), (3, "RAW"), (5, "SEQPACKET"), (10, "PACKET")];

const SOCKET_STATE: Table = &[
    (1, "ESTABLISHED"),
    (2, "SYN_SENT"),
    (3, "SYN_RECV"),
    (4, "FIN_WAIT1"),
    (5, "FIN_WAIT2"),
    (6, "TIME_WAIT"),
    (7, "CLOSE"),
    (8, "CLOSE_WAIT"),
    (9, "LAST_ACK"),
    (10, "LISTEN"),
];

const SOCKET_PROTO: Table = &[(0, "IP"), (6, "TCP"), (17, "UDP"), (136, "UDPLITE")];

const TASK_STATE: Table = &[(1, "Alive"), (3, "Zombie"), (6, "Stopped")];

/// The bits of a map that a `flags` hint names.
pub fn bits(map: &str) -> Option<Table> {
    Some(match map {
        "mmap.prot" => PROT,
        "mmap.flags" => MAP,
        "mmap.status" => VMA_STATUS,
        "rfile.flags" => OPEN,
        "pmap.flags" => PAGEMAP,
        "seals.flags" => SEALS,
        _ => return None,
    })
}

/// The numbers of a map that a `dict` hint names, for the field of this name.
pub fn numbers(map: &str, field: &str) -> Option<Table> {
    Some(match (map, field) {
        ("sk", "family") => SOCKET_FAMILY,
        ("sk", "type") => SOCKET_TYPE,
        ("sk", "state") => SOCKET_STATE,
        ("sk", "proto") => SOCKET_PROTO,
        ("gen", "task_state") => TASK_STATE,
        _ => return None,
    })
}

/// A set of bits as text: the names joined by ` | `, then the bits that have none, in hexadecimal; no bits are no text.
pub fn bits_to_text(table: Table, value: u32) -> String {
    let mut out = String::new();
    let mut rest = value;
    let mut push = |part: &str| {
        if !out.is_empty() {
            out.push_str(" | ");
        }
        out.push_str(part);
    };
    for (bit, name) in table {
        if value & bit != 0 {
            push(name);
            rest &= !bit;
        }
    }
    if rest != 0 {
        push(&format!("{rest:#x}"));
    }
    out
}

/// The set of bits that a text says: names and numbers, joined by `|`.
///
/// # Errors
/// The part of the text that is neither.
pub fn bits_from_text(table: Table, text: &str) -> Result<u32, &str> {
    if text.trim().is_empty() {
        return Ok(0);
    }
    text.split('|')
        .map(str::trim)
        .try_fold(0, |bits, part| Ok(bits | number_from_text(table, part).ok_or(part)?))
}

/// The name of a number, if it has one.
pub fn name_of(table: Table, value: u32) -> Option<&'static str> {
    table.iter().find(|(v, _)| *v == value).map(|(_, name)| *name)
}

/// The number that a name or the text of a number says.
pub fn number_from_text(table: Table, text: &str) -> Option<u32> {
    let named = table.iter().find(|(_, name)| *name == text).map(|(v, _)| *v);
    named.or_else(|| number::from_text(text).and_then(|v| u32::try_from(v).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_sets() {
        assert_eq!(bits_to_text(PROT, 0), "");
        assert_eq!(bits_to_text(PROT, 7), "PROT_READ | PROT_WRITE | PROT_EXEC");
        assert_eq!(bits_to_text(MAP, 0x132), "MAP_PRIVATE | MAP_ANON | MAP_GROWSDOWN | 0x10");
        assert_eq!(bits_to_text(OPEN, 0x100000), "0x100000");
        for table in [PROT, MAP, VMA_STATUS, OPEN, PAGEMAP, SEALS] {
            for value in [0, 1, 0x1234_5678, u32::MAX] {
                assert_eq!(bits_from_text(table, &bits_to_text(table, value)), Ok(value));
            }
        }
        assert_eq!(bits_from_text(PROT, "PROT_READ|PROT_EXEC|0x10 |32"), Ok(0x35));
        assert_eq!(bits_from_text(PROT, "PROT_READ | PROT_FOO"), Err("PROT_FOO"));
        assert_eq!(bits_from_text(PROT, "PROT_READ |"), Err(""));
        assert_eq!(bits_from_text(PROT, "0x100000000"), Err("0x100000000"));
    }

    #[test]
    fn named_numbers() {
        let table = numbers("sk", "type").unwrap();
        assert_eq!(name_of(table, 5), Some("SEQPACKET"));
        assert_eq!(name_of(table, 4), None);
        assert_eq!(number_from_text(table, "SEQPACKET"), Some(5));
        assert_eq!(number_from_text(table, "0x5"), Some(5));
        assert_eq!(number_from_text(table, "FOO"), None);
    }
}
