//! CRIU's extension of protobuf field options; never in a file.

use super::declare::messages;

messages! {
    /// How crit prints a field; here it is [`Hint`](crate::descriptor::Hint).
    message CriuOpts "CRIU_Opts" {
        optional bool hex = 1;
        optional bool ipadd = 2;
        optional string flags = 3;
        optional bool dev = 4;
        optional bool odev = 5;
        optional string dict = 6;
        optional string conv = 7;
    }
}
