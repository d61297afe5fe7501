//! Accesses to MSRs.
#![forbid(unsafe_code)]

use arbitrary::{Arbitrary, Result, Unstructured};

use super::Step;
use crate::guest::Guest;
use crate::machine::VPS;
use crate::values::Gpa;

/// An access to an MSR of the synthetic range. The VMM hands over no others.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum MsrAccess {
    /// RDMSR.
    Read(u8, Msr),
    /// WRMSR.
    Write(u8, Msr, Value),
}

/// Number of an MSR.
#[derive(Debug, Clone, Copy)]
pub struct Msr(u32);

impl<'a> Arbitrary<'a> for Msr {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let known = [
            0x00, 0x01, 0x02, 0x20, 0x21, 0x22, 0x23, 0x73, 0x80, 0x81, 0x82, 0x83, 0x84, 0x90,
            0x91, 0x92, 0x93, 0x9f, 0x118,
        ];
        let number = match u.ratio(1, 8)? {
            true => u32::from(u.arbitrary::<u16>()?) % 0x200,
            false => *u.choose(&known)?,
        };
        Ok(Self(0x4000_0000 + number))
    }
}

/// Value of an MSR.
#[derive(Debug, Clone, Copy)]
pub struct Value(u64);

impl<'a> Arbitrary<'a> for Value {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match u.arbitrary::<u8>()? {
            // A page, with flags.
            0..=127 => u.arbitrary::<Gpa>()?.0 & !0xfff | u64::from(u.arbitrary::<u8>()?) & 7,
            // A vector, with the flags of a SINT.
            128..=191 => {
                let flags = u64::from(u.arbitrary::<u8>()?) & 7;
                u64::from(u.arbitrary::<u8>()?) | flags << 16
            }
            192..=223 => u64::from(u.arbitrary::<u8>()?),
            _ => u.arbitrary()?,
        }))
    }
}

impl Step for MsrAccess {
    fn apply(&self, guest: &mut Guest) {
        let partition = &guest.machine.partition;
        match *self {
            Self::Read(vp, msr) => {
                let _ = partition.read_msr(u32::from(vp) % VPS, msr.0);
            }
            Self::Write(vp, msr, value) => {
                let vp = u32::from(vp) % VPS;
                let before = partition.read_msr(vp, msr.0);
                // The reference time goes on between two looks.
                let clock = msr.0 == 0x4000_0020;
                let effect = partition.write_msr_forwarding(vp, msr.0, value.0, &mut |_, _| {});
                if effect.is_err() && !clock {
                    let after = partition.read_msr(vp, msr.0);
                    assert_eq!(before.ok(), after.ok(), "#GP, and yet changed");
                }
            }
        }
    }
}
