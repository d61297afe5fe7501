//! `--vpci SPEC`: which functions sit on which bus.
//!
//! `KIND[,KEY=VALUE]...`, for example `blk,path=disk.img,queues=2`. Parsing ([`FunctionSpec`]) looks
//! at one SPEC alone; [`place`] gives every function its bus and refuses combinations that a guest
//! could not tell apart.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::str::FromStr;

use uuid::Uuid;

use crate::error::Error;
use crate::image;
use crate::passthrough;

/// Most `--vpci` options in one run.
pub(crate) const MAX_FUNCTIONS: usize = 64;

/// Most request queues of a blk function.
pub(crate) const MAX_QUEUES: u16 = 64;

/// Bus GUIDs are made from this one by putting the PCI domain in its second group.
const DEFAULT_BUS: Uuid = Uuid::from_u128(0x56504349_0000_4000_8000_766d2d767063);

/// First PCI domain that is handed out by position.
const FIRST_DOMAIN: u16 = 1;

/// What a function is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// virtio-blk over a raw image file.
    Blk {
        /// Image file.
        path: PathBuf,
        /// True if the guest may not write.
        readonly: bool,
        /// Number of request queues, 1 to [`MAX_QUEUES`]; the number of vCPUs when absent.
        queues: Option<u16>,
    },
    /// virtio-rng.
    Rng,
    /// The DMA engine for tests.
    Testdev,
    /// A device of the host, by VFIO.
    Vfio(HostDevice),
}

/// A device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostDevice {
    /// Its PCI address there, with the domain, such as `0000:00:05.0`.
    pub(crate) address: String,
    /// How first-stage domains of the guest reach it.
    pub(crate) dma: DmaMode,
}

/// How first-stage domains of the guest reach a device of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DmaMode {
    /// The best that the host can do.
    Auto,
    /// Its IOMMU walks the guest's tables.
    Nested,
    /// This program follows the guest's tables and maps what they say.
    Shadow,
}

/// One parsed SPEC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FunctionSpec {
    /// What the function is.
    pub(crate) kind: Kind,
    /// Instance GUID of its bus, if given.
    pub(crate) bus: Option<Uuid>,
    /// Function number on the bus, 0 to 7.
    pub(crate) function: u8,
    /// The function is behind the pvIOMMU.
    pub(crate) iommu: bool,
}

/// One function with its final place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlacedFunction {
    /// What the function is.
    pub(crate) kind: Kind,
    /// Instance GUID of its bus.
    pub(crate) bus: Uuid,
    /// Function number on the bus, 0 to 7.
    pub(crate) function: u8,
    /// The function is behind the pvIOMMU.
    pub(crate) iommu: bool,
}

/// Why a SPEC, or the SPECs together, were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SpecError {
    /// First word is no kind of function.
    #[error("unknown kind '{kind}' (use blk, rng, testdev or vfio)")]
    UnknownKind {
        /// The word.
        kind: String,
    },
    /// A word after the kind has no `=`.
    #[error("'{word}' is not KEY=VALUE")]
    NotKeyValue {
        /// The word.
        word: String,
    },
    /// The kind has no such key.
    #[error("unknown key '{key}' for {kind} (it takes {allowed})")]
    UnknownKey {
        /// The key.
        key: String,
        /// Kind of the function.
        kind: &'static str,
        /// What it takes instead.
        allowed: String,
    },
    /// A key was given twice.
    #[error("key '{key}' is given twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A value is not what the key takes.
    #[error("bad value '{value}' for '{key}' ({expected})")]
    BadValue {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What the key takes.
        expected: &'static str,
    },
    /// A blk function without its image.
    #[error("blk needs path=FILE")]
    MissingPath,
    /// A vfio function without its device.
    #[error("vfio needs host=DDDD:BB:DD.F, the PCI address of a device of this host (lspci -D)")]
    MissingHost,
    /// A vfio function is told how to carry tables of the guest, and is behind no pvIOMMU.
    #[error("dma= says how page tables of the guest are followed, which takes iommu=on")]
    DmaWithoutIommu,
    /// Two functions are one device of the host.
    #[error("two functions are the host's device {address}: leave one of them out")]
    DuplicateHost {
        /// Its address.
        address: String,
    },
    /// Too many functions.
    #[error("{count} functions are too many (at most {MAX_FUNCTIONS})")]
    TooMany {
        /// Number of SPECs.
        count: usize,
    },
    /// Two functions ask for the same place.
    #[error(
        "two functions have the logical device id {id:#010x} (bus {bus}, fn {function}): \
         give one of them another fn=N or another bus"
    )]
    DuplicateLogicalId {
        /// Logical device id.
        id: u32,
        /// Bus of the later function.
        bus: Uuid,
        /// Its function number.
        function: u8,
    },
    /// Two buses ask for the same PCI domain.
    #[error(
        "buses {first} and {second} ask for the same PCI domain {domain:#06x}: \
         let the second group of hex digits differ"
    )]
    DuplicateDomain {
        /// Earlier bus.
        first: Uuid,
        /// Later bus.
        second: Uuid,
        /// The domain that both ask for.
        domain: u16,
    },
    /// A bus without a function 0 would not be scanned by the guest.
    #[error("bus {bus} has no function 0, so a guest would not find its other functions")]
    NoFunctionZero {
        /// The bus.
        bus: Uuid,
    },
}

