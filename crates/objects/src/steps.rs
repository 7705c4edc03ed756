//! A script with a label for each operation, so that a failure can be told in the user's terms.

use rewake_agent::layout::Op;
use rewake_inject::ring::{Data, Script};

/// What an operation does, for error texts; formatted only when it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Label {
    /// A fixed text.
    Text(&'static str),
    /// A mapping (start, end).
    Vma(u64, u64),
    /// Filling memory (start, end).
    Fill(u64, u64),
    /// Moving huge pages to their place (start, end).
    Huge(u64, u64),
    /// The NUMA policy of a mapping (start, end).
    Policy(u64, u64),
    /// Descriptor number.
    Descriptor(u32),
    /// Signal number.
    Signal(u32),
    /// Creating the task with this pid.
    Clone(i32),
    /// Timer id.
    Timer(u32),
    /// `RLIMIT_*` number.
    Limit(u32),
    /// An epoll instance and the descriptor it watches.
    Watch(u32, u32),
    /// Locking the file of a descriptor.
    Lock(u32),
    /// A context of asynchronous I/O, by its address.
    Aio(u64),
    /// Registering buffers with an io_uring instance.
    Buffers(u32),
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Label::Text(text) => f.write_str(text),
            Label::Vma(start, end) => write!(f, "mapping {start:#x}-{end:#x}"),
            Label::Fill(start, end) => write!(f, "filling memory {start:#x}-{end:#x}"),
            Label::Huge(start, end) => write!(f, "moving huge pages to {start:#x}-{end:#x}"),
            Label::Policy(start, end) => write!(f, "NUMA policy of mapping {start:#x}-{end:#x}"),
            Label::Descriptor(fd) => write!(f, "descriptor {fd}"),
            Label::Signal(signal) => write!(f, "signal {signal}"),
            Label::Clone(pid) => write!(f, "creating task {pid}"),
            Label::Timer(id) => write!(f, "POSIX timer {id}"),
            Label::Limit(which) => write!(f, "resource limit {which}"),
            Label::Aio(address) => write!(f, "asynchronous I/O context {address:#x}"),
            Label::Buffers(fd) => {
                write!(f, "registering buffers with the io_uring instance of descriptor {fd}")
            }
            Label::Watch(epoll, fd) => {
                write!(f, "watching descriptor {fd} by epoll descriptor {epoll}")
            }
            Label::Lock(fd) => write!(f, "locking the file of descriptor {fd}"),
        }
    }
}

/// What the result of an operation must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Success; the batch stops otherwise.
    Success,
    /// Exactly this value.
    Value(i64),
    /// Anything.
    Any,
    /// Success is wished for; a failure is worth a warning.
    Wish,
}

/// A script in which every operation has a label and an expectation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Steps {
    /// The operations.
    pub script: Script,
    /// A label and an expectation an operation.
    pub labels: Vec<(Label, Expect)>,
}

impl Steps {
    /// Steps whose data will lie at `base`.
    #[must_use]
    pub fn new(base: u64) -> Steps {
        Steps { script: Script::new(base), labels: Vec::new() }
    }

    /// Appends an operation that must succeed.
    pub fn must(&mut self, label: Label, op: Op) -> usize {
        self.labels.push((label, Expect::Success));
        self.script.push(op.stop())
    }

    /// Appends an operation that must result in `value`.
    pub fn must_be(&mut self, label: Label, value: i64, op: Op) -> usize {
        self.labels.push((label, Expect::Value(value)));
        self.script.push(op.stop())
    }

    /// Appends an operation that may fail.
    pub fn may(&mut self, label: Label, op: Op) -> usize {
        self.labels.push((label, Expect::Any));
        self.script.push(op)
    }

    /// Appends an operation whose failure is worth a warning.
    pub fn wish(&mut self, label: Label, op: Op) -> usize {
        self.labels.push((label, Expect::Wish));
        self.script.push(op)
    }

    /// Appends data.
    pub fn data(&mut self, bytes: &[u8]) -> Data {
        self.script.data(bytes)
    }

    /// Appends words as data.
    pub fn words(&mut self, words: &[u64]) -> Data {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.script.data(&bytes)
    }
}
