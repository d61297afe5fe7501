//! QEMU's `edu` device (docs/spec/vfio-rig.md#vfio-rig-5-6), behind VFIO.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vm_vpci::vfio::{CONFIG_REGION, VfioDevice};

/// Its vendor and device id.
pub(crate) const ID: u32 = 0x11e8_1234;
/// What its first register says.
pub(crate) const IDENTIFICATION: u32 = 0x0100_00ed;
/// Bytes that are transferred at a time.
pub(crate) const LEN: u64 = 512;

const BAR: usize = 0;
const IRQ_ACKNOWLEDGE: u64 = 0x64;
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
/// Where its buffer is in its own address space.
const BUFFER: u64 = 0x4_0000;
const START: u64 = 1;
const TO_RAM: u64 = 2;
const THEN_INTERRUPT: u64 = 4;
const DMA_INTERRUPT: u32 = 0x100;
const BUS_MASTER: u16 = 1 << 2;
/// A transfer takes 100 ms.
const LIMIT: Duration = Duration::from_secs(20);

/// An opened `edu`.
#[derive(Debug)]
pub(crate) struct Edu(pub(crate) Arc<VfioDevice>);

impl Edu {
    pub(crate) fn id(&self) -> io::Result<u32> {
        let mut id = [0; 4];
        self.0.region_read(CONFIG_REGION, 0, &mut id)?;
        Ok(u32::from_le_bytes(id))
    }

    pub(crate) fn identification(&self) -> io::Result<u32> {
        let mut value = [0; 4];
        self.0.region_read(BAR, 0, &mut value)?;
        Ok(u32::from_le_bytes(value))
    }

    /// Lets it master the bus.
    pub(crate) fn set_master(&self) -> io::Result<()> {
        let mut command = [0; 2];
        self.0.region_read(CONFIG_REGION, 4, &mut command)?;
        let command = u16::from_le_bytes(command) | BUS_MASTER;
        self.0
            .region_write(CONFIG_REGION, 4, &command.to_le_bytes())
    }

    /// Moves [`LEN`] bytes from its buffer to `iova`.
    pub(crate) fn write(&self, iova: u64) -> io::Result<()> {
        self.transfer(BUFFER, iova, TO_RAM)
    }

    /// Moves [`LEN`] bytes from `iova` to its buffer.
    pub(crate) fn read(&self, iova: u64) -> io::Result<()> {
        self.transfer(iova, BUFFER, 0)
    }

    /// As [`read`](Self::read), and raises its interrupt.
    pub(crate) fn read_with_interrupt(&self, iova: u64) -> io::Result<()> {
        self.transfer(iova, BUFFER, THEN_INTERRUPT)
    }

    pub(crate) fn acknowledge(&self) -> io::Result<()> {
        let bytes = DMA_INTERRUPT.to_le_bytes();
        self.0.region_write(BAR, IRQ_ACKNOWLEDGE, &bytes)
    }

    fn transfer(&self, source: u64, destination: u64, flags: u64) -> io::Result<()> {
        let registers = [
            (SOURCE, source),
            (DESTINATION, destination),
            (COUNT, LEN),
            (COMMAND, START | flags),
        ];
        for (register, value) in registers {
            self.0.region_write(BAR, register, &value.to_le_bytes())?;
        }
        let start = Instant::now();
        loop {
            let mut command = [0; 8];
            self.0.region_read(BAR, COMMAND, &mut command)?;
            if u64::from_le_bytes(command) & START == 0 {
                return Ok(());
            }
            if start.elapsed() > LIMIT {
                return Err(io::Error::other("a transfer does not end"));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}
