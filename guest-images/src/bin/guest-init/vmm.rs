//! One run of the reference VMM: started, listened to, limited in time, ended.

use crate::inspect;
use crate::interrupts;
use crate::rebind::HOST_UNBIND;
use crate::saves::Saves;
use crate::system::{put, read_text, say};
use crate::vfio;
use anyhow::{Context, Result, bail};
use guest_images::judge::Counted;
use guest_images::report::{COUNT_EVENT, EVENT_PREFIX, FAIL_PREFIX, GuestReport, REPORT_PREFIX};
use guest_images::scenario::{Function, Mode, PciAddress, Run};
use guest_images::verdict::json_after;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::collections::{BTreeSet, VecDeque};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Longest console line that is kept; a guest cannot make the rig hold more.
const LINE_LIMIT: u64 = 4 << 20;
/// Most characters of a guest's last words in a failure.
const LAST_WORDS: usize = 300;
/// How a kernel says that it gave up.
const PANIC: &str = "Kernel panic - not syncing";
/// How a kernel ends what it has to say of a fault of its own.
const END_OF_FAULT: &str = "---[ end trace";
/// How long a guest goes on after a fault: it has failed, and whatever waits for what the fault
/// interrupted waits for ever.
const FAULT_LIMIT: Duration = Duration::from_secs(30);
/// Longest silence of a guest that is taken for ordinary.
const QUIET_LIMIT: Duration = Duration::from_secs(45);
/// How long a VMM gets to end by itself after it was asked to.
const TERM_LIMIT: Duration = Duration::from_secs(10);
/// How long a bus that was taken away may keep its name.
const PLUG_LIMIT: Duration = Duration::from_secs(30);
/// The driver in L1 of devices that are passed through.
const HOST_DRIVER: &str = "vfio-pci";
/// How long a device that the guest has lost may stay with the VMM.
const UNBIND_LIMIT: Duration = Duration::from_secs(30);
/// How long a VMM may take to read a snapshot.
const RESTORE_LIMIT: Duration = Duration::from_secs(60);
/// Pause between looks at the child.
const POLL: Duration = Duration::from_millis(100);

/// Where a run's files are.
#[derive(Debug)]
pub(crate) struct Files<'a> {
    /// Shared directory with the VMM, kernels and initramfs files.
    pub(crate) share: &'a Path,
    /// Directory for disks and the VMM's report.
    pub(crate) scratch: &'a Path,
}

impl Files<'_> {
    /// Backing file of the disk at `address`.
    pub(crate) fn disk(&self, address: PciAddress) -> PathBuf {
        self.scratch
            .join(format!("disk-{}", address.to_string().replace(':', "-")))
    }

    /// The guest's initramfs.
    pub(crate) fn initrd(&self, run: &Run) -> PathBuf {
        match run.mode {
            // One with another kernel in it.
            Mode::Kexec => self.scratch.join("initramfs"),
            _ => self.share.join(&run.initrd),
        }
    }

    /// The VMM's control socket.
    fn socket(&self) -> PathBuf {
        self.scratch.join("control.sock")
    }

    /// The VMM's report.
    pub(crate) fn report(&self) -> PathBuf {
        self.scratch.join("report.json")
    }
}

/// What a run of the VMM gave.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// `None` when the VMM ended by itself with status 0.
    pub(crate) failure: Option<String>,
    /// The guest's report, or why there is none.
    pub(crate) guest: Result<GuestReport, String>,
    /// Interrupts of host devices at the guest's marks.
    pub(crate) counted: Vec<Counted>,
    /// Wall-clock time.
    pub(crate) took: Duration,
}

/// The VMM's command line for a run, without the functions of the buses that are away.
pub(crate) fn command(run: &Run, files: &Files<'_>, absent: &BTreeSet<Uuid>) -> Command {
    let mut command = Command::new(files.share.join("vpci-vmm"));
    command
        .arg("run")
        .arg("--kernel")
        .arg(files.share.join(&run.kernel))
        .arg("--initrd")
        .arg(files.initrd(run))
        .args(["--cmdline", &run.guest_cmdline()])
        .args(["--cpus", &run.cpus.to_string()])
        .args(["--memory", &format!("{}M", run.memory_mib)]);
    let here = |function: &&Function| !absent.contains(&function.bus());
    for function in run.functions.iter().filter(here) {
        command.args(["--vpci", &specification(function, files)]);
    }
    if let Some(hyperv) = &run.hyperv {
        command.args(["--hyperv", hyperv]);
    }
    if run.is_controlled() {
        command.arg("--api-socket").arg(files.socket());
    }
    command.arg("--report").arg(files.report());
    command
}

