//! A model of the pvIOMMU that is slow and obvious: it keeps no cache, knows memory as bytes, and
//! translates every byte of an access by itself.

use std::collections::BTreeMap;

use super::super::FaultCause;

/// What a domain does: `None` before it is configured.
type Mode = Option<Setup>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Setup {
    Identity,
    Blocked,
    Table { root: u64, levels: u32 },
}

#[derive(Debug, Clone, Default)]
pub(super) struct Device {
    /// 0 is the default domain.
    pub(super) domain: u32,
    pub(super) held: bool,
    pub(super) faults: u64,
}

/// Regions of RAM: start, and bytes.
pub(super) type Memory = Vec<(u64, Vec<u8>)>;

#[derive(Debug, Clone)]
pub(super) struct Reference {
    pub(super) memory: Memory,
    pub(super) domains: BTreeMap<u32, Mode>,
    /// Faults of each domain.
    pub(super) faults: BTreeMap<u32, u64>,
    /// Devices behind the pvIOMMU.
    pub(super) devices: BTreeMap<u64, Device>,
    pub(super) limit: usize,
}

impl Reference {
    fn byte(&mut self, gpa: u64) -> Option<&mut u8> {
        self.memory.iter_mut().find_map(|(start, bytes)| {
            let offset = gpa.checked_sub(*start)?;
            bytes.get_mut(offset as usize)
        })
    }

    pub(super) fn load(&mut self, gpa: u64) -> Option<u64> {
        let mut value = 0;
        for at in 0..8 {
            value |= u64::from(*self.byte(gpa + at)?) << (8 * at);
        }
        Some(value)
    }

    pub(super) fn store(&mut self, gpa: u64, value: u64) {
        for at in 0..8 {
            if let Some(byte) = self.byte(gpa + at) {
                *byte = (value >> (8 * at)) as u8;
            }
        }
    }

    pub(super) fn create(&mut self, number: u32) -> u16 {
        if number == 0 || number == u32::MAX {
            0x05
        } else if self.domains.contains_key(&number) {
            0x65
        } else if self.domains.len() == self.limit {
            0x38
        } else {
            self.domains.insert(number, None);
            self.faults.insert(number, 0);
            0
        }
    }

    pub(super) fn delete(&mut self, number: u32) -> u16 {
        if !self.domains.contains_key(&number) {
            0x05
        } else if self.devices.values().any(|device| device.domain == number) {
            0x19
        } else {
            self.domains.remove(&number);
            0
        }
    }

    pub(super) fn configure(&mut self, number: u32, flags: u64, root: u64) -> u16 {
        let setup = match flags {
            0 | 4 => Setup::Identity,
            3 | 7 => Setup::Blocked,
            1 | 5 => {
                let last = root.checked_add(0xfff);
                let whole =
                    self.byte(root).is_some() && last.is_some_and(|last| self.byte(last).is_some());
                if !root.is_multiple_of(0x1000) || !whole {
                    return 0x05;
                }
                let levels = if flags == 5 { 5 } else { 4 };
                Setup::Table { root, levels }
            }
            _ => return 0x05,
        };
        match self.domains.get_mut(&number) {
            Some(mode) => {
                *mode = Some(setup);
                0
            }
            None => 0x05,
        }
    }

    /// `number` 0 is the default domain.
    pub(super) fn attach(&mut self, number: u32, id: u64) -> u16 {
        if number != 0 && !self.domains.contains_key(&number) {
            return 0x05;
        }
        match self.devices.get_mut(&id) {
            None => 0x58,
            Some(device) if number != 0 && device.domain == number => 0x66,
            Some(device) => {
                device.domain = number;
                0
            }
        }
    }

    pub(super) fn flush(&self, number: u32) -> u16 {
        if self.domains.contains_key(&number) {
            0
        } else {
            0x05
        }
    }

