//! A function's configuration space: type 0 header and capability list.
//!
//! Plain registers: reads take no lock, so that they are answered while anything else goes on
//! (docs/spec/vpci.md#VP-7.1-10: a guest polls the vendor id with interrupts off while the
//! bus's worker creates its interrupt). Writes must be serialised by the caller, who also carries
//! out what they ask for. Registers are those of PCI Local Bus Specification 3.0, chapter 6.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use arrayvec::ArrayVec;

use super::function::{BAR_COUNT, BarSpec, FunctionLayout};
use super::layout::LayoutError;

/// Double words of the space: 256 bytes. Offsets behind them, up to 4096, read as zero.
pub(crate) const DWORDS: usize = 64;

/// Where the capability list begins.
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND: usize = 1;
const CLASS: usize = 2;
const HEADER_TYPE: usize = 3;
const BARS: usize = 4;
const SUBSYSTEM: usize = 11;
const CAPABILITY_POINTER: usize = 13;

/// Command register: memory decode.
pub(crate) const COMMAND_MEMORY: u32 = 1 << 1;
/// Command register: bus mastering.
pub(crate) const COMMAND_MASTER: u32 = 1 << 2;
/// Command register: parity response, SERR#, interrupt disable: kept and without effect.
const COMMAND_INERT: u32 = 1 << 6 | 1 << 8 | 1 << 10;
/// Status register, upper half of the same double word: a capability list exists.
const STATUS_CAPABILITIES: u32 = 1 << 20;
/// Header type: more functions follow.
const MULTI_FUNCTION: u32 = 1 << 23;
/// Cache line size: kept and without effect.
const CACHE_LINE_SIZE: u32 = 0xff;

const CAP_MSI: u8 = 0x05;
const CAP_MSIX: u8 = 0x11;
/// MSI message control: enable and multiple message enable.
const MSI_CONTROL_WRITABLE: u32 = 0x0071_0000;
/// MSI message control: 64-bit address, per-vector masking.
const MSI_CONTROL_FIXED: u32 = 0x0180_0000;
/// MSI-X message control: function mask and enable.
const MSIX_CONTROL_WRITABLE: u32 = 0xc000_0000;

/// What a write changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Changes {
    /// Memory decode or bus mastering.
    pub(crate) command: bool,
    /// A register of the MSI capability.
    pub(crate) msi: bool,
    /// The message control of the MSI-X capability.
    pub(crate) msix: bool,
}

/// The MSI capability as the guest programmed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct MsiRegisters {
    /// Enable bit.
    pub(crate) enabled: bool,
    /// Messages enabled: a power of two, at most what the function has.
    pub(crate) messages: u8,
    /// Message address.
    pub(crate) address: u64,
    /// Message data.
    pub(crate) data: u16,
    /// Masked messages.
    pub(crate) mask: u32,
}

impl MsiRegisters {
    /// The data of one of the messages: its number in the low bits of the data register.
    pub(crate) fn data_of(&self, message: u32) -> u32 {
        let low = u32::from(self.messages.max(1)) - 1;
        u32::from(self.data) & !low | message & low
    }
}

/// The MSI-X message control as the guest programmed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct MsixControl {
    /// Enable bit.
    pub(crate) enabled: bool,
    /// Function mask bit.
    pub(crate) masked: bool,
}

/// A capability without its id and next pointer.
pub(crate) type Body = ArrayVec<u8, { DWORDS * 4 }>;

/// The registers.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    dwords: [AtomicU32; DWORDS],
    /// What the registers hold after reset, but for [`Self::set_alone`].
    initial: [u32; DWORDS],
    /// Bits that the guest may write.
    writable: [u32; DWORDS],
    /// The bus had other functions beside this one, and has none any more.
    alone: AtomicBool,
    bars: [BarSpec; BAR_COUNT],
    /// First double word and messages of the MSI capability.
    msi: Option<(usize, u8)>,
    /// First double word of the MSI-X capability.
    msix: Option<usize>,
    /// Where the bodies of the layout's capabilities lie, in bytes.
    bodies: Vec<Range<usize>>,
}

