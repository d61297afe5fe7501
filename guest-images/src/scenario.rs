//! What the rig boots and what it expects: scenarios as plain data.
//!
//! A scenario is written as `scenario.json` into the directory that the rig shares with the L1
//! kernel, and read there by the rig role of the static init. Each [`Run`] is one start of
//! `vpci-vmm run`; what the guest needs to know of it travels on the L2 kernel command line
//! ([`Run::guest_cmdline`], [`GuestParams`]), since a guest has no shared directory.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

/// One scenario: an ordered list of guest boots which all must pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Name on the command line of the rig, for example `linux-7`.
    pub name: String,
    /// One line for the list of scenarios.
    pub description: String,
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
    /// What the guest does.
    pub mode: Mode,
    /// How often the mode repeats its own step: resets in [`Mode::Reboot`], cycles in
    /// [`Mode::Rebind`], [`Mode::Eject`] and [`Mode::Surprise`]; without meaning otherwise.
    #[serde(default)]
    pub repeat: u32,
    /// Value of the VMM's `--hyperv` option; `None` leaves the option out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hyperv: Option<String>,
    /// Type of IOMMU domain that the guest's kernel must have put each function behind the
    /// pvIOMMU into; `None` where the kernel has no driver for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<Domain>,
    /// Seconds from the start of the VMM to its exit. The guest's own watchdog ends it a little
    /// earlier, so that a stuck guest still says where it stuck.
    pub time_limit_s: u64,
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

/// A PCI function of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Function {
    /// A virtio-blk disk.
    Blk {
        /// Instance GUID of the vPCI bus; its Data2 is the PCI domain the guest shall use.
        bus: Uuid,
        /// PCI function number on that bus, 0 to 7.
        #[serde(default)]
        function: u8,
        /// Size of the disk in MiB.
        size_mib: u32,
        /// Number of request queues.
        queues: u16,
        /// Whether the disk is read-only.
        #[serde(default)]
        readonly: bool,
        /// MiB by which the disk grows when the guest is ready for it; 0 keeps its size.
        #[serde(default)]
        grow_mib: u32,
        /// Whether it is behind the pvIOMMU.
        #[serde(default)]
        iommu: bool,
    },
    /// A virtio-rng entropy source.
    Rng {
        /// Instance GUID of the vPCI bus.
        bus: Uuid,
        /// PCI function number on that bus, 0 to 7.
        #[serde(default)]
        function: u8,
        /// Whether it is behind the pvIOMMU.
        #[serde(default)]
        iommu: bool,
    },
    /// The DMA test device.
    Testdev {
        /// Instance GUID of the vPCI bus.
        bus: Uuid,
        /// PCI function number on that bus, 0 to 7.
        #[serde(default)]
        function: u8,
        /// Whether it is behind the pvIOMMU.
        #[serde(default)]
        iommu: bool,
    },
}

impl Function {
    /// Instance GUID of the vPCI bus the function sits on.
    pub fn bus(&self) -> Uuid {
        match self {
            Function::Blk { bus, .. }
            | Function::Rng { bus, .. }
            | Function::Testdev { bus, .. } => *bus,
        }
    }

    /// PCI function number on the bus.
    pub fn number(&self) -> u8 {
        match self {
            Function::Blk { function, .. }
            | Function::Rng { function, .. }
            | Function::Testdev { function, .. } => *function,
        }
    }

    /// Whether it is behind the pvIOMMU.
    pub fn iommu(&self) -> bool {
        match self {
            Function::Blk { iommu, .. }
            | Function::Rng { iommu, .. }
            | Function::Testdev { iommu, .. } => *iommu,
        }
    }

    /// PCI domain that the bus GUID asks for: Data2 (`docs/spec/vpci.md#1-identity`).
    pub fn domain(&self) -> u16 {
        self.bus().as_fields().1
    }

    /// The kind, as the guest and the host report name it.
    pub fn kind(&self) -> Kind {
        match self {
            Function::Blk { .. } => Kind::Blk,
            Function::Rng { .. } => Kind::Rng,
            Function::Testdev { .. } => Kind::Testdev,
        }
    }

    /// Address the function must have in the guest.
    pub fn address(&self) -> PciAddress {
        PciAddress {
            domain: u32::from(self.domain()),
            bus: 0,
            device: 0,
            function: self.number(),
        }
    }
}

/// Kind of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// virtio-blk.
    Blk,
    /// virtio-rng.
    Rng,
    /// The DMA test device.
    Testdev,
    /// Anything else.
    Other,
}

impl Kind {
    /// The word used on command lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Blk => "blk",
            Kind::Rng => "rng",
            Kind::Testdev => "testdev",
            Kind::Other => "other",
        }
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
    /// As [`Mode::Rebind`], but the VMM takes each bus away by surprise and plugs it in again.
    Surprise,
}

impl Mode {
    /// Whether buses go away and come back, [`Run::repeat`] times.
    pub fn cycles_buses(self) -> bool {
        matches!(self, Mode::Rebind | Mode::Eject | Mode::Surprise)
    }

    /// Whether the VMM is told what to do while it runs.
    pub fn is_controlled(self) -> bool {
        matches!(self, Mode::Eject | Mode::Surprise)
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
            Mode::Surprise => "surprise",
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
            Mode::Surprise,
        ];
        let mut modes = modes.into_iter();
        modes
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| format!("vpci.mode={text}: no such mode"))
    }
}

