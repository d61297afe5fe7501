//! Cargo subcommands that a machine may lack: its own one, or one in the cache.
#![forbid(unsafe_code)]

use crate::cache::Cache;
use crate::cache::Kind;
use crate::command;
use crate::failure::Failure;
use crate::workspace;
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// A subcommand, such as `cargo-mutants`, and the version that is installed where there is none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CargoTool {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
}

impl CargoTool {
    /// The program: that of the machine if it runs with the arguments `check`, else one in the cache,
    /// installed if need be.
    pub(crate) fn program(&self, check: &[&str]) -> Result<PathBuf> {
        let own = PathBuf::from(self.name);
        if command::output(Command::new(&own).args(check)).is_ok() {
            return Ok(own);
        }
        let Self { name, version } = self;
        let entry = Cache::open()?.entry(Kind::Tools, &format!("{name}-{version}"), |folder| {
            eprintln!("this machine has no {name}: installing {version} into the cache");
            let mut install = workspace::cargo();
            install.args(["install", "--locked", "--root"]).arg(folder);
            install.arg(format!("{name}@{version}"));
            install.env_remove("CARGO_TARGET_DIR");
            command::run_on_stderr(&mut install).map_err(|error| {
                let text = format!("{error:#}; `cargo install --locked {name}` would get it");
                Failure::Lacking(text).into()
            })
        })?;
        Ok(entry.join("bin").join(name))
    }
}