    pub(super) fn flush_list(&self, number: u32, elements: &[u64]) -> (u16, u16) {
        if !self.domains.contains_key(&number) {
            return (0x05, 0);
        }
        let good = |element: &&u64| {
            let (shift, page) = (*element & 0xfff, *element >> 12);
            shift <= 52 && page >> shift << shift < 1 << 45
        };
        let done = elements.iter().take_while(good).count();
        let status = if done == elements.len() { 0 } else { 0x05 };
        (status, done as u16)
    }

    pub(super) fn start_anew(&mut self, hold: bool) {
        self.domains.clear();
        for device in self.devices.values_mut() {
            device.domain = 0;
            device.held = hold;
        }
    }

    /// What a byte at `iova` is in guest physical terms.
    fn translate(&mut self, id: u64, iova: u64, write: bool) -> Result<u64, FaultCause> {
        let device = &self.devices[&id];
        let setup = match device.domain {
            _ if device.held => Setup::Blocked,
            0 => Setup::Identity,
            number => self.domains[&number].unwrap_or(Setup::Blocked),
        };
        let gpa = match setup {
            Setup::Blocked => return Err(FaultCause::Blocked),
            Setup::Identity => iova,
            Setup::Table { root, levels } => {
                if iova >= 1 << (12 + 9 * levels) {
                    return Err(FaultCause::Width);
                }
                self.walk(root, levels, iova, write)?
            }
        };
        match self.byte(gpa) {
            Some(_) => Ok(gpa),
            None => Err(FaultCause::NotRam),
        }
    }

    fn walk(&mut self, table: u64, level: u32, iova: u64, write: bool) -> Result<u64, FaultCause> {
        let number = level as u8;
        let size = 1u64 << (12 + 9 * (level - 1));
        let at = table + iova / size % 512 * 8;
        let fault = FaultCause::TableNotRam { level: number };
        let mut entry = self.load(at).ok_or(fault)?;
        let leaf = level == 1 || entry & 0x80 != 0;
        let address = entry & 0x000f_ffff_ffff_f000;
        if entry & 1 == 0 {
            return Err(FaultCause::NotPresent { level: number });
        }
        if leaf && (level > 3 || !address.is_multiple_of(size)) {
            return Err(FaultCause::Reserved { level: number });
        }
        if entry & 4 == 0 {
            return Err(FaultCause::Supervisor { level: number });
        }
        if write && entry & 2 == 0 {
            return Err(FaultCause::ReadOnly { level: number });
        }
        entry |= 0x20;
        if leaf && write {
            entry |= 0x40;
        }
        self.store(at, entry);
        if leaf {
            return Ok(address + iova % size);
        }
        self.walk(address, level - 1, iova, write)
    }

    /// An access of `data.len()` bytes: a write of `data`, or a read to it. On failure, which byte
    /// could not be translated and why, and nothing has moved.
    pub(super) fn dma(
        &mut self,
        id: u64,
        iova: u64,
        write: bool,
        data: &mut [u8],
    ) -> Result<Vec<u64>, (u64, FaultCause)> {
        let translated = self.places(id, iova, write, data.len() as u64);
        let places = translated.inspect_err(|_| {
            let device = self.devices.get_mut(&id).expect("a device");
            device.faults += 1;
            *self.faults.entry(device.domain).or_default() += 1;
        })?;
        for (byte, place) in data.iter_mut().zip(&places) {
            let memory = self.byte(*place).expect("RAM");
            if write {
                *memory = *byte;
            } else {
                *byte = *memory;
            }
        }
        Ok(places)
    }

    fn places(
        &mut self,
        id: u64,
        iova: u64,
        write: bool,
        len: u64,
    ) -> Result<Vec<u64>, (u64, FaultCause)> {
        if iova.checked_add(len).is_none() {
            return Err((iova, FaultCause::NotRam));
        }
        if (iova..iova + len).any(|iova| (0xfee0_0000..=0xfeef_ffff).contains(&iova)) {
            return Err((iova, FaultCause::InterruptRange));
        }
        let mut places = Vec::new();
        for iova in iova..iova + len {
            let place = self.translate(id, iova, write);
            places.push(place.map_err(|cause| (iova, cause))?);
        }
        Ok(places)
    }
}
