//! First-stage domains on hosts whose IOMMU cannot walk the guest's tables.
//!
//! A map of the guest does not leave it, so the pages of its tables are *tracked*: vCPUs cannot write
//! them, and a store comes to [`Shadow::store`]. The new entry is mapped in the host before the store is
//! in RAM, hence before the guest can tell a device of it. What an entry mapped before stays until
//! the guest flushes, which makes the space follow the tables as they are then in RAM.
//!
//! - *Tracked before read.* A page is tracked, then read; a table's children before the entry that
//!   links it is acted on or stored. So no store of a vCPU is missed.
//! - *Places.* A page can be a table at several places of several domains: each has its own level and
//!   address, and counts. A trapped store is acted on at each place of its page to which a walk from
//!   the root still leads.
//! - *Stores past the tracker*, by the VMM and by emulated devices, take effect with the next flush.
//! - *Limits.* Tables, places, mappings and their bytes are bounded ([`ShadowConfig`]), and with them the
//!   work of a store, a flush and an attachment, here and in the host's kernel. A domain that needs
//!   more, or for which the host fails, is emptied and stays so until it is attached anew: its
//!   devices' DMA faults, and nothing else happens.
//!
//! One lock guards everything. It is held while the tracker stops the vCPUs; one that waits for it has
//! left the guest, so it counts as stopped.
#![forbid(unsafe_code)]

mod domain;
mod pages;
mod table;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::domain::{Domain, Follower};
use self::pages::{Pages, Place};
use self::table::{Entry, View, root_of, table_span};
use super::{AddressSpace, PagedBackend, PagedDomain, SpaceError};
use crate::mem::{GuestRam, MemError, PAGE_SIZE, Snapshot};
use crate::pviommu::{BackendError, FlushRange, PageTable};
use crate::vmm::TrackedPages;

/// Bytes that a domain maps at most, if nothing else is said, for each byte of RAM.
const RAM_MULTIPLE: u64 = 4;

/// Idle pages that are let go of at the end of a flush.
const IDLE_BATCH: usize = 32;

/// Limits of a [`Shadow`], per VM unless said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShadowConfig {
    /// Width of the guest's physical addresses, as in
    /// [`IommuConfig`](crate::pviommu::IommuConfig::physical_bits).
    pub physical_bits: u8,
    /// Pages that are tracked.
    pub max_pages: usize,
    /// Places at which tables stand.
    pub max_tables: usize,
    /// Places of one page.
    pub max_places: usize,
    /// Mappings of one domain; the host may allow fewer.
    pub max_mappings: usize,
    /// Bytes that one domain maps at a time; RAM that is mapped twice counts twice. They cost the
    /// host's kernel time and memory, and a few tables that lead to the same large leaves map any
    /// number of them. `None`: four times the guest's RAM, as it is then. A guest such as Linux maps
    /// little of its RAM twice in a domain: buffers that several devices use, and what it has unmapped
    /// and not flushed yet.
    pub max_bytes: Option<u64>,
    /// Tracked pages up to which [`Shadow::with_pages_writable`] makes all of them writable for one
    /// instruction. All vCPUs wait for it, and what it costs grows with the pages.
    pub max_stepped_pages: usize,
}

impl Default for ShadowConfig {
    fn default() -> Self {
        Self {
            physical_bits: 52,
            max_pages: 8192,
            max_tables: 16384,
            max_places: 512,
            max_mappings: 65535,
            max_bytes: None,
            max_stepped_pages: 64,
        }
    }
}

/// Counts since a [`Shadow`] was made, and its present size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShadowCounters {
    /// Stores of vCPUs that came here.
    pub stores: u64,
    /// Of these, compare-exchanges that came too late, and that the guest saw fail.
    pub lost_exchanges: u64,
    /// Ranges flushed; a flush of all addresses is one.
    pub flushes: u64,
    /// Mappings made.
    pub maps: u64,
    /// Calls that unmapped something.
    pub unmaps: u64,
    /// Domains that were blocked, or refused in the first place, because of a limit or a failure.
    pub blocked: u64,
    /// Pages that are tracked now.
    pub tracked_pages: u64,
    /// Places at which tables stand now.
    pub tables: u64,
    /// Mappings of all domains now.
    pub mappings: u64,
}

