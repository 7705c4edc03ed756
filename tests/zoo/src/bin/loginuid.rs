//! Kernel state: the login uid of the audit system, which a child inherits.

use zoo::ensure_eq;

const FILE: &str = "/proc/self/loginuid";

fn get() -> String {
    std::fs::read_to_string(FILE).unwrap_or_default().trim().to_string()
}

fn main() {
    zoo::run(|z| {
        if let Err(e) = std::fs::write(FILE, "54321") {
            z.skip(&format!("{FILE}: {e}"));
        }
        let child = z.fork(|z| {
            z.publish("up", "");
            z.wait_for_check();
            ensure_eq!(get(), "54321", "login uid of the child");
            Ok(())
        })?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(get(), "54321", "login uid");
        z.join(child)
    })
}
