//! The diagnosis of hosts that are made up below a directory.
#![forbid(unsafe_code)]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::finding::{Status, Topic};
use super::*;

/// A host that is made up.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, path: &str, text: &str) -> &Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    /// A PCI function in a group, as sysfs shows it.
    fn device(&self, group: u32, address: &str, class: &str, driver: Option<&str>) -> &Self {
        let device = format!("sys/devices/pci0000:00/{address}");
        self.file(&format!("{device}/vendor"), "0x1af4\n")
            .file(&format!("{device}/device"), "0x1044\n")
            .file(&format!("{device}/class"), &format!("0x{class}\n"));
        if let Some(driver) = driver {
            let target = format!("../../../bus/pci/drivers/{driver}");
            symlink(target, self.0.path().join(&device).join("driver")).unwrap();
        }
        let target = format!("../../../kernel/iommu_groups/{group}");
        symlink(target, self.0.path().join(&device).join("iommu_group")).unwrap();
        let group = format!("sys/kernel/iommu_groups/{group}/devices");
        for (folder, up) in [
            (&*group, "../../../.."),
            ("sys/bus/pci/devices", "../../.."),
        ] {
            let folder = self.0.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            let target = format!("{up}/devices/pci0000:00/{address}");
            symlink(target, folder.join(address)).unwrap();
        }
        self
    }

    fn intel_iommu(&self, ecap: &str) -> &Self {
        self.file("sys/class/iommu/dmar0/intel-iommu/ecap", ecap)
    }

    fn diagnosis(&self) -> Diagnosis {
        let path = self.0.path().join("bin");
        Diagnosis::new(&Root::new(self.0.path()), path.as_os_str())
    }
}

#[track_caller]
fn named<'a>(diagnosis: &'a Diagnosis, name: &str) -> &'a Finding {
    let mut entries = diagnosis.findings.iter();
    let found = entries.find(|finding| finding.name == name);
    found.unwrap_or_else(|| panic!("{name} in {:?}", diagnosis.findings))
}

#[test]
fn an_empty_host_can_do_nothing_and_says_so_for_everything() {
    let diagnosis = Host::new().diagnosis();
    assert_eq!(diagnosis.exit_status(), 3);
    assert_eq!(diagnosis.plan.bed, Bed::Sim);
    assert_eq!(diagnosis.plan.pass_through, PassThrough::None);
    assert!(!diagnosis.plan.hybrid_possible);
    assert_eq!(diagnosis.plan.hypercalls, Hypercalls::User);
    for name in ["/dev/kvm", "IOMMU", "/dev/vfio/vfio", "/dev/iommu"] {
        let finding = named(&diagnosis, name);
        assert_eq!(finding.status, Status::Missing, "{name}");
        assert!(finding.advice.is_some(), "{name}");
    }
    assert_eq!(named(&diagnosis, "IOMMU groups").status, Status::Missing);
    assert_eq!(diagnosis.host.qemu, None);
    assert_eq!(diagnosis.host.memory, 0);
    let text = diagnosis.text();
    assert!(
        text.ends_with(
            "doctor: guests cannot run here: /dev/kvm: No such file or directory (os error 2)\n"
        ),
        "{text}"
    );
}

#[test]
fn groups_are_listed_with_their_devices_and_drivers() {
    let host = Host::new();
    host.intel_iommu("f00f5e\n")
        .device(1, "0000:00:01.0", "060400", Some("pcieport"))
        .device(1, "0000:01:00.0", "010802", Some("vfio-pci"))
        .device(2, "0000:00:02.0", "020000", Some("e1000e"))
        .device(10, "0000:00:03.0", "020000", Some("vfio-pci"))
        .device(10, "0000:00:03.1", "020000", Some("igb"))
        .device(11, "0000:00:04.0", "0c0330", Some("mlx5_vfio_pci"))
        .device(11, "0000:00:04.1", "0c0330", None)
        .device(12, "0000:00:1f.0", "060100", None);
    let diagnosis = host.diagnosis();
    let ids: Vec<_> = diagnosis.vfio.groups.iter().map(|g| &g.id[..]).collect();
    assert_eq!(ids, ["1", "2", "10", "11", "12"]);
    let viable: Vec<_> = diagnosis.vfio.groups.iter().map(|g| g.viable).collect();
    assert_eq!(viable, [true, false, false, true, false]);
    let nvme = &diagnosis.vfio.groups[0].devices[1];
    assert_eq!(nvme.address, "0000:01:00.0");
    assert_eq!(nvme.id, "1af4:1044");
    assert_eq!(nvme.class, "010802");
    assert_eq!(nvme.driver.as_deref(), Some("vfio-pci"));
    let status = |id: &str| named(&diagnosis, &format!("group {id}")).status;
    assert_eq!(status("1"), Status::Ok);
    assert_eq!(status("2"), Status::Note);
    assert_eq!(status("10"), Status::Limited);
    let advice = named(&diagnosis, "group 10").advice.as_deref();
    assert_eq!(advice, Some("unbind 0000:00:03.1"));
    let found = &named(&diagnosis, "group 11").found;
    let all = "0000:00:04.0 1af4:1044 (mlx5_vfio_pci), 0000:00:04.1 1af4:1044 (no driver)";
    assert_eq!(found, all);
    assert!(named(&diagnosis, "group 12").follows.contains("bridge"));
}

