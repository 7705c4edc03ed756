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
        /// Old int list.
        repeated int32 def_conf = 1;
        /// Old form; not written.
        repeated int32 all_conf = 2;
        /// net/ipv4/conf/default.
        repeated message SysctlEntry def_conf4 = 3;
        /// .../all.
        repeated message SysctlEntry all_conf4 = 4;
        /// ipv6 default.
        repeated message SysctlEntry def_conf6 = 5;
        /// ipv6 all.
        repeated message SysctlEntry all_conf6 = 6;
        /// Netns ids.
        repeated message NetnsId nsids = 7;
        /// External ns: only this field set.
        optional string ext_key = 8;
        /// `[max_dgram_qlen]`.
        repeated message SysctlEntry unix_conf = 9;
        /// `[ping_group_range]`.
        repeated message SysctlEntry ipv4_sysctl = 10;
    }

    /// The id by which a network namespace knows another.
    message NetnsId "netns_id" {
        /// Criu ns id.
        required uint32 target_ns_id = 1;
        /// Nsid seen from this ns.
        required int32 netnsid_value = 2;
    }

    /// A network device: `netdev-ID.img`.
    message NetDeviceEntry "net_device_entry" {
        required enum NdType r#type = 1;
        /// Index to reproduce.
        required uint32 ifindex = 2;
        required uint32 mtu = 3;
        /// IFF_*.
        required uint32 flags = 4 [hex];
        required string name = 5;
        /// For TUN.
        optional message TunLinkEntry tun = 6;
        /// Link address.
        optional bytes address = 7;
        /// Old form of conf4 (int list).
        repeated int32 conf = 8;
        /// net/ipv4/conf/DEV/*: positional, order listed below; repeated tail entries missing are skipped.
        repeated message SysctlEntry conf4 = 9;
        /// net/ipv6/conf/DEV/*.
        repeated message SysctlEntry conf6 = 10;
        /// For MACVLAN.
        optional message MacvlanLinkEntry macvlan = 11;
        /// Veth: peer index; (loopback: own).
        optional uint32 peer_ifindex = 12;
        /// Veth: criu ns id of the peer's net ns (or nsid).
        optional uint32 peer_nsid = 13;
        /// Ifindex of bridge.
        optional uint32 master = 14;
        /// For SIT.
        optional message SitEntry sit = 15;
    }

    /// A sysctl's value.
    message SysctlEntry "sysctl_entry" {
        required enum SysctlType r#type = 1;
        /// Value for CTL_32.
        optional int32 iarg = 2;
        /// Value for CTL_STR (absent: unreadable).
        optional string sarg = 3;
    }

    /// An open `/dev/net/tun`. A [`RegFileEntry`](super::RegFileEntry) with the same id goes with it.
    message TunfileEntry "tunfile_entry" {
        /// File id, unique across all types in files.img (a REG entry with the same id also exists).
        required uint32 id = 1;
        /// Attached device; absent = not attached.
        optional string netdev = 2;
        /// Queue detached.
        optional bool detached = 3;
        /// Id of the network namespace.
        optional uint32 ns_id = 4;
    }

    /// A TUN or TAP device.
    message TunLinkEntry "tun_link_entry" {
        /// IFF_TUN/TAP.. from sysfs tun_flags.
        required uint32 flags = 1 [hex];
        /// -1 none.
        required int32 owner = 2;
        /// -1 none.
        required int32 group = 3;
        /// Header size.
        required uint32 vnethdr = 4;
        /// TUNSETSNDBUF.
        required uint32 sndbuf = 5;
    }

    /// A macvlan device.
    message MacvlanLinkEntry "macvlan_link_entry" {
        /// IFLA_MACVLAN_MODE.
        required uint32 mode = 1;
        /// IFLA_MACVLAN_FLAGS.
        optional uint32 flags = 2;
    }

    /// An IPv6-in-IPv4 tunnel.
    message SitEntry "sit_entry" {
        /// IFLA_IPTUN_*.
        optional uint32 link = 1;
        /// Addr words.
        repeated uint32 local = 2 [ip];
        /// Addr words.
        repeated uint32 remote = 3 [ip];
        /// IFLA_IPTUN_TTL.
        optional uint32 ttl = 4;
        /// IFLA_IPTUN_TOS.
        optional uint32 tos = 5;
        /// IFLA_IPTUN_PMTUDISC.
        optional bool pmtudisc = 6;
        /// IFLA_IPTUN_PROTO.
        optional uint32 proto = 7;
        /// IFLA_IPTUN_FLAGS.
        optional uint32 flags = 8;
        /// IFLA_IPTUN_ENCAP_TYPE.
        optional uint32 encap_type = 9;
        /// IFLA_IPTUN_ENCAP_FLAGS.
        optional uint32 encap_flags = 10;
        /// IFLA_IPTUN_ENCAP_SPORT.
        optional uint32 encap_sport = 11;
        /// IFLA_IPTUN_ENCAP_DPORT.
        optional uint32 encap_dport = 12;
        /// 6rd.
        optional uint32 rd_prefixlen = 13;
        /// 6rd.
        repeated uint32 rd_prefix = 14 [ip];
        /// 6rd.
        optional uint32 relay_prefixlen = 15;
        /// 6rd.
        repeated uint32 relay_prefix = 16 [ip];
    }
}
