//! The pvIOMMU of a VM: what its calls do.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::backend::{BackendReport, DeviceBackend, PortSettings};
use super::directory::{Device, Directory, IommuMode};
use super::iotlb;
use super::table::InsertError;
use super::translation::{Attachment, FlushRange, Levels, Translation};
use crate::device_id::LogicalDeviceId;
use crate::hv::HvStatus;
use crate::hv::pviommu::{DOMAIN_DEFAULT, DOMAIN_NULL};
use crate::mem::{GuestRam, PAGE_SIZE};

/// Size and shape of a pvIOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IommuConfig {
    /// Most domains that a guest can have, 1 to 65536.
    pub max_domains: u32,
    /// Most functions of the VM, those that are not behind the pvIOMMU included; 1 to 65536.
    pub max_functions: u32,
    /// Translations that are cached for a function, 16 to 2^20; rounded up to a power of two. Each
    /// takes 32 bytes of the host's memory.
    pub iotlb_entries: u32,
    /// Offer tables of 5 levels, and addresses of 57 bits instead of 48.
    pub five_levels: bool,
    /// Width of the guest's physical addresses (CPUID leaf 0x80000008), 32 to 52. Table entries
    /// with higher address bits are malformed.
    pub physical_bits: u8,
    /// The host's IOMMU may walk the guest's tables itself. VT-d takes canonical addresses only, and
    /// a guest's addresses are unsigned: so they have one bit less (docs/decisions.md, D-100).
    pub nested: bool,
    /// Offer leaves of 1 GiB, which not every IOMMU walks.
    pub gigabyte_pages: bool,
}

impl Default for IommuConfig {
    fn default() -> Self {
        Self {
            max_domains: 4096,
            max_functions: 256,
            iotlb_entries: 4096,
            five_levels: false,
            physical_bits: 52,
            nested: false,
            gigabyte_pages: true,
        }
    }
}

/// A number of an [`IommuConfig`] is out of range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} of the pvIOMMU is {value}; it may be {min} to {max}")]
pub struct IommuConfigError {
    /// Name of the field.
    pub what: &'static str,
    /// Its value.
    pub value: u32,
    /// Least value.
    pub min: u32,
    /// Greatest value.
    pub max: u32,
}

impl IommuConfig {
    /// Bits of an I/O virtual address.
    pub fn iova_width(&self) -> u8 {
        let levels = if self.five_levels {
            Levels::Five
        } else {
            Levels::Four
        };
        levels.width() - u8::from(self.nested)
    }

    /// Sizes of leaves: a bit for each.
    pub fn page_sizes(&self) -> u64 {
        let gigabyte = u64::from(self.gigabyte_pages);
        (1 << 12) | (1 << 21) | (gigabyte << 30)
    }

    fn check(&self) -> Result<(), IommuConfigError> {
        let fields = [
            ("max_domains", self.max_domains, 1, 1 << 16),
            ("max_functions", self.max_functions, 1, 1 << 16),
            (
                "iotlb_entries",
                self.iotlb_entries,
                iotlb::MIN_ENTRIES,
                iotlb::MAX_ENTRIES,
            ),
            ("physical_bits", self.physical_bits.into(), 32, 52),
        ];
        for (what, value, min, max) in fields {
            if !(min..=max).contains(&value) {
                return Err(IommuConfigError {
                    what,
                    value,
                    min,
                    max,
                });
            }
        }
        Ok(())
    }
}

/// A function was not added. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddDeviceError {
    /// Another function has the id.
    #[error("logical device id {id} is taken")]
    Exists {
        /// The id.
        id: LogicalDeviceId,
    },
    /// The limit on functions is reached.
    #[error("the pvIOMMU has its {max} functions already")]
    Full {
        /// The limit.
        max: u32,
    },
}

/// A domain as a call names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainName {
    /// The default domain.
    Default,
    /// A first-stage domain with this number.
    FirstStage(u32),
}

