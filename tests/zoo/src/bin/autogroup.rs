//! Kernel state: the nice value of the session's autogroup (sched(7)), of the leader's session and of another one.

use zoo::{ensure, ensure_eq};

fn set(nice: i32) -> Result<(), String> {
    std::fs::write("/proc/self/autogroup", nice.to_string())
        .map_err(|e| format!("/proc/self/autogroup: {e}"))
}

fn nice() -> Result<String, String> {
    let text = std::fs::read_to_string("/proc/self/autogroup").map_err(|e| e.to_string())?;
    Ok(text.trim_end().rsplit(' ').next().unwrap_or_default().to_owned())
}

fn main() {
    zoo::run(|z| {
        if let Err(why) = nice() {
            z.skip(&why);
        }
        set(7)?;
        let child = z.fork(|z| {
            ensure!(setsid() > 0, "setsid");
            set(-3)?;
            z.publish("up", "");
            z.wait_for_check();
            ensure_eq!(nice()?, "-3", "nice value of the child's session");
            Ok(())
        })?;
        z.wait_for("up")?;
        z.ready()?;
        z.wait_for_check();
        ensure_eq!(nice()?, "7", "nice value of the session");
        z.join(child)
    })
}

#[allow(unsafe_code, reason = "setsid")]
fn setsid() -> i32 {
    // SAFETY: it takes nothing.
    unsafe { libc::setsid() }
}
