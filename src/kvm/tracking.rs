//! Guest RAM as KVM memory slots, pages of which can be made read-only for vCPUs.
//!
//! A store to a page of a read-only slot leaves the guest as an MMIO exit with its final value
//! (docs/spec/kvm.md, section 9). Slots can only be deleted and added, and in between there is no RAM:
//! so a change closes the [run gate](crate::gate). RAM is cut into blocks beforehand, because what
//! a change costs grows with the block that it splits.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::slots::{Plan, Slot, SlotMap};
use crate::gate::{Closed, Kick, RunGate};
use crate::mem::RamMap;
use crate::vmm::TrackedPages;

/// Least size of a block.
const MIN_BLOCK: u64 = 16 << 20;
/// Blocks that RAM is cut into, about: KVM looks slots up at each fault.
const BLOCKS: u64 = 1024;
/// Time between kicks of a vCPU that does not leave the guest.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// The RAM of a VM, in the VM.
pub struct KvmRam {
    vm: Arc<VmFd>,
    /// Keeps the memory of the slots mapped.
    ram: RamMap,
    gate: Arc<RunGate>,
    kick: Arc<dyn Kick>,
    slots: Mutex<SlotMap>,
}

impl fmt::Debug for KvmRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmRam").finish_non_exhaustive()
    }
}

impl KvmRam {
    /// Gives RAM to a VM, in slots numbered from `ids`, which nothing else of the VM uses. With
    /// `tracked` it is cut into blocks, so that making pages read-only is cheap; without, each region
    /// is one slot.
    ///
    /// A region that this process cannot write (mapped without `PROT_WRITE`) is read-only for the guest
    /// too: a store to it leaves the guest as one to an MMIO address where nothing is.
    ///
    /// The vCPUs pass `gate`, and `kick` takes them out of the guest.
    ///
    /// # Errors
    ///
    /// KVM's error, too few ids, or a read-only region on a KVM without read-only slots.
    pub fn plug(
        vm: Arc<VmFd>,
        ram: RamMap,
        ids: Range<u32>,
        tracked: bool,
        gate: Arc<RunGate>,
        kick: Arc<dyn Kick>,
    ) -> io::Result<Self> {
        let size: u64 = ram.iter().map(|region| region.len()).sum();
        let block = match tracked {
            true => (size / BLOCKS).next_power_of_two().max(MIN_BLOCK),
            false => 1 << 62,
        };
        let regions = ram.iter().map(|region| {
            let start = region.start_addr().0;
            let rom = region.prot() & libc::PROT_WRITE == 0;
            (start..start + region.len(), rom)
        });
        let regions: Vec<_> = regions.collect();
        if let Some((rom, _)) = regions.iter().find(|(_, rom)| *rom)
            && !vm.check_extension(Cap::ReadonlyMem)
        {
            let error = format!(
                "RAM at {:#x} is read-only, and KVM has no read-only memory slots",
                rom.start
            );
            return Err(io::Error::other(error));
        }
        let slots = SlotMap::new(regions.into_iter(), block, ids).map_err(io::Error::other)?;
        let plugged = Self {
            vm,
            ram,
            gate,
            kick,
            slots: Mutex::new(slots),
        };
        for slot in plugged.lock().slots() {
            plugged.add(&slot)?;
        }
        Ok(plugged)
    }

    /// The memory map.
    pub fn map(&self) -> &RamMap {
        &self.ram
    }

