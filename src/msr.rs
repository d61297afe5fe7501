//! Synthetic MSRs other than the SynIC's (docs/spec/hyperv-guest-interface.md, sections 2 and 4).
//!
//! [`PartitionMsrs`] also owns the hypercall page: its bytes are written into guest RAM when the
//! guest enables or moves the page, and the RAM that they cover comes back when it is disabled or
//! moved, as if the page were the overlay that the TLFS describes.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::cpuid::Features;
use crate::hv::msr;
use crate::hypercall::{PageCode, VpSet};
use crate::mem::{GuestRam, PAGE_SIZE};
use crate::vmm::Clock;

/// The access faults: the VMM injects #GP(0) and does not complete the instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("#GP(0)")]
pub struct GpFault;

/// What the VMM or the partition must do after an MSR write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum MsrEffect {
    /// Nothing.
    None,
    /// The guest gave up its identity: the hypercall interface is gone, and so is whatever depends
    /// on it.
    GuestOsIdCleared,
    /// TSC_INVARIANT_CONTROL was written: forward the value where the host's own copy of the MSR
    /// governs CPUID (docs/spec/kvm.md, section 4).
    TscInvariant(u64),
}

/// Writes a register that the guest has written to the copy that the host's kernel keeps for the
/// same VP: number and value. Called under the locks of the register, so that both copies change in
/// the same order: a leaf, which must not block or call back.
pub type ForwardMsr<'a> = &'a mut dyn FnMut(u32, u64);

/// Default port of the hypercall page: no device of a PC sits on it.
pub const DEFAULT_HYPERCALL_PORT: u8 = 0x8d;

/// Ports that the hypercall page cannot use: KVM's RIP quirk at 0x7E, and the delay ports 0x80 and
/// 0xED that Linux writes.
const UNUSABLE_PORTS: [u8; 3] = [0x7e, 0x80, 0xed];

/// Bytes of a page.
const PAGE: usize = PAGE_SIZE as usize;

/// Fixed facts about the partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrConfig {
    /// Number of VPs, 1 to [`VpSet::LIMIT`]: a guest can name no others. VP indices are
    /// `0..vp_count`.
    pub vp_count: u32,
    /// Which optional MSRs exist; the same as given to [`crate::cpuid::leaves`].
    pub features: Features,
    /// I/O port that the hypercall page writes to. Not 0x7E, 0x80 or 0xED, and no port of a device.
    pub hypercall_port: u8,
    /// Frequency of the guest's TSC in Hz. Not 0 when frequencies are offered.
    pub tsc_hz: u64,
    /// Frequency of the local APIC timer's input clock in Hz; 10^9 for KVM's local APIC. Not 0 when
    /// frequencies are offered.
    pub apic_hz: u64,
}

/// Why a configuration or a state was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MsrError {
    /// No partition can have this number of VPs.
    #[error("a partition has 1 to {max} VPs, not {count}", max = VpSet::LIMIT)]
    Vps {
        /// The refused number.
        count: u32,
    },
    /// The hypercall page cannot use this port.
    #[error("port {port:#x} cannot carry hypercalls")]
    Port {
        /// The refused port.
        port: u8,
    },
    /// Frequencies are offered, but one is zero.
    #[error("frequency MSRs are offered without a frequency")]
    Frequency,
    /// The state is of another version.
    #[error("MSR state version {version} is not supported")]
    Version {
        /// Version found.
        version: u32,
    },
    /// The state is for another number of VPs.
    #[error("MSR state of {found} VPs does not fit a partition of {expected}")]
    VpCount {
        /// VPs of this partition.
        expected: u32,
        /// VPs of the state.
        found: usize,
    },
    /// A saved register holds a value that no guest can have put there.
    #[error("MSR {msr:#x} cannot hold {value:#x}")]
    Value {
        /// MSR number.
        msr: u32,
        /// Value of the state.
        value: u64,
    },
    /// The RAM under the hypercall page is missing, of a wrong size, or there without the page.
    #[error("saved hypercall page backing has {len} bytes")]
    Backing {
        /// Bytes found.
        len: usize,
    },
}

