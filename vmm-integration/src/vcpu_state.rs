//! The state a vCPU has before it runs for the first time, to return to it when the guest resets
//! the machine.
#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    KVMIO, Msrs, kvm_debugregs, kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

// kvm-ioctls has these for vCPUs of other architectures only.
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Time stamp counter: goes on counting over a reset, as on hardware whose guests rely on it being
/// in step on all processors.
const MSR_IA32_TSC: u32 = 0x10;
/// Same counter, seen from its other side.
const MSR_IA32_TSC_ADJUST: u32 = 0x3b;
/// Default memory type: MTRRs on, write-back.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
/// AMD's hardware configuration register, and its bit for a TSC that counts at the P0 frequency.
/// Linux warns of a firmware bug where an invariant TSC comes without it; KVM leaves it clear.
const MSR_K7_HWCR: u32 = 0xc001_0015;
const HWCR_TSC_AT_P0: u64 = 1 << 24;
/// First and last MSR of the synthetic range, which is the library's to reset.
const SYNTHETIC_MSRS: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
/// kvm-clock and its kin: absent from the guest's CPUID, and some refuse a write-back.
const KVM_MSRS: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// Why a vCPU's state could not be read or set.
#[derive(Debug, thiserror::Error)]
#[error("KVM refuses the {what} of vCPU {vcpu}: {source}")]
pub(crate) struct VcpuStateError {
    /// Part of the state.
    pub(crate) what: &'static str,
    /// vCPU number.
    pub(crate) vcpu: u32,
    /// KVM's error.
    pub(crate) source: kvm_ioctls::Error,
}

/// Everything KVM holds of one vCPU that a reset restores.
#[derive(Debug)]
pub(crate) struct InitialState {
    vcpu: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: Option<kvm_xcrs>,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
}

impl InitialState {
    /// Finishes the set-up of a new vCPU whose CPUID is set, and notes its state.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`].
    pub(crate) fn prepare(kvm: &Kvm, fd: &VcpuFd, vcpu: u32) -> Result<Self, VcpuStateError> {
        let failed = |what| move |source| VcpuStateError { what, vcpu, source };
        set_msr(fd, MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK).map_err(failed("MTRRs"))?;
        // Absent on other vendors' CPUs, and read-only in old kernels.
        if let Ok(Some(hwcr)) = read_msr(fd, MSR_K7_HWCR)
            && let Err(error) = set_msr(fd, MSR_K7_HWCR, hwcr | HWCR_TSC_AT_P0)
        {
            log::debug!("vCPU {vcpu}: HWCR stays as it is: {error}");
        }
        Ok(Self {
            vcpu,
            regs: fd.get_regs().map_err(failed("registers"))?,
            sregs: fd.get_sregs().map_err(failed("system registers"))?,
            xsave: Box::new(fd.get_xsave().map_err(failed("extended state"))?),
            xcrs: fd.get_xcrs().ok(),
            debugregs: fd.get_debug_regs().map_err(failed("debug registers"))?,
            lapic: fd.get_lapic().map_err(failed("local APIC"))?,
            events: fd.get_vcpu_events().map_err(failed("events"))?,
            msrs: read_msrs(kvm, fd).map_err(failed("MSRs"))?,
        })
    }

    /// The system registers of a processor after reset.
    pub(crate) fn sregs(&self) -> kvm_sregs {
        self.sregs
    }

    /// The MSRs that make up a vCPU's state on this host, but for the time stamp counter.
    pub(crate) fn msr_indices(&self) -> impl Iterator<Item = u32> {
        let listed = self.msrs.iter().map(|entry| entry.index);
        listed.chain([MSR_IA32_TSC_ADJUST])
    }

