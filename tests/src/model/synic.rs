//! The guest's side of a VP's SynIC (docs/spec/hyperv-guest-interface.md, section 6).
#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};

use super::kernel::msr;
use super::vm::Vm;
use super::wire::u32_at;
use crate::check::Failure;
use crate::trace::Event;

/// Bytes of a SINT's slot in the message page, and of its part of the event flags page.
pub const SLOT: u64 = 256;
/// SINT bit: masked.
pub const MASKED: u64 = 1 << 16;

/// A message as it stood in its slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// SynIC message type; 1 for VMBus.
    pub message_type: u32,
    /// Flags byte after the type was set to 0: bit 0 says that another message waits.
    pub flags: u8,
    /// Bytes in use.
    pub payload: Vec<u8>,
}

/// A VP's SynIC with its two pages.
#[derive(Debug, Clone)]
pub struct Synic {
    vm: Vm,
    vp: u32,
    simp: u64,
    siefp: u64,
}

impl Synic {
    /// With fresh pages; nothing is enabled.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn new(vm: &Vm, vp: u32) -> Result<Self, Failure> {
        Ok(Self {
            vm: vm.clone(),
            vp,
            simp: vm.pages(1)?,
            siefp: vm.pages(1)?,
        })
    }

    /// The VP.
    pub fn vp(&self) -> u32 {
        self.vp
    }

    /// GPA of a SINT's message slot.
    pub fn slot(&self, sint: u8) -> u64 {
        self.simp + u64::from(sint) * SLOT
    }

    /// GPA of a SINT's event flags.
    pub fn flags(&self, sint: u8) -> u64 {
        self.siefp + u64::from(sint) * SLOT
    }

    /// Enables, in Linux's order: SIMP, SIEFP, the SINT, SCONTROL.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn enable(&self, sint: u8, vector: u8) -> Result<(), Failure> {
        let (vm, vp) = (&self.vm, self.vp);
        let simp = vm.rdmsr(vp, msr::SIMP)?;
        vm.wrmsr(vp, msr::SIMP, simp & 0xffe | self.simp | 1)?;
        let siefp = vm.rdmsr(vp, msr::SIEFP)?;
        vm.wrmsr(vp, msr::SIEFP, siefp & 0xffe | self.siefp | 1)?;
        self.set_sint(sint, vector.into())?;
        let control = vm.rdmsr(vp, msr::SCONTROL)?;
        Ok(vm.wrmsr(vp, msr::SCONTROL, control | 1)?)
    }

    /// Disables, in Linux's order: the SINT, SIMP, SIEFP, SCONTROL.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn disable(&self, sint: u8) -> Result<(), Failure> {
        let (vm, vp) = (&self.vm, self.vp);
        let source = vm.rdmsr(vp, msr::SINT0 + u32::from(sint))?;
        self.set_sint(sint, source | MASKED)?;
        vm.wrmsr(vp, msr::SIMP, 0)?;
        vm.wrmsr(vp, msr::SIEFP, 0)?;
        let control = vm.rdmsr(vp, msr::SCONTROL)?;
        Ok(vm.wrmsr(vp, msr::SCONTROL, control & !1)?)
    }

    /// Writes a SINT.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn set_sint(&self, sint: u8, value: u64) -> Result<(), Failure> {
        Ok(self
            .vm
            .wrmsr(self.vp, msr::SINT0 + u32::from(sint), value)?)
    }

    /// Message type in a SINT's slot: 0 if it is free.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn pending(&self, sint: u8) -> Result<u32, Failure> {
        Ok(self.vm.ram().load_u32(self.slot(sint), Ordering::Acquire)?)
    }

    /// The message in a SINT's slot, left there.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn peek(&self, sint: u8) -> Result<Option<Message>, Failure> {
        let message_type = self.pending(sint)?;
        if message_type == 0 {
            return Ok(None);
        }
        let slot = self.vm.read(self.slot(sint), SLOT as usize)?;
        let size = usize::from(slot[4]).min(240);
        Ok(Some(Message {
            message_type,
            flags: slot[5],
            payload: slot[16..16 + size].to_vec(),
        }))
    }

    /// Takes the message out of a SINT's slot and frees the slot; does not write EOM.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn take_without_eom(&self, sint: u8) -> Result<Option<Message>, Failure> {
        let Some(mut message) = self.peek(sint)? else {
            return Ok(None);
        };
        let slot = self.slot(sint);
        self.vm.ram().store_u32(slot, 0, Ordering::SeqCst)?;
        fence(Ordering::SeqCst);
        message.flags = self.vm.read(slot + 5, 1)?[0];
        self.vm.trace(&Event::Message {
            vp: self.vp,
            sint,
            payload: message.payload.clone(),
        });
        Ok(Some(message))
    }

    /// Takes the message as Linux does: EOM if the host says that another one waits.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn take(&self, sint: u8) -> Result<Option<Message>, Failure> {
        let message = self.take_without_eom(sint)?;
        if message
            .as_ref()
            .is_some_and(|message| message.flags & 1 != 0)
        {
            self.eom()?;
        }
        Ok(message)
    }

    /// Writes EOM.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn eom(&self) -> Result<(), Failure> {
        Ok(self.vm.wrmsr(self.vp, msr::EOM, 0)?)
    }

    /// Event flags of a SINT that are set, left there.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn events(&self, sint: u8) -> Result<Vec<u16>, Failure> {
        let flags = self.vm.read(self.flags(sint), SLOT as usize)?;
        Ok((0..2048)
            .filter(|flag| flags[usize::from(flag / 8)] & 1 << (flag % 8) != 0)
            .collect())
    }

    /// Tests and clears an event flag, atomically.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn take_event(&self, sint: u8, flag: u16) -> Result<bool, Failure> {
        let gpa = self.flags(sint) + u64::from(flag / 64) * 8;
        let bit = 1 << (flag % 64);
        let ram = self.vm.ram();
        loop {
            let word = ram.load_u64(gpa, Ordering::Acquire)?;
            if word & bit == 0 {
                return Ok(false);
            }
            if ram.compare_exchange_u64(gpa, word, word & !bit)?.is_ok() {
                return Ok(true);
            }
        }
    }

    /// The page that SIMP names, as it lies in RAM.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn message_page(&self) -> Result<Vec<u32>, Failure> {
        let page = self.vm.read(self.simp, 4096)?;
        Ok((0..1024).map(|word| u32_at(&page, word * 4)).collect())
    }
}