const GUID_FORM: &str = "a GUID such as 56504349-1234-4000-8000-766d2d767063 whose second group, \
     the PCI domain, is 0001 to 7fff";

impl FromStr for FunctionSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let mut words = text.split(',');
        let kind = words.next().unwrap_or_default();
        let mut values = Values::collect(words)?;
        let kind = match kind {
            "blk" => {
                values.allow("blk", &["path", "readonly", "queues", "bus", "fn", "iommu"])?;
                parse_blk(&mut values)?
            }
            "rng" => {
                values.allow("rng", &["bus", "fn", "iommu"])?;
                Kind::Rng
            }
            "testdev" => {
                values.allow("testdev", &["bus", "fn", "iommu"])?;
                Kind::Testdev
            }
            "vfio" => {
                values.allow("vfio", &["host", "bus", "fn", "iommu", "dma"])?;
                Kind::Vfio(parse_host(&mut values)?)
            }
            other => {
                let kind = other.to_owned();
                return Err(SpecError::UnknownKind { kind });
            }
        };
        let function = match values.take("fn") {
            Some(value) => parse_number("fn", &value, 0, 7, "a function number, 0 to 7")? as u8,
            None => 0,
        };
        let bus = values.take("bus").map(|v| parse_bus(&v)).transpose()?;
        let iommu = values.switch("iommu")?;
        match &kind {
            Kind::Vfio(host) if host.dma != DmaMode::Auto && !iommu => {
                return Err(SpecError::DmaWithoutIommu);
            }
            _ => {}
        }
        Ok(Self {
            kind,
            bus,
            function,
            iommu,
        })
    }
}

fn parse_blk(values: &mut Values) -> Result<Kind, SpecError> {
    let path = match values.take("path") {
        Some(value) if value.is_empty() => {
            return Err(bad_value("path", &value, "an image file"));
        }
        Some(value) => PathBuf::from(value),
        None => return Err(SpecError::MissingPath),
    };
    let readonly = values.switch("readonly")?;
    let queues = values
        .take("queues")
        .map(|v| parse_number("queues", &v, 1, MAX_QUEUES, "a number of queues, 1 to 64"))
        .transpose()?;
    Ok(Kind::Blk {
        path,
        readonly,
        queues,
    })
}

fn parse_host(values: &mut Values) -> Result<HostDevice, SpecError> {
    let host = values.take("host").ok_or(SpecError::MissingHost)?;
    let dma = match values.take("dma").as_deref() {
        None | Some("auto") => DmaMode::Auto,
        Some("nested") => DmaMode::Nested,
        Some("shadow") => DmaMode::Shadow,
        Some(value) => return Err(bad_value("dma", value, "auto, nested or shadow")),
    };
    match pci_address(&host) {
        Some(address) => Ok(HostDevice { address, dma }),
        None => Err(bad_value(
            "host",
            &host,
            "a PCI address such as 0000:00:05.0",
        )),
    }
}

