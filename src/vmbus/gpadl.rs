//! GPADLs: lists of guest pages that a guest lends to a channel
//! (docs/spec/vmbus.md#vmbus-4).
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use zerocopy::FromBytes;

use super::Limits;
use crate::hv::vmbus::guest::{GpaRange, GpadlHeader};
use crate::mem::{GuestRam, PAGE_SIZE};

/// A GPADL, complete or under construction. Plain data; part of a saved state.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct GpadlState {
    /// Channel that it belongs to.
    pub relid: u16,
    /// The guest's id for it.
    pub gpadl: u32,
    /// Number of ranges announced.
    pub range_count: u16,
    /// Bytes of ranges announced.
    pub range_len: u16,
    /// Bytes of ranges received; complete when there are `range_len` of them.
    pub data: Vec<u8>,
    /// The guest asked for it back while a ring in it was in use; it is owed GPADL_TORNDOWN.
    pub teardown_pending: bool,
}

/// Why a GPADL was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GpadlError {
    #[error("the id is taken")]
    Duplicate,
    #[error("a limit is reached")]
    Limit,
    #[error("malformed ranges")]
    Malformed,
    #[error("a page is not RAM")]
    NotRam,
}

/// What a message made of a GPADL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    More,
    Complete,
}

/// All GPADLs of a connection.
#[derive(Debug, Default)]
pub(crate) struct Gpadls {
    complete: BTreeMap<(u16, u32), GpadlState>,
    building: BTreeMap<u32, GpadlState>,
    /// Bytes of ranges announced over all of them.
    bytes: usize,
}

impl Gpadls {
    /// GPADL_HEADER.
    pub(crate) fn begin(
        &mut self,
        relid: u16,
        header: &GpadlHeader,
        data: &[u8],
        limits: &Limits,
        ram: &GuestRam,
    ) -> Result<Progress, GpadlError> {
        let GpadlHeader {
            gpadl,
            range_len,
            range_count,
            ..
        } = *header;
        if self.building.contains_key(&gpadl)
            || (self.complete.contains_key(&(relid, gpadl)) && !mutant!("gpadl-id-taken"))
        {
            return Err(GpadlError::Duplicate);
        }
        if range_count == 0 || range_len == 0 || !range_len.is_multiple_of(8) {
            return Err(GpadlError::Malformed);
        }
        let bytes = self.bytes + usize::from(range_len);
        let most = mutant!("gpadl-no-limit", usize::MAX, limits.gpadls);
        if self.complete.len() + self.building.len() >= most
            || bytes > limits.gpadl_bytes
            || self.building.len() >= limits.gpadls_in_progress
        {
            return Err(GpadlError::Limit);
        }
        self.bytes = bytes;
        let list = GpadlState {
            relid,
            gpadl,
            range_count,
            range_len,
            data: Vec::new(),
            teardown_pending: false,
        };
        self.building.insert(gpadl, list);
        match self.append(gpadl, data, ram) {
            Some((_, result)) => result,
            None => Err(GpadlError::Malformed),
        }
    }

    /// GPADL_BODY: appends to the GPADL in progress with this id, and returns its channel with the
    /// result. A GPADL that turns out bad is forgotten.
    pub(crate) fn append(
        &mut self,
        gpadl: u32,
        data: &[u8],
        ram: &GuestRam,
    ) -> Option<(u16, Result<Progress, GpadlError>)> {
        let list = self.building.get_mut(&gpadl)?;
        let relid = list.relid;
        let missing = usize::from(list.range_len) - list.data.len();
        // What lies behind the last range, or is no whole word, is padding: some guests always send
        // the longest message.
        let take = missing.min(data.len() & !7);
        list.data.extend_from_slice(&data[..take]);
        if list.data.len() < usize::from(list.range_len) {
            return Some((relid, Ok(Progress::More)));
        }
        let list = self.building.remove(&gpadl)?;
        if let Err(error) = list.check(ram) {
            self.bytes -= usize::from(list.range_len);
            return Some((relid, Err(error)));
        }
        self.complete.insert((relid, gpadl), list);
        Some((relid, Ok(Progress::Complete)))
    }

    pub(crate) fn get(&self, relid: u16, gpadl: u32) -> Option<&GpadlState> {
        self.complete.get(&(relid, gpadl))
    }

    /// Marks a complete GPADL as owed to the guest. False if there is none, or it is owed already.
    pub(crate) fn mark_teardown(&mut self, relid: u16, gpadl: u32) -> bool {
        match self.complete.get_mut(&(relid, gpadl)) {
            Some(list) => !std::mem::replace(&mut list.teardown_pending, true),
            None => false,
        }
    }

