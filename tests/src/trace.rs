//! What guest and host exchanged last, for the report of a check that fails.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::decode;
use crate::guest::{Call, Fault};

/// Exchanges that are kept.
const KEPT: usize = 32;

/// One exchange.
#[derive(Debug, Clone)]
pub enum Event {
    /// CPUID.
    Cpuid {
        /// VP.
        vp: u32,
        /// EAX on input.
        leaf: u32,
        /// What came.
        result: Result<[u32; 4], Fault>,
    },
    /// RDMSR.
    ReadMsr {
        /// VP.
        vp: u32,
        /// Number.
        msr: u32,
        /// What came.
        result: Result<u64, Fault>,
    },
    /// WRMSR.
    WriteMsr {
        /// VP.
        vp: u32,
        /// Number.
        msr: u32,
        /// Value.
        value: u64,
        /// What came.
        result: Result<(), Fault>,
    },
    /// A hypercall.
    Hypercall {
        /// VP.
        vp: u32,
        /// Registers before.
        call: Box<Call>,
        /// Input in memory, as far as it is RAM and of a call that is known here.
        input: Vec<u8>,
        /// RAX.
        result: Result<u64, Fault>,
    },
    /// A load from an address that is not RAM.
    MmioRead {
        /// VP.
        vp: u32,
        /// Address.
        gpa: u64,
        /// Bytes.
        width: usize,
        /// What came.
        result: Result<u64, Fault>,
    },
    /// A store to an address that is not RAM.
    MmioWrite {
        /// VP.
        vp: u32,
        /// Address.
        gpa: u64,
        /// Bytes.
        width: usize,
        /// Value.
        value: u64,
        /// What came.
        result: Result<(), Fault>,
    },
    /// An interrupt arrived.
    Interrupt {
        /// VP.
        vp: u32,
        /// Vector.
        vector: u8,
    },
    /// A SynIC message was taken.
    Message {
        /// VP.
        vp: u32,
        /// SINT.
        sint: u8,
        /// Payload.
        payload: Vec<u8>,
    },
    /// A packet was put on a ring, or taken from one.
    Packet {
        /// True for guest to host.
        sent: bool,
        /// Packet type.
        kind: u16,
        /// Transaction id.
        id: u64,
        /// Payload.
        payload: Vec<u8>,
    },
    /// Anything else, such as what the operator did.
    Note(String),
}

/// The last exchanges. The same access again and again, such as a poll, counts as one.
#[derive(Debug, Default)]
pub struct Trace(Mutex<VecDeque<(String, u32)>>);

impl Trace {
    /// Adds an exchange.
    pub fn add(&self, event: &Event) {
        let text = event.to_string();
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, count)) = events.back_mut()
            && *last == text
        {
            *count += 1;
            return;
        }
        if events.len() == KEPT {
            events.pop_front();
        }
        events.push_back((text, 1));
    }

    /// The exchanges, oldest first, one line each.
    pub fn lines(&self) -> Vec<String> {
        let events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events
            .iter()
            .map(|(text, count)| match count {
                1 => text.clone(),
                _ => format!("{text} ({count} times)"),
            })
            .collect()
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpuid { vp, leaf, result } => {
                write!(f, "vp {vp}: CPUID {leaf:#010x} -> ")?;
                match result {
                    Ok([eax, ebx, ecx, edx]) => {
                        write!(f, "{eax:#010x} {ebx:#010x} {ecx:#010x} {edx:#010x}")
                    }
                    Err(fault) => write!(f, "{fault}"),
                }
            }
            Self::ReadMsr { vp, msr, result } => {
                let name = decode::msr(*msr);
                write!(f, "vp {vp}: RDMSR {name} -> {}", value(result))
            }
            Self::WriteMsr {
                vp,
                msr,
                value,
                result,
            } => {
                let name = decode::msr(*msr);
                write!(
                    f,
                    "vp {vp}: WRMSR {name} <- {value:#x}{}",
                    unless_ok(result)
                )
            }
            Self::Hypercall {
                vp,
                call,
                input,
                result,
            } => {
                write!(f, "vp {vp}: {} -> ", decode::hypercall(call, input))?;
                match result {
                    Ok(rax) => f.write_str(&decode::result(*rax)),
                    Err(fault) => write!(f, "{fault}"),
                }
            }
            Self::MmioRead {
                vp,
                gpa,
                width,
                result,
            } => write!(f, "vp {vp}: load {width} at {gpa:#x} -> {}", value(result)),
            Self::MmioWrite {
                vp,
                gpa,
                width,
                value,
                result,
            } => {
                let fault = unless_ok(result);
                write!(f, "vp {vp}: store {width} at {gpa:#x} <- {value:#x}{fault}")
            }
            Self::Interrupt { vp, vector } => write!(f, "vp {vp}: interrupt {vector:#x}"),
            Self::Message { vp, sint, payload } => {
                write!(f, "vp {vp}: SINT{sint} message: {}", decode::vmbus(payload))
            }
            Self::Packet {
                sent,
                kind,
                id,
                payload,
            } => {
                let direction = if *sent {
                    "guest -> host"
                } else {
                    "host -> guest"
                };
                let what = decode::packet(*kind, *sent, payload);
                write!(f, "ring {direction}, id {id:#x}: {what}")
            }
            Self::Note(text) => f.write_str(text),
        }
    }
}

fn value(result: &Result<u64, Fault>) -> String {
    match result {
        Ok(value) => format!("{value:#x}"),
        Err(fault) => fault.to_string(),
    }
}

fn unless_ok(result: &Result<(), Fault>) -> String {
    match result {
        Ok(()) => String::new(),
        Err(fault) => format!(" -> {fault}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polls_count_as_one_and_the_oldest_exchanges_go_first() {
        let trace = Trace::default();
        for vector in 0..40 {
            for _ in 0..3 {
                trace.add(&Event::Interrupt { vp: 0, vector });
            }
        }
        let lines = trace.lines();
        assert_eq!(lines.len(), KEPT);
        assert_eq!(lines[0], "vp 0: interrupt 0x8 (3 times)");
        assert_eq!(lines[KEPT - 1], "vp 0: interrupt 0x27 (3 times)");
    }
}
