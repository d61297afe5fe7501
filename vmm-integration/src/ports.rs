//! The few I/O ports of the platform.
#![forbid(unsafe_code)]

use std::io::Write;
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::acpi::{RESET_VALUE, SLEEP_TYPE_S5};
use crate::pci_config::{self, PciConfig};
use crate::rtc::{self, Rtc};

/// First port of the serial port (16550A, COM1).
pub(crate) const SERIAL: u16 = 0x3f8;
/// Number of its ports.
pub(crate) const SERIAL_LEN: u8 = 8;
/// Its interrupt (GSI).
pub(crate) const SERIAL_IRQ: u32 = 4;
/// ACPI sleep control register.
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub(crate) const SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register.
pub(crate) const RESET: u16 = 0x602;
/// A byte written here marks a moment in the report.
pub(crate) const MARK: u16 = 0xf4;
/// Command and status port of a keyboard controller; only its reset command is known.
const I8042_COMMAND: u16 = 0x64;
/// Keyboard controller command that pulses the reset line.
const I8042_RESET: u8 = 0xfe;
/// `SLP_EN` of the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;

/// What a write asks of the VM as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PortAction {
    /// Nothing: a device took the write, or there is none.
    None,
    /// Power the VM off.
    PowerOff,
    /// Reset the VM.
    Reset,
    /// Note the counters in the report under this id.
    Mark(u8),
}

/// The ports as plain data.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PortsState {
    /// The serial port.
    pub(crate) serial: SerialPortState,
    /// Address register of configuration mechanism #1.
    pub(crate) pci_address: u32,
    /// Index register of the clock.
    pub(crate) rtc_index: u8,
}

/// Registers of the serial port, and input that the guest has not read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SerialPortState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl From<&SerialPortState> for SerialState {
    fn from(state: &SerialPortState) -> Self {
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        }
    }
}

/// The I/O port space without the hypercall port.
#[derive(Debug)]
pub(crate) struct Ports<T: Trigger, W: Write, E: SerialEvents = NoEvents> {
    serial: Mutex<Serial<T, E, W>>,
    pci: PciConfig,
    rtc: Rtc,
}

impl<T: Trigger, W: Write, E: SerialEvents> Ports<T, W, E> {
    /// Ports around a serial port.
    pub(crate) fn new(serial: Serial<T, E, W>) -> Self {
        Self {
            serial: Mutex::new(serial),
            pci: PciConfig::default(),
            rtc: Rtc::default(),
        }
    }

    /// The ports as plain data.
    pub(crate) fn save(&self) -> PortsState {
        let serial = self.serial().state();
        PortsState {
            serial: SerialPortState {
                baud_divisor_low: serial.baud_divisor_low,
                baud_divisor_high: serial.baud_divisor_high,
                interrupt_enable: serial.interrupt_enable,
                interrupt_identification: serial.interrupt_identification,
                line_control: serial.line_control,
                line_status: serial.line_status,
                modem_control: serial.modem_control,
                modem_status: serial.modem_status,
                scratch: serial.scratch,
                in_buffer: serial.in_buffer,
            },
            pci_address: self.pci.address(),
            rtc_index: self.rtc.index(),
        }
    }

    /// Takes over saved ports, but for the serial port: that is made with its state.
    pub(crate) fn restore(&self, state: &PortsState) {
        self.pci.set_address(state.pci_address);
        self.rtc.write(rtc::INDEX, state.rtc_index);
    }

    /// The serial port, to feed it input.
    pub(crate) fn serial(&self) -> MutexGuard<'_, Serial<T, E, W>> {
        self.serial.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Brings the serial port to its state after power-on, as far as a guest can tell.
    pub(crate) fn reset(&self) {
        const DATA: u8 = 0;
        const INTERRUPT_ENABLE: u8 = 1;
        const LINE_CONTROL: u8 = 3;
        const MODEM_CONTROL: u8 = 4;
        const LINE_STATUS: u8 = 5;
        const DATA_READY: u8 = 1;
        let mut serial = self.serial();
        // Line control first: its top bit gives other registers another meaning.
        for register in [LINE_CONTROL, INTERRUPT_ENABLE, MODEM_CONTROL] {
            if let Err(error) = serial.write(register, 0) {
                log::debug!("serial port: {error:?}");
            }
        }
        while serial.read(LINE_STATUS) & DATA_READY != 0 {
            serial.read(DATA);
        }
    }

