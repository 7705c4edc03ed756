//! What CRIU's messages have no place for: `rewake.img`, a file of ours that CRIU passes over.

use super::SkOptsEntry;
use super::declare::messages;

messages! {
    /// Extra state of one task or one file description. Exactly one of the fields is set.
    message RewakeEntry "rewake_entry" {
        /// A process.
        optional message RewakeTaskEntry task = 1;
        /// A thread (the leader of a process included).
        optional message RewakeThreadEntry thread = 2;
        /// A file description.
        optional message RewakeFileEntry file = 3;
        /// The images were written with a manifest: without it they are not whole.
        optional bool manifest = 4;
        /// A message in the receive queue of a unix socket.
        optional message RewakePacketEntry packet = 20;
        /// A System V shared memory segment.
        optional message RewakeSegmentEntry segment = 40;
    }

    /// Extra state of a System V shared memory segment: shmctl(2).
    message RewakeSegmentEntry "rewake_segment_entry" {
        required uint32 id = 1;
        /// `SHM_DEST`: it is marked for removal.
        optional bool removed = 2;
        /// `SHM_LOCKED`.
        optional bool locked = 3;
        /// `shm_ctime`, by which it is known again.
        optional sint64 changed = 4;
    }

    /// Extra state of a process.
    message RewakeTaskEntry "rewake_task_entry" {
        /// In-namespace pid.
        required uint32 pid = 1;
        /// `/proc/PID/coredump_filter`.
        optional uint32 coredump_filter = 2;
        /// `PR_GET_TSC`.
        optional uint32 tsc = 3;
        /// `PR_GET_MDWE`.
        optional uint32 mdwe = 4;
        /// `PR_GET_IO_FLUSHER`.
        optional bool io_flusher = 5;
        /// `/proc/PID/autogroup` nice value.
        optional sint32 autogroup_nice = 6;
        /// `/proc/PID/personality` (the image format's own field loses bits).
        optional uint32 personality = 7;
        /// Start addresses of mappings that are locked as they are touched (`MLOCK_ONFAULT`).
        repeated uint64 lock_on_fault = 8 [hex];
        /// mlockall(2): `MCL_FUTURE` and `MCL_ONFAULT`.
        optional uint32 lock_future = 9;
        /// `PR_GET_MEMORY_MERGE`.
        optional bool memory_merge = 10;
        /// `PR_THP_DISABLE_EXCEPT_ADVISED`.
        optional bool thp_except_advised = 11;
        /// Start addresses of mappings that are sealed (mseal(2)).
        repeated uint64 sealed = 12 [hex];
        /// Its first thread's NUMA policy (set_mempolicy(2)), if it has one.
        optional message RewakePolicyEntry policy = 13;
        /// NUMA policies of mappings (mbind(2)).
        repeated message RewakePolicyEntry policies = 14;
    }

    /// A NUMA policy.
    message RewakePolicyEntry "rewake_policy_entry" {
        /// Start address of the mapping, if it is that of one.
        optional uint64 start = 1 [hex];
        /// `MPOL_*`, with its flags.
        required uint32 mode = 2 [hex];
        /// The nodes, as words.
        repeated uint64 nodes = 3 [hex];
    }

    /// Extra state of a thread.
    message RewakeThreadEntry "rewake_thread_entry" {
        /// In-namespace tid.
        required uint32 tid = 1;
        /// CPU set as words; absent: not known.
        repeated uint64 affinity = 2;
        /// `ioprio_get`.
        optional uint32 io_priority = 3;
        /// Timer slack in nanoseconds.
        optional uint64 timer_slack = 4;
        /// `SCHED_DEADLINE`: runtime, deadline, period (nanoseconds), flags.
        repeated uint64 deadline = 5;
        /// Syscall user dispatch: mode, selector, offset, length; absent: off.
        repeated uint64 syscall_dispatch = 6;
        /// The interrupted system call may be made again although the image says it ended with `EINTR`, which is what
        /// CRIU would write: number and the address of the instruction.
        repeated uint64 again = 7;
        /// Timer slack that `PR_SET_TIMERSLACK` goes back to with 0, in nanoseconds.
        optional uint64 default_timer_slack = 8;
    }

    /// Extra state of a file description.
    message RewakeFileEntry "rewake_file_entry" {
        /// File id.
        required uint32 id = 1;
        /// eventfd: `EFD_SEMAPHORE`.
        optional bool semaphore = 2;
        /// Pipe: the lengths of the packets in it (`O_DIRECT`), the oldest first.
        repeated uint32 packets = 3;
        /// Socket options that differ from those of a new socket.
        repeated message RewakeSocketOptionEntry socket_options = 10;
        /// Multicast groups that an internet socket has joined.
        repeated message RewakeMembershipEntry memberships = 11;
        /// What a UDP socket has received, the oldest first.
        repeated message RewakeDatagramEntry datagrams = 12;
        /// Names of the network interfaces whose numbers are in the entry of a packet socket.
        repeated message RewakeInterfaceEntry interfaces = 13;
        /// A vsock socket.
        optional message RewakeVsockEntry vsock = 14;
        /// Groups above 32 that a netlink socket hears, by number.
        repeated uint32 netlink_groups = 15;
        /// `SOCK_*` of a netlink socket, if it is not `SOCK_RAW`.
        optional uint32 netlink_type = 16;
        /// Who a socket belongs to, unless it is root: user, then group.
        optional uint32 uid = 17;
        optional uint32 gid = 18;
        /// Of a unix socket.
        optional message RewakeUnixEntry unix = 20;
        /// Of an epoll instance that no process has a descriptor for: the file ids of what it watches, in the order of its
        /// items.
        repeated uint32 watched = 21;
        /// Of a listening TCP socket: the file ids of the connections that it has not accepted yet, in their order. No
        /// process has a descriptor for them.
        repeated uint32 accept_queue = 22;
        /// Of these: the boot of the machine whose clock their timestamps follow.
        optional bytes boot = 23;
        /// Of a fanotify group: marks on whole file systems.
        repeated message RewakeFilesystemMarkEntry filesystem_marks = 30;
        /// A fanotify group was made without `CAP_SYS_ADMIN`, and is told less.
        optional bool unprivileged = 31;
        /// Of an inotify instance: watches of files that are deleted, and the file ids of these.
        repeated message RewakeDeletedWatchEntry deleted_watches = 32;
        /// An idle io_uring instance.
        optional message RewakeRingEntry ring = 33;
        /// Of a regular file or block device, or of memory with a descriptor: how long its data live (`F_SET_RW_HINT`).
        optional uint64 write_hint = 34;
        /// Of an epoll instance: how it polls network devices (`struct epoll_params`), if it does.
        optional uint64 epoll_params = 35 [hex];
        /// The master of a pseudoterminal whose slave was open, and is so no more: reading gives `EIO`.
        optional bool slave_closed = 40;
        /// `/dev/tty`: the session whose terminal it is.
        optional uint32 session = 41;
        /// Of an internet socket: it is bound to an address that no interface had (`IP_FREEBIND` while it was bound).
        optional bool foreign_address = 50;
        /// Of a packet socket.
        optional message RewakePacketRingsEntry packet_rings = 51;
        /// Of an internet socket: its place in a `SO_REUSEPORT` group.
        optional message RewakeReuseportEntry reuseport = 52;
        /// Of a TCP socket whose connection has ended.
        optional message RewakeEndedEntry ended = 53;
    }

    /// What is left of a TCP connection that has ended.
    message RewakeEndedEntry "rewake_ended_entry" {
        /// Its own address, four or sixteen bytes.
        required bytes address = 1;
        required uint32 port = 2;
        /// The error that waits for the program (`SO_ERROR`).
        optional uint32 error = 3;
        /// The stream was at its end already when that came.
        optional bool done = 4;
        /// What has not been read yet.
        required bytes received = 5;
    }

    /// The place of a socket in a `SO_REUSEPORT` group.
    message RewakeReuseportEntry "rewake_reuseport_entry" {
        /// Which group: a number that all its members have.
        required uint32 group = 1;
        /// Which member.
        required uint32 index = 2;
        /// In one of the members, the classic BPF program that decides which of them gets what arrives
        /// (`SO_ATTACH_REUSEPORT_CBPF`): an instruction each, as in `SkOptsEntry::so_filter`.
        repeated uint64 program = 3 [hex];
    }

    /// The rings of a packet socket.
    message RewakePacketRingsEntry "rewake_packet_rings_entry" {
        /// Which frame, or block of `TPACKET_V3`, the kernel fills next.
        optional uint32 receive_at = 1;
        /// Which frame it sends next.
        optional uint32 send_at = 2;
        /// What is in them, but for zeros: the ring of received packets, then that of packets to be sent.
        repeated message RewakePacketPieceEntry pieces = 3;
    }

    /// Bytes of the rings of a packet socket.
    message RewakePacketPieceEntry "rewake_packet_piece_entry" {
        required uint64 at = 1;
        required bytes data = 2;
    }

    /// An idle io_uring(7) instance.
    message RewakeRingEntry "rewake_ring_entry" {
        required uint32 sq_entries = 1;
        required uint32 cq_entries = 2;
        /// Status flags.
        required uint32 flags = 3 [hex];
        /// The submission queue's array of numbers; absent with `IORING_SETUP_NO_SQARRAY`.
        optional bytes array = 4;
        /// Requests taken, and as many completions given, since the beginning.
        required uint32 position = 5;
        /// Up to where the program has filled the submission queue.
        required uint32 sq_tail = 6;
        /// From where on it has not taken completions.
        required uint32 cq_head = 7;
        /// All entries of the completion queue.
        required bytes completions = 8;
        /// All entries of the submission queue.
        required bytes submissions = 9;
        /// `IORING_SETUP_*`, where the kernel told. Everything below is there only if it did.
        optional uint32 setup = 10 [hex];
        /// Completions given since the beginning, if they are more or fewer than requests taken.
        optional uint32 given = 11;
        /// The thread that alone may submit (`IORING_SETUP_SINGLE_ISSUER`).
        optional uint32 issuer = 12;
        /// Slots in the table of registered files.
        optional uint32 file_slots = 13;
        /// Those that are not empty.
        repeated message RewakeRingFileEntry files = 14;
        /// `IORING_REGISTER_FILE_ALLOC_RANGE`, if it is not the whole table: from slot, to slot.
        optional uint32 files_from = 15;
        optional uint32 files_to = 16;
        /// Slots in the table of registered buffers.
        optional uint32 buffer_slots = 17;
        /// Those that are not empty.
        repeated message RewakeRingBufferEntry buffers = 18;
        /// The process whose memory they are.
        optional uint32 buffers_of = 19;
        /// The file id of the registered eventfd; 0: one that nobody has besides.
        optional uint32 eventfd = 20;
        /// It is told only of what was not done at once (`IORING_REGISTER_EVENTFD_ASYNC`).
        optional bool eventfd_async = 21;
        /// Words of the rings: submissions dropped, flags of the completion queue, completions dropped.
        repeated uint32 words = 22;
        /// `IORING_REGISTER_IOWQ_MAX_WORKERS`: bounded, unbounded.
        repeated uint32 workers = 23;
        /// `IORING_REGISTER_CLOCK`, if it is not `CLOCK_MONOTONIC`.
        optional uint32 clock = 24;
    }

    /// A file that is registered with an io_uring instance.
    message RewakeRingFileEntry "rewake_ring_file_entry" {
        required uint32 slot = 1;
        /// The file id of its description.
        required uint32 file = 2;
        /// What a completion tells of its end.
        optional uint64 tag = 3;
    }

    /// Memory that is registered with an io_uring instance.
    message RewakeRingBufferEntry "rewake_ring_buffer_entry" {
        required uint32 slot = 1;
        required uint64 address = 2 [hex];
        required uint32 len = 3;
        /// What a completion tells of its end.
        optional uint64 tag = 4;
    }

    /// A fanotify mark on a file system.
    message RewakeFilesystemMarkEntry "rewake_filesystem_mark_entry" {
        /// A directory in it.
        required bytes path = 1;
        required uint32 mflags = 2 [hex];
        required uint64 mask = 3 [hex];
        required uint64 ignored_mask = 4 [hex];
    }

    /// An inotify watch of a deleted file.
    message RewakeDeletedWatchEntry "rewake_deleted_watch_entry" {
        /// The watch descriptor.
        required uint32 wd = 1;
        /// The file id of a description of the file.
        required uint32 file = 2;
    }

    /// A network interface.
    message RewakeInterfaceEntry "rewake_interface_entry" {
        required uint32 index = 1;
        required string name = 2;
    }

    /// A vsock socket that is not connected: vsock(7).
    message RewakeVsockEntry "rewake_vsock_entry" {
        /// `SOCK_*`
        required uint32 r#type = 1;
        /// Where it is bound; `VMADDR_CID_ANY` and `VMADDR_PORT_ANY` (all ones): nowhere.
        required uint32 cid = 2;
        required uint32 port = 3;
        required bool listening = 4;
        required uint32 flags = 5 [hex];
        required message SkOptsEntry opts = 6;
    }

    /// A socket option: setsockopt(2).
    message RewakeSocketOptionEntry "rewake_socket_option_entry" {
        /// `SOL_SOCKET`, `IPPROTO_IP`, …
        required uint32 level = 1;
        /// `SO_…`, `IP_…`, …
        required uint32 number = 2;
        /// As getsockopt(2) gives it; empty if `interface` is there, but for `IP_MULTICAST_IF`.
        required bytes value = 3;
        /// The network interface whose number is the value; of `IP_MULTICAST_IF` the one that was given besides the address.
        optional string interface = 4;
    }

    /// A multicast group that a socket has joined, and from whom: `MCAST_MSFILTER`.
    message RewakeMembershipEntry "rewake_membership_entry" {
        /// The network interface.
        required string interface = 1;
        /// Four or sixteen bytes.
        required bytes group = 2;
        /// All senders but those of the list, and not only those of the list.
        required bool exclude = 3;
        /// Addresses of senders.
        repeated bytes sources = 4;
    }

    /// A datagram in the receive queue of a UDP socket. Addresses are four or sixteen bytes.
    message RewakeDatagramEntry "rewake_datagram_entry" {
        required bytes data = 1;
        /// Who has sent it.
        required bytes source = 2;
        required uint32 source_port = 3;
        /// To which address, if the program asked to be told (`IP_PKTINFO`).
        optional bytes destination = 4;
    }

    /// Extra state of a unix socket: unix(7).
    message RewakeUnixEntry "rewake_unix_entry" {
        /// Where the file it is bound to is now, if that is not where its name leads.
        optional bytes path = 1;
        /// Of a listening socket: inode numbers of the clients that wait for accept(2), the first first.
        repeated uint32 waiting = 2;
        /// The address of a peer that is closed.
        optional bytes peer_name = 3;
        /// Its peer was closed before it had read everything: the next call fails with `ECONNRESET`.
        optional bool reset = 4;
        /// `SO_PEERCRED`: pid, uid and gid; absent if there are none.
        repeated uint32 peer_credentials = 5;
        /// What `SO_PEERCRED` will tell of it to who accepts its connection.
        repeated uint32 own_credentials = 6;
        /// Of a listening socket, if one of those that wait has sent something or is closed again: all of them, the first
        /// first.
        repeated message RewakeUnixConnectionEntry connections = 7;
    }

    /// A connection that waits to be accepted.
    message RewakeUnixConnectionEntry "rewake_unix_connection_entry" {
        /// Inode number of the client; 0: it is closed again.
        required uint32 client = 1;
        /// The id by which `sk-queues.img` has what it has sent.
        optional uint32 queue = 2;
        /// Of one that is closed: pid, uid and gid (`SO_PEERCRED`), and its address.
        repeated uint32 credentials = 3;
        optional bytes name = 4;
    }

    /// Extra state of a message in the receive queue of a unix socket.
    message RewakePacketEntry "rewake_packet_entry" {
        /// The file id of the receiving socket.
        required uint32 id_for = 1;
        /// Which of the socket's messages in `sk-queues.img` it is, from 0.
        required uint32 index = 2;
        /// `SCM_CREDENTIALS`: pid, uid and gid of the sender.
        repeated uint32 credentials = 3;
        /// The address of the sender of a datagram.
        optional bytes sender = 4;
        /// The byte is out of band (`MSG_OOB`).
        optional bool oob = 5;
    }
}