    /// Forgets and returns the GPADLs of a channel that are owed to the guest, but for `in_use`.
    pub(crate) fn take_torn(&mut self, relid: u16, in_use: &[u32]) -> Vec<u32> {
        let torn: Vec<u32> = self
            .of_channel(relid)
            .filter(|list| list.teardown_pending && !in_use.contains(&list.gpadl))
            .map(|list| list.gpadl)
            .collect();
        for gpadl in &torn {
            self.remove(relid, *gpadl);
        }
        torn
    }

    /// Forgets a complete GPADL.
    pub(crate) fn remove(&mut self, relid: u16, gpadl: u32) {
        if let Some(list) = self.complete.remove(&(relid, gpadl)) {
            self.bytes -= usize::from(list.range_len);
        }
    }

    /// Forgets and returns the GPADLs of a channel that are in progress.
    pub(crate) fn take_building(&mut self, relid: u16) -> Vec<u32> {
        let ids = self.building.values().filter(|list| list.relid == relid);
        let ids: Vec<u32> = ids.map(|list| list.gpadl).collect();
        for gpadl in &ids {
            if let Some(list) = self.building.remove(gpadl) {
                self.bytes -= usize::from(list.range_len);
            }
        }
        ids
    }

    /// Forgets everything of a channel.
    pub(crate) fn forget_channel(&mut self, relid: u16) {
        self.take_building(relid);
        let ids: Vec<u32> = self.of_channel(relid).map(|list| list.gpadl).collect();
        for gpadl in ids {
            self.remove(relid, gpadl);
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn save(&self) -> Vec<GpadlState> {
        let all = self.complete.values().chain(self.building.values());
        all.cloned().collect()
    }

    /// Adopts saved GPADLs, or returns `None` if they could not have come about.
    pub(crate) fn restore(saved: Vec<GpadlState>, limits: &Limits, ram: &GuestRam) -> Option<Self> {
        let mut gpadls = Self::default();
        for list in saved {
            let header = GpadlHeader {
                relid: u32::from(list.relid),
                gpadl: list.gpadl,
                range_len: list.range_len,
                range_count: list.range_count,
            };
            let complete = list.data.len() == usize::from(list.range_len);
            if list.data.len() > usize::from(list.range_len)
                || !list.data.len().is_multiple_of(8)
                || (list.teardown_pending && !complete)
            {
                return None;
            }
            gpadls
                .begin(list.relid, &header, &list.data, limits, ram)
                .ok()?;
            if list.teardown_pending {
                gpadls.mark_teardown(list.relid, list.gpadl);
            }
        }
        Some(gpadls)
    }

    fn of_channel(&self, relid: u16) -> impl Iterator<Item = &GpadlState> {
        let range = (relid, 0)..=(relid, u32::MAX);
        self.complete.range(range).map(|(_, list)| list)
    }
}

impl GpadlState {
    /// Checks the ranges of a complete list.
    fn check(&self, ram: &GuestRam) -> Result<(), GpadlError> {
        let mut rest = &self.data[..];
        for _ in 0..self.range_count {
            let (_, pfns, next) = next_range(rest).ok_or(GpadlError::Malformed)?;
            for pfn in words(pfns) {
                let gpa = pfn.checked_mul(PAGE_SIZE).ok_or(GpadlError::NotRam)?;
                if !ram.is_ram(gpa, PAGE_SIZE) && !mutant!("gpadl-outside-ram") {
                    return Err(GpadlError::NotRam);
                }
            }
            rest = next;
        }
        Ok(())
    }

    /// The pages of a GPADL that can hold rings: one range of whole pages.
    pub(crate) fn ring_pages(&self) -> Option<Vec<u64>> {
        if self.range_count != 1 {
            return None;
        }
        let (range, pfns, _) = next_range(&self.data)?;
        let whole = range.byte_offset == 0 && u64::from(range.byte_count).is_multiple_of(PAGE_SIZE);
        whole.then(|| words(pfns).collect())
    }
}

/// Splits off the first range: its head, the bytes of its page numbers, the rest.
fn next_range(data: &[u8]) -> Option<(GpaRange, &[u8], &[u8])> {
    let (range, rest) = GpaRange::read_from_prefix(data).ok()?;
    if range.byte_count == 0 || u64::from(range.byte_offset) >= PAGE_SIZE {
        return None;
    }
    let end = range.byte_offset.checked_add(range.byte_count)?;
    let pages = u64::from(end).div_ceil(PAGE_SIZE) as usize;
    let (pfns, rest) = rest.split_at_checked(pages.checked_mul(8)?)?;
    Some((range, pfns, rest))
}

/// The little-endian 64-bit words of `bytes`.
fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_le_bytes(*word))
}
