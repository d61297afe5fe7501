//! Devices of L1's computer for pass-through, and the IOMMU in front of them
//! (`docs/spec/vfio-rig.md`, sections 1 and 2).
#![forbid(unsafe_code)]

use crate::failure::Failure;
use anyhow::Context;
use anyhow::Result;
use guest_images::pattern;
use guest_images::pattern::Pattern;
use guest_images::scenario::Function;
use guest_images::scenario::HostDevice;
use guest_images::scenario::Kind;
use guest_images::scenario::Mode;
use guest_images::scenario::PciAddress;
use guest_images::scenario::Run;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;

/// Size of an NVMe namespace in MiB.
pub(crate) const NVME_MIB: u32 = 64;

/// The bridge to conventional PCI that devices on bus 1 are behind.
const BRIDGE: u8 = 0x14;

/// Every device that can be asked for, with its word on the command line and its place.
const ALL: [(&str, Kind, u8, u8); 8] = [
    ("edu", Kind::Edu, 0, 0x10),
    ("nvme", Kind::Nvme, 0, 0x11),
    ("rng", Kind::Rng, 0, 0x12),
    ("e1000e", Kind::E1000e, 0, 0x13),
    ("nvme-2", Kind::Nvme, 0, 0x15),
    ("shared-edu-1", Kind::Edu, 1, 1),
    ("shared-edu-2", Kind::Edu, 1, 2),
    ("shared-rng", Kind::Rng, 1, 3),
];

/// The device of that word; `None` for an unknown one.
pub(crate) fn named(word: &str) -> Option<HostDevice> {
    let found = ALL.into_iter().find(|(name, ..)| *name == word)?;
    Some(device(found))
}

/// The devices of a comma-separated list; `all` stands for each.
pub(crate) fn parse(list: &str) -> Result<Vec<HostDevice>, Failure> {
    if list == "all" {
        return Ok(ALL.into_iter().map(device).collect());
    }
    let unknown = |word: &str| {
        let words: Vec<_> = ALL.iter().map(|(word, ..)| *word).collect();
        Failure::Usage(format!(
            "--devices: no device {word:?}: all, or some of {}",
            words.join(",")
        ))
    };
    let words = list.split(',').map(str::trim);
    words
        .map(|word| named(word).ok_or_else(|| unknown(word)))
        .collect()
}

fn device((_, kind, bus, number): (&str, Kind, u8, u8)) -> HostDevice {
    HostDevice {
        address: PciAddress {
            domain: 0,
            bus,
            device: number,
            function: 0,
        },
        kind,
        size_mib: if kind == Kind::Nvme { NVME_MIB } else { 0 },
        strays: false,
        left: false,
    }
}

/// File behind an NVMe namespace.
pub(crate) fn backing_file(folder: &Path, device: &HostDevice) -> PathBuf {
    let address = device.address.to_string().replace(':', "-");
    folder.join(format!("nvme-{address}.img"))
}