impl ConfigSpace {
    /// The space of a validated layout, after reset.
    pub(crate) fn new(layout: &FunctionLayout, multi_function: bool) -> Result<Self, LayoutError> {
        let mut build = Builder::default();
        build.header(layout, multi_function);
        let mut bodies = Vec::new();
        for capability in &layout.capabilities {
            let body = &capability.body;
            let at = 4 * build.capability(capability.id, body, &capability.writable)? + 2;
            bodies.push(at..at + body.len());
        }
        let msix = match &layout.msix {
            Some(spec) => {
                let mut body = [0; 10];
                body[..2].copy_from_slice(&(spec.vectors - 1).to_le_bytes());
                let table = spec.table_offset | u32::from(spec.table_bar);
                let pba = spec.pba_offset | u32::from(spec.pba_bar);
                body[2..6].copy_from_slice(&table.to_le_bytes());
                body[6..].copy_from_slice(&pba.to_le_bytes());
                let at = build.capability(CAP_MSIX, &body, &[0; 10])?;
                build.writable[at] |= MSIX_CONTROL_WRITABLE;
                Some(at)
            }
            None => None,
        };
        let msi = match &layout.msi {
            Some(spec) => {
                let at = build.capability(CAP_MSI, &[0; 22], &[0; 22])?;
                let log2 = u32::from(spec.messages).trailing_zeros();
                build.initial[at] |= MSI_CONTROL_FIXED | log2 << 17;
                build.writable[at] |= MSI_CONTROL_WRITABLE;
                build.writable[at + 1] = !3;
                build.writable[at + 2] = !0;
                build.writable[at + 3] = 0xffff;
                build.writable[at + 4] = low_bits(spec.messages);
                Some((at, spec.messages))
            }
            None => None,
        };
        Ok(Self {
            dwords: build.initial.map(AtomicU32::new),
            initial: build.initial,
            alone: AtomicBool::new(false),
            writable: build.writable,
            bars: layout.bars,
            msi,
            msix,
            bodies,
        })
    }

    /// The capability of the layout whose body an access of `len` bytes at `offset` meets: its index,
    /// how far into the body that is, and the body. None for an access that this space itself
    /// answers with all ones, or drops.
    pub(crate) fn body_at(&self, offset: usize, len: usize) -> Option<(usize, usize, Body)> {
        locate(offset, len)?;
        let index = self.bodies.iter().position(|b| b.contains(&offset))?;
        let range = self.bodies[index].clone();
        let start = range.start;
        let byte = |at: usize| self.load(at / 4).to_le_bytes()[at % 4];
        Some((index, offset - start, range.map(byte).collect()))
    }

    /// Back to the state after reset: decode and bus mastering off, BARs zero.
    pub(crate) fn reset(&self) {
        for (index, dword) in self
            .dwords
            .iter()
            .enumerate()
            .filter(|_| !mutant!("reset-keeps-config"))
        {
            dword.store(self.initial(index), Ordering::Relaxed);
        }
    }

    /// The function is the only one of its bus from now on. No store is under way.
    pub(crate) fn set_alone(&self) {
        self.alone.store(true, Ordering::Relaxed);
        self.dwords[HEADER_TYPE].fetch_and(!MULTI_FUNCTION, Ordering::Relaxed);
    }

    /// What a register holds after reset.
    fn initial(&self, index: usize) -> u32 {
        let initial = self.initial[index];
        match index {
            HEADER_TYPE if self.alone.load(Ordering::Relaxed) => initial & !MULTI_FUNCTION,
            _ => initial,
        }
    }

    /// Reads `data.len()` bytes (1, 2 or 4, inside one double word, else all ones). `msi_pending`
    /// is asked for the pending bits of the MSI capability.
    pub(crate) fn read(&self, offset: usize, data: &mut [u8], msi_pending: impl FnOnce() -> u32) {
        let Some((index, shift)) = locate(offset, data.len()) else {
            data.fill(0xff);
            return;
        };
        let value = match self.msi {
            Some((at, _)) if index == at + 5 => msi_pending(),
            _ => self.load(index),
        };
        let bytes = (value >> shift).to_le_bytes();
        match data {
            // By far the most frequent, and no call to copy it.
            [a, b, c, d] => [*a, *b, *c, *d] = bytes,
            _ => data.copy_from_slice(&bytes[..data.len()]),
        }
    }

