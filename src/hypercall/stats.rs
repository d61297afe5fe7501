//! Counters of calls, in a table of fixed size.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use crate::hv::HvStatus;

/// Call codes that are counted one by one; calls above are counted together.
const CODES: usize = 0x200;
/// Statuses that are counted one by one.
const STATUSES: usize = 0x80;

/// Counts of one call code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallCount {
    /// Call code.
    pub code: u16,
    /// Calls that ended with success.
    pub succeeded: u64,
    /// Calls that ended with another status.
    pub failed: u64,
}

/// Counts of a partition's hypercalls.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallCounters {
    /// Known call codes that were called, in ascending order.
    pub calls: Vec<CallCount>,
    /// Failing statuses that were returned, with their count, in ascending order. The last possible
    /// entry, 0x7F, collects all above it.
    pub statuses: Vec<(u16, u64)>,
    /// Calls with a code that is not offered.
    pub unknown_codes: u64,
    /// Calls answered with #UD.
    pub invalid_opcodes: u64,
    /// Times that a rep call was sent back to go on.
    pub restarts: u64,
}

#[derive(Debug, Default)]
struct Slot {
    succeeded: AtomicU64,
    failed: AtomicU64,
}

/// The counters behind [`CallCounters`].
#[derive(Debug)]
pub(super) struct Stats {
    calls: Box<[Slot]>,
    statuses: Box<[AtomicU64]>,
    unknown_codes: AtomicU64,
    invalid_opcodes: AtomicU64,
    restarts: AtomicU64,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            calls: std::iter::repeat_with(Slot::default).take(CODES).collect(),
            statuses: std::iter::repeat_with(AtomicU64::default)
                .take(STATUSES)
                .collect(),
            unknown_codes: AtomicU64::new(0),
            invalid_opcodes: AtomicU64::new(0),
            restarts: AtomicU64::new(0),
        }
    }
}

fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Stats {
    pub(super) fn count(&self, code: u16, status: Result<(), HvStatus>) {
        let slot = self.calls.get(usize::from(code));
        let Err(status) = status else {
            slot.map(|slot| &slot.succeeded).map(bump);
            return;
        };
        bump(&self.statuses[usize::from(status.code()).min(STATUSES - 1)]);
        if status == HvStatus::INVALID_HYPERCALL_CODE {
            bump(&self.unknown_codes);
        } else {
            slot.map(|slot| &slot.failed).map(bump);
        }
    }

    pub(super) fn count_invalid_opcode(&self) {
        bump(&self.invalid_opcodes);
    }

    pub(super) fn count_restart(&self) {
        bump(&self.restarts);
    }

    pub(super) fn snapshot(&self) -> CallCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let calls = (0u16..)
            .zip(self.calls.iter())
            .map(|(code, slot)| CallCount {
                code,
                succeeded: read(&slot.succeeded),
                failed: read(&slot.failed),
            });
        let statuses = (0u16..).zip(self.statuses.iter().map(read));
        CallCounters {
            calls: calls
                .filter(|call| call.succeeded != 0 || call.failed != 0)
                .collect(),
            statuses: statuses.filter(|(_, count)| *count != 0).collect(),
            unknown_codes: read(&self.unknown_codes),
            invalid_opcodes: read(&self.invalid_opcodes),
            restarts: read(&self.restarts),
        }
    }
}
