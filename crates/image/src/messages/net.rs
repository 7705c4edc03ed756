//! Network namespaces and devices.

use super::declare::{enums, messages};

enums! {
    /// Kinds of network devices.
    enum NdType "nd_type" {
        Loopback "LOOPBACK" = 1;
        Veth "VETH" = 2;
        Tun "TUN" = 3;
        Extlink "EXTLINK" = 4;
        Venet "VENET" = 5;
        Bridge "BRIDGE" = 6;
        Macvlan "MACVLAN" = 7;
        Sit "SIT" = 8;
    }

    /// Types of sysctl values.
    enum SysctlType "SysctlType" {
        CtlStr "CTL_STR" = 5;
        Ctl32 "CTL_32" = 6;
    }
}

messages! {
    /// A network namespace: `netns-ID.img`. The order of sysctls is fixed; one without a value could not be read.
    message NetnsEntry "netns_entry" {
        /// Old; not written.
        repeated int32 def_conf = 1;
        /// Old form; not written.
        repeated int32 all_conf = 2;
        /// net.ipv4.conf.default.*
        repeated message SysctlEntry def_conf4 = 3;
        /// net.ipv4.conf.all.*
        repeated message SysctlEntry all_conf4 = 4;
        /// net.ipv6.conf.default.*
        repeated message SysctlEntry def_conf6 = 5;
        /// net.ipv6.conf.all.*
        repeated message SysctlEntry all_conf6 = 6;
        repeated message NetnsId nsids = 7;
        /// The key of an external namespace; nothing else is then present.
        optional string ext_key = 8;
        /// net.unix.max_dgram_qlen
        repeated message SysctlEntry unix_conf = 9;
        /// net.ipv4.ping_group_range
        repeated message SysctlEntry ipv4_sysctl = 10;
    }

    /// The id by which a network namespace knows another.
    message NetnsId "netns_id" {
        /// Id of the namespace in the images.
        required uint32 target_ns_id = 1;
        /// Id by which this namespace knows it.
        required int32 netnsid_value = 2;
    }

    /// A network device: `netdev-ID.img`.
    message NetDeviceEntry "net_device_entry" {
        required enum NdType r#type = 1;
        required uint32 ifindex = 2;
        required uint32 mtu = 3;
        required uint32 flags = 4 [hex];
        required string name = 5;
        /// Of [`NdType::Tun`].
        optional message TunLinkEntry tun = 6;
        optional bytes address = 7;
        /// Old form of `conf4`; not written.
        repeated int32 conf = 8;
        /// net.ipv4.conf.DEVICE.*
        repeated message SysctlEntry conf4 = 9;
        /// net.ipv6.conf.DEVICE.*
        repeated message SysctlEntry conf6 = 10;
        /// Of [`NdType::Macvlan`].
        optional message MacvlanLinkEntry macvlan = 11;
        /// Of a veth device.
        optional uint32 peer_ifindex = 12;
        /// Of a veth device: the id, in the images, of the namespace its peer is in.
        optional uint32 peer_nsid = 13;
        /// Index of the bridge.
        optional uint32 master = 14;
        /// Of [`NdType::Sit`].
        optional message SitEntry sit = 15;
    }

    /// A sysctl's value.
    message SysctlEntry "sysctl_entry" {
        required enum SysctlType r#type = 1;
        optional int32 iarg = 2;
        optional string sarg = 3;
    }

    /// An open `/dev/net/tun`. A [`RegFileEntry`](super::RegFileEntry) with the same id goes with it.
    message TunfileEntry "tunfile_entry" {
        /// Unique over all kinds of files but [`RegFileEntry`](super::RegFileEntry).
        required uint32 id = 1;
        /// The device it is attached to, if it is.
        optional string netdev = 2;
        /// Whether the queue is detached.
        optional bool detached = 3;
        optional uint32 ns_id = 4;
    }

    /// A TUN or TAP device.
    message TunLinkEntry "tun_link_entry" {
        /// `IFF_TUN` and such.
        required uint32 flags = 1 [hex];
        /// -1: none.
        required int32 owner = 2;
        /// -1: none.
        required int32 group = 3;
        required uint32 vnethdr = 4;
        required uint32 sndbuf = 5;
    }

    /// A macvlan device.
    message MacvlanLinkEntry "macvlan_link_entry" {
        required uint32 mode = 1;
        optional uint32 flags = 2;
    }

    /// An IPv6-in-IPv4 tunnel.
    message SitEntry "sit_entry" {
        /// `IFLA_IPTUN_LINK`, and so on for the following ones.
        optional uint32 link = 1;
        repeated uint32 local = 2 [ip];
        repeated uint32 remote = 3 [ip];
        optional uint32 ttl = 4;
        optional uint32 tos = 5;
        optional bool pmtudisc = 6;
        optional uint32 proto = 7;
        optional uint32 flags = 8;
        optional uint32 encap_type = 9;
        optional uint32 encap_flags = 10;
        optional uint32 encap_sport = 11;
        optional uint32 encap_dport = 12;
        optional uint32 rd_prefixlen = 13;
        repeated uint32 rd_prefix = 14 [ip];
        optional uint32 relay_prefixlen = 15;
        repeated uint32 relay_prefix = 16 [ip];
    }
}
