//! The interrupts that the host delivers, beside those that a device raises: the guest must not be able
//! to tell them apart.
use std::cell::Cell;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::super::handles::{HANDLE_ADDRESS, HandleError, Route, Target};
use super::super::{Interrupts, MsiRegisters, MsixControl};
use crate::vmm::{Msi, MsiSink};
use crate::vpci::function::{
    FunctionLayout, HostVectors, InterruptLines, InterruptMode, MsiSpec, MsixSpec, VectorRoute,
};
use crate::vpci::lock;

const ADDRESS: u64 = HANDLE_ADDRESS as u64;
const VECTORS: u16 = 5;

#[derive(Debug, Default)]
struct Log(Mutex<Vec<Msi>>);

impl MsiSink for Log {
    fn raise_msi(&self, msi: Msi) {
        lock(&self.0).push(msi);
    }
}

/// What a host's kernel does with the events of a device.
#[derive(Debug)]
struct Kernel {
    log: Arc<Log>,
    state: Mutex<(InterruptMode, Vec<(VectorRoute, bool)>)>,
}

impl Kernel {
    fn new(log: Arc<Log>) -> Arc<Self> {
        let vectors = vec![(VectorRoute::Dropped, false); 32];
        let state = Mutex::new((InterruptMode::Off, vectors));
        Arc::new(Self { log, state })
    }

    fn event(&self, vector: u16) {
        let vector = &mut lock(&self.state).1[usize::from(vector)];
        match vector.0 {
            VectorRoute::To(msi) => self.log.raise_msi(msi),
            VectorRoute::Held => vector.1 = true,
            VectorRoute::Dropped => {}
        }
    }
}

impl HostVectors for Kernel {
    fn set_mode(&self, mode: InterruptMode) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.0, mode) != mode {
            state.1.fill((VectorRoute::Dropped, false));
        }
    }

    fn route(&self, vector: u16, to: VectorRoute) {
        let mut state = lock(&self.state);
        let count = match state.0 {
            InterruptMode::Off => 0,
            InterruptMode::Msi { messages } => u16::from(messages),
            InterruptMode::Msix => VECTORS,
        };
        assert!(vector < count, "vector {vector} is not on");
        let (route, pending) = &mut state.1[usize::from(vector)];
        *route = to;
        match to {
            VectorRoute::To(msi) if std::mem::take(pending) => self.log.raise_msi(msi),
            VectorRoute::Dropped => *pending = false,
            VectorRoute::To(_) | VectorRoute::Held => {}
        }
    }

    fn is_pending(&self, vector: u16) -> bool {
        lock(&self.state).1[usize::from(vector)].1
    }
}

/// One function in both ways.
struct Twins {
    emulated: Interrupts,
    hosted: Interrupts,
    kernel: Arc<Kernel>,
    logs: [Arc<Log>; 2],
    messages: Cell<u8>,
}

impl Twins {
    fn new(msix: bool) -> Self {
        let layout = FunctionLayout {
            msix: msix.then_some(MsixSpec {
                vectors: VECTORS,
                table_bar: 0,
                table_offset: 0,
                pba_bar: 0,
                pba_offset: 0x1000,
            }),
            msi: (!msix).then_some(MsiSpec { messages: 4 }),
            ..FunctionLayout::default()
        };
        let logs = [Arc::new(Log::default()), Arc::new(Log::default())];
        let kernel = Kernel::new(logs[1].clone());
        let apic_ids: Arc<[u32]> = Arc::from([0, 1, 2]);
        let (sink, other) = (logs[0].clone(), Arc::new(Log::default()));
        Self {
            emulated: Interrupts::new(&layout, apic_ids.clone(), sink, None),
            hosted: Interrupts::new(&layout, apic_ids, other, Some(kernel.clone())),
            kernel,
            logs,
            messages: Cell::new(0),
        }
    }

    fn both<R: PartialEq + std::fmt::Debug>(&self, act: impl Fn(&Interrupts) -> R) -> R {
        let result = act(&self.emulated);
        assert_eq!(result, act(&self.hosted));
        result
    }

    fn event(&self, vector: u16) {
        self.emulated.raise(vector);
        self.kernel.event(vector);
    }

