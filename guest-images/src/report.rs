//! What a guest says about itself: the JSON behind its `VPCI-REPORT` line.
//!
//! The report carries observations only; whether they are good is decided outside the guest, by
//! the rig's judge, with the host's own counters beside them.

#![forbid(unsafe_code)]

use crate::scenario::{Kind, Mode, PciAddress};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// First word of the line that carries a [`GuestReport`].
pub const REPORT_PREFIX: &str = "VPCI-REPORT ";
/// First word of the line by which a guest asks for something from outside.
pub const EVENT_PREFIX: &str = "VPCI-EVENT ";
/// Word of the event by which a guest asks for the interrupts of host devices to be counted; the
/// number of a mark follows.
pub const COUNT_EVENT: &str = "count";
/// First word of the line that carries a scenario's verdict.
pub const VERDICT_PREFIX: &str = "VPCI-VERDICT ";
/// First word of a line that says why a role gave up.
pub const FAIL_PREFIX: &str = "VPCI-FAIL ";
/// Version of the report's layout.
pub const REPORT_VERSION: u32 = 1;

/// Everything a guest observed in one boot.
///
/// No field has a default: a report that lacks one does not parse, and so cannot pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestReport {
    /// [`REPORT_VERSION`].
    pub version: u32,
    /// Kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// Mode the guest ran in.
    pub mode: Mode,
    /// Number of this boot, from 1; above 1 after resets.
    pub boot: u32,
    /// CPUs online when the report was made.
    pub cpus: u32,
    /// Seconds from the kernel's start to the report.
    pub uptime_s: f64,
    /// Every PCI function found, in the order of their addresses.
    pub functions: Vec<PciFunctionReport>,
    /// One entry a virtio-blk disk or an NVMe namespace.
    pub disks: Vec<DiskReport>,
    /// One entry a virtio-rng function.
    pub rngs: Vec<RngReport>,
    /// One entry a network controller.
    pub nets: Vec<NetReport>,
    /// One entry an educational device.
    pub edus: Vec<EduReport>,
    /// Spans between two marks, during which interrupts were counted.
    pub phases: Vec<Phase>,
    /// Traffic under load while interrupts moved.
    pub loads: Vec<LoadReport>,
    /// Capacity changes seen.
    pub grows: Vec<GrowReport>,
    /// Unbind and bind cycles of bus drivers.
    pub rebinds: Vec<RebindReport>,
    /// DMA that test devices were told to do.
    pub dma: Vec<DmaReport>,
    /// Benchmarks of DMA mappings.
    pub maps: Vec<MapReport>,
    /// Interrupt vectors of all functions at the end.
    pub vectors: Vec<VectorCounts>,
    /// The kernel log's noteworthy lines.
    pub kmsg: KmsgReport,
    /// What went wrong inside the guest, one line each; empty when all steps ran to their end.
    pub failures: Vec<String>,
    /// True when every step of the mode was reached.
    pub complete: bool,
}

/// A PCI function as the guest's sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciFunctionReport {
    /// Its address.
    pub address: PciAddress,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device_id: u16,
    /// Class code, 24 bits.
    pub class: u32,
    /// What it is.
    pub kind: Kind,
    /// The PCI driver bound to it.
    pub driver: Option<String>,
    /// The driver bound to the virtio device below it.
    pub virtio_driver: Option<String>,
    /// MSI or MSI-X vectors that the driver has enabled.
    pub msix_vectors: u32,
    /// Instance GUID of the VMBus device that the root bus belongs to.
    pub vmbus_device: Option<String>,
    /// Type of the default domain of its IOMMU group, in the words of sysfs; `None` where the
    /// kernel knows no IOMMU of it.
    pub domain: Option<String>,
}

/// What happened on one disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskReport {
    /// PCI function behind it.
    pub address: PciAddress,
    /// Block device name, for example `vda`.
    pub name: String,
    /// Size in bytes before any growth.
    pub size: u64,
    /// Whether the kernel shows it as read-only.
    pub readonly: bool,
    /// Request queues in use by the block layer.
    pub queues: u32,
    /// Bytes read that held what the host had put there.
    pub initial_ok: u64,
    /// Bytes written with the guest's own pattern.
    pub written: u64,
    /// Bytes of that pattern read back, past the page cache, that were right.
    pub verified: u64,
    /// Whether the flush succeeded.
    pub flushed: bool,
    /// FNV-1a (64 bits) of what was read back, in hexadecimal.
    pub checksum: String,
    /// Longest request of the data check in microseconds.
    pub max_latency_us: u64,
}

/// What happened on one entropy source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngReport {
    /// PCI function behind it.
    pub address: PciAddress,
    /// Bytes read.
    pub bytes: u64,
    /// Longest read in microseconds.
    pub max_latency_us: u64,
    /// Every move of its queue's interrupt, in order.
    pub moves: Vec<MoveReport>,
}

