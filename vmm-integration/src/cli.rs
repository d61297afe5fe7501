//! The command line.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use regex::Regex;
use uuid::Uuid;

use crate::api::{EJECT_TIMEOUT_S, MAX_EJECT_TIMEOUT_S};
use crate::size::parse_memory;

/// Most virtual CPUs: the 8-bit APIC ids without the broadcast id.
pub(crate) const MAX_CPUS: i64 = 254;

const VPCI_HELP: &str = "A PCI function, repeatable: blk,path=FILE[,readonly=on][,queues=N] | rng \
     | testdev | vfio,host=DDDD:BB:DD.F[,dma=auto|nested|shadow], a device of this host that is bound \
     to vfio-pci; each with [,bus=GUID][,fn=N][,iommu=on]";

/// Reference VMM of vm-vpci: runs Linux guests whose PCI devices sit on Hyper-V vPCI buses.
#[derive(Debug, Parser)]
#[command(name = "vpci-vmm", version, about)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Do the main job once, step by step, and say what each step means.
    ///
    /// Needs no guest kernel. Exit status: 0 every step held, 1 one did not, 2 the command line
    /// asks for something impossible, 3 the bed is missing here.
    Demo(DemoArgs),
    /// Boot a Linux guest, its serial port on the terminal (Ctrl-C ends it).
    ///
    /// Exit status: 0 the guest powered off, 1 the run failed, 2 the command line asks for
    /// something impossible, 3 the host lacks something.
    Run(RunArgs),
    /// Ask something of a VM that runs: plug, eject and remove buses, list, pause, resume,
    /// snapshot, quit.
    ///
    /// The VM must have been started with `run --api-socket PATH`. Exit status: 0 it is done, 1 it was
    /// refused, 2 the command line asks for something impossible, 3 no VM answers at the socket.
    Ctl(CtlArgs),
    /// Say what this host has, what follows from it, and what to do about what is missing.
    ///
    /// Exit status: 0 guests can run here, 3 they cannot.
    Doctor(DoctorArgs),
    /// Check that this host shows its guests what the specifications say.
    ///
    /// Exit status: 0 all checks passed, 1 one failed, 2 the command line asks for something
    /// impossible, 3 the bed is missing here.
    Conformance(ConformanceArgs),
    /// Run a guest that means harm: random but plausible traffic from two VPs while buses come and go.
    ///
    /// The host must neither die, hang, leak nor grow, and serve the guest again after each round.
    /// Exit status: 0 it held, 1 it did not, 2 the command line asks for something impossible, 3 the
    /// bed is missing here.
    Hostile(HostileArgs),
}

/// Options of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Where the guest runs.
    #[arg(long, value_enum, value_name = "BED", default_value_t = BedChoice::Auto)]
    pub(crate) bed: BedChoice,
    /// Print JSON, for programs, instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `conformance`.
#[derive(Debug, Args)]
pub(crate) struct ConformanceArgs {
    /// Where the guest runs.
    #[arg(long, value_enum, value_name = "BED", default_value_t = BedChoice::Auto)]
    pub(crate) bed: BedChoice,
    /// Who answers the guest's Hyper-V hypercalls on the bed `kvm`.
    #[arg(long, value_enum, value_name = "WHO", default_value_t = HypervMode::User)]
    pub(crate) hyperv: HypervMode,
    /// Only the checks whose name matches this regular expression.
    #[arg(long, value_name = "RE")]
    pub(crate) filter: Option<Regex>,
    /// List the checks instead of running them.
    #[arg(long)]
    pub(crate) list: bool,
    /// Form of the report.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = ReportFormat::Text)]
    pub(crate) format: ReportFormat,
    /// Write the report to this file instead of standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

/// Options of `hostile`.
#[derive(Debug, Args)]
pub(crate) struct HostileArgs {
    /// Where the guest runs.
    #[arg(long, value_enum, value_name = "BED", default_value_t = BedChoice::Auto)]
    pub(crate) bed: BedChoice,
    /// Who answers the guest's Hyper-V hypercalls on the bed `kvm`.
    #[arg(long, value_enum, value_name = "WHO", default_value_t = HypervMode::User)]
    pub(crate) hyperv: HypervMode,
    /// How long, to the end of a round.
    #[arg(long, value_name = "N", default_value_t = 60,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) seconds: u32,
    /// Where all chance comes from; another one each time if absent. It is printed.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

/// Where the guest of a conformance run or of the demonstration runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BedChoice {
    /// The best one that there is: `kvm`, else `sim`.
    Auto,
    /// In this process, without any CPU.
    Sim,
    /// On virtual CPUs of KVM.
    Kvm,
}

/// Form of a conformance report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReportFormat {
    /// For people.
    Text,
    /// Test Anything Protocol.
    Tap,
    /// JUnit XML.
    Junit,
    /// JSON.
    Json,
}

