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
        /// Value as reported (kernel-doubled).
        required uint32 so_sndbuf = 1;
        required uint32 so_rcvbuf = 2;
        /// Timeouts.
        required uint64 so_snd_tmo_sec = 3;
        required uint64 so_snd_tmo_usec = 4;
        required uint64 so_rcv_tmo_sec = 5;
        required uint64 so_rcv_tmo_usec = 6;
        optional bool reuseaddr = 7;
        optional uint32 so_priority = 8;
        optional uint32 so_rcvlowat = 9;
        /// Present only if not zero.
        optional uint32 so_mark = 10;
        /// unix/netlink only.
        optional bool so_passcred = 11;
        /// unix/netlink only.
        optional bool so_passsec = 12;
        optional bool so_dontroute = 13;
        optional bool so_no_check = 14;
        /// SO_BINDTODEVICE name.
        optional string so_bound_dev = 15;
        /// Classic BPF instructions, one fixed64 each: code<<48 | jt<<40 | jf<<32 | k.
        repeated fixed64 so_filter = 16;
        optional bool so_reuseport = 17;
        optional bool so_broadcast = 18;
        optional bool so_keepalive = 19;
        /// Deprecated; not written.
        optional uint32 tcp_keepcnt = 20;
        /// Deprecated; not written.
        optional uint32 tcp_keepidle = 21;
        /// Deprecated; not written.
        optional uint32 tcp_keepintvl = 22;
        /// 0/1.
        optional uint32 so_oobinline = 23;
        /// Seconds, only if enabled.
        optional uint32 so_linger = 24;
        /// SO_BUF_LOCK mask 1 snd 2 rcv.
        optional uint32 so_buf_lock = 25;
    }

    /// A unix socket: unix(7).
    message UnixSkEntry "unix_sk_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// Socket inode.
        required uint32 ino = 2;
        /// SOCK_* 1,2,5.
        required uint32 r#type = 3 [dict = "sk"];
        /// 1 established, 7 close/unconnected, 10 listen.
        required uint32 state = 4 [dict = "sk"];
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 5 [hex];
        /// 1 external, 2 connected to criu service, 4 plugin callback, 8 inherit-fd.
        required uint32 uflags = 6 [hex];
        /// Listen backlog; for others write-queue length (informational).
        required uint32 backlog = 7;
        /// Inode of peer, 0 none; for in-flight (not accepted) socket: inode of the listener.
        required uint32 peer = 8;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 9;
        required message SkOptsEntry opts = 10;
        /// Address bytes: empty = unbound; first byte 0 = abstract; path with trailing NUL as kernel reports.
        required bytes name = 11 [conv = "unix_name"];
        /// Present only if not zero.
        optional enum SkShutdown shutdown = 12;
        /// Only for path names.
        optional message FilePermsEntry file_perms = 13;
        /// Directory prefix for relative names.
        optional string name_dir = 14;
        /// Path was unlinked.
        optional bool deleted = 15;
        /// Id of the network namespace.
        optional uint32 ns_id = 16;
        /// Mount of the socket inode (if mnt ns dumped).
        optional sint32 mnt_id = 17 [default = "-1"];
    }

    /// Mode and owner of a socket's inode.
    message FilePermsEntry "file_perms_entry" {
        /// st_mode of socket inode.
        required uint32 mode = 1;
        required uint32 uid = 2;
        required uint32 gid = 3;
    }

    /// A netlink socket: netlink(7).
    message NetlinkSkEntry "netlink_sk_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// Inode number.
        required uint32 ino = 2;
        /// NETLINK_*.
        required uint32 protocol = 3;
        /// 1 connected / 7 close.
        required uint32 state = 4;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 6 [hex];
        /// Bound port id.
        required uint32 portid = 7;
        /// Bitmap words, at most 1.
        repeated uint32 groups = 8;
        /// Connected peer.
        required uint32 dst_portid = 9;
        /// Group number.
        required uint32 dst_group = 10;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 11;
        required message SkOptsEntry opts = 12;
        /// Id of the network namespace.
        optional uint32 ns_id = 13;
    }

    /// A packet socket: packet(7).
    message PacketSockEntry "packet_sock_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// SOCK_*.
        required uint32 r#type = 2;
        /// Ethertype, network order value as kernel reports.
        required uint32 protocol = 3;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 4 [hex];
        /// Bound interface.
        required uint32 ifindex = 5;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 6;
        required message SkOptsEntry opts = 7;
        /// PACKET_VERSION.
        required uint32 version = 8;
        /// PACKET_RESERVE.
        required uint32 reserve = 9;
        /// PACKET_AUXDATA.
        required bool aux_data = 10;
        /// PACKET_ORIGDEV.
        required bool orig_dev = 11;
        /// PACKET_VNET_HDR.
        required bool vnet_hdr = 12;
        /// PACKET_LOSS.
        required bool loss = 13;
        /// PACKET_TIMESTAMP.
        required uint32 timestamp = 14;
        /// PACKET_COPY_THRESH.
        required uint32 copy_thresh = 15;
        /// Memberships.
        repeated message PacketMclist mclist = 16;
        /// PACKET_FANOUT value; absent = none.
        optional uint32 fanout = 17 [default = "4294967295"];
        /// Ring geometry.
        optional message PacketRing rx_ring = 18;
        /// Ring geometry.
        optional message PacketRing tx_ring = 19;
        /// Id of the network namespace.
        optional uint32 ns_id = 20;
    }

    /// A multicast membership: `PACKET_ADD_MEMBERSHIP`.
    message PacketMclist "packet_mclist" {
        /// Ifindex.
        required uint32 index = 1;
        /// PACKET_MR_*.
        required uint32 r#type = 2;
        /// Link address.
        required bytes addr = 3;
    }

    /// The geometry of a packet ring: `struct tpacket_req3`.
    message PacketRing "packet_ring" {
        /// tpacket_req3 fields.
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
        /// File id of the socket whose receive queue holds it.
        required uint32 id_for = 1;
        /// Payload bytes following record.
        required uint32 length = 2;
        /// At most one.
        repeated message ScmEntry scm = 4;
    }

    /// A control message: `SCM_RIGHTS`.
    message ScmEntry "scm_entry" {
        /// 1 = SCM_RIGHTS (only one supported).
        required uint32 r#type = 1;
        /// File ids.
        repeated uint32 rights = 2;
    }
}
