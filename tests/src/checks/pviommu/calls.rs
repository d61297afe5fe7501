//! Malformed calls: each is refused with its status, and changes nothing.
#![forbid(unsafe_code)]

use super::{IOVA, Mapped, Scene};
use crate::check::{Check, Context, Failure, Verdict, equal, holds};
use crate::model::kernel::status;
use crate::model::pviommu::{
    MOST_ELEMENTS, PROPERTY_PVIOMMU, attach_input, capabilities_input, code, configure_input,
    create_input, delete_input, detach_input, element, first_stage, flush_input, flush_list_input,
    property_input,
};
use crate::model::vm::PAGE;
use crate::model::wire::Bytes;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "pviommu.call.control-word",
        "Reserved bits, a variable header, and wrong rep fields of the control word are refused.",
        &["IO-4-02", "IO-4-14"],
        control_word,
    ),
    Check::new(
        "pviommu.call.alignment",
        "Input and output that are not aligned, cross a page, overlap or are not RAM are refused.",
        &["IO-4-03", "IO-2-03", "IO-4-14"],
        alignment,
    ),
    Check::new(
        "pviommu.call.partition",
        "Each call refuses every partition id but self.",
        &["IO-2-04", "IO-4-05", "IO-4-14"],
        partition,
    ),
    Check::new(
        "pviommu.call.trust-level",
        "A trust level other than 0 is refused; level 0 may be given or not.",
        &["IO-2-05", "IO-4-04", "IO-4-14"],
        trust_level,
    ),
    Check::new(
        "pviommu.call.domain-reserved",
        "Reserved bytes and bits of a DeviceDomain are refused, each by itself.",
        &["IO-2-06", "IO-2-07", "IO-4-04", "IO-4-14"],
        domain_reserved,
    ),
    Check::new(
        "pviommu.call.domain-types",
        "Types that the guest cannot make, or that do not exist, are refused.",
        &["IO-2-07", "IO-4-04", "IO-4-15", "IO-4-16"],
        domain_types,
    ),
    Check::new(
        "pviommu.call.reserved-fields",
        "Reserved flags and fields behind the DeviceDomain are refused, each bit by itself.",
        &[
            "IO-2-09", "IO-2-13", "IO-2-14", "IO-2-15", "IO-2-16", "IO-2-17", "IO-4-04", "IO-4-14",
        ],
        reserved_fields,
    ),
    Check::new(
        "pviommu.call.create-flags",
        "Both flags of CREATE are taken.",
        &["IO-2-09"],
        create_flags,
    ),
    Check::new(
        "pviommu.call.sizes",
        "Each call reads its input and not a byte more: it may end where its page ends.",
        &[
            "IO-2-09", "IO-2-10", "IO-2-11", "IO-2-12", "IO-2-13", "IO-2-14", "IO-2-15",
        ],
        sizes,
    ),
    Check::new(
        "pviommu.call.random",
        "Random input is refused, and leaves a working domain alone.",
        &["IO-4-14", "IO-4-04"],
        random,
    ),
];

/// What the suite sends: a call that would change something if it were executed.
#[derive(Debug)]
struct Sent {
    name: &'static str,
    control: u64,
    input: Bytes,
    /// Begins with a DeviceDomain.
    domain: bool,
}

/// One of each call, which would spoil the domain 1, with the device in it, or make domain 2.
fn each(mapped: &Mapped) -> Vec<Sent> {
    let id = mapped.scene.id;
    let call = |name, control, input, domain| Sent {
        name,
        control,
        input,
        domain,
    };
    let list = code::FLUSH_LIST | 1 << 32;
    let one = first_stage(1);
    vec![
        call("CREATE", code::CREATE, create_input(2, 0), true),
        call(
            "ATTACH",
            code::ATTACH,
            attach_input(first_stage(3), id),
            true,
        ),
        call("DETACH", code::DETACH, detach_input(id), false),
        call("DELETE", code::DELETE, delete_input(3), true),
        call("CONFIGURE", code::CONFIGURE, configure_input(1, 0, 0), true),
        call("FLUSH", code::FLUSH, flush_input(one), true),
        call("FLUSH_LIST", list, flush_list_input(one, &[IOVA]), true),
        call(
            "CAPABILITIES",
            code::CAPABILITIES,
            capabilities_input(),
            false,
        ),
        call(
            "PROPERTY",
            code::PROPERTY,
            property_input(id, PROPERTY_PVIOMMU),
            false,
        ),
    ]
}

