//! The fuzz targets. Each takes any bytes, and panics if something does not hold.
#![forbid(unsafe_code)]

use arbitrary::{Arbitrary, Unstructured};
use vm_vpci::mem::GuestRam;
use vm_vpci::pviommu::IommuMode;
use vm_vpci::vmbus::ring::{RingError, RingReader, RingWriter};

use crate::edit::Edit;
use crate::guest::{Guest, Ring};
use crate::input::{
    Access, Anything, Hypercall, Message, MsrAccess, Request, RingChange, Step, Take, VirtioStep,
    Work,
};
use crate::machine::{Machine, ram};
use crate::unit::{self, Unit};
use crate::values::Steps;
use crate::virtio::{Driver, Shape};

/// A target.
pub type Target = fn(&[u8]);

/// All targets, by name: the programs in `fuzz_targets`, and the folders in `corpus`.
pub const ALL: [(&str, Target); 10] = [
    ("hypercall", hypercall),
    ("msr", msr),
    ("vmbus", vmbus),
    ("ring", ring),
    ("vpci", vpci),
    ("config", config),
    ("tables", tables),
    ("state", state),
    ("virtqueue", virtqueue),
    ("guest", guest),
];

/// Bytes as an input; those of which too little is left to make one mean nothing.
fn decode<'a, T: Arbitrary<'a>>(bytes: &'a [u8]) -> Option<T> {
    T::arbitrary_take_rest(Unstructured::new(bytes)).ok()
}

/// A guest with two buses: one function behind the pvIOMMU on the first, two that are not on the
/// second.
fn machine() -> Guest {
    let mut machine = Machine::new(ram());
    let first = machine.plug(1, &[(0, IommuMode::On)]);
    let second = machine.plug(2, &[(0, IommuMode::Off), (1, IommuMode::Off)]);
    first.and(second).expect("two buses");
    Guest::new(machine)
}

fn run<S: Step>(guest: &mut Guest, steps: &[S]) {
    for step in steps {
        step.apply(guest);
    }
}

/// A step of a target, or workers run, or the guest takes what it was sent.
#[derive(Debug, Clone, Arbitrary)]
enum With<S> {
    Step(S),
    Same(S),
    Work(Work),
    Take(Take),
}

impl<S: Step> Step for With<S> {
    fn apply(&self, guest: &mut Guest) {
        match self {
            Self::Step(step) | Self::Same(step) => step.apply(guest),
            Self::Work(step) => step.apply(guest),
            Self::Take(step) => step.apply(guest),
        }
    }
}

/// Hypercalls of a guest that has booted and connected.
pub fn hypercall(bytes: &[u8]) {
    let Some(Steps(steps)) = decode::<Steps<With<Hypercall>>>(bytes) else {
        return;
    };
    let mut guest = machine();
    guest.boot();
    guest.connect(0x6_0000);
    run(&mut guest, &steps);
    guest.machine.workers.settle();
    guest.machine.drop_all();
}

/// MSRs from power-on, and messages and signals meanwhile.
pub fn msr(bytes: &[u8]) {
    #[derive(Debug, Arbitrary)]
    enum Step {
        Msr(MsrAccess),
        Same(MsrAccess),
        Other(With<Message>),
        Migrate,
    }
    let Some((boot, Steps(steps))) = decode::<(bool, Steps<Step>)>(bytes) else {
        return;
    };
    let mut guest = machine();
    if boot {
        guest.boot();
    }
    for step in steps {
        match step {
            Step::Msr(step) | Step::Same(step) => step.apply(&mut guest),
            Step::Other(step) => step.apply(&mut guest),
            Step::Migrate => guest.migrate(),
        }
    }
    guest.machine.workers.settle();
    guest.machine.drop_all();
}

/// Messages to VMBus, from a guest that has connected or not; then a reset.
pub fn vmbus(bytes: &[u8]) {
    #[derive(Debug, Arbitrary)]
    enum Step {
        Message(With<Message>),
        Operator(crate::input::Operator),
    }
    let Some((stage, Steps(steps))) = decode::<(u8, Steps<Step>)>(bytes) else {
        return;
    };
    let mut guest = machine();
    guest.boot();
    if stage % 4 != 0 {
        guest.connect([0x4_0000, 0x5_0000, 0x5_0003, 0x6_0000][usize::from(stage >> 2) % 4]);
    }
    if stage % 4 > 1 {
        guest.open(0);
    }
    for step in steps {
        match step {
            Step::Message(step) => step.apply(&mut guest),
            Step::Operator(step) => step.apply(&mut guest),
        }
    }
    guest.starts_again();
}

