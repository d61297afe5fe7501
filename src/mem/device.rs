//! Memory of a device of the host, mapped into this process.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

/// A part of a device file, such as a BAR of a passed-through function, mapped into this process for
/// reading and writing until it is dropped.
///
/// The library does not access it: a VMM maps it into the guest at [`as_ptr`](Self::as_ptr), and
/// must take it out of there before the last owner drops it.
#[derive(Debug)]
pub struct DeviceMemory {
    /// Address in this process. A number, because nothing here reads or writes through it.
    address: usize,
    len: usize,
}

impl DeviceMemory {
    /// Maps `len` bytes of `file` from `offset` on, shared; both multiples of the host's page size.
    ///
    /// # Errors
    ///
    /// Those of mmap(2); `EINVAL` for an empty range or an offset beyond 2^63.
    pub fn map(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        let offset = offset.try_into();
        let offset = offset.map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of this
        // process; `file` is open for the time of the call, and the mapping keeps it from then on.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address: start as usize,
            len,
        })
    }

    /// Where it is mapped in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address as *mut u8
    }

    /// Its length in bytes; not 0.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: `map` made a mapping of this length here, and nothing else ends it. Whoever took
        // its address has promised to be done with it.
        unsafe { libc::munmap(self.address as *mut _, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_mapping_is_the_file_from_its_offset_on() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 4096]).unwrap();
        file.write_all(&[2; 4096]).unwrap();
        let memory = DeviceMemory::map(file.as_fd(), 4096, 4096).unwrap();
        assert_eq!(memory.len(), 4096);
        // SAFETY: the mapping lives and is one page long.
        let last = unsafe { memory.as_ptr().add(4095) };
        // SAFETY: as above; nothing else accesses it.
        assert_eq!(unsafe { last.read_volatile() }, 2);
        // SAFETY: as above.
        unsafe { last.write_volatile(3) };
        drop(memory);
        file.seek(SeekFrom::Start(8191)).unwrap();
        let mut byte = [0];
        file.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [3]);
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        for (offset, len) in [(0, 0), (1, 4096), (!4095, 4096)] {
            let error = DeviceMemory::map(file.as_fd(), offset, len).unwrap_err();
            assert_eq!(
                error.raw_os_error(),
                Some(libc::EINVAL),
                "{offset:#x}+{len:#x}"
            );
        }
    }
}
