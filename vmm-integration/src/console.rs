//! The user's terminal as the other end of the guest's serial port.
#![allow(unsafe_code)]

use std::io::{self, IsTerminal, Stdin, Stdout};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::ports::{Ports, SerialPortState};

/// The serial port's interrupt, an irqfd.
#[derive(Debug)]
pub(crate) struct SerialIrq(pub(crate) EventFd);

impl Trigger for SerialIrq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the input side that the guest has emptied the receive FIFO.
#[derive(Debug)]
pub(crate) struct RoomEvent(EventFd);

impl SerialEvents for RoomEvent {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if let Err(error) = self.0.write(1) {
            log::warn!("console input stalls: {error}");
        }
    }
}

/// The ports with the serial port on the terminal.
pub(crate) type ConsolePorts = Ports<SerialIrq, Stdout, RoomEvent>;

/// Makes the ports, and the pump that brings the terminal's input to them. The serial port goes on
/// where it was saved, or starts anew.
///
/// # Errors
///
/// No event descriptor to be had, or [`io::ErrorKind::InvalidData`] for a state that no serial port
/// can be in.
pub(crate) fn console(
    irq: EventFd,
    saved: Option<&SerialPortState>,
) -> io::Result<(Arc<ConsolePorts>, InputPump)> {
    let room = EventFd::new(EFD_NONBLOCK)?;
    let state = saved.map_or_else(SerialState::default, SerialState::from);
    let events = RoomEvent(room.try_clone()?);
    let serial = Serial::from_state(&state, SerialIrq(irq), events, io::stdout())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{error:?}")))?;
    let ports = Arc::new(Ports::new(serial));
    let pump = InputPump {
        ports: ports.clone(),
        stdin: io::stdin(),
        room,
        listening: false,
        unpollable: false,
    };
    Ok((ports, pump))
}

/// Copies standard input to the serial port, no faster than the guest reads it.
#[derive(Debug)]
pub(crate) struct InputPump {
    ports: Arc<ConsolePorts>,
    stdin: Stdin,
    room: EventFd,
    listening: bool,
    unpollable: bool,
}

impl InputPump {
    fn events(&self) -> Events {
        Events::new(&self.stdin, EventSet::IN)
    }

    /// Moves what fits. False at the end of the input.
    fn pump(&mut self, ops: &mut EventOps) -> bool {
        let mut serial = self.ports.serial();
        let mut buffer = [0; 64];
        let fits = serial.fifo_capacity().min(buffer.len());
        if fits == 0 {
            drop(serial);
            self.listen(ops, false);
            return true;
        }
        let count = match read_once(self.stdin.as_raw_fd(), &mut buffer[..fits]) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(error) => {
                log::warn!("console input ends: {error}");
                return false;
            }
        };
        if let Err(error) = serial.enqueue_raw_bytes(&buffer[..count]) {
            log::warn!("console input lost: {error:?}");
        }
        true
    }

    fn listen(&mut self, ops: &mut EventOps, on: bool) {
        if self.listening == on || self.unpollable {
            return;
        }
        let result = if on {
            ops.add(self.events())
        } else {
            ops.remove(self.events())
        };
        match result {
            Ok(()) => self.listening = on,
            // Files and /dev/null cannot be waited for: the guest gets no input then.
            Err(error) => {
                self.unpollable = true;
                log::debug!("no console input: {error}");
            }
        }
    }
}

impl MutEventSubscriber for InputPump {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.room.as_raw_fd() {
            // Fails only when nothing was written.
            let _ = self.room.read();
            self.listen(ops, true);
        } else if !self.pump(ops) {
            self.listen(ops, false);
            // Without this a later "room" would start listening again.
            if let Err(error) = ops.remove(Events::new(&self.room, EventSet::IN)) {
                log::debug!("console: {error}");
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.room, EventSet::IN)) {
            log::warn!("no console input: {error}");
            return;
        }
        self.listen(ops, true);
    }
}

/// One `read`, past the buffer of [`io::Stdin`], which would hide that more is waiting.
fn read_once(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length describe `buffer`, which lives over the call.
    let count = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// The terminal in raw mode, except that Ctrl-C still ends the VMM. Restored when dropped.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    fd: RawFd,
    saved: libc::termios,
}

impl RawTerminal {
    /// Changes the terminal of standard input; nothing if it is none.
    pub(crate) fn enter() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let fd = stdin.as_raw_fd();
        // SAFETY: termios is plain data, for which all zeroes is a valid value.
        let mut saved: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `saved` is valid for writes.
        if unsafe { libc::tcgetattr(fd, &mut saved) } != 0 {
            return None;
        }
        let mut raw = saved;
        raw.c_lflag &= !(libc::ICANON | libc::ECHO | libc::IEXTEN);
        raw.c_iflag &= !(libc::ICRNL | libc::INLCR | libc::IXON);
        set_terminal(fd, &raw).then_some(Self { fd, saved })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        set_terminal(self.fd, &self.saved);
    }
}

fn set_terminal(fd: RawFd, mode: &libc::termios) -> bool {
    // SAFETY: `mode` is a valid termios for the time of the call.
    unsafe { libc::tcsetattr(fd, libc::TCSANOW, mode) == 0 }
}