    /// Writes `data` (1, 2 or 4 bytes, inside one double word, else nothing). BAR writes are
    /// dropped while memory decode is on
    /// (docs/spec/vpci.md#vpci-6).
    pub(crate) fn write(&self, offset: usize, data: &[u8]) -> Changes {
        let mut changes = Changes::default();
        let Some((index, shift)) = locate(offset, data.len()) else {
            return changes;
        };
        if index >= DWORDS {
            return changes;
        }
        if (BARS..BARS + BAR_COUNT).contains(&index)
            && self.command() & COMMAND_MEMORY != 0
            && !mutant!("bar-written-while-decoding")
        {
            return changes;
        }
        let mut bytes = [0; 4];
        bytes[..data.len()].copy_from_slice(data);
        let enabled = (u64::MAX >> (64 - 8 * data.len())) as u32;
        let writable = mutant!("config-read-only-written", !0, self.writable[index]);
        let mask = (enabled << shift) & writable;
        let old = self.load(index);
        let new = old & !mask | (u32::from_le_bytes(bytes) << shift) & mask;
        self.dwords[index].store(new, Ordering::Relaxed);
        changes.command = index == COMMAND && old != new;
        changes.msix = self.msix == Some(index) && old != new;
        changes.msi = self
            .msi
            .is_some_and(|(at, _)| (at..at + 5).contains(&index))
            && old != new;
        changes
    }

    /// Command register.
    pub(crate) fn command(&self) -> u32 {
        self.load(COMMAND) & 0xffff
    }

    /// Sets or clears bits of the command register.
    pub(crate) fn set_command(&self, bits: u32, on: bool) {
        let old = self.load(COMMAND);
        let new = if on { old | bits } else { old & !bits };
        self.dwords[COMMAND].store(new, Ordering::Relaxed);
    }

    /// Address that BAR `bar` holds; 0 for one that is not implemented.
    pub(crate) fn bar(&self, bar: usize) -> u64 {
        match self.bars[bar] {
            BarSpec::None => 0,
            BarSpec::Memory32 { .. } => u64::from(self.load(BARS + bar) & !0xf),
            BarSpec::Memory64 { .. } => {
                let low = u64::from(self.load(BARS + bar) & !0xf);
                low | u64::from(self.load(BARS + bar + 1)) << 32
            }
        }
    }

    /// Sets the address of BAR `bar`; bits below its size are lost.
    pub(crate) fn set_bar(&self, bar: usize, address: u64) {
        let set = |index: usize, value: u32| {
            let kept = self.load(index) & !self.writable[index];
            self.dwords[index].store(kept | value & self.writable[index], Ordering::Relaxed);
        };
        match self.bars[bar] {
            BarSpec::None => {}
            BarSpec::Memory32 { .. } => set(BARS + bar, address as u32),
            BarSpec::Memory64 { .. } => {
                set(BARS + bar, address as u32);
                set(BARS + bar + 1, (address >> 32) as u32);
            }
        }
    }

    /// What each BAR reads after a write of all ones.
    pub(crate) fn probed_bars(&self) -> [u32; BAR_COUNT] {
        std::array::from_fn(|bar| self.initial[BARS + bar] | self.writable[BARS + bar])
    }

    /// The MSI capability, if there is one.
    pub(crate) fn msi(&self) -> Option<MsiRegisters> {
        let (at, most) = self.msi?;
        let control = self.load(at);
        Some(MsiRegisters {
            enabled: control & 1 << 16 != 0,
            messages: (1u32 << (control >> 20 & 7)).min(u32::from(most)) as u8,
            address: u64::from(self.load(at + 1)) | u64::from(self.load(at + 2)) << 32,
            data: self.load(at + 3) as u16,
            mask: self.load(at + 4),
        })
    }

    /// The MSI-X message control, if there is such a capability.
    pub(crate) fn msix(&self) -> Option<MsixControl> {
        let control = self.load(self.msix?);
        Some(MsixControl {
            enabled: control & 1 << 31 != 0,
            masked: control & 1 << 30 != 0,
        })
    }

    /// All registers, for saving.
    pub(crate) fn save(&self) -> Vec<u32> {
        (0..DWORDS).map(|index| self.load(index)).collect()
    }

