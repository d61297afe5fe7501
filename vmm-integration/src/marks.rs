//! Moments that the guest marks by writing to the mark port.
#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard};

use crate::report::{MAX_MARKS, Mark};

/// The marks of a run, at most [`MAX_MARKS`].
#[derive(Debug, Default)]
pub(crate) struct Marks(Mutex<Vec<Mark>>);

impl Marks {
    /// Notes a mark, unless there are too many already.
    pub(crate) fn add(&self, mark: impl FnOnce() -> Mark) {
        let mut marks = self.lock();
        if marks.len() < MAX_MARKS {
            marks.push(mark());
        }
    }

    /// All marks, in order.
    pub(crate) fn take(&self) -> Vec<Mark> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Mark>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_make_the_report_grow_without_limit() {
        let marks = Marks::default();
        for id in 0..=255 {
            marks.add(|| Mark {
                id,
                functions: Vec::new(),
                exits: 0,
                flushes: 0,
                host_maps: 0,
                host_unmaps: 0,
            });
        }
        marks.add(|| panic!("not even looked at"));
        let marks = marks.take();
        assert_eq!((marks.len(), marks[255].id), (MAX_MARKS, 255));
    }
}
