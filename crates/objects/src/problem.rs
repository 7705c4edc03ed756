//! What stands in the way: obstacles to a dump, failures of a restore.

/// Something that stands in the way of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// Process that holds the object.
    pub pid: i32,
    /// Its command name (`/proc/PID/comm`).
    pub comm: String,
    /// The object: descriptor, path, address, mapping.
    pub object: String,
    /// Why it cannot be saved.
    pub reason: String,
    /// The option or change that removes the obstacle, if there is one.
    pub remedy: Option<String>,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ({}): {}: {}", self.pid, self.comm, self.object, self.reason)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

/// Why an object could not be surveyed or restored; whoever knows the process adds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The object: descriptor, path, address, mapping.
    pub object: String,
    /// Why.
    pub reason: String,
    /// The option or change that helps, if there is one.
    pub remedy: Option<String>,
}

impl Problem {
    /// A problem without a known way out.
    pub fn new(object: impl Into<String>, reason: impl Into<String>) -> Problem {
        Problem { object: object.into(), reason: reason.into(), remedy: None }
    }

    /// Adds the way out.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Problem {
        self.remedy = Some(remedy.into());
        self
    }

    /// Names the process.
    #[must_use]
    pub fn of(self, pid: i32, comm: &[u8]) -> Obstacle {
        Obstacle {
            pid,
            comm: text(comm),
            object: self.object,
            reason: self.reason,
            remedy: self.remedy,
        }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.object, self.reason)
    }
}

impl std::error::Error for Problem {}

/// Bytes from the kernel (names, paths) as text for people.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
