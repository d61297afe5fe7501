//! The guest's kernel: identity, hypercall page, hypercalls, SynIC
//! (docs/spec/hyperv-guest-interface.md).
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::synic::Synic;
use super::vm::{PAGE, Vm};
use super::wire::Bytes;
use crate::check::{Failure, equal};
use crate::guest::{Call, Fault, Returned};

/// MSR numbers (docs/spec/hyperv-guest-interface.md, section 2).
pub mod msr {
    /// Identity of the guest.
    pub const GUEST_OS_ID: u32 = 0x4000_0000;
    /// Hypercall page.
    pub const HYPERCALL: u32 = 0x4000_0001;
    /// Index of the VP.
    pub const VP_INDEX: u32 = 0x4000_0002;
    /// Reference time.
    pub const TIME_REF_COUNT: u32 = 0x4000_0020;
    /// Reference TSC page.
    pub const REFERENCE_TSC: u32 = 0x4000_0021;
    /// TSC frequency.
    pub const TSC_FREQUENCY: u32 = 0x4000_0022;
    /// APIC timer frequency.
    pub const APIC_FREQUENCY: u32 = 0x4000_0023;
    /// VP assist page.
    pub const VP_ASSIST_PAGE: u32 = 0x4000_0073;
    /// SynIC control.
    pub const SCONTROL: u32 = 0x4000_0080;
    /// SynIC version.
    pub const SVERSION: u32 = 0x4000_0081;
    /// Event flags page.
    pub const SIEFP: u32 = 0x4000_0082;
    /// Message page.
    pub const SIMP: u32 = 0x4000_0083;
    /// End of message.
    pub const EOM: u32 = 0x4000_0084;
    /// First synthetic interrupt source.
    pub const SINT0: u32 = 0x4000_0090;
    /// Invariant TSC.
    pub const TSC_INVARIANT_CONTROL: u32 = 0x4000_0118;
}

/// Hypercall statuses (docs/spec/hyperv-guest-interface.md, section 3.4).
pub mod status {
    /// Success.
    pub const SUCCESS: u16 = 0;
    /// Unknown code.
    pub const INVALID_HYPERCALL_CODE: u16 = 2;
    /// Malformed control word.
    pub const INVALID_HYPERCALL_INPUT: u16 = 3;
    /// Parameter list misaligned, across a page, outside RAM.
    pub const INVALID_ALIGNMENT: u16 = 4;
    /// Bad field.
    pub const INVALID_PARAMETER: u16 = 5;
    /// No such property.
    pub const UNKNOWN_PROPERTY: u16 = 9;
    /// No memory.
    pub const INSUFFICIENT_MEMORY: u16 = 0xb;
    /// Not self.
    pub const INVALID_PARTITION_ID: u16 = 0xd;
    /// No such VP.
    pub const INVALID_VP_INDEX: u16 = 0xe;
    /// Port gone, or of another kind.
    pub const INVALID_PORT_ID: u16 = 0x11;
    /// No such connection.
    pub const INVALID_CONNECTION_ID: u16 = 0x12;
    /// Queue full.
    pub const INSUFFICIENT_BUFFERS: u16 = 0x13;
    /// SynIC or its event flags page off.
    pub const INVALID_SYNIC_STATE: u16 = 0x18;
    /// Not while something uses it.
    pub const OBJECT_IN_USE: u16 = 0x19;
    /// Limit on domains reached.
    pub const INSUFFICIENT_DEVICE_DOMAINS: u16 = 0x38;
    /// No such device.
    pub const INVALID_DEVICE_ID: u16 = 0x57;
    /// The device is not one for this call.
    pub const INVALID_DEVICE_STATE: u16 = 0x58;
    /// Number taken.
    pub const KEY_ALREADY_EXISTS: u16 = 0x65;
    /// The device is there already.
    pub const DEVICE_ALREADY_IN_DOMAIN: u16 = 0x66;
}

/// Call code of HvPostMessage.
pub const POST_MESSAGE: u64 = 0x5c;
/// Call code of HvSignalEvent.
pub const SIGNAL_EVENT: u64 = 0x5d;
/// Call code of HvRetargetDeviceInterrupt.
pub const RETARGET_INTERRUPT: u64 = 0x7e;
/// Control word bit: input in registers.
pub const FAST: u64 = 1 << 16;

/// What Linux 7.3 writes to GUEST_OS_ID.
pub const LINUX_ID: u64 = 0x8100 << 48 | 0x0007_0300 << 16;
/// The vector that Linux gives the VMBus SINT.
pub const VMBUS_VECTOR: u8 = 0xf3;
/// The SINT of VMBus.
pub const VMBUS_SINT: u8 = 2;

