//! A vCPU thread: runs the guest, hands its exits out, and follows the main thread's commands.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_vpci::gate::RunGate;
use vm_vpci::kvm;

use crate::console::ConsolePorts;
use crate::control::{Command, Control, GuestEvent, ResetCause};
use crate::embed::{Embedding, Tries};
use crate::kernel::Entry;
use crate::long_mode;
use crate::marks::Marks;
use crate::ports::PortAction;
use crate::report::Mark;
use crate::signals::VcpuThreads;
use crate::vcpu_saved::SavedVcpu;
use crate::vcpu_state::{InitialState, VcpuStateError};

/// What all vCPU threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Commands and events.
    pub(crate) control: Control,
    /// I/O ports.
    pub(crate) ports: Arc<ConsolePorts>,
    /// The library.
    pub(crate) embedding: Embedding,
    /// Moments that the guest marked.
    pub(crate) marks: Marks,
    /// Exits of all vCPUs.
    pub(crate) exits: AtomicU64,
    /// Where the boot processor starts; the others wait for it in their initial state.
    pub(crate) entry: Mutex<Entry>,
    /// States of vCPUs on their way from or to their threads.
    pub(crate) exchange: Exchange,
    /// Passed around KVM_RUN, and closed while slots of RAM change.
    pub(crate) gate: Arc<RunGate>,
    /// The vCPU threads.
    pub(crate) threads: Arc<VcpuThreads>,
}

/// Where [`Command::Save`] and [`Command::Restore`] put and find the states of vCPUs, by number.
#[derive(Debug, Default)]
pub(crate) struct Exchange {
    slots: Mutex<BTreeMap<u32, Result<SavedVcpu, VcpuStateError>>>,
    /// What the host's time stamp counter was ahead when the states were saved.
    tsc_shift: AtomicU64,
}

impl Exchange {
    /// Main thread: puts states there for the threads to take.
    pub(crate) fn fill(&self, vcpus: Vec<SavedVcpu>, tsc_shift: u64) {
        self.tsc_shift.store(tsc_shift, Ordering::Relaxed);
        *self.lock() = (0..).zip(vcpus.into_iter().map(Ok)).collect();
    }

    /// Main thread: takes what the threads have left there, in the order of their numbers.
    ///
    /// # Errors
    ///
    /// The first error that one of them met.
    pub(crate) fn take(&self) -> Result<Vec<SavedVcpu>, VcpuStateError> {
        std::mem::take(&mut *self.lock()).into_values().collect()
    }

