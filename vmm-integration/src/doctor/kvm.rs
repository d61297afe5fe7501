//! `/dev/kvm`: can guests run, and how.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use serde::Serialize;
use vm_vpci::kvm::HostSupport;
use vm_vpci::kvm::hybrid::{HybridError, HybridSupport};
use vm_vpci::kvm::survey::{self, Need};
use vm_vpci::kvm::xsave;

use super::finding::{Finding, Status, Topic};
use super::root::Root;
use crate::error::Error;
use crate::machine;

/// Version of KVM's interface since Linux 2.6.22, and the only one there is.
const API_VERSION: i32 = 12;

/// A capability as KVM reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct CapabilityFact {
    /// Name in `linux/kvm.h`.
    pub(crate) name: &'static str,
    /// Number there.
    pub(crate) number: u32,
    /// Value; 0 where KVM does not know it.
    pub(crate) value: i32,
    /// `required`, `improves`, `tracking` or `hybrid`.
    pub(crate) need: &'static str,
    /// True if the value is enough.
    pub(crate) satisfied: bool,
}

/// What KVM is like here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct KvmFacts {
    /// A VM with a vCPU could be made.
    pub(crate) usable: bool,
    /// Why not.
    pub(crate) reason: Option<String>,
    /// Version of the interface.
    pub(crate) api_version: Option<i32>,
    /// Loaded modules for kinds of CPUs, such as `kvm_amd`.
    pub(crate) modules: Vec<String>,
    /// Most vCPUs of a VM.
    pub(crate) max_vcpus: Option<usize>,
    /// KVM can take part in answering hypercalls, and was tried.
    pub(crate) hybrid: bool,
    /// Every capability that matters.
    pub(crate) capabilities: Vec<CapabilityFact>,
}

impl KvmFacts {
    /// True if capability `name` is there.
    pub(super) fn has(&self, name: &str) -> bool {
        let mut entries = self.capabilities.iter();
        entries.any(|c| c.name == name && c.satisfied)
    }
}

/// Looks at KVM, as far as it can be opened.
pub(super) fn examine(root: &Root, findings: &mut Vec<Finding>) -> KvmFacts {
    let mut facts = KvmFacts {
        modules: modules(root),
        ..KvmFacts::default()
    };
    let kvm = match open(root) {
        Ok(kvm) => kvm,
        Err(error) => {
            findings.push(unusable(error.to_string(), open_advice(root, &error)));
            facts.reason = Some(format!("/dev/kvm: {error}"));
            return facts;
        }
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let found = "not KVM, or one of before 2007";
        findings.push(unusable(
            found.into(),
            "make it the device of the kernel's KVM",
        ));
        facts.reason = Some(format!("/dev/kvm: {found}"));
        return facts;
    }
    facts.api_version = Some(version);
    facts.max_vcpus = Some(kvm.get_max_vcpus());
    let modules = match &facts.modules[..] {
        [] => "built in".to_owned(),
        names => names.join(", "),
    };
    findings.push(
        Finding::new(Topic::Kvm, "/dev/kvm", Status::Ok)
            .found(format!("API version {version}, {modules}"))
            .follows(format!("at most {} vCPUs a VM", kvm.get_max_vcpus())),
    );
    let trial = trial(&kvm);
    findings.push(trial_finding(&trial));
    facts.usable = trial.is_ok();
    facts.reason = trial.err().map(|error| error.to_string());
    if facts.usable {
        findings.push(xsave_finding(&kvm));
        let hybrid = HybridSupport::check(&kvm);
        facts.hybrid = hybrid.is_ok();
        findings.push(hybrid_finding(&hybrid));
    }
    for found in survey::survey(&kvm) {
        findings.push(capability_finding(found));
        facts.capabilities.push(CapabilityFact {
            name: found.capability.name,
            number: found.capability.number,
            value: found.value,
            need: word(found.capability.need),
            satisfied: found.satisfied(),
        });
    }
    facts
}

/// The line about a `/dev/kvm` without which nothing else can be asked.
fn unusable(found: String, advice: &str) -> Finding {
    Finding::new(Topic::Kvm, "/dev/kvm", Status::Missing)
        .found(found)
        .follows("no guest can run")
        .advise(advice)
}

fn modules(root: &Root) -> Vec<String> {
    let mut names = root.names("sys/module");
    names.retain(|name| name.starts_with("kvm_"));
    names
}

fn open(root: &Root) -> io::Result<Kvm> {
    let path = root.path("dev/kvm");
    let path = CString::new(path.as_os_str().as_bytes())?;
    Kvm::new_with_path(path).map_err(io::Error::from)
}

/// What to do where `/dev/kvm` cannot be opened.
fn open_advice(root: &Root, error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "join the group that owns it (kvm), or be root",
        io::ErrorKind::NotFound if root.has_cpu_flag("svm") => "modprobe kvm_amd",
        io::ErrorKind::NotFound if root.has_cpu_flag("vmx") => "modprobe kvm_intel",
        io::ErrorKind::NotFound if root.has_cpu_flag("hypervisor") => {
            "let this VM's own hypervisor nest: give the VM VMX or SVM"
        }
        io::ErrorKind::NotFound => "switch virtualisation on in the firmware, then load kvm",
        _ => "see the kernel's log",
    }
}

