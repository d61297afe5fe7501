//! Traffic of several threads on a disk while interrupts move.

use crate::disk::{BLOCK, Buffer, Disk, Latency};
use crate::pci;
use crate::rng::Rng;
use crate::system::{read_text, step, wait_for, write_text};
use anyhow::{Context, Result, bail};
use guest_images::pattern::{Pattern, mix};
use guest_images::report::LoadReport;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Blocks that one thread uses.
const BLOCKS_PER_THREAD: u64 = 256;
/// Times each CPU is taken offline and online.
const CYCLES: usize = 3;
/// Traffic before, between and after those changes.
const PAUSE: Duration = Duration::from_millis(300);
/// Limit of a change of a CPU's state.
const CPU_LIMIT: Duration = Duration::from_secs(30);
/// Limit for any request to end while the threads end; one that takes longer is lost.
const JOIN_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    running: AtomicU64,
    requests: AtomicU64,
    /// Blocks that are back as they were before the load.
    done: AtomicU64,
    bad: AtomicU64,
    max_latency_us: AtomicU64,
}

/// How often traffic that is left alone says how far it is.
const SIGN_OF_LIFE: Duration = Duration::from_secs(20);

/// Runs the traffic; meanwhile takes each of `cpus` but the first offline and online again, and
/// moves the interrupts of `rngs`, and then leaves it alone for as long as `calm`. The disk holds
/// `generation` afterwards as before.
pub(crate) fn run(
    disk: &Disk,
    generation: u64,
    cpus: &[u32],
    rngs: &mut [Rng],
    calm: Duration,
) -> Result<LoadReport> {
    let threads = (cpus.len() as u64 * 2).max(2);
    let load = Load::start(disk, generation, threads, !disk.readonly()?);
    match disturb(cpus, rngs) {
        Ok((cycles, moves)) => {
            let end = Instant::now() + calm;
            while let Some(left) = end.checked_duration_since(Instant::now())
                && !left.is_zero()
            {
                step(format!("load: {} requests so far", load.requests()));
                std::thread::sleep(left.min(SIGN_OF_LIFE));
            }
            load.finish(cycles, moves)
        }
        Err(error) => {
            // The first failure is the one to tell.
            let _ = load.finish(Vec::new(), 0);
            Err(error)
        }
    }
}

/// Traffic that is under way.
#[derive(Debug)]
pub(crate) struct Load {
    disk: Disk,
    threads: u64,
    shared: Arc<Shared>,
}

impl Load {
    /// Starts threads that read a disk, which holds `generation`, and also write it if `write`.
    pub(crate) fn start(disk: &Disk, generation: u64, threads: u64, write: bool) -> Self {
        let shared = Arc::new(Shared::default());
        for thread in 0..threads {
            let (disk, shared) = (disk.clone(), Arc::clone(&shared));
            shared.running.fetch_add(1, Ordering::Relaxed);
            std::thread::spawn(move || {
                if let Err(error) = traffic(&disk, generation, thread, write, &shared) {
                    crate::system::say(&format!("vpci: load thread {thread}: {error:#}"));
                    shared.bad.fetch_add(1, Ordering::Relaxed);
                }
                shared.running.fetch_sub(1, Ordering::Relaxed);
            });
        }
        Self {
            disk: disk.clone(),
            threads,
            shared,
        }
    }