/// Options of `doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print JSON, for programs, instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `ctl`.
#[derive(Debug, Args)]
pub(crate) struct CtlArgs {
    /// Socket of the VM: what its `--api-socket` says.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// Print the reply as JSON, for programs.
    #[arg(long)]
    pub(crate) json: bool,
    /// What to ask.
    #[command(subcommand)]
    pub(crate) verb: CtlVerb,
}

/// What `ctl` asks.
#[derive(Debug, Subcommand)]
pub(crate) enum CtlVerb {
    /// List the buses with their functions, ids, interrupts, DMA faults.
    List,
    /// Plug in the functions of one bus; the guest finds it at once.
    ///
    /// Example: vpci-vmm ctl --socket vm.sock plug blk,path=data.img
    Plug {
        /// A function, in the form of `run --vpci`; several must give the same bus=GUID.
        #[arg(value_name = "SPEC", required = true)]
        specs: Vec<String>,
    },
    /// Ask the guest to let go of a bus, and take it away when it has, or when its time is over.
    ///
    /// With --fn one function is asked for and taken away, and the others of the bus stay. Function 0
    /// goes with its bus only.
    Eject {
        /// Instance GUID of the bus, as `list` shows it.
        #[arg(value_name = "BUS")]
        bus: Uuid,
        /// Only this function of it.
        #[arg(long = "fn", value_name = "N", value_parser = clap::value_parser!(u8).range(1..=7))]
        function: Option<u8>,
        /// Do not wait for the guest.
        #[arg(long)]
        no_wait: bool,
        /// Seconds that the guest has.
        #[arg(long, value_name = "SECONDS", default_value_t = EJECT_TIMEOUT_S,
              value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_EJECT_TIMEOUT_S)))]
        timeout: u32,
    },
    /// Take a bus away without asking the guest, as if its device were torn out.
    ///
    /// With --fn one function of it; a Linux guest keeps a driver on it, which reads all ones, until the
    /// bus goes.
    Remove {
        /// Instance GUID of the bus, as `list` shows it.
        #[arg(value_name = "BUS")]
        bus: Uuid,
        /// Only this function of it.
        #[arg(long = "fn", value_name = "N", value_parser = clap::value_parser!(u8).range(1..=7))]
        function: Option<u8>,
        /// Say that you mean it: data that the guest has not written is lost.
        #[arg(long, required = true)]
        surprise: bool,
    },
    /// Stop all vCPUs between two instructions.
    Pause,
    /// Let them run again.
    Resume,
    /// Save the whole VM to a file, for `run --restore`; it stays paused.
    ///
    /// The file must not exist. Disk images are not part of it: quit the VM, or copy them before you
    /// resume it.
    Snapshot {
        /// The file.
        #[arg(value_name = "PATH")]
        path: PathBuf,
    },
    /// End the VM at once, without asking the guest.
    Quit,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Linux kernel (bzImage).
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "console=ttyS0",
        allow_hyphen_values = true
    )]
    pub(crate) cmdline: String,
    /// Number of virtual CPUs, 1 to 254.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=MAX_CPUS))]
    pub(crate) cpus: u8,
    /// Guest RAM, such as 512M or 2G.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory)]
    pub(crate) memory: u64,
    /// Who answers the guest's Hyper-V hypercalls.
    #[arg(long, value_enum, value_name = "WHO", default_value_t = HypervMode::Auto)]
    pub(crate) hyperv: HypervMode,
    /// A PCI function; see [`crate::spec`] for the form.
    #[arg(long = "vpci", value_name = "SPEC", help = VPCI_HELP)]
    pub(crate) vpci: Vec<String>,
    /// Listen for `vpci-vmm ctl` at this path; the socket is for the user alone (mode 0600).
    #[arg(long, value_name = "PATH")]
    pub(crate) api_socket: Option<PathBuf>,
    /// Go on with a VM that `vpci-vmm ctl snapshot` has saved, instead of booting one. Give the other
    /// options as for the saved VM, with all functions that it had at the end.
    #[arg(long, value_name = "PATH")]
    pub(crate) restore: Option<PathBuf>,
    /// Write a JSON report of the run to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
}

