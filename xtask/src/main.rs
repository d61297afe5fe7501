//! Developer tasks: guest images, the nested test rig, continuous integration.
//!
//! `cargo xtask` is an alias for this program (see `.cargo/config.toml`).
//!
//! Exit status of every command: 0 when all that was asked for holds, 1 when something was tried
//! and failed, 2 for a wrong command line, 3 when this machine lacks something that the command
//! needs and cannot get by itself.
#![forbid(unsafe_code)]

mod apt;
mod binaries;
mod built_kernel;
mod cache;
mod cargo_tool;
mod ci;
mod command;
mod deb;
mod emulator;
mod failure;
mod fuzz;
mod images;
mod kernel;
mod mutants;
mod rig;
mod workspace;

use clap::Parser;
use clap::Subcommand;
use std::process::ExitCode;

/// Developer tasks of vm-vpci.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run everything that must hold before a change lands.
    Ci(ci::Options),
    /// Fetch the guest kernels from Debian and pack their initramfs archives.
    Images,
    /// Build the kernel with the project's drivers from Debian's source.
    Kernel,
    /// Run test scenarios: guests of the reference VMM on the KVM of an emulated host.
    Rig(rig::Options),
    /// Break the library in one place at a time, and demand that a conformance check notices.
    Mutants(mutants::Options),
    /// Fuzz everything that a guest can write.
    Fuzz(fuzz::Options),
    /// Remove everything from the cache of downloads, kernels and images.
    CleanCache,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.task {
        Task::Ci(options) => ci::run(&options),
        Task::Images => images::run(),
        Task::Kernel => built_kernel::run(),
        Task::Rig(options) => rig::run(&options),
        Task::Mutants(options) => mutants::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::CleanCache => cache::clean(),
    };
    failure::exit_code(result)
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory;
    use clap::Parser;
    use clap::error::ErrorKind;

    #[test]
    fn the_command_line_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_command_line_is_a_usage_error() {
        for arguments in [
            &["xtask", "no-such-task"][..],
            &["xtask", "ci", "--no-such"],
        ] {
            let error = Cli::try_parse_from(arguments).expect_err("must be refused");
            assert_eq!(error.exit_code(), 2, "{error}");
        }
        let error = Cli::try_parse_from(["xtask"]).expect_err("a task is required");
        assert_eq!(
            error.kind(),
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        );
        assert_eq!(error.exit_code(), 2);
    }
}
