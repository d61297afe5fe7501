//! `vpci-vmm doctor`: what this host has, what will therefore be used, and what to do about what is
//! missing.
#![forbid(unsafe_code)]

mod finding;
mod host;
mod kvm;
mod root;
mod vfio;

#[cfg(test)]
mod tests;

use std::env;
use std::ffi::OsStr;
use std::io;

use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::print::print;
use finding::Finding;
use host::HostFacts;
use kvm::KvmFacts;
use root::Root;
use vfio::VfioFacts;

/// Version of the JSON form. Members may be added to it; a change of their names or meanings
/// makes a new version.
const VERSION: u32 = 1;
/// Exit status of a host on which guests can run.
const CAN_RUN: u8 = 0;
/// Exit status of a host that lacks something that guests need.
const CANNOT_RUN: u8 = 3;

/// Who answers hypercalls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Hypercalls {
    /// This program, as with `--hyperv user`.
    User,
    /// KVM where it can, as with `--hyperv kernel`.
    Kernel,
}

/// Where checks and the demonstration run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Bed {
    /// On vCPUs of this machine's KVM.
    Kvm,
    /// In the process.
    Sim,
}

/// How passed-through devices would reach guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum PassThrough {
    /// The IOMMU walks the guest's own tables.
    Nested,
    /// The host keeps shadows of the guest's tables.
    Shadow,
    /// Not at all.
    None,
}

/// What will be used here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Plan {
    /// Guests can run.
    guests: bool,
    /// Who answers their hypercalls.
    hypercalls: Hypercalls,
    /// KVM could answer some of them itself.
    hybrid_possible: bool,
    /// Where checks run.
    bed: Bed,
    /// What the host allows for passed-through devices.
    pass_through: PassThrough,
    /// A device is bound to VFIO, with its whole group.
    pass_through_ready: bool,
}

impl Plan {
    fn new(kvm: &KvmFacts, vfio: &VfioFacts) -> Self {
        let tracks = kvm.has("KVM_CAP_READONLY_MEM");
        let has_vfio = !vfio.iommus.is_empty() && (vfio.container || vfio.iommufd);
        Self {
            guests: kvm.usable,
            hypercalls: match kvm.hybrid {
                true => Hypercalls::Kernel,
                false => Hypercalls::User,
            },
            hybrid_possible: kvm.hybrid,
            bed: if kvm.usable { Bed::Kvm } else { Bed::Sim },
            pass_through: match (vfio.nests(), has_vfio && tracks) {
                (true, _) => PassThrough::Nested,
                (false, true) => PassThrough::Shadow,
                (false, false) => PassThrough::None,
            },
            pass_through_ready: vfio.has_viable_group(),
        }
    }

    fn text(&self) -> String {
        let guests = if self.guests {
            "run on this machine's KVM"
        } else {
            "cannot run"
        };
        let hypercalls = match self.hypercalls {
            Hypercalls::User => "answered by this program (user)",
            Hypercalls::Kernel => "answered by KVM where it can, by this program else (kernel)",
        };
        let bed = match self.bed {
            Bed::Kvm => "kvm: real CPUs make the guest's accesses",
            Bed::Sim => "sim: checks call the library in the process",
        };
        let pass_through = match self.pass_through {
            PassThrough::Nested => "this host could nest a guest's tables",
            PassThrough::Shadow => "this host could shadow a guest's tables",
            PassThrough::None => "not possible on this host",
        };
        let ready = match (self.pass_through, self.pass_through_ready) {
            (PassThrough::None, _) => "",
            (_, true) => ", and a group is ready",
            (_, false) => ", but no group is ready",
        };
        format!(
            "Used here\n  guests        {guests}\n  hypercalls    {hypercalls}\n  test bed      {bed}\n  \
             devices       emulated ones, which reach guest memory in software\n  \
             pass-through  not in this version; {pass_through}{ready}\n"
        )
    }
}

/// The whole diagnosis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Diagnosis {
    /// [`VERSION`].
    version: u32,
    /// Version of this program.
    program: &'static str,
    /// What will be used.
    plan: Plan,
    /// KVM.
    kvm: KvmFacts,
    /// Passing devices through.
    vfio: VfioFacts,
    /// The machine.
    host: HostFacts,
    /// One entry a line of the table.
    findings: Vec<Finding>,
}

impl Diagnosis {
    /// Looks at the host whose files are below `root` and whose programs are on `path`.
    fn new(root: &Root, path: &OsStr) -> Self {
        let mut findings = Vec::new();
        let kvm = kvm::examine(root, &mut findings);
        let vfio = vfio::examine(root, &mut findings);
        let host = host::examine(root, path, &mut findings);
        Self {
            version: VERSION,
            program: env!("CARGO_PKG_VERSION"),
            plan: Plan::new(&kvm, &vfio),
            kvm,
            vfio,
            host,
            findings,
        }
    }

    fn exit_status(&self) -> u8 {
        if self.plan.guests {
            CAN_RUN
        } else {
            CANNOT_RUN
        }
    }

    fn text(&self) -> String {
        let table = finding::table(&self.findings);
        let plan = self.plan.text();
        let verdict = match &self.kvm.reason {
            None => "doctor: guests can run here".to_owned(),
            Some(reason) => format!("doctor: guests cannot run here: {reason}"),
        };
        format!("{table}{plan}{verdict}\n")
    }

    fn json(&self) -> io::Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(text)
    }
}

/// Prints the diagnosis; returns the exit status.
pub(crate) fn doctor(args: &DoctorArgs) -> u8 {
    let path = env::var_os("PATH").unwrap_or_default();
    let diagnosis = Diagnosis::new(&Root::new("/"), &path);
    let text = if args.json {
        diagnosis.json()
    } else {
        Ok(diagnosis.text())
    };
    match text.and_then(|text| print(&text)) {
        Err(error) => {
            eprintln!("vpci-vmm: the diagnosis cannot be printed: {error}");
            1
        }
        Ok(()) => diagnosis.exit_status(),
    }
}
