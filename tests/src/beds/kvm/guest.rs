//! The guest's side: each method is one command of the puppet.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vm_vpci::mem::GuestRam;
use vm_vpci::vmm::{Msi, MsiSink};
use vpci_puppet::layout::{
    CommandPage, LOG_ENTRIES, OPTION_XMM, RFLAGS_FIXED, RFLAGS_IOPL_SHIFT, Registers,
    STATUS_EXCEPTION, STATUS_PENDING, WAKE_VECTOR,
};
use vpci_puppet::{Entry, PageTables};

use super::vm::PuppetMemory;
use super::vp::{Order, VpThread};
use crate::guest::{Call, Cpl, Fault, Guest, Returned};

/// Bytes that the hypercall page writes, and so the number of ports it needs at CPL 3.
const HYPERCALL_WIDTH: u16 = 4;
/// What a call finds in the registers that are not its parameters.
const PATTERN: u64 = 0x5a00_c3c3_1234_0000;

/// One VP, as commands go to it.
#[derive(Debug)]
struct Vp {
    thread: VpThread,
    /// Interrupts that came and were not asked for yet.
    waiting: VecDeque<u8>,
    /// Interrupts taken from the puppet's log.
    taken: u64,
    /// The wake vector was raised and not taken yet.
    wake_pending: bool,
    /// Why the VP takes no commands until it is reset.
    lost: Option<String>,
}

/// The puppet's VPs.
#[derive(Debug)]
pub(super) struct KvmGuest {
    vps: Vec<Mutex<Vp>>,
    puppet: PuppetMemory,
    tables: Mutex<PageTables>,
    ram: GuestRam,
    free_ram: Range<u64>,
    msi: Arc<dyn MsiSink>,
    hypercall_port: u8,
    command_limit: Duration,
}