/// The two ends of a channel, in memory that changes between any two calls.
pub fn ring(bytes: &[u8]) {
    #[derive(Debug, Arbitrary)]
    enum Step {
        Change(RingChange),
        Read(u8),
        Publish,
        Mask,
        Unmask,
        Reserve(u16),
        Send(u8),
        Complete(u8),
        Release,
        IsUnread,
        SaveAndRestore,
    }
    let Some((before, Steps(steps))) = decode::<(Vec<RingChange>, Steps<Step>)>(bytes) else {
        return;
    };
    // Kept: to map it takes longer than all the rest. Nothing but the rings is written here.
    thread_local!(static RAM: GuestRam = ram());
    let ram = RAM.with(GuestRam::clone);
    let [out, inbound] = Guest::rings(0);
    let rings = u64::from(Ring::size()) + 4096;
    ram.fill(out.control(), 2 * rings, 0).expect("RAM");
    let change = |step: &RingChange| {
        let ring = [out, inbound][usize::from(step.is_inbound())];
        step.change(ring, &ram);
    };
    before.iter().take(4).for_each(change);
    let pages = |ring: Ring| {
        let first = ring.control() / 4096;
        let count = 1 + u64::from(Ring::size()) / 4096;
        (first..first + count).collect::<Vec<_>>()
    };
    let reader = RingReader::open(ram.clone(), &pages(out));
    let writer = RingWriter::open(ram.clone(), &pages(inbound));
    let (Ok(mut reader), Ok(mut writer)) = (reader, writer) else {
        return;
    };
    let mut room = None;
    let (mut broken, mut failed) = (false, false);
    let mut buffer = [0; 4096];
    for step in steps {
        let (mut of_reader, mut of_writer) = (None, None);
        match step {
            Step::Change(step) => change(&step),
            Step::Read(len) => {
                let read = reader.read(&mut buffer[..usize::from(len) * 16]);
                of_reader = read.err();
            }
            Step::Publish => of_reader = reader.publish().err(),
            Step::Mask => of_reader = reader.mask().err(),
            Step::Unmask => of_reader = reader.unmask().err(),
            Step::Reserve(len) => match writer.reserve(usize::from(len) % 4200) {
                Ok(reserved) => {
                    let former = std::mem::replace(&mut room, reserved);
                    if let Some(former) = former {
                        writer.release(former);
                    }
                }
                Err(error) => of_writer = Some(error),
            },
            Step::Send(len) | Step::Complete(len) => {
                if let Some(room) = room.take() {
                    let payload = &buffer[..usize::from(len) * 16];
                    let sent = match step {
                        Step::Send(_) => writer.send(room, payload),
                        _ => writer.complete(room, 5, payload),
                    };
                    of_writer = sent.err();
                }
            }
            Step::Release => {
                if let Some(room) = room.take() {
                    writer.release(room);
                }
            }
            Step::IsUnread => of_writer = writer.is_unread().err(),
            Step::SaveAndRestore => {
                if let Some(room) = room.take() {
                    writer.release(room);
                }
                let saved = (reader.save(), writer.save());
                let restored = RingReader::restore(ram.clone(), &pages(out), saved.0);
                reader = restored.expect("what was saved");
                let restored = RingWriter::restore(ram.clone(), &pages(inbound), saved.1);
                writer = restored.expect("what was saved");
                assert_eq!((reader.save(), writer.save()), saved);
            }
        }
        for (error, stopped) in [(of_reader, &mut broken), (of_writer, &mut failed)] {
            let Some(error) = error else { continue };
            let stops = !matches!(error, RingError::TooLong { .. } | RingError::Stopped);
            assert!(!(*stopped && stops), "{error} after the ring had stopped");
            *stopped |= stops;
        }
        assert_eq!(reader.save().stopped, broken);
    }
}