/// The value of `--vpci` for a function.
fn specification(function: &Function, files: &Files<'_>) -> String {
    let iommu = if function.iommu() { ",iommu=on" } else { "" };
    let place = format!("bus={},fn={}{iommu}", function.bus(), function.number());
    match function {
        Function::Blk {
            queues, readonly, ..
        } => {
            let path = files.disk(function.address());
            let readonly = if *readonly { ",readonly=on" } else { "" };
            format!(
                "blk,path={},queues={queues},{place}{readonly}",
                path.display()
            )
        }
        Function::Rng { .. } => format!("rng,{place}"),
        Function::Testdev { .. } => format!("testdev,{place}"),
        Function::Vfio { host, .. } => format!("vfio,host={host},{place}"),
    }
}

/// Runs the VMM to its end or to the time limit.
pub(crate) fn execute(run: &Run, files: &Files<'_>) -> Result<Outcome> {
    let start = Instant::now();
    let here: BTreeSet<_> = run.at_boot().map(Function::bus).collect();
    let all = run.functions.iter().map(Function::bus);
    let absent: BTreeSet<_> = all.filter(|bus| !here.contains(bus)).collect();
    let mut vmm = Vmm::start(run, files, command(run, files, &absent))?;
    vmm.absent = absent;
    vmm.follow(start + Duration::from_secs(run.time_limit_s));
    let failure = match vmm.reap() {
        Ok(()) => vmm.failure,
        Err(error) => Some(
            vmm.failure
                .map_or(format!("{error:#}"), |first| format!("{first}; {error:#}")),
        ),
    };
    let failure = match (failure, vmm.saves.finish(files)) {
        (None, Err(error)) => Some(format!("{error:#}")),
        (failure, _) => failure,
    };
    Ok(Outcome {
        failure,
        counted: vmm.counted,
        guest: vmm.guest.unwrap_or_else(|| Err("none was printed".into())),
        took: start.elapsed(),
    })
}

struct Vmm<'a> {
    child: Child,
    lines: Receiver<String>,
    /// The start of a line that the end of a VMM cut.
    tail: Tail,
    /// Lines that came while the VM was being saved.
    backlog: VecDeque<String>,
    run: &'a Run,
    files: &'a Files<'a>,
    /// Buses of the run that are not plugged in now.
    absent: BTreeSet<Uuid>,
    /// Devices that L1 takes from the VMM, each with the end of that.
    unbinds: Vec<(PciAddress, Receiver<Result<()>>)>,
    saves: Saves,
    guest: Option<Result<GuestReport, String>>,
    counted: Vec<Counted>,
    /// What to tell when no report comes: the line by which the guest gave up, else its last one.
    last_words: Option<String>,
    failure: Option<String>,
}

/// The start of a line, with the lines of one VMM behind that of another.
type Tail = Arc<Mutex<Vec<u8>>>;

impl<'a> Vmm<'a> {
    fn start(run: &'a Run, files: &'a Files<'a>, mut command: Command) -> Result<Self> {
        let tail = Tail::default();
        let (child, lines) = spawn(&mut command, &tail)?;
        Ok(Self {
            child,
            lines,
            tail,
            backlog: VecDeque::new(),
            run,
            files,
            absent: BTreeSet::new(),
            unbinds: Vec::new(),
            saves: Saves::default(),
            guest: None,
            counted: Vec::new(),
            last_words: None,
            failure: None,
        })
    }

    /// The next line of the console.
    fn next_line(&mut self, limit: Duration) -> Result<String, RecvTimeoutError> {
        if let Some(line) = self.backlog.pop_front() {
            return Ok(line);
        }
        let line = self.lines.recv_timeout(limit);
        if let Err(RecvTimeoutError::Disconnected) = line {
            // What the last VMM has not ended with a line feed.
            let rest = std::mem::take(&mut *lock(&self.tail));
            if !rest.is_empty() {
                return Ok(String::from_utf8_lossy(&rest).into_owned());
            }
        }
        line
    }

