//! Lines of host devices into the guest: an irqfd each, and a route to an MSI.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MSI_VALID_DEVID, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::msi::to_kvm;
use crate::vmm::{HostLine, HostLines, Msi};
use crate::vpci::lock;

/// Lines that a VM can have unless its VMM says otherwise. KVM takes the table of routes as a whole,
/// so that each move of an interrupt costs more the more there are: 0.3 to 1.2 ms at this number
/// (docs/spec/kvm.md, section 8).
pub const DEFAULT_MAX_LINES: u32 = 512;

/// The VM's table of interrupt routes, which KVM takes as a whole: shared by all of the VMM that has
/// routes in it. [`KvmRoutes`] is one for a VMM that has no other.
pub trait RouteTable: Send + Sync + fmt::Debug {
    /// Reserves a GSI; it has no route yet.
    ///
    /// # Errors
    ///
    /// The VM has as many as it can have.
    fn add(&self) -> io::Result<u32>;
    /// Routes a GSI to a message. When this returns, what is signalled goes there.
    ///
    /// # Errors
    ///
    /// KVM's error; the former route is in force.
    fn set(&self, gsi: u32, to: Msi) -> io::Result<()>;
    /// Gives a GSI back, on which no irqfd is any more.
    fn remove(&self, gsi: u32);
}

/// A [`RouteTable`] with some entries that never change, and messages behind them.
pub struct KvmRoutes {
    vm: Arc<VmFd>,
    fixed: Vec<kvm_irq_routing_entry>,
    first: u32,
    max: u32,
    /// By GSI; `None` for one without a route.
    messages: Mutex<BTreeMap<u32, Option<Msi>>>,
}

impl fmt::Debug for KvmRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmRoutes")
            .field("first", &self.first)
            .field("messages", &self.messages)
            .finish_non_exhaustive()
    }
}

impl KvmRoutes {
    /// A table with the entries `fixed`, and room for `max` messages on the GSIs from `first` on. KVM
    /// hears of it with the first message.
    pub fn new(vm: Arc<VmFd>, fixed: Vec<kvm_irq_routing_entry>, first: u32, max: u32) -> Self {
        Self {
            vm,
            fixed,
            first,
            max,
            messages: Mutex::default(),
        }
    }

    /// Gives KVM the table.
    fn commit(&self, messages: &BTreeMap<u32, Option<Msi>>) -> io::Result<()> {
        let mut entries = self.fixed.clone();
        let routed = messages.iter().filter_map(|(gsi, to)| Some((*gsi, (*to)?)));
        entries.extend(routed.map(|(gsi, to)| entry(gsi, to)));
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }
}

impl RouteTable for KvmRoutes {
    fn add(&self) -> io::Result<u32> {
        let mut messages = lock(&self.messages);
        let mut gsis = self.first..self.first.saturating_add(self.max);
        let gsi = gsis
            .find(|gsi| !messages.contains_key(gsi))
            .ok_or_else(|| {
                let max = self.max;
                io::Error::other(format!("the VM has its {max} interrupt lines already"))
            })?;
        messages.insert(gsi, None);
        Ok(gsi)
    }

    fn set(&self, gsi: u32, to: Msi) -> io::Result<()> {
        let mut messages = lock(&self.messages);
        let former = messages.insert(gsi, Some(to));
        if former == Some(Some(to)) {
            return Ok(());
        }
        let committed = self.commit(&messages);
        if committed.is_err() {
            messages.insert(gsi, former.flatten());
        }
        committed
    }

    fn remove(&self, gsi: u32) {
        // KVM's copy goes with the next change: nothing signals the GSI meanwhile.
        lock(&self.messages).remove(&gsi);
    }
}

fn entry(gsi: u32, to: Msi) -> kvm_irq_routing_entry {
    let msi = to_kvm(to);
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        flags: msi.flags & KVM_MSI_VALID_DEVID,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: msi.address_lo,
        address_hi: msi.address_hi,
        data: msi.data,
        ..Default::default()
    };
    entry
}

/// Makes lines of irqfds on the GSIs of a [`RouteTable`].
pub struct KvmLines {
    vm: Arc<VmFd>,
    routes: Arc<dyn RouteTable>,
}

impl fmt::Debug for KvmLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmLines")
            .field("routes", &self.routes)
            .finish_non_exhaustive()
    }
}

impl KvmLines {
    /// For the VM behind `vm`.
    pub fn new(vm: Arc<VmFd>, routes: Arc<dyn RouteTable>) -> Self {
        Self { vm, routes }
    }
}

impl HostLines for KvmLines {
    fn add(&self) -> io::Result<Arc<dyn HostLine>> {
        let eventfd = EventFd::new(EFD_NONBLOCK)?;
        Ok(Arc::new(KvmLine {
            vm: self.vm.clone(),
            gsi: self.routes.add()?,
            routes: self.routes.clone(),
            eventfd,
            attached: Mutex::new(false),
        }))
    }
}

/// An irqfd that is attached while its line leads somewhere. While it is not, signals stay in the
/// eventfd, and attaching it delivers them (kernel: virt/kvm/eventfd.c, kvm_irqfd_assign).
struct KvmLine {
    vm: Arc<VmFd>,
    routes: Arc<dyn RouteTable>,
    gsi: u32,
    eventfd: EventFd,
    attached: Mutex<bool>,
}

impl fmt::Debug for KvmLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmLine")
            .field("gsi", &self.gsi)
            .field("attached", &self.attached)
            .finish_non_exhaustive()
    }
}

