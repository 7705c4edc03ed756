//! Unix, netlink and packet sockets, socket options, and queued packets.

use super::{
    FownEntry,
    declare::{enums, messages},
};

enums! {
    /// Which directions of a socket are shut down: shutdown(2).
    enum SkShutdown "sk_shutdown" {
        None "NONE" = 0;
        Read "READ" = 1;
        Write "WRITE" = 2;
        Both "BOTH" = 3;
    }
}

messages! {
    /// Socket options: socket(7).
    message SkOptsEntry "sk_opts_entry" {
        /// As getsockopt(2) says: twice what was set.
        required uint32 so_sndbuf = 1;
        required uint32 so_rcvbuf = 2;
        required uint64 so_snd_tmo_sec = 3;
        required uint64 so_snd_tmo_usec = 4;
        required uint64 so_rcv_tmo_sec = 5;
        required uint64 so_rcv_tmo_usec = 6;
        optional bool reuseaddr = 7;
        optional uint32 so_priority = 8;
        optional uint32 so_rcvlowat = 9;
        /// Present only if not zero.
        optional uint32 so_mark = 10;
        /// Only of unix and netlink sockets.
        optional bool so_passcred = 11;
        /// Only of unix and netlink sockets.
        optional bool so_passsec = 12;
        optional bool so_dontroute = 13;
        optional bool so_no_check = 14;
        /// The name given to `SO_BINDTODEVICE`.
        optional string so_bound_dev = 15;
        /// Classic BPF, an element an instruction: `code << 48 | jt << 40 | jf << 32 | k`.
        repeated fixed64 so_filter = 16;
        optional bool so_reuseport = 17;
        optional bool so_broadcast = 18;
        optional bool so_keepalive = 19;
        /// Old; not written.
        optional uint32 tcp_keepcnt = 20;
        /// Old; not written.
        optional uint32 tcp_keepidle = 21;
        /// Old; not written.
        optional uint32 tcp_keepintvl = 22;
        optional uint32 so_oobinline = 23;
        /// Seconds; absent if off.
        optional uint32 so_linger = 24;
        /// `SOCK_SNDBUF_LOCK` (1) and `SOCK_RCVBUF_LOCK` (2).
        optional uint32 so_buf_lock = 25;
    }

    /// A unix socket: unix(7).
    message UnixSkEntry "unix_sk_entry" {
        required uint32 id = 1;
        /// Inode number.
        required uint32 ino = 2;
        /// `SOCK_*`
        required uint32 r#type = 3 [dict = "sk"];
        /// `TCP_ESTABLISHED` (1), `TCP_CLOSE` (7) or `TCP_LISTEN` (10).
        required uint32 state = 4 [dict = "sk"];
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 5 [hex];
        /// 1: external; 2: connected to the CRIU service; 4: handled by a plugin; 8: inherited.
        required uint32 uflags = 6 [hex];
        /// Of a listening socket.
        required uint32 backlog = 7;
        /// Inode number of the peer; of a connection not accepted yet, of the listening socket. 0: none.
        required uint32 peer = 8;
        required message FownEntry fown = 9;
        required message SkOptsEntry opts = 10;
        /// The address: a path with its final NUL, or an abstract name after a NUL. Empty: not bound.
        required bytes name = 11 [conv = "unix_name"];
        /// Present only if not zero.
        optional enum SkShutdown shutdown = 12;
        /// Only with a path.
        optional message FilePermsEntry file_perms = 13;
        /// Working directory at bind(2), if the path is relative.
        optional string name_dir = 14;
        /// Whether the path was unlinked.
        optional bool deleted = 15;
        optional uint32 ns_id = 16;
        /// Mount id, if the mount namespace is dumped.
        optional sint32 mnt_id = 17 [default = "-1"];
    }

    /// Mode and owner of a socket's inode.
    message FilePermsEntry "file_perms_entry" {
        required uint32 mode = 1;
        required uint32 uid = 2;
        required uint32 gid = 3;
    }

    /// A netlink socket: netlink(7).
    message NetlinkSkEntry "netlink_sk_entry" {
        required uint32 id = 1;
        /// Inode number.
        required uint32 ino = 2;
        required uint32 protocol = 3;
        /// `TCP_ESTABLISHED` (1) or `TCP_CLOSE` (7).
        required uint32 state = 4;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 6 [hex];
        required uint32 portid = 7;
        /// A bitmap of at most one word.
        repeated uint32 groups = 8;
        required uint32 dst_portid = 9;
        required uint32 dst_group = 10;
        required message FownEntry fown = 11;
        required message SkOptsEntry opts = 12;
        optional uint32 ns_id = 13;
    }

    /// A packet socket: packet(7).
    message PacketSockEntry "packet_sock_entry" {
        required uint32 id = 1;
        required uint32 r#type = 2;
        /// In network order.
        required uint32 protocol = 3;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 4 [hex];
        required uint32 ifindex = 5;
        required message FownEntry fown = 6;
        required message SkOptsEntry opts = 7;
        required uint32 version = 8;
        required uint32 reserve = 9;
        required bool aux_data = 10;
        required bool orig_dev = 11;
        required bool vnet_hdr = 12;
        required bool loss = 13;
        required uint32 timestamp = 14;
        required uint32 copy_thresh = 15;
        repeated message PacketMclist mclist = 16;
        /// `PACKET_FANOUT`
        optional uint32 fanout = 17 [default = "4294967295"];
        optional message PacketRing rx_ring = 18;
        optional message PacketRing tx_ring = 19;
        optional uint32 ns_id = 20;
    }

    /// A multicast membership: `PACKET_ADD_MEMBERSHIP`.
    message PacketMclist "packet_mclist" {
        required uint32 index = 1;
        required uint32 r#type = 2;
        required bytes addr = 3;
    }

    /// The geometry of a packet ring: `struct tpacket_req3`.
    message PacketRing "packet_ring" {
        required uint32 block_size = 1;
        required uint32 block_nr = 2;
        required uint32 frame_size = 3;
        required uint32 frame_nr = 4;
        required uint32 retire_tmo = 5;
        required uint32 sizeof_priv = 6;
        required uint32 features = 7;
    }

    /// A packet in a socket's receive queue; its bytes follow the message.
    message SkPacketEntry "sk_packet_entry" {
        /// The file id of the receiving socket.
        required uint32 id_for = 1;
        /// How many bytes follow.
        required uint32 length = 2;
        /// At most one.
        repeated message ScmEntry scm = 4;
    }

    /// A control message: `SCM_RIGHTS`.
    message ScmEntry "scm_entry" {
        /// `SCM_RIGHTS` (1).
        required uint32 r#type = 1;
        /// Ids of [`FileEntry`](super::FileEntry)s.
        repeated uint32 rights = 2;
    }
}
