//! Network controllers: frames that the other end answers, and moves of their interrupts.

use crate::bounded::Worker;
use crate::disk::Latency;
use crate::interrupts;
use crate::moves::{self, Movable};
use crate::packet::PacketSocket;
use crate::pci::Found;
use crate::system::{read_text, wait_for, write_text};
use anyhow::{Context, Result, bail};
use guest_images::report::{MoveReport, NetMoves, NetReport, VectorCounts};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Limit for the link to come up; the emulated controller takes half a second to negotiate.
const LINK_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for an answer before it counts as lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// The same with what the worker adds to it.
const WORKER_LIMIT: Duration = Duration::from_secs(15);
/// Moves of each interrupt while frames go on.
const STORM: usize = 30;
/// Pause between two of them.
const STORM_PAUSE: Duration = Duration::from_millis(10);

/// Vectors whose interrupts are moved (`drivers/net/ethernet/intel/e1000e/netdev.c`,
/// e1000_request_msix).
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;

/// Interface flags: up, broadcast, multicast.
const UP: &str = "0x1003";
const ARP: u16 = 0x0806;
/// Addresses in QEMU's own network: of the guest, by the network's rules, and of its gateway, which
/// answers.
const OWN: [u8; 4] = [10, 0, 2, 15];
const GATEWAY: [u8; 4] = [10, 0, 2, 2];

/// A network interface that is up.
#[derive(Debug)]
pub(crate) struct Net {
    function: Found,
    name: String,
    worker: Worker<(), Duration>,
    answers: u64,
    latency: Latency,
    /// The vector that moves.
    moving: u32,
}

impl Net {
    /// Brings the interface of a controller up.
    pub(crate) fn open(function: &Found) -> Result<Self> {
        let name = function
            .interface()
            .with_context(|| format!("{}: no network interface", function.address))?;
        let folder = PathBuf::from("/sys/class/net").join(&name);
        // Nobody but this program is to send anything.
        let ipv6 = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        if std::path::Path::new(&ipv6).exists() {
            write_text(ipv6, "1")?;
        }
        write_text(folder.join("flags"), UP)?;
        let up = || {
            // Reading it is an error as long as the interface is down.
            let carrier = read_text(folder.join("carrier")).unwrap_or_default();
            Ok((carrier == "1").then_some(()))
        };
        wait_for(&format!("link of {name}"), LINK_LIMIT, up)?;
        let address = read_text(folder.join("address"))?;
        let address = hardware_address(&address).with_context(|| format!("address {address}"))?;
        let index = read_text(folder.join("ifindex"))?;
        let socket = PacketSocket::open(index.parse().context("ifindex")?, ARP, ANSWER_LIMIT)?;
        let worker = Worker::start(format!("frame on {name}"), move |()| ask(&socket, address));
        Ok(Self {
            function: function.clone(),
            name,
            worker,
            answers: 0,
            latency: Latency::default(),
            moving: RECEIVE,
        })
    }

    /// Moves the interrupts of both queues over `cpus`; gives the number of requests.
    pub(crate) fn move_over(&mut self, cpus: &[u32], list: &mut Vec<NetMoves>) -> Result<u64> {
        let mut requests = 0;
        for index in [RECEIVE, TRANSMIT] {
            self.moving = index;
            let mut moves: Vec<MoveReport> = Vec::new();
            requests += moves::over(self, cpus, &mut moves)?;
            list.push(NetMoves { index, moves });
        }
        Ok(requests)
    }

