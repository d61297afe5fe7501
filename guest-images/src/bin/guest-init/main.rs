//! `/init` of both kernels of the rig.
//!
//! One static binary with two roles, chosen on the kernel command line: `vpci.role=guest` runs in
//! the guest under test, exercises its PCI functions and prints one report line; `vpci.role=rig`
//! runs in the host kernel that the rig boots, starts the reference VMM for each run of a scenario
//! and prints one verdict line. Both end by powering the machine off, whatever happens: a panic,
//! an error and a hang each end in a line that says what failed.

#![deny(unsafe_code)]

mod bounded;
mod capacity;
mod disk;
mod dma;
mod edu;
mod guest;
mod hotplug;
mod inspect;
mod interrupts;
mod ioctl;
mod kexec;
mod kmsg;
mod load;
mod map_benchmark;
mod marks;
mod moves;
mod net;
mod packet;
mod passthrough;
mod pci;
mod rebind;
mod rig;
mod rng;
mod saves;
mod system;
mod trace;
mod vfio;
mod vfio_user;
mod vmm;

use anyhow::{Context, bail};
use guest_images::report::FAIL_PREFIX;
use guest_images::scenario::words;
use rustix::system::RebootCommand;
use std::process::ExitCode;
use system::say;

/// How a role wants the machine to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    PowerOff,
    Reset,
    /// Start the kernel that is loaded.
    Kexec,
}

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("guest-init: this is the init of a test guest and runs as process 1 only");
        return ExitCode::from(2);
    }
    std::panic::set_hook(Box::new(|info| say(&format!("{FAIL_PREFIX}{info}"))));
    // A thread of its own, so that a panic in a role still comes back here.
    let end = match std::thread::spawn(run).join() {
        Ok(Ok(end)) => end,
        Ok(Err(error)) => {
            say(&format!("{FAIL_PREFIX}{error:#}"));
            End::PowerOff
        }
        Err(_) => End::PowerOff,
    };
    system::end(match end {
        End::PowerOff => RebootCommand::PowerOff,
        End::Reset => RebootCommand::Restart,
        End::Kexec => RebootCommand::Kexec,
    })
}

fn run() -> anyhow::Result<End> {
    system::mount_base()?;
    system::open_console()?;
    let cmdline = std::fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    match words(&cmdline).get("vpci.role").copied() {
        Some("guest") => guest::run(&cmdline),
        Some("rig") => rig::run(),
        Some(other) => bail!("vpci.role={other}: no such role (guest, rig)"),
        None => bail!("no vpci.role on the kernel command line (guest, rig)"),
    }
}
