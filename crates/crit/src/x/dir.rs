//! The images of one directory.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rewake_image::{
    kind::{self, Kind, KindInfo},
    messages::{ImageMessage, PstreeEntry},
    raw::RawImage,
    wire,
};

use crate::error::Error;

/// A directory of images.
#[derive(Debug)]
pub(super) struct Dir {
    path: PathBuf,
}

impl Dir {
    pub fn new(path: &Path) -> Self {
        Dir { path: path.to_owned() }
    }

    /// All processes, in the order of the file, without which there is nothing to show.
    pub fn processes(&self) -> Result<Vec<PstreeEntry>, Error> {
        self.load(kind::PSTREE.info(), &kind::PSTREE.file_name(()))
    }

    /// The messages of an image whose messages are all of one type; `None` if there is no such file.
    pub fn list<M: ImageMessage>(
        &self,
        kind: Kind<M>,
        id: impl Into<kind::Id>,
    ) -> Result<Option<Vec<M>>, Error> {
        self.entries(kind.info(), &kind.file_name(id))
    }

    /// The first message of an image; `None` if there is no such file or nothing in it.
    pub fn one<M: ImageMessage>(
        &self,
        kind: Kind<M>,
        id: impl Into<kind::Id>,
    ) -> Result<Option<M>, Error> {
        Ok(self.list(kind, id)?.and_then(|list| list.into_iter().next()))
    }

    /// The messages of type `M` in an image, whatever else there is; `None` if there is no such file.
    pub fn entries<M: ImageMessage>(
        &self,
        kind: &'static KindInfo,
        name: &str,
    ) -> Result<Option<Vec<M>>, Error> {
        match self.load(kind, name) {
            Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    fn load<M: ImageMessage>(&self, kind: &'static KindInfo, name: &str) -> Result<Vec<M>, Error> {
        let path = self.path.join(name);
        let bytes = fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let mut image = RawImage::detect(&path, &bytes)?;
        if image.kind().header != kind.header {
            return Err(Error::OtherKind { path, found: image.kind().name, expected: kind.name });
        }
        let mut found = Vec::new();
        while let Some(entry) = image.next_entry()? {
            if entry.desc.name == M::desc().name {
                let message = wire::decode(entry.message)
                    .map_err(|fault| Error::entry(&path, &entry, fault))?;
                found.push(message);
            }
        }
        Ok(found)
    }
}