    /// True if `dwords` differs from the reset state in writable bits alone.
    pub(crate) fn accepts(&self, dwords: &[u32]) -> bool {
        dwords.len() == DWORDS
            && (0..DWORDS).all(|i| (dwords[i] ^ self.initial(i)) & !self.writable[i] == 0)
    }

    /// Takes over saved registers, which [`ConfigSpace::accepts`] has found good.
    pub(crate) fn restore(&self, dwords: &[u32]) {
        for (register, &value) in self.dwords.iter().zip(dwords) {
            register.store(value, Ordering::Relaxed);
        }
    }

    fn load(&self, index: usize) -> u32 {
        self.dwords
            .get(index)
            .map_or(0, |dword| dword.load(Ordering::Relaxed))
    }
}

/// True if saved registers have the function decode its BARs, or let it do DMA.
pub(crate) fn is_enabled(dwords: &[u32]) -> bool {
    let command = dwords.get(1).copied().unwrap_or(0);
    command & (COMMAND_MEMORY | COMMAND_MASTER) != 0
}

/// A mask of the low `count` (at most 32) bits.
fn low_bits(count: u8) -> u32 {
    ((1u64 << count) - 1) as u32
}

/// Double word and bit shift of an access of 1, 2 or 4 bytes that stays inside one double word
/// of the 4096 bytes.
fn locate(offset: usize, len: usize) -> Option<(usize, u32)> {
    if !matches!(len, 1 | 2 | 4) || offset >= 4096 || offset % 4 + len > 4 {
        return None;
    }
    Some((offset / 4, (offset % 4 * 8) as u32))
}

/// Collects the registers of a layout.
#[derive(Debug)]
struct Builder {
    initial: [u32; DWORDS],
    writable: [u32; DWORDS],
    /// Byte offset of the next capability.
    next: usize,
    /// Byte offset of the last capability, 0 for none.
    last: usize,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            initial: [0; DWORDS],
            writable: [0; DWORDS],
            next: FIRST_CAPABILITY,
            last: 0,
        }
    }
}

impl Builder {
    fn header(&mut self, layout: &FunctionLayout, multi_function: bool) {
        let id = &layout.identity;
        self.initial[0] = u32::from(id.device) << 16 | u32::from(id.vendor);
        self.writable[COMMAND] = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INERT;
        self.initial[CLASS] =
            u32::from_le_bytes([id.revision, id.prog_if, id.subclass, id.base_class]);
        self.writable[HEADER_TYPE] = CACHE_LINE_SIZE;
        if multi_function {
            self.initial[HEADER_TYPE] |= MULTI_FUNCTION;
        }
        for (bar, spec) in layout.bars.iter().enumerate() {
            let at = BARS + bar;
            match *spec {
                BarSpec::None => {}
                BarSpec::Memory32 { size } => self.writable[at] = !(size - 1),
                BarSpec::Memory64 { size, prefetchable } => {
                    let mask = !(size - 1);
                    self.initial[at] = 4 | u32::from(prefetchable) << 3;
                    self.writable[at] = mask as u32;
                    self.writable[at + 1] = (mask >> 32) as u32;
                }
            }
        }
        self.initial[SUBSYSTEM] = u32::from(id.subsystem) << 16 | u32::from(id.subsystem_vendor);
    }

    /// Appends a capability; returns its first double word.
    fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, LayoutError> {
        let start = self.next;
        let end = start + 2 + body.len();
        if end > DWORDS * 4 {
            return Err(LayoutError::CapabilitiesTooLong);
        }
        if self.last == 0 {
            self.initial[COMMAND] |= STATUS_CAPABILITIES;
            self.initial[CAPABILITY_POINTER] = start as u32;
        } else {
            self.set(self.last + 1, start as u8, 0);
        }
        self.set(start, id, 0);
        for (index, (&value, &mask)) in body.iter().zip(writable).enumerate() {
            self.set(start + 2 + index, value, mask);
        }
        self.last = start;
        self.next = end.next_multiple_of(4);
        Ok(start / 4)
    }

    fn set(&mut self, offset: usize, value: u8, writable: u8) {
        let shift = offset % 4 * 8;
        self.initial[offset / 4] |= u32::from(value) << shift;
        self.writable[offset / 4] |= u32::from(writable) << shift;
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