/// What a [`KvmGuest`] is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) threads: Vec<VpThread>,
    pub(super) puppet: PuppetMemory,
    pub(super) ram: GuestRam,
    pub(super) free_ram: Range<u64>,
    pub(super) msi: Arc<dyn MsiSink>,
    pub(super) hypercall_port: u8,
    /// Most time that a command takes; then the VP is lost.
    pub(super) command_limit: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvmGuest {
    /// Brings all VPs to where they wait for a command.
    pub(super) fn start(parts: Parts, mapped: &[Range<u64>]) -> Result<Self, String> {
        let vp = |thread| {
            Mutex::new(Vp {
                thread,
                waiting: VecDeque::new(),
                taken: 0,
                wake_pending: false,
                lost: None,
            })
        };
        let guest = Self {
            vps: parts.threads.into_iter().map(vp).collect(),
            puppet: parts.puppet,
            tables: Mutex::default(),
            ram: parts.ram,
            free_ram: parts.free_ram,
            msi: parts.msi,
            hypercall_port: parts.hypercall_port,
            command_limit: parts.command_limit,
        };
        guest.map(vpci_puppet::layout::BASE)?;
        for range in mapped {
            for gib in range.start >> 30..=(range.end - 1) >> 30 {
                guest.map(gib << 30)?;
            }
        }
        guest.reset_with(|| ())?;
        Ok(guest)
    }

    /// Resets all VPs; `meanwhile` runs when none of them executes anything.
    pub(super) fn reset_with(&self, meanwhile: impl FnOnce()) -> Result<(), String> {
        let mut vps: Vec<_> = self.vps.iter().map(lock).collect();
        meanwhile();
        for (index, vp) in (0..).zip(&mut vps) {
            self.puppet.reset_vp(index);
            vp.thread.order(Order::Reset);
        }
        let mut result = Ok(());
        for vp in &mut vps {
            vp.waiting.clear();
            vp.taken = 0;
            vp.wake_pending = false;
            vp.lost = None;
            let done = vp.thread.wait(self.command_limit);
            if let Err(error) = done.unwrap_or_else(|| vp.thread.abandon()) {
                vp.lost = Some(error.clone());
                result = Err(error);
            }
        }
        result
    }

    /// How the host raises interrupts.
    #[cfg(test)]
    pub(super) fn msi(&self) -> Arc<dyn MsiSink> {
        self.msi.clone()
    }

    fn map(&self, address: u64) -> Result<(), String> {
        self.puppet
            .map(&mut lock(&self.tables), address)
            .map_err(|error| format!("{address:#x}: {error}"))
    }

    fn vp(&self, vp: u32) -> Result<MutexGuard<'_, Vp>, Fault> {
        let found = self.vps.get(vp as usize).map(lock);
        found.ok_or_else(|| Fault::Host(format!("there is no VP {vp}")))
    }

    /// Gives VP `index` a command and waits for its end. With `wake`, the puppet is woken after
    /// that time.
    fn run(
        &self,
        index: u32,
        vp: &mut Vp,
        wake: Option<Duration>,
        fill: impl FnOnce(&mut CommandPage),
    ) -> Result<CommandPage, Fault> {
        if let Some(reason) = &vp.lost {
            return Err(Fault::Host(reason.clone()));
        }
        let mut page = self.puppet.page(index);
        page.status = STATUS_PENDING;
        page.options = 0;
        fill(&mut page);
        self.puppet.set_page(index, &page);
        vp.thread.order(Order::Run);
        let mut done = wake.and_then(|after| vp.thread.wait(after));
        if done.is_none() {
            if wake.is_some() {
                self.wake(index, vp);
            }
            done = vp.thread.wait(self.command_limit);
        }
        if let Err(error) = done.unwrap_or_else(|| vp.thread.abandon()) {
            vp.lost = Some(error.clone());
            return Err(Fault::Host(error));
        }
        let page = self.puppet.page(index);
        self.take_interrupts(index, vp, &page)?;
        match page.status {
            STATUS_EXCEPTION => Err(Fault::Exception {
                vector: page.exception.vector as u8,
                error_code: page.exception.error_code(),
                address: page.exception.rip,
            }),
            _ => Ok(page),
        }
    }

    /// Raises the vector that ends the puppet's waiting.
    fn wake(&self, index: u32, vp: &mut Vp) {
        vp.wake_pending = true;
        self.msi.raise_msi(Msi::fixed(index, WAKE_VECTOR));
    }

    /// A command with interrupts off.
    fn command(
        &self,
        index: u32,
        fill: impl FnOnce(&mut CommandPage),
    ) -> Result<CommandPage, Fault> {
        let mut vp = self.vp(index)?;
        self.run(index, &mut vp, None, fill)
    }

    /// One of the puppet's targets with RAX, RCX and RDX.
    fn short(&self, vp: u32, target: Entry, [rax, rcx, rdx]: [u64; 3]) -> Result<Registers, Fault> {
        let page = self.command(vp, |page| {
            page.routine = Entry::ShortCall.address();
            page.target = target.address();
            page.registers.rax = rax;
            page.registers.rcx = rcx;
            page.registers.rdx = rdx;
        })?;
        Ok(page.registers)
    }

    /// Moves what the puppet logged to where [`Guest::next_interrupt`] finds it.
    fn take_interrupts(&self, index: u32, vp: &mut Vp, page: &CommandPage) -> Result<(), Fault> {
        if page.interrupts == vp.taken {
            return Ok(());
        }
        let log = self.puppet.log(index);
        let new = page.interrupts - vp.taken;
        if new > LOG_ENTRIES as u64 {
            let text = format!("VP {index} took {new} interrupts at once; they are not all known");
            return Err(Fault::Host(text));
        }
        for at in vp.taken..page.interrupts {
            match log.vectors[at as usize % LOG_ENTRIES] {
                WAKE_VECTOR => vp.wake_pending = false,
                vector => vp.waiting.push_back(vector),
            }
        }
        vp.taken = page.interrupts;
        Ok(())
    }
}

impl Guest for KvmGuest {
    fn vps(&self) -> u32 {
        self.vps.len() as u32
    }

    fn memory(&self) -> &GuestRam {
        &self.ram
    }

    fn free_ram(&self) -> Range<u64> {
        self.free_ram.clone()
    }

    fn cpuid(&self, vp: u32, leaf: u32, subleaf: u32) -> Result<[u32; 4], Fault> {
        let regs = self.short(vp, Entry::Cpuid, [leaf.into(), subleaf.into(), 0])?;
        Ok([regs.rax, regs.rbx, regs.rcx, regs.rdx].map(|value| value as u32))
    }

    fn rdmsr(&self, vp: u32, msr: u32) -> Result<u64, Fault> {
        let regs = self.short(vp, Entry::Rdmsr, [0, msr.into(), 0])?;
        Ok(regs.rdx << 32 | regs.rax & 0xffff_ffff)
    }

