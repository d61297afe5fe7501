//! What KVM did last, for whoever looks into a guest that reset itself: its trace events are recorded
//! all the time, and the recording ends by itself with the exit that a triple fault is.

use crate::system::{mount_at, say, write_text};
use rustix::mount::MountFlags;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// Where the kernel's tracing is.
const TRACEFS: &str = "/sys/kernel/tracing";
/// Events of KVM that are recorded. Few enough to see back a while.
const EVENTS: [&str; 11] = [
    "kvm_entry",
    "kvm_exit",
    "kvm_inj_exception",
    "kvm_inj_virq",
    "kvm_page_fault",
    "kvm_mmio",
    "kvm_userspace_exit",
    "kvm_apic_ipi",
    "kvm_apic_accept_irq",
    "kvm_emulate_insn",
    "kvm_msr",
];
/// KVM_EXIT_SHUTDOWN (8).
const STOP: &str = "traceoff if reason==8";
/// Bytes of the recording, in KiB, for each CPU.
const BUFFER_KIB: &str = "4096";
/// Events that are shown.
const LINES: usize = 600;

/// Starts to record.
pub(crate) fn start() {
    // Mounted already after the first time.
    let _ = mount_at("tracefs", "tracefs", TRACEFS, MountFlags::empty(), None);
    put("tracing_on", "0");
    put("buffer_size_kb", BUFFER_KIB);
    for event in EVENTS {
        put(&format!("events/kvm/{event}/enable"), "1");
    }
    put("events/kvm/kvm_userspace_exit/trigger", STOP);
    put("trace", "");
    put("tracing_on", "1");
}

/// Ends the recording, and shows its end.
pub(crate) fn show() {
    put("tracing_on", "0");
    let Ok(file) = File::open(Path::new(TRACEFS).join("trace")) else {
        say("vpci: nothing was recorded");
        return;
    };
    let mut last = VecDeque::with_capacity(LINES);
    for line in BufReader::new(file).lines().map_while(Result::ok) {
        if last.len() == LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
    for line in last {
        say(&format!("trace: {}", line.trim()));
    }
}

fn put(file: &str, text: &str) {
    if let Err(error) = write_text(Path::new(TRACEFS).join(file), text) {
        // The trigger is there already after the first time.
        if !file.ends_with("trigger") {
            say(&format!("vpci: no recording: {error:#}"));
        }
    }
}
