//! What the user gets wrong: one line that says what to do, the documented exit status, and nothing
//! left behind.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const BUS: &str = "11223344-1234-4000-8000-000000000001";

/// Files to point the options at.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let files = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        common::kernel(files.dir.path(), &[]);
        fs::write(files.path("text"), "#!/bin/sh\nexit 0\n").unwrap();
        fs::write(files.path("disk"), vec![0; 1 << 20]).unwrap();
        fs::write(files.path("locked"), vec![0; 1 << 20]).unwrap();
        fs::set_permissions(files.path("locked"), Permissions::from_mode(0o444)).unwrap();
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn vmm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpci-vmm"));
    command.args(args).stdin(Stdio::null());
    command
}

/// The one line on standard error, of a run that ended with `status`.
#[track_caller]
fn complaint(output: &Output, status: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{text}");
    assert!(output.stdout.is_empty());
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("vpci-vmm: "), "{text}");
    text
}

/// Runs with the good kernel and `args`, and expects a complaint with all of `words`.
#[track_caller]
fn refuses(files: &Files, args: &[&str], words: &[&str]) {
    let kernel = files.path("kernel");
    let mut all = vec!["run", "--kernel", kernel.to_str().unwrap()];
    all.extend(args);
    let text = complaint(&vmm(&all).output().unwrap(), 2);
    for word in words {
        assert!(text.contains(word), "'{word}' in: {text}");
    }
}

#[track_caller]
fn refuses_kernel(path: &Path, words: &[&str]) {
    let output = vmm(&["run", "--kernel", path.to_str().unwrap()])
        .output()
        .unwrap();
    let text = complaint(&output, 2);
    for word in words.iter().chain(&["--kernel"]) {
        assert!(text.contains(word), "'{word}' in: {text}");
    }
}

#[test]
fn a_kernel_must_be_one() {
    let files = Files::new();
    refuses_kernel(&files.path("text"), &["not a Linux kernel", "vmlinuz"]);
    refuses_kernel(&files.path("none"), &["none", "No such file"]);
    refuses_kernel(files.dir.path(), &["not a regular file"]);
}

#[test]
fn an_initrd_must_exist() {
    refuses(
        &Files::new(),
        &["--initrd", "/none/initrd"],
        &["--initrd /none/initrd", "No such file"],
    );
}

#[test]
fn a_disk_must_exist_and_be_writable_unless_said_otherwise() {
    let files = Files::new();
    refuses(
        &files,
        &["--vpci", "blk,path=/none/disk.img"],
        &["--vpci", "/none/disk.img", "No such file"],
    );
    let spec = format!("blk,path={}", files.path("locked").display());
    refuses(
        &files,
        &["--vpci", &spec],
        &["--vpci", "locked", "readonly=on"],
    );
    refuses(&files, &["--vpci", "blk"], &["path=FILE"]);
}

#[test]
fn a_spec_is_read_strictly() {
    let files = Files::new();
    refuses(
        &files,
        &["--vpci", "nvme,path=x"],
        &["--vpci nvme,path=x", "'nvme'"],
    );
    refuses(&files, &["--vpci", "rng,speed=9"], &["'speed'", "bus, fn"]);
    refuses(
        &files,
        &["--vpci", "rng,bus=1234"],
        &["'1234' for 'bus'", "GUID"],
    );
    let zero = "rng,bus=11223344-0000-4000-8000-000000000001";
    refuses(&files, &["--vpci", zero], &["'bus'", "0001 to 7fff"]);
    refuses(&files, &["--vpci", "rng,fn=9"], &["'9' for 'fn'"]);
}

#[test]
fn functions_need_a_logical_id_each() {
    let files = Files::new();
    let spec = format!("rng,bus={BUS}");
    refuses(
        &files,
        &["--vpci", &spec, "--vpci", &spec],
        &["0x12344000", "fn=N"],
    );
}

