//! The role in the guest under test: exercise its PCI functions and report what was seen.

use crate::disk::Disk;
use crate::edu::Edu;
use crate::load::Load;
use crate::marks::{Marker, Span};
use crate::net::Net;
use crate::pci::{self, Found};
use crate::rng::Rng;
use crate::system::{self, online_cpus, say, step, write_text};
use crate::{
    End, capacity, dma, hotplug, interrupts, kexec, kmsg, load, map_benchmark, rebind, vfio_user,
};
use anyhow::{Context, Result};
use guest_images::report::{
    DmaTest, FAIL_PREFIX, GuestReport, KmsgReport, REPORT_PREFIX, REPORT_VERSION, Work,
};
use guest_images::scenario::{Expected, GuestParams, Kind, Mode, VFIO_CYCLES};
use std::time::Duration;

/// Longest wait for the expected functions.
const PROBE_LIMIT: Duration = Duration::from_secs(40);

/// Runs the role to its report.
pub(crate) fn run(cmdline: &str) -> Result<End> {
    let params: GuestParams = cmdline.parse().map_err(anyhow::Error::msg)?;
    system::start_watchdog(Duration::from_secs(params.time_limit_s));
    let mut guest = Guest {
        params,
        report: empty_report(),
    };
    let end = match guest.work() {
        Ok(end @ (End::Reset | End::Kexec)) => {
            say("vpci: reset");
            return Ok(end);
        }
        Ok(end) => {
            guest.report.complete = true;
            end
        }
        Err(error) => {
            say(&format!("{FAIL_PREFIX}{error:#}"));
            system::show_blocked();
            guest.report.failures.push(format!("{error:#}"));
            End::PowerOff
        }
    };
    if let Err(error) = guest.finish() {
        guest.report.failures.push(format!("{error:#}"));
        guest.report.complete = false;
    }
    print(&guest.report)?;
    Ok(end)
}

struct Guest {
    params: GuestParams,
    report: GuestReport,
}

impl Guest {
    fn work(&mut self) -> Result<End> {
        step("load modules");
        let loaded = system::load_modules(|name| is_wanted(name, &self.params.expect))?;
        step(format!(
            "{loaded} modules loaded; wait for the PCI functions"
        ));
        let at_boot = self.at_boot();
        let mut functions = pci::wait_expected(&at_boot, PROBE_LIMIT)?;
        // One for all phases: its marks have numbers of their own.
        let mut marker = Marker::open(self.params.marks, self.params.counted)?;
        let generation = self.check_disks(&functions)?;
        match self.params.mode {
            Mode::Reboot if self.report.boot <= self.params.repeat => return Ok(End::Reset),
            Mode::Kexec if self.report.boot <= self.params.repeat => {
                step("load another kernel");
                kexec::load()?;
                // Its requests are under way when this kernel ends.
                for disk in disks(&functions)? {
                    let threads = online_cpus()?.len() as u64;
                    let load = Load::start(&disk, generation, threads, false);
                    system::wait_for("load on the disks", PROBE_LIMIT, || {
                        Ok((load.requests() > 0).then_some(()))
                    })?;
                }
                return Ok(End::Kexec);
            }
            Mode::Hotplug => {
                let disks = disks(&functions)?;
                let disk = disks.first().context("no disk")?;
                let (expect, repeat) = (&self.params.expect, self.params.repeat);
                let cpus = online_cpus()?.len();
                let (load, cycles) = hotplug::run(disk, generation, expect, repeat, cpus)?;
                self.report.loads.push(load);
                self.report.rebinds.extend(cycles);
                functions = pci::wait_expected(expect, PROBE_LIMIT)?;
                let later = functions.iter().filter(|function| {
                    let known = |item: &Expected| item.address == function.address;
                    !at_boot.iter().any(known)
                });
                let later: Vec<Found> = later.cloned().collect();
                self.check_data(&later, generation - 1, generation)?;
            }
            mode if mode.cycles_buses() => {
                for cycle in 1..=self.params.repeat {
                    let swap = &self.params.swap;
                    let cycle = rebind::cycle(mode, cycle, &functions, swap, generation)?;
                    self.report.rebinds.extend(cycle);
                    functions = pci::wait_expected(&self.params.expect, PROBE_LIMIT)?;
                    if mode == Mode::Surprise {
                        for device in testdevs(&functions) {
                            self.report.dma.extend(dma::run(device, &[DmaTest::Copy])?);
                        }
                    }
                }
            }
            Mode::Dma => {
                for device in testdevs(&functions) {
                    self.report.dma.extend(dma::run(device, &DmaTest::ALL)?);
                }
            }
            Mode::VfioUser => {
                for device in testdevs(&functions) {
                    for _ in 0..VFIO_CYCLES {
                        self.report.dma.extend(dma::run(device, &[DmaTest::Copy])?);
                        self.report.dma.extend(vfio_user::run(device)?);
                    }
                    self.report.dma.extend(dma::run(device, &[DmaTest::Copy])?);
                }
            }
            Mode::MapBenchmark => {
                let edus = of_kind(&functions, Kind::Edu);
                for device in testdevs(&functions).chain(edus) {
                    self.report
                        .maps
                        .extend(map_benchmark::run(device, &mut marker)?);
                }
            }
            _ => {}
        }
        self.count_interrupts(&mut marker, &functions, generation)?;
        Ok(End::PowerOff)
    }