/// Counts since the pvIOMMU was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IommuCounters {
    /// CREATE calls that met the limit on domains.
    pub domains_refused: u64,
    /// Functions that met their limit.
    pub functions_refused: u64,
    /// Moves and configurations that a back end refused.
    pub backend_refusals: u64,
    /// FLUSH calls.
    pub flushes: u64,
    /// Elements of FLUSH_LIST calls.
    pub flushed_ranges: u64,
    /// Faults of functions in the default domain.
    pub default_domain_faults: u64,
}

/// A domain, for people and tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainReport {
    /// Its number.
    pub number: u32,
    /// What it does; `None` until it is configured.
    pub translation: Option<Translation>,
    /// Devices in it.
    pub devices: u32,
    /// Accesses of devices in it that did not translate, since it was created.
    pub faults: u64,
}

/// A function as the pvIOMMU sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceReport {
    /// Its id.
    pub id: LogicalDeviceId,
    /// Where it is plugged in.
    pub mode: IommuMode,
    /// Number of its domain; 0 is the default domain.
    pub domain: u32,
    /// Blocked until its bus is brought to D0, because the guest that attached it is gone.
    pub held: bool,
    /// What its back end says.
    pub backend: BackendReport,
}

/// State of a pvIOMMU, for people and tests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IommuReport {
    /// Domains of the guest, by number.
    pub domains: Vec<DomainReport>,
    /// Functions, by id.
    pub devices: Vec<DeviceReport>,
    /// Counts.
    pub counters: IommuCounters,
}

/// Counters behind [`IommuCounters`].
#[derive(Debug, Default)]
struct Stats {
    domains_refused: AtomicU64,
    functions_refused: AtomicU64,
    backend_refusals: AtomicU64,
    flushes: AtomicU64,
    flushed_ranges: AtomicU64,
}

/// The pvIOMMU of a VM.
///
/// Lock order: [`PvIommu`]'s own lock, shared by flushes, then the DMA guard of each device
/// concerned, one at a time. DMA takes the guard only, so a call that waits for accesses under way
/// never waits for another call's.
#[derive(Debug)]
pub struct PvIommu {
    config: IommuConfig,
    ram: GuestRam,
    directory: RwLock<Directory>,
    /// By [`Attachment::fault_slot`].
    domain_faults: Arc<[AtomicU64]>,
    stats: Stats,
}

impl PvIommu {
    /// A pvIOMMU with nothing behind it.
    ///
    /// # Errors
    ///
    /// [`IommuConfigError`].
    pub fn new(config: IommuConfig, ram: GuestRam) -> Result<Arc<Self>, IommuConfigError> {
        config.check()?;
        let slots = config.max_domains as usize + 1;
        Ok(Arc::new(Self {
            config,
            ram,
            directory: RwLock::new(Directory::new(config.max_domains, config.max_functions)),
            domain_faults: (0..slots).map(|_| AtomicU64::new(0)).collect(),
            stats: Stats::default(),
        }))
    }

    /// Its size and shape.
    pub fn config(&self) -> &IommuConfig {
        &self.config
    }

    /// What the software back end of the function `id` is made with.
    pub fn port_settings(&self, id: LogicalDeviceId) -> PortSettings {
        PortSettings {
            id,
            iotlb_entries: self.config.iotlb_entries,
            physical_bits: self.config.physical_bits,
            iova_width: self.config.iova_width(),
            domain_faults: self.domain_faults.clone(),
        }
    }

