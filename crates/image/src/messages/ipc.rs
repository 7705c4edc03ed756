//! System V IPC: `ipcns-{var,shm,msg,sem}-ID.img`.

use super::declare::messages;

messages! {
    /// The sysctls of an IPC namespace.
    message IpcVarEntry "ipc_var_entry" {
        /// 4 numbers of kernel/sem.
        repeated uint32 sem_ctls = 1;
        /// kernel/msgmax.
        required uint32 msg_ctlmax = 2;
        /// Msgmnb.
        required uint32 msg_ctlmnb = 3;
        /// Msgmni.
        required uint32 msg_ctlmni = 4;
        required uint32 auto_msgmni = 5;
        /// Shmmax.
        required uint64 shm_ctlmax = 6;
        /// Shmall.
        required uint64 shm_ctlall = 7;
        /// Shmmni.
        required uint32 shm_ctlmni = 8;
        required uint32 shm_rmid_forced = 9;
        /// fs/mqueue/*.
        required uint32 mq_queues_max = 10;
        required uint32 mq_msg_max = 11;
        required uint32 mq_msgsize_max = 12;
        optional uint32 mq_msg_default = 13;
        optional uint32 mq_msgsize_default = 14;
        /// Only if set (≥0).
        optional uint32 msg_next_id = 15;
        optional uint32 sem_next_id = 16;
        optional uint32 shm_next_id = 17;
    }

    /// Identity, owner and mode of an IPC object.
    message IpcDescEntry "ipc_desc_entry" {
        /// IPC key.
        required uint32 key = 1;
        required uint32 uid = 2;
        required uint32 gid = 3;
        /// Creator.
        required uint32 cuid = 4;
        /// Creator.
        required uint32 cgid = 5;
        /// 9 mode bits.
        required uint32 mode = 6;
        /// IPC id to reproduce (via *_next_id sysctl).
        required uint32 id = 7;
    }

    /// A shared memory segment: shmget(2).
    message IpcShmEntry "ipc_shm_entry" {
        required message IpcDescEntry desc = 1;
        required uint64 size = 2;
        /// True: data in pagemap-shmem-IPC_ID; false/absent: raw payload rounded to 4 follows.
        optional bool in_pagemaps = 3;
        /// SHM_HUGETLB | size bits.
        optional uint32 hugetlb_flag = 4;
    }

    /// A message queue: msgget(2). Its messages follow.
    message IpcMsgEntry "ipc_msg_entry" {
        required message IpcDescEntry desc = 1;
        /// Limit.
        required uint32 qbytes = 2;
        /// Number of messages that follow.
        required uint32 qnum = 3;
    }

    /// A message in a queue; its text follows.
    message IpcMsg "ipc_msg" {
        /// Type.
        required uint64 mtype = 1;
        /// Bytes; payload padded to 8.
        required uint32 msize = 2;
    }

    /// A semaphore set: semget(2). Its values follow.
    message IpcSemEntry "ipc_sem_entry" {
        required message IpcDescEntry desc = 1;
        required uint32 nsems = 2;
    }
}