#[derive(Debug)]
struct Inner {
    vm: Vm,
    /// GPA of the hypercall page.
    page: u64,
    /// Parameter pages: VP n has the page n for input, n + vps for output.
    parameters: u64,
    /// Message and event flags pages by VP; empty before the SynICs are switched on.
    synics: Vec<Synic>,
}

/// A kernel that has identified itself.
#[derive(Debug, Clone)]
pub struct Kernel(Arc<Inner>);

impl Kernel {
    /// Identifies itself and enables the hypercall page, from VP 0. The page holds UD2 before, so
    /// that a call into it without a hypercall page is #UD.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn identify(vm: &Vm) -> Result<Self, Failure> {
        let vps = u64::from(vm.vps());
        let page = vm.pages(1)?;
        vm.write(page, &[0x0f, 0x0b].repeat(PAGE as usize / 2))?;
        let parameters = vm.pages(2 * vps)?;
        vm.wrmsr(0, msr::GUEST_OS_ID, LINUX_ID)?;
        let before = vm.rdmsr(0, msr::HYPERCALL)?;
        vm.wrmsr(0, msr::HYPERCALL, before & 0xffe | page | 1)?;
        Ok(Self(Arc::new(Inner {
            vm: vm.clone(),
            page,
            parameters,
            synics: Vec::new(),
        })))
    }

    /// As Linux boots: [`Kernel::identify`], then [`Kernel::start_synics`].
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn boot(vm: &Vm) -> Result<Self, Failure> {
        Self::identify(vm)?.start_synics()
    }

    /// A kernel that has only identified itself goes on as Linux does: VP assist page and SynIC on
    /// each VP.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn start_synics(&self) -> Result<Self, Failure> {
        let vm = self.vm();
        let mut synics = Vec::new();
        for vp in 0..vm.vps() {
            let assist = vm.pages(1)?;
            vm.wrmsr(vp, msr::VP_ASSIST_PAGE, assist | 1)?;
            let synic = Synic::new(vm, vp)?;
            synic.enable(VMBUS_SINT, VMBUS_VECTOR)?;
            synics.push(synic);
        }
        Ok(Self(Arc::new(Inner {
            vm: vm.clone(),
            page: self.0.page,
            parameters: self.0.parameters,
            synics,
        })))
    }

    /// Gives up as Linux does at a kexec, after VMBus was unloaded: SynICs off, VP assist pages
    /// off, no identity, hypercall page and TSC page off.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn shut_down(&self) -> Result<(), Failure> {
        let vm = self.vm();
        for synic in &self.0.synics {
            synic.disable(VMBUS_SINT)?;
            vm.wrmsr(synic.vp(), msr::VP_ASSIST_PAGE, 0)?;
        }
        vm.wrmsr(0, msr::GUEST_OS_ID, 0)?;
        let page = vm.rdmsr(0, msr::HYPERCALL)?;
        vm.wrmsr(0, msr::HYPERCALL, page & !1)?;
        let tsc = vm.rdmsr(0, msr::REFERENCE_TSC)?;
        Ok(vm.wrmsr(0, msr::REFERENCE_TSC, tsc & !1)?)
    }

    /// The machine.
    pub fn vm(&self) -> &Vm {
        &self.0.vm
    }

    /// GPA of the hypercall page.
    pub fn page(&self) -> u64 {
        self.0.page
    }

    /// The SynIC of a VP.
    ///
    /// # Panics
    ///
    /// If the kernel has only identified itself, or there is no such VP.
    pub fn synic(&self, vp: u32) -> &Synic {
        &self.0.synics[vp as usize]
    }

    /// GPA of the page that the VP uses for input.
    pub fn input(&self, vp: u32) -> u64 {
        self.0.parameters + u64::from(vp) * PAGE
    }

    /// GPA of the page that the VP uses for output.
    pub fn output(&self, vp: u32) -> u64 {
        self.0.parameters + u64::from(self.vm().vps() + vp) * PAGE
    }

    /// A call with these registers.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn call(&self, vp: u32, control: u64, rdx: u64, r8: u64) -> Result<Returned, Fault> {
        let call = Call {
            entry: self.page(),
            control,
            rdx,
            r8,
            ..Call::default()
        };
        self.vm().hypercall(vp, &call)
    }

    /// A call whose input is put into the VP's input page. Returns the status.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the call faults.
    pub fn call_with(&self, vp: u32, control: u64, input: &[u8]) -> Result<u16, Failure> {
        self.vm().write(self.input(vp), input)?;
        let returned = self.call(vp, control, self.input(vp), self.output(vp))?;
        Ok(returned.rax as u16)
    }

    /// HvPostMessage with message type 1. Returns the status.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the call faults.
    pub fn post(&self, vp: u32, connection: u32, payload: &[u8]) -> Result<u16, Failure> {
        self.call_with(vp, POST_MESSAGE, &post_input(connection, 1, payload).0)
    }

    /// HvSignalEvent, fast. Returns the status.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the call faults.
    pub fn signal(&self, vp: u32, connection: u32, flag: u16) -> Result<u16, Failure> {
        let rdx = u64::from(connection) | u64::from(flag) << 32;
        Ok(self.call(vp, SIGNAL_EVENT | FAST, rdx, 0)?.rax as u16)
    }

    /// HvRetargetDeviceInterrupt from `vp`. Returns the status.
    ///
    /// # Errors
    ///
    /// [`Failure`] if the call faults.
    pub fn retarget(&self, vp: u32, retarget: &Retarget) -> Result<u16, Failure> {
        let (control, input) = retarget.encode();
        self.call_with(vp, control, &input.0)
    }

    /// The same, which must succeed.
    ///
    /// # Errors
    ///
    /// [`Failure`] if it does not.
    pub fn must_retarget(&self, vp: u32, retarget: &Retarget) -> Result<(), Failure> {
        let got = self.retarget(vp, retarget)?;
        equal("status of HvRetargetDeviceInterrupt", got, status::SUCCESS)
    }
}

