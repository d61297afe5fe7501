//! The state of a vCPU as plain data, for snapshots. Nothing in it is trusted when it comes back: KVM
//! checks each part, and no MSR is written but those that make up a vCPU's state on this host.
#![allow(unsafe_code)]

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::vcpu_state::{
    InitialState, VcpuStateError, read_msr, set_msr, set_tsc_offset, tsc_offset,
};

/// Deadline of the local APIC's timer, in the guest's time: written when the rest of the timer is set.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Everything that KVM holds of a vCPU between two instructions. KVM's structures are kept as the
/// bytes that they are.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedVcpu {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: Option<kvm_xcrs>,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
    /// What the time stamp counter is ahead of the host's.
    tsc_offset: u64,
}

impl SavedVcpu {
    /// Reads the state of a vCPU whose last exit is completed.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`].
    pub(crate) fn read(
        fd: &VcpuFd,
        vcpu: u32,
        initial: &InitialState,
    ) -> Result<Self, VcpuStateError> {
        let failed = |what| move |source| VcpuStateError { what, vcpu, source };
        // First: it makes KVM act on INIT and SIPI that wait.
        let mp_state = fd.get_mp_state().map_err(failed("activity state"))?;
        let mut msrs = Vec::new();
        for index in initial.msr_indices() {
            if let Some(value) = read_msr(fd, index).map_err(failed("MSRs"))? {
                msrs.push((index, value));
            }
        }
        Ok(Self {
            mp_state,
            regs: fd.get_regs().map_err(failed("registers"))?,
            sregs: fd.get_sregs().map_err(failed("system registers"))?,
            xsave: Box::new(fd.get_xsave().map_err(failed("extended state"))?),
            xcrs: fd.get_xcrs().ok(),
            debugregs: fd.get_debug_regs().map_err(failed("debug registers"))?,
            lapic: fd.get_lapic().map_err(failed("local APIC"))?,
            events: fd.get_vcpu_events().map_err(failed("events"))?,
            msrs,
            tsc_offset: tsc_offset(fd).map_err(failed("TSC offset"))?,
        })
    }

    /// Gives the state to a vCPU that was made like the saved one. `tsc_shift` is what the host's
    /// time stamp counter was ahead when the state was saved, modulo 2^64: the guest's goes on where
    /// it was. Guest RAM is restored already.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`]; the vCPU is of no use then.
    pub(crate) fn restore(
        &self,
        fd: &VcpuFd,
        vcpu: u32,
        initial: &InitialState,
        tsc_shift: u64,
    ) -> Result<(), VcpuStateError> {
        let failed = |what| move |source| VcpuStateError { what, vcpu, source };
        fd.set_mp_state(self.mp_state)
            .map_err(failed("activity state"))?;
        fd.set_sregs(&self.sregs)
            .map_err(failed("system registers"))?;
        fd.set_regs(&self.regs).map_err(failed("registers"))?;
        // SAFETY: KVM reads no more than the 4 KiB of the area; features that need more are off,
        // because the process never asked the host for them. It checks the header itself.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(failed("extended state"))?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs)
                .map_err(failed("extended control registers"))?;
        }
        fd.set_debug_regs(&self.debugregs)
            .map_err(failed("debug registers"))?;
        // Before the timer, which counts in the guest's time.
        set_tsc_offset(fd, self.tsc_offset.wrapping_add(tsc_shift))
            .map_err(failed("TSC offset"))?;
        fd.set_lapic(&self.lapic).map_err(failed("local APIC"))?;
        self.restore_msrs(fd, initial).map_err(failed("MSRs"))?;
        fd.set_vcpu_events(&self.events).map_err(failed("events"))
    }

    fn restore_msrs(&self, fd: &VcpuFd, initial: &InitialState) -> Result<(), kvm_ioctls::Error> {
        let unknown = |index| !initial.msr_indices().any(|known| known == index);
        if self.msrs.iter().any(|(index, _)| unknown(*index)) {
            return Err(kvm_ioctls::Error::new(libc::EINVAL));
        }
        let is_deadline = |entry: &&(u32, u64)| entry.0 == MSR_IA32_TSC_DEADLINE;
        let first = self.msrs.iter().filter(|entry| !is_deadline(entry));
        for &(index, value) in first.chain(self.msrs.iter().filter(is_deadline)) {
            // KVM lists read-only MSRs as well.
            if read_msr(fd, index)? != Some(value) {
                set_msr(fd, index, value)?;
            }
        }
        Ok(())
    }
}

/// The host's time stamp counter now.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: the instruction is there on each processor that runs KVM, and touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}
