//! Which pages of the guest are tables, and at which places.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::{ShadowConfig, Trouble};
use crate::vmm::TrackedPages;

/// Where a table stands: a domain has one at most for each level and address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) domain: u64,
    pub(super) level: u8,
    pub(super) base: u64,
}

/// Tracked pages with their places.
#[derive(Debug)]
pub(super) struct Pages {
    tracker: Arc<dyn TrackedPages>,
    config: ShadowConfig,
    places: HashMap<u64, Vec<Place>>,
    /// Number of all places.
    count: usize,
    /// Pages that are not tracked yet. One that is idle as well need not be tracked any more.
    fresh: Vec<u64>,
    /// Pages that are tracked, or were to be, and have no place any more.
    idle: BTreeSet<u64>,
}

impl Pages {
    pub(super) fn new(tracker: Arc<dyn TrackedPages>, config: ShadowConfig) -> Self {
        Self {
            tracker,
            config,
            places: HashMap::new(),
            count: 0,
            fresh: Vec::new(),
            idle: BTreeSet::new(),
        }
    }

    /// Places of a page.
    pub(super) fn places(&self, gpa: u64) -> &[Place] {
        self.places.get(&gpa).map_or(&[], Vec::as_slice)
    }

    /// Number of all places.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Number of tracked pages.
    pub(super) fn tracked(&self) -> usize {
        self.places.len() - self.fresh.len()
    }

    /// Number of tracked pages without a place.
    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// True if a page is tracked and has no place.
    pub(super) fn is_idle(&self, gpa: u64) -> bool {
        self.idle.contains(&gpa)
    }

    /// Gives a page a place more. Before it is read, [`commit`](Self::commit) has to track it.
    ///
    /// # Errors
    ///
    /// [`Trouble`]: a limit; nothing has changed.
    pub(super) fn add(&mut self, gpa: u64, place: Place) -> Result<(), Trouble> {
        let ShadowConfig {
            max_pages,
            max_tables,
            max_places,
            ..
        } = self.config;
        if self.count >= max_tables {
            return Err(Trouble::Tables { max: max_tables });
        }
        let full = self.places.len() - self.idle.len() >= max_pages;
        match self.places.get_mut(&gpa) {
            Some(places) if places.len() >= max_places => {
                return Err(Trouble::Places { max: max_places });
            }
            Some(places) if places.is_empty() && full => {
                return Err(Trouble::Pages { max: max_pages });
            }
            Some(places) => {
                places.push(place);
                self.idle.remove(&gpa);
            }
            None if full => {
                return Err(Trouble::Pages { max: max_pages });
            }
            None => {
                self.places.insert(gpa, vec![place]);
                self.fresh.push(gpa);
            }
        }
        self.count += 1;
        Ok(())
    }

    /// Takes a place from a page.
    pub(super) fn remove(&mut self, gpa: u64, place: Place) {
        let Some(places) = self.places.get_mut(&gpa) else {
            return;
        };
        if let Some(index) = places.iter().position(|other| *other == place) {
            places.swap_remove(index);
            self.count -= 1;
            if places.is_empty() {
                self.idle.insert(gpa);
            }
        }
    }

    /// Tracks the pages that are new, if there are any, and lets go of idle ones on the way.
    ///
    /// # Errors
    ///
    /// [`Trouble::Tracking`].
    pub(super) fn commit(&mut self) -> Result<(), Trouble> {
        if self.fresh.is_empty() {
            return Ok(());
        }
        self.change()
    }

    /// Lets go of idle pages.
    pub(super) fn untrack_idle(&mut self) {
        if self.idle.is_empty() {
            return;
        }
        if let Err(error) = self.change() {
            // They trap for nothing until the next time.
            log::error!("former table pages stay read-only: {error}");
        }
    }

    fn change(&mut self) -> Result<(), Trouble> {
        let is_wanted = |gpa: &u64| !self.idle.contains(gpa);
        let mut fresh: Vec<u64> = self.fresh.iter().copied().filter(is_wanted).collect();
        fresh.sort_unstable();
        let idle: Vec<u64> = self.idle.iter().copied().collect();
        // After an error the fresh ones stay so: another domain that finds such a page among the
        // tables has to track it before it is read.
        self.tracker
            .change(&fresh, &idle)
            .map_err(Trouble::Tracking)?;
        self.fresh.clear();
        self.idle.clear();
        for gpa in idle {
            self.places.remove(&gpa);
        }
        Ok(())
    }
}
