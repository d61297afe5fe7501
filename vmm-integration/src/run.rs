//! `vpci-vmm run`: from the options to the exit status.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use kvm_ioctls::Kvm;

use crate::api::{EJECT_TIMEOUT_S, MachineState, Order, Orders, Refusal, RefusalKind, Server};
use crate::cli::RunArgs;
use crate::console::RawTerminal;
use crate::control::{GuestEvent, ResetCause};
use crate::embed::Functions;
use crate::error::Error;
use crate::kernel::{self, BootSource};
use crate::machine::{Machine, MachineConfig};
use crate::notices::{About, Notice};
use crate::recall::Recalls;
use crate::report::{self, End, Report};
use crate::signals::{Signal, Signals, install_kick_handler};
use crate::snapshot::{Reader, RestoreError};
use crate::spec;

/// Most resets of one run: a guest that cannot boot would reset for ever.
const MAX_RESETS: u32 = 32;

/// Runs a guest until it powers off.
///
/// # Errors
///
/// [`Error`], with the exit status.
pub(crate) fn run(args: RunArgs) -> Result<(), Error> {
    // First everything that is the user's to get right, before anything is created.
    let placed = spec::parse(&args.vpci, &[])?;
    let boot = BootSource {
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
    };
    kernel::check(&boot)?;
    let restore = args.restore.as_deref().map(|path| {
        let (pages, saved) = Reader::open(path)?;
        saved.check_options(args.cpus, args.memory)?;
        Ok::<_, RestoreError>((saved, pages))
    });
    let restore = restore.transpose()?;
    if let Some(path) = &args.report {
        report::check_path(path)?;
    }

    let kvm = open_kvm(c"/dev/kvm")?;
    // These two before any thread is started: threads inherit the signal mask.
    let mut api = args.api_socket.as_deref().map(Server::bind).transpose()?;
    let signals = Signals::take().map_err(Error::host("a signal descriptor"))?;
    install_kick_handler().map_err(Error::host("a signal handler"))?;
    let config = MachineConfig {
        boot,
        cpus: args.cpus,
        memory: args.memory,
        hyperv: args.hyperv,
    };
    let functions = Functions::build(&placed, args.cpus)?;
    let saved = restore.as_ref().map(|(saved, _)| saved);
    let (machine, pump) = Machine::build(&kvm, config, functions, saved)?;
    if let Some((saved, pages)) = restore {
        machine.restore(saved, pages)?;
    }
    let mut subscribers =
        EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(|error| event_error(&error))?;
    let orders = Arc::new(Orders::new().map_err(Error::host("an eventfd"))?);
    let patience = Duration::from_secs(EJECT_TIMEOUT_S.into());
    let mut recalls = Recalls::new(patience).map_err(Error::host("an eventfd"))?;
    subscribers.add_subscriber(Box::new(Wake {
        fds: vec![
            signals.as_raw_fd(),
            machine.shared().control.as_raw_fd(),
            orders.as_raw_fd(),
            machine.shared().embedding.notices_fd(),
            recalls.as_raw_fd(),
        ],
    }));
    subscribers.add_subscriber(Box::new(pump));

    let mut resets = 0;
    let outcome = {
        let _terminal = RawTerminal::enter();
        machine.resume();
        if let Some(api) = &mut api {
            api.start(machine.shared().clone(), orders.clone())
                .map_err(Error::host("a thread"))?;
        }
        let mut wait = |longest: Option<Duration>| {
            let result = subscribers.run_with_timeout(milliseconds(longest));
            result.map(drop).map_err(|error| event_error(&error))
        };
        let outside = Outside {
            signals: &signals,
            orders: &orders,
            recalls: &mut recalls,
        };
        drive(&machine, outside, &mut wait, &mut resets)
    };
    machine.pause();
    if let Some(path) = &args.report {
        write_report(path, &machine, &outcome, resets)?;
    }
    outcome.map(drop)
}

fn open_kvm(path: &std::ffi::CStr) -> Result<Kvm, Error> {
    Kvm::new_with_path(path).map_err(|error| {
        let source = io::Error::from(error);
        let advice = match source.kind() {
            io::ErrorKind::NotFound => {
                "load the module kvm_intel or kvm_amd, and switch virtualisation on in the firmware"
            }
            io::ErrorKind::PermissionDenied => "join the group that owns it (kvm), or be root",
            _ => "KVM does not work on this host",
        };
        Error::KvmOpen { source, advice }
    })
}

/// A longest wait as epoll takes it: not a moment too short, or the loop would turn idly.
fn milliseconds(longest: Option<Duration>) -> i32 {
    longest.map_or(-1, |longest| {
        let whole = longest.as_micros().div_ceil(1000);
        i32::try_from(whole).unwrap_or(i32::MAX)
    })
}

/// Who else directs the machine, or wants something of it.
struct Outside<'a> {
    signals: &'a Signals,
    orders: &'a Orders,
    recalls: &'a mut Recalls,
}

