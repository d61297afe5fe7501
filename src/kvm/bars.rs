//! BARs of host devices as KVM memory slots.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use crate::mem::DeviceMemory;
use crate::vmm::BarMapper;
use crate::vpci::lock;

/// Maps pieces of BARs by a memory slot each.
pub struct KvmBarMapper {
    vm: Arc<VmFd>,
    ids: Range<u32>,
    /// By guest physical address.
    slots: Mutex<BTreeMap<u64, Slot>>,
}

/// A slot that is in place. It keeps its memory mapped into this process.
#[derive(Debug)]
struct Slot {
    id: u32,
    _memory: Arc<DeviceMemory>,
}

impl fmt::Debug for KvmBarMapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmBarMapper")
            .field("ids", &self.ids)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

impl KvmBarMapper {
    /// With the slot ids `ids`, which nothing else of the VM uses.
    pub fn new(vm: Arc<VmFd>, ids: Range<u32>) -> Self {
        Self {
            vm,
            ids,
            slots: Mutex::default(),
        }
    }
}

impl BarMapper for KvmBarMapper {
    fn map(&self, gpa: u64, memory: &Arc<DeviceMemory>, offset: u64, len: u64) -> io::Result<()> {
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= memory.len() as u64);
        let mut slots = lock(&self.slots);
        if !inside || slots.contains_key(&gpa) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let free = |id: &u32| !slots.values().any(|slot| slot.id == *id);
        let id = self.ids.clone().find(free).ok_or_else(|| {
            let max = self.ids.len();
            io::Error::other(format!("the VM has its {max} slots for BARs already"))
        })?;
        let region = kvm_userspace_memory_region {
            slot: id,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: memory.as_ptr() as u64 + offset,
        };
        // SAFETY: the slot covers a part of the mapping of `memory`, which the slot's entry below
        // keeps in place until KVM has let go of it; the mapping is a device's, no object of this
        // process is in it.
        unsafe { self.vm.set_user_memory_region(region) }?;
        let _memory = memory.clone();
        slots.insert(gpa, Slot { id, _memory });
        Ok(())
    }

    fn unmap(&self, gpa: u64) -> io::Result<()> {
        let mut slots = lock(&self.slots);
        let Some(slot) = slots.get(&gpa) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            ..Default::default()
        };
        // SAFETY: a size of 0 takes the slot away; no memory of this process is named.
        unsafe { self.vm.set_user_memory_region(region) }?;
        slots.remove(&gpa);
        Ok(())
    }
}

impl Drop for KvmBarMapper {
    fn drop(&mut self) {
        let places: Vec<u64> = lock(&self.slots).keys().copied().collect();
        for gpa in places {
            if let Err(error) = self.unmap(gpa) {
                // Its memory must then stay where it is.
                log::error!("BAR memory at {gpa:#x} stays mapped: {error}");
                if let Some(slot) = lock(&self.slots).remove(&gpa) {
                    std::mem::forget(slot);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;
    use std::os::fd::AsFd;

    #[test]
    fn pieces_are_mapped_apart_up_to_the_limit_and_come_back() {
        let Ok(kvm) = Kvm::new() else {
            println!("SKIPPED pieces_are_mapped_apart_up_to_the_limit_and_come_back: no /dev/kvm");
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        let memory = Arc::new(DeviceMemory::map(file.as_fd(), 0, 0x4000).unwrap());
        let mapper = KvmBarMapper::new(vm, 100..102);
        mapper.map(0x10_0000, &memory, 0, 0x2000).unwrap();
        let map = |gpa, offset, len| mapper.map(gpa, &memory, offset, len).unwrap_err();
        // KVM refuses what overlaps.
        assert_eq!(map(0x10_1000, 0, 0x1000).raw_os_error(), Some(17));
        assert_eq!(
            map(0x20_0000, 0x3000, 0x2000).kind(),
            io::ErrorKind::InvalidInput
        );
        assert_eq!(
            map(0x20_0000, u64::MAX, 0x1000).kind(),
            io::ErrorKind::InvalidInput
        );
        mapper.map(0x10_2000, &memory, 0x3000, 0x1000).unwrap();
        let full = map(0x20_0000, 0, 0x1000);
        assert!(full.to_string().contains("2 slots"), "{full}");
        mapper.unmap(0x10_0000).unwrap();
        let gone = mapper.unmap(0x10_0000).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
        mapper.map(0x10_1000, &memory, 0, 0x1000).unwrap();
        assert_eq!(Arc::strong_count(&memory), 3);
        drop(mapper);
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
