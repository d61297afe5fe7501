//! The machine of the rig: QEMU without hardware acceleration, with SVM, so that its Linux (L1)
//! has a complete KVM of its own (`docs/spec/vfio-rig.md`, sections 1 and 4).
#![forbid(unsafe_code)]

use super::devices;
use crate::command;
use crate::emulator::Emulator;
use crate::images::Image;
use anyhow::Context;
use anyhow::Result;
use guest_images::scenario::HostDevice;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process_group;
use std::cell::Cell;
use std::fs::File;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;
use std::time::Instant;

/// Longest console line that is looked at in one piece; longer ones come in several.
const LINE_MAX: u64 = 4 << 20;

/// A machine that used less than [`ASLEEP_TICKS`] of processor time in this time is asleep: the timer
/// of an idle Linux alone takes more.
const ASLEEP_AFTER: Duration = Duration::from_secs(60);
/// In hundredths of a second, the unit of `/proc/PID/stat`.
const ASLEEP_TICKS: u64 = 20;

/// What a machine starts with.
#[derive(Debug)]
pub(crate) struct Setup<'a> {
    pub(crate) emulator: &'a Emulator,
    pub(crate) image: &'a Image,
    /// Kernel command line.
    pub(crate) cmdline: &'a str,
    /// Folder that L1 can mount, read-only, by 9p with the tag `host`.
    pub(crate) share: &'a Path,
    /// Folder for `serial.log` and `qemu.log`, with the files behind the devices.
    pub(crate) logs: &'a Path,
    /// Devices for pass-through.
    pub(crate) devices: &'a [HostDevice],
    /// Whether the console is copied to standard error.
    pub(crate) echo: bool,
}

/// A running machine. Dropping it ends it, with everything it started.
#[derive(Debug)]
pub(crate) struct Machine {
    child: Child,
    lines: Receiver<String>,
    start: Instant,
    pulse: Cell<Pulse>,
}

/// When the machine was last seen to do anything.
#[derive(Clone, Copy, Debug)]
struct Pulse {
    at: Instant,
    /// Ticks of processor time that it had used by then.
    ticks: u64,
}

/// Why [`Machine::watch`] stopped.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End<T> {
    /// A console line was what the caller waited for.
    Found(T),
    /// The machine ended before.
    Ended,
    /// The time limit came before.
    TimedOut,
    /// The machine has done next to nothing for [`ASLEEP_AFTER`]: it has lost its timers, and nothing
    /// will wake it (docs/testing.md, "What the emulator can break").
    Asleep,
    /// The user, or whatever started this program, wants it to end.
    Interrupted,
}

impl Machine {
    pub(crate) fn start(setup: &Setup<'_>) -> Result<Self> {
        let mut command = qemu(setup);
        let log = setup.logs.join("qemu.log");
        let log = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start `{}`", command::display(&command)))?;
        let console = child.stdout.take().context("no console")?;
        let serial = File::create(setup.logs.join("serial.log"))?;
        let (sender, lines) = mpsc::channel();
        let echo = setup.echo;
        std::thread::spawn(move || read_console(console, serial, echo, &sender));
        Ok(Self {
            child,
            lines,
            start: Instant::now(),
            pulse: Cell::new(Pulse::new()),
        })
    }

    /// Time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Hands console lines to `look` until it returns something, the machine ends, `limit` after
    /// the machine's start has come, or `interrupted` is set. `None` instead of a line says that
    /// a moment passed without one.
    pub(crate) fn watch<T>(
        &self,
        limit: Duration,
        interrupted: &AtomicBool,
        mut look: impl FnMut(Option<&str>) -> Option<T>,
    ) -> End<T> {
        loop {
            if interrupted.load(Ordering::Relaxed) {
                return End::Interrupted;
            }
            if self.elapsed() >= limit {
                return End::TimedOut;
            }
            if self.is_asleep() {
                return End::Asleep;
            }
            let line = match self.lines.recv_timeout(Duration::from_millis(250)) {
                Ok(line) => Some(line),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return End::Ended,
            };
            if let Some(found) = look(line.as_deref()) {
                return End::Found(found);
            }
        }
    }