/// A mapped page in domain 1, an empty domain 3, and no domain 2.
fn scene(context: &Context) -> Result<Mapped, Failure> {
    let mapped = Mapped::new(context)?;
    mapped.scene.domain(3, 4)?;
    Ok(mapped)
}

fn is_unchanged(mapped: &Mapped) -> Verdict {
    mapped.scene.exists(2, false)?;
    mapped.scene.exists(3, true)?;
    mapped.is_intact()
}

/// Sends a call that must be refused.
fn refused(mapped: &Mapped, what: &str, control: u64, input: &[u8], want: u16) -> Verdict {
    let answer = mapped.scene.iommu.call(control, input)?;
    equal(format!("status of {what}"), answer.status, want)?;
    equal(format!("elements done of {what}"), answer.done, 0)?;
    if !answer.output.is_empty() {
        equal(format!("output of {what}"), answer.output, vec![0xee; 40])?;
    }
    Ok(())
}

fn control_word(context: &Context) -> Verdict {
    let mapped = scene(context)?;
    for sent in each(&mapped) {
        let rep = sent.control >> 32 != 0;
        // Variable header; reserved bits; nested; more reserved bits.
        let mut bad: Vec<u64> = [17, 26, 27, 30, 44, 47, 60, 63]
            .map(|bit| sent.control | 1 << bit)
            .to_vec();
        if rep {
            let code = sent.control & 0xffff;
            // Count 0; start at and past the count.
            bad.extend([code, code | 1 << 32 | 1 << 48, code | 1 << 32 | 2 << 48]);
        } else {
            bad.extend([sent.control | 1 << 32, sent.control | 1 << 48]);
        }
        for control in bad {
            let what = format!("{} with control word {control:#x}", sent.name);
            let want = status::INVALID_HYPERCALL_INPUT;
            let answer = mapped.scene.iommu.call(control, &sent.input.0)?;
            equal(format!("status of {what}"), answer.status, want)?;
            equal(format!("output of {what}"), answer.output, vec![0xee; 40])?;
        }
    }
    is_unchanged(&mapped)
}

fn alignment(context: &Context) -> Verdict {
    let mapped = scene(context)?;
    let kernel = mapped.scene.iommu.kernel();
    let vm = mapped.scene.vm();
    let (pages, other) = (vm.pages(2)?, vm.pages(2)?);
    for sent in each(&mapped) {
        let len = sent.input.0.len() as u64;
        let crossing = (PAGE - len).next_multiple_of(8) + 8;
        let refused = |what: &str, input: u64, output: u64| -> Verdict {
            let returned = kernel.call(0, sent.control, input, output)?;
            let what = format!("{} with {what}", sent.name);
            equal(what, returned.rax as u16, status::INVALID_ALIGNMENT)
        };
        for offset in [1, 2, 4, 7, crossing] {
            vm.write(pages + offset, &sent.input.0)?;
            refused(&format!("input at {offset:#x}"), pages + offset, other)?;
        }
        refused("input outside RAM", 0xf000_0000, other)?;
        refused("input behind everything", u64::MAX - 7, other)?;
        if !["CAPABILITIES", "PROPERTY"].contains(&sent.name) {
            continue;
        }
        vm.write(pages, &sent.input.0)?;
        for offset in [1, 4, 7, PAGE - 8] {
            refused(&format!("output at {offset:#x}"), pages, other + offset)?;
        }
        refused("output over the input", pages, pages + 8)?;
        refused("output on the input", pages, pages)?;
        refused("output outside RAM", pages, 0xf000_0000)?;
        equal("input", vm.read(pages, len as usize)?, sent.input.0.clone())?;
        let written = vm.read(other, 2 * PAGE as usize)?;
        equal(
            "bytes stored",
            written.iter().filter(|b| **b != 0).count(),
            0,
        )?;
    }
    is_unchanged(&mapped)
}