#[test]
fn options_have_ranges() {
    let files = Files::new();
    refuses(&files, &["--cpus", "0"], &["--cpus", "1..=254"]);
    refuses(&files, &["--cpus", "many"], &["--cpus"]);
    refuses(&files, &["--memory", "512"], &["--memory", "512M"]);
    refuses(&files, &["--memory", "1M"], &["--memory", "32M"]);
    refuses(&files, &["--turbo"], &["--turbo", "--help"]);
    refuses(&files, &["--hyperv", "magic"], &["--hyperv"]);
    refuses(
        &files,
        &["--cmdline", &"x".repeat(300)],
        &["--cmdline", "300", "255"],
    );
    refuses(
        &files,
        &["--report", "/none/r.json"],
        &["--report /none/r.json"],
    );
}

#[test]
fn no_arguments_and_unknown_commands_are_usage_errors() {
    let none = vmm(&[]).output().unwrap();
    assert_eq!(none.status.code(), Some(2));
    let text = complaint(&vmm(&["jump"]).output().unwrap(), 2);
    assert!(text.contains("'jump'"), "{text}");
    let help = vmm(&["run", "--help"]).output().unwrap();
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("--vpci <SPEC>"));
}

#[test]
fn hypercalls_in_the_kernel_are_refused_where_kvm_has_none_and_what_is_missing_is_named() {
    const NAME: &str =
        "hypercalls_in_the_kernel_are_refused_where_kvm_has_none_and_what_is_missing_is_named";
    match kvm_ioctls::Kvm::new() {
        Ok(kvm) if !kvm.check_extension(kvm_ioctls::Cap::Hyperv) => {}
        Ok(_) => return println!("SKIPPED {NAME}: this KVM has Hyper-V emulation"),
        Err(error) => return println!("SKIPPED {NAME}: /dev/kvm: {error}"),
    }
    let files = Files::new();
    let kernel = files.path("kernel");
    let args = [
        "run",
        "--kernel",
        kernel.to_str().unwrap(),
        "--hyperv",
        "kernel",
    ];
    let text = complaint(&vmm(&args).output().unwrap(), 3);
    let begin = "--hyperv kernel: this host's KVM lacks KVM_CAP_HYPERV, KVM_CAP_HYPERV_SYNIC2";
    assert!(text.contains(begin), "{text}");
    assert!(text.trim_end().ends_with("use auto or user"), "{text}");
    // The suite says the same, and does not fall back.
    for bed in ["auto", "kvm"] {
        let args = ["conformance", "--bed", bed, "--hyperv", "kernel"];
        let text = complaint(&vmm(&args).output().unwrap(), 3);
        assert!(text.contains("lacks KVM_CAP_HYPERV"), "{text}");
    }
}

#[test]
fn a_host_without_kvm_is_told_so() {
    const NAME: &str = "a_host_without_kvm_is_told_so";
    let files = Files::new();
    let kernel = files.path("kernel");
    let run = [
        env!("CARGO_BIN_EXE_vpci-vmm"),
        "run",
        "--kernel",
        kernel.to_str().unwrap(),
    ];
    let output = if Path::new("/dev/kvm").exists() {
        // Hide the device in a mount namespace, which takes privilege.
        let script = "mount -t tmpfs none /dev && exec \"$@\"";
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--mount", "--map-root-user", "sh", "-c", script, "sh"])
            .args(run);
        unshare.stdin(Stdio::null()).output()
    } else {
        Command::new(run[0])
            .args(&run[1..])
            .stdin(Stdio::null())
            .output()
    };
    let Ok(output) = output else {
        println!("SKIPPED {NAME}: no unshare");
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("unshare") || text.contains("mount:") {
        println!("SKIPPED {NAME}: no mount namespace: {text}");
        return;
    }
    let text = complaint(&output, 3);
    assert!(
        text.contains("/dev/kvm") && text.contains("kvm_amd"),
        "{text}"
    );
}
