//! Labels of security modules (AppArmor, SELinux), which images may have (those of CRIU): a restored tree has that of this
//! command. So another one is an error, unless `--lsm-profile none` says that this is meant.

use super::read::Checkpoint;
use crate::error::{Error, Result};
use crate::options::Label;
use rewake_objects::Problem;
use rewake_objects::problem::text;
use rewake_objects::task::label;

/// Does the tree get the labels it shall have?
///
/// # Errors
/// It does not.
pub(super) fn check(checkpoint: &Checkpoint, wanted: &Label) -> Result<()> {
    let own = label::own();
    match wanted {
        Label::Ignored => return Ok(()),
        Label::Named(module, name) => {
            if own.as_deref() == Some(name.as_bytes()) {
                return Ok(());
            }
            return Err(Error::new(format!(
                "--lsm-profile {module}:{name}: {}",
                why(own.as_deref())
            ))
            .hint("run rewake under that label, or give --lsm-profile none"));
        }
        Label::OfImages => {}
    }
    for task in &checkpoint.tasks {
        let threads = task.alive.iter().flat_map(|alive| &alive.threads);
        let mut creds = threads.filter_map(|thread| thread.thread.creds.as_ref());
        let other = creds.find_map(|creds| differs(creds.lsm_profile.as_deref()?, own.as_deref()));
        if let Some(problem) = other {
            return Err(Error::of(task.pid, &task.comm, problem));
        }
    }
    Ok(())
}

fn why(own: Option<&[u8]>) -> String {
    match own {
        None => "this kernel runs no security module that gives labels".to_owned(),
        Some(own) => format!("labels cannot be set yet, and that of this command is {}", text(own)),
    }
}

/// Is a label of the images another one than ours?
fn differs(of_images: &[u8], own: Option<&[u8]>) -> Option<Problem> {
    const UNCONFINED: &[u8] = b"unconfined";
    if own == Some(of_images) || of_images.is_empty() || of_images == UNCONFINED && own.is_none() {
        return None;
    }
    let object = format!("security label {}", text(of_images));
    Some(Problem::new(object, why(own)).remedy(
        "give --lsm-profile none to restore it under the label of this command, or run rewake under its label",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_label_is_in_the_way() {
        assert!(differs(b"unconfined", None).is_none() && differs(b"", Some(b"a")).is_none());
        assert!(differs(b"crun (enforce)", Some(b"crun (enforce)")).is_none());
        let problem = differs(b"crun (enforce)", None).unwrap();
        assert_eq!(problem.object, "security label crun (enforce)");
        assert!(problem.reason.contains("no security module"), "{problem}");
        assert!(
            differs(b"crun (enforce)", Some(b"unconfined")).unwrap().reason.contains("unconfined")
        );
    }
}
