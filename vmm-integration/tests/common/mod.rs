//! Runs of `vpci-vmm` with guests of a few instructions. Each test takes what it needs of it.
#![allow(dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Power off: 0x34 (SLP_EN, S5) to the sleep control register, then halt.
pub(crate) const POWER_OFF: [u8; 8] = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];
/// Reset: 1 to the reset register, then halt.
pub(crate) const RESET: [u8; 8] = [0x66, 0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4];
/// mov eax, 0xffff0; jmp rax: to the real-mode reset vector.
pub(crate) const RESET_VECTOR: [u8; 7] = [0xb8, 0xf0, 0xff, 0x0f, 0x00, 0xff, 0xe0];
/// Jump to itself.
pub(crate) const SPIN: [u8; 2] = [0xeb, 0xfe];
/// LIDT with an empty table, then UD2: a triple fault.
pub(crate) const TRIPLE_FAULT: [u8; 10] =
    [0x31, 0xc0, 0x50, 0x50, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b];

/// `out dx, al` of one byte.
pub(crate) fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// A stack, which the boot protocol does not provide: mov esp, 0x80000.
pub(crate) fn stack() -> Vec<u8> {
    vec![0xbc, 0x00, 0x00, 0x08, 0x00]
}

/// A bzImage whose 64-bit entry point is `code`.
pub(crate) fn kernel(dir: &Path, code: &[u8]) -> PathBuf {
    let mut image = vec![0xf4; 1024 + 512 + 8192];
    image[..1024].fill(0);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &255u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    put(1024 + 512, code);
    let path = dir.join("kernel");
    fs::write(&path, image).unwrap();
    path
}

/// Waits for a byte from the serial port and sends it back.
pub(crate) fn echo() -> Vec<u8> {
    vec![
        0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1: data ready
        0x74, 0xfb, // jz back to the in
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, // in al, dx
        0xee, // out dx, al
    ]
}

/// A run of a guest, with its directory.
pub(crate) struct Run {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) args: Vec<String>,
}

impl Run {
    /// Nothing, after saying so, where there is no KVM; a failure where one is demanded.
    pub(crate) fn new(test: &str, code: &[u8]) -> Option<Self> {
        if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
            let demanded = std::env::var("VPCI_REQUIRE").unwrap_or_default();
            assert!(
                !demanded.split(',').any(|bed| bed == "kvm"),
                "/dev/kvm: {error}"
            );
            println!("SKIPPED {test}: /dev/kvm: {error}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let kernel = kernel(dir.path(), code);
        let args = [
            "run",
            "--kernel",
            kernel.to_str().unwrap(),
            "--memory",
            "32M",
        ];
        let args = args.map(str::to_owned).to_vec();
        Some(Self { dir, args })
    }

    pub(crate) fn with(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    pub(crate) fn report_path(&self) -> PathBuf {
        self.dir.path().join("report.json")
    }

    pub(crate) fn start(&self) -> Child {
        self.start_with(Stdio::null())
    }

    pub(crate) fn start_with(&self, stdin: Stdio) -> Child {
        Command::new(env!("CARGO_BIN_EXE_vpci-vmm"))
            .args(&self.args)
            .arg("--report")
            .arg(self.report_path())
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Waits for the end, at most a minute.
    pub(crate) fn finish(&self, mut child: Child) -> (Output, serde_json::Value) {
        let start = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if start.elapsed() > Duration::from_secs(60) {
                child.kill().unwrap();
                panic!("the run does not end");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let output = child.wait_with_output().unwrap();
        let report = fs::read(self.report_path()).unwrap();
        (output, serde_json::from_slice(&report).unwrap())
    }

    pub(crate) fn to_end(&self) -> (Output, serde_json::Value) {
        self.finish(self.start())
    }
}

pub(crate) fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