/// State of [`PartitionMsrs`] for save and restore. Guest RAM is saved by the VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct PartitionMsrsState {
    /// Version of this layout: [`PartitionMsrsState::VERSION`].
    pub version: u32,
    /// GUEST_OS_ID.
    pub guest_os_id: u64,
    /// HYPERCALL as it reads back.
    pub hypercall: u64,
    /// The 4096 bytes of RAM that the hypercall page covers; empty while it is disabled.
    pub hypercall_backing: Vec<u8>,
    /// REFERENCE_TSC.
    pub reference_tsc: u64,
    /// TSC_INVARIANT_CONTROL.
    pub tsc_invariant: u64,
    /// VP_ASSIST_PAGE of each VP.
    pub vp_assist: Vec<u64>,
}

impl PartitionMsrsState {
    /// The one version of this layout.
    pub const VERSION: u32 = 1;
}

/// Registers and the covered page; everything that a reset clears.
#[derive(Debug)]
struct Registers {
    guest_os_id: u64,
    hypercall: u64,
    /// RAM under the hypercall page; present exactly while the page is enabled.
    backing: Option<Box<[u8; PAGE]>>,
    reference_tsc: u64,
    tsc_invariant: u64,
    vp_assist: Vec<u64>,
}

impl Registers {
    fn new(vp_count: u32) -> Self {
        Self {
            guest_os_id: 0,
            hypercall: 0,
            backing: None,
            reference_tsc: 0,
            tsc_invariant: 0,
            vp_assist: vec![0; vp_count as usize],
        }
    }

    /// Address of the hypercall page while it is enabled.
    fn page(&self) -> Option<u64> {
        (self.hypercall & msr::PAGE_ENABLE != 0).then_some(self.hypercall & msr::PAGE_ADDRESS)
    }
}

/// Partition-wide and per-VP MSRs other than the SynIC's.
///
/// One lock for all of them: guests access these at boot, at CPU hot-plug and at kexec. The
/// hypercall path reads [`PartitionMsrs::hypercalls_enabled`] and takes no lock.
#[derive(Debug)]
pub struct PartitionMsrs {
    config: MsrConfig,
    code: PageCode,
    ram: GuestRam,
    clock: Arc<dyn Clock>,
    registers: Mutex<Registers>,
    hypercalls: AtomicBool,
}

impl PartitionMsrs {
    /// Registers at their reset values.
    ///
    /// # Errors
    ///
    /// [`MsrError::Vps`], [`MsrError::Port`] or [`MsrError::Frequency`].
    pub fn new(config: MsrConfig, ram: GuestRam, clock: Arc<dyn Clock>) -> Result<Self, MsrError> {
        let port = config.hypercall_port;
        let count = config.vp_count;
        if count == 0 || count > VpSet::LIMIT {
            return Err(MsrError::Vps { count });
        }
        if UNUSABLE_PORTS.contains(&port) {
            return Err(MsrError::Port { port });
        }
        if config.features.frequencies && (config.tsc_hz == 0 || config.apic_hz == 0) {
            return Err(MsrError::Frequency);
        }
        Ok(Self {
            config,
            code: PageCode::plain(port),
            ram,
            clock,
            registers: Mutex::new(Registers::new(config.vp_count)),
            hypercalls: AtomicBool::new(false),
        })
    }

    /// The same, with other code in the hypercall page, which falls back on the same port.
    #[must_use]
    pub fn with_code(mut self, code: PageCode) -> Self {
        self.code = code;
        self
    }

    /// The port on which the hypercall page calls.
    pub fn hypercall_port(&self) -> u8 {
        self.config.hypercall_port
    }

    /// True while the guest has an identity and its hypercall page is enabled; a write to the
    /// hypercall port means nothing otherwise.
    pub fn hypercalls_enabled(&self) -> bool {
        self.hypercalls.load(Ordering::Acquire)
    }

    /// Reads an MSR on a VP.
    ///
    /// # Errors
    ///
    /// [`GpFault`] for an MSR that is not offered, and for a VP that does not exist.
    pub fn read(&self, vp: u32, msr: u32) -> Result<u64, GpFault> {
        if vp >= self.config.vp_count {
            return Err(GpFault);
        }
        let features = &self.config.features;
        let value = match msr {
            msr::GUEST_OS_ID => self.lock().guest_os_id,
            msr::HYPERCALL => self.lock().hypercall,
            msr::VP_INDEX => mutant!("msr-vp-index", 0, u64::from(vp)),
            msr::TIME_REF_COUNT if features.reference_counter => self.clock.reference_time(),
            msr::REFERENCE_TSC => self.lock().reference_tsc,
            msr::TSC_FREQUENCY if features.frequencies => self.config.tsc_hz,
            msr::APIC_FREQUENCY if features.frequencies => self.config.apic_hz,
            msr::VP_ASSIST_PAGE => self.lock().vp_assist[vp as usize],
            msr::TSC_INVARIANT_CONTROL if features.tsc_invariant => self.lock().tsc_invariant,
            _ if mutant!("msr-unknown-reads-zero") => 0,
            _ => return Err(GpFault),
        };
        Ok(value)
    }

