//! Pipes, FIFOs and their contents.

use super::{FownEntry, declare::messages};

messages! {
    /// An end of a pipe.
    message PipeEntry "pipe_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// Inode of pipefs; equal = same pipe; key of pipes-data and of inherit-fd `pipe:`[N]``.
        required uint32 pipe_id = 2;
        /// O_* (0 read end, 1 write end).
        required uint32 flags = 3 [hex];
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 4;
    }

    /// An open FIFO.
    message FifoEntry "fifo_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// Inode of the fifo.
        required uint32 pipe_id = 2;
        /// Id of REG entry with path and flags (absent in old images: same id).
        optional uint32 regf_id = 3;
    }

    /// The content of a pipe or FIFO; the bytes follow the message.
    message PipeDataEntry "pipe_data_entry" {
        /// Pipe.
        required uint32 pipe_id = 1;
        /// Payload length following this record.
        required uint32 bytes = 2;
        /// Pipe capacity (F_GETPIPE_SZ).
        optional uint32 size = 3;
    }
}
