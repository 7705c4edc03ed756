//! What the figures depend on.

use std::fs;

/// Makes this process the reaper of what it starts, lets the subjects open their descriptors, and keeps from them what
/// this process was started with.
pub fn prepare() -> Result<(), String> {
    // SAFETY: prctl and close_range take numbers and touch no memory; the limit is valid for reading and writing.
    unsafe {
        if libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0 {
            return Err(format!("PR_SET_CHILD_SUBREAPER: {}", std::io::Error::last_os_error()));
        }
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 {
            return Err(format!("RLIMIT_NOFILE: {}", std::io::Error::last_os_error()));
        }
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        let cloexec = libc::CLOSE_RANGE_CLOEXEC;
        if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, cloexec) != 0 {
            return Err(format!("close_range: {}", std::io::Error::last_os_error()));
        }
        if libc::geteuid() != 0 {
            return Err("checkpoint and restore need root: run this as root".into());
        }
    }
    Ok(())
}

/// Touches memory and frees it at once, so that what is allocated next need not be asked from the host.
pub fn warm(bytes: usize) -> Result<(), String> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: a new mapping, used within its length, and unmapped while nobody refers to it.
    unsafe {
        let address = libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if address == libc::MAP_FAILED {
            return Err(format!("cannot warm {bytes} bytes: {}", std::io::Error::last_os_error()));
        }
        libc::madvise(address, bytes, libc::MADV_HUGEPAGE);
        for offset in (0..bytes).step_by(4096) {
            address.cast::<u8>().add(offset).write_volatile(1);
        }
        libc::munmap(address, bytes);
    }
    Ok(())
}

/// Kernel, processors and memory in a line.
pub fn describe() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let meminfo = read("/proc/meminfo");
    let total = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    });
    let thp = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let thp = thp
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or("?", |(word, _)| word);
    format!(
        "Linux {}, {cpus} x {}, {} GiB, transparent huge pages: {thp}, load {}",
        read("/proc/sys/kernel/osrelease").trim(),
        model.map_or("unknown processor", |(_, name)| name),
        total.unwrap_or(0) >> 20,
        read("/proc/loadavg").split(' ').next().unwrap_or("?"),
    )
}
