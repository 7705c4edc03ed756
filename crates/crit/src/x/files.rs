//! The open files of a checkpoint, by id, and what to call them.

use std::collections::HashMap;

use rewake_image::{
    kind,
    messages::{FdTypes, FileEntry, PipeEntry, RegFileEntry, UnixSkEntry},
};

use crate::{error::Error, text::quoted_printable};

use super::dir::Dir;

/// The files that have better names than their type and id.
#[derive(Debug, Default)]
pub(super) struct Files {
    regular: HashMap<u32, RegFileEntry>,
    pipes: HashMap<u32, PipeEntry>,
    unix: HashMap<u32, UnixSkEntry>,
}

impl Files {
    /// Reads files.img and, where old images have one file for each type, those.
    pub fn read(dir: &Dir) -> Result<Self, Error> {
        let mut files = Files::default();
        for entry in dir.list(kind::FILES, ())?.unwrap_or_default() {
            let FileEntry { id, reg, pipe, usk, .. } = entry;
            files.regular.extend(reg.map(|f| (id, *f)));
            files.pipes.extend(pipe.map(|f| (id, *f)));
            files.unix.extend(usk.map(|f| (id, *f)));
        }
        for file in dir.list(kind::REG_FILES, ())?.unwrap_or_default() {
            files.regular.entry(file.id).or_insert(file);
        }
        for file in dir.list(kind::PIPES, ())?.unwrap_or_default() {
            files.pipes.entry(file.id).or_insert(file);
        }
        for file in dir.list(kind::UNIXSK, ())?.unwrap_or_default() {
            files.unix.entry(file.id).or_insert(file);
        }
        Ok(files)
    }

    /// The path of a regular file.
    pub fn path(&self, id: impl TryInto<u32>) -> &[u8] {
        let file = id.try_into().ok().and_then(|id| self.regular.get(&id));
        file.map_or(b"unknown path", |file| &file.name)
    }

    /// What to call the file behind a descriptor.
    pub fn name(&self, kind: i32, id: u32) -> Vec<u8> {
        match FdTypes::try_from(kind) {
            Ok(FdTypes::Reg) => self.path(id).to_vec(),
            Ok(FdTypes::Pipe) => match self.pipes.get(&id) {
                Some(pipe) => format!("pipe[{}]", pipe.pipe_id).into_bytes(),
                None => b"pipe[?]".to_vec(),
            },
            Ok(FdTypes::Unixsk) => match self.unix.get(&id) {
                Some(socket) => unix_name(socket).into_bytes(),
                None => b"unix[?]".to_vec(),
            },
            Ok(_) => {
                format!("{}.{id}", FdTypes::DESC.name_of(kind).unwrap_or_default()).into_bytes()
            }
            Err(_) => format!("{kind}.{id}").into_bytes(),
        }
    }
}

fn unix_name(socket: &UnixSkEntry) -> String {
    let blank = if socket.name.is_empty() { "" } else { " " };
    format!(
        "unix[{} ({}){blank}{}]",
        socket.ino,
        socket.peer,
        quoted_printable::encode(&socket.name)
    )
}