/// Requests to buses that are open, in D0 or not, and what the guest does to their rings.
pub fn vpci(bytes: &[u8]) {
    #[derive(Debug, Arbitrary)]
    enum Step {
        Request(With<Request>),
        Ring(RingChange),
        Access(Access),
        Retarget(Hypercall),
        Eject(u8),
    }
    let Some((stage, Steps(steps))) = decode::<(u8, Steps<Step>)>(bytes) else {
        return;
    };
    let mut guest = machine();
    guest.boot();
    guest.connect(0x6_0000);
    guest.open(0);
    if stage % 8 != 0 {
        guest.probe(0, 0x1_0001 + u32::from(stage >> 3) % 4);
    }
    if stage % 8 > 3 {
        guest.open(1);
    }
    for step in steps {
        match step {
            Step::Request(step) => step.apply(&mut guest),
            Step::Ring(step) => step.apply(&mut guest),
            Step::Access(step) => step.apply(&mut guest),
            Step::Retarget(step) => step.apply(&mut guest),
            Step::Eject(bus) => crate::input::Operator::Eject(bus).apply(&mut guest),
        }
    }
    guest.starts_again();
}

/// Accesses to config windows and BARs of buses in D0, and interrupts from the devices.
pub fn config(bytes: &[u8]) {
    #[derive(Debug, Arbitrary)]
    enum Step {
        Access(Access),
        Same(Access),
        Again(Access),
        Request(Request),
        Job(crate::input::Job),
        Work(Work),
        Migrate,
    }
    let Some(Steps(steps)) = decode::<Steps<Step>>(bytes) else {
        return;
    };
    let mut guest = machine();
    guest.bring_up();
    for step in steps {
        match step {
            Step::Access(step) | Step::Same(step) | Step::Again(step) => step.apply(&mut guest),
            Step::Request(step) => step.apply(&mut guest),
            Step::Job(step) => step.apply(&mut guest),
            Step::Work(step) => step.apply(&mut guest),
            Step::Migrate => guest.migrate(),
        }
    }
    guest.machine.workers.settle();
    guest.machine.drop_all();
}

/// First-stage tables, the calls about them, and DMA, which must go where a plain walk of the
/// tables leads once all is flushed.
pub fn tables(bytes: &[u8]) {
    let Some(Steps(steps)) = decode::<Steps<unit::Step>>(bytes) else {
        return;
    };
    let mut unit = Unit::new();
    for step in &steps {
        unit.apply(step);
    }
}

/// A saved partition is changed and restored; then the guest goes on, and the machine is reset.
pub fn state(bytes: &[u8]) {
    type Input = (u8, Vec<Edit>, Vec<Anything>, Steps<Anything>);
    let Some((stage, edits, before, Steps(after))) = decode::<Input>(bytes) else {
        return;
    };
    let mut guest = machine();
    if stage % 4 > 0 {
        guest.boot();
        guest.connect(0x6_0000);
    }
    if stage % 4 > 1 {
        guest.open(0);
    }
    if stage % 4 > 2 {
        guest.probe(0, 0x1_0001 + u32::from(stage >> 2) % 4);
    }
    run(&mut guest, &before);
    let mut saved = guest.save();
    for edit in &edits {
        edit.apply(&mut saved);
    }
    // Taken or refused: either is right, and what follows must hold in both cases.
    let taken = guest.replace(&saved);
    assert!(taken || !edits.is_empty(), "refused as it was saved");
    run(&mut guest, &after);
    guest.starts_again();
}

/// Rings, descriptors and registers of a disk and of a source of entropy, behind the pvIOMMU or not;
/// then a reset of the devices or of the machine, and requests that are answered.
pub fn virtqueue(bytes: &[u8]) {
    let Some((shape, Steps(steps))) = decode::<(u8, Steps<VirtioStep>)>(bytes) else {
        return;
    };
    let bit = |bit: u8| shape >> bit & 1 != 0;
    let mut driver = Driver::new(Shape {
        iommu: bit(0),
        paged: bit(1),
        readonly: bit(2) && bit(3),
    });
    for step in &steps {
        step.apply(&mut driver);
    }
    driver.works_again(bit(4) && bit(5));
}

/// Everything at once: two buses in D0, all that a guest can write, devices that do DMA, buses that
/// come and go, resets, and restores of what was saved.
pub fn guest(bytes: &[u8]) {
    let Some(Steps(steps)) = decode::<Steps<Anything>>(bytes) else {
        return;
    };
    let mut guest = machine();
    guest.bring_up();
    run(&mut guest, &steps);
    guest.starts_again();
}