    fn compare(&self) -> Result<(), TestCaseError> {
        let [emulated, hosted] = &self.logs;
        prop_assert_eq!(&*lock(&emulated.0), &*lock(&hosted.0));
        prop_assert_eq!(self.emulated.msi_pending(), self.hosted.msi_pending());
        let pba = |interrupts: &Interrupts| {
            let mut bits = [0; 8];
            interrupts.pba_read(0, &mut bits);
            bits
        };
        prop_assert_eq!(pba(&self.emulated), pba(&self.hosted));
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Event(u16),
    Create(u16),
    Delete(u32),
    Retarget(u32, u8, u32),
    Entry(u16, u32, bool),
    Mask(u16, bool),
    Msix(bool, bool),
    Msi(bool, u8, u16, u32),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let data = 0u32..6;
    prop_oneof![
        6 => (0..4u16).prop_map(Step::Event),
        2 => (1..4u16).prop_map(Step::Create),
        1 => data.clone().prop_map(Step::Delete),
        3 => (data.clone(), any::<u8>(), 0u32..4).prop_map(|(d, v, vp)| Step::Retarget(d, v, vp)),
        4 => (0..VECTORS, data, any::<bool>()).prop_map(|(v, d, m)| Step::Entry(v, d, m)),
        3 => (0..VECTORS, any::<bool>()).prop_map(|(v, m)| Step::Mask(v, m)),
        2 => (prop::bool::weighted(0.8), any::<bool>()).prop_map(|(e, m)| Step::Msix(e, m)),
        3 => (prop::bool::weighted(0.8), 0..3u8, 0..6u16, any::<u32>())
            .prop_map(|(e, m, d, mask)| Step::Msi(e, 1 << m, d, mask)),
        1 => Just(Step::Reset),
    ]
}

fn apply(twins: &Twins, msix: bool, step: Step) {
    match step {
        // The device has no more messages than the guest has enabled.
        Step::Event(vector) if msix => twins.event(vector),
        Step::Event(_) => twins.event(0),
        Step::Create(count) => {
            let _ = twins.both(|i| i.create(0x30, count, 1));
        }
        Step::Delete(data) => {
            let _ = twins.both(|i| i.delete(ADDRESS, data));
        }
        Step::Retarget(data, vector, vp) => {
            let target = Target::One(vp);
            let to = Route { vector, target };
            let _ = twins.both(|i| i.retarget(ADDRESS, data, to.clone()));
        }
        Step::Entry(vector, data, masked) => twins.both(|i| {
            let at = u64::from(vector) * 16;
            i.table_write(at + 12, &1u32.to_le_bytes());
            i.table_write(at, &ADDRESS.to_le_bytes());
            i.table_write(at + 8, &data.to_le_bytes());
            i.table_write(at + 12, &u32::from(masked).to_le_bytes());
        }),
        Step::Mask(vector, masked) => {
            let value = u32::from(masked).to_le_bytes();
            twins.both(|i| i.table_write(u64::from(vector) * 16 + 12, &value));
        }
        Step::Msix(enabled, masked) if msix => {
            twins.both(|i| i.set_msix_control(MsixControl { enabled, masked }));
        }
        Step::Msi(enabled, messages, data, mask) if !msix => {
            let registers = MsiRegisters {
                enabled,
                messages,
                address: ADDRESS,
                data,
                mask,
            };
            // PCI leaves a change of their number while they are on undefined.
            if twins.messages.replace(messages) != messages {
                let enabled = false;
                let off = MsiRegisters {
                    enabled,
                    ..registers
                };
                twins.both(|i| i.set_msi(off));
            }
            twins.both(|i| i.set_msi(registers));
        }
        Step::Msix(..) | Step::Msi(..) => {}
        Step::Reset => twins.both(Interrupts::reset),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_guest_cannot_tell_hosted_interrupts_from_raised_ones(
        msix in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        let twins = Twins::new(msix);
        for step in steps {
            apply(&twins, msix, step);
            twins.compare()?;
        }
    }
}

#[test]
fn several_targets_at_once_are_refused_and_change_nothing() {
    let twins = Twins::new(true);
    let hosted = &twins.hosted;
    hosted.create(0x30, 1, 1).unwrap();
    hosted.set_msix_control(MsixControl {
        enabled: true,
        masked: false,
    });
    hosted.table_write(0, &ADDRESS.to_le_bytes());
    hosted.table_write(8, &[0; 8]);
    let to = Route {
        vector: 0x44,
        target: Target::All(Arc::from([0, 2])),
    };
    assert_eq!(hosted.retarget(ADDRESS, 0, to), Err(HandleError::Target));
    twins.kernel.event(0);
    assert_eq!(*lock(&twins.logs[1].0), [Msi::fixed(1, 0x30)]);
}