    fn wrmsr(&self, vp: u32, msr: u32, value: u64) -> Result<(), Fault> {
        let halves = [value & 0xffff_ffff, msr.into(), value >> 32];
        self.short(vp, Entry::Wrmsr, halves).map(drop)
    }

    fn hypercall(&self, vp: u32, call: &Call) -> Result<Returned, Fault> {
        self.map(call.entry).map_err(Fault::Host)?;
        let routine = match call.cpl {
            Cpl::Kernel => Entry::Call,
            Cpl::User => Entry::UserCall,
        };
        let before = patterned(call);
        let pattern = std::array::from_fn(|i| u128::from(PATTERN) << 64 | i as u128);
        let xmm = call.xmm.unwrap_or(pattern);
        let page = self.command(vp, |page| {
            page.routine = routine.address();
            page.target = call.entry;
            page.options = OPTION_XMM.into();
            page.registers = before;
            page.xmm = xmm;
            page.user_rflags = RFLAGS_FIXED;
            if call.cpl == Cpl::User {
                // Some CPUs go by the one, some by the other.
                page.user_rflags |= 3 << RFLAGS_IOPL_SHIFT;
                for port in 0..HYPERCALL_WIDTH {
                    self.puppet
                        .allow_port(vp, u16::from(self.hypercall_port) + port);
                }
            }
        })?;
        let after = page.registers;
        let unchanged = Registers {
            rax: after.rax,
            rcx: after.rcx,
            rdx: after.rdx,
            r8: after.r8,
            ..before
        };
        Ok(Returned {
            rax: after.rax,
            rcx: after.rcx,
            rdx: after.rdx,
            r8: after.r8,
            xmm: page.xmm,
            preserved: after == unchanged
                && page.rsp_after == page.rsp_before
                && (call.xmm.is_some() || page.xmm == pattern),
        })
    }

    fn mmio_read(&self, vp: u32, gpa: u64, width: usize) -> Result<u64, Fault> {
        let (target, mask) = match width {
            1 => (Entry::Load8, 0xff),
            2 => (Entry::Load16, 0xffff),
            4 => (Entry::Load32, 0xffff_ffff),
            8 => (Entry::Load64, u64::MAX),
            _ => return Err(Fault::Host(format!("no load has {width} bytes"))),
        };
        self.map(gpa).map_err(Fault::Host)?;
        Ok(self.short(vp, target, [0, 0, gpa])?.rax & mask)
    }

    fn mmio_write(&self, vp: u32, gpa: u64, width: usize, value: u64) -> Result<(), Fault> {
        let target = match width {
            1 => Entry::Store8,
            2 => Entry::Store16,
            4 => Entry::Store32,
            8 => Entry::Store64,
            _ => return Err(Fault::Host(format!("no store has {width} bytes"))),
        };
        self.map(gpa).map_err(Fault::Host)?;
        self.short(vp, target, [value, 0, gpa]).map(drop)
    }

    fn next_interrupt(&self, vp: u32, timeout: Duration) -> Result<Option<u8>, Fault> {
        let start = Instant::now();
        let index = vp;
        let mut vp = self.vp(index)?;
        let mut none_left = false;
        loop {
            if let Some(vector) = vp.waiting.pop_front() {
                return Ok(Some(vector));
            }
            if none_left {
                return Ok(None);
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                self.wake(index, &mut vp);
            }
            let wake = (!left.is_zero()).then_some(left);
            let wait = |page: &mut CommandPage| page.routine = Entry::Wait.address();
            self.run(index, &mut vp, wake, wait)?;
            // It comes after all others.
            none_left = left.is_zero() && !vp.wake_pending;
        }
    }
}

/// The registers of a call: its parameters, and in the others a value that nothing else has.
fn patterned(call: &Call) -> Registers {
    let pattern = |number: u64| PATTERN | number;
    Registers {
        rax: pattern(0),
        rbx: pattern(1),
        rcx: call.control,
        rdx: call.rdx,
        rsi: pattern(4),
        rdi: pattern(5),
        rbp: pattern(6),
        r8: call.r8,
        r9: pattern(9),
        r10: pattern(10),
        r11: pattern(11),
        r12: pattern(12),
        r13: pattern(13),
        r14: pattern(14),
        r15: pattern(15),
    }
}
