//! What is written can be read, and nothing else.
#![forbid(unsafe_code)]

use std::io::Cursor;
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use vm_vpci::cpuid::Features;
use vm_vpci::devices::event_loop::EventLoop;
use vm_vpci::mem::GuestRam;
use vm_vpci::msr::DEFAULT_HYPERCALL_PORT;
use vm_vpci::vmbus::VmBusConfig;
use vm_vpci::vmm::{MonotonicClock, Msi, MsiSink};
use vm_vpci::{Partition, PartitionConfig, PartitionHost};

use super::*;
use crate::ports::PortsState;
use crate::snapshot::{EmbeddingState, Shape};

#[derive(Debug)]
struct NoMsi;

impl MsiSink for NoMsi {
    fn raise_msi(&self, _: Msi) {}
}

/// Two regions: runs of pages that are longer than a section, pages of zeroes between.
fn ram() -> Ram {
    let regions = [(GuestAddress(0), 3 << 20), (GuestAddress(1 << 32), 1 << 16)];
    Ram::from_ranges(&regions).unwrap()
}

fn filled() -> Ram {
    let ram = ram();
    let long: Vec<u8> = (0..(1 << 20) + 3 * PAGE)
        .map(|i| (i / 7) as u8 | 1)
        .collect();
    for (at, bytes) in [
        (PAGE as u64, &long[..]),
        ((3 << 20) - 1, &[9]),
        (1 << 32, &[1, 2, 3]),
        ((1 << 32) + 5 * PAGE as u64 + 17, &[4]),
    ] {
        ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }
    ram
}

fn contents(ram: &Ram) -> Vec<u8> {
    let mut all = Vec::new();
    for region in ram.iter() {
        let start = all.len();
        all.resize(start + region.len() as usize, 0);
        ram.read_slice(&mut all[start..], region.start_addr())
            .unwrap();
    }
    all
}

fn state(ram: &Ram) -> MachineSnapshot {
    let workers = EventLoop::new("test", NonZeroUsize::MIN).unwrap();
    let config = PartitionConfig {
        apic_ids: vec![0, 1],
        tsc_hz: 1_000_000_000,
        apic_hz: 1_000_000_000,
        mmio: Vec::new(),
        features: Features::default(),
        hypercall_port: DEFAULT_HYPERCALL_PORT,
        vmbus: VmBusConfig::default(),
        iommu: None,
    };
    let host = PartitionHost {
        ram: GuestRam::new(ram),
        msi: Arc::new(NoMsi),
        workers: Arc::new(workers),
        clock: Arc::new(MonotonicClock::default()),
        doorbells: None,
        bars: None,
    };
    MachineSnapshot {
        shape: Shape {
            memory: 4 << 20,
            hybrid: false,
            iommu: false,
            tsc_hz: 1_000_000_000,
            address_bits: 40,
            cpuid: vec![vec![[0x4000_0000, 0, 0, 1, 2, 3, 4]]; 2],
        },
        host_tsc: 1,
        vcpus: Vec::new(),
        irqchips: vec![Default::default(); 3],
        ports: PortsState::default(),
        embedding: EmbeddingState {
            reference_time: 5,
            partition: Partition::new(config, host).unwrap().save().unwrap(),
            devices: Vec::new(),
        },
    }
}

/// Made once: it is a megabyte.
static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let ram = filled();
    let mut writer = Writer::new(Vec::new()).unwrap();
    writer.state(&state(&ram)).unwrap();
    writer.ram(&ram).unwrap();
    writer.end().unwrap()
});

fn read(bytes: &[u8]) -> Result<(MachineSnapshot, Vec<u8>), RestoreError> {
    let (reader, state) = Reader::new(Cursor::new(bytes))?;
    let ram = ram();
    reader.ram(&ram)?;
    Ok((state, contents(&ram)))
}

