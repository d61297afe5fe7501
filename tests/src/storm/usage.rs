//! What this process holds of the host.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// Counts; none where the host does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Open file descriptors.
    pub descriptors: Option<usize>,
    /// Threads.
    pub threads: Option<usize>,
    /// Bytes of memory in use.
    pub memory: Option<u64>,
}

impl Usage {
    /// As it is now.
    pub fn now() -> Self {
        let entries = |folder| fs::read_dir(folder).ok().map(Iterator::count);
        Self {
            descriptors: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            memory: resident(),
        }
    }

    /// As it is once descriptors and threads are as in `other`, or when patience is at its end. A
    /// loop that waits for workers, for one, lets go of those that are gone when it runs the next time.
    pub(super) fn like(other: &Self, patience: Duration) -> Self {
        let start = Instant::now();
        loop {
            let now = Self::now();
            let same = (now.descriptors, now.threads) == (other.descriptors, other.threads);
            if same || start.elapsed() > patience {
                return now;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.descriptors, self.threads, self.memory) {
            (Some(descriptors), Some(threads), Some(memory)) => write!(
                f,
                "{descriptors} file descriptors, {threads} threads, {} KiB",
                memory / 1024
            ),
            _ => f.write_str("the host does not say what the process holds"),
        }
    }
}
