//! What the rig boots and what it expects: scenarios as plain data.
//!
//! A scenario is written as `scenario.json` into the directory that the rig shares with the L1
//! kernel, and read there by the rig role of the static init. Each [`Run`] is one start of
//! `vpci-vmm run`; what the guest needs to know of it travels on the L2 kernel command line
//! ([`Run::guest_cmdline`], [`GuestParams`]), since a guest has no shared directory.

#![forbid(unsafe_code)]

mod address;
mod function;
mod l1;
mod params;

use serde::{Deserialize, Serialize};
use std::str::FromStr;

pub use address::PciAddress;
pub use function::{Function, Kind};
pub use l1::{HostDevice, L1};
pub use params::{Expected, GuestParams, WATCHDOG_LEAD_S, words};

/// One scenario: an ordered list of guest boots which all must pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Name on the command line of the rig, for example `linux-7`.
    pub name: String,
    /// One line for the list of scenarios.
    pub description: String,
    /// What is special about L1.
    #[serde(default)]
    pub l1: L1,
    /// Seconds after which the whole scenario is given up, boot of L1 not included.
    pub time_limit_s: u64,
    /// The guest boots, run one after another.
    #[serde(default)]
    pub runs: Vec<Run>,
    /// A command line (split at blanks, no shell) that runs in L1 before the runs, with its output
    /// on the serial console. A non-zero status fails the scenario; the last line that it prints
    /// on standard output is kept in the verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<String>,
}

/// One boot of a guest under the reference VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Name of the run within its scenario, for example `2-cpus`.
    pub name: String,
    /// File name of the bzImage in the shared directory.
    pub kernel: String,
    /// File name of the initramfs in the shared directory.
    pub initrd: String,
    /// Words appended to the guest's kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// The PCI functions the guest gets, in the order of the `--vpci` options.
    pub functions: Vec<Function>,
    /// What takes the place of the functions on the same bus in [`Mode::ReuseId`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub substitutes: Vec<Function>,
    /// What the guest does.
    pub mode: Mode,
    /// How often the mode repeats its own step: resets in [`Mode::Reboot`], cycles where
    /// [`Mode::cycles_buses`], seconds that the load of a disk goes on undisturbed in
    /// [`Mode::Full`]; without meaning otherwise.
    #[serde(default)]
    pub repeat: u32,
    /// How often the VM is saved and goes on in a new VMM: at each step that the guest names, up to
    /// this number.
    #[serde(default)]
    pub snapshots: u32,
    /// Value of the VMM's `--hyperv` option; `None` leaves the option out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hyperv: Option<String>,
    /// Type of IOMMU domain that the guest's kernel must have put each function behind the
    /// pvIOMMU into; `None` where the kernel has no driver for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<Domain>,
    /// What the VMM must say instead of starting the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
    /// Seconds from the start of the VMM to its exit. The guest's own watchdog ends it a little
    /// earlier, so that a stuck guest still says where it stuck.
    pub time_limit_s: u64,
}

/// How the VMM refuses to start a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// Its exit status.
    pub status: i32,
    /// What the one line that it prints must contain.
    pub words: Vec<String>,
}

/// Types of default domains of Linux' DMA API (`drivers/iommu/iommu.c`, iommu_group_show_type).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Domain {
    /// Translated; each unmap waits for its flush.
    #[serde(rename = "DMA")]
    Strict,
    /// Translated; unmaps are flushed together, later.
    #[serde(rename = "DMA-FQ")]
    Lazy,
    /// An I/O virtual address is a guest physical address.
    #[serde(rename = "identity")]
    Identity,
}

impl Domain {
    /// The word in sysfs, in the file `type` of an IOMMU group.
    pub fn as_str(self) -> &'static str {
        match self {
            Domain::Strict => "DMA",
            Domain::Lazy => "DMA-FQ",
            Domain::Identity => "identity",
        }
    }

    /// Whether DMA reaches mapped memory only.
    pub fn translates(self) -> bool {
        self != Domain::Identity
    }
}

