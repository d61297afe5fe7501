//! `docs/conformance.md` is what the checks say, and every row has a check or a reason.
#![forbid(unsafe_code)]

use std::path::Path;

use vpci_conformance::checks;
use vpci_conformance::rows::Table;

#[test]
fn every_row_of_the_spec_has_a_check_or_a_reason() {
    let problems = Table::new(checks::all()).problems();
    let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    assert!(problems.is_empty(), "{}", lines.join("\n"));
}

#[test]
fn the_table_in_the_docs_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/conformance.md");
    let wanted = Table::new(checks::all()).markdown(checks::all().count());
    if std::env::var_os("VPCI_UPDATE").is_some() {
        std::fs::write(&path, &wanted).unwrap();
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "docs/conformance.md is stale; VPCI_UPDATE=1 cargo test -p vpci-conformance --test table \
         writes it anew"
    );
}
