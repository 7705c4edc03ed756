//! Kernel state: the parent-death signal, which must still come when the parent ends after a restore.
#![allow(unsafe_code, reason = "prctl through the C library")]

use zoo::{Flag, check, ensure};

static CAME: Flag = Flag::new();

extern "C" fn came(_: i32) {
    CAME.set();
}

fn main() {
    zoo::run(|z| {
        // SAFETY: integers only.
        check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) }, "PR_SET_CHILD_SUBREAPER")?;
        let parent = z.fork(|z| {
            z.fork(|z| {
                zoo::on_signal(libc::SIGUSR2, came as *const () as usize, 0)?;
                // SAFETY: integers only.
                check(
                    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR2) },
                    "PR_SET_PDEATHSIG",
                )?;
                z.publish("up", &zoo::pid().to_string());
                z.wait_for_check();
                ensure!(!CAME.is_set(), "the parent-death signal came while the parent lives");
                z.publish("let parent end", "");
                ensure!(CAME.wait(5000), "the parent ended and no signal came");
                Ok(())
            })?;
            z.wait_for_check();
            z.wait_for("let parent end")
        })?;
        z.wait_for("up")?;
        let grandchild = std::fs::read_to_string(z.path("up")).map_err(|e| e.to_string())?;
        let grandchild: i32 = grandchild.parse().map_err(|e| format!("{e}"))?;
        z.ready()?;
        z.wait_for_check();
        z.join(parent)?;
        z.join(grandchild)
    })
}