    /// Writes an MSR on a VP.
    ///
    /// # Errors
    ///
    /// [`GpFault`] for an MSR that is not offered or read-only, for a value that the MSR does not
    /// take, and for a VP that does not exist. Nothing has changed then.
    pub fn write(&self, vp: u32, msr: u32, value: u64) -> Result<MsrEffect, GpFault> {
        self.write_forwarding(vp, msr, value, &mut |_, _| {})
    }

    /// Writes an MSR on a VP, and by `forward` what the host's kernel has to know of it to answer
    /// hypercalls itself: GUEST_OS_ID (docs/spec/kvm.md, section 6.2).
    ///
    /// # Errors
    ///
    /// As [`PartitionMsrs::write`].
    pub fn write_forwarding(
        &self,
        vp: u32,
        msr: u32,
        value: u64,
        forward: ForwardMsr<'_>,
    ) -> Result<MsrEffect, GpFault> {
        if vp >= self.config.vp_count {
            return Err(GpFault);
        }
        let mut registers = self.lock();
        match msr {
            msr::GUEST_OS_ID => {
                forward(msr, value);
                return Ok(self.write_guest_os_id(&mut registers, value));
            }
            msr::HYPERCALL => self.write_hypercall(&mut registers, value)?,
            // Storage only: the reference TSC page is not offered, yet Linux clears the enable bit
            // at every kexec (docs/spec/hyperv-guest-interface.md, section 2).
            msr::REFERENCE_TSC => registers.reference_tsc = value,
            // Storage only: no feature that uses the page is offered.
            msr::VP_ASSIST_PAGE => registers.vp_assist[vp as usize] = value,
            msr::TSC_INVARIANT_CONTROL if self.config.features.tsc_invariant => {
                if value & !msr::TSC_INVARIANT_ENABLE != 0 || value < registers.tsc_invariant {
                    return Err(GpFault);
                }
                registers.tsc_invariant = value;
                return Ok(MsrEffect::TscInvariant(value));
            }
            _ => return Err(GpFault),
        }
        Ok(MsrEffect::None)
    }

    /// GUEST_OS_ID as the host's kernel must have it to answer hypercalls itself.
    pub fn forwarded_msr(&self) -> (u32, u64) {
        (msr::GUEST_OS_ID, self.lock().guest_os_id)
    }

    /// Back to the reset values, the lock bit of HYPERCALL included; the RAM under the hypercall
    /// page comes back, so a VMM that loads RAM anew does that afterwards.
    pub fn reset(&self) {
        let mut registers = self.lock();
        self.remove_page(&mut registers);
        *registers = Registers::new(self.config.vp_count);
    }

    /// The present state.
    pub fn save(&self) -> PartitionMsrsState {
        let registers = self.lock();
        PartitionMsrsState {
            version: PartitionMsrsState::VERSION,
            guest_os_id: registers.guest_os_id,
            hypercall: registers.hypercall,
            hypercall_backing: match &registers.backing {
                Some(bytes) => bytes.to_vec(),
                None => Vec::new(),
            },
            reference_tsc: registers.reference_tsc,
            tsc_invariant: registers.tsc_invariant,
            vp_assist: registers.vp_assist.clone(),
        }
    }

    /// Takes over a saved state, after guest RAM was restored. The hypercall page is written anew,
    /// as the port may differ here. The caller forwards TSC_INVARIANT_CONTROL as after
    /// [`MsrEffect::TscInvariant`].
    ///
    /// # Errors
    ///
    /// [`MsrError`]; nothing has changed then.
    pub fn restore(&self, state: &PartitionMsrsState) -> Result<(), MsrError> {
        let restored = self.check(state)?;
        let mut registers = self.lock();
        *registers = restored;
        if let Some(page) = registers.page() {
            self.write_page(page);
        }
        self.hypercalls
            .store(registers.page().is_some(), Ordering::Release);
        Ok(())
    }