/// An address as the kernel writes it; the domain may be left out.
fn pci_address(text: &str) -> Option<String> {
    let hex = |text: &str, len: usize| {
        let digits = text.len() <= len && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        digits.then(|| u32::from_str_radix(text, 16).ok()).flatten()
    };
    let (place, function) = text.rsplit_once('.')?;
    let (rest, device) = place.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    let (domain, bus) = (hex(domain, 8)?, hex(bus, 2)?);
    let (device, function) = (hex(device, 2)?, hex(function, 1)?);
    (device < 32 && function < 8)
        .then(|| format!("{domain:04x}:{bus:02x}:{device:02x}.{function:x}"))
}

fn parse_bus(value: &str) -> Result<Uuid, SpecError> {
    let bad = || bad_value("bus", value, GUID_FORM);
    let bus = Uuid::try_parse(value).map_err(|_| bad())?;
    if (1..0x8000).contains(&domain_hint(bus)) {
        Ok(bus)
    } else {
        Err(bad())
    }
}

fn parse_number(
    key: &'static str,
    value: &str,
    min: u16,
    max: u16,
    expected: &'static str,
) -> Result<u16, SpecError> {
    value
        .parse()
        .ok()
        .filter(|number| (min..=max).contains(number))
        .ok_or_else(|| bad_value(key, value, expected))
}

fn bad_value(key: &'static str, value: &str, expected: &'static str) -> SpecError {
    SpecError::BadValue {
        key,
        value: value.to_owned(),
        expected,
    }
}

/// Keys and values in the order given.
struct Values(Vec<(String, String)>);

impl Values {
    fn collect<'a>(words: impl Iterator<Item = &'a str>) -> Result<Self, SpecError> {
        let mut values: Vec<(String, String)> = Vec::new();
        for word in words {
            let Some((key, value)) = word.split_once('=') else {
                let word = word.to_owned();
                return Err(SpecError::NotKeyValue { word });
            };
            if values.iter().any(|(earlier, _)| earlier == key) {
                let key = key.to_owned();
                return Err(SpecError::DuplicateKey { key });
            }
            values.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self(values))
    }

    /// Refuses keys other than `allowed`.
    fn allow(&self, kind: &'static str, allowed: &[&str]) -> Result<(), SpecError> {
        match self
            .0
            .iter()
            .find(|(key, _)| !allowed.contains(&key.as_str()))
        {
            None => Ok(()),
            Some((key, _)) => Err(SpecError::UnknownKey {
                key: key.clone(),
                kind,
                allowed: allowed.join(", "),
            }),
        }
    }

    /// Takes `on` or `off`, which is what a key that is not given means.
    fn switch(&mut self, key: &'static str) -> Result<bool, SpecError> {
        match self.take(key).as_deref() {
            None | Some("off") => Ok(false),
            Some("on") => Ok(true),
            Some(value) => Err(bad_value(key, value, "on or off")),
        }
    }

    fn take(&mut self, key: &str) -> Option<String> {
        let index = self.0.iter().position(|(name, _)| name == key)?;
        Some(self.0.remove(index).1)
    }
}

/// PCI domain that a Linux guest gives the bus: Data2 of its instance GUID
/// (docs/spec/vpci.md, section 1.1).
pub(crate) fn domain_hint(bus: Uuid) -> u16 {
    bus.as_fields().1
}

/// Logical device id of a function (docs/spec/vpci.md, section 1.1).
pub(crate) fn logical_id(bus: Uuid, function: u8) -> u32 {
    let (_, data2, data3, _) = bus.as_fields();
    u32::from(data2) << 16 | u32::from(data3 & 0xfff8) | u32::from(function & 7)
}