#[test]
fn a_file_gives_back_the_state_and_every_byte_of_ram() {
    let file = &*FILE;
    let (found, bytes) = read(file).unwrap();
    assert_eq!(bytes, contents(&filled()));
    let again = serde_json::to_value(&found).unwrap();
    assert_eq!(again, serde_json::to_value(state(&filled())).unwrap());
    // Zeroes are left out, but for those in a page with something else.
    assert!(file.len() < (1 << 20) + 16 * PAGE + 64 * 1024);
}

/// The file with one section more, of valid checksum, before its end.
fn with_section(tag: u32, parts: &[&[u8]]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new()).unwrap();
    writer.state(&state(&ram())).unwrap();
    writer.section(tag, parts).unwrap();
    writer.sections = 1;
    writer.end().unwrap()
}

#[test]
fn what_a_checksum_cannot_find_is_found() {
    let page = [1; PAGE];
    let at = |gpa: u64| gpa.to_le_bytes();
    read(&with_section(PAGES, &[&at(0), &page])).unwrap();
    for (tag, parts, reason) in [
        (PAGES, vec![&at(3 << 20)[..], &page], "this VM has none"),
        (
            PAGES,
            vec![&at((3 << 20) - PAGE as u64), &page, &page],
            "RAM",
        ),
        (PAGES, vec![&at(u64::MAX - 4095), &page], "malformed"),
        (PAGES, vec![&at(1), &page], "malformed"),
        (PAGES, vec![&at(0), &page[1..]], "malformed"),
        (PAGES, vec![&at(0)], "malformed"),
        (PAGES, vec![&page[..7]], "malformed"),
        (STATE, vec![b"{}"], "unknown kind"),
        (7, vec![], "unknown kind"),
        (7, vec![&page], "too long"),
        (END, vec![&at(1)], "missing"),
        (END, vec![&at(0)], "follows its end"),
    ] {
        let error = read(&with_section(tag, &parts)).unwrap_err().to_string();
        assert!(error.contains(reason), "'{reason}' in: {error}");
    }
    let mut writer = Writer::new(Vec::new()).unwrap();
    writer.section(STATE, &[br#"{"shape":1}"#]).unwrap();
    let error = read(&writer.end().unwrap()).unwrap_err().to_string();
    assert!(error.contains("malformed"), "{error}");
    // Twice the same page: pages ascend.
    let mut writer = Writer::new(Vec::new()).unwrap();
    writer.state(&state(&ram())).unwrap();
    writer.pages(0, &page).unwrap();
    writer.pages(0, &page).unwrap();
    let error = read(&writer.end().unwrap()).unwrap_err().to_string();
    assert!(error.contains("malformed"), "{error}");
    // A length that is a promise only.
    let mut writer = Writer::new(Vec::new()).unwrap();
    writer.target.extend(STATE.to_le_bytes());
    writer.target.extend([0; 4]);
    writer.target.extend(MAX_STATE.to_le_bytes());
    let error = read(&writer.target).unwrap_err().to_string();
    assert!(error.contains("cut off"), "{error}");
}

#[test]
fn another_version_and_another_file_are_told_apart_from_damage() {
    let mut file = FILE.clone();
    file[8] = 2;
    assert!(matches!(read(&file), Err(RestoreError::Version(2))));
    file[0] = b'v';
    assert!(matches!(read(&file), Err(RestoreError::NoSnapshot)));
    assert!(matches!(read(b""), Err(RestoreError::NoSnapshot)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_flipped_bit_anywhere_is_refused(at: prop::sample::Index, bit in 0..8u32) {
        let mut file = FILE.clone();
        let at = at.index(file.len());
        file[at] ^= 1u8 << bit;
        prop_assert!(read(&file).is_err());
    }

    #[test]
    fn a_cut_file_is_refused(at: prop::sample::Index) {
        let file = &*FILE;
        prop_assert!(read(&file[..at.index(file.len())]).is_err());
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        prop_assert!(read(&bytes).is_err());
        let headed = [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat();
        prop_assert!(read(&headed).is_err());
    }
}
