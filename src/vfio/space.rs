//! An address space of the host's IOMMU, with books on what is mapped.
//!
//! The books are what makes both of the kernel's interfaces alike (docs/spec/vfio-rig.md#vfio-rig-5):
//! neither splits a mapping, they differ on holes, and an iommufd that finds a part of a mapping at
//! the end of a range has unmapped the rest already.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::backend::{
    AddressSpace, IntervalError, Intervals, Permissions, SpaceError, SpaceLimits,
};
use crate::mem::{GuestRam, RamPiece};

/// The kernel's side of one address space: a type1 container or an iommufd IOAS.
pub(super) trait SpaceKernel: Send + Sync + Debug {
    /// Makes one mapping of memory that is consecutive in this process.
    fn map(&self, iova: u64, ram: &RamPiece, access: Permissions) -> io::Result<()>;

    /// Removes the whole mappings of a range that has at least one and cuts none, or, for `None`, all
    /// mappings. Returns their bytes.
    fn unmap(&self, range: Option<(u64, u64)>) -> io::Result<u64>;
}

/// What one call of `map` has mapped.
#[derive(Debug)]
struct Mapping {
    /// Keeps the memory mapped in this process: the kernel may look it up as late as when a device
    /// is attached.
    pieces: Vec<RamPiece>,
}

#[derive(Debug, Default)]
struct Books {
    mappings: Intervals<Mapping>,
    /// Mappings of the kernel: as many as there are pieces.
    pieces: usize,
    /// A mapping that could not be taken back may be left, so no device may be let in.
    broken: bool,
}

/// An address space with its books.
#[derive(Debug)]
pub(super) struct Space<K> {
    ram: GuestRam,
    limits: SpaceLimits,
    kernel: K,
    books: Mutex<Books>,
}

impl<K: SpaceKernel> Space<K> {
    /// An address space in which nothing is mapped.
    pub(super) fn new(ram: GuestRam, limits: SpaceLimits, kernel: K) -> Self {
        Self {
            ram,
            limits,
            kernel,
            books: Mutex::default(),
        }
    }

    /// The kernel's side.
    pub(super) fn kernel(&self) -> &K {
        &self.kernel
    }