    /// Whether the machine has done next to nothing for long.
    fn is_asleep(&self) -> bool {
        let mut pulse = self.pulse.get();
        let now = Instant::now();
        if let Some(ticks) = ticks(self.child.id()) {
            pulse.beat(now, ticks);
        }
        self.pulse.set(pulse);
        now - pulse.at >= ASLEEP_AFTER
    }

    /// Waits for the machine to power off by itself, at most `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        false
    }
}

impl Pulse {
    fn new() -> Self {
        let at = Instant::now();
        Self { at, ticks: 0 }
    }

    /// Notes the ticks that were used by `now`.
    fn beat(&mut self, now: Instant, ticks: u64) {
        if ticks >= self.ticks + ASLEEP_TICKS {
            *self = Self { at: now, ticks };
        }
    }
}

/// Processor time of a process and all its threads, in user and kernel mode.
fn ticks(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in brackets may hold blanks; then fields from the third on (proc(5)).
    let (_, rest) = stat.rsplit_once(')')?;
    let mut times = rest.split_ascii_whitespace().skip(14 - 3);
    Some(times.next()?.parse::<u64>().ok()? + times.next()?.parse::<u64>().ok()?)
}

impl Drop for Machine {
    fn drop(&mut self) {
        // A child that was waited for is gone, and its number may be somebody else's.
        if matches!(self.child.try_wait(), Ok(None)) {
            let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
            if let Some(group) = group {
                // It may have ended in this moment.
                let _ = kill_process_group(group, Signal::KILL);
            }
            let _ = self.child.wait();
        }
    }
}

/// Set when the program is asked to end: by Ctrl-C, a closed terminal or a termination request.
pub(crate) fn interruption() -> Result<Arc<AtomicBool>> {
    use signal_hook::consts::SIGHUP;
    use signal_hook::consts::SIGINT;
    use signal_hook::consts::SIGTERM;
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&flag))?;
    }
    Ok(flag)
}

fn qemu(setup: &Setup<'_>) -> Command {
    // setpriv: should this program be killed, the kernel ends QEMU as well.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    command.args(setup.emulator.command_line());
    command.env("QEMU_MODULE_DIR", setup.emulator.modules());
    // A TCG thread for each CPU. With one thread for both QEMU switches between them by an exit
    // request, and such a request between the injection of an interrupt into L2 and L2's next exit
    // delivers the interrupt once more, whatever L2's IF is (docs/spec/vfio-rig.md, section 1).
    command.args("-accel tcg,thread=multi -machine q35".split(' '));
    command.args("-cpu EPYC,+svm,+npt -smp 2 -m 3072".split(' '));
    command.args("-nodefaults -display none -serial stdio -no-reboot".split(' '));
    command.args(devices::options(setup.logs, setup.devices));
    command.arg("-kernel").arg(&setup.image.kernel);
    command.arg("-initrd").arg(&setup.image.initrd);
    let mut cmdline = setup.cmdline.to_string();
    if !setup.devices.is_empty() {
        cmdline += " intel_iommu=on";
    }
    command.arg("-append").arg(cmdline);
    let share = setup.share.display().to_string().replace(',', ",,");
    command.arg("-virtfs").arg(format!(
        "local,path={share},mount_tag=host,security_model=none,readonly=on,multidevs=remap"
    ));
    command
}

