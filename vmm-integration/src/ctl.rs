//! `vpci-vmm ctl`: one request to a VM that runs, and its reply.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::api::{
    Answer, BusStatus, Ejection, FunctionStatus, Listing, MachineState, Reply, Request,
};
use crate::cli::{CtlArgs, CtlVerb};
use crate::print::print;

/// Exit status where the VM refuses.
const REFUSED: u8 = 1;
/// Exit status where the reply cannot be printed.
const UNPRINTED: u8 = 1;
/// Exit status where no VM answers.
const NO_VM: u8 = 3;

/// Longest reply: a listing names each vector of each function.
const MAX_REPLY: u64 = 1 << 28;

/// Carries the command out and gives the exit status.
pub(crate) fn ctl(args: &CtlArgs) -> u8 {
    let reply = match ask(&args.socket, &request(&args.verb)) {
        Ok(reply) => reply,
        Err(error) => {
            let socket = args.socket.display();
            eprintln!(
                "vpci-vmm: --socket {socket}: {error}: is it the --api-socket of a VM that runs?"
            );
            return NO_VM;
        }
    };
    let status = match &reply {
        Reply::Result(_) => 0,
        Reply::Error(_) => REFUSED,
    };
    if args.json {
        // The reply came as JSON, so it can be written as such.
        let json = serde_json::to_string_pretty(&reply).unwrap_or_default();
        return printed(&(json + "\n"), status);
    }
    match reply {
        Reply::Result(answer) => printed(&text(&answer), status),
        Reply::Error(refusal) => {
            eprintln!("vpci-vmm: {}", refusal.message);
            status
        }
    }
}

/// Prints what was asked for. The VM has done it whether or not that works.
fn printed(text: &str, status: u8) -> u8 {
    match print(text) {
        Ok(()) => status,
        Err(error) => {
            eprintln!("vpci-vmm: the reply cannot be printed: {error}");
            UNPRINTED
        }
    }
}

fn request(verb: &CtlVerb) -> Request {
    match verb {
        CtlVerb::List => Request::List,
        CtlVerb::Plug { specs } => Request::Plug {
            specs: specs.clone(),
        },
        CtlVerb::Eject {
            bus,
            function,
            no_wait,
            timeout,
        } => Request::Eject {
            bus: bus.to_string(),
            function: *function,
            timeout_s: *timeout,
            wait: !no_wait,
        },
        CtlVerb::Remove { bus, function, .. } => Request::Remove {
            bus: bus.to_string(),
            function: *function,
        },
        CtlVerb::Pause => Request::Pause,
        CtlVerb::Resume => Request::Resume,
        // The VM has another working directory, most likely.
        CtlVerb::Snapshot { path } => Request::Snapshot {
            path: std::path::absolute(path)
                .unwrap_or_else(|_| path.clone())
                .to_string_lossy()
                .into_owned(),
        },
        CtlVerb::Quit => Request::Quit,
    }
}

fn ask(socket: &Path, request: &Request) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reply = String::new();
    BufReader::new(stream.take(MAX_REPLY)).read_line(&mut reply)?;
    if reply.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&reply)?)
}

/// The answer for people.
fn text(answer: &Answer) -> String {
    match answer {
        Answer::List(listing) => listing_text(listing),
        Answer::Plugged { plugged } => format!("plugged in bus {plugged}\n"),
        Answer::Removed { removed, function } => {
            format!("{} is gone\n", target_text(removed, *function))
        }
        Answer::Saved { snapshot, bytes } => format!(
            "saved to {snapshot} ({} MiB); the machine is paused: quit it, or resume it\n",
            bytes >> 20
        ),
        Answer::State { state } => format!("the machine is {}\n", state_text(*state)),
        Answer::Ejected {
            ejected,
            function,
            how,
        } => {
            let target = target_text(ejected, *function);
            match how {
                Ejection::Released => format!("the guest let go of {target}; it is gone\n"),
                Ejection::TimedOut => {
                    format!("the guest did not let go of {target} in time; it is gone\n")
                }
                Ejection::Started => format!("the guest has been asked to let go of {target}\n"),
            }
        }
    }
}

fn target_text(bus: &str, function: Option<u8>) -> String {
    match function {
        None => format!("bus {bus}"),
        Some(number) => format!("function {number} of bus {bus}"),
    }
}

fn state_text(state: MachineState) -> &'static str {
    match state {
        MachineState::Running => "running",
        MachineState::Paused => "paused",
        MachineState::Ending => "ending",
    }
}

fn listing_text(listing: &Listing) -> String {
    let mut text = format!("the machine is {}\n", state_text(listing.state));
    // Writing to a string does not fail.
    let _ = listing
        .buses
        .iter()
        .try_for_each(|bus| write_bus(&mut text, bus));
    if let Some(domains) = &listing.domains {
        let _ = writeln!(text, "pvIOMMU: {} domains", domains.len());
        for domain in domains {
            let (number, devices, faults) = (domain.number, domain.devices, domain.faults);
            let _ = writeln!(
                text,
                "  domain {number}: {devices} functions, {faults} faults"
            );
        }
    }
    text
}

