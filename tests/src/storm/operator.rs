//! The operator in a storm.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use vm_vpci::pviommu::IommuMode;

use super::dice::Dice;
use crate::check::{Failure, Verdict};
use crate::host::{BusSetup, FunctionSetup};
use crate::model::vm::Vm;

/// Buses that come and go have the numbers up to this.
pub(super) const BUSES: u64 = 4;
/// Longest time between two acts, in milliseconds.
const PAUSE: u64 = 40;

#[derive(Debug)]
pub(super) struct Operator {
    vm: Vm,
    dice: Dice,
}

impl Operator {
    pub(super) fn new(vm: &Vm, seed: u64) -> Self {
        Self {
            vm: vm.clone(),
            dice: Dice::new(seed),
        }
    }

    pub(super) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// One act, which the host may refuse: a bus may be there, or gone.
    pub(super) fn act(&mut self, counts: &[AtomicU64; 4]) -> Verdict {
        let number = 1 + self.dice.below(BUSES) as u16;
        let instance = BusSetup::instance(number);
        let act = match self.dice.below(16) {
            0..7 => 0,
            7..11 => 1,
            11..15 => 2,
            _ => 3,
        };
        let done = match act {
            0 => {
                let bus = self.bus(number);
                self.vm.plug(&bus)
            }
            1 => self.vm.eject(instance).map(drop),
            2 => self.vm.remove(instance),
            _ => self.vm.reset(),
        };
        match done {
            Ok(()) => {
                counts[act].fetch_add(1, Ordering::Relaxed);
            }
            Err(Failure::Host(_)) if act != 3 => {}
            Err(failure) => return Err(failure),
        }
        Ok(())
    }

    fn bus(&mut self, number: u16) -> BusSetup {
        let modes = [
            IommuMode::Off,
            IommuMode::On,
            IommuMode::BlockedUntilAttached,
        ];
        let mode = self.dice.pick(&modes);
        let functions = 0..1 + self.dice.below(2) as u8;
        BusSetup {
            instance: BusSetup::instance(number),
            functions: functions
                .map(|function| FunctionSetup::testdev(function).with_iommu(mode))
                .collect(),
        }
    }

    pub(super) fn pause(&mut self) {
        thread::sleep(Duration::from_millis(self.dice.below(PAUSE)));
    }

    /// Resets the VM and leaves it with the one bus that it had at first.
    pub(super) fn tidy_up(&mut self) -> Verdict {
        for number in 1..=BUSES as u16 {
            // It may be gone.
            let _ = self.vm.remove(BusSetup::instance(number));
        }
        self.vm.reset()?;
        self.vm.settle();
        self.vm.plug(&BusSetup::testdev(1))
    }
}