/// Copies the console to `log` and, line by line, to `lines` until it ends.
fn read_console(console: impl Read, mut log: impl Write, echo: bool, lines: &mpsc::Sender<String>) {
    let mut console = BufReader::new(console);
    let mut line = Vec::new();
    loop {
        line.clear();
        match console.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // The log helps whoever looks into a failure; the run does not depend on it.
        let _ = log.write_all(&line);
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\r', '\n']);
        if echo {
            eprintln!("{text}");
        }
        if lines.send(text.to_string()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that is a shell script.
    fn machine(script: &str) -> Machine {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null());
        let mut child = command
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let console = child.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || read_console(console, Vec::new(), false, &sender));
        Machine {
            child,
            lines,
            start: Instant::now(),
            pulse: Cell::new(Pulse::new()),
        }
    }

    #[test]
    fn devices_and_the_iommu_are_on_the_command_line_of_machines_that_have_some() {
        let image = Image {
            kernel: "kernel".into(),
            initrd: "initrd".into(),
        };
        let line = |devices: &[HostDevice]| {
            let setup = Setup {
                emulator: &Emulator::in_folder(Path::new("/emulator")),
                image: &image,
                cmdline: "quiet",
                share: Path::new("/share"),
                logs: Path::new("/logs"),
                devices,
                echo: false,
            };
            command::display(&qemu(&setup))
        };
        let plain = line(&[]);
        assert!(!plain.contains("iommu"), "{plain}");
        let line = line(&devices::parse("edu").unwrap());
        for part in ["intel-iommu", "edu,", "quiet intel_iommu=on"] {
            assert!(line.contains(part), "{line}");
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn watching_ends_with_what_is_looked_for() {
        let machine = machine("echo one; echo two; sleep 60");
        let end = machine.watch(LONG, &AtomicBool::new(false), |line| {
            line.filter(|line| *line == "two").map(String::from)
        });
        assert_eq!(end, End::Found("two".into()));
    }

    #[test]
    fn watching_ends_with_the_machine_the_limit_or_an_interruption() {
        let never = |_: Option<&str>| None::<()>;
        let no = AtomicBool::new(false);
        assert_eq!(machine("echo last").watch(LONG, &no, never), End::Ended);
        let limit = Duration::from_millis(300);
        assert_eq!(machine("sleep 60").watch(limit, &no, never), End::TimedOut);
        let yes = AtomicBool::new(true);
        assert_eq!(
            machine("sleep 60").watch(LONG, &yes, never),
            End::Interrupted
        );
    }

    #[test]
    fn a_machine_that_does_next_to_nothing_has_no_pulse() {
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let mut pulse = Pulse {
            at: start,
            ticks: 100,
        };
        pulse.beat(second(30), 100 + ASLEEP_TICKS - 1);
        assert_eq!(pulse.at, start);
        // Little by little is something as well.
        pulse.beat(second(50), 100 + ASLEEP_TICKS);
        assert_eq!(pulse.at, second(50));
        assert!(ticks(std::process::id()).is_some());
        assert_eq!(ticks(u32::MAX), None);
    }

    #[test]
    fn a_dropped_machine_leaves_no_process_behind() {
        let machine = machine("sleep 1000 & echo $!; wait");
        let child = machine.watch(LONG, &AtomicBool::new(false), |line| line.map(String::from));
        let End::Found(child) = child else {
            panic!("no process number")
        };
        let started = format!("/proc/{child}/stat");
        assert!(Path::new(&started).exists());
        drop(machine);
        // The killed process may be a zombie until its new parent has waited for it.
        let gone = |_| {
            std::thread::sleep(Duration::from_millis(20));
            std::fs::read_to_string(&started).map_or(true, |stat| stat.contains(") Z "))
        };
        assert!((0..100).any(gone), "still running");
    }

    #[test]
    fn the_console_is_logged_as_it_is_and_read_by_lines() {
        let (sender, lines) = mpsc::channel();
        let mut log = Vec::new();
        read_console(&b"a\r\n\xff b\nno end"[..], &mut log, false, &sender);
        drop(sender);
        assert_eq!(log, b"a\r\n\xff b\nno end");
        let lines: Vec<_> = lines.iter().collect();
        assert_eq!(lines, ["a", "\u{fffd} b", "no end"]);
    }
}