    /// Maps all guest RAM at its guest physical addresses, for reading, and for writing where this
    /// process may write it. The space must be empty.
    pub(super) fn map_all(&self) -> Result<(), SpaceError> {
        let mut books = self.lock();
        for piece in self.ram.pin().all_pieces() {
            let (gpa, len) = (piece.gpa(), piece.len());
            let access = if piece.is_writable() {
                Permissions::READ | Permissions::WRITE
            } else {
                Permissions::READ
            };
            if let Err(error) = self.enter(&mut books, gpa, len, vec![piece], access) {
                self.empty(&mut books)?;
                return Err(error);
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `pieces` and enters them into the books.
    fn enter(
        &self,
        books: &mut Books,
        iova: u64,
        len: u64,
        pieces: Vec<RamPiece>,
        access: Permissions,
    ) -> Result<(), SpaceError> {
        if books.broken {
            return Err(broken());
        }
        if !self.limits.allow(iova, len) {
            return Err(SpaceError::OutOfRange { iova, len });
        }
        let free = books.mappings.check_free(iova, len);
        free.map_err(|error| interval_error(error, iova, len))?;
        if let Some(max) = self.limits.max_mappings
            && pieces.len() > max - books.pieces.min(max)
        {
            return Err(SpaceError::Full { max });
        }
        let mut at = iova;
        for (done, piece) in pieces.iter().enumerate() {
            if let Err(error) = self.kernel.map(at, piece, access) {
                let error = self.map_error(error, books, at, piece);
                if done > 0 {
                    self.take_back(books, iova, at - iova)?;
                }
                return Err(error);
            }
            at += piece.len();
        }
        books.pieces += pieces.len();
        let mapping = Mapping { pieces };
        let entered = books.mappings.insert(iova, len, mapping);
        entered.map_err(|error| interval_error(error, iova, len))
    }

    /// Removes what a `map` that failed in the middle has mapped. If the kernel refuses even that,
    /// everything goes; if that fails as well, nobody may use the space any more.
    fn take_back(&self, books: &mut Books, iova: u64, len: u64) -> Result<(), SpaceError> {
        match self.kernel.unmap(Some((iova, len))) {
            Ok(bytes) if bytes == len => Ok(()),
            _ => {
                books.broken = true;
                self.empty(books)
            }
        }
    }

    fn empty(&self, books: &mut Books) -> Result<(), SpaceError> {
        self.kernel.unmap(None).map_err(SpaceError::Host)?;
        books.mappings.clear();
        books.pieces = 0;
        books.broken = false;
        Ok(())
    }

    /// What the kernel means (docs/spec/vfio-rig.md#vfio-rig-5).
    fn map_error(
        &self,
        error: io::Error,
        books: &Books,
        iova: u64,
        piece: &RamPiece,
    ) -> SpaceError {
        let (gpa, len) = (piece.gpa(), piece.len());
        match error.raw_os_error() {
            Some(libc::EEXIST) => SpaceError::Exists { iova, len },
            Some(libc::EINVAL | libc::EOVERFLOW) => SpaceError::OutOfRange { iova, len },
            Some(libc::EFAULT) => SpaceError::NotRam { gpa, len },
            Some(libc::ENOMEM) => SpaceError::Memlock,
            Some(libc::ENOSPC) => SpaceError::Full { max: books.pieces },
            _ => SpaceError::Host(error),
        }
    }
}

impl<K: SpaceKernel> AddressSpace for Space<K> {
    fn map(&self, iova: u64, gpa: u64, len: u64, access: Permissions) -> Result<(), SpaceError> {
        if len == 0 || !(gpa | iova).is_multiple_of(self.limits.granule) {
            return Err(SpaceError::OutOfRange { iova, len });
        }
        let not_ram = || SpaceError::NotRam { gpa, len };
        let pieces = self.ram.pin().pieces(gpa, len).map_err(|_| not_ram())?;
        let writes = access.contains(Permissions::WRITE);
        let writable = pieces.iter().all(RamPiece::is_writable);
        if access.is_empty() || writes && !writable {
            return Err(not_ram());
        }
        self.enter(&mut self.lock(), iova, len, pieces, access)
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), SpaceError> {
        let mut books = self.lock();
        let inside = books.mappings.inside(iova, len);
        let inside = inside.map_err(|error| interval_error(error, iova, len))?;
        let found: Vec<_> = inside.map(|(range, _)| range).collect();
        let (Some(first), Some(last)) = (found.first(), found.last()) else {
            return Ok(());
        };
        let mapped: u64 = found.iter().map(|range| range.end - range.start).sum();
        let whole = (first.start, last.end - first.start);
        let gone = self.kernel.unmap(Some(whole)).map_err(SpaceError::Host)?;
        for range in &found {
            if let Some((_, mapping)) = books.mappings.remove(range.start) {
                books.pieces -= mapping.pieces.len();
            }
        }
        if gone != mapped {
            // Mappings that the books do not know are gone, or some that they knew were not there.
            let text = format!("{gone} bytes unmapped instead of {mapped}");
            return Err(SpaceError::Host(io::Error::other(text)));
        }
        Ok(())
    }

    fn clear(&self) -> Result<(), SpaceError> {
        let mut books = self.lock();
        if books.mappings.is_empty() && !books.broken {
            return Ok(());
        }
        self.empty(&mut books)
    }

    fn limits(&self) -> &SpaceLimits {
        &self.limits
    }
}

fn broken() -> SpaceError {
    SpaceError::Host(io::Error::other("an earlier mapping could not be removed"))
}

fn interval_error(error: IntervalError, iova: u64, len: u64) -> SpaceError {
    match error {
        IntervalError::Invalid => SpaceError::OutOfRange { iova, len },
        IntervalError::Taken => SpaceError::Exists { iova, len },
        IntervalError::PartlyInside => SpaceError::PartlyInside { iova, len },
    }
}
