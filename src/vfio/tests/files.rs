//! What the host's files say, and what is said of it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;

use crate::vfio::sysfs;
use crate::vfio::{Interface, VfioError, check, check_memlock, survey};

const ADDRESS: &str = "0000:00:05.0";

/// The files of a host.
struct Host(TempDir);

impl Host {
    /// A host with an IOMMU that remaps interrupts, and the nodes of both interfaces.
    fn new() -> Self {
        let host = Self(TempDir::new().unwrap());
        host.write(
            "proc/interrupts",
            " 24: 7  IR-PCI-MSI-0000:00:02.0  nvme0q0",
        );
        host.write("sys/class/iommu/dmar0/intel-iommu/ecap", "1f0fb5");
        for node in ["dev/vfio/vfio", "dev/iommu"] {
            host.write(node, "");
        }
        host
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.root().join(path)).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    /// A device in group `group`, with its group's node.
    fn device(&self, address: &str, group: u32, class: &str, driver: Option<&str>) {
        let base = format!("sys/bus/pci/devices/{address}");
        self.write(&format!("{base}/vendor"), "0x1b36");
        self.write(&format!("{base}/device"), "0x0010");
        self.write(&format!("{base}/class"), &format!("0x{class}"));
        let groups = "../../../../kernel/iommu_groups";
        self.link(&format!("{base}/iommu_group"), &format!("{groups}/{group}"));
        if let Some(driver) = driver {
            self.link(
                &format!("{base}/driver"),
                &format!("../../drivers/{driver}"),
            );
        }
        let member = format!("sys/kernel/iommu_groups/{group}/devices/{address}");
        self.link(&member, &format!("../../../../bus/pci/devices/{address}"));
        self.write(&format!("dev/vfio/{group}"), "");
    }

    fn cdev(&self, address: &str, name: &str) {
        let node = format!("sys/bus/pci/devices/{address}/vfio-dev/{name}/dev");
        self.write(&node, "511:0");
        self.write(&format!("dev/vfio/devices/{name}"), "");
    }

    fn check(&self, wanted: Interface) -> Result<Interface, VfioError> {
        check(self.root(), ADDRESS, wanted).map(|facts| facts.interface)
    }

    fn refusal(&self) -> String {
        let text = self.check(Interface::Auto).unwrap_err().to_string();
        assert!(!text.contains('\n'), "{text:?}");
        text
    }
}

fn ready() -> Host {
    let host = Host::new();
    host.device(ADDRESS, 7, "010802", Some("vfio-pci"));
    host
}

#[test]
fn the_interface_is_iommufd_where_the_host_has_it() {
    let host = ready();
    assert_eq!(host.check(Interface::Auto).unwrap(), Interface::Type1);
    assert!(host.check(Interface::Iommufd).is_err());
    host.cdev(ADDRESS, "vfio3");
    assert_eq!(host.check(Interface::Auto).unwrap(), Interface::Iommufd);
    assert_eq!(host.check(Interface::Type1).unwrap(), Interface::Type1);
    host.remove("dev/iommu");
    assert_eq!(host.check(Interface::Auto).unwrap(), Interface::Type1);
    let error = host.check(Interface::Iommufd).unwrap_err().to_string();
    assert_eq!(
        error,
        "0000:00:05.0: /dev/iommu is not there; modprobe iommufd (CONFIG_IOMMUFD)"
    );
}

#[test]
fn each_thing_that_is_missing_has_its_line() {
    let host = Host::new();
    assert_eq!(
        host.refusal(),
        "0000:00:05.0: the host has no such PCI device; lspci -D lists those that it has"
    );
    let bad = check(host.root(), "5.0", Interface::Auto).unwrap_err();
    assert_eq!(
        bad.to_string(),
        "\"5.0\" is no PCI address: it looks like 0000:00:05.0"
    );

    let host = Host::new();
    host.device(ADDRESS, 7, "010802", Some("nvme"));
    assert_eq!(
        host.refusal(),
        "0000:00:05.0: it is bound to nvme, not to vfio-pci; write vfio-pci to \
         /sys/bus/pci/devices/0000:00:05.0/driver_override, 0000:00:05.0 to \
         /sys/bus/pci/drivers/nvme/unbind, and 0000:00:05.0 to /sys/bus/pci/drivers_probe"
    );

    let host = Host::new();
    host.device(ADDRESS, 7, "010802", None);
    assert_eq!(
        host.refusal(),
        "0000:00:05.0: it is not bound to vfio-pci; write vfio-pci to \
         /sys/bus/pci/devices/0000:00:05.0/driver_override, and 0000:00:05.0 to \
         /sys/bus/pci/drivers_probe"
    );
    host.remove("sys/bus/pci/devices/0000:00:05.0/iommu_group");
    assert!(host.refusal().contains("no IOMMU in use for it"));

    let host = ready();
    host.write("sys/kernel/iommu_groups/7/name", "vfio-noiommu");
    assert!(host.refusal().contains("no-IOMMU mode"));

    let host = ready();
    host.remove("dev/vfio/7");
    assert!(
        host.refusal()
            .starts_with("0000:00:05.0: /dev/vfio/7 is not there; ")
    );
    host.write("dev/vfio/7", "");
    host.remove("dev/vfio/vfio");
    assert!(
        host.refusal()
            .starts_with("0000:00:05.0: /dev/vfio/vfio is not there; modprobe")
    );
}