/// What the guest does once its functions are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Every check: data, exact interrupt counts, moves under load, growth.
    #[default]
    Full,
    /// Data, exact counts and moves, with no load phase and no growth.
    Short,
    /// A data check and a reset, [`Run::repeat`] times, then what [`Mode::Short`] does.
    Reboot,
    /// Unbind and bind of the vPCI bus driver with a check after each, [`Run::repeat`] times,
    /// then what [`Mode::Short`] does.
    Rebind,
    /// Orderly and stray DMA of every test device, then what [`Mode::Short`] does.
    Dma,
    /// Each test device handed to user space by VFIO for such DMA, and back, twice; then what
    /// [`Mode::Short`] does.
    VfioUser,
    /// The kernel's benchmark of DMA mappings on each test device, then what [`Mode::Short`] does.
    MapBenchmark,
    /// As [`Mode::Rebind`], but the VMM ejects each bus in order and plugs it in again.
    Eject,
    /// As [`Mode::Eject`], but the last function of each bus goes ahead of the others, which go on.
    EjectFunction,
    /// As [`Mode::Rebind`], but the VMM takes each bus of test devices away by surprise and plugs it in
    /// again. Drivers of virtio devices do not survive that (docs/testing.md).
    Surprise,
    /// As [`Mode::Eject`] with devices of L1, but nobody tells the VMM: L1 unbinds the first device of
    /// each bus from vfio-pci, and binds it again before the bus is plugged in.
    HostUnbind,
    /// Only the first bus is there at first. Under load on its disk the VMM plugs the others in and
    /// ejects them, [`Run::repeat`] times, and leaves them in; then what [`Mode::Short`] does.
    Hotplug,
    /// Each bus with [`Run::substitutes`] is ejected, comes back with those, is ejected and comes back
    /// as it was, [`Run::repeat`] times; then what [`Mode::Short`] does.
    ReuseId,
    /// Under load the guest starts another kernel by kexec, which does what [`Mode::Short`] does.
    Kexec,
}

impl Mode {
    /// Whether buses go away and come back, [`Run::repeat`] times.
    pub fn cycles_buses(self) -> bool {
        self == Mode::Rebind || self.is_controlled()
    }

    /// Whether educational devices are made to reach for memory that is not theirs.
    pub fn strays(self) -> bool {
        matches!(self, Mode::Full | Mode::Dma | Mode::VfioUser)
    }

    /// Whether the guest asks for buses to be plugged in and taken away.
    pub fn is_controlled(self) -> bool {
        matches!(
            self,
            Mode::Eject
                | Mode::EjectFunction
                | Mode::Surprise
                | Mode::HostUnbind
                | Mode::Hotplug
                | Mode::ReuseId
        )
    }

    /// The word used on the kernel command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Full => "full",
            Mode::Short => "short",
            Mode::Reboot => "reboot",
            Mode::Rebind => "rebind",
            Mode::Dma => "dma",
            Mode::VfioUser => "vfio-user",
            Mode::MapBenchmark => "map-benchmark",
            Mode::Eject => "eject",
            Mode::EjectFunction => "eject-function",
            Mode::Surprise => "surprise",
            Mode::HostUnbind => "host-unbind",
            Mode::Hotplug => "hotplug",
            Mode::ReuseId => "reuse-id",
            Mode::Kexec => "kexec",
        }
    }
}

/// Times that a test device is handed to user space in [`Mode::VfioUser`].
pub const VFIO_CYCLES: usize = 2;

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let modes = [
            Mode::Full,
            Mode::Short,
            Mode::Reboot,
            Mode::Rebind,
            Mode::Dma,
            Mode::VfioUser,
            Mode::MapBenchmark,
            Mode::Eject,
            Mode::EjectFunction,
            Mode::Surprise,
            Mode::HostUnbind,
            Mode::Hotplug,
            Mode::ReuseId,
            Mode::Kexec,
        ];
        let mut modes = modes.into_iter();
        modes
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| format!("vpci.mode={text}: no such mode"))
    }
}

impl Run {
    /// Whether the VMM is told what to do while it runs.
    pub fn is_controlled(&self) -> bool {
        self.mode.is_controlled() || self.snapshots > 0
    }

    /// The functions that are plugged in when the guest boots.
    pub fn at_boot(&self) -> impl Iterator<Item = &Function> {
        let first = self.functions.first().map(Function::bus);
        let later = self.mode == Mode::Hotplug;
        let functions = self.functions.iter();
        functions.filter(move |function| !later || Some(function.bus()) == first)
    }

    /// The guest's share of this run, ready for the L2 kernel command line.
    pub fn guest_params(&self) -> GuestParams {
        GuestParams {
            mode: self.mode,
            repeat: self.repeat,
            time_limit_s: self.time_limit_s.saturating_sub(WATCHDOG_LEAD_S).max(1),
            expect: self.functions.iter().map(Expected::from).collect(),
            swap: self.substitutes.iter().map(Expected::from).collect(),
            grow: self
                .functions
                .iter()
                .any(|function| matches!(function, Function::Blk { grow_mib: 1.., .. })),
            marks: true,
            counted: self
                .functions
                .iter()
                .any(|function| matches!(function, Function::Vfio { .. })),
        }
    }