    /// A thread: takes the state of its vCPU and the shift.
    fn one(&self, vcpu: u32) -> (Option<SavedVcpu>, u64) {
        let shift = self.tsc_shift.load(Ordering::Relaxed);
        (self.lock().remove(&vcpu).and_then(Result::ok), shift)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Result<SavedVcpu, VcpuStateError>>> {
        self.slots.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Shared {
    /// All counts of this moment.
    fn mark(&self, id: u8) -> Mark {
        let (host_maps, host_unmaps) = self.embedding.host_mappings();
        Mark {
            id,
            functions: self.embedding.report(),
            exits: self.exits.load(Ordering::Relaxed),
            flushes: self.embedding.flushes(),
            host_maps,
            host_unmaps,
        }
    }
}

/// One virtual CPU with all its thread needs.
pub(crate) struct Vcpu {
    /// Number, which is its APIC id and VP index.
    pub(crate) index: u32,
    /// KVM's handle.
    pub(crate) fd: VcpuFd,
    /// State after power-on.
    pub(crate) initial: InitialState,
    /// What was tried since KVM last got an instruction done.
    pub(crate) tries: Tries,
    /// Shared with the others.
    pub(crate) shared: Arc<Shared>,
}

/// How the thread goes on after an exit.
enum Next {
    Continue,
    /// Something wants the thread's attention, and no exit is under way.
    Interrupted,
    Report(GuestEvent),
}

impl Vcpu {
    /// Starts the thread. It waits for the first [`Command::Run`].
    ///
    /// # Errors
    ///
    /// The host has no room for another thread.
    pub(crate) fn start(mut self) -> io::Result<JoinHandle<()>> {
        thread::Builder::new()
            .name(format!("vcpu-{}", self.index))
            .spawn(move || self.follow_commands())
    }

    fn follow_commands(&mut self) {
        let shared = self.shared.clone();
        let _enlisted = shared.threads.enlist(self.index as usize);
        let control = &shared.control;
        loop {
            match control.wanted() {
                Command::Run => {
                    if let Next::Report(event) = self.enter_guest(&shared) {
                        control.report(event);
                    }
                }
                Command::Pause => {
                    self.complete_exit(&shared);
                    if let Ok(regs) = self.fd.get_regs() {
                        log::debug!("vCPU {} pauses at RIP {:#x}", self.index, regs.rip);
                    }
                    control.carried_out(self.index as usize, Command::Pause);
                }
                Command::Reset => {
                    if let Err(error) = self.reset() {
                        control.fail(error.to_string());
                    }
                    if let Err(error) = self.set_kernel_msrs(&shared) {
                        control.fail(error.to_string());
                    }
                    control.carried_out(self.index as usize, Command::Reset);
                }
                Command::Save => {
                    let state = SavedVcpu::read(&self.fd, self.index, &self.initial);
                    shared.exchange.lock().insert(self.index, state);
                    control.carried_out(self.index as usize, Command::Save);
                }
                Command::Restore => {
                    let (taken, shift) = shared.exchange.one(self.index);
                    let adopt = |state: SavedVcpu| {
                        state.restore(&self.fd, self.index, &self.initial, shift)
                    };
                    if let Some(Err(error)) = taken.map(adopt) {
                        shared.exchange.lock().insert(self.index, Err(error));
                    }
                    control.carried_out(self.index as usize, Command::Restore);
                }
                Command::Forward => {
                    if let Err(error) = self.set_kernel_msrs(&shared) {
                        control.fail(error.to_string());
                    }
                    control.carried_out(self.index as usize, Command::Forward);
                }
                Command::Quit => return,
            }
        }
    }

    /// Returns to the state after power-on; the boot processor to the kernel's entry point.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`].
    pub(crate) fn reset(&mut self) -> Result<(), VcpuStateError> {
        self.initial.restore(&self.fd)?;
        if self.index == 0 {
            let entry = *self.shared.entry.lock().unwrap_or_else(|e| e.into_inner());
            let mut sregs = self.initial.sregs();
            long_mode::set_system_registers(&mut sregs);
            let regs = long_mode::entry_registers(entry);
            self.initial.override_registers(&self.fd, &regs, &sregs)?;
        }
        Ok(())
    }

    /// Tells KVM what it has copies of, after a reset or a restore.
    fn set_kernel_msrs(&self, shared: &Shared) -> Result<(), kvm::KvmError> {
        let control = shared.embedding.tsc_invariant_control(self.index);
        kvm::forward_tsc_invariant(&self.fd, control)?;
        shared.embedding.set_kernel_msrs(self.index, &self.fd)
    }

    /// KVM finishes an instruction that caused an exit on the next entry only; this enters and
    /// leaves at once, so that the registers are those between two instructions. An instruction may
    /// have more exits to come, such as a store of 16 bytes.
    fn complete_exit(&mut self, shared: &Shared) {
        self.fd.set_kvm_immediate_exit(1);
        complete(&shared.control, || self.enter_guest(shared));
        self.fd.set_kvm_immediate_exit(0);
    }

    fn enter_guest(&mut self, shared: &Shared) -> Next {
        let vp = self.index;
        let entered = shared.gate.enter(vp as usize);
        let result = self.fd.run();
        drop(entered);
        let exit = match result {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR => return Next::Interrupted,
            Err(error) if error.errno() == libc::EAGAIN => return Next::Continue,
            Err(error) => return self.failed(format!("KVM_RUN fails: {error}")),
        };
        shared.exits.fetch_add(1, Ordering::Relaxed);
        if !matches!(exit, VcpuExit::InternalError) {
            self.tries = Tries::default();
        }
        match exit {
            VcpuExit::IoOut(port, _) if shared.embedding.is_hypercall_port(port) => {
                if let Err(error) = shared.embedding.hypercall(&mut self.fd) {
                    return self.failed(format!("hypercall: {error}"));
                }
            }
            VcpuExit::IoOut(port, data) => match shared.ports.write(port, data) {
                PortAction::None => {}
                PortAction::PowerOff => return Next::Report(GuestEvent::PowerOff),
                PortAction::Reset => {
                    return Next::Report(GuestEvent::Reset(ResetCause::Register));
                }
                PortAction::Mark(id) => shared.marks.add(|| shared.mark(id)),
            },
            VcpuExit::IoIn(port, data) => shared.ports.read(port, data),
            // Answered as from a device it would be a wrong value without a trace.
            VcpuExit::MmioRead(gpa, _) if shared.embedding.is_ram(gpa) => {
                return self.failed(format!("a load from RAM at {gpa:#x} left the guest"));
            }
            VcpuExit::MmioRead(gpa, data) => shared.embedding.mmio_read(gpa, data),
            VcpuExit::MmioWrite(gpa, _) if shared.embedding.is_ram(gpa) => {
                if !shared.embedding.tracked_store(&mut self.fd) {
                    return self.failed(format!("a store to RAM at {gpa:#x} left the guest"));
                }
            }
            VcpuExit::MmioWrite(gpa, data) => shared.embedding.mmio_write(gpa, data),
            VcpuExit::X86Rdmsr(exit) => shared.embedding.read_msr(vp, exit),
            VcpuExit::X86Wrmsr(_) => {
                if let Err(error) = shared.embedding.write_msr(vp, &mut self.fd) {
                    return self.failed(error.to_string());
                }
            }
            VcpuExit::Hyperv => match shared.embedding.hyperv_exit(&mut self.fd) {
                Ok(true) => {}
                Ok(false) => return self.failed("an exit of KVM's SynIC or debugger".into()),
                Err(error) => return self.failed(format!("hypercall: {error}")),
            },
            VcpuExit::Intr => return Next::Interrupted,
            VcpuExit::InternalError => {
                let tries = &mut self.tries;
                match shared.embedding.get_done(vp, &mut self.fd, tries) {
                    Ok(None) => {}
                    Ok(Some(error)) => {
                        return self.failed(format!("an internal error of KVM: {error:?}"));
                    }
                    Err(error) => return self.failed(error.to_string()),
                }
            }
            // A triple fault: what a processor answers with a reset of the machine.
            VcpuExit::Shutdown => {
                let cause = ResetCause::TripleFault(self.index);
                return Next::Report(GuestEvent::Reset(cause));
            }
            other => {
                let what = format!("KVM gives up on the guest: {other:?}");
                return self.failed(what);
            }
        }
        Next::Continue
    }

    fn failed(&self, what: String) -> Next {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Next::Report(GuestEvent::Failed(format!(
            "vCPU {}: {what} (RIP {rip:#x})",
            self.index
        )))
    }
}

/// Enters the guest by `enter` until no exit is under way. What the guest asks for meanwhile is told:
/// it will not ask again.
fn complete(control: &Control, mut enter: impl FnMut() -> Next) {
    loop {
        match enter() {
            Next::Continue => {}
            Next::Interrupted => return,
            Next::Report(event) => {
                let is_over = matches!(event, GuestEvent::Failed(_));
                control.post(event);
                if is_over {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_asks_for_while_it_is_paused_is_not_lost() {
        let failed = GuestEvent::Failed("it is over".into());
        for (exits, events) in [
            (
                vec![
                    Next::Continue,
                    Next::Report(GuestEvent::PowerOff),
                    Next::Continue,
                    Next::Interrupted,
                ],
                vec![GuestEvent::PowerOff],
            ),
            (vec![Next::Report(failed.clone())], vec![failed]),
        ] {
            let control = Control::new(1).unwrap();
            let mut exits = exits.into_iter();
            complete(&control, || exits.next().expect("it goes on for ever"));
            assert_eq!(exits.len(), 0, "an exit is left under way");
            assert_eq!(control.take_events(), events);
        }
    }
}
