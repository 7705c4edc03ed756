//! Terminals: `tty-info.img`, `tty-data.img` and terminal files.

use super::{
    FownEntry,
    declare::{enums, messages},
};

enums! {
    /// Kinds of terminals.
    enum TtyType "TtyType" {
        Unknown "UNKNOWN" = 0;
        Pty "PTY" = 1;
        Console "CONSOLE" = 2;
        Vt "VT" = 3;
        Ctty "CTTY" = 4;
        ExtTty "EXT_TTY" = 5;
        Serial "SERIAL" = 6;
    }
}

messages! {
    /// An open terminal.
    message TtyFileEntry "tty_file_entry" {
        required uint32 id = 1;
        /// Id of a [`TtyInfoEntry`].
        required uint32 tty_info_id = 2;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 3 [hex];
        required message FownEntry fown = 4;
        /// The [`RegFileEntry`](super::RegFileEntry) with the path. Absent for external terminals, and in old images,
        /// where it has the same id.
        optional uint32 regf_id = 6;
    }

    /// One side of a terminal.
    message TtyInfoEntry "tty_info_entry" {
        /// Twice the index, and 1 more for a master. Indices: pseudoterminals up to 1000, the console 1002, virtual
        /// terminals 1004, /dev/tty 1006, serial lines 1010, external ones 1012 to 1076.
        required uint32 id = 1;
        required enum TtyType r#type = 2;
        /// ioctl_tty(2), `TIOCGPTLCK`.
        required bool locked = 3;
        /// ioctl_tty(2), `TIOCGEXCL`.
        required bool exclusive = 4;
        /// ioctl_tty(2), `TIOCGPKT`.
        required bool packet_mode = 5;
        /// The session whose controlling terminal it is; 0: none.
        required uint32 sid = 6;
        /// The foreground process group.
        required uint32 pgrp = 7;
        /// `st_rdev`, in glibc's encoding.
        required uint32 rdev = 8;
        /// Absent if the other side hung up, as are the next two.
        optional message TermiosEntry termios = 9;
        optional message TermiosEntry termios_locked = 10;
        optional message WinsizeEntry winsize = 11;
        /// Of a pseudoterminal.
        optional message TtyPtyEntry pty = 12;
        optional uint32 dev = 13;
        optional uint32 uid = 14;
        optional uint32 gid = 15;
    }

    /// What only a pseudoterminal has.
    message TtyPtyEntry "tty_pty_entry" {
        /// The number in /dev/pts.
        required uint32 index = 1;
    }

    /// Terminal settings: termios(3).
    message TermiosEntry "termios_entry" {
        required uint32 c_iflag = 1;
        required uint32 c_oflag = 2;
        required uint32 c_cflag = 3;
        required uint32 c_lflag = 4;
        required uint32 c_line = 5;
        /// 0: not stored.
        required uint32 c_ispeed = 6;
        /// 0: not stored.
        required uint32 c_ospeed = 7;
        /// Nineteen elements; see [`TermiosEntry::control_chars`].
        repeated uint32 c_cc = 8;
    }

    /// The window size: `struct winsize`.
    message WinsizeEntry "winsize_entry" {
        required uint32 ws_row = 1;
        required uint32 ws_col = 2;
        required uint32 ws_xpixel = 3;
        required uint32 ws_ypixel = 4;
    }

    /// Bytes a terminal has buffered.
    message TtyDataEntry "tty_data_entry" {
        /// The [`TtyInfoEntry`] of the side the bytes were read from.
        required uint32 tty_id = 1;
        required bytes data = 2;
    }
}

impl TermiosEntry {
    /// The control characters. `c_cc` does not have one an element: CRIU copies the array of bytes over its array of
    /// 32-bit elements, so that (little-endian) the first five elements hold all nineteen, and what follows is garbage.
    pub fn control_chars(&self) -> [u8; 19] {
        let mut chars = [0; 19];
        let bytes = self.c_cc.iter().flat_map(|word| word.to_le_bytes());
        chars.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        chars
    }

    /// Sets `c_cc` as CRIU would, with zeros for the garbage.
    pub fn set_control_chars(&mut self, chars: [u8; 19]) {
        let word =
            |part: &[u8]| part.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
        self.c_cc = chars.chunks(4).map(word).collect();
        self.c_cc.resize(19, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_chars_are_bytes_in_words() {
        let chars = std::array::from_fn(|i| i as u8 + 1);
        let mut termios = TermiosEntry::default();
        termios.set_control_chars(chars);
        assert_eq!(termios.c_cc.len(), 19);
        assert_eq!(
            termios.c_cc[..6],
            [0x0403_0201, 0x0807_0605, 0x0c0b_0a09, 0x100f_0e0d, 0x0013_1211, 0]
        );
        assert_eq!(termios.control_chars(), chars);
    }
}
