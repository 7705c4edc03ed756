//! Labels that security modules (AppArmor, SELinux, Smack) give to processes: `/proc/PID/attr/current`. They are not restored:
//! a process gets that of the restoring command. So one that differs from ours is refused.

use crate::Problem;
use crate::problem::text;

/// The label of this process, without the newline at its end; `None` where no module gives any.
#[must_use]
pub fn own() -> Option<Vec<u8>> {
    std::fs::read("/proc/self/attr/current").ok().map(|label| plain(&label).to_vec())
}

fn plain(label: &[u8]) -> &[u8] {
    let end = label.iter().rposition(|b| !matches!(b, b'\n' | 0)).map_or(0, |at| at + 1);
    &label[..end]
}

/// Is `theirs` one that the process would lose?
#[must_use]
pub fn judge(own: &[u8], theirs: &[u8]) -> Option<Problem> {
    let theirs = plain(theirs);
    (own != theirs).then(|| {
        Problem::new(
            format!("security label {}", text(theirs)),
            format!("labels are not saved yet, and that of this command is {}", text(own)),
        )
        .remedy("run rewake under the same label: aa-exec -p PROFILE rewake …, or runcon LABEL rewake …")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_in_the_way() {
        assert!(judge(b"unconfined", b"unconfined\n").is_none());
        assert!(judge(b"system_u:system_r:init_t:s0", b"system_u:system_r:init_t:s0\0").is_none());
        let problem = judge(b"unconfined", b"crun (enforce)\n").unwrap();
        assert_eq!(problem.object, "security label crun (enforce)");
        assert!(problem.to_string().contains("that of this command is unconfined"), "{problem}");
    }
}
