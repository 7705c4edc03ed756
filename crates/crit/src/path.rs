//! The way to a value within a JSON document.

use std::fmt;

/// A place in a document, as a list from the inside out: it costs nothing until it is printed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum JsonPath<'a> {
    /// The document itself.
    Root,
    /// A member of an object.
    Member(&'a JsonPath<'a>, &'a str),
    /// An item of an array.
    Item(&'a JsonPath<'a>, usize),
}

impl<'a> JsonPath<'a> {
    pub fn member(&'a self, name: &'a str) -> JsonPath<'a> {
        JsonPath::Member(self, name)
    }

    pub fn item(&'a self, index: usize) -> JsonPath<'a> {
        JsonPath::Item(self, index)
    }
}

impl fmt::Display for JsonPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JsonPath::Root => f.write_str("the document"),
            JsonPath::Member(JsonPath::Root, name) => f.write_str(name),
            JsonPath::Member(parent, name) => write!(f, "{parent}.{name}"),
            JsonPath::Item(JsonPath::Root, index) => write!(f, "[{index}]"),
            JsonPath::Item(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}
