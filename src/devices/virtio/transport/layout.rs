//! What the transport says of itself in the configuration space: identity, structures, doorbells,
//! and the window on the BARs.
#![forbid(unsafe_code)]

use log::warn;

use super::{
    BAR, BAR_SIZE, COMMON_PAGE, DEVICE_PAGE, ISR_PAGE, MSIX_PBA_PAGE, MSIX_TABLE_PAGE,
    NOTIFY_MULTIPLIER, NOTIFY_PAGE, PAGE, VirtioPci,
};
use crate::devices::virtio::spec::{
    CapType, PCI_CAP_VENDOR, PCI_DEVICE_BASE, PCI_REVISION, PCI_VENDOR, common,
};
use crate::vpci::function::{
    BarSpec, Capability, DoorbellRegister, FunctionLayout, MsixSpec, PciIdentity,
};

/// Place of the data register in the body of the window capability.
const WINDOW_DATA: usize = 14;

impl VirtioPci {
    pub(in crate::devices::virtio) fn layout(&self) -> FunctionLayout {
        let device = PCI_DEVICE_BASE + self.spec.id;
        let mut layout = FunctionLayout {
            kind: self.spec.kind,
            identity: PciIdentity {
                vendor: PCI_VENDOR,
                device,
                revision: PCI_REVISION,
                prog_if: 0,
                subclass: self.spec.class.1,
                base_class: self.spec.class.0,
                subsystem_vendor: PCI_VENDOR,
                subsystem: device,
                serial: 0,
            },
            capabilities: vec![
                structure(CapType::Common, COMMON_PAGE, common::LEN as u32, &[]),
                structure(
                    CapType::Notify,
                    NOTIFY_PAGE,
                    u32::from(self.spec.queues) * NOTIFY_MULTIPLIER,
                    &NOTIFY_MULTIPLIER.to_le_bytes(),
                ),
                structure(CapType::Isr, ISR_PAGE, 1, &[]),
            ],
            msix: Some(MsixSpec {
                vectors: self.spec.vectors(),
                table_bar: BAR,
                table_offset: (MSIX_TABLE_PAGE * PAGE) as u32,
                pba_bar: BAR,
                pba_offset: (MSIX_PBA_PAGE * PAGE) as u32,
            }),
            ..FunctionLayout::default()
        };
        layout.bars[usize::from(BAR)] = BarSpec::Memory64 {
            size: BAR_SIZE,
            prefetchable: false,
        };
        if !self.spec.config.is_empty() {
            let len = self.spec.config.len() as u32;
            let device = structure(CapType::Device, DEVICE_PAGE, len, &[]);
            layout.capabilities.push(device);
        }
        layout.capabilities.push(window());
        layout
    }

    /// The registers that the window capability selects, and where in them it looks.
    fn window_target(&self, body: &[u8], offset: usize) -> Option<(u64, usize)> {
        let word = |at: usize| {
            let bytes = body.get(at..at + 4)?.try_into().ok()?;
            Some(u32::from_le_bytes(bytes))
        };
        let is_window = body.get(1) == Some(&(CapType::Pci as u8)) && offset == WINDOW_DATA;
        let (at, len) = (u64::from(word(6)?), word(10)?);
        let valid = matches!(len, 1 | 2 | 4)
            && at.is_multiple_of(u64::from(len))
            && at < BAR_SIZE
            && body[2] == BAR;
        (is_window && valid).then_some((at, len as usize))
    }

    /// A load from the window on the BARs (virtio 1.2, 4.1.4.9).
    pub(in crate::devices::virtio) fn capability_read(
        &self,
        offset: usize,
        body: &[u8],
        data: &mut [u8],
    ) {
        if let Some((at, len)) = self.window_target(body, offset) {
            let mut bytes = [0; 4];
            self.bar_read(BAR, at, &mut bytes[..len]);
            let len = data.len().min(bytes.len());
            data[..len].copy_from_slice(&bytes[..len]);
        }
    }

    /// A store to the window.
    pub(in crate::devices::virtio) fn capability_write(&self, offset: usize, body: &[u8]) {
        if let Some((at, len)) = self.window_target(body, offset)
            && let Some(data) = body.get(WINDOW_DATA..WINDOW_DATA + len)
        {
            self.bar_write(BAR, at, data);
        }
    }

    pub(in crate::devices::virtio) fn doorbells(&self) -> Vec<DoorbellRegister> {
        let mut doorbells = Vec::new();
        for (index, trigger) in self.triggers.get().into_iter().flatten().enumerate() {
            let Some(eventfd) = trigger.eventfd() else {
                continue;
            };
            match eventfd.try_clone_to_owned() {
                Ok(eventfd) => doorbells.push(DoorbellRegister {
                    bar: BAR,
                    offset: NOTIFY_PAGE * PAGE + index as u64 * u64::from(NOTIFY_MULTIPLIER),
                    len: 2,
                    data: None,
                    eventfd,
                }),
                Err(e) => warn!("virtio {}: no doorbell: {e}", self.spec.kind),
            }
        }
        doorbells
    }
}

/// A capability that says where a structure lies (virtio 1.2, 4.1.4).
fn structure(kind: CapType, page: u64, len: u32, tail: &[u8]) -> Capability {
    // The capability's id and next pointer come before `body`.
    const HEAD: u8 = 2;
    let mut body = vec![0, kind as u8, BAR, 0, 0, 0];
    body.extend_from_slice(&((page * PAGE) as u32).to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(tail);
    body[0] = body.len() as u8 + HEAD;
    Capability {
        id: PCI_CAP_VENDOR,
        writable: vec![0; body.len()],
        body,
    }
}

/// The window on the BARs: the driver selects BAR, offset and length, then loads or stores the data
/// register behind them (virtio 1.2, 4.1.4.9).
fn window() -> Capability {
    let mut window = structure(CapType::Pci, 0, 0, &[0; 4]);
    window.writable[2] = 0xff;
    window.writable[6..].fill(0xff);
    window
}
