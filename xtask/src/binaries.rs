//! Static builds of what runs inside the rig: the init of both kernels, the reference VMM, and the
//! programs for the kernel's mock IOMMU and for devices of the host.
#![forbid(unsafe_code)]

use crate::command;
use crate::workspace;
use anyhow::Result;
use std::path::PathBuf;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Paths of the static binaries.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    /// Init of L1 and L2.
    pub(crate) init: PathBuf,
    /// The reference VMM.
    pub(crate) vmm: PathBuf,
    /// Nested tables on the kernel's mock IOMMU.
    pub(crate) nested_mock: PathBuf,
    /// Devices of the host by VFIO, without a guest.
    pub(crate) vfio_host: PathBuf,
}

/// Builds the static binaries.
///
/// They have a target directory of their own because their flags differ; `--target` keeps the
/// flags away from procedural macros, which cannot be static.
pub(crate) fn build() -> Result<Binaries> {
    eprintln!("building the static binaries");
    let directory = workspace::target().join("static");
    let mut command = workspace::cargo();
    command
        .args(["build", "--release", "--target", TARGET, "--target-dir"])
        .arg(&directory)
        .args([
            "-p",
            "guest-images",
            "-p",
            "vpci-vmm",
            "-p",
            "vpci-nested-mock",
            "-p",
            "vpci-vfio-host",
        ])
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    command::run_on_stderr(&mut command)?;
    let output = directory.join(TARGET).join("release");
    Ok(Binaries {
        init: output.join("guest-init"),
        vmm: output.join("vpci-vmm"),
        nested_mock: output.join("nested-mock"),
        vfio_host: output.join("vfio-host"),
    })
}
