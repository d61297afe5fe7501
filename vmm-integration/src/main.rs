//! Reference VMM: boots Linux guests whose PCI devices sit on a Hyper-V vPCI bus.
//!
//! [`embed`] is the guide for embedding the library: every call into it is there. The rest is a
//! plain KVM machine without PCI, PIT and RTC.

mod acpi;
mod api;
mod cli;
mod conformance;
mod console;
mod control;
mod counters;
mod ctl;
mod demo;
mod doctor;
mod embed;
mod error;
mod firmware;
mod hostile;
mod image;
mod incarnation;
mod kernel;
mod layout;
mod long_mode;
mod machine;
mod marks;
mod memory;
mod notices;
mod passthrough;
mod pci_config;
mod ports;
mod print;
mod recall;
mod report;
mod rtc;
mod run;
mod signals;
mod size;
mod snapshot;
mod spec;
mod vcpu;
mod vcpu_saved;
mod vcpu_state;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

/// Exit status for a command line that cannot be carried out.
const USAGE: u8 = 2;

/// The guests of the suite do on purpose what the library warns of: unless `RUST_LOG` asks for it,
/// only errors are shown.
fn expect_misbehaviour() {
    if std::env::var_os("RUST_LOG").is_none() {
        log::set_max_level(log::LevelFilter::Error);
    }
}

fn main() -> ExitCode {
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Warn)
        .parse_default_env()
        .format_timestamp(None)
        .init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            // Help or version. Nothing sensible can be done when standard output is closed.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("vpci-vmm: {}", cli::one_line(&error));
            return ExitCode::from(USAGE);
        }
    };
    let args = match cli.command {
        Command::Run(args) => args,
        Command::Demo(args) => {
            expect_misbehaviour();
            return ExitCode::from(demo::demo(&args));
        }
        Command::Conformance(args) => {
            expect_misbehaviour();
            return ExitCode::from(conformance::conformance(&args));
        }
        Command::Hostile(args) => {
            expect_misbehaviour();
            return ExitCode::from(hostile::hostile(&args));
        }
        Command::Ctl(args) => return ExitCode::from(ctl::ctl(&args)),
        Command::Doctor(args) => return ExitCode::from(doctor::doctor(&args)),
    };
    match run::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vpci-vmm: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}