/// Address of a PCI function in a guest, written `dddd:bb:dd.f` in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// Domain (segment).
    pub domain: u32,
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

impl FromStr for PciAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text}: not a PCI address (dddd:bb:dd.f)");
        let mut parts = text.split([':', '.']);
        let mut next = || {
            let part = parts.next().ok_or_else(bad)?;
            u32::from_str_radix(part, 16).map_err(|_| bad())
        };
        let (domain, bus, device, function) = (next()?, next()?, next()?, next()?);
        if parts.next().is_some() || bus > 0xff || device > 31 || function > 7 {
            return Err(bad());
        }
        Ok(Self {
            domain,
            bus: bus as u8,
            device: device as u8,
            function: function as u8,
        })
    }
}

impl Serialize for PciAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PciAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Run {
    /// The guest's share of this run, ready for the L2 kernel command line.
    pub fn guest_params(&self) -> GuestParams {
        GuestParams {
            mode: self.mode,
            repeat: self.repeat,
            time_limit_s: self.time_limit_s.saturating_sub(WATCHDOG_LEAD_S).max(1),
            expect: self
                .functions
                .iter()
                .map(|function| Expected {
                    address: function.address(),
                    kind: function.kind(),
                })
                .collect(),
            grow: self
                .functions
                .iter()
                .any(|function| matches!(function, Function::Blk { grow_mib: 1.., .. })),
            marks: true,
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

/// Seconds by which a guest's own watchdog fires before the run's time limit.
pub const WATCHDOG_LEAD_S: u64 = 15;

/// A PCI function that the guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Where it must appear.
    pub address: PciAddress,
    /// What it must be.
    pub kind: Kind,
}

/// What the guest role reads from its kernel command line.
///
/// Keys: `vpci.role=guest`, `vpci.mode`, `vpci.repeat`, `vpci.limit` (seconds), `vpci.expect`
/// (a comma-separated list of `ADDRESS=KIND`), `vpci.grow` (0 or 1) and `vpci.marks` (0 where no
/// VMM listens to the mark port).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestParams {
    /// What to do.
    pub mode: Mode,
    /// Number of resets or rebinds.
    pub repeat: u32,
    /// Seconds until the guest's watchdog ends it.
    pub time_limit_s: u64,
    /// The functions to wait for.
    pub expect: Vec<Expected>,
    /// Whether a disk grows on request.
    pub grow: bool,
    /// Whether to write marks to the mark port.
    pub marks: bool,
}

impl fmt::Display for GuestParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "vpci.role=guest vpci.mode={} vpci.repeat={} vpci.limit={} vpci.grow={} vpci.marks={} \
             vpci.expect=",
            self.mode.as_str(),
            self.repeat,
            self.time_limit_s,
            u8::from(self.grow),
            u8::from(self.marks),
        )?;
        for (index, expected) in self.expect.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}={}", expected.address, expected.kind.as_str())?;
        }
        Ok(())
    }
}

impl FromStr for GuestParams {
    type Err = String;

    fn from_str(cmdline: &str) -> Result<Self, String> {
        let words = words(cmdline);
        let number = |key: &str, default: u64| match words.get(key) {
            None => Ok(default),
            Some(text) => text
                .parse::<u64>()
                .map_err(|_| format!("{key}={text}: not a number")),
        };
        let repeat = number("vpci.repeat", 0)?;
        Ok(Self {
            mode: words
                .get("vpci.mode")
                .map_or(Ok(Mode::Full), |m| m.parse())?,
            repeat: u32::try_from(repeat)
                .map_err(|_| format!("vpci.repeat={repeat}: too large"))?,
            time_limit_s: number("vpci.limit", 120)?,
            expect: words
                .get("vpci.expect")
                .copied()
                .unwrap_or_default()
                .split(',')
                .filter(|item| !item.is_empty())
                .map(parse_expected)
                .collect::<Result<_, _>>()?,
            grow: number("vpci.grow", 0)? != 0,
            marks: number("vpci.marks", 1)? != 0,
        })
    }
}

fn parse_expected(item: &str) -> Result<Expected, String> {
    let (address, kind) = item
        .split_once('=')
        .ok_or_else(|| format!("vpci.expect: {item}: not ADDRESS=KIND"))?;
    let kind = [Kind::Blk, Kind::Rng, Kind::Testdev]
        .into_iter()
        .find(|known| known.as_str() == kind)
        .ok_or_else(|| format!("vpci.expect: {kind}: no such kind"))?;
    Ok(Expected {
        address: address.parse()?,
        kind,
    })
}

/// The `key=value` words of a kernel command line; the last one of a key wins.
pub fn words(cmdline: &str) -> BTreeMap<&str, &str> {
    cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.split_once('='))
        .collect()
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
            ],
            mode: Mode::Full,
            repeat: 0,
            hyperv: None,
            domain: Some(Domain::Lazy),
            time_limit_s: 120,
        }
    }

    #[test]
    fn a_scenario_survives_json() {
        let scenario = Scenario {
            name: "linux-7".into(),
            description: "all of it".into(),
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
        assert!(params.grow);
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