/// One move of an interrupt to another CPU by `/proc/irq/N/smp_affinity_list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveReport {
    /// CPU asked for.
    pub cpu: u32,
    /// CPU the kernel reports as effective afterwards.
    pub effective: Option<u32>,
    /// Requests completed after the move until the new CPU had counted an interrupt.
    pub requests: u32,
    /// Interrupts counted on the new CPU by then.
    pub on_new_cpu: u64,
}

/// What happened on one network controller. A request is a frame that the other end answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetReport {
    /// PCI function behind it.
    pub address: PciAddress,
    /// Name of the interface.
    pub name: String,
    /// Answers received to as many frames sent.
    pub answers: u64,
    /// Longest wait for an answer in microseconds.
    pub max_latency_us: u64,
    /// Moves of the interrupts of the receive and transmit queues, in order.
    pub moves: Vec<NetMoves>,
    /// Moves done while frames went on from another thread, and their answers.
    pub storm_moves: u32,
    /// Answers received meanwhile.
    pub storm_answers: u64,
}

/// Moves of one vector of a network controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetMoves {
    /// Index in the MSI-X table.
    pub index: u32,
    /// Every move, in order.
    pub moves: Vec<MoveReport>,
}

/// What happened on one of QEMU's educational devices, driven by user space of the guest. Its DMA
/// is among the guest's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EduReport {
    /// PCI function of the device.
    pub address: PciAddress,
    /// Its identification register.
    pub id: u32,
    /// Whether its liveness register held the complement of what was stored.
    pub alive: bool,
    /// What it computed as the factorial of [`EDU_FACTORIAL_OF`].
    pub factorial: u32,
    /// Jobs that were to end in an interrupt.
    pub jobs: u64,
    /// Interrupts that came of them.
    pub interrupts: u64,
    /// Longest wait for one in microseconds.
    pub max_latency_us: u64,
    /// Moves of its interrupt, in order.
    pub moves: Vec<MoveReport>,
}

/// Copies that an educational device makes.
pub const EDU_COPIES: usize = 3;

/// The number whose factorial an educational device computes.
pub const EDU_FACTORIAL_OF: u32 = 10;

/// A span between two marks, with nothing in flight at either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// What ran in it, for example `blk 1234:00:00.0 qd1 cpu 0`.
    pub name: String,
    /// What kind of work it was.
    pub work: Work,
    /// The function under test.
    pub address: PciAddress,
    /// CPU that all requests came from, where it was one.
    pub cpu: Option<u32>,
    /// Mark written at its start.
    pub begin: u8,
    /// Mark written at its end.
    pub end: u8,
    /// Requests completed in it.
    pub requests: u64,
    /// Interrupts of the function under test in this span, per MSI-X vector.
    pub vectors: Vec<VectorCounts>,
}

/// The work of a [`Phase`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Requests one at a time: each must show as exactly one interrupt.
    OneOutstanding,
    /// Requests one at a time while interrupts move.
    Moves,
    /// One capacity change.
    Grow,
}

/// Interrupts of one MSI-X vector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorCounts {
    /// PCI function.
    pub address: PciAddress,
    /// Index in the MSI-X table.
    pub index: u32,
    /// Name in `/proc/interrupts`, for example `virtio0-req.0`.
    pub name: String,
    /// Linux interrupt number.
    pub irq: u32,
    /// Interrupts counted, per CPU number; CPUs with none are left out.
    pub per_cpu: BTreeMap<u32, u64>,
}

impl VectorCounts {
    /// Interrupts on all CPUs.
    pub fn total(&self) -> u64 {
        self.per_cpu.values().sum()
    }
}

/// Traffic of several threads while interrupts moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadReport {
    /// PCI function of the disk under load.
    pub address: PciAddress,
    /// Threads.
    pub threads: u32,
    /// Requests completed.
    pub requests: u64,
    /// Requests that returned wrong data or an error.
    pub bad: u64,
    /// Longest request in microseconds.
    pub max_latency_us: u64,
    /// CPUs taken offline and online again under the traffic, in order.
    pub cpu_cycles: Vec<u32>,
    /// Moves of entropy interrupts done under the traffic.
    pub moves: u32,
}

/// One capacity change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrowReport {
    /// PCI function of the disk.
    pub address: PciAddress,
    /// Bytes before.
    pub before: u64,
    /// Bytes after.
    pub after: u64,
    /// Bytes of the new end written and read back right.
    pub verified: u64,
    /// Milliseconds until the guest saw the new size.
    pub millis: u64,
}

/// One time that a bus was taken away and came back: unbind and bind of its driver, or removal and
/// plugging by the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RebindReport {
    /// Number of the cycle, from 1.
    pub cycle: u32,
    /// VMBus device of the bus.
    pub vmbus_device: String,
    /// Whether its PCI functions were gone in between.
    pub gone: bool,
    /// Whether they were all back at the same addresses afterwards.
    pub back: bool,
    /// Milliseconds until they were.
    pub millis: u64,
    /// Bytes of its disks verified afterwards.
    pub verified: u64,
}

/// One job of a test device or an educational device. The latter knows nothing of faults: of its
/// results only the address and what memory holds are to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DmaReport {
    /// PCI function of the device.
    pub address: PciAddress,
    /// Who ordered it.
    pub owner: DmaOwner,
    /// What was done.
    pub test: DmaTest,
    /// What the device and memory showed at its end.
    pub result: DmaResult,
}