/// Input of HvPostMessage: 256 bytes (docs/spec/hyperv-guest-interface.md, section 5.1).
pub fn post_input(connection: u32, message_type: u32, payload: &[u8]) -> Bytes {
    Bytes::words(&[connection, 0, message_type, payload.len() as u32])
        .bytes(payload)
        .up_to(256)
}

/// Targets of an interrupt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// A mask of VPs 0 to 63 (vPCI 1.1).
    Mask(u64),
    /// A sparse set: format, bank mask, banks (vPCI 1.2 and later).
    Set {
        /// 0 for sparse 4K.
        format: u64,
        /// Valid banks.
        banks: u64,
        /// A qword for each.
        masks: Vec<u64>,
    },
}

impl Targets {
    /// One VP, as Linux names it from vPCI 1.2 on: dense from bank 0.
    pub fn one(vp: u32) -> Self {
        Self::all(&[vp])
    }

    /// Several VPs, dense from bank 0.
    pub fn all(vps: &[u32]) -> Self {
        let last = vps.iter().max().map_or(0, |vp| vp / 64);
        let mut masks = vec![0; last as usize + 1];
        for vp in vps {
            masks[*vp as usize / 64] |= 1 << (vp % 64);
        }
        Self::Set {
            format: 0,
            banks: u64::MAX >> (63 - last),
            masks,
        }
    }
}

/// Input of HvRetargetDeviceInterrupt (docs/spec/vpci.md, section 7.2), every field free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retarget {
    /// Partition: all ones for self.
    pub partition: u64,
    /// Logical device id.
    pub device: u64,
    /// 1 for MSI.
    pub source: u32,
    /// Low half of the message's address.
    pub address: u32,
    /// The message's data.
    pub data: u32,
    /// New vector.
    pub vector: u32,
    /// Flags besides the one for a processor set: 1 multicast.
    pub flags: u32,
    /// New targets.
    pub targets: Targets,
}

impl Retarget {
    /// A retarget as Linux makes it.
    pub fn new(device: u64, address: u64, data: u32, vector: u8, vp: u32) -> Self {
        Self {
            partition: u64::MAX,
            device,
            source: 1,
            address: address as u32,
            data,
            vector: vector.into(),
            flags: 0,
            targets: Targets::one(vp),
        }
    }

    /// Control word and input.
    pub fn encode(&self) -> (u64, Bytes) {
        let set = u32::from(matches!(self.targets, Targets::Set { .. })) << 1;
        let head = Bytes::new()
            .u64(self.partition)
            .u64(self.device)
            .u32(self.source)
            .u32(0)
            .u32(self.address)
            .u32(self.data)
            .u64(0)
            .u32(self.vector)
            .u32(self.flags | set);
        match &self.targets {
            Targets::Mask(mask) => (RETARGET_INTERRUPT, head.u64(*mask)),
            Targets::Set {
                format,
                banks,
                masks,
            } => {
                let mut input = head.u64(*format).u64(*banks);
                for mask in masks {
                    input = input.u64(*mask);
                }
                let size = 1 + masks.len() as u64;
                (RETARGET_INTERRUPT | size << 17, input)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retarget_has_the_documented_layout() {
        let (control, input) = Retarget::new(0x1234_ab79, 0xfee0_0000, 7, 0x41, 65).encode();
        assert_eq!(control, 0x7e | 3 << 17);
        assert_eq!(input.0.len(), 56 + 8 + 16);
        assert_eq!(input.0[40..48], [0x41, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(input.0[56..64], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(input.0[72..80], [2, 0, 0, 0, 0, 0, 0, 0]);
    }
}
