//! The guest's side of the pvIOMMU: device domain calls and first-stage tables, as the Linux driver
//! makes them (docs/spec/pviommu.md).
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::kernel::{Kernel, status};
use super::vm::{PAGE, Vm};
use super::wire::{Bytes, u32_at, u64_at};
use crate::check::{Failure, equal};

/// Call codes (docs/spec/pviommu.md#pviommu-2).
pub mod code {
    /// Makes a domain.
    pub const CREATE: u64 = 0xb1;
    /// Moves a device.
    pub const ATTACH: u64 = 0xb2;
    /// Moves a device to the default domain.
    pub const DETACH: u64 = 0xc4;
    /// Deletes a domain.
    pub const DELETE: u64 = 0xc5;
    /// Gives a domain its tables.
    pub const CONFIGURE: u64 = 0xce;
    /// Forgets all translations of a domain.
    pub const FLUSH: u64 = 0xd0;
    /// Forgets those of ranges; a rep call.
    pub const FLUSH_LIST: u64 = 0xd1;
    /// What there is.
    pub const CAPABILITIES: u64 = 0x125;
    /// What a function is.
    pub const PROPERTY: u64 = 0x127;
    /// All of them, with the bytes of their input without elements.
    pub const ALL: [(u64, usize); 9] = [
        (CREATE, 28),
        (ATTACH, 32),
        (DETACH, 16),
        (DELETE, 24),
        (CONFIGURE, 40),
        (FLUSH, 32),
        (FLUSH_LIST, 32),
        (CAPABILITIES, 16),
        (PROPERTY, 24),
    ];
    /// Calls of second-stage domains.
    pub const SECOND_STAGE: [u64; 5] = [0xb3, 0xb4, 0xc6, 0xc7, 0xc8];
}

/// Flags of CONFIGURE.
pub mod configure {
    /// Addresses are translated.
    pub const ENABLED: u64 = 1;
    /// Nothing passes.
    pub const BLOCKED: u64 = 2;
    /// 5 levels.
    pub const FIVE_LEVELS: u64 = 4;
}

/// Bits of a table entry (docs/spec/pviommu.md#pviommu-5).
pub mod bit {
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Writes pass.
    pub const RW: u64 = 1 << 1;
    /// User accesses pass.
    pub const US: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty.
    pub const D: u64 = 1 << 6;
    /// A large leaf.
    pub const PS: u64 = 1 << 7;
    /// Not to be executed.
    pub const XD: u64 = 1 << 63;
    /// What Linux sets on an entry that leads to a table.
    pub const TABLE: u64 = P | RW | US | A;
    /// What Linux sets on a writable leaf.
    pub const PAGE: u64 = P | RW | US | A | D;
    /// What Linux sets on a read-only leaf.
    pub const READ_ONLY: u64 = P | US | A;
    /// The address.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// This partition.
pub const SELF: u64 = u64::MAX;
/// The default domain, as calls name it.
pub const DEFAULT: u64 = 0;
/// Number of the null domain.
pub const NULL: u32 = u32::MAX;
/// Property of a device: behind the pvIOMMU.
pub const PROPERTY_PVIOMMU: u32 = 10;
/// Elements that fit behind the header of FLUSH_LIST in a page.
pub const MOST_ELEMENTS: usize = (PAGE as usize - 32) / 8;

/// Domain id of the first-stage domain `number`.
pub const fn first_stage(number: u32) -> u64 {
    (number as u64) << 32 | 1
}

/// A `DeviceDomain`, which most inputs begin with.
pub fn domain(id: u64) -> Bytes {
    Bytes::new().u64(SELF).u64(0).u64(id)
}

/// Input of CREATE.
pub fn create_input(number: u32, flags: u32) -> Bytes {
    domain(first_stage(number)).u32(flags)
}

/// Input of DELETE.
pub fn delete_input(number: u32) -> Bytes {
    domain(first_stage(number))
}

/// Input of ATTACH, to any domain.
pub fn attach_input(domain_id: u64, device: u64) -> Bytes {
    domain(domain_id).u64(device)
}

/// Input of DETACH.
pub fn detach_input(device: u64) -> Bytes {
    Bytes::new().u64(SELF).u64(device)
}

/// Input of CONFIGURE.
pub fn configure_input(number: u32, flags: u64, root: u64) -> Bytes {
    domain(first_stage(number)).u64(flags).u64(root)
}

/// Input of FLUSH, of any domain.
pub fn flush_input(domain_id: u64) -> Bytes {
    domain(domain_id).u32(0).u32(0)
}

/// Input of FLUSH_LIST, of any domain.
pub fn flush_list_input(domain_id: u64, elements: &[u64]) -> Bytes {
    let head = domain(domain_id).u32(1).u32(0);
    elements
        .iter()
        .fold(head, |bytes, element| bytes.u64(*element))
}

/// Input of GET_IOMMU_CAPABILITIES.
pub fn capabilities_input() -> Bytes {
    Bytes::new().u64(SELF).u64(0)
}

/// Input of GET_LOGICAL_DEVICE_PROPERTY.
pub fn property_input(device: u64, property: u32) -> Bytes {
    Bytes::new().u64(SELF).u64(device).u32(property).u32(0)
}

/// An element of FLUSH_LIST: `1 << shift` pages from that of `iova` on.
pub const fn element(iova: u64, shift: u64) -> u64 {
    iova & !0xfff | shift
}

/// What came back from a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Elements done.
    pub done: u16,
    /// What is where the output goes: 0xee where nothing was stored.
    pub output: Vec<u8>,
}

