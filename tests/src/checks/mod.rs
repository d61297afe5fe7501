//! All checks, by area. Each area is a file, or a folder, with the slices of its checks in `CHECKS`.
//!
//! To add a check, write a function `fn(&Context) -> Verdict` in the file of its area and name it
//! in a slice of the area, with a sentence that says what holds and the rows of docs/spec that it
//! covers. An area that is new gets a line in [`AREAS`].
#![forbid(unsafe_code)]

use regex::Regex;

use crate::check::Check;

pub mod discovery;
pub mod dma;
pub mod hypercall;
pub mod interrupts;
pub mod journey;
pub mod life;
pub mod pviommu;
pub mod rings;
pub mod synic;
pub mod vmbus;
pub mod vpci;

/// Areas in the order in which they run: from the bottom up.
pub const AREAS: &[&[&[Check]]] = &[
    &discovery::CHECKS,
    &hypercall::CHECKS,
    &synic::CHECKS,
    &vmbus::CHECKS,
    &rings::CHECKS,
    &vpci::CHECKS,
    &interrupts::CHECKS,
    &dma::CHECKS,
    &pviommu::CHECKS,
    &life::CHECKS,
    &journey::CHECKS,
];

/// All checks.
pub fn all() -> impl Iterator<Item = &'static Check> {
    AREAS.iter().copied().flatten().copied().flatten()
}

/// The checks whose name matches `filter`; all without one.
pub fn matching(filter: Option<&Regex>) -> Vec<&'static Check> {
    all()
        .filter(|check| filter.is_none_or(|filter| filter.is_match(check.name)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_check_has_a_name_of_its_own_a_sentence_rows_and_a_bed() {
        let form = Regex::new(r"^[a-z0-9-]+(\.[a-z0-9-]+){1,3}$").unwrap();
        let mut names = BTreeSet::new();
        for check in all() {
            let name = check.name;
            assert!(form.is_match(name), "{name}");
            assert!(names.insert(name), "{name} twice");
            assert!(check.statement.ends_with('.'), "{name}: no sentence");
            assert!(!check.rows.is_empty(), "{name}: no rows");
            assert!(!check.beds.is_empty(), "{name}: no bed");
        }
    }

    #[test]
    fn every_file_here_is_an_area_with_checks() {
        let areas: BTreeSet<_> = all().map(Check::area).collect();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/checks");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(name == "mod" || areas.contains(name), "{name}");
        }
    }
}
