//! Pipes, FIFOs and their contents.

use super::{FownEntry, declare::messages};

messages! {
    /// An end of a pipe.
    message PipeEntry "pipe_entry" {
        required uint32 id = 1;
        /// Inode number, which ends of one pipe have in common.
        required uint32 pipe_id = 2;
        /// `O_RDONLY` or `O_WRONLY`, and status flags.
        required uint32 flags = 3 [hex];
        required message FownEntry fown = 4;
    }

    /// An open FIFO.
    message FifoEntry "fifo_entry" {
        required uint32 id = 1;
        /// Inode number.
        required uint32 pipe_id = 2;
        /// The [`RegFileEntry`](super::RegFileEntry) with path and flags. Absent in old images, where it has the same
        /// id.
        optional uint32 regf_id = 3;
    }

    /// The content of a pipe or FIFO; the bytes follow the message.
    message PipeDataEntry "pipe_data_entry" {
        required uint32 pipe_id = 1;
        /// How many bytes follow.
        required uint32 bytes = 2;
        /// Capacity: fcntl(2), `F_GETPIPE_SZ`.
        optional uint32 size = 3;
    }
}
