//! A developer aid: one shell command in L1, next to the guests' kernels and the reference VMM.
#![forbid(unsafe_code)]

use super::Prepared;
use super::devices;
use super::machine::End;
use super::machine::Machine;
use super::machine::Setup;
use super::machine::interruption;
use crate::failure::Failure;
use crate::images;
use crate::images::Init;
use crate::kernel::Role;
use anyhow::Context;
use anyhow::Result;
use guest_images::scenario::L1;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

const INIT: &str = include_str!("init.sh");
const BEGIN: &str = "VPCI-SHELL begin";
const END: &str = "VPCI-SHELL end ";

/// Time that L1 gets to boot and run the command.
const LIMIT: Duration = Duration::from_secs(600);

/// Boots L1, runs `command` by busybox' shell and prints its output; an error unless it ends
/// with status 0.
pub(crate) fn run(
    prepared: &Prepared,
    command: &str,
    files: &[PathBuf],
    emulator: bool,
    l1: &L1,
    scale: f64,
) -> Result<()> {
    let busybox = images::busybox(&prepared.cache)?;
    let init = Init::Script {
        busybox: &busybox,
        script: INIT,
    };
    let kernel = prepared.l1_kernel(l1)?;
    let image = images::pack(&prepared.cache, kernel, Role::Rig, init)?;
    let work = prepared.work_folder("shell")?;
    let share = work.folder.join("share");
    prepared.fill_share(&share)?;
    for file in files {
        let name = file.file_name().context("--file: no file name")?;
        fs::copy(file, share.join(name)).with_context(|| format!("--file {}", file.display()))?;
    }
    if emulator {
        link_tree(prepared.emulator.root(), &share.join("emulator"))?;
    }
    fs::write(share.join("command.sh"), format!("{command}\n"))?;
    let addresses = l1
        .devices
        .iter()
        .map(|device| format!("{}\n", device.address));
    fs::write(share.join("devices"), addresses.collect::<String>())?;
    devices::make_backing_files(&work.folder, &l1.devices, &[])?;
    let interrupted = interruption()?;
    let mut machine = Machine::start(&Setup {
        emulator: &prepared.emulator,
        image: &image,
        cmdline: "console=ttyS0 quiet loglevel=4 panic=-1",
        share: &share,
        logs: &work.folder,
        devices: &l1.devices,
        echo: false,
    })?;
    let limit = LIMIT.mul_f64(scale);
    let mut begun = false;
    let end = machine.watch(limit, &interrupted, |line| {
        let line = line?;
        if let Some((text, status)) = line.split_once(END) {
            if !text.is_empty() {
                println!("{text}");
            }
            return Some(status.trim().to_string());
        }
        if begun {
            println!("{line}");
        }
        if line.ends_with(BEGIN) {
            begun = true;
            eprintln!("L1 is up after {:.1} s", machine.elapsed().as_secs_f64());
        }
        None
    });
    let log = work.folder.join("serial.log");
    let log = log.display();
    let text = match end {
        End::Found(status) if status == "0" => {
            machine.wait(Duration::from_secs(20));
            return Ok(());
        }
        End::Found(status) => format!("the command ended with status {status}"),
        End::Ended => format!("L1 ended before the command did; see {log}"),
        End::Asleep => format!("L1 has fallen asleep; see {log}"),
        End::TimedOut => format!("not done after {} s; see {log}", limit.as_secs()),
        End::Interrupted => "interrupted".into(),
    };
    Err(Failure::Failed(text).into())
}

/// Puts the files below `source` below `destination`, links as they are.
fn link_tree(source: &Path, destination: &Path) -> Result<()> {
    fs::create_dir(destination)?;
    for entry in fs::read_dir(source).with_context(|| source.display().to_string())? {
        let entry = entry?;
        let (from, to) = (entry.path(), destination.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            link_tree(&from, &to)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&from)?, &to)?;
        } else {
            super::link(&from, &to)?;
        }
    }
    Ok(())
}