/// Who has a test device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DmaOwner {
    /// Its driver, behind the DMA API.
    Driver,
    /// User space, by VFIO.
    User,
}

impl DmaOwner {
    /// The word in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::User => "user",
        }
    }
}

/// What a test device is told to do; the words are those of its driver
/// (`guest-images/linux/testdev.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DmaTest {
    /// A copy between two mapped buffers.
    Copy,
    /// A write to a page that was never mapped.
    StrayWrite,
    /// A read of such a page.
    StrayRead,
    /// A write to a page that is mapped for reading only.
    ReadOnly,
    /// A write to a page that was mapped.
    Stale,
}

impl DmaTest {
    /// Every test.
    pub const ALL: [Self; 5] = [
        Self::Copy,
        Self::StrayWrite,
        Self::StrayRead,
        Self::ReadOnly,
        Self::Stale,
    ];

    /// The driver's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::StrayWrite => "stray-write",
            Self::StrayRead => "stray-read",
            Self::ReadOnly => "read-only",
            Self::Stale => "stale",
        }
    }

    /// Whether an IOMMU must refuse it.
    pub fn must_fault(self) -> bool {
        self != Self::Copy
    }
}

/// One run of the kernel's benchmark of DMA mappings, with one thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapReport {
    /// PCI function that the mappings were for.
    pub address: PciAddress,
    /// Pages of a mapping.
    pub pages: u32,
    /// Length of the benchmark.
    pub seconds: u32,
    /// Average time of a map in nanoseconds; the kernel counts in units of 100.
    pub map_ns: u64,
    /// Average time of an unmap.
    pub unmap_ns: u64,
    /// Mark written at its start.
    pub begin: u8,
    /// Mark written at its end.
    pub end: u8,
}

/// End of a job as the driver reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DmaResult {
    /// The device's register `ERROR`: 0 none, 2 a DMA fault.
    pub error: u32,
    /// Bytes moved.
    pub moved: u64,
    /// I/O virtual address of the block that could not be moved.
    pub fault: u64,
    /// Where the job was sent.
    pub iova: u64,
    /// Whether memory holds what it must: after a copy the data, else what it held before.
    pub intact: bool,
}

/// `ERROR` of a job that met a DMA fault.
pub const DMA_FAULT: u32 = 2;

impl std::str::FromStr for DmaResult {
    type Err = String;

    /// Reads the driver's line, `error=E moved=N fault=0xA iova=0xI intact=B`.
    fn from_str(line: &str) -> Result<Self, String> {
        let words = crate::scenario::words(line);
        let number = |key: &str| {
            let text = *words
                .get(key)
                .ok_or_else(|| format!("{line:?}: no {key}"))?;
            match text.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => text.parse(),
            }
            .map_err(|_| format!("{line:?}: {key} is no number"))
        };
        Ok(Self {
            error: u32::try_from(number("error")?).map_err(|_| format!("{line:?}: error"))?,
            moved: number("moved")?,
            fault: number("fault")?,
            iova: number("iova")?,
            intact: number("intact")? == 1,
        })
    }
}

/// The kernel log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KmsgReport {
    /// Records read in all.
    pub records: u64,
    /// Noteworthy records found, more than `lines` holds if it overflowed.
    pub noteworthy: u64,
    /// Records lost because the kernel's buffer wrapped before they were read.
    pub lost: u64,
    /// Noteworthy records: level 4 (warning) or below, or with a tell-tale word in them. The
    /// first [`KMSG_LINES`].
    pub lines: Vec<KmsgLine>,
}

/// Most kernel log lines that a report carries.
pub const KMSG_LINES: usize = 200;

/// One record of the kernel log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KmsgLine {
    /// Level, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Microseconds since boot.
    pub time_us: u64,
    /// The text, at most 300 bytes of it.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_s_line_gives_a_result_or_an_error() {
        let line = "error=2 moved=0 fault=0xffffe000 iova=0xffffe000 intact=1";
        let result: DmaResult = line.parse().unwrap();
        assert_eq!(
            result,
            DmaResult {
                error: DMA_FAULT,
                moved: 0,
                fault: 0xffff_e000,
                iova: 0xffff_e000,
                intact: true,
            }
        );
        assert!(
            !line
                .replace("intact=1", "intact=0")
                .parse::<DmaResult>()
                .unwrap()
                .intact
        );
        for bad in [
            "",
            "error=2 moved=0 fault=0x0 iova=0x0",
            "error=4294967296 moved=0 fault=0x0 iova=0x0 intact=1",
            "error=-1 moved=0 fault=0x0 iova=0x0 intact=1",
            "error=0 moved=0 fault=0xg iova=0x0 intact=1",
        ] {
            assert!(bad.parse::<DmaResult>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_words_of_tests_are_those_of_their_json() {
        for test in DmaTest::ALL {
            let json = serde_json::to_value(test).unwrap();
            assert_eq!(json, test.as_str());
        }
    }
}
