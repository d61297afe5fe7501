//! The state in which a VP of the puppet starts, as KVM's structures.
#![forbid(unsafe_code)]

use kvm_bindings::{kvm_dtable, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};

use crate::image::{GDT_LIMIT, TSS_LIMIT};
use crate::layout::{
    GDT, IDT, KERNEL_CODE, KERNEL_DATA, RFLAGS_FIXED, SPURIOUS_VECTOR, TABLES, TSS_OFFSET,
    TSS_SELECTOR, USER_DATA, vp_block,
};
use crate::stub::Entry;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// IA32_APIC_BASE: x2APIC mode, enabled.
const APIC_BASE_X2APIC: u64 = 3 << 10;
/// Offset of the spurious-interrupt vector register, and its bit for an enabled APIC.
const APIC_SVR: usize = 0xf0;
const SVR_ENABLED: u32 = 1 << 8;

/// System registers of VP `vp`: `reset` with 64-bit mode, the puppet's tables, and the local APIC
/// in x2APIC mode, which the VP's CPUID must have.
pub fn system_registers(reset: &kvm_sregs, vp: u32) -> kvm_sregs {
    let data = |selector: u16| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_: 3,
        present: 1,
        dpl: (selector & 3) as u8,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    // Of CPL 3, so that IRETQ to there need not drop them.
    let user = data(USER_DATA);
    let table = |base, limit| kvm_dtable {
        base,
        limit,
        ..Default::default()
    };
    kvm_sregs {
        cs: kvm_segment {
            type_: 11,
            db: 0,
            l: 1,
            ..data(KERNEL_CODE)
        },
        ds: user,
        es: user,
        fs: user,
        gs: kvm_segment {
            base: vp_block(vp),
            ..user
        },
        ss: data(KERNEL_DATA),
        tr: kvm_segment {
            base: vp_block(vp) + TSS_OFFSET,
            limit: TSS_LIMIT,
            selector: TSS_SELECTOR,
            type_: 11,
            present: 1,
            ..Default::default()
        },
        gdt: table(GDT, GDT_LIMIT),
        idt: table(IDT, 0xfff),
        cr0: CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG,
        cr3: TABLES,
        cr4: CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT,
        efer: EFER_LME | EFER_LMA,
        apic_base: reset.apic_base | APIC_BASE_X2APIC,
        ..*reset
    }
}

/// General registers at the start.
pub fn registers() -> kvm_regs {
    kvm_regs {
        rip: Entry::Start.address(),
        rflags: RFLAGS_FIXED,
        ..Default::default()
    }
}

/// Enables the local APIC, read after the system registers were set.
pub fn enable_local_apic(apic: &mut kvm_lapic_state) {
    let value = SVR_ENABLED | u32::from(SPURIOUS_VECTOR);
    for (register, byte) in apic.regs[APIC_SVR..].iter_mut().zip(value.to_le_bytes()) {
        *register = byte as _;
    }
}