    /// Adds a function, in its default state. From now on calls may name it.
    ///
    /// `backend` is `None` for a function that is not behind the pvIOMMU ([`IommuMode::Off`]).
    ///
    /// # Errors
    ///
    /// [`AddDeviceError`].
    pub fn add_device(
        &self,
        id: LogicalDeviceId,
        mode: IommuMode,
        backend: Option<Arc<dyn DeviceBackend>>,
    ) -> Result<(), AddDeviceError> {
        let mut directory = self.write();
        let mode = if backend.is_some() {
            mode
        } else {
            IommuMode::Off
        };
        let added = directory.add(id, mode, backend);
        let slot = added.map_err(|error| match error {
            InsertError::Exists => AddDeviceError::Exists { id },
            InsertError::Full => {
                count(&self.stats.functions_refused);
                AddDeviceError::Full {
                    max: self.config.max_functions,
                }
            }
        })?;
        if let Some(device) = directory.devices.get(slot) {
            self.settle(&directory, device);
        }
        Ok(())
    }

    /// A function is being removed: no call may name it any more. Its DMA is blocked, and when this
    /// returns none is under way; but one that the host's IOMMU cannot tell from others stays where it is,
    /// and is flushed, until [`PvIommu::remove_device`] or [`PvIommu::remove_quiet_device`], because they
    /// would be blocked with it ([`DeviceBackend::is_alone`]).
    pub fn begin_removal(&self, id: LogicalDeviceId) {
        let mut directory = self.write();
        let Some(slot) = directory.devices.find(id) else {
            return;
        };
        let Some(device) = directory.devices.get_mut(slot) else {
            return;
        };
        device.removing = true;
        let backend = device.backend.as_ref();
        if backend.is_none_or(|backend| backend.is_alone()) {
            self.hold(&mut directory, slot);
        }
    }

    /// Takes a device out of its domain and blocks it.
    fn hold(&self, directory: &mut Directory, slot: u32) {
        directory.place(slot, None);
        if let Some(device) = directory.devices.get_mut(slot) {
            device.held = true;
        }
        if let Some(device) = directory.devices.get(slot) {
            self.settle(directory, device);
        }
    }

    /// Forgets a function, whose DMA is blocked: whoever has its id next starts from the default state.
    ///
    /// With it are blocked those that the host's IOMMU cannot tell from it, as long as its back end lives:
    /// see [`PvIommu::remove_quiet_device`].
    pub fn remove_device(&self, id: LogicalDeviceId) {
        let mut directory = self.write();
        if let Some(slot) = directory.devices.find(id) {
            self.hold(&mut directory, slot);
        }
        directory.remove(id);
    }

    /// The same for a function that was reset, cannot master the bus, and is out of the guest's reach, so
    /// that it stays like that until its device is plugged in anew: what the host's IOMMU cannot tell
    /// from it goes on undisturbed ([`DeviceBackend::removed`]).
    pub fn remove_quiet_device(&self, id: LogicalDeviceId) {
        let mut directory = self.write();
        let slot = directory.devices.find(id);
        let device = slot.and_then(|slot| directory.devices.get(slot));
        if let Some(backend) = device.and_then(|device| device.backend.as_ref()) {
            backend.removed();
        }
        directory.remove(id);
    }

    /// The bus of a function has been brought to D0: whatever the former guest had it do is over.
    pub fn power_on(&self, id: LogicalDeviceId) {
        let held = |directory: &Directory| {
            let device = directory.devices.get(directory.devices.find(id)?)?;
            let held = device.held && !mutant!("power-on-keeps-held");
            (held && !device.removing).then_some(())
        };
        if held(&self.read()).is_none() {
            return;
        }
        let mut directory = self.write();
        let slot = directory.devices.find(id);
        if let Some(device) = slot.and_then(|slot| directory.devices.get_mut(slot))
            && !device.removing
        {
            device.held = false;
        }
        if let Some(device) = slot.and_then(|slot| directory.devices.get(slot)) {
            self.settle(&directory, device);
        }
    }

    /// The guest has given up its identity (GUEST_OS_ID = 0): its domains are deleted, and the
    /// functions behind the pvIOMMU blocked until their buses are brought to D0, so that DMA which
    /// the former kernel started does not reach the next one (docs/spec/pviommu.md#IO-7-03).
    pub fn guest_gone(&self) {
        if mutant!("kexec-keeps-domains") {
            return;
        }
        self.start_anew(!mutant!("kexec-holds-nothing"));
    }

