//! CRIU's extension of protobuf field options; never in a file.

use super::declare::messages;

messages! {
    /// How crit prints a field; here it is [`Hint`](crate::descriptor::Hint).
    message CriuOpts "CRIU_Opts" {
        /// Print as hex.
        optional bool hex = 1;
        /// IP words.
        optional bool ipadd = 2;
        /// Flag map name.
        optional string flags = 3;
        /// Kernel dev encoding.
        optional bool dev = 4;
        /// Glibc dev encoding.
        optional bool odev = 5;
        /// Map name.
        optional string dict = 6;
        /// Bytes conversion.
        optional string conv = 7;
    }
}