#[test]
fn each_device_of_vfio_is_ready_or_told_what_it_lacks() {
    let host = Host::new();
    host.device(1, "0000:01:00.0", "010802", Some("vfio-pci"))
        .device(2, "0000:00:02.0", "020000", Some("e1000e"))
        .file("proc/interrupts", " 24:  0  IR-PCI-MSI-0000:00:02.0\n")
        .file("dev/vfio/1", "");
    let name = "device 0000:01:00.0";
    let diagnosis = host.diagnosis();
    let finding = named(&diagnosis, name);
    assert_eq!(finding.status, Status::Limited);
    assert_eq!(finding.found, "/dev/vfio/vfio is not there");
    let advice = finding.advice.as_deref().unwrap();
    assert!(advice.starts_with("modprobe vfio-pci"), "{advice}");
    let others = diagnosis.findings.iter();
    let others = others.filter(|finding| finding.name.starts_with("device "));
    assert_eq!(others.count(), 1, "those of VFIO only");
    host.file("dev/vfio/vfio", "");
    let finding = named(&host.diagnosis(), name).clone();
    assert_eq!(finding.status, Status::Ok);
    assert_eq!(finding.found, "can be opened by its group (type1)");
}

#[test]
fn character_devices_and_nesting_are_found() {
    let host = Host::new();
    // Nested translation and scalable mode.
    host.intel_iommu("80004000000")
        .device(1, "0000:00:02.0", "010802", Some("vfio-pci"))
        .file(
            "sys/devices/pci0000:00/0000:00:02.0/vfio-dev/vfio3/dev",
            "511:3",
        )
        .file("dev/vfio/devices/vfio3", "")
        .file("dev/iommu", "");
    let diagnosis = host.diagnosis();
    assert_eq!(diagnosis.vfio.cdevs, ["vfio3"]);
    let device = &diagnosis.vfio.groups[0].devices[0];
    assert_eq!(device.cdev.as_deref(), Some("vfio3"));
    assert!(diagnosis.vfio.iommufd && !diagnosis.vfio.container);
    assert_eq!(diagnosis.plan.pass_through, PassThrough::Nested);
    assert!(diagnosis.plan.pass_through_ready);
    assert_eq!(named(&diagnosis, "nested translation").status, Status::Ok);
    // Each bit alone is not enough.
    for ecap in ["4000000", "80000000000", "garbage"] {
        host.intel_iommu(ecap);
        let diagnosis = host.diagnosis();
        assert_eq!(diagnosis.plan.pass_through, PassThrough::None, "{ecap}");
        assert_eq!(named(&diagnosis, "nested translation").status, Status::Note);
    }
}

#[test]
fn an_amd_iommu_is_not_taken_for_one_that_nests() {
    let host = Host::new();
    host.file(
        "sys/class/iommu/ivhd0/amd-iommu/features",
        "ffffffff:ffffffff",
    );
    let diagnosis = host.diagnosis();
    let [iommu] = &diagnosis.vfio.iommus[..] else {
        panic!("{:?}", diagnosis.vfio.iommus);
    };
    assert_eq!((iommu.kind, iommu.nested), ("amd", false));
}

