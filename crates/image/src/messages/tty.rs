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
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// tty_info.id.
        required uint32 tty_info_id = 2;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 3 [hex];
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 4;
        /// REG entry with path; absent only for EXT_TTY (old images: same id).
        optional uint32 regf_id = 6;
    }

    /// One side of a terminal.
    message TtyInfoEntry "tty_info_entry" {
        /// index*2 + (1 if master). Fixed indices: pty ≤1000, console 1002, vt 1004, ctty 1006, serial 1010, external
        /// from 1012 to 1076; limit 1088.
        required uint32 id = 1;
        required enum TtyType r#type = 2;
        /// TIOCGPTLCK (pty).
        required bool locked = 3;
        /// TIOCGEXCL.
        required bool exclusive = 4;
        /// TIOCGPKT.
        required bool packet_mode = 5;
        /// Session owning it as ctty, 0 none.
        required uint32 sid = 6;
        /// Foreground group.
        required uint32 pgrp = 7;
        /// st_rdev glibc encoding.
        required uint32 rdev = 8;
        /// Absent for hung-up peers.
        optional message TermiosEntry termios = 9;
        /// Same presence.
        optional message TermiosEntry termios_locked = 10;
        /// Same presence.
        optional message WinsizeEntry winsize = 11;
        /// Only type PTY.
        optional message TtyPtyEntry pty = 12;
        /// st_dev.
        optional uint32 dev = 13;
        optional uint32 uid = 14;
        optional uint32 gid = 15;
    }

    /// What only a pseudoterminal has.
    message TtyPtyEntry "tty_pty_entry" {
        /// Pts number.
        required uint32 index = 1;
    }

    /// Terminal settings: termios(3).
    message TermiosEntry "termios_entry" {
        /// termios(3) bits.
        required uint32 c_iflag = 1;
        /// termios(3) bits.
        required uint32 c_oflag = 2;
        /// termios(3) bits.
        required uint32 c_cflag = 3;
        /// termios(3) bits.
        required uint32 c_lflag = 4;
        /// Line discipline.
        required uint32 c_line = 5;
        /// Always 0 (not stored).
        required uint32 c_ispeed = 6;
        /// Always 0.
        required uint32 c_ospeed = 7;
        /// Nineteen elements, but the control characters are not one per element: they are the bytes of the array in
        /// memory (the first five elements, little-endian, hold them); what follows byte 32 is garbage. See
        /// [`crate::tty::control_chars`].
        repeated uint32 c_cc = 8;
    }

    /// The window size: `struct winsize`.
    message WinsizeEntry "winsize_entry" {
        /// Rows.
        required uint32 ws_row = 1;
        /// Columns.
        required uint32 ws_col = 2;
        /// Pixels.
        required uint32 ws_xpixel = 3;
        /// Pixels.
        required uint32 ws_ypixel = 4;
    }

    /// Bytes a terminal has buffered.
    message TtyDataEntry "tty_data_entry" {
        /// tty_info id of the side the data was read from.
        required uint32 tty_id = 1;
        /// Bytes (max 16384).
        required bytes data = 2;
    }
}