    /// Moves both interrupts to and fro while frames go on; gives moves and answers.
    pub(crate) fn storm(&mut self, cpus: &[u32]) -> Result<(u32, u64)> {
        let irqs: Vec<u32> = interrupts::vectors(&self.function)?
            .iter()
            .filter(|vector| [RECEIVE, TRANSMIT].contains(&vector.index))
            .map(|vector| vector.irq)
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, cpus) = (Arc::clone(&stop), cpus.to_vec());
        let mover = std::thread::spawn(move || {
            let mut moves = 0;
            for step in 0..STORM {
                if seen.load(Ordering::Relaxed) {
                    break;
                }
                for (place, &irq) in irqs.iter().enumerate() {
                    moves::set(irq, cpus[(step + place) % cpus.len()])?;
                    moves += 1;
                }
                std::thread::sleep(STORM_PAUSE);
            }
            Ok::<_, anyhow::Error>(moves)
        });
        let before = self.answers;
        while !mover.is_finished() {
            if let Err(error) = self.request() {
                stop.store(true, Ordering::Relaxed);
                return Err(error.context("while its interrupts moved"));
            }
        }
        match mover.join() {
            Ok(moves) => Ok((moves?, self.answers - before)),
            Err(_) => bail!("the thread that moves interrupts panicked"),
        }
    }

    pub(crate) fn report(self, moves: Vec<NetMoves>, storm: (u32, u64)) -> NetReport {
        NetReport {
            address: self.function.address,
            name: self.name,
            answers: self.answers,
            max_latency_us: self.latency.max_us,
            moves,
            storm_moves: storm.0,
            storm_answers: storm.1,
        }
    }
}

impl Movable for Net {
    fn vector(&self) -> Result<VectorCounts> {
        let mut vectors = interrupts::vectors(&self.function)?.into_iter();
        let found = vectors.find(|vector| vector.index == self.moving);
        found.with_context(|| format!("{}: no vector {}", self.function.address, self.moving))
    }

    /// A frame and its answer.
    fn request(&mut self) -> Result<()> {
        let took = self.worker.ask((), WORKER_LIMIT)?;
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.latency.max_us = self.latency.max_us.max(micros);
        self.answers += 1;
        Ok(())
    }
}

/// Asks the gateway for its hardware address; gives the time until it answers.
fn ask(socket: &PacketSocket, own: [u8; 6]) -> Result<Duration> {
    let start = Instant::now();
    socket.send(&question(own)).context("send")?;
    loop {
        let mut frame = [0; 2048];
        let length = socket.receive(&mut frame).context("no answer")?;
        if is_answer(&frame[..length], own) {
            return Ok(start.elapsed());
        }
        if start.elapsed() > ANSWER_LIMIT {
            bail!("no answer among other frames");
        }
    }
}

/// An ARP request in an Ethernet frame of the least length (RFC 826).
fn question(own: [u8; 6]) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&own);
    frame[12..14].copy_from_slice(&ARP.to_be_bytes());
    // Ethernet and IPv4, with the lengths of their addresses; a request.
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&own);
    frame[28..32].copy_from_slice(&OWN);
    frame[38..42].copy_from_slice(&GATEWAY);
    frame
}

fn is_answer(frame: &[u8], own: [u8; 6]) -> bool {
    frame.len() >= 42
        && frame[..6] == own
        && frame[12..14] == ARP.to_be_bytes()
        && frame[20..22] == [0, 2]
        && frame[28..32] == GATEWAY
}

/// Reads `52:54:00:12:34:56`.
fn hardware_address(text: &str) -> Option<[u8; 6]> {
    let mut address = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut address {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

    #[test]
    fn hardware_addresses_are_read_as_the_kernel_writes_them() {
        assert_eq!(hardware_address("52:54:00:12:34:56"), Some(MAC));
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:xx",
        ] {
            assert_eq!(hardware_address(text), None, "{text}");
        }
    }

    #[test]
    fn a_question_is_no_answer_and_an_answer_is_one() {
        let mut frame = question(MAC);
        assert!(!is_answer(&frame, MAC));
        // As the gateway turns it round.
        frame.copy_within(6..12, 0);
        frame[21] = 2;
        frame[28..32].copy_from_slice(&GATEWAY);
        assert!(is_answer(&frame, MAC));
        assert!(!is_answer(&frame[..41], MAC));
        assert!(!is_answer(&frame, [1; 6]));
    }
}