    /// Puts the vCPU back. Its last exit must be completed.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`]; the vCPU is of no use then.
    pub(crate) fn restore(&self, fd: &VcpuFd) -> Result<(), VcpuStateError> {
        let vcpu = self.vcpu;
        let failed = |what| move |source| VcpuStateError { what, vcpu, source };
        fd.set_mp_state(self.mp_state())
            .map_err(failed("activity state"))?;
        fd.set_sregs(&self.sregs)
            .map_err(failed("system registers"))?;
        fd.set_regs(&self.regs).map_err(failed("registers"))?;
        // SAFETY: the area was filled by KVM for the same vCPU; features that need more than its
        // 4 KiB are off, because the process never asked the host for them.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(failed("extended state"))?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs)
                .map_err(failed("extended control registers"))?;
        }
        fd.set_debug_regs(&self.debugregs)
            .map_err(failed("debug registers"))?;
        fd.set_lapic(&self.lapic).map_err(failed("local APIC"))?;
        self.restore_msrs(fd).map_err(failed("MSRs"))?;
        rewrite_tsc_offset(fd).map_err(failed("TSC offset"))?;
        fd.set_vcpu_events(&self.events).map_err(failed("events"))
    }

    /// Sets registers other than those of the initial state.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`].
    pub(crate) fn override_registers(
        &self,
        fd: &VcpuFd,
        regs: &kvm_regs,
        sregs: &kvm_sregs,
    ) -> Result<(), VcpuStateError> {
        let vcpu = self.vcpu;
        let failed = |what| move |source| VcpuStateError { what, vcpu, source };
        fd.set_sregs(sregs).map_err(failed("system registers"))?;
        fd.set_regs(regs).map_err(failed("registers"))
    }

    fn mp_state(&self) -> kvm_mp_state {
        let mp_state = if self.vcpu == 0 {
            KVM_MP_STATE_RUNNABLE
        } else {
            KVM_MP_STATE_UNINITIALIZED
        };
        kvm_mp_state { mp_state }
    }

    /// Writes back what the guest changed, and only that: KVM lists read-only MSRs as well.
    fn restore_msrs(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        for wanted in &self.msrs {
            if read_msr(fd, wanted.index)? != Some(wanted.data) {
                set_msr(fd, wanted.index, wanted.data)?;
            }
        }
        Ok(())
    }
}

/// Makes KVM write the offset of the guest's time stamp counter to the hardware once more.
///
/// On AMD's processors KVM clears the vCPU's control block when the guest shuts down by a triple
/// fault, and the offset does not come back (`shutdown_interception` in arch/x86/kvm/svm/svm.c):
/// the guest then reads the host's counter on that CPU, while KVM goes on counting the deadlines
/// of its timer by the guest's.
fn rewrite_tsc_offset(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    match tsc_offset(fd) {
        Ok(offset) => set_tsc_offset(fd, offset),
        // Linux before 5.16, where nothing else brings the offset back.
        Err(error) if error.errno() == libc::ENXIO => {
            log::warn!(
                "this kernel cannot set the TSC offset: after a reset by a triple fault the guest's clock may be off"
            );
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn offset_attribute(offset: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(offset).expose_provenance() as u64,
    }
}

/// What the guest's time stamp counter is ahead of the host's, modulo 2^64.
///
/// # Errors
///
/// KVM's error; `ENXIO` before Linux 5.16.
pub(crate) fn tsc_offset(fd: &VcpuFd) -> Result<u64, kvm_ioctls::Error> {
    let mut offset = 0_u64;
    let attribute = offset_attribute(&mut offset);
    // SAFETY: KVM writes the eight bytes of this attribute to `addr`, which points to `offset`,
    // alive and not otherwise borrowed.
    if unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) } != 0 {
        return Err(kvm_ioctls::Error::last());
    }
    Ok(offset)
}

/// Sets what [`tsc_offset`] gives.
///
/// # Errors
///
/// KVM's error.
pub(crate) fn set_tsc_offset(fd: &VcpuFd, mut offset: u64) -> Result<(), kvm_ioctls::Error> {
    let attribute = offset_attribute(&mut offset);
    // SAFETY: KVM reads the eight bytes of this attribute from `addr`, which points to `offset`,
    // alive.
    if unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) } != 0 {
        return Err(kvm_ioctls::Error::last());
    }
    Ok(())
}

fn read_msrs(kvm: &Kvm, fd: &VcpuFd) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let list = kvm.get_msr_index_list()?;
    let mut values = Vec::new();
    for &index in list.as_slice() {
        let kept = [MSR_IA32_TSC, MSR_IA32_TSC_ADJUST].contains(&index)
            || SYNTHETIC_MSRS.contains(&index)
            || KVM_MSRS.contains(&index);
        // KVM lists some that a guest with this CPUID does not have.
        if !kept && let Some(data) = read_msr(fd, index)? {
            values.push(kvm_msr_entry {
                index,
                data,
                ..Default::default()
            });
        }
    }
    Ok(values)
}

fn one_msr(index: u32, data: u64) -> Result<Msrs, kvm_ioctls::Error> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

/// One MSR of a vCPU, or none if it has no such.
pub(crate) fn read_msr(fd: &VcpuFd, index: u32) -> Result<Option<u64>, kvm_ioctls::Error> {
    let mut msrs = one_msr(index, 0)?;
    match fd.get_msrs(&mut msrs)? {
        1 => Ok(msrs.as_slice().first().map(|entry| entry.data)),
        _ => Ok(None),
    }
}

/// Sets one MSR of a vCPU.
pub(crate) fn set_msr(fd: &VcpuFd, index: u32, data: u64) -> Result<(), kvm_ioctls::Error> {
    match fd.set_msrs(&one_msr(index, data)?)? {
        1 => Ok(()),
        _ => Err(kvm_ioctls::Error::new(libc::EINVAL)),
    }
}