/// Bytes that are looked at where the output goes.
const OUTPUT: usize = 40;

/// Output of GET_IOMMU_CAPABILITIES.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Size that the structure says it has.
    pub size: u32,
    /// Bits of an I/O virtual address.
    pub width: u8,
    /// Bits of a PASID.
    pub pasid_width: u8,
    /// Bits 0 present, 1 S2, 2 S1, 3 5-level, 4 PASID, 5 ATS, 6 PRI.
    pub bits: u64,
    /// Page sizes.
    pub page_sizes: u64,
}

/// The calls, made on one VP.
#[derive(Debug, Clone)]
pub struct PvIommu {
    kernel: Kernel,
    vp: u32,
}

impl PvIommu {
    /// The calls of a kernel, made on VP 0.
    pub fn new(kernel: &Kernel) -> Self {
        Self {
            kernel: kernel.clone(),
            vp: 0,
        }
    }

    /// The same, made on another VP.
    #[must_use]
    pub fn on(&self, vp: u32) -> Self {
        Self {
            kernel: self.kernel.clone(),
            vp,
        }
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// Any call with any input, the output right behind it in the same page, as Linux does.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the call faults.
    pub fn call(&self, control: u64, input: &[u8]) -> Result<Answer, Failure> {
        let vm = self.kernel.vm();
        let at = self.kernel.input(self.vp);
        let room = (PAGE as usize - OUTPUT).min(input.len().next_multiple_of(8));
        let behind = at + room as u64;
        vm.write(behind, &[0xee; OUTPUT])?;
        vm.write(at, input)?;
        let returned = self.kernel.call(self.vp, control, at, behind)?;
        let output = match input.len() <= room {
            true => vm.read(behind, OUTPUT)?,
            false => Vec::new(),
        };
        Ok(Answer {
            status: returned.rax as u16,
            done: (returned.rax >> 32) as u16,
            output,
        })
    }

    /// CREATE.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the call faults, as for the calls below.
    pub fn create(&self, number: u32) -> Result<u16, Failure> {
        let input = create_input(number, 0);
        Ok(self.call(code::CREATE, &input.0)?.status)
    }

    /// DELETE.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn delete(&self, number: u32) -> Result<u16, Failure> {
        let input = delete_input(number);
        Ok(self.call(code::DELETE, &input.0)?.status)
    }

    /// ATTACH to a first-stage domain.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn attach(&self, number: u32, device: u64) -> Result<u16, Failure> {
        let input = attach_input(first_stage(number), device);
        Ok(self.call(code::ATTACH, &input.0)?.status)
    }

    /// DETACH.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn detach(&self, device: u64) -> Result<u16, Failure> {
        let input = detach_input(device);
        Ok(self.call(code::DETACH, &input.0)?.status)
    }

    /// CONFIGURE.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn configure(&self, number: u32, flags: u64, root: u64) -> Result<u16, Failure> {
        let input = configure_input(number, flags, root);
        Ok(self.call(code::CONFIGURE, &input.0)?.status)
    }

    /// CONFIGURE with the tables of `tables`.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn translate(&self, number: u32, tables: &Tables) -> Result<u16, Failure> {
        self.configure(number, tables.flags(), tables.root())
    }

    /// FLUSH of a first-stage domain.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn flush(&self, number: u32) -> Result<u16, Failure> {
        let input = flush_input(first_stage(number));
        Ok(self.call(code::FLUSH, &input.0)?.status)
    }

    /// FLUSH_LIST of a first-stage domain: status and elements done.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn flush_list(&self, number: u32, elements: &[u64]) -> Result<(u16, u16), Failure> {
        let input = flush_list_input(first_stage(number), elements);
        let control = code::FLUSH_LIST | (elements.len() as u64) << 32;
        let answer = self.call(control, &input.0)?;
        Ok((answer.status, answer.done))
    }

    /// FLUSH_LIST of one element, which must succeed.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn flush_range(&self, number: u32, iova: u64, shift: u64) -> Result<(), Failure> {
        let answer = self.flush_list(number, &[element(iova, shift)])?;
        equal("status and elements of FLUSH_LIST", answer, (0, 1))
    }

    /// GET_IOMMU_CAPABILITIES: the status, and on success the output.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the call faults.
    pub fn capabilities(&self) -> Result<Result<Capabilities, u16>, Failure> {
        let answer = self.call(code::CAPABILITIES, &capabilities_input().0)?;
        if answer.status != status::SUCCESS {
            return Ok(Err(answer.status));
        }
        let output = answer.output;
        Ok(Ok(Capabilities {
            size: u32_at(&output, 0),
            width: output[6],
            pasid_width: output[7],
            bits: u64_at(&output, 8),
            page_sizes: u64_at(&output, 16),
        }))
    }

    /// GET_LOGICAL_DEVICE_PROPERTY, whether the function is behind the pvIOMMU: the status, or the
    /// answer.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the call faults.
    pub fn is_behind(&self, device: u64) -> Result<Result<u64, u16>, Failure> {
        let input = property_input(device, PROPERTY_PVIOMMU);
        let answer = self.call(code::PROPERTY, &input.0)?;
        Ok(match answer.status {
            status::SUCCESS => Ok(u64_at(&answer.output, 0)),
            refused => Err(refused),
        })
    }
}

