//! Rules about the kernel log of L1.

#![forbid(unsafe_code)]

use super::telltale;
use crate::report::KmsgReport;
use crate::scenario::{HostDevice, PciAddress};

/// How a line of Intel's IOMMU driver begins that tells of a fault, of DMA or of an interrupt; the
/// address of the device follows (`drivers/iommu/intel/dmar.c`, dmar_fault_do_one).
const FAULT: &str = "DMAR: [";
const DMA_FAULT: &str = "DMAR: [DMA ";
const DEVICE: &str = "Request device [";

/// What the log has against the scenario: lines that tell of a fault of the kernel, and DMA that
/// the IOMMU refused to a device which is not to stray; or none of one that is. How often does not
/// matter: the kernel leaves out some of many.
pub fn host_log(log: &KmsgReport, devices: &[HostDevice]) -> Vec<String> {
    let mut failures = Vec::new();
    if log.noteworthy != log.lines.len() as u64 {
        let (all, kept) = (log.noteworthy, log.lines.len());
        failures.push(format!(
            "host kernel log: {all} noteworthy lines, {kept} read"
        ));
    }
    let mut strays = Vec::new();
    for line in &log.lines {
        if telltale(&line.text).is_some() {
            failures.push(format!("host kernel log: {}", line.text));
        }
        if line.text.starts_with(FAULT) {
            let device = stray(&line.text);
            let meant = device.is_some_and(|device| is_meant_to(device, devices));
            if !(meant && line.text.starts_with(DMA_FAULT)) {
                failures.push(format!("host kernel log: {}", line.text));
            }
            strays.extend(device);
        }
    }
    for device in devices.iter().filter(|device| device.strays) {
        if !strays.contains(&requester(device.address)) {
            let address = device.address;
            failures.push(format!("host kernel log: no DMA of {address} was refused"));
        }
    }
    failures
}

/// Whose DMA the IOMMU takes a device's for: behind a bridge to conventional PCI (on a bus other than
/// 0), that of the bus's first device (docs/spec/vfio-rig.md, section 2).
fn requester(address: PciAddress) -> PciAddress {
    match address.bus {
        0 => address,
        _ => PciAddress {
            device: 0,
            function: 0,
            ..address
        },
    }
}

/// The device of a line that tells of a fault.
fn stray(line: &str) -> Option<PciAddress> {
    let (_, rest) = line.split_once(DEVICE)?;
    let (address, _) = rest.split_once(']')?;
    address.parse().ok()
}

fn is_meant_to(address: PciAddress, devices: &[HostDevice]) -> bool {
    devices
        .iter()
        .any(|device| device.strays && requester(device.address) == address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::KmsgLine;
    use crate::scenario::Kind;
    use proptest::prelude::*;

    fn devices() -> Vec<HostDevice> {
        let device = |address: &str, strays| HostDevice {
            address: address.parse().unwrap(),
            kind: Kind::Edu,
            size_mib: 0,
            strays,
            left: false,
        };
        vec![device("0000:00:10.0", true), device("0000:00:11.0", false)]
    }

    fn log(lines: &[&str]) -> KmsgReport {
        let line = |text: &&str| KmsgLine {
            level: 3,
            time_us: 0,
            text: text.to_string(),
        };
        KmsgReport {
            records: 900,
            noteworthy: lines.len() as u64,
            lost: 0,
            lines: lines.iter().map(line).collect(),
        }
    }

    #[test]
    fn behind_a_bridge_dma_is_that_of_its_bus() {
        let shared = |number: u8, strays| HostDevice {
            address: format!("0000:01:0{number}.0").parse().unwrap(),
            strays,
            ..devices()[0].clone()
        };
        let line = MEANT.replace("00:10.0", "0000:01:00.0");
        let both = [shared(1, true), shared(2, true)];
        assert!(host_log(&log(&[&line]), &both).is_empty());
        let neither = [shared(1, false), shared(2, false)];
        assert_eq!(
            host_log(&log(&[&line]), &neither),
            [format!("host kernel log: {line}")]
        );
        assert_eq!(host_log(&log(&[]), &both).len(), 2);
    }

    const MEANT: &str = "DMAR: [DMA Write NO_PASID] Request device [00:10.0] fault addr 0x4000000000 [fault reason 0x05] PTE Write access is not set";

    #[test]
    fn faults_of_a_device_that_strays_pass_and_must_be_there() {
        let meant = MEANT.replace("[00:10.0]", "[0000:00:10.0]");
        let status = "DMAR: DRHD: handling fault status reg 2";
        assert!(host_log(&log(&[status, &meant, &meant]), &devices()).is_empty());
        let failures = host_log(&log(&[]), &devices());
        assert!(
            failures[0].contains("no DMA of 0000:00:10.0"),
            "{failures:?}"
        );
        assert!(host_log(&log(&[]), &[]).is_empty());
    }

    #[test]
    fn faults_of_any_other_device_fail() {
        let meant = MEANT.replace("[00:10.0]", "[0000:00:10.0]");
        let interrupt = meant.replace("DMA Write NO_PASID", "INTR-REMAP");
        let failures = host_log(&log(&[&meant, &interrupt]), &devices());
        assert_eq!(failures, [format!("host kernel log: {interrupt}")]);
        for device in ["0000:00:11.0", "0000:00:12.0", "?"] {
            let other = meant.replace("0000:00:10.0", device);
            let failures = host_log(&log(&[&meant, &other]), &devices());
            assert_eq!(failures, [format!("host kernel log: {other}")]);
        }
    }

    #[test]
    fn a_fault_of_the_kernel_and_a_log_that_overflowed_fail() {
        let failures = host_log(&log(&["BUG: unable to handle page fault"]), &[]);
        assert_eq!(failures.len(), 1);
        let mut log = log(&["a warning"]);
        assert!(host_log(&log, &[]).is_empty());
        log.noteworthy = 300;
        assert!(host_log(&log, &[])[0].contains("300"));
    }

    proptest! {
        #[test]
        fn any_line_has_a_device_or_none(line in "(DMAR: \\[DMA )?(Request device \\[)?[0-9a-f:.]{0,14}\\]?\\PC{0,20}") {
            let _ = host_log(&log(&[&line]), &devices());
        }
    }
}
