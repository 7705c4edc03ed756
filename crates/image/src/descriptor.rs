//! What a message is made of, as data.
//!
//! Every message of the format is declared once (see [`crate::messages`]) and known in two forms: as a struct for code that
//! knows what it wants, and as a [`MessageDesc`] for code that works on any message: the checks before decoding
//! ([`crate::wire`]) and crit's JSON ([`crate::dynamic`]).

/// Gives a message type's descriptor. A function and not a reference, because some message types contain themselves.
pub type DescFn = fn() -> &'static MessageDesc;

/// A protobuf message type of the image format.
#[derive(Debug)]
pub struct MessageDesc {
    /// The name in CRIU's `.proto` files, such as `fs_entry`.
    pub name: &'static str,
    /// All fields, ascending by number (the order in which protobuf libraries write them).
    pub fields: &'static [FieldDesc],
}

/// A field of a message type.
#[derive(Debug)]
pub struct FieldDesc {
    /// The field number on the wire.
    pub number: u32,
    /// The name in CRIU's `.proto` files, which is also the key in crit's JSON.
    pub name: &'static str,
    /// How many values the field has.
    pub label: Label,
    /// The type of a value.
    pub kind: FieldKind,
    /// How crit prints a value.
    pub hint: Hint,
    /// The default value of the `.proto` file, as text. It has no effect on the wire.
    pub default: Option<&'static str>,
}

/// The proto2 label of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Label {
    /// Exactly one value; a message without it is malformed.
    Required,
    /// One value or none.
    Optional,
    /// Any number of values, each with its own tag: the format never packs them.
    Repeated,
}

/// The protobuf type of a field.
#[derive(Debug, Clone, Copy)]
pub enum FieldKind {
    /// `int32`: negative values take ten bytes.
    Int32,
    /// `int64`
    Int64,
    /// `uint32`
    Uint32,
    /// `uint64`
    Uint64,
    /// `sint32`: zigzag.
    Sint32,
    /// `sint64`: zigzag.
    Sint64,
    /// `fixed64`: eight bytes, little-endian.
    Fixed64,
    /// `bool`
    Bool,
    /// `string`. Paths and command names are bytes on Linux, so no encoding is assumed.
    String,
    /// `bytes`
    Bytes,
    /// An enum, on the wire like `int32`.
    Enum(&'static EnumDesc),
    /// A nested message.
    Message(DescFn),
}

/// How crit prints a field's value; without meaning for the format itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// As the type says.
    Plain,
    /// Hexadecimal. On a message field: all integers within.
    Hex,
    /// The words of an IPv4 or IPv6 address.
    Ip,
    /// A device number in the kernel's encoding, `major << 20 | minor`.
    Dev,
    /// A device number in glibc's `makedev` encoding.
    Odev,
    /// A set of bits with names, from the map of this name.
    Flags(&'static str),
    /// A number with a name, from the map of this name.
    Dict(&'static str),
    /// Bytes with a text form of their own.
    Conv(&'static str),
}

/// A protobuf enum of the image format.
#[derive(Debug)]
pub struct EnumDesc {
    /// The name in CRIU's `.proto` files.
    pub name: &'static str,
    /// Number and name of each value, in the order of declaration.
    pub values: &'static [(i32, &'static str)],
}

impl MessageDesc {
    /// The field with this number, if the message type has one.
    pub fn field(&self, number: u32) -> Option<&'static FieldDesc> {
        self.fields.binary_search_by_key(&number, |f| f.number).ok().map(|i| &self.fields[i])
    }

    /// The field with this name, if the message type has one.
    pub fn field_named(&self, name: &str) -> Option<&'static FieldDesc> {
        self.fields.iter().find(|f| f.name == name)
    }
}

/// Message types are the same if their names are.
impl PartialEq for MessageDesc {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// Fields are the same if their numbers and names are; meant for fields of the same message type.
impl PartialEq for FieldDesc {
    fn eq(&self, other: &Self) -> bool {
        (self.number, self.name) == (other.number, other.name)
    }
}

impl EnumDesc {
    /// The name of a value.
    pub fn name_of(&self, value: i32) -> Option<&'static str> {
        self.values.iter().find(|(v, _)| *v == value).map(|(_, name)| *name)
    }

    /// The value of a name.
    pub fn value_of(&self, name: &str) -> Option<i32> {
        self.values.iter().find(|(_, n)| *n == name).map(|(v, _)| *v)
    }
}
