//! The engine's error: what failed, and the way out.

use rewake_objects::{Obstacle, Problem};

/// Why an operation failed, with the way out.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What failed: process, object and reason.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
    /// Obstacles found by the survey, when the dump was refused because of them.
    pub obstacles: Vec<Obstacle>,
    /// Trying again soon may help.
    pub(crate) transient: bool,
    /// It could be done if the tree stood still meanwhile.
    pub(crate) still: bool,
    /// Somebody else has a file that only one can have.
    pub(crate) contested: bool,
    /// Nothing stands in the way but that memory is still to come (`obstacles` say whose), which may be waited for.
    pub(crate) coming: bool,
}

/// Result of the engine's operations.
pub type Result<T> = std::result::Result<T, Error>;

impl From<Problem> for Error {
    fn from(problem: Problem) -> Error {
        let (hint, contested) = (problem.remedy.clone(), problem.contested);
        Error { hint, contested, ..Error::new(problem.to_string()) }
    }
}

impl Error {
    /// An error without a known way out.
    pub fn new(message: impl Into<String>) -> Error {
        Error {
            message: message.into(),
            hint: None,
            obstacles: Vec::new(),
            transient: false,
            still: false,
            contested: false,
            coming: false,
        }
    }

    /// Adds the way out.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the way out if the command has as many descriptors open as it may.
    #[must_use]
    pub(crate) fn with_limit(self) -> Error {
        use rustix::process::{Resource, getrlimit};
        let full = std::io::Error::from_raw_os_error(libc::EMFILE).to_string();
        if self.hint.is_some() || !self.message.contains(&full) {
            return self;
        }
        match getrlimit(Resource::Nofile).maximum {
            Some(most) => self.hint(format!(
                "this command may have {most} files open: give it more (ulimit -Hn, or prlimit --nofile)"
            )),
            None => self,
        }
    }

    /// A problem with an object of a process.
    #[must_use]
    pub fn of(pid: i32, comm: &[u8], problem: Problem) -> Error {
        let contested = problem.contested;
        let obstacle = problem.of(pid, comm);
        let message = format!(
            "process {} ({}): {}: {}",
            obstacle.pid, obstacle.comm, obstacle.object, obstacle.reason
        );
        Error { hint: obstacle.remedy, contested, ..Error::new(message) }
    }

    /// Refuses a dump because of what stands in its way.
    #[must_use]
    pub fn refused(obstacles: Vec<Obstacle>) -> Error {
        let obstacles = Obstacle::merged(obstacles);
        let mut lines = obstacles.iter();
        let mut message = lines.next().map_or_else(String::new, |o| {
            format!("process {} ({}): {}: {}", o.pid, o.comm, o.object, o.reason)
        });
        for o in lines.take(20) {
            message += &format!("\nprocess {} ({}): {}: {}", o.pid, o.comm, o.object, o.reason);
        }
        if obstacles.len() > 21 {
            message += &format!("\n… and {} more", obstacles.len() - 21);
        }
        let hint = obstacles.iter().find_map(|o| o.remedy.clone());
        Error { hint, obstacles, ..Error::new(message) }
    }
}

impl From<rewake_image::ImageError> for Error {
    fn from(e: rewake_image::ImageError) -> Error {
        Error::new(e.to_string())
    }
}

/// Names the process an error of another layer belongs to.
pub trait Context<T> {
    /// Names the process.
    ///
    /// # Errors
    /// The error it was, with process and command.
    fn of(self, pid: i32, comm: &[u8]) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn of(self, pid: i32, comm: &[u8]) -> Result<T> {
        self.map_err(|e| {
            Error::new(format!("process {pid} ({}): {e}", rewake_objects::problem::text(comm)))
        })
    }
}
