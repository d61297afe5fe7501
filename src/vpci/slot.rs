//! A function on the bus: its device, and everything the bus emulates around it.
//!
//! Lock order: the placement lock, then the locks of a BAR, of the MMIO space, of the interrupts,
//! or of the DMA port, one at a time. The device is called with none of them held but that of the
//! BAR accessed, shared, or the placement lock for a store to a capability. The placement lock is
//! held while doorbells are connected and disconnected, which serialises them.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use super::config::{COMMAND_MASTER, COMMAND_MEMORY, ConfigSpace};
use super::function::{
    BAR_COUNT, BarArea, BarSpec, DoorbellRegister, FunctionLayout, FunctionResources, PciFunction,
};
use super::interrupts::Interrupts;
use super::layout::{self, LayoutError};
use super::lock;
use super::mmio::{MmioHandler, MmioRegion, MmioSpace};
use crate::device_id::LogicalDeviceId;
use crate::dma::{Dma, DmaPort};
use crate::mem::{GuestRam, PAGE_SIZE};
use crate::pviommu::{DeviceBackend, IommuMode, PvIommu};
use crate::vmm::{BarMapper, Doorbell, Doorbells, MsiSink};

/// What a function needs of its surroundings.
#[derive(Debug, Clone)]
pub(crate) struct SlotHost {
    pub(crate) ram: GuestRam,
    pub(crate) mmio: Arc<MmioSpace>,
    pub(crate) msi: Arc<dyn MsiSink>,
    pub(crate) apic_ids: Arc<[u32]>,
    pub(crate) doorbells: Option<Arc<dyn Doorbells>>,
    pub(crate) bars: Option<Arc<dyn BarMapper>>,
}

/// A function's place behind the pvIOMMU.
#[derive(Debug, Clone)]
pub(crate) struct IommuLink {
    pub(crate) iommu: Arc<PvIommu>,
    pub(crate) id: LogicalDeviceId,
    pub(crate) mode: IommuMode,
}

/// Where the function is, guarded by the placement lock, which also serialises writes to the
/// configuration space.
#[derive(Debug, Default)]
struct Placement {
    /// The bus is in D0: the guest may use the configuration space. Otherwise nothing can switch
    /// on decode or bus mastering.
    powered: bool,
    bars: [Option<MappedBar>; BAR_COUNT],
    /// Connected doorbells and which register each belongs to.
    doorbells: Vec<(Doorbell, usize)>,
    /// Where pieces of BARs are mapped into the guest.
    areas: Vec<u64>,
    /// Where pieces are that could not be unmapped: the guest reaches them, whatever the registers say.
    stuck: Vec<u64>,
}

/// A BAR that answers accesses; dropping it waits for those under way.
#[derive(Debug)]
struct MappedBar {
    region: MmioRegion,
    handler: Arc<BarHandler>,
}