    /// The data check of every disk. Gives the generation that they hold now, which is the number
    /// of this boot.
    fn check_disks(&mut self, functions: &[Found]) -> Result<u64> {
        let disks = disks(functions)?;
        let from = match disks.iter().find(|disk| !disk.readonly().unwrap_or(true)) {
            Some(disk) => disk.generation()?,
            None => 0,
        };
        let to = from + 1;
        self.report.boot = u32::try_from(to).context("generation on the disk")?;
        self.check_data(functions, from, to)?;
        Ok(to)
    }

    fn check_data(&mut self, functions: &[Found], from: u64, to: u64) -> Result<()> {
        for disk in disks(functions)? {
            step(format!("data check of {} ({})", disk.name, disk.address()));
            let from = if disk.readonly()? { 0 } else { from };
            self.report.disks.push(disk.check(from, to)?);
        }
        Ok(())
    }

    /// The functions that are there from the start.
    fn at_boot(&self) -> Vec<Expected> {
        let first = self.params.expect.first().map(|item| item.address.domain);
        let later = self.params.mode == Mode::Hotplug;
        let expect = self.params.expect.iter();
        expect
            .filter(|item| !later || Some(item.address.domain) == first)
            .copied()
            .collect()
    }

    fn count_interrupts(
        &mut self,
        marker: &mut Marker,
        functions: &[Found],
        generation: u64,
    ) -> Result<()> {
        let cpus = online_cpus()?;
        let disks = disks(functions)?;
        self.one_outstanding(marker, &disks, &cpus, generation, "")?;
        self.user_driven(marker, functions, &cpus)?;
        self.networks(marker, functions, &cpus)?;
        let mut rngs = Vec::new();
        let mut moves = Vec::new();
        for function in of_kind(functions, Kind::Rng) {
            step(format!("find the entropy source of {}", function.address));
            let mut rng = Rng::open(function)?;
            let mut list = Vec::new();
            let span = moves_of("rng", function);
            let phase = marker.phase(span, function, || rng.move_over(&cpus, &mut list));
            self.report.phases.push(phase?);
            rngs.push(rng);
            moves.push(list);
        }
        if self.params.mode == Mode::Full {
            for disk in &disks {
                step(format!("load on {} ({})", disk.name, disk.address()));
                let generation = disk_generation(disk, generation)?;
                let calm = Duration::from_secs(self.params.repeat.into());
                let report = load::run(disk, generation, &cpus, &mut rngs, calm)?;
                self.report.loads.push(report);
            }
            self.grow(marker, &disks, generation)?;
            self.one_outstanding(marker, &disks, &cpus, generation, " after load")?;
        }
        for (rng, moves) in rngs.into_iter().zip(moves) {
            self.report.rngs.push(rng.report(moves));
        }
        Ok(())
    }

    /// Educational devices: computing, DMA, moves of their interrupt.
    fn user_driven(
        &mut self,
        marker: &mut Marker,
        functions: &[Found],
        cpus: &[u32],
    ) -> Result<()> {
        let stray = self.params.mode.strays();
        for function in of_kind(functions, Kind::Edu) {
            let mut edu = Edu::open(function)?;
            self.report.dma.extend(edu.dma(stray)?);
            let mut moves = Vec::new();
            let span = moves_of("edu", function);
            let phase = marker.phase(span, function, || edu.move_over(cpus, &mut moves));
            self.report.phases.push(phase?);
            self.report.edus.push(edu.close(moves)?);
        }
        Ok(())
    }

    /// Network controllers: frames, moves of their interrupts.
    fn networks(&mut self, marker: &mut Marker, functions: &[Found], cpus: &[u32]) -> Result<()> {
        for function in of_kind(functions, Kind::E1000e) {
            step(format!("bring up the interface of {}", function.address));
            let mut net = Net::open(function)?;
            let mut moves = Vec::new();
            let span = moves_of("net", function);
            let phase = marker.phase(span, function, || net.move_over(cpus, &mut moves));
            self.report.phases.push(phase?);
            step(format!(
                "frames of {} while interrupts move",
                function.address
            ));
            let storm = net.storm(cpus)?;
            self.report.nets.push(net.report(moves, storm));
        }
        Ok(())
    }

