//! A device that checks plug in where `testdev` has not the shape they need, or where they must
//! act as the device.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use vm_vpci::vpci::function::{
    BarSpec, Capability, FunctionLayout, FunctionResources, MsiSpec, PciFunction, PciIdentity,
};

use crate::host::{BusSetup, FunctionSetup};

/// Vendor id.
pub const VENDOR: u16 = 0x1234;
/// Device id.
pub const DEVICE: u16 = 0x5651;
/// How long a reset is held at most: then whoever held it has failed.
const LONGEST_HOLD: Duration = Duration::from_secs(60);

/// Whether the device's reset waits.
#[derive(Debug, Default)]
struct Hold {
    wanted: bool,
    held: bool,
}

/// A device of any layout. Loads from a BAR tell which register was met, see [`Plain::value`];
/// stores do nothing. The check raises its interrupts and can hold up its reset.
#[derive(Debug)]
pub struct Plain {
    layout: FunctionLayout,
    resources: OnceLock<FunctionResources>,
    resets: AtomicU64,
    hold: Mutex<Hold>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Plain {
    /// A device with this layout. Its identity is filled in.
    pub fn new(layout: FunctionLayout) -> Arc<Self> {
        Arc::new(Self {
            layout: FunctionLayout {
                kind: "plain",
                identity: PciIdentity {
                    vendor: VENDOR,
                    device: DEVICE,
                    revision: 0x5a,
                    prog_if: 0x33,
                    subclass: 0x22,
                    base_class: 0xff,
                    subsystem_vendor: 0x1af4,
                    subsystem: 0x0042,
                    serial: 0xc0ff_ee01,
                },
                ..layout
            },
            resources: OnceLock::new(),
            resets: AtomicU64::new(0),
            hold: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// A device with one BAR of each shape: 0 is 32-bit and 64 KiB, 1 is 64-bit, prefetchable and
    /// 16 KiB, 3 is 64-bit and 1 GiB, 5 is 32-bit and 4 KiB; a vendor-specific capability of eight
    /// bytes of which the second four can be written; 32 MSI messages.
    pub fn wide() -> Arc<Self> {
        let memory64 = |size, prefetchable| BarSpec::Memory64 { size, prefetchable };
        Self::new(FunctionLayout {
            bars: [
                BarSpec::Memory32 { size: 0x1_0000 },
                memory64(0x4000, true),
                BarSpec::None,
                memory64(1 << 30, false),
                BarSpec::None,
                BarSpec::Memory32 { size: 0x1000 },
            ],
            capabilities: vec![Capability {
                id: 9,
                body: vec![10, 0xa1, 0xa2, 0xa3, 0xa4, 0, 0, 0, 0, 0],
                writable: vec![0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            }],
            msi: Some(MsiSpec { messages: 32 }),
            ..FunctionLayout::default()
        })
    }

    /// This device as function `number` of one VM.
    pub fn function(self: &Arc<Self>, number: u8) -> FunctionSetup {
        let device = self.clone();
        FunctionSetup::new(number, move |_workers| Ok(device.clone()))
    }

    /// The bus `number` with this device as its function 0.
    pub fn bus(self: &Arc<Self>, number: u16) -> BusSetup {
        BusSetup {
            instance: BusSetup::instance(number),
            functions: vec![self.function(0)],
        }
    }

    /// What a load of four bytes from `offset` of BAR `bar` reads.
    pub fn value(bar: u8, offset: u64) -> u64 {
        0xb000_0000 | u64::from(bar) << 24 | offset & 0xff_ffff
    }

    /// The device signals a vector.
    pub fn raise(&self, vector: u16) {
        if let Some(resources) = self.resources.get() {
            resources.interrupts.raise(vector);
        }
    }

    /// The device writes to guest memory. False if it was not let.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        let resources = self.resources.get();
        resources.is_some_and(|resources| resources.dma.write(gpa, bytes).is_ok())
    }

    /// How often the host has reset the device.
    pub fn resets(&self) -> u64 {
        self.resets.load(Ordering::SeqCst)
    }

    /// From now on a reset of the device takes until [`Plain::let_go`].
    pub fn hold_resets(&self) {
        lock(&self.hold).wanted = true;
    }

    /// Waits until a reset is held up. False if none comes.
    pub fn is_held(&self) -> bool {
        let hold = lock(&self.hold);
        let waited = self
            .changed
            .wait_timeout_while(hold, LONGEST_HOLD, |hold| !hold.held);
        waited.unwrap_or_else(PoisonError::into_inner).0.held
    }

    /// Lets resets go on.
    pub fn let_go(&self) {
        lock(&self.hold).wanted = false;
        self.changed.notify_all();
    }
}

impl PciFunction for Plain {
    fn layout(&self) -> FunctionLayout {
        self.layout.clone()
    }

    fn connect(&self, resources: FunctionResources) {
        // A second VM gets nothing: the device stays with its first.
        let _ = self.resources.set(resources);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let value = Self::value(bar, offset).to_le_bytes();
        let len = data.len().min(8);
        data[..len].copy_from_slice(&value[..len]);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
        let mut hold = lock(&self.hold);
        if !hold.wanted {
            return;
        }
        hold.held = true;
        self.changed.notify_all();
        let waited = self
            .changed
            .wait_timeout_while(hold, LONGEST_HOLD, |hold| hold.wanted);
        waited.unwrap_or_else(PoisonError::into_inner).0.held = false;
    }
}