fn write_bus(text: &mut String, bus: &BusStatus) -> std::fmt::Result {
    let version = match (&bus.version, bus.open) {
        (Some(version), _) => format!("open, version {version}"),
        (None, true) => "open".to_owned(),
        (None, false) => "not open".to_owned(),
    };
    writeln!(
        text,
        "bus {} (PCI domain {:04x}): {version}",
        bus.bus, bus.domain_hint
    )?;
    bus.functions
        .iter()
        .try_for_each(|function| write_function(text, function))
}

fn write_function(text: &mut String, function: &FunctionStatus) -> std::fmt::Result {
    let raised: u64 = function.vectors.iter().map(|vector| vector.raised).sum();
    write!(
        text,
        "  function {} {:8} id {:#010x}, {} interrupt messages, {raised} interrupts",
        function.function, function.kind, function.logical_id, function.live_messages
    )?;
    if function.iommu {
        write!(text, ", behind the pvIOMMU, {} faults", function.dma_faults)?;
    }
    writeln!(text)?;
    for (index, gpa) in &function.bars {
        writeln!(text, "    BAR {index} at {gpa:#x}")?;
    }
    match &function.last_fault {
        Some(fault) => writeln!(text, "    last fault: {fault}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{DomainReport, VectorReport};

    #[test]
    fn a_listing_shows_every_function() {
        let function = FunctionStatus {
            function: 0,
            kind: "blk".into(),
            logical_id: 0x1234_4000,
            iommu: true,
            bars: [("0".into(), 0x1_0000_0000)].into(),
            live_messages: 2,
            vectors: Vec::new(),
            dma_faults: 1,
            last_fault: Some("read of 0x1000".into()),
        };
        let listing = Listing {
            state: MachineState::Paused,
            buses: vec![BusStatus {
                bus: "b".into(),
                domain_hint: 0x1a2b,
                open: true,
                version: Some("1.4".into()),
                functions: vec![function],
            }],
            domains: Some(vec![DomainReport {
                number: 5,
                devices: 1,
                faults: 1,
            }]),
        };
        // As it comes through the socket.
        let sent = serde_json::to_string(&Reply::Result(Answer::List(listing))).unwrap();
        let Reply::Result(answer) = serde_json::from_str(&sent).unwrap() else {
            panic!("{sent}")
        };
        assert_eq!(
            text(&answer),
            "the machine is paused\n\
             bus b (PCI domain 1a2b): open, version 1.4\n\
             \x20 function 0 blk      id 0x12344000, 2 interrupt messages, 0 interrupts, \
             behind the pvIOMMU, 1 faults\n\
             \x20   BAR 0 at 0x100000000\n\
             \x20   last fault: read of 0x1000\n\
             pvIOMMU: 1 domains\n\
             \x20 domain 5: 1 functions, 1 faults\n"
        );
    }

    #[test]
    fn a_reply_may_be_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let vector = VectorReport {
            index: 0,
            raised: u64::MAX,
            suppressed: 0,
        };
        let function = FunctionStatus {
            function: 0,
            kind: "vfio".into(),
            logical_id: 0,
            iommu: false,
            bars: [].into(),
            live_messages: 0,
            vectors: vec![vector; 2048],
            dma_faults: 0,
            last_fault: None,
        };
        let bus = BusStatus {
            bus: "b".into(),
            domain_hint: 1,
            open: false,
            version: None,
            functions: vec![function; 8],
        };
        let vm = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = String::new();
            BufReader::new(&stream).read_line(&mut request).unwrap();
            let reply = Reply::Result(Answer::List(Listing {
                state: MachineState::Running,
                buses: vec![bus; 4],
                domains: None,
            }));
            let mut line = serde_json::to_vec(&reply).unwrap();
            assert!(line.len() as u64 > crate::api::MAX_LINE);
            line.push(b'\n');
            // A client that reads no further ends the connection.
            let _ = stream.write_all(&line);
        });
        let reply = ask(&path, &Request::List).unwrap();
        assert!(matches!(reply, Reply::Result(Answer::List(listing)) if listing.buses.len() == 4));
        vm.join().unwrap();
    }

    #[test]
    fn answers_name_the_function_that_was_asked_for() {
        let ejected = |function| Answer::Ejected {
            ejected: "b".into(),
            function,
            how: Ejection::Released,
        };
        let expected = "the guest let go of bus b; it is gone\n";
        assert_eq!(text(&ejected(None)), expected);
        let expected = "the guest let go of function 3 of bus b; it is gone\n";
        assert_eq!(text(&ejected(Some(3))), expected);
    }

    #[test]
    fn no_socket_is_an_error_that_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = ask(&dir.path().join("none"), &Request::List).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
