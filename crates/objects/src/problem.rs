//! What stands in the way: obstacles to a dump, failures of a restore.

use std::collections::HashMap;

/// What may be gone soon if the process runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passing {
    /// Nothing.
    No,
    /// Requests in flight, which end.
    Requests,
    /// What somebody else does with memory by a userfaultfd, as the pager of a lazy restore: if he is in the tree, his
    /// descriptor of that is told as well, which does not pass.
    Memory,
}

/// Something that stands in the way of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// Process that holds the object.
    pub pid: i32,
    /// Its command name (`/proc/PID/comm`).
    pub comm: String,
    /// Other processes of which the same is to be said.
    pub others: Vec<i32>,
    /// The object: descriptor, path, address, mapping.
    pub object: String,
    /// Why it cannot be saved.
    pub reason: String,
    /// The option or change that removes the obstacle, if there is one.
    pub remedy: Option<String>,
    /// May it be gone soon if the process runs on?
    pub passing: Passing,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ({})", self.pid, self.comm)?;
        match &self.others[..] {
            [] => {}
            [other] => write!(f, " and process {other}")?,
            others => write!(f, " and {} other processes", others.len())?,
        }
        write!(f, ": {}: {}", self.object, self.reason)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl Obstacle {
    /// Says once what is to be said of several processes, as of a listening socket that workers have inherited.
    #[must_use]
    pub fn merged(obstacles: Vec<Obstacle>) -> Vec<Obstacle> {
        let mut places: HashMap<(String, String), usize> = HashMap::with_capacity(obstacles.len());
        let mut merged: Vec<Obstacle> = Vec::with_capacity(obstacles.len());
        for obstacle in obstacles {
            let place = *places
                .entry((obstacle.object.clone(), obstacle.reason.clone()))
                .or_insert(merged.len());
            match merged.get_mut(place) {
                // Of one process it is two things.
                Some(first) if first.pid != obstacle.pid => first.others.push(obstacle.pid),
                _ => merged.push(obstacle),
            }
        }
        merged
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
    /// Somebody else has a file, or a part of it, that only one can have.
    pub contested: bool,
    /// May it be gone soon if the process runs on?
    pub passing: Passing,
}

impl Problem {
    /// A problem without a known way out.
    pub fn new(object: impl Into<String>, reason: impl Into<String>) -> Problem {
        Problem {
            object: object.into(),
            reason: reason.into(),
            remedy: None,
            contested: false,
            passing: Passing::No,
        }
    }

    /// Adds the way out.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Problem {
        self.remedy = Some(remedy.into());
        self
    }

    /// Somebody else has the file, and only one can.
    #[must_use]
    pub fn contested(mut self) -> Problem {
        self.contested = true;
        self
    }

    /// It may be gone soon if the process runs on.
    #[must_use]
    pub fn passing(mut self) -> Problem {
        self.passing = Passing::Requests;
        self
    }

    /// Names the process.
    #[must_use]
    pub fn of(self, pid: i32, comm: &[u8]) -> Obstacle {
        Obstacle {
            pid,
            comm: text(comm),
            others: Vec::new(),
            object: self.object,
            reason: self.reason,
            remedy: self.remedy,
            passing: self.passing,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_processes_have_is_told_once() {
        let odd = |object: &str| Problem::new(object, "odd").remedy("make it even");
        let of = |pid, object| odd(object).of(pid, b"sh");
        let said = |obstacles| -> Vec<String> {
            Obstacle::merged(obstacles).iter().map(ToString::to_string).collect()
        };
        let all = vec![of(7, "fd 3"), of(8, "fd 3"), of(7, "fd 4"), of(9, "fd 3"), of(8, "fd 4")];
        let wanted = [
            "process 7 (sh) and 2 other processes: fd 3: odd; make it even",
            "process 7 (sh) and process 8: fd 4: odd; make it even",
        ];
        assert_eq!(said(all), wanted);
        assert_eq!(said(vec![of(7, "fd 3"), of(7, "fd 3")]).len(), 2);
    }
}