    /// Handles console lines until the VMM closes its output or the time is over.
    fn follow(&mut self, mut deadline: Instant) {
        let mut inspected = false;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let quiet = left.min(QUIET_LIMIT);
            match self.next_line(if inspected { left } else { quiet }) {
                Ok(line) => {
                    if line.contains(FAIL_PREFIX) && !inspected {
                        inspected = true;
                        inspect::show(self.child.id());
                    }
                    if line.contains(END_OF_FAULT) {
                        deadline = deadline.min(Instant::now() + FAULT_LIMIT);
                        self.fail("the guest's kernel has a fault: see its console".into());
                    }
                    if let Err(error) = self.line(&line) {
                        self.fail(format!("{error:#}"));
                    }
                    if self.guest.is_none()
                        && self.saves.is_due(self.run, &line)
                        && let Err(error) = self.save_and_restore()
                    {
                        self.fail(format!("snapshot: {error:#}"));
                        return;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) if !inspected && left > quiet => {
                    inspected = true;
                    inspect::show(self.child.id());
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.fail(format!("not done after {} s", self.run.time_limit_s));
                    return;
                }
            }
        }
    }

    fn fail(&mut self, what: String) {
        crate::system::say(&format!("vpci: {what}"));
        self.failure.get_or_insert(what);
    }

    fn line(&mut self, line: &str) -> Result<()> {
        let run = self.run;
        self.remember(line);
        if let Some(report) = json_after::<GuestReport>(REPORT_PREFIX, line) {
            if self.guest.is_some() {
                bail!("the guest printed more than one report");
            }
            self.guest = Some(report.map_err(|error| format!("malformed: {error}")));
        }
        let Some((_, event)) = line.split_once(EVENT_PREFIX) else {
            return Ok(());
        };
        match event.trim().split_once(' ') {
            Some((COUNT_EVENT, mark)) => self.count(mark),
            Some(("grow", address)) => self.grow(address),
            Some(("eject", bus)) => self.take_away(&["eject", bus], bus),
            Some(("eject-function", which)) => {
                let (bus, function) = which.split_once(' ').context("bus and function")?;
                self.ctl(&["eject", bus, "--fn", function])
            }
            Some(("remove", bus)) => self.take_away(&["remove", "--surprise", bus], bus),
            Some((HOST_UNBIND, address)) => self.unbind(address),
            Some(("plug", bus)) => {
                self.rebind()?;
                self.plug(bus, &run.functions)
            }
            Some(("swap", bus)) => self.plug(bus, &run.substitutes),
            _ => bail!("the guest asked for the unknown event {event:?}"),
        }
    }

    fn remember(&mut self, line: &str) {
        let gave_up = |line: &str| line.contains(FAIL_PREFIX) || line.contains(PANIC);
        let settled = self.last_words.as_deref().is_some_and(gave_up);
        let text: String = line.trim().chars().take(LAST_WORDS).collect();
        if !text.is_empty() && !settled {
            self.last_words = Some(text);
        }
    }

    /// Notes how often host devices have interrupted.
    fn count(&mut self, mark: &str) -> Result<()> {
        let mark = mark.parse().context("number of a mark")?;
        let rows = interrupts::parse(&read_text("/proc/interrupts")?)?;
        for function in &self.run.functions {
            let Function::Vfio { host, .. } = function else {
                continue;
            };
            let owner = format!("({host})");
            let rows = rows.iter().filter(|row| row.name.ends_with(&owner));
            let vectors = rows.filter_map(|row| {
                let index = interrupts::vector_index(&row.name)?;
                Some((index, row.per_cpu.values().sum()))
            });
            self.counted.push(Counted {
                mark,
                host: *host,
                vectors: vectors.collect(),
            });
        }
        Ok(())
    }

