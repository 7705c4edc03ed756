//! Probes of kernel features that need raw system calls.