#[derive(Debug, Default)]
struct Stats {
    stores: AtomicU64,
    lost_exchanges: AtomicU64,
    flushes: AtomicU64,
    maps: AtomicU64,
    unmaps: AtomicU64,
    blocked: AtomicU64,
}

/// Counts, and gives the new count.
fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed) + 1
}

/// Why a domain cannot be carried.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("the guest has more than {max} pages of page tables")]
    Pages { max: usize },
    #[error("the guest's page tables stand at more than {max} places")]
    Tables { max: usize },
    #[error("a page of the guest is a page table at more than {max} places")]
    Places { max: usize },
    #[error("the domain has more than {max} mappings")]
    Mappings { max: usize },
    #[error("the domain maps more than {max} bytes")]
    Bytes { max: u64 },
    #[error(
        "one of more than {max} pages of page tables is stored to in a way that KVM cannot emulate"
    )]
    Step { max: usize },
    #[error("the guest's stack is in its page table at {gpa:#x}")]
    Stack { gpa: u64 },
    #[error("stores to page tables cannot be seen: {0}")]
    Tracking(#[source] io::Error),
    #[error("the host's address space does not take it: {0}")]
    Space(#[source] SpaceError),
}

/// Pages were let go of for good, instead of being made writable for one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LetGo {
    /// False if none were: there was none to let go of yet, or the tracker failed.
    pub writable: bool,
}

/// Makes address spaces follow the guest's page tables by watching these.
pub struct Shadow {
    config: ShadowConfig,
    ram: GuestRam,
    state: Mutex<State>,
    stats: Stats,
}

#[derive(Debug)]
struct State {
    domains: BTreeMap<u64, Domain>,
    next_id: u64,
    pages: Pages,
}

