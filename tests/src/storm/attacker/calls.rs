//! Hypercalls of a VP that means harm, about interrupts and domains.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::{Attacker, PAGES, TABLES};
use crate::check::Verdict;
use crate::model::kernel::{Retarget, Targets};
use crate::model::pviommu::{self as iommu, bit, code};

impl Attacker {
    pub(super) fn retarget(&mut self) -> Verdict {
        let retarget = Retarget {
            partition: u64::MAX,
            device: self.device(),
            source: 1,
            address: 0xfee0_0000,
            data: self.dice.below(4) as u32,
            vector: self.vector().into(),
            flags: self.dice.below(2) as u32,
            targets: match self.dice.below(4) {
                0 => Targets::Mask(1 + self.dice.below(3)),
                1 => Targets::all(&[0, 1]),
                _ => Targets::one(self.dice.below(2) as u32),
            },
        };
        let (control, input) = retarget.encode();
        self.call(control, &input.0)
    }

    /// Calls about domains.
    pub(super) fn domains(&mut self) -> Verdict {
        let number = 1 + self.dice.below(4) as u32;
        let domain = iommu::first_stage(number);
        let device = self.device();
        let root = self.one_of(TABLES, 4);
        let (control, input) = match self.dice.below(12) {
            0..2 => (code::CREATE, iommu::create_input(number, 0)),
            2..4 => (code::CONFIGURE, iommu::configure_input(number, 1, root)),
            4..6 => (code::ATTACH, iommu::attach_input(domain, device)),
            6 => (code::DETACH, iommu::detach_input(device)),
            7 => (code::DELETE, iommu::delete_input(number)),
            8 => (code::FLUSH, iommu::flush_input(domain)),
            _ => {
                let count = 1 + self.dice.below(8);
                let elements: Vec<u64> = (0..count)
                    .map(|_| iommu::element(self.gpa(), self.dice.below(20)))
                    .collect();
                let input = iommu::flush_list_input(domain, &elements);
                (code::FLUSH_LIST | count << 32, input)
            }
        };
        self.call(control, &input.0)
    }

    /// Changes an entry of a table.
    pub(super) fn table(&mut self) -> Verdict {
        let table = self.one_of(TABLES, 8);
        let index = match self.dice.once_in(2) {
            true => self.dice.below(2),
            false => (self.arena >> 12) % 512 + self.dice.below(PAGES),
        };
        let entry = match self.dice.below(8) {
            0 => 0,
            1 => self.gpa() & !0xfff | self.dice.below(0x100),
            2..5 => self.one_of(TABLES, 8) | bit::TABLE,
            _ => self.gpa() & !0xfff | bit::PAGE,
        };
        let at = table + index % 512 * 8;
        Ok(self.vm.ram().store_u64(at, entry, Ordering::SeqCst)?)
    }

    /// Any control word over whatever the input page holds.
    pub(super) fn any_call(&mut self) -> Verdict {
        let known = [0x5c, 0x5d, 0x7e, 0xb1, 0xb2, 0xc4, 0xc5, 0xce, 0xd0, 0xd1];
        let bits = self.dice.roll() & 0x0fff_0fff_03ff_0000;
        let control = match self.dice.once_in(4) {
            true => self.dice.roll(),
            false => self.dice.pick(&known) | bits & self.dice.roll() & self.dice.roll(),
        };
        let rdx = match self.dice.once_in(2) {
            true => self.input,
            false => self.gpa(),
        };
        let r8 = self.gpa();
        self.registers(control, rdx, r8)
    }
}
