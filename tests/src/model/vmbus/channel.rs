//! An open channel.
#![forbid(unsafe_code)]

use super::{Offer, Open, VmBus};
use crate::check::{Failure, equal};
use crate::model::kernel::{VMBUS_SINT, status};
use crate::model::ring::{Packet, Ring};

/// An open channel.
#[derive(Debug, Clone)]
pub struct Channel {
    pub(super) vmbus: VmBus,
    /// What it was opened from.
    pub offer: Offer,
    /// VP that takes its interrupts.
    pub vp: u32,
    /// GPADL of its rings.
    pub gpadl: u32,
    /// Guest-to-host ring.
    pub to_host: Ring,
    /// Host-to-guest ring.
    pub to_guest: Ring,
}

impl Channel {
    /// The channel that the host has opened for `open`, its rings over these pages.
    pub fn new(vmbus: &VmBus, offer: &Offer, open: &Open, rings: [&[u64]; 2]) -> Self {
        let [to_host, to_guest] = rings.map(|pfns| Ring::new(vmbus.vm(), pfns));
        Self {
            vmbus: vmbus.clone(),
            offer: offer.clone(),
            vp: open.vp,
            gpadl: open.gpadl,
            to_host,
            to_guest,
        }
    }

    /// The driver.
    pub fn vmbus(&self) -> &VmBus {
        &self.vmbus
    }

    /// Signals the host; returns the status of the hypercall.
    ///
    /// # Errors
    ///
    /// [`Failure`] if it faults.
    pub fn signal(&self) -> Result<u16, Failure> {
        self.vmbus
            .kernel()
            .signal(self.vp, self.offer.connection, 0)
    }

    /// Sends a packet, and signals the host if it wants that. There must be room.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn send(&self, packet: &Packet) -> Result<(), Failure> {
        match self.to_host.send(packet)? {
            None => Err(Failure::Unmet {
                what: "guest-to-host ring".into(),
                expected: "room for a packet".into(),
                got: format!("{} bytes free", self.to_host.free()?),
            }),
            Some(true) => equal("status of HvSignalEvent", self.signal()?, status::SUCCESS),
            Some(false) => Ok(()),
        }
    }

    /// Everything the host has sent, once it has come to rest. Signals the host where it waits for
    /// room.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn receive(&self) -> Result<Vec<Packet>, Failure> {
        let mut packets = Vec::new();
        loop {
            self.vmbus.vm().settle();
            let Some((packet, signal)) = self.to_guest.receive()? else {
                return Ok(packets);
            };
            packets.push(packet);
            if signal {
                equal("status of HvSignalEvent", self.signal()?, status::SUCCESS)?;
            }
        }
    }

    /// Closes the channel and takes its rings back, as Linux does.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn close(&self) -> Result<(), Failure> {
        self.vmbus.send_close(self.offer.relid)?;
        self.vmbus.tear_down(self.offer.relid, self.gpadl)
    }

    /// Whether the host has raised the channel's interrupt since the last call: tests and clears
    /// its event flag.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn interrupted(&self) -> Result<bool, Failure> {
        self.vmbus.vm().settle();
        let synic = self.vmbus.kernel().synic(self.vp);
        synic.take_event(VMBUS_SINT, self.offer.relid as u16)
    }
}