    /// Makes all pages writable, calls `f`, and tracks the pages again that were. All vCPUs are out of
    /// the guest, but for one that `f` may run, with its thread's own call of KVM_RUN and past the
    /// gate.
    ///
    /// # Errors
    ///
    /// KVM's error: RAM, or the tracking of some page, is lost, and the VM cannot go on.
    pub fn with_pages_writable<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let mut slots = self.lock();
        let closed = self.gate.close(&*self.kick);
        let pages = slots.readonly();
        let plan = slots.plan(&[], &pages).map_err(io::Error::other)?;
        self.carry_out(&closed, &mut slots, plan)?;
        let result = f();
        let plan = slots.plan(&pages, &[]).map_err(io::Error::other)?;
        self.carry_out(&closed, &mut slots, plan)?;
        Ok(result)
    }

    /// Calls `f`, in which this thread runs the vCPU `vcpu`, and takes it out of the guest after `time`:
    /// again and again until `f` has returned, because a kick may come too early to have an effect.
    pub(super) fn with_kick_after<T>(
        &self,
        vcpu: usize,
        time: Duration,
        f: impl FnOnce() -> T,
    ) -> io::Result<T> {
        let (running, ended) = mpsc::channel::<()>();
        let watch = move || {
            let mut time = time;
            while ended.recv_timeout(time) == Err(RecvTimeoutError::Timeout) {
                self.kick.kick(vcpu);
                time = KICK_AGAIN;
            }
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("vcpu-watch".into());
            thread.spawn_scoped(scope, watch)?;
            let result = f();
            drop(running);
            Ok(result)
        })
    }

    /// Calls `f` while no slot changes: for what looks RAM up in KVM from outside the gate.
    pub(super) fn with_slots_kept<T>(&self, f: impl FnOnce() -> T) -> T {
        let _slots = self.lock();
        f()
    }

    fn lock(&self) -> MutexGuard<'_, SlotMap> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes slots; after an error they are as before.
    fn carry_out(&self, _: &Closed<'_>, slots: &mut SlotMap, plan: Plan) -> io::Result<()> {
        let (mut deleted, mut added) = (0, 0);
        let result = (|| {
            for slot in &plan.delete {
                self.delete(slot)?;
                deleted += 1;
            }
            for slot in &plan.add {
                self.add(slot)?;
                added += 1;
            }
            Ok(())
        })();
        match result {
            Ok(()) => {
                slots.done(plan);
                Ok(())
            }
            Err(error) => {
                let undone = plan.add[..added]
                    .iter()
                    .try_for_each(|slot| self.delete(slot))
                    .and_then(|()| {
                        plan.delete[..deleted]
                            .iter()
                            .try_for_each(|slot| self.add(slot))
                    });
                if let Err(again) = undone {
                    // The guest will stop with an exit that says so.
                    log::error!("a part of the guest's RAM is lost: {error}, then {again}");
                }
                Err(error)
            }
        }
    }

    fn add(&self, slot: &Slot) -> io::Result<()> {
        let mut regions = self.ram.iter();
        let region = regions.find(|region| {
            let start = region.start_addr().0;
            start <= slot.gpa && slot.gpa + slot.len <= start + region.len()
        });
        let region = region.ok_or(io::ErrorKind::InvalidInput)?;
        let offset = slot.gpa - region.start_addr().0;
        let request = kvm_userspace_memory_region {
            slot: slot.id,
            flags: if slot.readonly { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.gpa,
            memory_size: slot.len,
            userspace_addr: region.as_ptr() as u64 + offset,
        };
        // SAFETY: the slot covers a part of one mapping of `self.ram`, which holds nothing but guest
        // memory. It stays in place as long as `self`, which takes its slots away when it is dropped.
        unsafe { self.vm.set_user_memory_region(request) }.map_err(io::Error::from)
    }

    fn delete(&self, slot: &Slot) -> io::Result<()> {
        let request = kvm_userspace_memory_region {
            slot: slot.id,
            guest_phys_addr: slot.gpa,
            ..Default::default()
        };
        // SAFETY: a size of 0 takes the slot away; no memory of this process is named.
        unsafe { self.vm.set_user_memory_region(request) }.map_err(io::Error::from)
    }
}

impl Drop for KvmRam {
    fn drop(&mut self) {
        let slots: Vec<Slot> = self.lock().slots().collect();
        for slot in slots {
            // One that was never put in place is none to take away.
            let _ = self.delete(&slot);
        }
    }
}

impl TrackedPages for KvmRam {
    fn change(&self, track: &[u64], untrack: &[u64]) -> io::Result<()> {
        if !track.is_empty() && !self.vm.check_extension(Cap::ReadonlyMem) {
            return Err(io::Error::other("KVM has no read-only memory slots"));
        }
        let mut slots = self.lock();
        let plan = slots.plan(track, untrack).map_err(io::Error::other)?;
        if plan.is_empty() {
            return Ok(());
        }
        let closed = self.gate.close(&*self.kick);
        self.carry_out(&closed, &mut slots, plan)
    }
}
