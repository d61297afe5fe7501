//! `vpci-vmm demo` as a program.

use std::fs::File;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn demo(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpci-vmm"));
    command.arg("demo").args(args).stdin(Stdio::null());
    command.output().unwrap()
}

fn form(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_step_is_told_and_the_table_says_that_all_held() {
    let json = demo(&["--bed", "sim", "--json"]);
    assert_eq!(json.status.code(), Some(0), "{json:?}");
    let form = form(&json);
    assert_eq!((&form["bed"], &form["held"]), (&"sim".into(), &true.into()));

    let output = demo(&["--bed", "sim"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let steps = form["steps"].as_array().unwrap();
    for step in steps {
        assert_eq!(step["outcome"], "held", "{step}");
        let title = step["title"].as_str().unwrap();
        assert!(text.contains(title), "{title}");
        for fact in step["facts"].as_array().unwrap() {
            let seen = fact["seen"].as_str().unwrap();
            assert!(text.contains(seen), "{seen}");
        }
    }
    let last = format!("demo on sim: {0} of {0} steps held\n", steps.len());
    assert!(text.ends_with(&last), "{text}");
}

#[test]
fn the_steps_are_the_whole_job_in_its_order() {
    let form = form(&demo(&["--bed", "sim", "--json"]));
    let steps = form["steps"].as_array().unwrap();
    let names: Vec<_> = steps.iter().map(|step| step["name"].as_str()).collect();
    let expected = [
        "machine",
        "discovery",
        "hypercall-page",
        "synic",
        "contact",
        "offer",
        "channel",
        "probe",
        "domain",
        "bar",
        "msix",
        "dma",
        "retarget",
        "pviommu",
        "translate",
        "unmap",
        "blocked",
        "removal",
        "id-reuse",
        "unload",
        "reset",
    ];
    assert_eq!(names, expected.map(Some));
    assert!(form.to_string().contains("5ca1:00:00.0"), "{form}");
}

#[test]
fn without_options_it_takes_the_best_bed() {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let output = demo(&["--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let form = form(&output);
    assert_eq!(form["held"], true);
    if kvm.is_err() {
        assert_eq!(form["bed"], "sim");
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains("running on sim instead"), "{told}");
    }
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpci-vmm"));
    command.args(["demo", "--bed", "sim"]).stdin(Stdio::null());
    let status = command.stdout(full).stderr(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}
