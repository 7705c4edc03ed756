//! Signal actions and queued signals.

use super::declare::messages;

messages! {
    /// A signal action: sigaction(2).
    message SaEntry "sa_entry" {
        /// Handler address, 0 DFL, 1 IGN.
        required uint64 sigaction = 1 [hex];
        /// SA_*.
        required uint64 flags = 2 [hex];
        /// sa_restorer.
        required uint64 restorer = 3 [hex];
        /// Blocked during handler.
        required uint64 mask = 4 [hex];
        /// 32-bit task layout.
        optional bool compat_sigaction = 5;
        /// MIPS.
        optional uint64 mask_extended = 6 [hex];
    }

    /// A queued signal.
    message SiginfoEntry "siginfo_entry" {
        /// Raw 128-byte siginfo_t.
        required bytes siginfo = 1;
    }

    /// A queue of signals.
    message SignalQueueEntry "signal_queue_entry" {
        /// Queue order.
        repeated message SiginfoEntry signals = 1;
    }
}
