//! Kernel state: the core dump filter, another one in a child.

use zoo::ensure_eq;

fn get() -> String {
    std::fs::read_to_string("/proc/self/coredump_filter").unwrap_or_default().trim().to_string()
}

fn set(value: &str) -> zoo::Check {
    std::fs::write("/proc/self/coredump_filter", value).map_err(|e| format!("coredump_filter: {e}"))
}

fn main() {
    zoo::run(|z| {
        let child = z.fork(|z| {
            set("0x0")?;
            z.publish("up", "");
            z.wait_for_check();
            ensure_eq!(get(), "00000000", "filter of the child");
            Ok(())
        })?;
        z.wait_for("up")?;
        set("0x1ff")?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(get(), "000001ff", "filter");
        z.join(child)
    })
}