impl fmt::Debug for Shadow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shadow")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Shadow {
    /// For a VM with this RAM.
    pub fn new(config: ShadowConfig, ram: GuestRam, tracker: Arc<dyn TrackedPages>) -> Self {
        Self {
            config,
            ram,
            state: Mutex::new(State {
                domains: BTreeMap::new(),
                next_id: 0,
                pages: Pages::new(tracker, config),
            }),
            stats: Stats::default(),
        }
    }

    /// The RAM that the tables are in.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Carries out a store of a vCPU that was trapped because its page is tracked, or was: when this
    /// returns, the bytes are in RAM, and what they map is mapped.
    ///
    /// # Errors
    ///
    /// [`MemError`]: it is not RAM, or read-only; nothing has happened.
    pub fn store(&self, gpa: u64, data: &[u8]) -> Result<(), MemError> {
        let mut state = self.lock();
        let ram = self.ram.pin();
        ram.check(gpa, data.len() as u64, true)?;
        count(&self.stats.stores);
        self.store_words(&mut state, &ram, gpa, data)
    }

    /// Carries out a compare-exchange of a vCPU of 1, 2, 4 or 8 bytes: stores `new` if RAM holds
    /// `expected`, and gives what RAM holds otherwise. No other trapped store comes in between, which
    /// is not so for the vCPU itself: it read `expected` some time ago
    /// (docs/spec/kvm.md, section 9.3).
    ///
    /// # Errors
    ///
    /// [`MemError`]: it is not RAM, or read-only; nothing has happened. `expected` and `new` are as long
    /// as the access, at most 8 bytes.
    pub fn compare_exchange(
        &self,
        gpa: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<Result<(), [u8; 8]>, MemError> {
        let mut state = self.lock();
        let ram = self.ram.pin();
        let len = expected.len().min(8);
        ram.check(gpa, len as u64, true)?;
        count(&self.stats.stores);
        let mut current = [0; 8];
        ram.read(gpa, &mut current[..len])?;
        if current[..len] != expected[..len] {
            count(&self.stats.lost_exchanges);
            return Ok(Err(current));
        }
        self.store_words(&mut state, &ram, gpa, new)?;
        Ok(Ok(()))
    }

    /// Calls `f`, which lets one vCPU store to tracked pages while no other runs, then follows all
    /// tables anew. For stores that KVM cannot report. `again` says that the last attempt for this vCPU
    /// came to nothing and that it is where it was.
    ///
    /// # Errors
    ///
    /// [`LetGo`] if more than [`max_stepped_pages`](ShadowConfig::max_stepped_pages) pages are tracked: `f`
    /// is not called, and the vCPU may try again by itself. Pages that are tables no more have been let
    /// go of: guests use these for anything. If there were none, somebody else may have let go of the one
    /// that the vCPU wants, so that it has to try once more. If it is there `again`, it is a table that it
    /// stores to, as only a guest that attacks does: all domains have been blocked, until they are attached
    /// or configured anew, and their pages let go of.
    pub fn with_pages_writable<T>(&self, again: bool, f: impl FnOnce() -> T) -> Result<T, LetGo> {
        let mut state = self.lock();
        if state.pages.tracked() > self.config.max_stepped_pages {
            return Err(self.let_go(again, &mut state));
        }
        let result = f();
        let ids: Vec<u64> = state.domains.keys().copied().collect();
        for id in ids {
            self.reconcile(&mut state, id, None);
        }
        Ok(result)
    }

    /// Lets go of pages that are tables no more; if there are none `again`, of all, whose domains are
    /// blocked.
    fn let_go(&self, again: bool, state: &mut State) -> LetGo {
        let State { domains, pages, .. } = state;
        if pages.idle() == 0 {
            if !again {
                return LetGo { writable: false };
            }
            let max = self.config.max_stepped_pages;
            let ram = self.ram.pin();
            let mut view = View::new(&ram, self.config.physical_bits);
            for (id, domain) in domains.iter_mut().filter(|(_, domain)| !domain.blocked) {
                let mut follower = self.follower(*id, domain, pages, &mut view);
                follower.block(&Trouble::Step { max });
            }
        }
        pages.untrack_idle();
        LetGo {
            writable: pages.idle() == 0,
        }
    }

    /// Makes a page writable for good that is tracked and to which a vCPU makes a store that KVM neither
    /// reports nor lets it execute: domains in which it is a table are blocked, until they are attached
    /// or configured anew. False if it is not tracked, or the tracker fails.
    pub fn give_up(&self, gpa: u64) -> bool {
        let mut state = self.lock();
        let state = &mut *state;
        let page = gpa & !(PAGE_SIZE - 1);
        let ram = self.ram.pin();
        let mut view = View::new(&ram, self.config.physical_bits);
        for place in state.pages.places(page).to_vec() {
            let Some(domain) = state.domains.get_mut(&place.domain) else {
                continue;
            };
            if !domain.blocked {
                let pages = &mut state.pages;
                let mut follower = self.follower(place.domain, domain, pages, &mut view);
                follower.block(&Trouble::Stack { gpa: page });
            }
        }
        let was_tracked = state.pages.is_idle(page);
        state.pages.untrack_idle();
        was_tracked && !state.pages.is_idle(page)
    }

    /// True if the vCPUs' stores to a page come here, or may do so.
    pub fn is_tracked(&self, gpa: u64) -> bool {
        let state = self.lock();
        let page = gpa & !(PAGE_SIZE - 1);
        !state.pages.places(page).is_empty() || state.pages.is_idle(page)
    }

    /// Counts.
    pub fn counters(&self) -> ShadowCounters {
        let state = self.lock();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mappings = state.domains.values().map(Domain::mappings);
        ShadowCounters {
            stores: read(&self.stats.stores),
            lost_exchanges: read(&self.stats.lost_exchanges),
            flushes: read(&self.stats.flushes),
            maps: read(&self.stats.maps),
            unmaps: read(&self.stats.unmaps),
            blocked: read(&self.stats.blocked),
            tracked_pages: state.pages.tracked() as u64,
            tables: state.pages.count() as u64,
            mappings: mappings.sum::<usize>() as u64,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores word by word, so that each is acted on as the entry that it becomes.
    fn store_words(
        &self,
        state: &mut State,
        ram: &Snapshot,
        gpa: u64,
        mut data: &[u8],
    ) -> Result<(), MemError> {
        let mut at = gpa;
        while !data.is_empty() {
            let word = at & !7;
            let offset = (at - word) as usize;
            let (bytes, rest) = data.split_at(data.len().min(8 - offset));
            self.store_word(state, ram, word, offset, bytes)?;
            at += bytes.len() as u64;
            data = rest;
        }
        Ok(())
    }

    fn store_word(
        &self,
        state: &mut State,
        ram: &Snapshot,
        word: u64,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), MemError> {
        let page = word & !(PAGE_SIZE - 1);
        let places = state.pages.places(page).to_vec();
        if places.is_empty() {
            if state.pages.is_idle(page) {
                state.pages.untrack_idle();
            }
            return ram.write(word + offset as u64, bytes);
        }
        let memory = ram.u64(word)?.writable()?;
        let mut value = memory.load(Ordering::Acquire).to_le_bytes();
        value[offset..offset + bytes.len()].copy_from_slice(bytes);
        let merged = u64::from_le_bytes(value);
        let mut view = View::new(ram, self.config.physical_bits);
        view.pending = Some((word, merged));
        for place in places {
            self.store_at(state, &mut view, &place, word, page);
        }
        let value = view.pending.map_or(merged, |(_, value)| value);
        if bytes.len() == 8 {
            memory.store(value, Ordering::Release);
        } else {
            // The other bytes may be somebody else's, who stores past the tracker.
            ram.write(word + offset as u64, bytes)?;
            let (order, failed) = (Ordering::AcqRel, Ordering::Relaxed);
            let _ = memory.compare_exchange(merged, value, order, failed);
        }
        if state.pages.is_idle(page) {
            state.pages.untrack_idle();
        }
        Ok(())
    }

    /// Acts on the pending store as an entry of the table at `place`.
    fn store_at(
        &self,
        state: &mut State,
        view: &mut View<'_>,
        place: &Place,
        word: u64,
        page: u64,
    ) {
        let (id, level, base) = (place.domain, place.level, place.base);
        let Some(domain) = state.domains.get_mut(&id) else {
            return;
        };
        // Another place of the page may have taken this one with it.
        if domain.table_at(level, base) != Some(page) {
            return;
        }
        let found = view.table_at(&domain.table, level, base);
        let mut follower = self.follower(id, domain, &mut state.pages, view);
        let Some(table) = found.filter(|table| table.gpa == page) else {
            follower.forget(level, base);
            return;
        };
        let index = (word - page) / 8;
        let former = follower.view.ram().u64(word);
        let former = former.map_or(0, |word| word.load(Ordering::Acquire));
        let former = follower.view.decode(former, &table, index);
        let entry = follower.view.entry(&table, index);
        let below = base + index * table::entry_span(level);
        let noted = (level > 1).then(|| follower.domain.table_at(level - 1, below));
        let result = match entry {
            Entry::Link(next) => match noted.flatten() == Some(next.gpa) && former == entry {
                true => Ok(()),
                false => follower.install_table(next),
            },
            Entry::Leaf(_) | Entry::Empty => {
                if noted.flatten().is_some() {
                    follower.forget(level - 1, below);
                }
                match entry {
                    Entry::Leaf(leaf) => follower.install(&leaf),
                    _ => Ok(()),
                }
            }
        };
        match result {
            Ok(()) => follower.view.mark_used(&table, index, &entry),
            Err(trouble) => follower.block(&trouble),
        }
    }

    fn follower<'a, 'r>(
        &'a self,
        id: u64,
        domain: &'a mut Domain,
        pages: &'a mut Pages,
        view: &'a mut View<'r>,
    ) -> Follower<'a, 'r> {
        let config = &self.config;
        let of_ram = || view.ram().size().saturating_mul(RAM_MULTIPLE);
        let max_bytes = config.max_bytes.unwrap_or_else(of_ram);
        Follower {
            id,
            domain,
            pages,
            view,
            stats: &self.stats,
            max_tables: config.max_tables,
            max_bytes,
        }
    }

    /// Makes a domain follow its tables as they are now, in some ranges or all over.
    fn reconcile(&self, state: &mut State, id: u64, ranges: Option<&[Range<u64>]>) {
        let Some(domain) = state.domains.get_mut(&id) else {
            return;
        };
        if domain.blocked {
            domain.block_again();
            return;
        }
        let all = 0..table_span(root_of(&domain.table).level);
        let ranges = ranges.unwrap_or(std::slice::from_ref(&all));
        let ram = self.ram.pin();
        let mut view = View::new(&ram, self.config.physical_bits);
        let mut follower = self.follower(id, domain, &mut state.pages, &mut view);
        for range in ranges {
            if let Err(trouble) = follower.reconcile(range.clone()) {
                follower.block(&trouble);
                break;
            }
        }
        if state.pages.idle() >= IDLE_BATCH {
            state.pages.untrack_idle();
        }
    }

    fn forget(&self, id: u64) {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(mut domain) = state.domains.remove(&id) else {
            return;
        };
        let ram = self.ram.pin();
        let mut view = View::new(&ram, self.config.physical_bits);
        let root = root_of(&domain.table);
        self.follower(id, &mut domain, &mut state.pages, &mut view)
            .forget(root.level, root.base);
        state.pages.untrack_idle();
    }
}

/// Pages of flush ranges as addresses below `end`, by address, none touching another.
fn address_ranges(ranges: &[FlushRange], end: u64) -> Vec<Range<u64>> {
    let bytes = |range: &FlushRange| {
        let shift = u32::from(range.shift) + PAGE_SIZE.trailing_zeros();
        let size = 1u64.checked_shl(shift).unwrap_or(u64::MAX);
        let start = range.first.saturating_mul(PAGE_SIZE);
        start.min(end)..start.saturating_add(size).min(end)
    };
    let mut all: Vec<Range<u64>> = ranges.iter().map(bytes).collect();
    all.retain(|range| !range.is_empty());
    all.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in all {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// A [`Shadow`] as the back ends of devices want it.
#[derive(Debug, Clone)]
pub struct ShadowBackend(pub Arc<Shadow>);

impl PagedBackend for ShadowBackend {
    fn follow(
        &self,
        table: PageTable,
        space: Arc<dyn AddressSpace>,
    ) -> Result<Arc<dyn PagedDomain>, BackendError> {
        let shadow = &*self.0;
        let mut state = shadow.lock();
        let state = &mut *state;
        let id = state.next_id;
        state.next_id += 1;
        let mut domain = Domain::new(table, space, shadow.config.max_mappings);
        let ram = shadow.ram.pin();
        let mut view = View::new(&ram, shadow.config.physical_bits);
        let mut follower = shadow.follower(id, &mut domain, &mut state.pages, &mut view);
        let all = 0..table_span(root_of(&table).level);
        if let Err(trouble) = follower.reconcile(all) {
            follower.block(&trouble);
            state.pages.untrack_idle();
            return Err(BackendError(Box::new(trouble)));
        }
        state.domains.insert(id, domain);
        Ok(Arc::new(ShadowDomain {
            shadow: self.0.clone(),
            id,
            end: table_span(root_of(&table).level),
        }))
    }
}

/// A domain that is followed until this is dropped.
#[derive(Debug)]
struct ShadowDomain {
    shadow: Arc<Shadow>,
    id: u64,
    /// Behind the last address that the tables translate.
    end: u64,
}

impl PagedDomain for ShadowDomain {
    fn flush(&self, ranges: &[FlushRange]) {
        let ranges = address_ranges(ranges, self.end);
        self.shadow
            .stats
            .flushes
            .fetch_add(ranges.len() as u64, Ordering::Relaxed);
        if !ranges.is_empty() {
            let mut state = self.shadow.lock();
            self.shadow.reconcile(&mut state, self.id, Some(&ranges));
        }
    }

    fn flush_all(&self) {
        count(&self.shadow.stats.flushes);
        let mut state = self.shadow.lock();
        self.shadow.reconcile(&mut state, self.id, None);
    }

    fn is_blocked(&self) -> bool {
        let state = self.shadow.lock();
        let domain = state.domains.get(&self.id);
        domain.is_none_or(|domain| domain.blocked)
    }
}

impl Drop for ShadowDomain {
    fn drop(&mut self) {
        self.shadow.forget(self.id);
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod tests;