/// The main thread's loop: signals, and what the guest asks of the machine.
fn drive(
    machine: &Machine,
    outside: Outside<'_>,
    wait: &mut dyn FnMut(Option<Duration>) -> Result<(), Error>,
    resets: &mut u32,
) -> Result<End, Error> {
    let Outside {
        signals,
        orders,
        recalls,
    } = outside;
    let mut state = MachineState::Running;
    loop {
        wait(recalls.longest_wait(Instant::now()))?;
        while let Some(signal) = signals.next() {
            match signal {
                Signal::Stop(name) => return Err(Error::Interrupted(name)),
                Signal::Reread => machine.shared().embedding.measure_disks(),
            }
        }
        orders.carry_out(|order| {
            let mut result = Ok(());
            match order {
                // A machine that is ending stays so.
                _ if state == MachineState::Ending => {}
                Order::Pause => {
                    machine.pause();
                    state = MachineState::Paused;
                }
                Order::Resume => {
                    machine.resume();
                    state = MachineState::Running;
                }
                Order::Snapshot(path) => {
                    machine.pause();
                    match machine.save(&path) {
                        Ok(()) => state = MachineState::Paused,
                        Err(error) => {
                            result = Err(Refusal::new(RefusalKind::SnapshotRefused, error));
                            if state == MachineState::Running {
                                machine.resume();
                            }
                        }
                    }
                }
                Order::Quit => state = MachineState::Ending,
            }
            (state, result)
        });
        if state == MachineState::Ending {
            return Ok(End::Quit);
        }
        heed(machine, recalls);
        let mut reset = None;
        for event in machine.shared().control.take_events() {
            match event {
                GuestEvent::PowerOff => return Ok(End::PowerOff),
                GuestEvent::Failed(why) => return Err(Error::Guest(why)),
                GuestEvent::Reset(cause) => reset = Some(cause),
            }
        }
        if let Some(cause) = reset {
            *resets += 1;
            if *resets > MAX_RESETS {
                return Err(Error::ResetLimit(MAX_RESETS));
            }
            match cause {
                ResetCause::Register => log::info!("the guest resets the machine"),
                ResetCause::TripleFault(vcpu) => {
                    log::warn!("the machine is reset by a triple fault of the guest's vCPU {vcpu}");
                }
            }
            machine.pause();
            // What other vCPUs asked for meanwhile is void.
            let _ = machine.shared().control.take_events();
            machine.reset()?;
            if state == MachineState::Running {
                machine.resume();
            }
        }
    }
}

/// Does what the host asks of its devices.
fn heed(machine: &Machine, recalls: &mut Recalls) {
    let embedding = &machine.shared().embedding;
    let now = Instant::now();
    for notice in embedding.notices() {
        let Notice {
            device,
            bus,
            function,
            about,
        } = notice;
        match about {
            About::Wanted => recalls.begin(embedding, &device, bus, function, now),
            // What to do about it is the guest's driver's to find out: it sees the device.
            About::Errors(count) => log::warn!(
                "{device} (function {function} of bus {bus}): the host has seen {count} errors of it \
                 that cannot be corrected"
            ),
        }
    }
    recalls.end(embedding, now);
}

fn write_report(
    path: &Path,
    machine: &Machine,
    outcome: &Result<End, Error>,
    resets: u32,
) -> Result<(), Error> {
    let end = match outcome {
        Ok(end) => *end,
        Err(Error::ResetLimit(_)) => End::ResetLimit,
        Err(Error::Interrupted(_)) => End::Interrupted,
        Err(_) => End::Error,
    };
    let shared = machine.shared();
    let mut counters = shared.embedding.counters();
    counters.insert("exits".into(), shared.exits.load(Ordering::Relaxed));
    let report = Report {
        version: report::VERSION,
        end,
        resets,
        functions: shared.embedding.report(),
        domains: shared.embedding.domains(),
        marks: shared.marks.take(),
        counters,
    };
    Ok(report.write(path)?)
}

fn event_error(error: &event_manager::Error) -> Error {
    Error::host("an event loop")(io::Error::other(format!("{error}")))
}

/// Ends a wait of the loop; the descriptors are read by [`drive`].
struct Wake {
    fds: Vec<i32>,
}

impl MutEventSubscriber for Wake {
    fn process(&mut self, _: Events, _: &mut EventOps) {}

    fn init(&mut self, ops: &mut EventOps) {
        for &fd in &self.fds {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("signals and power-off will go unnoticed: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let missing = open_kvm(c"/nonexistent/kvm").unwrap_err();
        assert_eq!(missing.exit_status(), 3);
        let text = missing.to_string();
        assert!(
            text.starts_with("/dev/kvm: ") && text.contains("kvm_amd"),
            "{text}"
        );
    }

    #[test]
    fn a_wait_ends_behind_its_deadline_and_not_before_it() {
        assert_eq!(milliseconds(None), -1);
        assert_eq!(milliseconds(Some(Duration::ZERO)), 0);
        assert_eq!(milliseconds(Some(Duration::from_micros(1))), 1);
        assert_eq!(milliseconds(Some(Duration::from_millis(60_000))), 60_000);
        assert_eq!(milliseconds(Some(Duration::MAX)), i32::MAX);
    }

    #[test]
    fn a_wrong_function_is_named_with_its_option() {
        let error = spec::parse(&["rng".into(), "rng,x=1".into()], &[]).unwrap_err();
        assert_eq!(error.exit_status(), 2);
        assert!(error.to_string().starts_with("--vpci rng,x=1: "), "{error}");
        let twice = vec!["rng,bus=11223344-1234-4000-8000-000000000001".to_owned(); 2];
        let error = spec::parse(&twice, &[]).unwrap_err();
        assert!(
            error.to_string().starts_with("--vpci: two functions"),
            "{error}"
        );
    }
}