    /// Makes a disk grow as its guest asks.
    fn grow(&mut self, address: &str) -> Result<()> {
        let address: PciAddress = address.parse().map_err(anyhow::Error::msg)?;
        let function = self
            .run
            .functions
            .iter()
            .find(|function| function.address() == address);
        let Some(Function::Blk {
            size_mib,
            grow_mib: grow_mib @ 1..,
            ..
        }) = function
        else {
            bail!("the guest asked {address} to grow, which does not");
        };
        let size = (u64::from(*size_mib) + u64::from(*grow_mib)) << 20;
        let path = self.files.disk(address);
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(size))
            .with_context(|| path.display().to_string())?;
        kill_process(self.pid()?, Signal::HUP).context("SIGHUP to the VMM")
    }

    fn take_away(&mut self, words: &[&str], bus: &str) -> Result<()> {
        self.absent.insert(bus.parse().context("GUID of a bus")?);
        self.ctl(words)
    }

    /// Takes a device from vfio-pci, which waits until the VMM has let go of it.
    fn unbind(&mut self, address: &str) -> Result<()> {
        let address: PciAddress = address.parse().map_err(anyhow::Error::msg)?;
        let mut functions = self.run.functions.iter();
        let function = functions.find(|function| function.address() == address);
        let Some(Function::Vfio { host, bus, .. }) = function else {
            bail!("the guest asked L1 to unbind {address}, which is no device of L1");
        };
        // The bus may stay, without the function: a run with one of these has no snapshots.
        self.absent.insert(*bus);
        self.unbinds
            .push((*host, vfio::begin_unbind(*host, HOST_DRIVER)));
        Ok(())
    }

    /// Gives devices that were unbound to vfio-pci again. Each must be free by now, or soon.
    fn rebind(&mut self) -> Result<()> {
        for (host, end) in self.unbinds.drain(..) {
            let start = Instant::now();
            match end.recv_timeout(UNBIND_LIMIT) {
                Ok(result) => result.with_context(|| format!("unbind of {host}"))?,
                Err(RecvTimeoutError::Disconnected) => bail!("unbind of {host}: panicked"),
                Err(RecvTimeoutError::Timeout) => {
                    let limit = UNBIND_LIMIT.as_secs();
                    bail!("the VMM has not let go of {host} {limit} s after the guest lost it")
                }
            }
            let millis = start.elapsed().as_millis();
            say(&format!("vpci: {host} is unbound, waited {millis} ms"));
            vfio::bind(host, HOST_DRIVER)?;
        }
        Ok(())
    }

    /// Saves the VM, ends the VMM, and goes on with the VM in a new one.
    fn save_and_restore(&mut self) -> Result<()> {
        std::thread::sleep(self.saves.delay());
        let path = self.files.scratch.join("snapshot");
        let name = path.to_string_lossy().into_owned();
        self.ctl(&["snapshot", &name])?;
        self.ctl(&["quit"])?;
        while let Ok(line) = self.lines.recv_timeout(TERM_LIMIT) {
            self.backlog.push_back(line);
        }
        self.reap()?;
        self.saves.taken(self.files)?;
        let mut command = command(self.run, self.files, &self.absent);
        command.arg("--restore").arg(&path);
        (self.child, self.lines) = spawn(&mut command, &self.tail)?;
        // The VMM listens when it has read the file, and has no more use for it.
        let start = Instant::now();
        while self.ctl(&["list"]).is_err() {
            if start.elapsed() > RESTORE_LIMIT {
                bail!("the restored VM does not answer");
            }
            std::thread::sleep(POLL);
        }
        std::fs::remove_file(&path).context(name)
    }

    /// Plugs the functions of a bus in, which may be named by the address of one of them. The guest
    /// may not have released the bus's channel yet.
    fn plug(&mut self, bus: &str, functions: &[Function]) -> Result<()> {
        let named = |function: &&Function| {
            function.bus().to_string() == bus || function.address().to_string() == bus
        };
        let bus = functions.iter().find(named).map(Function::bus);
        let bus = bus.context("no such bus in this run")?;
        self.absent.remove(&bus);
        let functions = functions.iter().filter(|function| function.bus() == bus);
        let specs: Vec<_> = functions.map(|f| specification(f, self.files)).collect();
        let mut words = vec!["plug"];
        words.extend(specs.iter().map(String::as_str));
        let start = Instant::now();
        loop {
            match self.ctl(&words) {
                Err(_) if start.elapsed() < PLUG_LIMIT => std::thread::sleep(POLL),
                outcome => return outcome,
            }
        }
    }

    /// Asks something of the VMM.
    fn ctl(&self, words: &[&str]) -> Result<()> {
        let output = Command::new(self.files.share.join("vpci-vmm"))
            .args(["ctl", "--json", "--socket"])
            .arg(self.files.socket())
            .args(words)
            .output()
            .context("vpci-vmm ctl")?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("ctl {}: {said}{errors}", words.join(" "));
        }
        // A guest that does not answer is a failure of its own: the removal went on without it.
        if said.contains("timed-out") {
            bail!("the guest did not answer: ctl {}", words.join(" "));
        }
        Ok(())
    }

    fn pid(&self) -> Result<Pid> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        pid.context("process id of the VMM")
    }

    /// Waits for the VMM's end, with growing force if it does not come.
    fn reap(&mut self) -> Result<()> {
        // Its output is closed or its time is over: it should be gone at once.
        for signal in [None, Some(Signal::TERM), Some(Signal::KILL)] {
            if let Some(signal) = signal {
                // Already gone is fine.
                let _ = kill_process_group(self.pid()?, signal);
            }
            let start = Instant::now();
            let limit = if self.failure.is_some() && signal.is_none() {
                POLL
            } else {
                TERM_LIMIT
            };
            while start.elapsed() < limit {
                let Some(status) = self.child.try_wait().context("wait for the VMM")? else {
                    std::thread::sleep(POLL / 10);
                    continue;
                };
                return match (status.success(), signal) {
                    (true, None) => Ok(()),
                    (_, None) => bail!("ended with {status}"),
                    (_, Some(_)) => bail!("had to be stopped, ended with {status}"),
                };
            }
        }
        bail!("cannot be killed")
    }
}

