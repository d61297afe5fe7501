//! `vpci-vmm ctl snapshot` and `run --restore` with a guest of a few instructions, on the KVM of this
//! machine.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use common::*;

const BUS: &str = "11223344-1234-4000-8000-000000000001";
const OTHER: &str = "11223344-0777-4000-8000-000000000002";

/// For each byte from the serial port prints the next letter, six of them from `a` on, then powers
/// off. The letter is counted in a register and in RAM: `?` if they differ, `!` if the time stamp
/// counter went back, `X` if an XMM register changed.
fn letters() -> Vec<u8> {
    #[rustfmt::skip]
    let code = [
        0x0f, 0x20, 0xe0, // mov rax, cr4
        0x0d, 0x00, 0x06, 0x00, 0x00, // or eax, OSFXSR | OSXMMEXCPT
        0x0f, 0x22, 0xe0, // mov cr4, rax
        0xbb, 0x60, 0x00, 0x00, 0x00, // mov ebx, 'a' - 1
        0xc6, 0x04, 0x25, 0x00, 0x00, 0x09, 0x00, 0x60, // mov byte [0x90000], 'a' - 1
        0xc7, 0x04, 0x25, 0x10, 0x00, 0x09, 0x00, 0x34, 0x12, 0x00, 0x00, // mov dword [0x90010], 0x1234
        0x0f, 0x10, 0x2c, 0x25, 0x10, 0x00, 0x09, 0x00, // movups xmm5, [0x90010]
        0xc7, 0x04, 0x25, 0x10, 0x00, 0x09, 0x00, 0x00, 0x00, 0x00, 0x00, // mov dword [0x90010], 0
        0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, // rdtsc; shl rdx, 32; or rax, rdx
        0x48, 0x89, 0xc6, // mov rsi, rax
        // next:
        0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1: data ready
        0x74, 0xfb, // jz back to the in
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, // in al, dx
        0xff, 0xc3, // inc ebx
        0xfe, 0x04, 0x25, 0x00, 0x00, 0x09, 0x00, // inc byte [0x90000]
        0x89, 0xdf, // mov edi, ebx
        0x38, 0x1c, 0x25, 0x00, 0x00, 0x09, 0x00, // cmp [0x90000], bl
        0x74, 0x05, // je over the next
        0xbf, b'?', 0x00, 0x00, 0x00, // mov edi, '?'
        0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, // rdtsc; shl rdx, 32; or rax, rdx
        0x48, 0x39, 0xf0, // cmp rax, rsi
        0x73, 0x05, // jae over the next
        0xbf, b'!', 0x00, 0x00, 0x00, // mov edi, '!'
        0x48, 0x89, 0xc6, // mov rsi, rax
        0x0f, 0x11, 0x2c, 0x25, 0x20, 0x00, 0x09, 0x00, // movups [0x90020], xmm5
        0x81, 0x3c, 0x25, 0x20, 0x00, 0x09, 0x00, 0x34, 0x12, 0x00, 0x00, // cmp dword [0x90020], 0x1234
        0x74, 0x05, // je over the next
        0xbf, b'X', 0x00, 0x00, 0x00, // mov edi, 'X'
        0x89, 0xf8, // mov eax, edi
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0x83, 0xfb, b'f', // cmp ebx, 'f'
        0x75, 0x9d, // jne next
    ];
    [&code[..], &POWER_OFF].concat()
}

/// A VM that is saved and goes on in another process, again and again.
struct Vm {
    run: Run,
    /// All options but `--restore`.
    args: Vec<String>,
    child: Child,
}

impl Vm {
    fn start(test: &str) -> Option<Self> {
        let run = Run::new(test, &letters())?;
        let image = run.dir.path().join("disk");
        fs::write(&image, vec![7; 1 << 16]).unwrap();
        let socket = run.dir.path().join("socket");
        let run = run.with(&[
            "--cpus",
            "2",
            "--vpci",
            &format!("rng,bus={BUS}"),
            "--vpci",
            &format!("blk,path={},bus={BUS},fn=1", image.display()),
            "--vpci",
            &format!("testdev,bus={OTHER}"),
            "--api-socket",
            socket.to_str().unwrap(),
        ]);
        let child = run.start_with(Stdio::piped());
        let args = run.args.clone();
        Some(Self { run, args, child })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.run.dir.path().join(name)
    }

    /// One byte in, one letter out.
    fn letter(&mut self) -> char {
        self.child.stdin.as_mut().unwrap().write_all(b".").unwrap();
        let mut byte = [0];
        let output = self.child.stdout.as_mut().unwrap();
        output.read_exact(&mut byte).unwrap();
        byte[0].into()
    }

    fn ctl(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_vpci-vmm"))
            .args(["ctl", "--socket", self.path("socket").to_str().unwrap()])
            .args(args)
            .output()
            .unwrap()
    }