    /// Words for the L2 kernel command line: console, the guest role and its parameters, then
    /// [`Run::cmdline`].
    pub fn guest_cmdline(&self) -> String {
        let mut line = format!("console=ttyS0 panic=-1 {}", self.guest_params());
        if !self.cmdline.is_empty() {
            line.push(' ');
            line.push_str(&self.cmdline);
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_command_line_gives_parameters_or_an_error(line in "\\PC{0,200}") {
            let _ = line.parse::<GuestParams>();
        }

        #[test]
        fn any_address_survives_its_text(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = PciAddress { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse::<PciAddress>(), Ok(address));
        }

        #[test]
        fn any_text_gives_an_address_or_an_error(text in "[0-9a-f:.x+-]{0,24}") {
            if let Ok(address) = text.parse::<PciAddress>() {
                prop_assert!(address.device < 32 && address.function < 8);
            }
        }
    }

    fn run() -> Run {
        Run {
            name: "2-cpus".into(),
            kernel: "vmlinuz-7".into(),
            initrd: "initrd-7".into(),
            cmdline: "quiet".into(),
            cpus: 2,
            memory_mib: 512,
            functions: vec![
                Function::Blk {
                    bus: "11111111-1234-4000-8000-000000000001".parse().unwrap(),
                    function: 0,
                    size_mib: 64,
                    queues: 2,
                    readonly: false,
                    grow_mib: 8,
                    iommu: true,
                },
                Function::Rng {
                    bus: "11111111-0042-4000-8000-000000000002".parse().unwrap(),
                    function: 3,
                    iommu: false,
                },
                Function::Testdev {
                    bus: "11111111-0043-4000-8000-000000000003".parse().unwrap(),
                    function: 0,
                    iommu: true,
                },
                Function::Vfio {
                    bus: "11111111-0044-4000-8000-000000000004".parse().unwrap(),
                    function: 0,
                    host: "0000:00:11.0".parse().unwrap(),
                    guest: Kind::Nvme,
                    size_mib: 64,
                    iommu: false,
                },
            ],
            substitutes: vec![Function::Rng {
                bus: "11111111-0043-4000-8000-000000000003".parse().unwrap(),
                function: 0,
                iommu: false,
            }],
            mode: Mode::Full,
            repeat: 0,
            snapshots: 0,
            hyperv: None,
            domain: Some(Domain::Lazy),
            refusal: None,
            time_limit_s: 120,
        }
    }

    #[test]
    fn a_scenario_survives_json() {
        let scenario = Scenario {
            name: "linux-7".into(),
            description: "all of it".into(),
            l1: L1 {
                kernel: Some("linux-7-pviommu".into()),
                devices: vec![HostDevice {
                    address: "0000:00:11.0".parse().unwrap(),
                    kind: Kind::Nvme,
                    size_mib: 64,
                    strays: true,
                    left: false,
                }],
                trace: true,
            },
            time_limit_s: 300,
            runs: vec![run()],
            exec: None,
        };
        let json = serde_json::to_string(&scenario).unwrap();
        assert_eq!(serde_json::from_str::<Scenario>(&json).unwrap(), scenario);
    }

    #[test]
    fn the_domain_is_data2_of_the_bus_guid() {
        let run = run();
        assert_eq!(run.functions[0].domain(), 0x1234);
        assert_eq!(run.functions[1].address().to_string(), "0042:00:00.3");
    }

    #[test]
    fn guest_parameters_survive_the_kernel_command_line() {
        let run = run();
        let params: GuestParams = run.guest_cmdline().parse().unwrap();
        assert_eq!(params, run.guest_params());
        assert_eq!(params.time_limit_s, 105);
        assert!(params.grow && params.counted);
    }

    #[test]
    fn an_unknown_key_in_a_scenario_is_refused() {
        let json = r#"{"name":"x","description":"","time_limit_s":1,"runz":[]}"#;
        assert!(serde_json::from_str::<Scenario>(json).is_err());
    }

    #[test]
    fn bad_guest_parameters_are_refused_by_name() {
        for (line, word) in [
            ("vpci.mode=nosuch", "nosuch"),
            ("vpci.repeat=-1", "vpci.repeat"),
            ("vpci.repeat=4294967296", "vpci.repeat"),
            ("vpci.expect=1234:00:00.0", "1234:00:00.0"),
            ("vpci.expect=1234:00:00.0=floppy", "floppy"),
            ("vpci.expect=1234:00:20.0=blk", "1234:00:20.0"),
            ("vpci.expect=1234:00:00.8=blk", "1234:00:00.8"),
            ("vpci.expect=1234:100:00.0=blk", "1234:100:00.0"),
        ] {
            let error = line.parse::<GuestParams>().unwrap_err();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