fn partition(context: &Context) -> Verdict {
    let mapped = scene(context)?;
    for sent in each(&mapped) {
        for partition in [0, 1, u64::MAX - 1, u64::MAX >> 1, 0xffff_ffff] {
            let mut input = sent.input.0.clone();
            input[..8].copy_from_slice(&u64::to_le_bytes(partition));
            let what = format!("{} for partition {partition:#x}", sent.name);
            let want = status::INVALID_PARTITION_ID;
            refused(&mapped, &what, sent.control, &input, want)?;
        }
    }
    is_unchanged(&mapped)
}

/// The same input with a byte replaced.
fn replaced(input: &Bytes, at: usize, byte: u8) -> Vec<u8> {
    let mut input = input.0.clone();
    input[at] = byte;
    input
}

fn trust_level(context: &Context) -> Verdict {
    let mapped = scene(context)?;
    for sent in each(&mapped).iter().filter(|sent| sent.domain) {
        for level in [1, 2, 15, 0x11, 0x1f, 0x20, 0x40, 0x80, 0xf0] {
            let input = replaced(&sent.input, 8, level);
            let what = format!("{} for trust level byte {level:#x}", sent.name);
            let want = status::INVALID_PARAMETER;
            refused(&mapped, &what, sent.control, &input, want)?;
        }
    }
    is_unchanged(&mapped)?;
    let input = replaced(&create_input(2, 0), 8, 0x10);
    let made = mapped.scene.iommu.call(code::CREATE, &input)?;
    equal("status of CREATE for level 0", made.status, 0)?;
    mapped.scene.exists(2, true)
}

fn domain_reserved(context: &Context) -> Verdict {
    let mapped = scene(context)?;
    for sent in each(&mapped).iter().filter(|sent| sent.domain) {
        let bytes = (9..16).map(|at| (at, 1 << (at % 8)));
        let bits = (4..32).map(|bit| (16 + bit / 8, 1 << (bit % 8)));
        for (at, bit) in bytes.chain(bits) {
            let input = replaced(&sent.input, at, sent.input.0[at] | bit);
            let what = format!("{} with bit {bit:#x} of byte {at}", sent.name);
            let want = status::INVALID_PARAMETER;
            refused(&mapped, &what, sent.control, &input, want)?;
        }
    }
    is_unchanged(&mapped)
}

fn domain_types(context: &Context) -> Verdict {
    let mapped = scene(context)?;
    for sent in each(&mapped).iter().filter(|sent| sent.domain) {
        // S2 with the number of a domain, SOC, and types that do not exist.
        for kind in [0, 2, 3, 7, 9, 15] {
            let input = replaced(&sent.input, 16, kind);
            let what = format!("{} with type {kind}", sent.name);
            let want = status::INVALID_PARAMETER;
            refused(&mapped, &what, sent.control, &input, want)?;
        }
    }
    // The default domain, where a call makes no sense for it.
    for name in ["CREATE", "DELETE", "CONFIGURE"] {
        let calls = each(&mapped);
        for sent in calls.iter().filter(|sent| sent.name == name) {
            let mut input = sent.input.0.clone();
            input[16..24].fill(0);
            let want = status::INVALID_PARAMETER;
            refused(&mapped, name, sent.control, &input, want)?;
        }
    }
    is_unchanged(&mapped)
}