    fn save(&self, path: &Path) {
        let output = self.ctl(&["snapshot", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    }

    fn quit(&mut self) {
        let output = self.ctl(&["quit"]);
        assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
        assert!(self.child.wait().unwrap().success());
    }

    fn restoring(&self, path: &Path) -> Vec<String> {
        let mut args = self.args.clone();
        args.extend(["--restore".to_owned(), path.to_str().unwrap().to_owned()]);
        args
    }

    /// Starts the saved VM in a new process.
    fn restore(&mut self, path: &Path) {
        self.run.args = self.restoring(path);
        self.child = self.run.start_with(Stdio::piped());
    }

    /// Runs with other options, which must be refused. Gives what it says.
    fn refused(&mut self, path: &Path, change: impl FnOnce(&mut Vec<String>)) -> String {
        self.run.args = self.restoring(path);
        change(&mut self.run.args);
        let output = self.run.start().wait_with_output().unwrap();
        let text = errors(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    }
}

#[test]
fn a_guest_that_is_saved_after_each_step_notices_nothing() {
    let Some(mut vm) = Vm::start("a_guest_that_is_saved_after_each_step_notices_nothing") else {
        return;
    };
    let mut seen = String::new();
    for generation in 0..5 {
        seen.push(vm.letter());
        let path = vm.path(&format!("saved-{generation}"));
        vm.save(&path);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        vm.quit();
        vm.restore(&path);
    }
    vm.child.stdin.as_mut().unwrap().write_all(b".").unwrap();
    let (output, report) = vm.run.finish(vm.child);
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    seen.push_str(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(seen, "abcdef");
    assert_eq!(report["end"], "poweroff");
}

#[test]
fn a_saved_vm_can_go_on_where_it_is_and_start_twice_from_one_file() {
    let Some(mut vm) = Vm::start("a_saved_vm_can_go_on_where_it_is_and_start_twice_from_one_file")
    else {
        return;
    };
    assert_eq!(vm.letter(), 'a');
    let path = vm.path("saved");
    vm.save(&path);
    let list = vm.ctl(&["--json", "list"]);
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(list["result"]["state"], "paused");
    // Not over a file that is there.
    let again = vm.ctl(&["snapshot", path.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(1));
    assert!(errors(&again).contains("exists"), "{}", errors(&again));
    assert_eq!(vm.ctl(&["resume"]).status.code(), Some(0));
    assert_eq!(vm.letter(), 'b');
    // It cannot be written: the VM goes on as if nobody had asked.
    let nowhere = vm.ctl(&["snapshot", "/nonexistent/file"]);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(errors(&nowhere).contains("/nonexistent/file"));
    assert_eq!(vm.letter(), 'c');
    vm.quit();
    for _ in 0..2 {
        vm.restore(&path);
        assert_eq!(vm.letter(), 'b');
        vm.quit();
    }
}

#[test]
fn a_snapshot_that_does_not_fit_is_refused_with_the_reason() {
    let Some(mut vm) = Vm::start("a_snapshot_that_does_not_fit_is_refused_with_the_reason") else {
        return;
    };
    vm.letter();
    let path = vm.path("saved");
    vm.save(&path);
    vm.quit();
    let position = |args: &[String], word: &str| args.iter().position(|arg| arg == word).unwrap();
    type Change<'a> = Box<dyn FnOnce(&mut Vec<String>) + 'a>;
    let with = |option: &'static str, value: &'static str| -> Change<'_> {
        Box::new(move |args| {
            let at = position(args, option) + 1;
            args[at] = value.into();
        })
    };
    let without_last_function: Change<'_> = Box::new(|args| {
        let at = args.iter().rposition(|arg| arg == "--vpci").unwrap();
        args.drain(at..at + 2);
    });
    let one_more: Change<'_> = Box::new(|args| args.extend(["--vpci", "rng"].map(str::to_owned)));
    let another_kind: Change<'_> = Box::new(|args| {
        let at = args
            .iter()
            .rposition(|arg| arg.starts_with("testdev"))
            .unwrap();
        args[at] = format!("rng,bus={OTHER}");
    });
    let behind_iommu: Change<'_> = Box::new(|args| {
        let at = args.iter().position(|arg| arg.starts_with("rng")).unwrap();
        args[at].push_str(",iommu=on");
    });
    for (change, words) in [
        (with("--cpus", "1"), "2 vCPUs"),
        (with("--memory", "33M"), "32 MiB"),
        (with("--restore", "/nonexistent/file"), "No such file"),
        (with("--restore", "/dev/null"), "no snapshot"),
        (without_last_function, "--vpci testdev,bus="),
        (one_more, "has no function 0"),
        (another_kind, "--vpci testdev,bus="),
        (behind_iommu, "pvIOMMU"),
    ] {
        let text = vm.refused(&path, change);
        assert!(
            text.contains("--restore") && text.contains(words),
            "'{words}' in: {text}"
        );
    }
    // Damage anywhere, and the wrong length.
    let good = fs::read(&path).unwrap();
    let damaged = vm.path("damaged");
    let mut bad = Vec::new();
    for at in [0, 9, 13, 17, 25, 40, good.len() / 2, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bad.push(bytes);
    }
    for length in [0, 5, 20, good.len() / 2, good.len() - 1] {
        bad.push(good[..length].to_vec());
    }
    bad.push([&good[..], &[0]].concat());
    for bytes in bad {
        fs::write(&damaged, &bytes).unwrap();
        let name = damaged.to_str().unwrap().to_owned();
        let text = vm.refused(&path, |args| {
            let at = position(args, "--restore") + 1;
            args[at] = name;
        });
        assert!(text.contains("--restore"), "{text}");
    }
}
