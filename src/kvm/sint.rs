//! SINTs of KVM's SynIC: an irqfd for each, and its place in the table of interrupt routes.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_irq_routing_entry, kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::KvmError;
use super::capability::refused;
use crate::hv::synic::VMBUS_SINT;
use crate::synic::SintLines;

/// Pins of KVM's IO-APIC, which its default routes give the GSIs of the same numbers.
pub const IRQCHIP_GSIS: u32 = 24;
/// Pins of each PIC.
const PIC_PINS: u32 = 8;

/// Lines into KVM's SynIC for the SINT on which VMBus speaks, one for each VP
/// (docs/spec/kvm.md#kvm-7-2).
///
/// Other SINTs have no line, and so are raised as MSIs: the guest cannot tell, and the table of
/// routes, which the host rewrites as a whole at each change of an MSI route, stays small.
pub struct KvmSintLines {
    lines: Vec<EventFd>,
    first_gsi: u32,
    lost: AtomicU64,
}

impl fmt::Debug for KvmSintLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmSintLines")
            .field("vps", &self.lines.len())
            .field("first_gsi", &self.first_gsi)
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

impl KvmSintLines {
    /// Lines for `vps` VPs on as many GSIs from `first_gsi` on. They are dead until the VMM puts
    /// [`KvmSintLines::routes`] into the VM's table of routes, which must be after
    /// [`HybridSupport::prepare_vcpu`](super::hybrid::HybridSupport::prepare_vcpu).
    ///
    /// # Errors
    ///
    /// [`KvmError::Refused`]: no more descriptors, or no such GSI.
    pub fn new(vm: &VmFd, vps: u32, first_gsi: u32) -> Result<Self, KvmError> {
        let line = |gsi| {
            let line = EventFd::new(EFD_NONBLOCK).map_err(|error| {
                let errno = error.raw_os_error().unwrap_or_default();
                refused("signal SINTs")(kvm_ioctls::Error::new(errno))
            })?;
            vm.register_irqfd(&line, gsi)
                .map_err(refused("connect a SINT"))?;
            Ok(line)
        };
        Ok(Self {
            lines: (first_gsi..)
                .take(vps as usize)
                .map(line)
                .collect::<Result<_, _>>()?,
            first_gsi,
            lost: AtomicU64::new(0),
        })
    }

    /// The entries of the table of routes.
    pub fn routes(&self) -> Vec<kvm_irq_routing_entry> {
        let vps = self.lines.len() as u32;
        (0..vps)
            .map(|vp| sint_route(self.first_gsi + vp, vp))
            .collect()
    }

    /// Signals that the host did not take: none, unless its descriptors are broken.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl SintLines for KvmSintLines {
    fn raise(&self, vp: u32, sint: u8) -> bool {
        let line = self.lines.get(vp as usize).filter(|_| sint == VMBUS_SINT);
        let Some(line) = line else {
            return false;
        };
        // KVM takes the signal while it is being written; a counter that is full is one all the same.
        match line.write(1) {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => true,
            Err(error) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                log::debug!("SINT of VP {vp}: {error}");
                false
            }
        }
    }
}

fn sint_route(gsi: u32, vcpu: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_HV_SINT,
        ..Default::default()
    };
    entry.u.hv_sint = kvm_irq_routing_hv_sint {
        vcpu,
        sint: VMBUS_SINT.into(),
    };
    entry
}

/// The routes that a VM with KVM's own PICs and IO-APIC has until it gets others: a VMM that sets a
/// table of its own keeps them (kernel: arch/x86/kvm/irq.c, kvm_setup_default_ioapic_and_pic_routing).
pub fn irqchip_routes() -> Vec<kvm_irq_routing_entry> {
    let route = |gsi, irqchip, pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let ioapic = (0..IRQCHIP_GSIS).map(|gsi| route(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    let pics = (0..2 * PIC_PINS).map(|gsi| match gsi / PIC_PINS {
        0 => route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi % PIC_PINS),
    });
    ioapic.chain(pics).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pin_keeps_its_default_route() {
        let routes = irqchip_routes();
        assert_eq!(routes.len(), 40);
        assert!(routes.iter().all(|entry| entry.type_ == 1));
        let of = |gsi| routes.iter().filter(move |entry| entry.gsi == gsi).count();
        assert_eq!((of(4), of(15), of(16), of(23), of(24)), (2, 2, 1, 1, 0));
    }

    #[test]
    fn a_sint_route_names_the_vp_and_the_sint() {
        let entry = sint_route(25, 1);
        assert_eq!((entry.gsi, entry.type_, entry.flags), (25, 4, 0));
    }
}