/// Reads SPECs, gives every function its place, and looks at the images, to say what is wrong before
/// anything is created.
///
/// # Errors
///
/// [`Error`], naming the SPEC.
pub(crate) fn parse(texts: &[String], present: &[Uuid]) -> Result<Vec<PlacedFunction>, Error> {
    let specs = texts
        .iter()
        .map(|text| {
            text.parse::<FunctionSpec>().map_err(|source| Error::Spec {
                spec: text.clone(),
                source,
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let placed = place(&specs, present).map_err(Error::Placement)?;
    for (text, function) in texts.iter().zip(&placed) {
        let spec = || text.clone();
        match &function.kind {
            Kind::Blk { path, readonly, .. } => {
                let checked = image::check(path, *readonly);
                checked.map_err(|source| Error::Image {
                    spec: spec(),
                    source,
                })?;
            }
            Kind::Vfio(device) => {
                passthrough::check(device).map_err(|source| Error::PassThrough {
                    spec: spec(),
                    source: source.into(),
                })?;
            }
            Kind::Rng | Kind::Testdev => {}
        }
    }
    Ok(placed)
}

/// Gives every function its bus, beside the buses that are `present` already: the one it names, else
/// one of its own whose GUID depends on the position only, so that a guest finds the same PCI domains
/// at every start.
///
/// # Errors
///
/// [`SpecError`] when two functions have one logical device id, two buses one PCI domain, a bus no
/// function 0, or when there are more than [`MAX_FUNCTIONS`].
pub(crate) fn place(
    specs: &[FunctionSpec],
    present: &[Uuid],
) -> Result<Vec<PlacedFunction>, SpecError> {
    let count = specs.len() + present.len();
    if count > MAX_FUNCTIONS {
        return Err(SpecError::TooMany { count });
    }
    let given = specs.iter().filter_map(|s| s.bus);
    let taken: Vec<u16> = given
        .chain(present.iter().copied())
        .map(domain_hint)
        .collect();
    let mut free = (FIRST_DOMAIN..0x8000).filter(|domain| !taken.contains(domain));
    let placed: Vec<PlacedFunction> = specs
        .iter()
        .map(|spec| PlacedFunction {
            kind: spec.kind.clone(),
            bus: spec.bus.unwrap_or_else(|| {
                // At most 2 * MAX_FUNCTIONS domains are in use, so one is always free.
                default_bus(free.next().unwrap_or(FIRST_DOMAIN))
            }),
            function: spec.function,
            iommu: spec.iommu,
        })
        .collect();
    check(&placed)?;
    for function in &placed {
        let domain = domain_hint(function.bus);
        if let Some(&first) = present.iter().find(|bus| domain_hint(**bus) == domain) {
            return Err(SpecError::DuplicateDomain {
                first,
                second: function.bus,
                domain,
            });
        }
    }
    Ok(placed)
}

fn default_bus(domain: u16) -> Uuid {
    let (data1, _, data3, data4) = DEFAULT_BUS.as_fields();
    Uuid::from_fields(data1, domain, data3, data4)
}

fn check(placed: &[PlacedFunction]) -> Result<(), SpecError> {
    let mut hosts = HashSet::new();
    for function in placed {
        if let Kind::Vfio(device) = &function.kind
            && !hosts.insert(&device.address)
        {
            let address = device.address.clone();
            return Err(SpecError::DuplicateHost { address });
        }
    }
    let mut ids = HashMap::new();
    let mut domains: HashMap<u16, Uuid> = HashMap::new();
    for function in placed {
        let bus = function.bus;
        let id = logical_id(bus, function.function);
        if ids.insert(id, bus).is_some() {
            return Err(SpecError::DuplicateLogicalId {
                id,
                bus,
                function: function.function,
            });
        }
        let domain = domain_hint(bus);
        let first = *domains.entry(domain).or_insert(bus);
        if first != bus {
            return Err(SpecError::DuplicateDomain {
                first,
                second: bus,
                domain,
            });
        }
    }
    for function in placed {
        let bus = function.bus;
        if !placed.iter().any(|f| f.bus == bus && f.function == 0) {
            return Err(SpecError::NoFunctionZero { bus });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUS: &str = "11223344-1234-ab78-8000-000000000001";

    fn parse(text: &str) -> Result<FunctionSpec, SpecError> {
        text.parse()
    }

    fn message(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_full_blk_spec_is_read_field_by_field() {
        let spec = parse(&format!(
            "blk,path=/a b/d.img,readonly=on,queues=4,bus={BUS},fn=1,iommu=on"
        ));
        assert_eq!(
            spec.unwrap(),
            FunctionSpec {
                kind: Kind::Blk {
                    path: "/a b/d.img".into(),
                    readonly: true,
                    queues: Some(4),
                },
                bus: Some(Uuid::try_parse(BUS).unwrap()),
                function: 1,
                iommu: true,
            }
        );
    }

    #[test]
    fn defaults_are_writable_function_zero_and_no_bus() {
        let spec = parse("blk,path=d").unwrap();
        assert_eq!((spec.bus, spec.function), (None, 0));
        assert!(!spec.iommu);
        assert!(!parse("rng,iommu=off").unwrap().iommu);
        let Kind::Blk {
            readonly, queues, ..
        } = spec.kind
        else {
            panic!("not a blk");
        };
        assert_eq!((readonly, queues), (false, None));
        assert_eq!(parse("rng").unwrap().kind, Kind::Rng);
        assert_eq!(parse("testdev,fn=0").unwrap().kind, Kind::Testdev);
    }

    #[test]
    fn a_device_of_the_host_is_named_by_its_address() {
        let host = |text: &str| match parse(&format!("vfio,host={text}")).unwrap().kind {
            Kind::Vfio(device) => device.address,
            other => panic!("{other:?}"),
        };
        assert_eq!(host("0000:00:05.0"), "0000:00:05.0");
        assert_eq!(host("3b:1F.7"), "0000:3b:1f.7");
        assert_eq!(host("10000:e1:0.1"), "10000:e1:00.1");
        for bad in [
            "",
            "5",
            "00:05",
            "00:05.8",
            "00:20.0",
            "000:05.0",
            "x:0.0",
            "1:2:3:4.0",
            "+1:0.0",
        ] {
            let text = message(&format!("vfio,host={bad}"));
            assert!(
                text.contains("'host'") && text.contains("0000:00:05.0"),
                "{bad}: {text}"
            );
        }
        assert!(message("vfio").contains("lspci -D"));
        assert!(message("vfio,host=0:5.0,dma=fast").contains("auto, nested or shadow"));
        assert!(message("vfio,host=0:5.0,path=x").contains("host, bus, fn, iommu, dma"));
        assert!(message("vfio,host=0:5.0,dma=shadow").contains("iommu=on"));
        assert!(parse("vfio,host=0:5.0,dma=auto").is_ok());
        let spec = parse("vfio,host=0:5.0,dma=shadow,iommu=on").unwrap();
        let Kind::Vfio(device) = spec.kind else {
            panic!("not a vfio");
        };
        assert_eq!((device.dma, spec.iommu), (DmaMode::Shadow, true));
    }

    #[test]
    fn a_device_of_the_host_is_one_function() {
        let spec = |text: &str| parse(text).unwrap();
        let twice = [
            spec("vfio,host=00:05.0"),
            spec("vfio,host=0000:00:05.0,fn=0"),
        ];
        let error = place(&twice, &[]).unwrap_err();
        assert!(error.to_string().contains("0000:00:05.0"), "{error}");
    }

    #[test]
    fn errors_name_the_key_and_the_value() {
        assert!(message("nvme").contains("'nvme'"));
        assert!(message("").contains("unknown kind ''"));
        assert!(message("rng,path=x").contains("'path' for rng"));
        assert!(message("blk,patch=x").contains("'patch' for blk"));
        assert!(message("blk").contains("path=FILE"));
        assert!(message("blk,path=").contains("'path'"));
        assert!(message("blk,path=x,readonly=yes").contains("'yes' for 'readonly'"));
        assert!(message("blk,path=x,queues=0").contains("'0' for 'queues'"));
        assert!(message("blk,path=x,queues=65").contains("'65' for 'queues'"));
        assert!(message("blk,path=x,path=y").contains("'path' is given twice"));
        assert!(message("testdev,iommu=1").contains("'1' for 'iommu'"));
        assert!(message("rng,fn=8").contains("'8' for 'fn'"));
        assert!(message("rng,oops").contains("'oops' is not KEY=VALUE"));
        assert!(message("rng,").contains("'' is not KEY=VALUE"));
    }

    #[test]
    fn buses_that_are_present_keep_their_domains() {
        let present = [default_bus(1), default_bus(2)];
        let specs = ["rng".parse().unwrap()];
        let placed = place(&specs, &present).unwrap();
        assert_eq!(placed[0].bus, default_bus(3));
        let same = [format!("rng,bus={}", default_bus(2)).parse().unwrap()];
        let error = place(&same, &present).unwrap_err();
        assert!(matches!(
            error,
            SpecError::DuplicateDomain { domain: 2, .. }
        ));
    }

    #[test]
    fn a_bus_guid_needs_a_usable_pci_domain() {
        for bad in [
            "x",
            "11223344-1234-ab78-8000-00000000000",
            "11223344-0000-ab78-8000-000000000001",
            "11223344-8000-ab78-8000-000000000001",
        ] {
            assert!(message(&format!("rng,bus={bad}")).contains(bad), "{bad}");
        }
        assert!(parse("rng,bus=11223344-7fff-ab78-8000-000000000001").is_ok());
    }

    #[test]
    fn the_logical_id_follows_the_guid() {
        let bus = Uuid::try_parse(BUS).unwrap();
        assert_eq!(logical_id(bus, 1), 0x1234_ab79);
        assert_eq!(domain_hint(bus), 0x1234);
    }

    #[test]
    fn buses_without_a_guid_are_numbered_by_position_around_those_given() {
        let specs = [
            parse("rng").unwrap(),
            parse("rng,bus=11223344-0002-4000-8000-000000000001").unwrap(),
            parse("testdev").unwrap(),
        ];
        let domains: Vec<u16> = place(&specs, &[])
            .unwrap()
            .iter()
            .map(|f| domain_hint(f.bus))
            .collect();
        assert_eq!(domains, [1, 2, 3]);
        assert_eq!(place(&specs, &[]).unwrap(), place(&specs, &[]).unwrap());
    }

    #[test]
    fn functions_that_a_guest_could_not_tell_apart_are_refused() {
        let twice = [
            parse(&format!("rng,bus={BUS}")).unwrap(),
            parse(&format!("testdev,bus={BUS}")).unwrap(),
        ];
        let error = place(&twice, &[]).unwrap_err();
        assert!(error.to_string().contains("0x1234ab78"), "{error}");
        let masked = [
            parse("rng,bus=11223344-1234-ab78-8000-000000000001").unwrap(),
            parse("rng,bus=99223344-1234-ab7f-8000-000000000001").unwrap(),
        ];
        assert!(matches!(
            place(&masked, &[]),
            Err(SpecError::DuplicateLogicalId { .. })
        ));
        let same_domain = [
            parse("rng,bus=11223344-1234-ab78-8000-000000000001").unwrap(),
            parse("rng,bus=11223344-1234-ab80-8000-000000000001").unwrap(),
        ];
        assert!(matches!(
            place(&same_domain, &[]),
            Err(SpecError::DuplicateDomain { .. })
        ));
        let lonely = [parse(&format!("rng,bus={BUS},fn=3")).unwrap()];
        assert!(matches!(
            place(&lonely, &[]),
            Err(SpecError::NoFunctionZero { .. })
        ));
        let pair = [
            parse(&format!("rng,bus={BUS}")).unwrap(),
            parse(&format!("rng,bus={BUS},fn=3")).unwrap(),
        ];
        assert!(place(&pair, &[]).is_ok());
    }

    #[test]
    fn the_number_of_functions_is_limited() {
        let spec = parse("rng").unwrap();
        assert!(place(&vec![spec.clone(); MAX_FUNCTIONS], &[]).is_ok());
        assert_eq!(
            place(&vec![spec; MAX_FUNCTIONS + 1], &[]),
            Err(SpecError::TooMany {
                count: MAX_FUNCTIONS + 1
            })
        );
    }

    proptest! {
        #[test]
        fn no_text_panics_the_parser(text in "(blk|rng|testdev|.*)(,(path|bus|fn|queues|.*)=?.*)*") {
            let _ = parse(&text);
        }

        #[test]
        fn placed_functions_have_unique_ids(fns in prop::collection::vec((any::<u8>(), 0u8..8), 0..20)) {
            let specs: Vec<FunctionSpec> = fns
                .iter()
                .map(|&(bus, function)| FunctionSpec {
                    kind: Kind::Rng,
                    bus: (bus & 1 == 1).then(|| default_bus(u16::from(bus >> 4) + 1)),
                    function,
                    iommu: false,
                })
                .collect();
            if let Ok(placed) = place(&specs, &[]) {
                let mut ids: Vec<u32> = placed.iter().map(|f| logical_id(f.bus, f.function)).collect();
                ids.sort_unstable();
                ids.dedup();
                prop_assert_eq!(ids.len(), placed.len());
            }
        }
    }
}