    /// The VM is being reset: no domains, every function in its default state.
    pub fn reset(&self) {
        if mutant!("reset-keeps-domains") {
            return;
        }
        self.start_anew(false);
    }

    fn start_anew(&self, hold: bool) {
        let mut directory = self.write();
        let former = self.attachments(&directory);
        directory.clear_domains();
        for device in directory.devices.values_mut() {
            device.held = hold && device.mode != IommuMode::Off || device.removing;
        }
        self.settle_all(&directory, &former);
    }

    /// Where each device is, in the order of the directory.
    pub(super) fn attachments(&self, directory: &Directory) -> Vec<Attachment> {
        let devices = directory.devices.iter();
        let attachment =
            |(_, slot, device)| directory.attachment(device, directory.domain_of(slot));
        devices.map(attachment).collect()
    }

    /// Settles all devices, which were at `former`. Those that move are blocked before the first of
    /// them goes anywhere: devices of a group of the host go where the others are that are not blocked,
    /// and a device that is still in its former domain would keep the first one out for good.
    pub(super) fn settle_all(&self, directory: &Directory, former: &[Attachment]) {
        for ((_, slot, device), former) in directory.devices.iter().zip(former) {
            if directory.attachment(device, directory.domain_of(slot)) != *former {
                self.block(device);
            }
        }
        for (_, _, device) in directory.devices.iter() {
            self.settle(directory, device);
        }
    }