/// Who answers the guest's Hyper-V hypercalls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum HypervMode {
    /// Whatever works best on this host.
    Auto,
    /// KVM where it can, this program for the rest.
    Kernel,
    /// This program alone; works on every KVM.
    User,
}

/// A clap error as the one line that scripts and people read first.
pub(crate) fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let line = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    format!("{line} (see vpci-vmm --help)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(args: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(["vpci-vmm"].into_iter().chain(args.split_whitespace()))
    }

    fn refusal(args: &str) -> String {
        one_line(&parse(args).unwrap_err())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_kernel_is_all_that_is_needed() {
        let Command::Run(args) = parse("run --kernel k").unwrap().command else {
            panic!("not run");
        };
        assert_eq!((args.cpus, args.memory), (1, 512 << 20));
        assert_eq!(args.cmdline, "console=ttyS0");
        assert_eq!(args.hyperv, HypervMode::Auto);
        assert!(args.vpci.is_empty());
    }

    #[test]
    fn refusals_are_one_line_that_names_the_option() {
        for (args, expected) in [
            ("run", "--kernel <FILE>"),
            ("run --kernel k --cpus 0", "'--cpus <N>'"),
            ("run --kernel k --cpus 255", "'--cpus <N>'"),
            ("run --kernel k --cpus x", "'--cpus <N>'"),
            ("run --kernel k --memory 512", "'--memory <SIZE>'"),
            ("run --kernel k --hyperv on", "'--hyperv <WHO>'"),
            ("run --kernel k --bogus", "'--bogus'"),
            ("run --kernel k extra", "'extra'"),
            ("doctor --bogus", "'--bogus'"),
            ("demo --bed moon", "'--bed <BED>'"),
            ("conformance --bed moon", "'--bed <BED>'"),
            ("conformance --filter (", "'--filter <RE>'"),
            ("conformance --format xml", "'--format <FORMAT>'"),
            ("hostile --bed moon", "'--bed <BED>'"),
            ("hostile --seconds 0", "'--seconds <N>'"),
            ("hostile --seed x", "'--seed <N>'"),
            ("ctl list", "--socket <PATH>"),
            ("ctl --socket s fly", "'fly'"),
            ("ctl --socket s plug", "<SPEC>"),
            ("ctl --socket s eject x", "'<BUS>'"),
            (
                "ctl --socket s eject 56504349-1234-4000-8000-766d2d767063 --timeout 3601",
                "'--timeout <SECONDS>'",
            ),
            (
                "ctl --socket s eject 56504349-1234-4000-8000-766d2d767063 --fn 0",
                "'--fn <N>'",
            ),
            (
                "ctl --socket s remove 56504349-1234-4000-8000-766d2d767063",
                "--surprise",
            ),
            ("jump", "'jump'"),
        ] {
            let line = refusal(args);
            assert!(line.contains(expected), "{args}: {line}");
            assert!(!line.contains('\n'), "{args}: {line}");
        }
    }
}