#[test]
fn interrupt_remapping_is_seen_in_the_names_of_interrupt_chips() {
    let host = Host::new();
    host.intel_iommu("0");
    let name = "interrupt remapping";
    let finding = |host: &Host| named(&host.diagnosis(), name).clone();
    assert_eq!(finding(&host).status, Status::Missing);
    assert!(finding(&host).follows.contains("EPERM"));
    host.file(
        "proc/interrupts",
        " 24:  0  PCI-MSI-0000:00:02.0  0-edge  nvme0q0\n",
    );
    assert_eq!(finding(&host).status, Status::Missing);
    let parameter = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    host.file(parameter, "Y\n");
    assert_eq!(finding(&host).status, Status::Limited);
    host.file(
        "proc/interrupts",
        " 24:  0  IR-PCI-MSI-0000:00:02.0  0-edge  nvme0q0\n",
    );
    assert_eq!(finding(&host).status, Status::Ok);
}

#[test]
fn the_limit_of_locked_memory_counts_unless_the_user_is_exempt() {
    let host = Host::new();
    host.file(
        "proc/self/limits",
        "Limit                     Soft Limit           Hard Limit           Units     \n\
         Max locked memory         8388608              unlimited            bytes     \n",
    );
    let diagnosis = host.diagnosis();
    assert_eq!(diagnosis.host.memlock, Some(8 << 20));
    let finding = named(&diagnosis, "locked memory");
    assert_eq!(
        (finding.topic, finding.status),
        (Topic::PassThrough, Status::Limited)
    );
    assert_eq!(finding.found, "8.0 MiB");
    host.file("proc/self/status", "Name:\tx\nCapEff:\t0000000000004000\n");
    assert_eq!(host.diagnosis().host.memlock, None);
    host.file("proc/self/status", "Name:\tx\nCapEff:\t0000000000002000\n");
    assert_eq!(host.diagnosis().host.memlock, Some(8 << 20));
    host.file(
        "proc/self/limits",
        "Max locked memory  unlimited  unlimited  bytes\n",
    );
    assert_eq!(host.diagnosis().host.memlock, None);
}

#[test]
fn memory_and_the_kind_of_machine_are_read() {
    let host = Host::new();
    host.file(
        "proc/meminfo",
        "MemTotal:  4194304 kB\nMemFree: 1 kB\nMemAvailable: 1048576 kB\n",
    )
    .file("proc/cpuinfo", "flags\t\t: fpu hypervisor\n")
    .file("proc/sys/kernel/osrelease", "7.3.4\n");
    let diagnosis = host.diagnosis();
    assert_eq!(diagnosis.host.memory, 4 << 30);
    assert_eq!(diagnosis.host.memory_available, 1 << 30);
    assert!(diagnosis.host.is_guest);
    assert_eq!(
        named(&diagnosis, "memory available").status,
        Status::Limited
    );
    assert_eq!(named(&diagnosis, "kernel").found, "7.3.4");
    host.file(
        "proc/meminfo",
        "MemTotal: x kB\nMemAvailable: 99999999999999999999 kB\n",
    );
    assert_eq!(host.diagnosis().host.memory_available, 0);
}

fn install_qemu(host: &Path, script: &str) {
    let path = host.join("bin/qemu-system-x86_64");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn the_emulator_is_asked_for_its_version() {
    let host = Host::new();
    install_qemu(
        host.0.path(),
        "#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian)'\n",
    );
    let diagnosis = host.diagnosis();
    assert_eq!(diagnosis.host.qemu.as_deref(), Some("7.2.22"));
    assert_eq!(named(&diagnosis, "QEMU for the rig").status, Status::Ok);
    install_qemu(host.0.path(), "#!/bin/sh\nexit 1\n");
    assert_eq!(host.diagnosis().host.qemu, None);
}

#[test]
fn the_json_form_has_its_version_and_every_line_of_the_table() {
    let host = Host::new();
    host.device(3, "0000:00:02.0", "020000", Some("e1000e"));
    let diagnosis = host.diagnosis();
    let json: serde_json::Value = serde_json::from_str(&diagnosis.json().unwrap()).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(json["plan"]["guests"], false);
    assert_eq!(json["plan"]["hypercalls"], "user");
    assert_eq!(json["plan"]["bed"], "sim");
    assert_eq!(json["plan"]["pass_through"], "none");
    assert_eq!(json["kvm"]["usable"], false);
    assert_eq!(json["vfio"]["groups"][0]["devices"][0]["driver"], "e1000e");
    let findings = json["findings"].as_array().unwrap();
    assert_eq!(findings.len(), diagnosis.findings.len());
    assert_eq!(findings[0]["status"], "missing");
    let text = diagnosis.text();
    for finding in findings {
        let name = finding["name"].as_str().unwrap();
        assert!(text.contains(name), "{name}");
    }
    assert_eq!(text.matches("doctor:").count(), 1);
}