    fn one_outstanding(
        &mut self,
        marker: &mut Marker,
        disks: &[Disk],
        cpus: &[u32],
        generation: u64,
        when: &str,
    ) -> Result<()> {
        for disk in disks {
            let generation = disk_generation(disk, generation)?;
            for &cpu in cpus {
                let kind = disk.function.kind.as_str();
                let name = format!("{kind} {} CPU {cpu}{when}", disk.address());
                let run = || disk.one_at_a_time(cpu, generation);
                let span = Span {
                    name,
                    kind: Work::OneOutstanding,
                    cpu: Some(cpu),
                };
                let phase = marker.phase(span, &disk.function, run);
                self.report.phases.push(phase?);
            }
        }
        Ok(())
    }

    fn grow(&mut self, marker: &mut Marker, disks: &[Disk], generation: u64) -> Result<()> {
        if !self.params.grow {
            return Ok(());
        }
        for disk in disks {
            // Only the disk that the VMM emulates grows.
            if disk.readonly()? || disk.function.kind != Kind::Blk {
                continue;
            }
            let mut seen = None;
            let name = format!("blk {} grow", disk.address());
            let span = Span {
                name,
                kind: Work::Grow,
                cpu: None,
            };
            let phase = marker.phase(span, &disk.function, || {
                seen = Some(capacity::grow(disk)?);
                Ok(1)
            });
            self.report.phases.push(phase?);
            if let Some(mut report) = seen {
                step(format!("data check of the new end of {}", disk.name));
                capacity::use_new_end(disk, generation, &mut report)?;
                self.report.grows.push(report);
            }
        }
        Ok(())
    }

    /// Fills in what is known at the end, also after a failure.
    fn finish(&mut self) -> Result<()> {
        step("report");
        self.report.kernel = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        self.report.mode = self.params.mode;
        self.report.cpus = online_cpus()?.len() as u32;
        self.report.kmsg = kmsg::collect()?;
        for function in pci::list()? {
            self.report.functions.push(function.report()?);
            // Only functions under test have vectors whose names are known.
            if self
                .params
                .expect
                .iter()
                .any(|expected| expected.address == function.address)
            {
                self.report.vectors.extend(interrupts::vectors(&function)?);
            }
        }
        self.report.uptime_s = system::uptime();
        Ok(())
    }
}

/// Whether a module is of use: those for host devices take their time, and few guests have one.
fn is_wanted(module: &str, expect: &[Expected]) -> bool {
    let expects = |kind| expect.iter().any(|expected| expected.kind == kind);
    match module {
        "e1000e" => expects(Kind::E1000e),
        name if name.starts_with("nvme") => expects(Kind::Nvme),
        _ => true,
    }
}

/// A read-only disk stays at what the rig put there.
fn disk_generation(disk: &Disk, generation: u64) -> Result<u64> {
    Ok(if disk.readonly()? { 0 } else { generation })
}

fn testdevs(functions: &[Found]) -> impl Iterator<Item = &Found> {
    of_kind(functions, Kind::Testdev)
}

fn of_kind(functions: &[Found], kind: Kind) -> impl Iterator<Item = &Found> {
    let mut all = functions.iter();
    std::iter::from_fn(move || all.find(|function| function.kind == kind))
}

/// The span in which interrupts of a function move.
fn moves_of(what: &str, function: &Found) -> Span {
    Span {
        name: format!("{what} {} moves", function.address),
        kind: Work::Moves,
        cpu: None,
    }
}

fn disks(functions: &[Found]) -> Result<Vec<Disk>> {
    functions
        .iter()
        .filter(|function| matches!(function.kind, Kind::Blk | Kind::Nvme))
        .map(Disk::open)
        .collect()
}

fn empty_report() -> GuestReport {
    GuestReport {
        version: REPORT_VERSION,
        kernel: String::new(),
        mode: Mode::Full,
        boot: 0,
        cpus: 0,
        uptime_s: 0.0,
        functions: Vec::new(),
        disks: Vec::new(),
        rngs: Vec::new(),
        nets: Vec::new(),
        edus: Vec::new(),
        phases: Vec::new(),
        loads: Vec::new(),
        grows: Vec::new(),
        rebinds: Vec::new(),
        dma: Vec::new(),
        maps: Vec::new(),
        vectors: Vec::new(),
        kmsg: KmsgReport {
            records: 0,
            noteworthy: 0,
            lost: 0,
            lines: Vec::new(),
        },
        failures: Vec::new(),
        complete: false,
    }
}

/// Prints the report line with the kernel's own messages kept off the console.
fn print(report: &GuestReport) -> Result<()> {
    if let Err(error) = write_text("/proc/sys/kernel/printk", "1") {
        say(&format!(
            "vpci: kernel messages may cut the report: {error:#}"
        ));
    }
    let json = serde_json::to_string(report).context("report")?;
    // Starts on a line of its own, whatever the kernel has left on the last one.
    say(&format!("\n{REPORT_PREFIX}{json}"));
    Ok(())
}