#[test]
fn a_group_that_the_host_uses_is_named_with_its_users() {
    let host = ready();
    host.device("0000:00:04.0", 7, "060400", Some("pcieport"));
    host.device("0000:00:05.1", 7, "020000", Some("vfio-pci"));
    host.device("0000:00:05.2", 7, "0c0300", None);
    assert!(host.check(Interface::Auto).is_ok());
    host.device("0000:00:05.3", 7, "010601", Some("ahci"));
    assert_eq!(
        host.refusal(),
        "0000:00:05.0: its IOMMU group 7 has devices that the host uses: 0000:00:05.3 (ahci); unbind \
         each from its driver, or bind it to vfio-pci"
    );
}

#[test]
fn interrupts_must_be_confined_or_the_module_be_told_not_to_mind() {
    let host = ready();
    host.write("proc/interrupts", " 24: 7  PCI-MSI-0000:00:02.0  nvme0q0");
    assert!(
        host.refusal()
            .contains("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
    );
    host.write(
        "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
        "Y",
    );
    assert!(host.check(Interface::Auto).is_ok());
    host.cdev(ADDRESS, "vfio0");
    assert!(
        host.refusal().contains("/sys/module/iommufd/"),
        "each module has its own"
    );
}

#[test]
fn addresses_are_as_sysfs_spells_them() {
    for good in ["0000:00:05.0", "10000:e1:00.7"] {
        assert!(sysfs::is_address(good), "{good}");
    }
    let bad = [
        "",
        "00:05.0",
        "0000:00:05",
        "0000.00:05:0",
        "0000:0g:05.0",
        "0000:00:05.00",
        "0000:00:05.0/..",
        "../0:00:05.0",
        "0000:00:0A.0",
        "0000:00:05.0 ",
    ];
    for bad in bad {
        assert!(!sysfs::is_address(bad), "{bad}");
    }
}

#[test]
fn locked_memory_is_checked_against_all_copies() {
    const MIB: u64 = 1 << 20;
    let host = Host::new();
    let check = |copies| check_memlock(host.root(), 512 * MIB, copies);
    // Nothing is known, so nothing is refused.
    check(100).unwrap();
    let limits = "Max file size unlimited unlimited bytes\n\
                  Max locked memory         1073741824           unlimited            bytes";
    host.write("proc/self/limits", limits);
    host.write("proc/self/status", "Name:\tx\nCapEff:\t0000000000000000");
    check(2).unwrap();
    let error = check(3).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "the limit on locked memory is 1024 MiB, and passed-through devices need 1536 MiB (guest \
             RAM, 3 times); raise it"
        ),
        "{error}"
    );
    host.write("proc/self/status", "CapEff:\t0000000000004000");
    check(3).unwrap();
    host.write("proc/self/status", "CapEff:\t0");
    host.write(
        "proc/self/limits",
        "Max locked memory   unlimited   unlimited   bytes",
    );
    check(3).unwrap();
}

#[test]
fn a_survey_lists_iommus_groups_and_nodes() {
    let host = ready();
    host.device("0000:00:1f.0", 9, "060100", None);
    host.cdev(ADDRESS, "vfio0");
    let reserved = "0x00000000fee00000 0x00000000feefffff msi\n\
                    0x0000000000100000 0x00000000001fffff direct-relaxable\nnonsense";
    host.write("sys/kernel/iommu_groups/7/reserved_regions", reserved);
    let found = survey(host.root());
    assert_eq!((found.iommus.len(), found.iommus[0].kind), (1, "intel"));
    assert!(found.interrupt_remapping && found.unsafe_interrupts.is_empty());
    assert_eq!(found.cdevs, ["vfio0"]);
    let [first, second] = &found.groups[..] else {
        panic!("{:?}", found.groups);
    };
    assert_eq!((first.id, first.is_viable()), (7, true));
    assert_eq!(first.reserved, [0xfee0_0000..=0xfeef_ffff]);
    assert_eq!(first.devices[0].id, "1b36:0010");
    assert_eq!(first.devices[0].cdev.as_deref(), Some("vfio0"));
    assert_eq!((second.id, second.is_viable()), (9, false));
    assert!(second.devices[0].is_bridge());
    assert_eq!(survey(Path::new("/nonexistent")), Default::default());
}