/// Makes the files behind NVMe namespaces, with what the guest that gets one must find in it; full
/// of zeroes where none does.
pub(crate) fn make_backing_files(
    folder: &Path,
    devices: &[HostDevice],
    runs: &[Run],
) -> Result<()> {
    for device in devices.iter().filter(|device| device.kind == Kind::Nvme) {
        let path = backing_file(folder, device);
        let size = u64::from(device.size_mib) << 20;
        match user(device, runs) {
            Some((_, function)) => {
                let pattern = Pattern::new(function.address(), 0);
                pattern::make_file(&path, pattern, size)
            }
            None => File::create(&path).and_then(|file| file.set_len(size)),
        }
        .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// What is wrong with the files behind NVMe namespaces after runs that passed.
pub(crate) fn check_backing_files(
    folder: &Path,
    devices: &[HostDevice],
    runs: &[Run],
) -> Vec<String> {
    let mut failures = Vec::new();
    for device in devices.iter().filter(|device| device.kind == Kind::Nvme) {
        let Some((run, function)) = user(device, runs) else {
            continue;
        };
        // Each boot of the guest writes a generation.
        let boots = match run.mode {
            Mode::Reboot => u64::from(run.repeat) + 1,
            _ => 1,
        };
        let path = backing_file(folder, device);
        let pattern = Pattern::new(function.address(), boots);
        if let Err(error) = pattern::check_file(&path, pattern, 0) {
            failures.push(format!("namespace of {}: {error}", device.address));
        }
    }
    failures
}

/// The run that passes a device through, and the function that it is.
fn user<'a>(device: &HostDevice, runs: &'a [Run]) -> Option<(&'a Run, &'a Function)> {
    let is_it = |function: &&Function| match function {
        Function::Vfio { host, .. } => *host == device.address,
        _ => false,
    };
    let mut runs = runs.iter();
    runs.find_map(|run| Some((run, run.functions.iter().find(is_it)?)))
}

/// QEMU's options for the devices; none for none. `folder` has the files behind them.
pub(crate) fn options(folder: &Path, devices: &[HostDevice]) -> Vec<String> {
    if devices.is_empty() {
        return Vec::new();
    }
    let mut options = Vec::new();
    let mut add = |option: &str, value: String| options.extend([option.to_string(), value]);
    // Before all that it translates for.
    add("-device", "intel-iommu,intremap=on,aw-bits=48".into());
    if devices.iter().any(|device| device.address.bus != 0) {
        add(
            "-device",
            format!("pcie-pci-bridge,id=bridge,bus=pcie.0,addr={BRIDGE:#x}"),
        );
    }
    for (index, device) in devices.iter().enumerate() {
        let bus = match device.address.bus {
            0 => "pcie.0",
            _ => "bridge",
        };
        let number = device.address.device;
        let place = format!("bus={bus},addr={number:#x}");
        match device.kind {
            Kind::Nvme => {
                let file = backing_file(folder, device).display().to_string();
                let file = file.replace(',', ",,");
                add(
                    "-drive",
                    format!("if=none,id=disk{index},format=raw,file={file}"),
                );
                add(
                    "-device",
                    format!("nvme,serial=vpci-{index},drive=disk{index},{place}"),
                );
            }
            // Without these two a virtio device speaks to memory past the IOMMU.
            Kind::Rng => add(
                "-device",
                format!("virtio-rng-pci,disable-legacy=on,iommu_platform=on,{place}"),
            ),
            Kind::E1000e => {
                // Nothing comes from this network that is not an answer.
                add(
                    "-netdev",
                    format!("user,id=net{index},restrict=on,ipv6=off"),
                );
                add("-device", format!("e1000e,netdev=net{index},{place}"));
            }
            // Its own limit of 28 address bits would hide what it is told wrongly.
            _ => add(
                "-device",
                format!("edu,dma_mask=0xffffffffffffffff,{place}"),
            ),
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_gives_devices_and_an_unknown_word_is_named_with_the_known_ones() {
        let kinds = |list| -> Vec<_> {
            let devices = parse(list).unwrap();
            devices.into_iter().map(|device| device.kind).collect()
        };
        assert_eq!(kinds("nvme, rng"), [Kind::Nvme, Kind::Rng]);
        assert_eq!(kinds("all").len(), ALL.len());
        for list in ["", "nvme,floppy", "nvme,"] {
            let error = parse(list).unwrap_err();
            assert!(matches!(&error, Failure::Usage(text) if text.contains("e1000e")));
        }
    }

    #[test]
    fn every_device_has_a_place_of_its_own() {
        let mut devices = parse("all").unwrap();
        devices.sort_by_key(|device| device.address);
        devices.dedup_by_key(|device| device.address);
        assert_eq!(devices.len(), ALL.len());
        assert!(devices.iter().all(|device| device.address.device != BRIDGE));
    }

    #[test]
    fn no_devices_change_nothing_about_the_machine() {
        assert!(options(Path::new("/x"), &[]).is_empty());
    }

    #[test]
    fn the_iommu_comes_first_and_each_device_sits_at_its_address() {
        let line = options(Path::new("/x,y"), &parse("all").unwrap()).join(" ");
        assert!(
            line.starts_with("-device intel-iommu,intremap=on,aw-bits=48 -device pcie-pci-bridge,")
        );
        for part in [
            "-drive if=none,id=disk1,format=raw,file=/x,,y/nvme-0000-00-11.0.img",
            "-device nvme,serial=vpci-1,drive=disk1,bus=pcie.0,addr=0x11",
            "-device virtio-rng-pci,disable-legacy=on,iommu_platform=on,bus=pcie.0,addr=0x12",
            "-netdev user,id=net3,restrict=on,ipv6=off -device e1000e,netdev=net3,bus=pcie.0,addr=0x13",
            "-device edu,dma_mask=0xffffffffffffffff,bus=bridge,addr=0x2",
        ] {
            assert!(line.contains(part), "{line}");
        }
        let line = options(Path::new("/x"), &parse("edu").unwrap()).join(" ");
        assert!(!line.contains("bridge"), "{line}");
    }

    #[test]
    fn a_backing_file_has_the_size_of_its_namespace() {
        let folder = tempfile::tempdir().unwrap();
        let devices = parse("all").unwrap();
        make_backing_files(folder.path(), &devices, &[]).unwrap();
        let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(files.len(), 2);
        let file = backing_file(folder.path(), &devices[1]);
        let length = std::fs::metadata(file).unwrap().len();
        assert_eq!(length, u64::from(NVME_MIB) << 20);
        assert!(check_backing_files(folder.path(), &devices, &[]).is_empty());
    }

    #[test]
    fn a_backing_file_holds_what_its_guest_finds_and_what_that_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let scenario = super::super::scenarios::select(&["vfio-nvme".into()]).unwrap();
        let (devices, runs) = (&scenario[0].l1.devices, &scenario[0].runs);
        make_backing_files(folder.path(), devices, runs).unwrap();
        let failures = check_backing_files(folder.path(), devices, runs);
        assert!(failures[0].contains("wrong contents"), "{failures:?}");
        let pattern = Pattern::new(runs[0].functions[0].address(), 1);
        let file = backing_file(folder.path(), &devices[0]);
        pattern::make_file(&file, pattern, u64::from(NVME_MIB) << 20).unwrap();
        assert!(check_backing_files(folder.path(), devices, runs).is_empty());
        std::fs::remove_file(file).unwrap();
        assert_eq!(check_backing_files(folder.path(), devices, runs).len(), 1);
    }
}