    fn check(&self, state: &PartitionMsrsState) -> Result<Registers, MsrError> {
        if state.version != PartitionMsrsState::VERSION {
            let version = state.version;
            return Err(MsrError::Version { version });
        }
        if state.vp_assist.len() != self.config.vp_count as usize {
            return Err(MsrError::VpCount {
                expected: self.config.vp_count,
                found: state.vp_assist.len(),
            });
        }
        let enabled = state.hypercall & msr::PAGE_ENABLE != 0;
        let page = state.hypercall & msr::PAGE_ADDRESS;
        if enabled && (state.guest_os_id == 0 || !self.ram.is_writable(page, PAGE_SIZE)) {
            return Err(MsrError::Value {
                msr: msr::HYPERCALL,
                value: state.hypercall,
            });
        }
        let offered = u64::from(self.config.features.tsc_invariant);
        if state.tsc_invariant > offered {
            return Err(MsrError::Value {
                msr: msr::TSC_INVARIANT_CONTROL,
                value: state.tsc_invariant,
            });
        }
        let len = state.hypercall_backing.len();
        let backing = match (enabled, len) {
            (false, 0) => None,
            (true, PAGE) => Some(boxed_page(&state.hypercall_backing)),
            _ => return Err(MsrError::Backing { len }),
        };
        Ok(Registers {
            guest_os_id: state.guest_os_id,
            hypercall: state.hypercall,
            backing,
            reference_tsc: state.reference_tsc,
            tsc_invariant: state.tsc_invariant,
            vp_assist: state.vp_assist.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn write_guest_os_id(&self, registers: &mut Registers, value: u64) -> MsrEffect {
        let former = std::mem::replace(&mut registers.guest_os_id, value);
        if value != 0 || former == 0 || mutant!("os-id-clear-keeps-page") {
            return MsrEffect::None;
        }
        self.remove_page(registers);
        registers.hypercall &= !msr::PAGE_ENABLE;
        MsrEffect::GuestOsIdCleared
    }

    fn write_hypercall(&self, registers: &mut Registers, value: u64) -> Result<(), GpFault> {
        if registers.hypercall & msr::HYPERCALL_LOCKED != 0
            && !mutant!("hypercall-page-lock-ignored")
        {
            return Err(GpFault);
        }
        let enable = value & msr::PAGE_ENABLE != 0;
        let page = value & msr::PAGE_ADDRESS;
        if enable && !self.ram.is_writable(page, PAGE_SIZE) {
            return Err(GpFault);
        }
        if enable && registers.guest_os_id == 0 && !mutant!("hypercall-page-without-identity") {
            // The write does not take effect; the guest sees that on reading back.
            return Ok(());
        }
        if !enable {
            self.remove_page(registers);
        } else if registers.page() != Some(page) {
            self.move_page(registers, page)?;
        }
        registers.hypercall = value;
        Ok(())
    }

    /// Covers the RAM at `page` with the hypercall page, and uncovers where it was before. Leaves
    /// the register to the caller.
    fn move_page(&self, registers: &mut Registers, page: u64) -> Result<(), GpFault> {
        let mut backing = Box::new([0; PAGE]);
        self.ram.read(page, &mut backing[..]).map_err(|_| GpFault)?;
        self.uncover(registers);
        registers.backing = Some(backing);
        self.write_page(page);
        self.hypercalls.store(true, Ordering::Release);
        Ok(())
    }

    /// Switches hypercalls off and brings back the RAM under the page, if there is one. Leaves the
    /// register to the caller.
    fn remove_page(&self, registers: &mut Registers) {
        self.hypercalls
            .store(mutant!("hypercalls-without-page"), Ordering::Release);
        self.uncover(registers);
    }

    fn uncover(&self, registers: &mut Registers) {
        let Some(page) = registers.page() else {
            return;
        };
        if let Some(backing) = registers.backing.take()
            && !mutant!("hypercall-page-left-behind")
            && let Err(error) = self.ram.write(page, &backing[..])
        {
            log::warn!("hypercall page cannot be uncovered: {error}");
        }
    }

    fn write_page(&self, page: u64) {
        if let Err(error) = self.ram.write(page, &self.code.page()) {
            log::warn!("hypercall page cannot be written: {error}");
        }
    }
}

/// `bytes` must be a page long, or be cut or padded to one.
fn boxed_page(bytes: &[u8]) -> Box<[u8; PAGE]> {
    let mut page = Box::new([0; PAGE]);
    for (to, from) in page.iter_mut().zip(bytes) {
        *to = *from;
    }
    page
}

#[cfg(test)]
mod tests;
