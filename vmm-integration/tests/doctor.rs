//! `vpci-vmm doctor` on the machine that the tests run on.

use std::fs::File;
use std::process::{Command, Output, Stdio};

fn doctor(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpci-vmm"));
    command.arg("doctor").args(args).stdin(Stdio::null());
    command.output().unwrap()
}

#[test]
fn the_exit_status_and_both_forms_agree() {
    let table = doctor(&[]);
    let json = doctor(&["--json"]);
    assert_eq!(table.status, json.status);
    let form: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(form["version"], 1);
    let guests = form["plan"]["guests"].as_bool().unwrap();
    assert_eq!(table.status.code(), Some(if guests { 0 } else { 3 }));
    let text = String::from_utf8(table.stdout).unwrap();
    let verdict = text.lines().last().unwrap();
    assert_eq!(
        verdict == "doctor: guests can run here",
        guests,
        "{verdict}"
    );
    for finding in form["findings"].as_array().unwrap() {
        let name = finding["name"].as_str().unwrap();
        assert!(text.contains(name), "{name}");
    }
}

#[test]
fn on_a_kvm_every_capability_is_listed_with_its_number() {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        let demanded = std::env::var("VPCI_REQUIRE").unwrap_or_default();
        assert!(
            !demanded.split(',').any(|bed| bed == "kvm"),
            "/dev/kvm: {error}"
        );
        println!("SKIPPED on_a_kvm_every_capability_is_listed_with_its_number: {error}");
        return;
    }
    let form: serde_json::Value = serde_json::from_slice(&doctor(&["--json"]).stdout).unwrap();
    assert_eq!(form["kvm"]["api_version"], 12);
    let capabilities = form["kvm"]["capabilities"].as_array().unwrap();
    for (name, number) in [
        ("KVM_CAP_X86_MSR_FILTER", 189),
        ("KVM_CAP_SYNC_REGS", 74),
        ("KVM_CAP_READONLY_MEM", 81),
        ("KVM_CAP_HYPERV", 44),
    ] {
        let entry = capabilities.iter().find(|entry| entry["name"] == name);
        assert_eq!(entry.unwrap()["number"], number, "{name}");
    }
    let satisfied = capabilities
        .iter()
        .filter(|entry| entry["need"] == "required")
        .all(|entry| entry["satisfied"] == true);
    assert_eq!(form["plan"]["bed"] == "kvm", form["kvm"]["usable"] == true);
    assert!(satisfied || form["kvm"]["usable"] == false);
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpci-vmm"));
    command.arg("doctor").stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let status = child.wait().unwrap();
    assert!(matches!(status.code(), Some(0 | 3)), "{status}");
}