fn reserved_fields(context: &Context) -> Verdict {
    let mapped = scene(context)?;
    let reserved: &[(&str, &[(usize, u64)])] = &[
        ("CREATE", &[(24, !3 & 0xffff_ffff)]),
        ("CONFIGURE", &[(24, !7)]),
        ("FLUSH", &[(24, u64::MAX)]),
        ("FLUSH_LIST", &[(24, !1)]),
        ("CAPABILITIES", &[(8, u64::MAX)]),
        ("PROPERTY", &[(20, 0xffff_ffff)]),
    ];
    for sent in each(&mapped) {
        let found = reserved.iter().filter(|(name, _)| *name == sent.name);
        for (at, bits) in found.flat_map(|(_, fields)| fields.iter()) {
            for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                let at = at + bit / 8;
                let input = replaced(&sent.input, at, sent.input.0[at] | 1 << (bit % 8));
                let what = format!("{} with bit {} of byte {at}", sent.name, bit % 8);
                let want = status::INVALID_PARAMETER;
                refused(&mapped, &what, sent.control, &input, want)?;
            }
        }
    }
    is_unchanged(&mapped)
}

fn create_flags(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    for flags in 0..4 {
        let number = flags + 1;
        let made = scene
            .iommu
            .call(code::CREATE, &create_input(number, flags).0)?;
        equal(format!("status with flags {flags}"), made.status, 0)?;
        scene.exists(number, true)?;
    }
    Ok(())
}

fn sizes(context: &Context) -> Verdict {
    let scene = Scene::new(context)?;
    let (kernel, vm) = (scene.iommu.kernel(), scene.vm());
    let pages = vm.pages(2)?;
    let at_end = |name: &str, control: u64, input: &Bytes| -> Verdict {
        // What follows the page must not matter.
        vm.ram().fill(pages, 2 * PAGE, 0xff)?;
        let at = (PAGE - input.0.len() as u64) & !7;
        vm.write(pages + at, &input.0)?;
        let returned = kernel.call(0, control, pages + at, u64::MAX)?;
        let want = (control >> 32) << 32;
        equal(format!("result of {name}"), returned.rax, want)
    };
    let page = vm.pages(1)?;
    let one = first_stage(1);
    at_end("CREATE", code::CREATE, &create_input(1, 0))?;
    scene.exists(1, true)?;
    at_end("CONFIGURE", code::CONFIGURE, &configure_input(1, 1, page))?;
    at_end("ATTACH", code::ATTACH, &attach_input(one, scene.id))?;
    scene.is_in(1)?;
    at_end("FLUSH", code::FLUSH, &flush_input(one))?;
    for count in [1, 2, MOST_ELEMENTS] {
        let list = flush_list_input(one, &vec![element(IOVA, 0); count]);
        at_end("FLUSH_LIST", code::FLUSH_LIST | (count as u64) << 32, &list)?;
    }
    at_end("DETACH", code::DETACH, &detach_input(scene.id))?;
    scene.is_default()?;
    at_end("DELETE", code::DELETE, &delete_input(1))?;
    scene.exists(1, false)
}

fn random(context: &Context) -> Verdict {
    let mapped = scene(context)?;
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..500 {
        for (code, size) in code::ALL {
            let bytes: Vec<u8> = (0..size).map(|_| next() as u8).collect();
            let mut input = bytes;
            if next() % 2 == 0 {
                input[..8].fill(0xff);
            }
            let count = u64::from(code == code::FLUSH_LIST);
            let answer = mapped.scene.iommu.call(code | count << 32, &input)?;
            let known = [
                status::INVALID_PARAMETER,
                status::INVALID_PARTITION_ID,
                status::UNKNOWN_PROPERTY,
                status::INVALID_DEVICE_ID,
            ];
            let what = format!("call {code:#x} with random input is refused");
            holds(what, known.contains(&answer.status))?;
        }
    }
    is_unchanged(&mapped)
}