/// First-stage tables in the guest's RAM.
#[derive(Debug, Clone)]
pub struct Tables {
    vm: Vm,
    levels: u32,
    root: u64,
    /// Where the next table goes; 0 leaves it to the guest's page allocator.
    next: Arc<AtomicU64>,
}

impl Tables {
    /// Empty tables of 4 or 5 levels.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn new(vm: &Vm, levels: u32) -> Result<Self, Failure> {
        Ok(Self {
            vm: vm.clone(),
            levels,
            root: vm.pages(1)?,
            next: Arc::default(),
        })
    }

    /// Empty tables in the pages from `gpa` on.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn at(vm: &Vm, levels: u32, gpa: u64) -> Result<Self, Failure> {
        vm.ram().fill(gpa, PAGE, 0)?;
        Ok(Self {
            vm: vm.clone(),
            levels,
            root: gpa,
            next: Arc::new(AtomicU64::new(gpa + PAGE)),
        })
    }

    /// GPA of the root.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Flags of a CONFIGURE that names these tables.
    pub fn flags(&self) -> u64 {
        let five = u64::from(self.levels == 5) * configure::FIVE_LEVELS;
        configure::ENABLED | five
    }

    fn page(&self) -> Result<u64, Failure> {
        match self.next.load(Ordering::Relaxed) {
            0 => self.vm.pages(1),
            _ => {
                let gpa = self.next.fetch_add(PAGE, Ordering::Relaxed);
                self.vm.ram().fill(gpa, PAGE, 0)?;
                Ok(gpa)
            }
        }
    }

    /// GPA of the entry of `level` (1 maps 4 KiB) for an address. Tables on the way are made where
    /// there are none.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn place(&self, iova: u64, level: u32) -> Result<u64, Failure> {
        let mut table = self.root;
        for now in (level..=self.levels).rev() {
            let at = table + (iova >> (12 + 9 * (now - 1)) & 0x1ff) * 8;
            if now == level {
                return Ok(at);
            }
            let mut entry = self.load(at)?;
            if entry & bit::P == 0 {
                entry = self.page()? | bit::TABLE;
                self.store(at, entry)?;
            }
            table = entry & bit::ADDRESS;
        }
        Err(Failure::Host(format!("tables have no level {level}")))
    }

    fn load(&self, at: u64) -> Result<u64, Failure> {
        Ok(self.vm.ram().load_u64(at, Ordering::SeqCst)?)
    }

    fn store(&self, at: u64, entry: u64) -> Result<(), Failure> {
        Ok(self.vm.ram().store_u64(at, entry, Ordering::SeqCst)?)
    }

    /// The entry of `level` for an address.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn entry(&self, iova: u64, level: u32) -> Result<u64, Failure> {
        self.load(self.place(iova, level)?)
    }

    /// Stores the entry of `level` for an address.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn set(&self, iova: u64, level: u32, entry: u64) -> Result<(), Failure> {
        self.store(self.place(iova, level)?, entry)
    }

    /// Maps a writable page of 4 KiB, as Linux does: no call is needed.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn map(&self, iova: u64, gpa: u64) -> Result<(), Failure> {
        self.set(iova, 1, gpa | bit::PAGE)
    }

    /// Clears the entry of a page of 4 KiB. A flush has to follow.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn unmap(&self, iova: u64) -> Result<(), Failure> {
        self.set(iova, 1, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_have_the_documented_sizes() {
        let inputs = [
            create_input(1, 0),
            attach_input(first_stage(1), 2),
            detach_input(2),
            delete_input(1),
            configure_input(1, 0, 0),
            flush_input(first_stage(1)),
            flush_list_input(first_stage(1), &[]),
            capabilities_input(),
            property_input(2, PROPERTY_PVIOMMU),
        ];
        for (input, (code, size)) in inputs.iter().zip(code::ALL) {
            assert_eq!(input.0.len(), size, "{code:#x}");
        }
        assert_eq!(flush_list_input(0, &[0; MOST_ELEMENTS]).0.len(), 4096);
        assert_eq!(element(0x1_2345_6789, 9), 0x1_2345_6009);
        assert_eq!(first_stage(3), 0x3_0000_0001);
    }
}
