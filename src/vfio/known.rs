//! Files of VFIO that the VMM is told of.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::vmm::HostFiles;

/// What failed where a VMM does not take a file.
pub(super) const TELL: &str = "telling the VM's KVM of it";

/// A file of VFIO. The VMM was told of it, if it wants to know, and is told again before it is closed:
/// who knows a file may keep it open.
#[derive(Debug)]
pub(super) struct KnownFile {
    /// Closed when the rest of the drop is done.
    file: File,
    to: Option<Arc<dyn HostFiles>>,
}

impl KnownFile {
    /// Tells the VMM of a file.
    ///
    /// # Errors
    ///
    /// What the VMM says; the file is closed, and the VMM does not know it.
    pub(super) fn tell(file: File, to: Option<&Arc<dyn HostFiles>>) -> io::Result<Self> {
        if let Some(to) = to {
            to.add(file.as_fd())?;
        }
        let to = to.cloned();
        Ok(Self { file, to })
    }

    /// A file that the VMM need not know: that of a device whose group it knows.
    pub(super) fn untold(file: File) -> Self {
        Self { file, to: None }
    }
}

impl Deref for KnownFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for KnownFile {
    fn drop(&mut self) {
        if let Some(to) = &self.to {
            to.remove(self.file.as_fd());
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, BorrowedFd};
    use std::sync::{Mutex, PoisonError};

    /// What a VMM was told.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(in super::super) enum Told {
        /// Of a file with this descriptor, which is open.
        Added(i32),
        /// That it will be closed; it is still open.
        Removed(i32),
    }

    /// A VMM that keeps a list.
    #[derive(Debug, Default)]
    pub(in super::super) struct List {
        told: Mutex<Vec<Told>>,
        refuses: bool,
    }

    impl List {
        pub(in super::super) fn told(&self) -> Vec<Told> {
            let told = self.told.lock();
            told.unwrap_or_else(PoisonError::into_inner).clone()
        }

        fn push(&self, told: Told, file: BorrowedFd<'_>) {
            file.try_clone_to_owned().unwrap();
            self.told.lock().unwrap().push(told);
        }
    }

    impl HostFiles for List {
        fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
            if self.refuses {
                return Err(io::ErrorKind::Unsupported.into());
            }
            self.push(Told::Added(file.as_raw_fd()), file);
            Ok(())
        }

        fn remove(&self, file: BorrowedFd<'_>) {
            self.push(Told::Removed(file.as_raw_fd()), file);
        }
    }

    #[test]
    fn a_vmm_hears_of_a_file_as_long_as_it_is_open() {
        let list = Arc::new(List::default());
        let to: Arc<dyn HostFiles> = list.clone();
        let file = KnownFile::tell(tempfile::tempfile().unwrap(), Some(&to)).unwrap();
        let fd = file.as_fd().as_raw_fd();
        assert_eq!(list.told(), [Told::Added(fd)]);
        drop(file);
        assert_eq!(list.told(), [Told::Added(fd), Told::Removed(fd)]);
        drop(KnownFile::tell(tempfile::tempfile().unwrap(), None).unwrap());
        drop(KnownFile::untold(tempfile::tempfile().unwrap()));
        assert_eq!(list.told().len(), 2);
    }

    #[test]
    fn a_file_that_a_vmm_does_not_take_is_not_taken_from_it() {
        let list = Arc::new(List {
            refuses: true,
            ..List::default()
        });
        let to: Arc<dyn HostFiles> = list.clone();
        let error = KnownFile::tell(tempfile::tempfile().unwrap(), Some(&to)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert_eq!(list.told(), []);
    }
}
