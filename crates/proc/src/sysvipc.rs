//! `/proc/sysvipc/shm` (proc_sysvipc_shm(5)): the System V shared memory segments of the reader's IPC namespace.

use crate::ParseError;
use crate::scan::lines;

const FILE: &str = "sysvipc/shm";

/// One segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shm {
    /// The key, 0 (`IPC_PRIVATE`) for one that nobody can look up.
    pub key: i32,
    /// The id.
    pub id: i32,
    /// Permission bits, with [`Shm::DEST`] and [`Shm::LOCKED`].
    pub mode: u32,
    /// Size in bytes, as it was asked for.
    pub size: u64,
    /// Who made it.
    pub creator: i32,
    /// Who attached or detached it last.
    pub last: i32,
    /// How many mappings there are of it, in all processes.
    pub attached: u64,
    /// Owner's user id.
    pub uid: u32,
    /// Owner's group id.
    pub gid: u32,
    /// Creator's user id.
    pub cuid: u32,
    /// Creator's group id.
    pub cgid: u32,
    /// When it was made or changed by shmctl(2), in seconds.
    pub changed: i64,
}

impl Shm {
    /// `SHM_DEST`: it ends with its last mapping.
    pub const DEST: u32 = 0o1000;
    /// `SHM_LOCKED`: its pages are not swapped out.
    pub const LOCKED: u32 = 0o2000;
}

/// Parses the text.
///
/// # Errors
/// A line is not what the kernel writes.
pub fn shm(text: &[u8]) -> Result<Vec<Shm>, ParseError> {
    let mut all = Vec::new();
    for (number, line) in lines(text).skip(1) {
        let bad = |field| ParseError::malformed(FILE, field, number, line);
        let words = str::from_utf8(line).map_err(|_| bad("key"))?;
        let mut words = words.split_ascii_whitespace();
        let mut next = |field, radix| {
            let word: &str = words.next().ok_or_else(|| bad(field))?;
            i64::from_str_radix(word, radix).map_err(|_| bad(field))
        };
        let int = |field, value: i64| i32::try_from(value).map_err(|_| bad(field));
        // Ids are printed without a sign, but for those that have no name here.
        let number = |field, value: i64| {
            u32::try_from(value).or_else(|_| int(field, value).map(|v| v as u32))
        };
        all.push(Shm {
            key: int("key", next("key", 10)?)?,
            id: int("shmid", next("shmid", 10)?)?,
            mode: number("perms", next("perms", 8)?)?,
            size: next("size", 10)? as u64,
            creator: int("cpid", next("cpid", 10)?)?,
            last: int("lpid", next("lpid", 10)?)?,
            attached: next("nattch", 10)? as u64,
            uid: number("uid", next("uid", 10)?)?,
            gid: number("gid", next("gid", 10)?)?,
            cuid: number("cuid", next("cuid", 10)?)?,
            cgid: number("cgid", next("cgid", 10)?)?,
            changed: {
                let _times = (next("atime", 10)?, next("dtime", 10)?);
                next("ctime", 10)?
            },
        });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap
  10028348          4   600                    56  4034  4036      0   101   104   101   104 1795577764 1795577765 1795577763                  4096                     0
-559038737      32773  3666               4194304     7     9      3     0     0     0     0 1795577764          0 1795577764                     0                     0
";

    #[test]
    fn lines_become_segments() {
        let all = shm(TEXT).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].key, all[0].id, all[0].mode, all[0].size), (10_028_348, 4, 0o600, 56));
        assert_eq!((all[0].creator, all[0].last, all[0].attached), (4034, 4036, 0));
        assert_eq!((all[0].uid, all[0].cgid, all[0].changed), (101, 104, 1_795_577_763));
        assert_eq!(all[1].key as u32, 0xdead_beef);
        assert_eq!(all[1].mode, Shm::DEST | Shm::LOCKED | 0o666);
        assert_eq!(all[1].attached, 3);
    }

    #[test]
    fn damaged_lines_are_errors() {
        for cut in 190..TEXT.len() {
            let _ = shm(&TEXT[..cut]);
        }
        assert!(shm(b"head\n  1 2 600\n").is_err());
        assert!(shm(b"head\n  1 2 999 3 4 5 6 7 8 9 10 11 12 13\n").is_err());
        assert_eq!(shm(b"").unwrap(), []);
    }
}
