//! Signal actions and queued signals.

use super::declare::messages;

messages! {
    /// A signal action: sigaction(2).
    message SaEntry "sa_entry" {
        /// Address of the handler, `SIG_DFL` (0) or `SIG_IGN` (1).
        required uint64 sigaction = 1 [hex];
        required uint64 flags = 2 [hex];
        required uint64 restorer = 3 [hex];
        required uint64 mask = 4 [hex];
        /// Whether the task uses the 32-bit layout.
        optional bool compat_sigaction = 5;
        /// Signals 65 to 128, on MIPS.
        optional uint64 mask_extended = 6 [hex];
    }

    /// A queued signal.
    message SiginfoEntry "siginfo_entry" {
        /// The `siginfo_t`, 128 bytes.
        required bytes siginfo = 1;
    }

    /// A queue of signals.
    message SignalQueueEntry "signal_queue_entry" {
        /// In the order of the queue.
        repeated message SiginfoEntry signals = 1;
    }
}