impl KvmLine {
    /// KVM waits for an injection under way.
    fn detach(&self, attached: &mut bool) {
        if std::mem::take(attached)
            && let Err(error) = self.vm.unregister_irqfd(&self.eventfd, self.gsi)
        {
            log::error!("GSI {} stays connected: {error}", self.gsi);
        }
    }
}

impl HostLine for KvmLine {
    fn eventfd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is that of `self.eventfd`, which is closed when `self` is dropped; the
        // result borrows `self`.
        unsafe { BorrowedFd::borrow_raw(self.eventfd.as_raw_fd()) }
    }

    fn connect(&self, to: Msi) -> io::Result<()> {
        let mut attached = lock(&self.attached);
        if let Err(error) = self.routes.set(self.gsi, to) {
            self.detach(&mut attached);
            return Err(error);
        }
        if !*attached {
            self.vm.register_irqfd(&self.eventfd, self.gsi)?;
            *attached = true;
        }
        Ok(())
    }

    fn disconnect(&self) {
        self.detach(&mut lock(&self.attached));
    }

    fn is_pending(&self) -> bool {
        let attached = lock(&self.attached);
        let eventfd = self.eventfd();
        let mut fds = [PollFd::new(&eventfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // While it is attached KVM takes each signal at once.
        !*attached && matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }

    fn discard(&self) {
        let attached = lock(&self.attached);
        if !*attached {
            // Fails only if there is nothing.
            let _ = self.eventfd.read();
        }
    }
}

impl Drop for KvmLine {
    fn drop(&mut self) {
        self.disconnect();
        self.routes.remove(self.gsi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::{Kvm, VcpuFd};

    /// Offsets in the register page of a local APIC: spurious-interrupt vector, interrupt requests.
    const SPIV: usize = 0xf0;
    const IRR: usize = 0x200;

    /// A VM with one vCPU, whose local APIC is on.
    fn vm() -> Option<(Arc<VmFd>, VcpuFd)> {
        let kvm = Kvm::new().ok()?;
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut apic = vcpu.get_lapic().unwrap();
        apic.regs[SPIV + 1] |= 1;
        vcpu.set_lapic(&apic).unwrap();
        Some((Arc::new(vm), vcpu))
    }

    /// Vectors that wait in the local APIC, which then forgets them.
    fn take_requests(vcpu: &VcpuFd) -> Vec<u8> {
        let mut apic = vcpu.get_lapic().unwrap();
        let mut vectors = Vec::new();
        for vector in 0..=255u8 {
            let at = IRR + usize::from(vector) / 32 * 16 + usize::from(vector) % 32 / 8;
            let bit = 1 << (vector % 8);
            if apic.regs[at] as u8 & bit != 0 {
                vectors.push(vector);
                apic.regs[at] = (apic.regs[at] as u8 & !bit) as _;
            }
        }
        vcpu.set_lapic(&apic).unwrap();
        vectors
    }

    /// KVM may deliver from a work queue.
    fn wait_for(vcpu: &VcpuFd, vector: u8) {
        for _ in 0..1000 {
            match take_requests(vcpu).as_slice() {
                [] => std::thread::sleep(std::time::Duration::from_millis(1)),
                found => return assert_eq!(found, [vector]),
            }
        }
        panic!("vector {vector:#x} never came");
    }

    fn signal(line: &dyn HostLine) {
        rustix::io::write(line.eventfd(), &1u64.to_ne_bytes()).unwrap();
    }

    #[test]
    fn a_line_keeps_what_comes_while_it_leads_nowhere_and_follows_its_route() {
        let Some((vm, vcpu)) = vm() else {
            println!(
                "SKIPPED a_line_keeps_what_comes_while_it_leads_nowhere_and_follows_its_route: \
                 no /dev/kvm"
            );
            return;
        };
        let routes = Arc::new(KvmRoutes::new(vm.clone(), Vec::new(), 24, 2));
        let lines = KvmLines::new(vm, routes);
        let line = lines.add().unwrap();
        signal(&*line);
        signal(&*line);
        assert!(line.is_pending());
        assert!(take_requests(&vcpu).is_empty());
        line.connect(Msi::fixed(0, 0x51)).unwrap();
        wait_for(&vcpu, 0x51);
        assert!(!line.is_pending());
        signal(&*line);
        wait_for(&vcpu, 0x51);
        line.connect(Msi::fixed(0, 0x62)).unwrap();
        signal(&*line);
        wait_for(&vcpu, 0x62);
        line.disconnect();
        signal(&*line);
        assert!(line.is_pending());
        line.discard();
        assert!(!line.is_pending());
        line.connect(Msi::fixed(0, 0x73)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(take_requests(&vcpu).is_empty());
    }

    #[test]
    fn a_vm_has_its_lines_and_no_more_and_gets_dropped_ones_back() {
        let Some((vm, vcpu)) = vm() else {
            println!(
                "SKIPPED a_vm_has_its_lines_and_no_more_and_gets_dropped_ones_back: no /dev/kvm"
            );
            return;
        };
        let routes = Arc::new(KvmRoutes::new(vm.clone(), Vec::new(), 24, 2));
        let lines = KvmLines::new(vm, routes);
        let first = lines.add().unwrap();
        let second = lines.add().unwrap();
        let error = lines.add().unwrap_err();
        assert!(error.to_string().contains("2 interrupt lines"), "{error}");
        first.connect(Msi::fixed(0, 0x31)).unwrap();
        second.connect(Msi::fixed(0, 0x32)).unwrap();
        drop(first);
        let third = lines.add().unwrap();
        third.connect(Msi::fixed(0, 0x33)).unwrap();
        signal(&*second);
        wait_for(&vcpu, 0x32);
        signal(&*third);
        wait_for(&vcpu, 0x33);
    }
}
