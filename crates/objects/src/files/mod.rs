//! File descriptions and descriptors.
//!
//! A dump collects every description of the tree once ([`collect::Collector`]): descriptors that share one (dup(2),
//! fork(2)) get the same file id. A restore opens every description once in the controller ([`open::Opener`]) and hands it to
//! all tasks that hold it.
//!
//! Each kind is one module with `survey` (description → image entry) and `open` (image entry → description). To add
//! one, write the module and add it to the two registries, `collect::survey_kind` and `open::open_kind`.

pub mod bpf_map;
pub mod build_id;
pub mod collect;
pub mod epoll;
pub mod eventfd;
pub mod external;
pub mod fanotify;
pub mod fifo;
pub mod flight;
pub mod ghost;
pub mod inotify;
pub mod io_uring;
pub mod link_remap;
pub mod locks;
pub mod nsfs;
pub mod open;
pub mod passing;
pub mod pidfd;
pub mod pipe;
pub mod portions;
pub mod pty;
pub mod regular;
pub mod signalfd;
pub mod timerfd;
pub mod told;
pub mod tty;
pub mod watched;
