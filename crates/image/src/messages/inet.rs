//! Internet sockets and TCP connections.

use super::{FownEntry, SkOptsEntry, SkShutdown, declare::messages};

messages! {
    /// A TCP, UDP, UDP-Lite, ICMP or raw socket. Ports are in host order.
    message InetSkEntry "inet_sk_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// N (hex) of tcp-stream-N.img.
        required uint32 ino = 2;
        /// 2 or 10.
        required uint32 family = 3 [dict = "sk"];
        /// 1,2,3.
        required uint32 r#type = 4 [dict = "sk"];
        /// 0,1,6,17,58,136 ; for RAW any.
        required uint32 proto = 5 [dict = "sk"];
        /// TCP state number (1 EST,2 SYN_SENT,4 FIN1,5 FIN2,7 CLOSE,8 CLOSE_WAIT,9 LAST_ACK,10 LISTEN,11 CLOSING).
        required uint32 state = 6 [dict = "sk"];
        /// Host order.
        required uint32 src_port = 7;
        /// 0 = unconnected.
        required uint32 dst_port = 8;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 9 [hex];
        /// Listen backlog.
        required uint32 backlog = 10;
        /// 1 or 4 words, memory image of network-order address (LE word).
        repeated uint32 src_addr = 11 [ip];
        repeated uint32 dst_addr = 12 [ip];
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 13;
        /// Generic options.
        required message SkOptsEntry opts = 14;
        /// IPv6 only.
        optional bool v6only = 15;
        /// Always present (may be empty).
        optional message IpOptsEntry ip_opts = 16;
        /// Scope interface for link-local binds.
        optional string ifname = 17;
        /// Id of the network namespace.
        optional uint32 ns_id = 18;
        /// UDP and unconnected TCP.
        optional enum SkShutdown shutdown = 19;
        /// Always present (may be empty).
        optional message TcpOptsEntry tcp_opts = 20;
    }

    /// Options of ip(7) and ipv6(7).
    message IpOptsEntry "ip_opts_entry" {
        /// IP_FREEBIND / IPV6_FREEBIND; written only if set.
        optional bool freebind = 1;
        /// Only SOCK_RAW.
        optional message IpOptsRawEntry raw = 4;
        /// Present only if set.
        optional bool pktinfo = 5;
        /// Present only if not zero.
        optional uint32 tos = 6;
        /// IPv4, only if nonzero.
        optional uint32 ttl = 7;
    }

    /// Options of raw(7) sockets.
    message IpOptsRawEntry "ip_opts_raw_entry" {
        /// IP_HDRINCL.
        optional bool hdrincl = 1;
        /// IP_NODEFRAG.
        optional bool nodefrag = 2;
        /// Unused.
        optional bool checksum = 3;
        /// ICMP_FILTER (1 word) / ICMPV6_FILTER (8 words).
        repeated uint32 icmpv_filter = 4;
    }

    /// Options of tcp(7).
    message TcpOptsEntry "tcp_opts_entry" {
        /// TCP_CORK, only if set.
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
        /// Bytes of receive queue payload (first in payload).
        required uint32 inq_len = 1;
        /// TCP_QUEUE_SEQ of recv queue (next expected; includes FIN position).
        required uint32 inq_seq = 2;
        /// Bytes of send queue payload (second), sent+unsent.
        required uint32 outq_len = 3;
        /// Write seq end.
        required uint32 outq_seq = 4;
        /// TIMESTAMPS1 SACK2 WSCALE4.
        required uint32 opt_mask = 5 [hex];
        required uint32 snd_wscale = 6;
        required uint32 mss_clamp = 7;
        /// Required if WSCALE bit.
        optional uint32 rcv_wscale = 8;
        /// TCP_TIMESTAMP, required if TIMESTAMPS bit.
        optional uint32 timestamp = 9;
        /// Deprecated; not written.
        optional bool cork = 10;
        /// Deprecated; not written.
        optional bool nodelay = 11;
        /// Unsent part at tail of out queue; required at restore.
        optional uint32 unsq_len = 12;
        /// TCP_REPAIR_WINDOW fields.
        optional uint32 snd_wl1 = 13;
        /// Presence of this triggers window restore.
        optional uint32 snd_wnd = 14;
        optional uint32 max_window = 15;
        optional uint32 rcv_wnd = 16;
        optional uint32 rcv_wup = 17;
    }
}