fn lock(tail: &Tail) -> MutexGuard<'_, Vec<u8>> {
    tail.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn(command: &mut Command, tail: &Tail) -> Result<(Child, Receiver<String>)> {
    let mut child = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", command.get_program().to_string_lossy()))?;
    let lines = listen(&mut child, tail)?;
    Ok((child, lines))
}

/// Copies the VMM's output to the console and gives the lines of its standard output, the first of
/// them behind what is in `tail`; what comes behind the last line feed goes there. The channel
/// closes with the output.
fn listen(child: &mut Child, tail: &Tail) -> Result<Receiver<String>> {
    let stdout = child.stdout.take().context("output of the VMM")?;
    let stderr = child.stderr.take().context("errors of the VMM")?;
    let (sender, receiver) = channel();
    let tail = tail.clone();
    std::thread::spawn(move || forward(stdout, Some((&sender, &tail))));
    std::thread::spawn(move || forward(stderr, None));
    Ok(receiver)
}

fn forward(source: impl Read, lines: Option<(&Sender<String>, &Tail)>) {
    let mut source = BufReader::new(source);
    loop {
        let mut line = Vec::new();
        let whole = match source
            .by_ref()
            .take(LINE_LIMIT)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(length) => line.ends_with(b"\n") || length as u64 == LINE_LIMIT,
        };
        put(&line);
        if !line.ends_with(b"\n") {
            put(b"\n");
        }
        let Some((lines, tail)) = lines else { continue };
        let mut start = lock(tail);
        start.extend_from_slice(&line);
        if !whole {
            continue;
        }
        let line = std::mem::take(&mut *start);
        drop(start);
        if lines
            .send(String::from_utf8_lossy(&line).into_owned())
            .is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_images::scenario::{Kind, Mode};

    fn run() -> Run {
        Run {
            name: "1-cpu".into(),
            kernel: "k".into(),
            initrd: "i".into(),
            cmdline: String::new(),
            cpus: 1,
            memory_mib: 512,
            functions: vec![
                Function::Blk {
                    bus: "11111111-1234-4000-8000-000000000001".parse().unwrap(),
                    function: 0,
                    size_mib: 64,
                    queues: 2,
                    readonly: true,
                    grow_mib: 0,
                    iommu: false,
                },
                Function::Rng {
                    bus: "11111111-0042-4000-8000-000000000002".parse().unwrap(),
                    function: 1,
                    iommu: false,
                },
                Function::Testdev {
                    bus: "11111111-0043-4000-8000-000000000003".parse().unwrap(),
                    function: 0,
                    iommu: true,
                },
                Function::Vfio {
                    bus: "11111111-0044-4000-8000-000000000004".parse().unwrap(),
                    function: 2,
                    host: "0000:00:11.0".parse().unwrap(),
                    guest: Kind::Nvme,
                    size_mib: 64,
                    iommu: true,
                },
            ],
            substitutes: Vec::new(),
            mode: Mode::Full,
            repeat: 0,
            snapshots: 0,
            hyperv: Some("user".into()),
            domain: None,
            refusal: None,
            time_limit_s: 60,
        }
    }

    #[test]
    fn the_command_line_names_every_function() {
        let files = Files {
            share: Path::new("/host"),
            scratch: Path::new("/scratch"),
        };
        let command = command(&run(), &files, &BTreeSet::new());
        let words: Vec<_> = command
            .get_args()
            .map(|word| word.to_string_lossy())
            .collect();
        let line = words.join(" ");
        for part in [
            "run --kernel /host/k --initrd /host/i",
            "--cpus 1 --memory 512M",
            "--vpci blk,path=/scratch/disk-1234-00-00.0,queues=2,\
             bus=11111111-1234-4000-8000-000000000001,fn=0,readonly=on",
            "--vpci rng,bus=11111111-0042-4000-8000-000000000002,fn=1",
            "--vpci testdev,bus=11111111-0043-4000-8000-000000000003,fn=0,iommu=on",
            "--vpci vfio,host=0000:00:11.0,bus=11111111-0044-4000-8000-000000000004,fn=2,iommu=on",
            "--hyperv user --report /scratch/report.json",
        ] {
            assert!(line.contains(part), "{line}");
        }
    }

    #[test]
    fn host_devices_are_counted_when_the_guest_asks() {
        vmm_with("echo VPCI-EVENT count 7", 20, |vmm, _| {
            assert_eq!(vmm.failure, None);
            let Counted {
                mark,
                host,
                vectors,
            } = &vmm.counted[0];
            assert_eq!((*mark, host.to_string()), (7, "0000:00:11.0".into()));
            assert!(vectors.is_empty(), "no such device here");
        });
        vmm_with("echo VPCI-EVENT count 256", 20, |vmm, _| {
            assert!(vmm.failure.unwrap().contains("mark"));
        });
    }

    fn vmm_with<T>(script: &str, limit_s: u64, check: impl FnOnce(Vmm<'_>, Result<()>) -> T) -> T {
        let (run, files) = (
            run(),
            Files {
                share: Path::new("/host"),
                scratch: Path::new("/nonexistent"),
            },
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        let mut vmm = Vmm::start(&run, &files, shell).unwrap();
        vmm.follow(Instant::now() + Duration::from_secs(limit_s));
        let end = vmm.reap();
        check(vmm, end)
    }

    #[test]
    fn a_clean_end_is_no_failure() {
        vmm_with("echo hello", 20, |vmm, end| {
            end.unwrap();
            assert_eq!(vmm.failure, None);
            assert!(vmm.guest.is_none());
        });
    }

    #[test]
    fn a_non_zero_status_is_a_failure() {
        vmm_with("exit 3", 20, |_, end| {
            assert!(end.unwrap_err().to_string().contains('3'));
        });
    }

    #[test]
    fn a_vmm_over_its_time_is_stopped() {
        vmm_with("sleep 600", 0, |vmm, end| {
            assert!(vmm.failure.unwrap().contains("not done"));
            assert!(end.unwrap_err().to_string().contains("had to be stopped"));
        });
    }

    #[test]
    fn a_guest_whose_kernel_has_a_fault_has_failed() {
        let script = "echo '[ 6.3] ---[ end trace 0000000000000000 ]---'";
        vmm_with(script, 20, |vmm, _| {
            assert!(vmm.failure.unwrap().contains("fault"));
        });
    }

    #[test]
    fn a_guest_without_a_report_is_quoted() {
        let script = "echo booting; echo 'x VPCI-FAIL no disk'; echo '[ 1.0] reboot'; echo";
        vmm_with(script, 20, |vmm, _| {
            assert!(vmm.guest.is_none());
            assert_eq!(vmm.last_words.unwrap(), "x VPCI-FAIL no disk");
        });
        vmm_with("echo booting; echo; echo loading", 20, |vmm, _| {
            assert_eq!(vmm.last_words.unwrap(), "loading");
        });
    }

    #[test]
    fn bad_reports_and_unknown_events_are_failures() {
        vmm_with(
            "echo 'x VPCI-REPORT {'; echo VPCI-EVENT dance",
            20,
            |vmm, _| {
                assert!(vmm.guest.unwrap().unwrap_err().contains("malformed"));
                assert!(vmm.failure.unwrap().contains("dance"));
            },
        );
        vmm_with("echo VPCI-EVENT grow 1234:00:00.0", 20, |vmm, _| {
            assert!(vmm.failure.unwrap().contains("does not"));
        });
        // The disk is not L1's.
        vmm_with("echo VPCI-EVENT host-unbind 1234:00:00.0", 20, |vmm, _| {
            assert!(vmm.failure.unwrap().contains("no device of L1"));
        });
    }
}