    /// Handles an OUT. Byte-wide registers take the first byte of wider writes.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> PortAction {
        let Some(&value) = data.first() else {
            return PortAction::None;
        };
        match port {
            MARK => return PortAction::Mark(value),
            SLEEP_CONTROL if value == SLEEP_ENABLE | SLEEP_TYPE_S5 << 2 => {
                return PortAction::PowerOff;
            }
            RESET if value == RESET_VALUE => return PortAction::Reset,
            I8042_COMMAND if value == I8042_RESET => return PortAction::Reset,
            pci_config::ADDRESS..=pci_config::LAST => self.pci.write(port, data),
            rtc::INDEX | rtc::DATA => self.rtc.write(port, value),
            _ => {}
        }
        if let Some(offset) = serial_offset(port)
            && let Err(error) = self.serial().write(offset, value)
        {
            log::debug!("serial port: {error:?}");
        }
        PortAction::None
    }

    /// Handles an IN. Absent ports read as all ones.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if (pci_config::ADDRESS..=pci_config::LAST).contains(&port) {
            return self.pci.read(port, data);
        }
        let Some(first) = data.first_mut() else {
            return;
        };
        match port {
            SLEEP_CONTROL | SLEEP_STATUS | RESET | I8042_COMMAND => *first = 0,
            rtc::DATA => *first = self.rtc.read(),
            _ => {
                if let Some(offset) = serial_offset(port) {
                    *first = self.serial().read(offset);
                }
            }
        }
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL)?;
    u8::try_from(offset).ok().filter(|o| *o < SERIAL_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct NoIrq;
    impl Trigger for NoIrq {
        type E = std::io::Error;
        fn trigger(&self) -> Result<(), Self::E> {
            Ok(())
        }
    }

    fn ports() -> Ports<NoIrq, Vec<u8>> {
        Ports::new(Serial::new(NoIrq, Vec::new()))
    }

    #[test]
    fn only_the_s5_sleep_type_powers_off() {
        let ports = ports();
        assert_eq!(ports.write(SLEEP_CONTROL, &[0x34]), PortAction::PowerOff);
        for other in [0, 0x20, 0x14, 0x24] {
            assert_eq!(ports.write(SLEEP_CONTROL, &[other]), PortAction::None);
        }
    }

    #[test]
    fn both_ways_to_reset_are_known() {
        let ports = ports();
        assert_eq!(ports.write(RESET, &[1]), PortAction::Reset);
        assert_eq!(ports.write(RESET, &[0]), PortAction::None);
        assert_eq!(ports.write(0x64, &[0xfe]), PortAction::Reset);
        assert_eq!(ports.write(0x64, &[0xaa]), PortAction::None);
    }

    #[test]
    fn serial_output_arrives_and_input_is_read_back() {
        let ports = ports();
        for byte in b"hi" {
            ports.write(SERIAL, &[*byte]);
        }
        assert_eq!(ports.serial().writer(), b"hi");
        ports.serial().enqueue_raw_bytes(b"x").unwrap();
        let mut byte = [0];
        ports.read(SERIAL, &mut byte);
        assert_eq!(byte, *b"x");
    }

    #[test]
    fn a_reset_drops_input_and_interrupts() {
        let ports = ports();
        ports.write(SERIAL + 3, &[0x83]);
        ports.write(SERIAL, &[0x01]);
        ports.write(SERIAL + 3, &[0x03]);
        ports.write(SERIAL + 1, &[0x05]);
        ports.serial().enqueue_raw_bytes(b"abc").unwrap();
        ports.reset();
        let mut value = [0xff];
        ports.read(SERIAL + 1, &mut value);
        assert_eq!(value, [0]);
        ports.read(SERIAL + 5, &mut value);
        assert_eq!(value[0] & 1, 0);
    }

    #[test]
    fn saved_ports_come_back() {
        let ports = ports();
        ports.write(SERIAL + 7, &[0x5a]);
        ports.write(SERIAL + 3, &[0x83]);
        ports.serial().enqueue_raw_bytes(b"x").unwrap();
        ports.write(pci_config::ADDRESS, &0x8000_0008u32.to_le_bytes());
        ports.write(rtc::INDEX, &[0x0d]);
        let state = ports.save();
        let text = serde_json::to_string(&state).unwrap();
        let state: PortsState = serde_json::from_str(&text).unwrap();
        let serial =
            Serial::from_state(&(&state.serial).into(), NoIrq, NoEvents, Vec::new()).unwrap();
        let other = Ports::new(serial);
        other.restore(&state);
        assert_eq!(other.save(), state);
        let mut data = [0];
        other.read(rtc::DATA, &mut data);
        assert_eq!(data, [0x80]);
        let mut endless = state;
        endless.serial.in_buffer = vec![0; 65];
        let serial = Serial::from_state(&(&endless.serial).into(), NoIrq, NoEvents, Vec::new());
        assert!(serial.is_err());
    }

    #[test]
    fn absent_ports_read_as_ones_and_swallow_writes() {
        let ports = ports();
        let mut data = [0; 4];
        ports.read(0x70, &mut data);
        assert_eq!(data, [0xff; 4]);
        ports.read(0x400, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(ports.write(0x70, &[1, 2]), PortAction::None);
        assert_eq!(ports.write(0x70, &[]), PortAction::None);
        assert_eq!(ports.write(MARK, &[7]), PortAction::Mark(7));
        let mut status = [1];
        ports.read(0x64, &mut status);
        assert_eq!(status, [0]);
    }
}
