//! Looks at disk images before a VM is built, to say what is wrong in the words of the option.
#![forbid(unsafe_code)]

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// It cannot be opened.
    #[error("{}: {source}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// It has no size.
    #[error("{}: neither a regular file nor a block device", path.display())]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// It may not be written, and `readonly=on` is not given.
    #[error("{}: the file is read-only: add readonly=on, or make it writable", path.display())]
    ReadOnly {
        /// The image.
        path: PathBuf,
    },
}

/// Checks that an image exists and may be used as asked.
///
/// # Errors
///
/// [`ImageError`].
pub(crate) fn check(path: &Path, readonly: bool) -> Result<(), ImageError> {
    let failed = |source| ImageError::Open {
        path: path.to_owned(),
        source,
    };
    // Looked at before it is opened: to open a pipe is to wait for whoever writes to it.
    let kind = fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(ImageError::Kind {
            path: path.to_owned(),
        });
    }
    let file = OpenOptions::new().read(true).open(path).map_err(failed)?;
    if readonly {
        return Ok(());
    }
    let read_only = || ImageError::ReadOnly {
        path: path.to_owned(),
    };
    // Root may write any file; one that nobody is meant to write is left alone all the same.
    if file.metadata().map_err(failed)?.permissions().readonly() {
        return Err(read_only());
    }
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Err(read_only())
        }
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_nobody_may_write_needs_readonly() {
        let file = tempfile::NamedTempFile::new().unwrap();
        check(file.path(), false).unwrap();
        let mut permissions = file.as_file().metadata().unwrap().permissions();
        permissions.set_readonly(true);
        file.as_file().set_permissions(permissions).unwrap();
        let error = check(file.path(), false).unwrap_err();
        assert!(error.to_string().contains("readonly=on"), "{error}");
        check(file.path(), true).unwrap();
    }

    #[test]
    fn a_pipe_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        for readonly in [true, false] {
            let (path, (done, result)) = (path.clone(), std::sync::mpsc::channel());
            std::thread::spawn(move || done.send(check(&path, readonly)));
            let result = result.recv_timeout(std::time::Duration::from_secs(10));
            let error = result.expect("it waits for a writer").unwrap_err();
            assert!(error.to_string().contains("block device"), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = check(Path::new("/none/disk.img"), true).unwrap_err();
        assert!(error.to_string().starts_with("/none/disk.img: "), "{error}");
    }
}
