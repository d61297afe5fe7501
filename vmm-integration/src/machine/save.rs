//! The machine as a file, and back.
#![forbid(unsafe_code)]

use std::path::Path;

use super::{Machine, read_irqchips};
use crate::control::Command;
use crate::error::Error;
use crate::snapshot::{MachineSnapshot, Reader, RestoreError, SaveError, Writer};
use crate::vcpu_saved::host_tsc;

impl Machine {
    /// Writes the whole state of a paused machine to a file that does not exist yet. The machine is
    /// as before.
    ///
    /// # Errors
    ///
    /// [`SaveError`]; there is no file then.
    pub(crate) fn save(&self, path: &Path) -> Result<(), SaveError> {
        // What a vCPU has asked for is done by the main thread, and would be lost.
        if self.shared.control.has_events() {
            return Err(SaveError::Ending);
        }
        let stopped = self.shared.embedding.stop();
        // Before the vCPUs: it may still raise interrupts.
        let embedding = self.shared.embedding.save(&stopped)?;
        // Already paused, so nobody needs a kick.
        self.shared.control.order_and_wait(Command::Save, || {});
        let vcpus = self.shared.exchange.take()?;
        let host_tsc = host_tsc();
        let irqchips = read_irqchips(&self.vm).map_err(|error| match error {
            Error::KvmCall { source, .. } => SaveError::Irqchip(source),
            _ => SaveError::Irqchip(kvm_ioctls::Error::new(libc::EIO)),
        })?;
        let state = MachineSnapshot {
            shape: self.shape.clone(),
            host_tsc,
            vcpus,
            irqchips: irqchips.to_vec(),
            ports: self.shared.ports.save(),
            embedding,
        };
        let failed = |source| SaveError::File {
            path: path.to_owned(),
            source,
        };
        let mut writer = Writer::create(path).map_err(failed)?;
        let written = writer
            .state(&state)
            .and_then(|()| writer.ram(self.ram.map()))
            .and_then(|()| writer.finish());
        written.map_err(|error| {
            // Half a file is of no use to anybody.
            let _ = std::fs::remove_file(path);
            failed(error)
        })
    }

    /// Takes over a saved VM. The machine was built for it and has not run.
    ///
    /// # Errors
    ///
    /// [`Error`]; the machine must not run then.
    pub(crate) fn restore(&self, saved: MachineSnapshot, pages: Reader) -> Result<(), Error> {
        saved.check_shape(&self.shape)?;
        // All vCPUs wait for a command from here on.
        self.pause();
        let control = &self.shared.control;
        let stopped = self.shared.embedding.stop();
        pages.ram(self.ram.map())?;
        for chip in &saved.irqchips {
            self.vm.set_irqchip(chip).map_err(RestoreError::Irqchip)?;
        }
        let shift = saved.host_tsc.wrapping_sub(host_tsc());
        self.shared.exchange.fill(saved.vcpus, shift);
        control.order_and_wait(Command::Restore, || {});
        self.shared.exchange.take().map_err(RestoreError::Vcpu)?;
        self.shared.ports.restore(&saved.ports);
        // After the vCPUs, whose local APICs take the interrupts that this may raise.
        self.shared.embedding.restore(&stopped, &saved.embedding)?;
        control.order_and_wait(Command::Forward, || {});
        // Only now: workers raise SINTs, and KVM had them masked until it was told.
        drop(stopped);
        Ok(())
    }
}
