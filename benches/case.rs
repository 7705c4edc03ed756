//! The cases and their targets.

/// What a checkpoint may take beside time.
#[derive(Debug)]
pub struct Memory {
    /// The images, in MiB.
    pub images: Option<f64>,
    /// How much larger the tree's memory may be after a restore, each page divided by the number of its users; in percent.
    pub growth: f64,
}

/// A subject, and what its commands may take.
#[derive(Debug)]
pub struct Case {
    /// Its name on the command line.
    pub name: &'static str,
    /// What the subject is.
    pub what: &'static str,
    /// Target for the dump command in milliseconds.
    pub dump_target: Option<f64>,
    /// Target for the restore command in milliseconds.
    pub restore_target: Option<f64>,
    /// GiB of memory that are touched and freed before each command. In a virtual machine memory that was freed goes back to
    /// the host after a while, and whoever touches it first then pays for a fault of the host's.
    pub warm_gib: usize,
    /// Options of both commands.
    pub options: &'static [&'static str],
    /// What images and memory may take, if that is looked at.
    pub memory: Option<Memory>,
}

/// All cases in the order they are run.
pub const ALL: &[Case] = &[
    Case {
        name: "tiny",
        what: "one sleeping process",
        dump_target: Some(4.0),
        restore_target: Some(4.0),
        warm_gib: 0,
        options: &[],
        memory: None,
    },
    Case {
        name: "procs200",
        what: "a parent and 199 forked children",
        dump_target: Some(60.0),
        restore_target: Some(50.0),
        warm_gib: 0,
        options: &[],
        memory: None,
    },
    Case {
        name: "threads500",
        what: "one process of 500 threads",
        dump_target: Some(20.0),
        restore_target: Some(25.0),
        warm_gib: 0,
        options: &[],
        memory: None,
    },
    Case {
        name: "vmas20k",
        what: "10,000 mappings, each of two protections: 20,000 VMAs",
        dump_target: Some(50.0),
        restore_target: Some(30.0),
        warm_gib: 0,
        options: &[],
        memory: None,
    },
    Case {
        name: "fds3k",
        what: "3,000 descriptors: regular files, eventfds, pipes with content",
        dump_target: None,
        restore_target: None,
        warm_gib: 0,
        options: &[],
        memory: None,
    },
    Case {
        name: "tcp500",
        what: "500 TCP connections within one process, data in all queues",
        dump_target: Some(40.0),
        restore_target: Some(40.0),
        warm_gib: 0,
        options: &["--tcp-established"],
        memory: None,
    },
    Case {
        name: "tcp9k",
        what: "9,000 TCP connections within one process, data in all queues: as many as 20,000 descriptors have room for",
        dump_target: Some(1000.0),
        restore_target: Some(1000.0),
        warm_gib: 0,
        options: &["--tcp-established"],
        memory: None,
    },
    Case {
        name: "tcp10k",
        what: "a server with 10,000 TCP connections, whose clients are outside",
        dump_target: Some(1000.0),
        restore_target: Some(1000.0),
        warm_gib: 0,
        options: &["--tcp-established"],
        memory: None,
    },
    Case {
        name: "heap1g",
        what: "1 GiB of touched random memory",
        dump_target: None,
        restore_target: None,
        warm_gib: 4,
        options: &[],
        memory: Some(Memory { images: None, growth: 2.0 }),
    },
    Case {
        name: "cow30",
        what: "a parent with 64 MiB of random memory, and 30 forked children",
        dump_target: Some(250.0),
        restore_target: None,
        warm_gib: 1,
        options: &[],
        memory: Some(Memory { images: Some(85.0), growth: 5.0 }),
    },
    Case {
        name: "smallvmas",
        what: "10,000 scattered mappings of three pages, all touched",
        dump_target: None,
        restore_target: None,
        warm_gib: 1,
        options: &[],
        memory: None,
    },
];

/// The name of what is no case of its own: [`crate::copies`].
pub const COPIES: &str = "copies";
/// Likewise: [`crate::lazy`].
pub const LAZY: &str = "lazy";
/// Likewise: [`crate::pause`].
pub const PAUSE: &str = "pause";

/// The case of that name.
pub fn find(name: &str) -> Option<&'static Case> {
    ALL.iter().find(|case| case.name == name)
}