/// Makes a VM as `run` does, with its MSR filter and a vCPU.
fn trial(kvm: &Kvm) -> Result<(), Error> {
    HostSupport::check(kvm)?;
    let vm = machine::create_vm(kvm)?;
    vm.create_vcpu(0).map_err(Error::kvm("create a vCPU"))?;
    Ok(())
}

fn trial_finding(trial: &Result<(), Error>) -> Finding {
    let finding = Finding::new(Topic::Kvm, "a VM on trial", Status::Ok);
    match trial {
        Ok(()) => finding
            .found("made")
            .follows("irqchip, MSR filter and a vCPU work together"),
        Err(error) => finding
            .status(Status::Missing)
            .found(error.to_string())
            .follows("no guest can run")
            .advise("use a kernel of version 5.10 or later, and look into its log"),
    }
}

fn xsave_finding(kvm: &Kvm) -> Finding {
    let finding = Finding::new(Topic::Kvm, "XSAVE", Status::Ok);
    let fault = match kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES) {
        Ok(table) => xsave::find_fault(kvm, table.as_slice()).map(|fault| fault.to_string()),
        Err(error) => Some(format!("KVM does not tell its CPUID: {error}")),
    };
    match fault {
        None => finding
            .found("sound")
            .follows("guests get what the CPU has"),
        Some(fault) => finding
            .status(Status::Limited)
            .found(fault)
            .follows("guests get no XSAVE, and so no AVX"),
    }
}

fn hybrid_finding(check: &Result<HybridSupport, HybridError>) -> Finding {
    let finding = Finding::new(Topic::HyperV, "hybrid mode", Status::Ok);
    match check {
        Ok(_) => finding
            .found("passes its probe")
            .follows("KVM answers the hypercalls that it can"),
        // Nothing is lost but speed.
        Err(error) => finding
            .status(Status::Note)
            .found(error.to_string())
            .follows("hypercalls are answered in user space"),
    }
}

fn capability_finding(found: survey::Finding) -> Finding {
    let capability = found.capability;
    let topic = match capability.need {
        Need::Required | Need::Improves => Topic::Kvm,
        Need::Tracking => Topic::Tracking,
        Need::Hybrid => Topic::HyperV,
    };
    let name = format!("{} ({})", capability.name, capability.number);
    let value = match found.value {
        value @ ..=9 => value.to_string(),
        value => format!("{value:#x}"),
    };
    if found.satisfied() {
        let finding = Finding::new(topic, &name, Status::Ok);
        return finding.found(value).follows(capability.purpose);
    }
    let status = match capability.need {
        Need::Required => Status::Missing,
        Need::Improves | Need::Tracking => Status::Limited,
        Need::Hybrid => Status::Note,
    };
    let finding = Finding::new(topic, &name, status)
        .found(value)
        .follows(capability.without);
    match capability.need {
        Need::Required => finding.advise("use a kernel of version 5.10 or later"),
        Need::Improves | Need::Tracking => finding.advise("use a kernel of version 6.12 or later"),
        // Nothing is lost but speed.
        Need::Hybrid => finding,
    }
}

fn word(need: Need) -> &'static str {
    match need {
        Need::Required => "required",
        Need::Improves => "improves",
        Need::Tracking => "tracking",
        Need::Hybrid => "hybrid",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn made_up(cpuinfo: &str) -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("proc")).unwrap();
        fs::write(dir.path().join("proc/cpuinfo"), cpuinfo).unwrap();
        let root = Root::new(dir.path());
        (dir, root)
    }

    #[test]
    fn advice_for_a_missing_kvm_follows_from_the_cpu() {
        for (flags, advice) in [
            ("fpu svm", "modprobe kvm_amd"),
            ("fpu vmx hypervisor", "modprobe kvm_intel"),
            ("fpu hypervisor", "let this VM's own hypervisor nest"),
            ("fpu", "firmware"),
        ] {
            let (_dir, root) = made_up(&format!("processor\t: 0\nflags\t\t: {flags}\n"));
            let mut findings = Vec::new();
            let facts = examine(&root, &mut findings);
            assert!(!facts.usable);
            assert!(facts.reason.unwrap().starts_with("/dev/kvm: No such file"));
            let [finding] = &findings[..] else {
                panic!("{findings:?}");
            };
            assert_eq!(finding.status, Status::Missing);
            let given = finding.advice.as_deref().unwrap();
            assert!(given.contains(advice), "{flags}: {given}");
        }
    }

    #[test]
    fn a_file_that_is_not_kvm_is_told_apart() {
        let (dir, root) = made_up("");
        fs::create_dir_all(dir.path().join("dev")).unwrap();
        fs::write(dir.path().join("dev/kvm"), "").unwrap();
        let mut findings = Vec::new();
        let facts = examine(&root, &mut findings);
        assert!(!facts.usable && facts.api_version.is_none());
        assert!(findings[0].found.starts_with("not KVM"), "{findings:?}");
    }

    #[test]
    fn a_capability_that_falls_short_says_what_follows_and_what_to_do() {
        for capability in survey::CAPABILITIES {
            let there = survey::Finding {
                capability,
                value: i32::MAX,
            };
            let finding = capability_finding(there);
            assert_eq!(finding.status, Status::Ok);
            assert_eq!(finding.follows, capability.purpose);
            let gone = survey::Finding {
                capability,
                value: 0,
            };
            let finding = capability_finding(gone);
            assert_ne!(finding.status, Status::Ok);
            assert_eq!(finding.follows, capability.without);
            assert_eq!(finding.advice.is_none(), capability.need == Need::Hybrid);
        }
    }
}
