//! Kernel feature probes for `check`.