impl Drop for MappedBar {
    fn drop(&mut self) {
        // The region goes a moment later: until then there are accesses, which find this closed.
        let open = &self.handler.open;
        *open.write().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// A function on the bus.
#[derive(Debug)]
pub(crate) struct FunctionSlot {
    /// Function number, 0 to 7.
    pub(crate) number: u8,
    pub(crate) layout: FunctionLayout,
    pub(crate) interrupts: Arc<Interrupts>,
    pub(crate) dma: Arc<DmaPort>,
    device: Arc<dyn PciFunction>,
    config: ConfigSpace,
    mmio: Arc<MmioSpace>,
    doorbells: Option<Arc<dyn Doorbells>>,
    doorbell_registers: Vec<DoorbellRegister>,
    mapper: Option<Arc<dyn BarMapper>>,
    areas: [Vec<BarArea>; BAR_COUNT],
    /// What makes the DMA of a device of the host obey.
    backend: Option<Arc<dyn DeviceBackend>>,
    placement: Mutex<Placement>,
    /// The guest has had the function in its hands since the last reset.
    dirty: AtomicBool,
    refused_bars: AtomicU64,
    /// Pieces of BARs that the VMM could not map into the guest.
    refused_areas: AtomicU64,
    /// A piece of a BAR could not be taken out of the guest's reach, and still is in it.
    in_reach: AtomicBool,
    /// Times that a piece of a BAR could not be taken from the guest.
    failed_unmaps: AtomicU64,
    /// Absent for a function that is not behind a pvIOMMU.
    link: Option<IommuLink>,
    /// The pvIOMMU knows this function by its id.
    linked: AtomicBool,
}

impl FunctionSlot {
    /// A place for `device` as function `number`. The device knows nothing of it before
    /// [`FunctionSlot::connect`].
    ///
    /// # Errors
    ///
    /// [`LayoutError`] if what the device says of itself is impossible.
    pub(crate) fn new(
        number: u8,
        multi_function: bool,
        device: Arc<dyn PciFunction>,
        host: &SlotHost,
        link: Option<IommuLink>,
    ) -> Result<Arc<Self>, LayoutError> {
        let layout = device.layout();
        layout::validate(&layout)?;
        let config = ConfigSpace::new(&layout, multi_function)?;
        let doorbell_registers = device.doorbells();
        for register in &doorbell_registers {
            check_doorbell(&layout, register)?;
        }
        let ram = host.ram.clone();
        let dma = match &link {
            Some(link) => DmaPort::behind_iommu(ram, link.iommu.port_settings(link.id)),
            None => DmaPort::new(ram),
        };
        let interrupts = Arc::new(Interrupts::new(
            &layout,
            host.apic_ids.clone(),
            host.msi.clone(),
            device.host_vectors(),
        ));
        let areas = areas(&layout, &*device)?;
        let backend = device.dma_backend();
        let messages: Weak<Interrupts> = Arc::downgrade(&interrupts);
        dma.set_message_target(messages);
        Ok(Arc::new(Self {
            number,
            layout,
            interrupts,
            dma,
            device,
            config,
            mmio: host.mmio.clone(),
            doorbells: host.doorbells.clone(),
            doorbell_registers,
            mapper: host.bars.clone(),
            areas,
            backend,
            placement: Mutex::default(),
            dirty: AtomicBool::new(false),
            refused_bars: AtomicU64::new(0),
            refused_areas: AtomicU64::new(0),
            in_reach: AtomicBool::new(false),
            failed_unmaps: AtomicU64::new(0),
            link,
            linked: AtomicBool::new(true),
        }))
    }

    /// Gives the device its DMA and its interrupts. Once, before the guest can see it.
    pub(crate) fn connect(&self) {
        self.device.connect(FunctionResources {
            dma: Dma::new(self.dma.clone()),
            interrupts: self.interrupts.clone(),
        });
    }

    /// A guest's load from the configuration space. Takes no lock, but for MSI pending bits that are
    /// the host's, and registers that the device answers.
    pub(crate) fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.config
            .read(offset, data, || self.interrupts.msi_pending());
        if let Some((capability, at, body)) = self.config.body_at(offset, data.len()) {
            self.device.capability_read(capability, at, &body, data);
        }
    }

    /// A guest's store to the configuration space; dropped while the bus is not in D0.
    pub(crate) fn config_write(self: &Arc<Self>, offset: usize, data: &[u8]) {
        let mut placement = lock(&self.placement);
        if !placement.powered {
            return;
        }
        let changes = self.config.write(offset, data);
        if changes.command {
            self.apply_command(&mut placement);
        }
        if changes.msix {
            self.apply_msix();
        }
        if changes.msi {
            self.apply_msi();
        }
        // Still under the lock: no store reaches the device after its reset.
        if let Some((capability, at, body)) = self.config.body_at(offset, data.len()) {
            self.device
                .capability_write(capability, at, &body, data.len());
        }
    }

    /// The device.
    pub(crate) fn device(&self) -> &Arc<dyn PciFunction> {
        &self.device
    }

    /// Whether the function is behind the pvIOMMU.
    pub(crate) fn iommu_mode(&self) -> IommuMode {
        self.link.as_ref().map_or(IommuMode::Off, |link| link.mode)
    }

    /// What makes the function's DMA obey its domain.
    pub(crate) fn dma_backend(&self) -> Arc<dyn DeviceBackend> {
        match &self.backend {
            Some(backend) => backend.clone(),
            None => self.dma.clone(),
        }
    }

    /// True if its DMA is not done by this process.
    pub(crate) fn has_backend(&self) -> bool {
        self.backend.is_some()
    }

    /// True for a device of the host, whose state neither it nor the bus can tell.
    pub(crate) fn is_hosted(&self) -> bool {
        self.has_backend() || self.interrupts.are_hosted()
    }

    /// The pvIOMMU hears nothing of this function from now on.
    pub(crate) fn leave_iommu(&self) {
        self.linked.store(false, Ordering::Release);
    }

    /// True if the function was reset since the guest had it, and the guest has nothing of it left.
    pub(crate) fn is_quiet(&self) -> bool {
        !self.dirty.load(Ordering::Acquire) && !self.in_reach.load(Ordering::Acquire)
    }

    /// Lets the guest at the function, or takes it away without a reset.
    pub(crate) fn set_powered(&self, powered: bool) {
        if powered {
            self.dirty.store(true, Ordering::Release);
            if let Some(link) = &self.link
                && self.linked.load(Ordering::Acquire)
            {
                link.iommu.power_on(link.id);
            }
        }
        lock(&self.placement).powered = powered;
    }

    /// Switches memory decode, as a guest may also do itself. Nothing happens before D0.
    pub(crate) fn set_memory_decode(self: &Arc<Self>, on: bool) {
        let mut placement = lock(&self.placement);
        if placement.powered {
            self.config.set_command(COMMAND_MEMORY, on);
            self.apply_command(&mut placement);
        }
    }

    /// Switches memory decode off and sets the BARs to `addresses`, 0 for those that are not
    /// placed.
    pub(crate) fn assign_bars(self: &Arc<Self>, addresses: [u64; BAR_COUNT]) {
        let mut placement = lock(&self.placement);
        self.config.set_command(COMMAND_MEMORY, false);
        self.apply_command(&mut placement);
        for (bar, address) in addresses.into_iter().enumerate() {
            self.config.set_bar(bar, address);
        }
    }

    /// What each BAR reads after a write of all ones.
    pub(crate) fn probed_bars(&self) -> [u32; BAR_COUNT] {
        self.config.probed_bars()
    }

    /// The address that each BAR holds.
    pub(crate) fn bar_addresses(&self) -> [u64; BAR_COUNT] {
        std::array::from_fn(|bar| self.config.bar(bar))
    }

    /// BARs that could not be mapped where the guest wanted them.
    pub(crate) fn refused_bars(&self) -> u64 {
        self.refused_bars.load(Ordering::Relaxed)
    }

    /// Times that a piece of a BAR could not be taken from the guest.
    pub(crate) fn failed_unmaps(&self) -> u64 {
        self.failed_unmaps.load(Ordering::Relaxed)
    }

    /// The BARs that are mapped, and where.
    pub(crate) fn mapped_bars(&self) -> [Option<u64>; BAR_COUNT] {
        let placement = lock(&self.placement);
        std::array::from_fn(|bar| placement.bars[bar].as_ref().map(|bar| bar.region.base()))
    }

    /// Takes the function out of the guest's hands: BARs unmapped, no DMA under way or to come, no
    /// interrupt mapped, device reset. `powered` says whether the guest may program it again.
    ///
    /// Nothing else is done than to try again what could not be unmapped if the guest has not had it
    /// since the last reset.
    pub(crate) fn reset(self: &Arc<Self>, powered: bool) {
        if !self.dirty.swap(powered, Ordering::AcqRel) {
            self.unmap_stuck(&mut lock(&self.placement));
            return;
        }
        {
            let mut placement = lock(&self.placement);
            placement.powered = false;
            self.config.reset();
            self.apply_command(&mut placement);
            self.interrupts.reset();
        }
        self.device.reset();
        // Whatever the device raised on its way to the reset state found no message.
        lock(&self.placement).powered = powered;
    }

    /// The bus has no other function any more.
    pub(crate) fn set_alone(&self) {
        let _placement = lock(&self.placement);
        self.config.set_alone();
    }

    /// Registers of the configuration space, for saving.
    pub(crate) fn save_config(&self) -> Vec<u32> {
        self.config.save()
    }

    /// True if saved registers can be those of this function.
    pub(crate) fn accepts_config(&self, dwords: &[u32]) -> bool {
        self.config.accepts(dwords)
    }

    /// Takes over registers that [`FunctionSlot::accepts_config`] has found good, and does what
    /// they ask for.
    pub(crate) fn restore_config(self: &Arc<Self>, dwords: &[u32], powered: bool) {
        self.dirty.store(true, Ordering::Release);
        let mut placement = lock(&self.placement);
        self.config.restore(dwords);
        placement.powered = powered;
        self.apply_command(&mut placement);
        self.apply_msix();
        self.apply_msi();
    }

    fn apply_msix(&self) {
        if let Some(control) = self.config.msix() {
            self.interrupts.set_msix_control(control);
        }
    }

    fn apply_msi(&self) {
        if let Some(registers) = self.config.msi() {
            self.interrupts.set_msi(registers);
        }
    }

    /// Makes mappings and DMA follow the command register.
    fn apply_command(self: &Arc<Self>, placement: &mut Placement) {
        let command = self.config.command();
        let master = command & COMMAND_MASTER != 0;
        if self.dma.is_master() != master {
            self.dma.set_master(master);
            self.device.set_bus_master(master);
        }
        if command & COMMAND_MEMORY == 0 && !mutant!("decode-off-keeps-bar") {
            self.disconnect_doorbells(placement);
            self.unmap_areas(placement);
            placement.bars = Default::default();
            return;
        }
        // Before anything is mapped, in whose place it may be.
        self.unmap_stuck(placement);
        if placement.bars.iter().all(Option::is_none) {
            for bar in 0..BAR_COUNT {
                self.map_bar(placement, bar);
            }
        }
    }

    /// Maps one BAR where the guest wants it, if it may be there.
    fn map_bar(self: &Arc<Self>, placement: &mut Placement, bar: usize) {
        let spec = self.layout.bars[bar];
        if spec == BarSpec::None {
            return;
        }
        let address = self.config.bar(bar);
        let handler = Arc::new(BarHandler::new(self.clone(), bar));
        match self.mmio.register(address, spec.size(), handler.clone()) {
            Ok(region) => {
                placement.bars[bar] = Some(MappedBar { region, handler });
                self.connect_doorbells(placement, bar, address);
                self.map_areas(placement, bar, address);
            }
            Err(error) => {
                let count = self.refused_bars.fetch_add(1, Ordering::Relaxed) + 1;
                // A guest can do this as often as it likes: log at powers of two.
                if count.is_power_of_two() {
                    log::warn!(
                        "{} (function {}): BAR {bar} not mapped, {count} so far: {error}",
                        self.layout.kind,
                        self.number
                    );
                }
            }
        }
    }

    fn connect_doorbells(&self, placement: &mut Placement, bar: usize, address: u64) {
        let Some(doorbells) = &self.doorbells else {
            return;
        };
        for (index, register) in self.doorbell_registers.iter().enumerate() {
            if usize::from(register.bar) != bar {
                continue;
            }
            let doorbell = Doorbell {
                gpa: address + register.offset,
                len: register.len,
                data: register.data,
            };
            match doorbells.add(doorbell, register.eventfd.as_fd()) {
                Ok(()) => placement.doorbells.push((doorbell, index)),
                Err(error) => log::debug!("doorbell {doorbell:?} stays a plain register: {error}"),
            }
        }
    }

    /// Lets the guest at the pieces of a BAR that was just mapped. What cannot be mapped answers
    /// as MMIO.
    fn map_areas(&self, placement: &mut Placement, bar: usize, address: u64) {
        let Some(mapper) = &self.mapper else { return };
        for area in &self.areas[bar] {
            for piece in BarHandler::direct(&self.layout, bar, area) {
                let gpa = address + piece.start;
                let (offset, len) = (piece.start - area.offset, piece.end - piece.start);
                match mapper.map(gpa, &area.memory, offset, len) {
                    Ok(()) => placement.areas.push(gpa),
                    Err(error) => {
                        let count = self.refused_areas.fetch_add(1, Ordering::Relaxed) + 1;
                        // A guest can do this as often as it likes: log at powers of two.
                        if count.is_power_of_two() {
                            log::warn!(
                                "{} (function {}): BAR {bar} at {gpa:#x} is reached by exits, \
                                 {count} so far: {error}",
                                self.layout.kind,
                                self.number
                            );
                        }
                    }
                }
            }
        }
    }

    /// Takes the pieces of BARs from the guest, and what is left of earlier ones.
    fn unmap_areas(&self, placement: &mut Placement) {
        placement.stuck.append(&mut placement.areas);
        self.unmap_stuck(placement);
    }

    /// Takes from the guest what could not be taken before. What cannot be now either is tried again the
    /// next time that the command register is written, at a reset, and when the function goes.
    fn unmap_stuck(&self, placement: &mut Placement) {
        let Some(mapper) = &self.mapper else { return };
        placement.stuck.retain(|gpa| {
            let Err(error) = mapper.unmap(*gpa) else {
                return false;
            };
            let count = self.failed_unmaps.fetch_add(1, Ordering::Relaxed) + 1;
            // A guest can have it tried as often as it likes: log at powers of two.
            if count.is_power_of_two() {
                log::error!(
                    "{} (function {}): BAR memory at {gpa:#x} stays mapped, {count} so far: {error}",
                    self.layout.kind,
                    self.number
                );
            }
            true
        });
        let left = !placement.stuck.is_empty();
        self.in_reach.store(left, Ordering::Release);
    }

    fn disconnect_doorbells(&self, placement: &mut Placement) {
        let Some(doorbells) = &self.doorbells else {
            return;
        };
        for (doorbell, index) in placement.doorbells.drain(..) {
            let eventfd = self.doorbell_registers[index].eventfd.as_fd();
            if let Err(error) = doorbells.remove(doorbell, eventfd) {
                log::warn!("doorbell {doorbell:?} stays connected: {error}");
            }
        }
    }
}

impl Drop for FunctionSlot {
    fn drop(&mut self) {
        // The last one who could: nobody else knows what is left.
        self.unmap_areas(&mut lock(&self.placement));
    }
}

fn check_doorbell(layout: &FunctionLayout, register: &DoorbellRegister) -> Result<(), LayoutError> {
    let bar = register.bar;
    let size = layout
        .bars
        .get(usize::from(bar))
        .map_or(0, |spec| spec.size());
    let len = u64::from(register.len.max(1));
    let fits = register
        .offset
        .checked_add(len)
        .is_some_and(|end| end <= size);
    if matches!(register.len, 0 | 1 | 2 | 4 | 8) && fits {
        Ok(())
    } else {
        Err(LayoutError::Doorbell {
            bar,
            offset: register.offset,
        })
    }
}

/// What the device has the guest reach without an exit, checked: inside the BARs, whole pages, apart.
fn areas(
    layout: &FunctionLayout,
    device: &dyn PciFunction,
) -> Result<[Vec<BarArea>; BAR_COUNT], LayoutError> {
    let mut all: [Vec<BarArea>; BAR_COUNT] = Default::default();
    for (bar, areas) in all.iter_mut().enumerate() {
        *areas = device.bar_areas(bar as u8);
        areas.sort_by_key(|area| area.offset);
        let mut free_from = 0;
        for area in &*areas {
            let (offset, len) = (area.offset, area.memory.len() as u64);
            let pages = offset.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
            let end = offset.checked_add(len);
            let inside = end.is_some_and(|end| end <= layout.bars[bar].size());
            if !pages || !inside || offset < free_from {
                let bar = bar as u8;
                return Err(LayoutError::Area { bar, offset });
            }
            free_from = offset + len;
        }
    }
    Ok(all)
}

/// Answers accesses to a BAR: the pages of the MSI-X structures belong to the bus, the rest to the
/// device.
#[derive(Debug)]
struct BarHandler {
    slot: Arc<FunctionSlot>,
    bar: u8,
    /// The BAR is mapped. Held shared during an access, so that none reaches the device after the
    /// BAR was unmapped: a device that was reset stays as it is.
    open: RwLock<bool>,
    /// Offset of the table in this BAR, if it is here.
    table: Option<u64>,
    /// Offset of the pending bit array in this BAR, if it is here.
    pba: Option<u64>,
    /// Pages that the device does not see.
    table_pages: Range<u64>,
    pba_pages: Range<u64>,
    /// The structures themselves, for a device of the host, which may have registers beside them.
    exact: Option<[Range<u64>; 2]>,
}

/// The pages that hold `len` bytes from `offset` on.
fn pages(offset: u64, len: u64) -> Range<u64> {
    offset / PAGE_SIZE * PAGE_SIZE..(offset + len).next_multiple_of(PAGE_SIZE)
}

/// Who answers an access.
enum Target {
    /// The MSI-X table, at this offset.
    Table(u64),
    /// The pending bit array, at this offset.
    Pba(u64),
    /// A page of the MSI-X structures beside them.
    Nothing,
    Device,
}

impl BarHandler {
    fn new(slot: Arc<FunctionSlot>, bar: usize) -> Self {
        let bar = bar as u8;
        let msix = slot.layout.msix;
        let table = msix.filter(|msix| msix.table_bar == bar);
        let pba = msix.filter(|msix| msix.pba_bar == bar);
        let table_at = table.map(|msix| (u64::from(msix.table_offset), msix.table_len()));
        let pba_at = pba.map(|msix| (u64::from(msix.pba_offset), msix.pba_len()));
        let pages = |at: Option<(u64, u64)>| at.map_or(0..0, |(offset, len)| pages(offset, len));
        let is_hosted = slot.interrupts.are_hosted();
        Self {
            slot,
            bar,
            open: RwLock::new(true),
            table: table_at.map(|(offset, _)| offset),
            pba: pba_at.map(|(offset, _)| offset),
            table_pages: pages(table_at),
            pba_pages: pages(pba_at),
            exact: is_hosted.then(|| {
                [table_at, pba_at].map(|at| at.map_or(0..0, |(offset, len)| offset..offset + len))
            }),
        }
    }

