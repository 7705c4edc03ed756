//! The macros that declare messages and enums.
//!
//! A declaration looks like the `.proto` text it stands for and yields the struct (by prost's derive) and the descriptor:
//!
//! ```text
//! message VmaEntry "vma_entry" {
//!     required uint64 start = 1 [hex];
//!     optional enum RemapType remap_type = 3;
//!     repeated message AioRingEntry aios = 16;
//! }
//! ```
//!
//! `boxed` stands for `message` where the struct keeps the value behind a `Box`: for alternatives of which one is present,
//! which would otherwise all take room in every value.

/// A field's name without the `r#` that Rust's keywords need.
pub(crate) const fn proto_name(name: &'static str) -> &'static str {
    match name.as_bytes() {
        [b'r', b'#', ..] => name.split_at(2).1,
        _ => name,
    }
}

/// Declares message types; see the module's text.
macro_rules! messages {
    ($($(#[$doc:meta])* message $name:ident $proto:literal { $($body:tt)* })*) => {
        $(messages!(@field { $(#[$doc])* $name $proto } [] [] $($body)*);)*

        /// The message types of this topic.
        pub(super) static ALL: &[$crate::descriptor::DescFn] =
            &[$(<$name as $crate::messages::ImageMessage>::desc),*];

        /// For the tests: each message type with a decode and encode through its struct.
        #[cfg(test)]
        pub(super) static RECODE: &[($crate::descriptor::DescFn, super::Recode)] =
            &[$((<$name as $crate::messages::ImageMessage>::desc, super::recode::<$name>)),*];
    };

    // One step: take the first field off the body, add its struct field to the first list, its descriptor to the second.
    (@field $head:tt [$($st:tt)*] [$($desc:tt)*] $(#[$doc:meta])* $label:ident message $ty:ident $field:ident = $n:tt $([$($opt:tt)*])?; $($rest:tt)*) => {
        messages!(@field $head
            [$($st)* $(#[$doc])* #[prost(message, $label, tag = $n)] pub $field: messages!(@type $label $ty),]
            [$($desc)* messages!(@desc $label $field $n (Message(<$ty as $crate::messages::ImageMessage>::desc)) $($($opt)*)?),]
            $($rest)*);
    };
    (@field $head:tt [$($st:tt)*] [$($desc:tt)*] $(#[$doc:meta])* $label:ident boxed $ty:ident $field:ident = $n:tt; $($rest:tt)*) => {
        messages!(@field $head
            [$($st)* $(#[$doc])* #[prost(message, $label, boxed, tag = $n)] pub $field: messages!(@type $label Box<$ty>),]
            [$($desc)* messages!(@desc $label $field $n (Message(<$ty as $crate::messages::ImageMessage>::desc))),]
            $($rest)*);
    };
    (@field $head:tt [$($st:tt)*] [$($desc:tt)*] $(#[$doc:meta])* $label:ident enum $ty:ident $field:ident = $n:tt $([default = $default:tt])?; $($rest:tt)*) => {
        messages!(@field $head
            [$($st)* $(#[$doc])* #[doc = concat!("\n\nA number of [`", stringify!($ty), "`].")]
                #[prost(int32, $label, tag = $n $(, default = $default)?)] pub $field: messages!(@type $label i32),]
            [$($desc)* messages!(@desc $label $field $n (Enum($ty::DESC)) $(default = $default)?),]
            $($rest)*);
    };
    (@field $head:tt [$($st:tt)*] [$($desc:tt)*] $(#[$doc:meta])* $label:ident string $field:ident = $n:tt $([$($opt:tt)*])?; $($rest:tt)*) => {
        messages!(@field $head
            [$($st)* $(#[$doc])* #[prost(bytes = "vec", $label, tag = $n)] pub $field: messages!(@type $label Vec<u8>),]
            [$($desc)* messages!(@desc $label $field $n (String) $($($opt)*)?),]
            $($rest)*);
    };
    (@field $head:tt [$($st:tt)*] [$($desc:tt)*] $(#[$doc:meta])* $label:ident bytes $field:ident = $n:tt $([$($opt:tt)*])?; $($rest:tt)*) => {
        messages!(@field $head
            [$($st)* $(#[$doc])* #[prost(bytes = "vec", $label, tag = $n)] pub $field: messages!(@type $label Vec<u8>),]
            [$($desc)* messages!(@desc $label $field $n (Bytes) $($($opt)*)?),]
            $($rest)*);
    };
    (@field $head:tt [$($st:tt)*] [$($desc:tt)*] $(#[$doc:meta])* $label:ident $kind:ident $field:ident = $n:tt [default = $default:tt]; $($rest:tt)*) => {
        messages!(@field $head
            [$($st)* $(#[$doc])* #[prost($kind, $label, tag = $n, default = $default)] pub $field: messages!(@type $label $kind),]
            [$($desc)* messages!(@desc $label $field $n ($kind) default = $default),]
            $($rest)*);
    };
    (@field $head:tt [$($st:tt)*] [$($desc:tt)*] $(#[$doc:meta])* $label:ident $kind:ident $field:ident = $n:tt $([$($opt:tt)*])?; $($rest:tt)*) => {
        messages!(@field $head
            [$($st)* $(#[$doc])* #[prost($kind, $label, packed = "false", tag = $n)] pub $field: messages!(@type $label $kind),]
            [$($desc)* messages!(@desc $label $field $n ($kind) $($($opt)*)?),]
            $($rest)*);
    };

    // No field is left.
    (@field { $(#[$doc:meta])* $name:ident $proto:literal } [$($st:tt)*] [$($desc:tt)*]) => {
        $(#[$doc])*
        #[allow(missing_docs)] // a field has a comment where its name does not say it all
        #[derive(Clone, PartialEq, Eq, ::prost::Message)]
        pub struct $name { $($st)* }

        impl $crate::messages::ImageMessage for $name {
            fn desc() -> &'static $crate::descriptor::MessageDesc {
                static DESC: $crate::descriptor::MessageDesc =
                    $crate::descriptor::MessageDesc { name: $proto, fields: &[$($desc)*] };
                &DESC
            }
        }
    };

    (@type required $($ty:tt)*) => { messages!(@scalar $($ty)*) };
    (@type optional $($ty:tt)*) => { Option<messages!(@scalar $($ty)*)> };
    (@type repeated $($ty:tt)*) => { Vec<messages!(@scalar $($ty)*)> };
    (@scalar int32) => { i32 };
    (@scalar sint32) => { i32 };
    (@scalar int64) => { i64 };
    (@scalar sint64) => { i64 };
    (@scalar uint32) => { u32 };
    (@scalar uint64) => { u64 };
    (@scalar fixed64) => { u64 };
    (@scalar $ty:ty) => { $ty };

    (@desc $label:ident $field:ident $n:tt ($($kind:tt)*) $($opt:tt)*) => {
        $crate::descriptor::FieldDesc {
            number: $n,
            name: $crate::messages::declare::proto_name(stringify!($field)),
            label: messages!(@label $label),
            kind: messages!(@kind $($kind)*),
            hint: messages!(@hint $($opt)*),
            default: messages!(@default $($opt)*),
        }
    };
    (@label required) => { $crate::descriptor::Label::Required };
    (@label optional) => { $crate::descriptor::Label::Optional };
    (@label repeated) => { $crate::descriptor::Label::Repeated };
    (@kind int32) => { $crate::descriptor::FieldKind::Int32 };
    (@kind int64) => { $crate::descriptor::FieldKind::Int64 };
    (@kind uint32) => { $crate::descriptor::FieldKind::Uint32 };
    (@kind uint64) => { $crate::descriptor::FieldKind::Uint64 };
    (@kind sint32) => { $crate::descriptor::FieldKind::Sint32 };
    (@kind sint64) => { $crate::descriptor::FieldKind::Sint64 };
    (@kind fixed64) => { $crate::descriptor::FieldKind::Fixed64 };
    (@kind bool) => { $crate::descriptor::FieldKind::Bool };
    (@kind $($nested:tt)*) => { $crate::descriptor::FieldKind::$($nested)* };
    (@hint hex) => { $crate::descriptor::Hint::Hex };
    (@hint ip) => { $crate::descriptor::Hint::Ip };
    (@hint dev) => { $crate::descriptor::Hint::Dev };
    (@hint odev) => { $crate::descriptor::Hint::Odev };
    (@hint flags = $map:literal) => { $crate::descriptor::Hint::Flags($map) };
    (@hint dict = $map:literal) => { $crate::descriptor::Hint::Dict($map) };
    (@hint conv = $map:literal) => { $crate::descriptor::Hint::Conv($map) };
    (@hint $($other:tt)*) => { $crate::descriptor::Hint::Plain };
    (@default default = $value:literal) => { Some($value) };
    (@default $($other:tt)*) => { None };
}
pub(crate) use messages;

/// Declares enums: `enum Lsmtype "lsmtype" { NoLsm "NO_LSM" = 0; }`.
macro_rules! enums {
    ($($(#[$doc:meta])* enum $name:ident $proto:literal { $($value:ident $text:literal = $n:literal;)* })*) => {$(
        $(#[$doc])*
        #[allow(missing_docs)] // the values' names say it all
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(i32)]
        pub enum $name { $($value = $n),* }

        impl $name {
            /// Names and numbers of all values.
            pub const DESC: &'static $crate::descriptor::EnumDesc =
                &$crate::descriptor::EnumDesc { name: $proto, values: &[$(($n, $text)),*] };
        }

        impl From<$name> for i32 {
            fn from(value: $name) -> i32 {
                value as i32
            }
        }

        impl TryFrom<i32> for $name {
            type Error = ::prost::UnknownEnumValue;

            fn try_from(value: i32) -> Result<Self, Self::Error> {
                match value {
                    $($n => Ok(Self::$value),)*
                    _ => Err(::prost::UnknownEnumValue(value)),
                }
            }
        }
    )*};
}
pub(crate) use enums;
