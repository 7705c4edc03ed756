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
        /// Id of a [`RegFileEntry`].
        required uint32 cwd_id = 1;
        /// Id of a [`RegFileEntry`].
        required uint32 root_id = 2;
        optional uint32 umask = 3;
    }

    /// A file descriptor.
    message FdinfoEntry "fdinfo_entry" {
        /// Id of a [`FileEntry`].
        required uint32 id = 1;
        /// `FD_CLOEXEC` (1) or 0.
        required uint32 flags = 2;
        required enum FdTypes r#type = 3;
        required uint32 fd = 4;
        /// SELinux label of a socket.
        optional string xattr_security_selinux = 5;
    }

    /// A file description, of whichever kind `type` says. Ids are unique over all kinds.
    message FileEntry "file_entry" {
        /// Which of the messages is present.
        required enum FdTypes r#type = 1;
        /// The same as in that message.
        required uint32 id = 2;
        optional boxed RegFileEntry reg = 3;
        optional boxed InetSkEntry isk = 4;
        optional boxed NsFileEntry nsf = 5;
        optional boxed PacketSockEntry psk = 6;
        optional boxed NetlinkSkEntry nlsk = 7;
        optional boxed EventfdFileEntry efd = 8;
        optional boxed EventpollFileEntry epfd = 9;
        optional boxed SignalfdEntry sgfd = 10;
        optional boxed TunfileEntry tunf = 11;
        optional boxed TimerfdEntry tfd = 12;
        optional boxed InotifyFileEntry ify = 13;
        optional boxed FanotifyFileEntry ffy = 14;
        optional boxed ExtFileEntry ext = 15;
        optional boxed UnixSkEntry usk = 16;
        optional boxed FifoEntry fifo = 17;
        optional boxed PipeEntry pipe = 18;
        optional boxed TtyFileEntry tty = 19;
        optional boxed MemfdFileEntry memfd = 20;
        optional boxed BpfmapFileEntry bpf = 21;
        optional boxed PidfdEntry pidfd = 22;
    }

    /// Who is signalled of asynchronous I/O: fcntl(2), `F_SETOWN_EX`.
    message FownEntry "fown_entry" {
        required uint32 uid = 1;
        required uint32 euid = 2;
        /// fcntl(2), `F_GETSIG`.
        required uint32 signum = 3;
        /// `F_OWNER_*`
        required uint32 pid_type = 4;
        /// 0 if there is no owner.
        required uint32 pid = 5;
    }

    /// A file with a path: regular, directory or device.
    message RegFileEntry "reg_file_entry" {
        required uint32 id = 1;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 2 [flags = "rfile.flags"];
        required uint64 pos = 3;
        required message FownEntry fown = 5;
        /// The path from the root of the mount namespace, or the key of an external file.
        required string name = 6;
        /// Mount id, if the mount namespace is dumped.
        optional sint32 mnt_id = 7 [default = "-1"];
        /// Size of a regular file, which must be the same at the restore. Absent for one opened to append only.
        optional uint64 size = 8;
        /// Whether it is external; `name` is then the key.
        optional bool ext = 9;
        /// `st_mode`, which must be the same at the restore.
        optional uint32 mode = 10;
        /// ELF build id, four bytes an element, the first lowest.
        repeated uint32 build_id = 11;
        /// Reserved; not written.
        optional uint32 checksum = 12;
        /// Reserved; not written.
        optional uint32 checksum_config = 13;
        /// Reserved; not written.
        optional uint32 checksum_parameter = 14;
    }

    /// A file that a plugin handles.
    message ExtFileEntry "ext_file_entry" {
        /// By which the plugin knows it.
        required uint32 id = 1;
        required message FownEntry fown = 5;
    }

    /// An open `/proc/PID/ns/*`.
    message NsFileEntry "ns_file_entry" {
        required uint32 id = 1;
        required uint32 ns_id = 2;
        required uint32 ns_cflag = 3;
        /// Status flags, as in /proc/PID/fdinfo, without `O_CLOEXEC`.
        required uint32 flags = 4;
    }

    /// A file lock or lease: `filelocks.img`.
    message FileLockEntry "file_lock_entry" {
        /// 1: POSIX; 2: flock(2); 4: open file description; 8: lease.
        required uint32 flag = 1;
        /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`, with the flags of /proc/locks.
        required uint32 r#type = 2;
        /// The owner's pid.
        required int32 pid = 3;
        /// A descriptor of the owner.
        required int32 fd = 4;
        required int64 start = 5;
        /// 0: to the end of the file.
        required int64 len = 6;
    }
}
