//! Internet sockets and TCP connections.

use super::{FownEntry, SkOptsEntry, SkShutdown, declare::messages};

messages! {
    /// A TCP, UDP, UDP-Lite, ICMP or raw socket. Ports are in host order.
    message InetSkEntry "inet_sk_entry" {
        required uint32 id = 1;
        /// Inode number; in hexadecimal, the one in the name of `tcp-stream-HEX.img`.
        required uint32 ino = 2;
        /// `AF_INET` (2) or `AF_INET6` (10).
        required uint32 family = 3 [dict = "sk"];
        /// `SOCK_*`
        required uint32 r#type = 4 [dict = "sk"];
        /// `IPPROTO_*`
        required uint32 proto = 5 [dict = "sk"];
        /// `TCP_*`, of UDP sockets too.
        required uint32 state = 6 [dict = "sk"];
        required uint32 src_port = 7;
        /// 0: not connected.
        required uint32 dst_port = 8;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 9 [hex];
        required uint32 backlog = 10;
        /// One or four words, each the bytes of the address in memory.
        repeated uint32 src_addr = 11 [ip];
        repeated uint32 dst_addr = 12 [ip];
        required message FownEntry fown = 13;
        required message SkOptsEntry opts = 14;
        optional bool v6only = 15;
        /// Always written.
        optional message IpOptsEntry ip_opts = 16;
        /// The interface a link-local address belongs to.
        optional string ifname = 17;
        optional uint32 ns_id = 18;
        /// Only of UDP and of TCP that is not connected.
        optional enum SkShutdown shutdown = 19;
        /// Always written.
        optional message TcpOptsEntry tcp_opts = 20;
    }

    /// Options of ip(7) and ipv6(7).
    message IpOptsEntry "ip_opts_entry" {
        /// Present only if set.
        optional bool freebind = 1;
        /// Only of `SOCK_RAW`.
        optional message IpOptsRawEntry raw = 4;
        /// Present only if set.
        optional bool pktinfo = 5;
        /// Present only if not zero.
        optional uint32 tos = 6;
        /// Of IPv4; present only if not zero.
        optional uint32 ttl = 7;
    }

    /// Options of raw(7) sockets.
    message IpOptsRawEntry "ip_opts_raw_entry" {
        optional bool hdrincl = 1;
        optional bool nodefrag = 2;
        /// Not used.
        optional bool checksum = 3;
        /// `ICMP_FILTER` (one word) or `ICMPV6_FILTER` (eight).
        repeated uint32 icmpv_filter = 4;
    }

    /// Options of tcp(7).
    message TcpOptsEntry "tcp_opts_entry" {
        /// Present only if set.
        optional bool cork = 1;
        /// Present only if set.
        optional bool nodelay = 2;
        /// Present only if not zero.
        optional uint32 keepcnt = 3;
        /// Seconds.
        optional uint32 keepidle = 4;
        /// Seconds.
        optional uint32 keepintvl = 5;
    }

    /// A TCP connection: `tcp-stream-HEX.img`. Its receive queue, then its send queue, follow the message.
    message TcpStreamEntry "tcp_stream_entry" {
        /// Bytes in the receive queue.
        required uint32 inq_len = 1;
        /// `TCP_QUEUE_SEQ` of the receive queue: what is expected next.
        required uint32 inq_seq = 2;
        /// Bytes in the send queue, sent or not.
        required uint32 outq_len = 3;
        /// `TCP_QUEUE_SEQ` of the send queue: what is written next.
        required uint32 outq_seq = 4;
        /// 1: timestamps; 2: SACK; 4: window scaling.
        required uint32 opt_mask = 5 [hex];
        required uint32 snd_wscale = 6;
        required uint32 mss_clamp = 7;
        /// Needed with window scaling.
        optional uint32 rcv_wscale = 8;
        /// `TCP_TIMESTAMP`; needed with timestamps.
        optional uint32 timestamp = 9;
        /// Old; not written.
        optional bool cork = 10;
        /// Old; not written.
        optional bool nodelay = 11;
        /// How much of the send queue, at its end, was not sent yet. Needed by a restore.
        optional uint32 unsq_len = 12;
        /// `struct tcp_repair_window`, as the following ones.
        optional uint32 snd_wl1 = 13;
        /// If this is present, so are all of them.
        optional uint32 snd_wnd = 14;
        optional uint32 max_window = 15;
        optional uint32 rcv_wnd = 16;
        optional uint32 rcv_wup = 17;
    }
}