    /// Requests completed so far.
    pub(crate) fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Ends the traffic. The disk holds the generation that it held before.
    pub(crate) fn finish(self, cpu_cycles: Vec<u32>, moves: u32) -> Result<LoadReport> {
        let shared = &self.shared;
        shared.stop.store(true, Ordering::Relaxed);
        let mut progress = (Instant::now(), 0);
        while shared.running.load(Ordering::Relaxed) > 0 {
            let done = shared.done.load(Ordering::Relaxed);
            if done != progress.1 {
                progress = (Instant::now(), done);
            }
            if progress.0.elapsed() > JOIN_LIMIT {
                bail!("{}: a request under load does not end", self.disk.name);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(LoadReport {
            address: self.disk.address(),
            threads: self.threads as u32,
            requests: shared.requests.load(Ordering::Relaxed),
            bad: shared.bad.load(Ordering::Relaxed),
            max_latency_us: shared.max_latency_us.load(Ordering::Relaxed),
            cpu_cycles,
            moves,
        })
    }
}

/// One thread's requests: random blocks of its own part of the disk, read and checked or written.
fn traffic(disk: &Disk, generation: u64, thread: u64, write: bool, shared: &Shared) -> Result<()> {
    let file = disk.direct(write)?;
    // The first block carries the disk's label, which must never name another generation.
    let first = 1 + thread * BLOCKS_PER_THREAD;
    if (first + BLOCKS_PER_THREAD) * BLOCK as u64 > disk.size()? {
        bail!("{}: too small for the load", disk.name);
    }
    // Blocks go to generations of the load's own and back to the disk's at the end.
    let mut generations = vec![generation; BLOCKS_PER_THREAD as usize];
    let mut buffer = Buffer::new(BLOCK);
    let mut latency = Latency::default();
    let mut state = mix(thread);
    while !shared.stop.load(Ordering::Relaxed) {
        state = mix(state);
        let index = state % BLOCKS_PER_THREAD;
        let offset = (first + index) * BLOCK as u64;
        let now = &mut generations[index as usize];
        if write && state >> 63 == 1 {
            *now = state >> 32;
            Pattern::new(disk.address(), *now).fill(offset, &mut buffer);
            latency.of(|| file.write_all_at(&buffer, offset))?;
        } else {
            latency.of(|| file.read_exact_at(&mut buffer, offset))?;
            if Pattern::new(disk.address(), *now)
                .mismatch(offset, &buffer)
                .is_some()
            {
                shared.bad.fetch_add(1, Ordering::Relaxed);
            }
        }
        shared.requests.fetch_add(1, Ordering::Relaxed);
        shared
            .max_latency_us
            .fetch_max(latency.max_us, Ordering::Relaxed);
    }
    if write {
        let pattern = Pattern::new(disk.address(), generation);
        for block in first..first + BLOCKS_PER_THREAD {
            let offset = block * BLOCK as u64;
            pattern.fill(offset, &mut buffer);
            file.write_all_at(&buffer, offset)?;
            shared.done.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn disturb(cpus: &[u32], rngs: &mut [Rng]) -> Result<(Vec<u32>, u32)> {
    let mut cycles = Vec::new();
    let mut moves = 0;
    std::thread::sleep(PAUSE);
    for _ in 0..CYCLES {
        for rng in rngs.iter_mut() {
            for &cpu in cpus {
                let report = rng.move_to(cpu)?;
                if report.on_new_cpu == 0 {
                    bail!(
                        "{}: no interrupt on CPU {cpu} under load",
                        rng.function.address
                    );
                }
                moves += 1;
            }
        }
        // CPU 0 stays: VMBus keeps its connection there.
        for &cpu in cpus.iter().filter(|&&cpu| cpu != 0) {
            release_channels(cpu)?;
            set_online(cpu, false)?;
            std::thread::sleep(PAUSE);
            set_online(cpu, true)?;
            std::thread::sleep(PAUSE);
            cycles.push(cpu);
        }
    }
    std::thread::sleep(PAUSE);
    Ok((cycles, moves))
}

fn set_online(cpu: u32, online: bool) -> Result<()> {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
    let word = if online { "1" } else { "0" };
    let what = format!("CPU {cpu} {}", if online { "online" } else { "offline" });
    let target = path.clone();
    crate::bounded::bounded(&what, CPU_LIMIT, move || write_text(&target, word))?;
    wait_for(&what, CPU_LIMIT, || {
        Ok((read_text(&path)? == word).then_some(()))
    })
}

/// Moves the VMBus channels of a CPU to CPU 0: a CPU that channels interrupt cannot go offline.
fn release_channels(cpu: u32) -> Result<()> {
    let devices = Path::new("/sys/bus/vmbus/devices");
    if !devices.exists() {
        return Ok(());
    }
    for device in pci::names(devices)? {
        let channels = devices.join(device).join("channels");
        if !channels.exists() {
            continue;
        }
        for channel in pci::names(&channels)? {
            let target = channels.join(channel).join("cpu");
            if read_text(&target)? == cpu.to_string() {
                write_text(&target, "0").context("move a VMBus channel")?;
            }
        }
    }
    Ok(())
}