    /// CREATE.
    ///
    /// # Errors
    ///
    /// The status of docs/spec/pviommu.md#pviommu-4, as for the calls below.
    pub fn create(&self, number: u32) -> Result<(), HvStatus> {
        if matches!(number, DOMAIN_DEFAULT | DOMAIN_NULL) {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        match self.write().create(number) {
            Ok(slot) => {
                self.forget_faults(slot);
                Ok(())
            }
            Err(InsertError::Exists) if mutant!("create-again-succeeds") => Ok(()),
            Err(InsertError::Exists) => Err(HvStatus::KEY_ALREADY_EXISTS),
            Err(InsertError::Full) => {
                count(&self.stats.domains_refused);
                Err(mutant!(
                    "create-limit-status",
                    HvStatus::INSUFFICIENT_BUFFERS,
                    HvStatus::INSUFFICIENT_DEVICE_DOMAINS
                ))
            }
        }
    }

    /// DELETE.
    ///
    /// # Errors
    ///
    /// The status.
    pub fn delete(&self, number: u32) -> Result<(), HvStatus> {
        let mut directory = self.write();
        let slot = find(&directory, number)?;
        let used = directory.domains.get(slot).is_some_and(|d| d.members != 0);
        if used && !mutant!("delete-in-use") {
            return Err(HvStatus::OBJECT_IN_USE);
        }
        directory.domains.remove(number);
        Ok(())
    }

    /// CONFIGURE. On a domain with devices in it, each of them obeys the new configuration when
    /// this returns, and at no time a mixture.
    ///
    /// # Errors
    ///
    /// The status.
    pub fn configure(&self, number: u32, translation: Translation) -> Result<(), HvStatus> {
        let mut directory = self.write();
        let slot = find(&directory, number)?;
        if !self.is_possible(&translation) {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        let former = directory.domains.get(slot).and_then(|d| d.translation);
        self.set_translation(&mut directory, slot, Some(translation));
        let refused = directory
            .members(slot)
            .filter(|_| !mutant!("configure-not-live"))
            .position(|device| self.attach_backend(&directory, device).is_err());
        if let Some(refused) = refused {
            self.set_translation(&mut directory, slot, former);
            for device in directory.members(slot).take(refused) {
                self.settle(&directory, device);
            }
            return Err(HvStatus::OPERATION_FAILED);
        }
        Ok(())
    }

    /// False for a table that no domain here can have.
    pub(super) fn is_possible(&self, translation: &Translation) -> bool {
        let Translation::Paged(table) = translation else {
            return true;
        };
        table.root.is_multiple_of(PAGE_SIZE)
            && (self.ram.is_ram(table.root, PAGE_SIZE) || mutant!("configure-any-root"))
            && (table.levels == Levels::Four || self.has_five_levels())
    }

    /// Whether tables may have five levels.
    pub(super) fn has_five_levels(&self) -> bool {
        self.config.five_levels || mutant!("configure-five-levels")
    }

    fn set_translation(&self, directory: &mut Directory, slot: u32, to: Option<Translation>) {
        if let Some(domain) = directory.domains.get_mut(slot) {
            domain.translation = to;
        }
    }

    /// ATTACH, which moves a device from wherever it is.
    ///
    /// # Errors
    ///
    /// The status.
    pub fn attach(&self, domain: DomainName, id: LogicalDeviceId) -> Result<(), HvStatus> {
        let mut directory = self.write();
        let to = match domain {
            DomainName::Default => None,
            DomainName::FirstStage(number) => Some(find(&directory, number)?),
        };
        let slot = directory
            .devices
            .find(id)
            .ok_or(HvStatus::INVALID_DEVICE_ID)?;
        let device = directory
            .devices
            .get(slot)
            .ok_or(HvStatus::INVALID_DEVICE_ID)?;
        let off = device.mode == IommuMode::Off && !mutant!("attach-not-behind");
        if off || device.removing {
            return Err(HvStatus::INVALID_DEVICE_STATE);
        }
        if directory.domain_of(slot) == to {
            return match to {
                Some(_) if mutant!("attach-twice-succeeds") => Ok(()),
                Some(_) => Err(HvStatus::DEVICE_ALREADY_IN_DOMAIN),
                None => Ok(()),
            };
        }
        let attachment = directory.attachment(device, to);
        if !mutant!("attach-keeps-old") {
            self.tell(device, &attachment)?;
        }
        directory.place(slot, to);
        Ok(())
    }

    /// DETACH: back to the default domain.
    ///
    /// # Errors
    ///
    /// The status.
    pub fn detach(&self, id: LogicalDeviceId) -> Result<(), HvStatus> {
        if mutant!("detach-without-effect") {
            return self.is_behind(id).map(drop);
        }
        self.attach(DomainName::Default, id)
    }

    /// FLUSH. When this returns, no access through an older translation is under way or can start.
    ///
    /// # Errors
    ///
    /// [`HvStatus::INVALID_PARAMETER`] if there is no such domain.
    pub fn flush(&self, domain: DomainName) -> Result<(), HvStatus> {
        let directory = self.read();
        if let DomainName::FirstStage(number) = domain {
            let slot = find(&directory, number)?;
            if !mutant!("flush-forgets-nothing") {
                backends(&directory, slot).for_each(|backend| backend.flush_all());
            }
        }
        count(&self.stats.flushes);
        Ok(())
    }

    /// FLUSH_LIST, for some elements.
    ///
    /// # Errors
    ///
    /// As for [`PvIommu::flush`].
    pub fn flush_ranges(&self, domain: DomainName, ranges: &[FlushRange]) -> Result<(), HvStatus> {
        let directory = self.read();
        if let DomainName::FirstStage(number) = domain {
            let slot = find(&directory, number)?;
            let done = mutant!(
                "flush-list-first-only",
                &ranges[..ranges.len().min(1)],
                ranges
            );
            let most = mutant!("flush-list-one-device", 1, usize::MAX);
            let backends = backends(&directory, slot).take(most);
            backends.for_each(|backend| backend.flush(done));
        }
        let flushed = &self.stats.flushed_ranges;
        flushed.fetch_add(ranges.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// GET_LOGICAL_DEVICE_PROPERTY: whether a function is behind the pvIOMMU.
    ///
    /// # Errors
    ///
    /// [`HvStatus::INVALID_DEVICE_ID`] if there is none with that id.
    pub fn is_behind(&self, id: LogicalDeviceId) -> Result<bool, HvStatus> {
        let directory = self.read();
        let slot = directory.devices.find(id);
        let device = slot.and_then(|slot| directory.devices.get(slot));
        let device = device.ok_or(HvStatus::INVALID_DEVICE_ID)?;
        Ok(device.mode != IommuMode::Off || mutant!("property-always-behind"))
    }

    /// State for people and tests.
    pub fn report(&self) -> IommuReport {
        let directory = self.read();
        let domains = directory.domains.iter().map(|(number, slot, domain)| {
            let faults = self.faults(slot + 1).load(Ordering::Relaxed);
            DomainReport {
                number,
                translation: domain.translation,
                devices: domain.members,
                faults,
            }
        });
        let devices = directory.devices.iter().map(|(id, slot, device)| {
            let domain = directory.domain_of(slot);
            DeviceReport {
                id,
                mode: device.mode,
                domain: directory.attachment(device, domain).domain,
                held: device.held,
                backend: match &device.backend {
                    Some(backend) => backend.report(),
                    None => BackendReport::default(),
                },
            }
        });
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        IommuReport {
            domains: domains.collect(),
            devices: devices.collect(),
            counters: IommuCounters {
                domains_refused: read(&self.stats.domains_refused),
                functions_refused: read(&self.stats.functions_refused),
                backend_refusals: read(&self.stats.backend_refusals),
                flushes: read(&self.stats.flushes),
                flushed_ranges: read(&self.stats.flushed_ranges),
                default_domain_faults: read(self.faults(0)),
            },
        }
    }

    /// Has the back end of a device obey the domain that the device is in.
    fn attach_backend(&self, directory: &Directory, device: &Device) -> Result<(), HvStatus> {
        let slot = directory.devices.find(device.id);
        let domain = slot.and_then(|slot| directory.domain_of(slot));
        self.tell(device, &directory.attachment(device, domain))
    }

    /// The same where nobody can be told of a failure: the device is blocked then.
    pub(super) fn settle(&self, directory: &Directory, device: &Device) {
        if self.attach_backend(directory, device).is_err() {
            self.block(device);
        }
    }

    fn block(&self, device: &Device) {
        let blocked = Attachment {
            translation: Translation::Blocked,
            ..Attachment::DEFAULT
        };
        // A backend that cannot even do that tries again ahead of whatever it is told next.
        let _ = self.tell(device, &blocked);
    }

    fn tell(&self, device: &Device, to: &Attachment) -> Result<(), HvStatus> {
        let Some(backend) = &device.backend else {
            return Ok(());
        };
        backend.attach(to).map_err(|error| {
            let refusals = self.stats.backend_refusals.fetch_add(1, Ordering::Relaxed) + 1;
            // A guest can ask as often as it likes: log at powers of two.
            if refusals.is_power_of_two() {
                let (id, cause) = (device.id, &error.0);
                log::error!(
                    "device {id} stays out of domain {}, {refusals} so far: {cause}",
                    to.domain
                );
            }
            HvStatus::OPERATION_FAILED
        })
    }

    /// The domain in `slot` is a new one.
    pub(super) fn forget_faults(&self, slot: u32) {
        self.faults(slot + 1).store(0, Ordering::Relaxed);
    }

    fn faults(&self, slot: u32) -> &AtomicU64 {
        &self.domain_faults[slot as usize]
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Directory> {
        self.directory
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Directory> {
        self.directory
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The slot of a first-stage domain.
fn find(directory: &Directory, number: u32) -> Result<u32, HvStatus> {
    let slot = directory.domains.find(number);
    slot.ok_or(HvStatus::INVALID_PARAMETER)
}

/// The back ends of the devices in a domain.
fn backends(directory: &Directory, domain: u32) -> impl Iterator<Item = &Arc<dyn DeviceBackend>> {
    directory
        .members(domain)
        .filter_map(|device| device.backend.as_ref())
}
