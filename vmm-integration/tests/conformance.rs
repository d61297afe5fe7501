//! `vpci-vmm conformance` as a program.

use std::process::{Command, Output, Stdio};

fn conformance(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpci-vmm"));
    command.arg("conformance").args(args).stdin(Stdio::null());
    command.output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_filter_chooses_what_runs_on_sim() {
    let output = conformance(&["--bed", "sim", "--filter", r"^discovery\.cpuid\.vendor$"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = stdout(&output);
    let counts = "sim: 1 checks: 1 passed, 0 failed, 0 skipped";
    assert!(text.starts_with(counts), "{text}");
}

#[test]
fn a_list_has_every_check_and_runs_none() {
    let text = stdout(&conformance(&["--list", "--filter", "hypercall"]));
    assert!(text.contains("hypercall.page.lock\n"), "{text}");
    assert!(!text.contains("passed"), "{text}");
    assert!(!text.contains("discovery.cpuid"), "{text}");
}

#[test]
fn a_filter_without_a_match_is_a_usage_error() {
    let output = conformance(&["--bed", "sim", "--filter", "^no such check$"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty());
}

#[test]
fn every_format_goes_to_a_file_too() {
    let folder = tempfile::tempdir().unwrap();
    for (format, beginning) in [
        ("text", "passed  discovery.cpuid.vendor"),
        ("tap", "TAP version 14\n1..1\nok 1 - discovery.cpuid.vendor"),
        ("junit", "<?xml version=\"1.0\" encoding=\"UTF-8\"?>"),
        ("json", "{\n  \"version\": 1"),
    ] {
        let path = folder.path().join(format);
        let file = path.to_str().unwrap();
        let filter = ["--bed", "sim", "--filter", "cpuid.vendor"];
        let output = conformance(&[&filter[..], &["--format", format, "--output", file]].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        let report = std::fs::read_to_string(&path).unwrap();
        assert!(report.starts_with(beginning), "{format}: {report}");
    }
}

#[test]
fn a_report_that_cannot_be_written_is_a_failure() {
    let output = conformance(&[
        "--bed",
        "sim",
        "--filter",
        "vendor",
        "--output",
        "/nowhere/x",
    ]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn a_hostile_guest_on_sim_does_no_harm_and_its_seed_is_told() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpci-vmm"));
    command.args(["hostile", "--bed", "sim", "--seconds", "1", "--seed", "5"]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = stdout(&output);
    assert!(text.starts_with("hostile guest on sim, seed 5\n"), "{text}");
    assert!(text.contains(" rounds held in "), "{text}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    for args in [
        &["hostile", "--bed", "sim", "--seconds", "1", "--seed", "5"][..],
        &["conformance", "--list"],
        &["doctor"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_vpci-vmm"));
        let output = command
            .args(args)
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .and_then(|child| child.wait_with_output())
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.is_empty(), "{args:?}: {errors}");
        // `doctor` has another status where the host lacks something.
        let passed = output.status.code() == Some(0) || args == ["doctor"];
        assert!(passed, "{args:?}: {output:?}");
    }
}