    /// The ranges of a BAR in which the guest may reach `area` directly: all but the pages of the MSI-X
    /// structures.
    fn direct(layout: &FunctionLayout, bar: usize, area: &BarArea) -> Vec<Range<u64>> {
        let end = area.offset + area.memory.len() as u64;
        let whole = area.offset..end;
        let mut ranges = vec![whole];
        let structures = layout.msix.into_iter().flat_map(|msix| {
            [
                (
                    msix.table_bar,
                    u64::from(msix.table_offset),
                    msix.table_len(),
                ),
                (msix.pba_bar, u64::from(msix.pba_offset), msix.pba_len()),
            ]
        });
        for (_, offset, len) in structures.filter(|structure| usize::from(structure.0) == bar) {
            let pages = pages(offset, len);
            ranges = ranges
                .into_iter()
                .flat_map(|range| {
                    let below = range.start..range.end.min(pages.start);
                    let above = range.start.max(pages.end)..range.end;
                    [below, above]
                })
                .filter(|range| range.start < range.end)
                .collect();
        }
        ranges
    }

    fn target(&self, offset: u64) -> Target {
        // The pending bits may share the table's page: whichever structure starts nearest below
        // the access answers, and knows its own end.
        let below = |start: Option<u64>| start.filter(|start| *start <= offset);
        let beside = |exact: &[Range<u64>; 2]| exact.iter().all(|range| !range.contains(&offset));
        match (below(self.table), below(self.pba)) {
            _ if self.exact.as_ref().is_some_and(beside) => Target::Device,
            _ if !self.table_pages.contains(&offset) && !self.pba_pages.contains(&offset) => {
                Target::Device
            }
            (Some(table), Some(pba)) if pba > table => Target::Pba(offset - pba),
            (Some(table), _) => Target::Table(offset - table),
            (None, Some(pba)) => Target::Pba(offset - pba),
            (None, None) => Target::Nothing,
        }
    }
}

impl MmioHandler for BarHandler {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if !*open {
            return;
        }
        match self.target(offset) {
            Target::Table(offset) => self.slot.interrupts.table_read(offset, data),
            Target::Pba(offset) => self.slot.interrupts.pba_read(offset, data),
            Target::Nothing => data.fill(0),
            Target::Device => {
                if offset.is_multiple_of(data.len() as u64) {
                    self.slot.device.bar_read(self.bar, offset, data);
                }
            }
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if !*open {
            return;
        }
        match self.target(offset) {
            Target::Table(offset) => self.slot.interrupts.table_write(offset, data),
            Target::Pba(_) | Target::Nothing => {}
            Target::Device => {
                if offset.is_multiple_of(data.len() as u64) {
                    self.slot.device.bar_write(self.bar, offset, data);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "slot_tests.rs"]
mod tests;
