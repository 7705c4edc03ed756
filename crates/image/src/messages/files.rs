//! Descriptors and the file descriptions behind them: `fs-PID.img`, `fdinfo-ID.img`, `files.img`.

use super::{
    BpfmapFileEntry, EventfdFileEntry, EventpollFileEntry, FanotifyFileEntry, FifoEntry,
    InetSkEntry, InotifyFileEntry, MemfdFileEntry, NetlinkSkEntry, PacketSockEntry, PidfdEntry,
    PipeEntry, SignalfdEntry, TimerfdEntry, TtyFileEntry, TunfileEntry, UnixSkEntry,
    declare::{enums, messages},
};

enums! {
    /// Kinds of file descriptions.
    enum FdTypes "fd_types" {
        Und "UND" = 0;
        Reg "REG" = 1;
        Pipe "PIPE" = 2;
        Fifo "FIFO" = 3;
        Inetsk "INETSK" = 4;
        Unixsk "UNIXSK" = 5;
        Eventfd "EVENTFD" = 6;
        Eventpoll "EVENTPOLL" = 7;
        Inotify "INOTIFY" = 8;
        Signalfd "SIGNALFD" = 9;
        Packetsk "PACKETSK" = 10;
        Tty "TTY" = 11;
        Fanotify "FANOTIFY" = 12;
        Netlinksk "NETLINKSK" = 13;
        Ns "NS" = 14;
        Tunf "TUNF" = 15;
        Ext "EXT" = 16;
        Timerfd "TIMERFD" = 17;
        Memfd "MEMFD" = 18;
        Bpfmap "BPFMAP" = 19;
        Pidfd "PIDFD" = 20;
        CtlTty "CTL_TTY" = 65534;
        AutofsPipe "AUTOFS_PIPE" = 65535;
    }
}

messages! {
    /// Working directory, root and umask of a task: `fs-PID.img`.
    message FsEntry "fs_entry" {
        /// Id of a [`RegFileEntry`](super::RegFileEntry).
        required uint32 cwd_id = 1;
        /// Id of a [`RegFileEntry`](super::RegFileEntry).
        required uint32 root_id = 2;
        /// Octal value.
        optional uint32 umask = 3;
    }

    /// A file descriptor.
    message FdinfoEntry "fdinfo_entry" {
        /// Refers file_entry.id.
        required uint32 id = 1;
        /// Fd flags: 1 = FD_CLOEXEC.
        required uint32 flags = 2;
        required enum FdTypes r#type = 3;
        /// Number.
        required uint32 fd = 4;
        /// Label of unix/other socket fd (SELinux builds).
        optional string xattr_security_selinux = 5;
    }

    /// A file description, of whichever kind `type` says.
    message FileEntry "file_entry" {
        /// Selects the sub-message.
        required enum FdTypes r#type = 1;
        /// Equal to id inside sub-message.
        required uint32 id = 2;
        /// For type 1.
        optional boxed RegFileEntry reg = 3;
        /// For type 4.
        optional boxed InetSkEntry isk = 4;
        /// For type 14.
        optional boxed NsFileEntry nsf = 5;
        /// For type 10.
        optional boxed PacketSockEntry psk = 6;
        /// For type 13.
        optional boxed NetlinkSkEntry nlsk = 7;
        /// For type 6.
        optional boxed EventfdFileEntry efd = 8;
        /// For type 7.
        optional boxed EventpollFileEntry epfd = 9;
        /// For type 9.
        optional boxed SignalfdEntry sgfd = 10;
        /// For type 15.
        optional boxed TunfileEntry tunf = 11;
        /// For type 17.
        optional boxed TimerfdEntry tfd = 12;
        /// For type 8.
        optional boxed InotifyFileEntry ify = 13;
        /// For type 12.
        optional boxed FanotifyFileEntry ffy = 14;
        /// For type 16.
        optional boxed ExtFileEntry ext = 15;
        /// For type 5.
        optional boxed UnixSkEntry usk = 16;
        /// For type 3.
        optional boxed FifoEntry fifo = 17;
        /// For type 2.
        optional boxed PipeEntry pipe = 18;
        /// For type 11.
        optional boxed TtyFileEntry tty = 19;
        /// For type 18.
        optional boxed MemfdFileEntry memfd = 20;
        /// For type 19.
        optional boxed BpfmapFileEntry bpf = 21;
        /// For type 20.
        optional boxed PidfdEntry pidfd = 22;
    }

    /// Who is signalled of asynchronous I/O: fcntl(2), `F_SETOWN_EX`.
    message FownEntry "fown_entry" {
        required uint32 uid = 1;
        required uint32 euid = 2;
        /// F_GETSIG.
        required uint32 signum = 3;
        /// F_OWNER_TID0 PID1 PGRP2.
        required uint32 pid_type = 4;
        /// 0 = no owner.
        required uint32 pid = 5;
    }

    /// A file with a path: regular, directory or device.
    message RegFileEntry "reg_file_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [flags = "rfile.flags"];
        required uint64 pos = 3;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 5;
        /// Path from mount-namespace root, or external id `file`[..]``.
        required string name = 6;
        /// Mount id (only if mount ns is dumped); absent/-1 = host root.
        optional sint32 mnt_id = 7 [default = "-1"];
        /// st_size, checked at restore (only regular files, not for O_WRONLY|O_APPEND).
        optional uint64 size = 8;
        /// True: external, name is the inherit-fd key.
        optional bool ext = 9;
        /// st_mode, compared at restore unless skip-file-rwx-check.
        optional uint32 mode = 10;
        /// ELF build-id bytes packed LE into u32s, zero padded.
        repeated uint32 build_id = 11;
        /// Reserved (not written).
        optional uint32 checksum = 12;
        /// Reserved.
        optional uint32 checksum_config = 13;
        /// Reserved.
        optional uint32 checksum_parameter = 14;
    }

    /// A file that a plugin handles.
    message ExtFileEntry "ext_file_entry" {
        /// Plugin handles it by this id.
        required uint32 id = 1;
        /// Owner and signal of asynchronous I/O.
        required message FownEntry fown = 5;
    }

    /// An open `/proc/PID/ns/*`.
    message NsFileEntry "ns_file_entry" {
        /// Unique over all kinds of files in files.img.
        required uint32 id = 1;
        /// Id of the namespace.
        required uint32 ns_id = 2;
        /// CLONE_NEW*.
        required uint32 ns_cflag = 3;
        /// File status flags from /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 4;
    }

    /// A file lock or lease: `filelocks.img`.
    message FileLockEntry "file_lock_entry" {
        /// 1 POSIX, 2 FLOCK, 4 OFD, 8 LEASE.
        required uint32 flag = 1;
        /// 0 read,1 write,2 unlock; flock mandatory variants: LOCK_MAND32 | READ64/WRITE128; breaking lease: bit 4.
        required uint32 r#type = 2;
        /// in-ns owner pid.
        required int32 pid = 3;
        /// Fd in that task.
        required int32 fd = 4;
        required int64 start = 5;
        /// 0 = to EOF.
        required int64 len = 6;
    }
}
