use super::*;
use crate::dma::{Dma, DmaPort};
use crate::vmbus::ring::guest::ram;
use crate::vpci::function::InterruptLines;
use crate::vpci::testing::HandLoop;
use proptest::prelude::*;

#[derive(Debug, Default)]
struct Lines(Mutex<Vec<u16>>);

impl InterruptLines for Lines {
    fn raise(&self, vector: u16) {
        lock(&self.0).push(vector);
    }
}

struct Rig {
    ram: crate::mem::GuestRam,
    port: Arc<DmaPort>,
    lines: Arc<Lines>,
    workers: HandLoop,
    device: Arc<TestDevice>,
}

fn rig() -> Rig {
    let ram = ram(64);
    let port = DmaPort::new(ram.clone());
    port.set_master(true);
    let lines = Arc::new(Lines::default());
    let workers = HandLoop::default();
    let device = TestDevice::new(1, &workers).unwrap();
    device.connect(FunctionResources {
        dma: Dma::new(port.clone()),
        interrupts: lines.clone(),
    });
    Rig {
        ram,
        port,
        lines,
        workers,
        device,
    }
}

impl Rig {
    fn load(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.device.bar_read(0, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn load64(&self, offset: u64) -> u64 {
        let mut data = [0xff; 8];
        self.device.bar_read(0, offset, &mut data);
        u64::from_le_bytes(data)
    }

    fn store(&self, offset: u64, value: u32) {
        self.device.bar_write(0, offset, &value.to_le_bytes());
    }

    fn store64(&self, offset: u64, value: u64) {
        self.device.bar_write(0, offset, &value.to_le_bytes());
    }

    fn prepare(&self, source: u64, destination: u64, length: u32, vector: u32) {
        self.store64(register::SOURCE, source);
        self.store64(register::DESTINATION, destination);
        self.store(register::LENGTH, length);
        self.store(register::VECTOR, vector);
    }

    fn interrupts(&self) -> Vec<u16> {
        std::mem::take(&mut lock(&self.lines.0))
    }
}

#[test]
fn constants_and_unknown_registers_read_as_documented() {
    let rig = rig();
    assert_eq!(rig.load(register::MAGIC), 0x5654_5044);
    assert_eq!(rig.load(register::VECTORS), 8);
    assert_eq!(rig.load(register::MAX_LENGTH), 16 << 20);
    assert_eq!(rig.load(register::VECTOR), NO_VECTOR);
    for offset in [
        0x0c,
        register::COMMAND,
        0x3c,
        register::RAISE,
        0x64,
        0xffc,
        0x3ffc,
    ] {
        rig.store(offset, 0xffff_0000);
        assert_eq!(rig.load(offset), 0, "{offset:#x}");
    }
    let mut byte = [0xff];
    rig.device.bar_read(0, 0, &mut byte);
    assert_eq!(byte, [0]);
    rig.device.bar_write(0, register::LENGTH, &[1, 0]);
    assert_eq!(rig.load(register::LENGTH), 0);
    assert_eq!(rig.load64(register::MAGIC), 0x8_5654_5044);
    rig.store(register::SOURCE + 4, 5);
    assert_eq!(rig.load64(register::SOURCE), 5 << 32);
}

#[test]
fn a_copy_moves_blocks_and_interrupts_once() {
    let rig = rig();
    let data: Vec<u8> = (0..0x11003u32).map(|i| (i % 251) as u8).collect();
    rig.ram.write(0x1001, &data).unwrap();
    rig.prepare(0x1001, 0x20002, data.len() as u32, 5);
    rig.store(register::COMMAND, COMMAND_COPY);
    assert_eq!(rig.load(register::STATUS), STATUS_BUSY);
    assert!(rig.workers.step());
    assert_eq!(rig.load64(register::MOVED), BLOCK as u64);
    assert!(rig.interrupts().is_empty());
    rig.workers.run();
    assert_eq!(rig.load(register::STATUS), STATUS_DONE);
    assert_eq!(rig.load64(register::MOVED), data.len() as u64);
    assert_eq!(rig.load64(register::COMPLETIONS), 1);
    assert_eq!(rig.interrupts(), [5]);
    let mut back = vec![0; data.len()];
    rig.ram.read(0x20002, &mut back).unwrap();
    assert_eq!(back, data);
    rig.store(register::STATUS, STATUS_DONE);
    assert_eq!(rig.load(register::STATUS), 0);
}

#[test]
fn fill_repeats_its_pattern_and_checksum_reads_it_back() {
    let rig = rig();
    let pattern = 0x0807_0605_0403_0201u64;
    rig.store64(register::PATTERN, pattern);
    rig.prepare(0, 0x1000, 0x9005, NO_VECTOR);
    rig.store(register::COMMAND, COMMAND_FILL);
    rig.workers.run();
    assert!(rig.interrupts().is_empty());
    let mut back = vec![0; 0x9006];
    rig.ram.read(0x1000, &mut back).unwrap();
    assert!(
        back[..0x9005]
            .chunks(8)
            .all(|c| *c == pattern.to_le_bytes()[..c.len()])
    );
    assert_eq!(back[0x9005], 0);
    rig.prepare(0x1000, u64::MAX, 0x9005, 0);
    rig.store(register::COMMAND, COMMAND_CHECKSUM);
    rig.workers.run();
    assert_eq!(rig.load64(register::RESULT), checksum(&back[..0x9005]));
    assert_eq!(rig.load(register::STATUS), STATUS_DONE);
    // The published test vector of 64-bit FNV-1a.
    assert_eq!(checksum(b"foobar"), 0x8594_4171_f739_67e8);
}

#[test]
fn failures_say_why_and_where() {
    let rig = rig();
    let end = 64 * 4096;
    let run = |source, destination, length, command| {
        rig.prepare(source, destination, length, 1);
        rig.store(register::COMMAND, command);
        rig.workers.run();
        assert_eq!(rig.interrupts(), [1]);
        assert_eq!(rig.load(register::STATUS), STATUS_DONE | STATUS_FAILED);
        rig.store(register::STATUS, !0);
        (
            rig.load(register::ERROR),
            rig.load64(register::FAULT),
            rig.load64(register::MOVED),
        )
    };
    let block = BLOCK as u64;
    assert_eq!(
        run(end - block, 0, BLOCK as u32 + 1, COMMAND_COPY),
        (ERROR_FAULT, end, block)
    );
    assert_eq!(
        run(0, u64::MAX - 3, 8, COMMAND_COPY),
        (ERROR_FAULT, u64::MAX - 3, 0)
    );
    for (length, command) in [
        (0, COMMAND_COPY),
        (MAX_LENGTH + 1, COMMAND_COPY),
        (8, 0),
        (8, 4),
        (8, u32::MAX),
    ] {
        assert_eq!(run(0, 0, length, command), (ERROR_REQUEST, 0, 0));
    }
    rig.port.set_master(false);
    assert_eq!(run(0, 0x40, 8, COMMAND_FILL), (ERROR_NOT_MASTER, 0x40, 0));
}

#[test]
fn a_command_while_busy_is_an_overrun_and_does_not_disturb_the_job() {
    let rig = rig();
    rig.ram.write(0x1000, &[7; 16]).unwrap();
    rig.prepare(0x1000, 0x2000, 16, 2);
    rig.store(register::COMMAND, COMMAND_COPY);
    rig.prepare(0x5000, 0x3000, 1 << 20, 3);
    rig.store(register::COMMAND, COMMAND_FILL);
    assert_eq!(rig.load(register::STATUS), STATUS_BUSY | STATUS_OVERRUN);
    rig.store(register::STATUS, STATUS_BUSY);
    assert_eq!(rig.load(register::STATUS), STATUS_BUSY | STATUS_OVERRUN);
    rig.workers.run();
    assert_eq!(rig.load(register::STATUS), STATUS_DONE | STATUS_OVERRUN);
    assert_eq!(rig.interrupts(), [2]);
    let mut back = [0; 17];
    rig.ram.read(0x2000, &mut back).unwrap();
    assert_eq!(back[..16], [7; 16]);
    assert_eq!(back[16], 0);
}

#[test]
fn vectors_can_be_raised_by_hand_up_to_the_last() {
    let rig = rig();
    for vector in [0, 7, 8, 0x1_0000, NO_VECTOR] {
        rig.store(register::RAISE, vector);
    }
    assert_eq!(rig.interrupts(), [0, 7]);
}

#[test]
fn reset_cancels_the_job_without_an_interrupt() {
    let rig = rig();
    rig.prepare(0, 0x20000, 0x10000, 2);
    rig.store(register::COMMAND, COMMAND_COPY);
    rig.workers.step();
    rig.device.reset();
    rig.workers.run();
    assert!(rig.interrupts().is_empty());
    assert_eq!(rig.load(register::STATUS), 0);
    assert_eq!(rig.load64(register::MOVED), 0);
    assert_eq!(rig.load64(register::SOURCE), 0);
}

#[test]
fn an_impossible_saved_device_is_refused() {
    let rig = rig();
    let good = rig.device.save();
    let job = Job {
        command: COMMAND_COPY,
        source: 0,
        destination: 0,
        length: 8,
        pattern: 0,
        vector: 0,
    };
    let with_job = |change: fn(&mut Job)| {
        let mut job = job;
        change(&mut job);
        TestDeviceState {
            job: Some(job),
            ..good
        }
    };
    use TestDeviceStateError as E;
    for (state, error) in [
        (
            TestDeviceState { version: 2, ..good },
            E::Version { version: 2 },
        ),
        (
            TestDeviceState {
                status: STATUS_BUSY,
                ..good
            },
            E::Status,
        ),
        (TestDeviceState { error: 4, ..good }, E::Status),
        (with_job(|j| j.length = 0), E::Job),
        (with_job(|j| j.length = MAX_LENGTH + 1), E::Job),
        (with_job(|j| j.command = 9), E::Job),
        (
            TestDeviceState {
                moved: 8,
                ..with_job(|_| {})
            },
            E::Job,
        ),
    ] {
        assert_eq!(rig.device.restore(state), Err(error));
        assert_eq!(rig.device.save(), good);
    }
    rig.device.restore(with_job(|_| {})).unwrap();
    rig.workers.run();
    assert_eq!(rig.load64(register::COMPLETIONS), 1);
}

proptest! {
    #[test]
    fn a_restored_device_ends_as_the_saved_one_would(
        stores in proptest::collection::vec(
            (0u64..0x19, prop_oneof![any::<u32>(), 0u32..0x2_0000], any::<bool>()),
            1..60
        ),
        cut in 0usize..60,
    ) {
        let original = rig();
        let mut copy = None;
        for (index, (register, value, work)) in stores.iter().enumerate() {
            if index == cut {
                let twin = rig();
                let mut all = vec![0; 64 * 4096];
                original.ram.read(0, &mut all).unwrap();
                twin.ram.write(0, &all).unwrap();
                twin.device.restore(original.device.save()).unwrap();
                original.interrupts();
                copy = Some(twin);
            }
            // Commands are few among all values: make them likely.
            let value = if *register == 0xc { value % 5 } else { *value };
            for rig in std::iter::once(&original).chain(&copy) {
                rig.store(register * 4, value);
                if *work {
                    rig.workers.run();
                }
            }
        }
        original.workers.run();
        if let Some(copy) = copy {
            copy.workers.run();
            prop_assert_eq!(original.device.save(), copy.device.save());
            prop_assert_eq!(original.interrupts(), copy.interrupts());
            for offset in (0..0x70).step_by(4) {
                prop_assert_eq!(original.load(offset), copy.load(offset));
            }
        }
    }
}
