//! System V IPC: `ipcns-{var,shm,msg,sem}-ID.img`.

use super::declare::messages;

messages! {
    /// The sysctls of an IPC namespace.
    message IpcVarEntry "ipc_var_entry" {
        /// The four numbers of kernel.sem.
        repeated uint32 sem_ctls = 1;
        /// kernel.msgmax
        required uint32 msg_ctlmax = 2;
        /// kernel.msgmnb
        required uint32 msg_ctlmnb = 3;
        /// kernel.msgmni
        required uint32 msg_ctlmni = 4;
        required uint32 auto_msgmni = 5;
        /// kernel.shmmax
        required uint64 shm_ctlmax = 6;
        /// kernel.shmall
        required uint64 shm_ctlall = 7;
        /// kernel.shmmni
        required uint32 shm_ctlmni = 8;
        required uint32 shm_rmid_forced = 9;
        /// fs.mqueue.*, as the following ones.
        required uint32 mq_queues_max = 10;
        required uint32 mq_msg_max = 11;
        required uint32 mq_msgsize_max = 12;
        optional uint32 mq_msg_default = 13;
        optional uint32 mq_msgsize_default = 14;
        /// Present only if set.
        optional uint32 msg_next_id = 15;
        optional uint32 sem_next_id = 16;
        optional uint32 shm_next_id = 17;
    }

    /// Identity, owner and mode of an IPC object.
    message IpcDescEntry "ipc_desc_entry" {
        required uint32 key = 1;
        required uint32 uid = 2;
        required uint32 gid = 3;
        required uint32 cuid = 4;
        required uint32 cgid = 5;
        required uint32 mode = 6;
        /// The IPC id.
        required uint32 id = 7;
    }

    /// A shared memory segment: shmget(2).
    message IpcShmEntry "ipc_shm_entry" {
        required message IpcDescEntry desc = 1;
        required uint64 size = 2;
        /// Whether the content is in `pagemap-shmem-ID.img`, by IPC id. Otherwise it follows, rounded up to four
        /// bytes.
        optional bool in_pagemaps = 3;
        /// `SHM_HUGETLB` and `SHM_HUGE_*`
        optional uint32 hugetlb_flag = 4;
    }

    /// A message queue: msgget(2). Its messages follow.
    message IpcMsgEntry "ipc_msg_entry" {
        required message IpcDescEntry desc = 1;
        /// msgctl(2), `msg_qbytes`.
        required uint32 qbytes = 2;
        /// How many messages follow.
        required uint32 qnum = 3;
    }

    /// A message in a queue; its text follows.
    message IpcMsg "ipc_msg" {
        required uint64 mtype = 1;
        /// Length of the text, which is padded to a multiple of eight bytes.
        required uint32 msize = 2;
    }

    /// A semaphore set: semget(2). Its values follow.
    message IpcSemEntry "ipc_sem_entry" {
        required message IpcDescEntry desc = 1;
        required uint32 nsems = 2;
    }
}
