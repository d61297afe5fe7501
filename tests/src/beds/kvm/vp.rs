//! A VP's thread: runs the vCPU from one command to the next and hands its exits to the library.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_vpci::Partition;
use vm_vpci::kvm::{self, HypervExit};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};
use vpci_puppet::layout::DONE_PORT;

use super::vm::InitialState;

/// Time between two attempts to get a vCPU out of the guest.
const KICK_INTERVAL: Duration = Duration::from_millis(10);

/// What a VP's thread is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Go to the puppet's first instruction, and run until it waits for a command.
    Reset,
    /// Run the command that is in the command page.
    Run,
}

/// How an order ended: the VP waits for a command, or why it does not.
type Done = Result<(), String>;

/// The handle of a VP's thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct VpThread {
    vp: u32,
    orders: Option<Sender<Order>>,
    done: Receiver<Done>,
    /// The VP shall leave the guest whatever it does there.
    cancel: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl VpThread {
    /// Starts the thread of a vCPU.
    pub(super) fn start(
        fd: VcpuFd,
        vp: u32,
        initial: InitialState,
        partition: Arc<Partition>,
    ) -> Result<Self, String> {
        install_kick_handler()?;
        let (orders, received) = channel();
        let (report, done) = channel();
        let cancel = Arc::new(AtomicBool::new(false));
        let mut runner = Runner {
            fd,
            vp,
            initial,
            partition,
            cancel: cancel.clone(),
        };
        let thread = thread::Builder::new()
            .name(format!("vp-{vp}"))
            .spawn(move || {
                for order in received {
                    if report.send(runner.obey(order)).is_err() {
                        return;
                    }
                }
            })
            .map_err(super::vm::refused("a thread"))?;
        Ok(Self {
            vp,
            orders: Some(orders),
            done,
            cancel,
            thread: Some(thread),
        })
    }

    /// Gives an order; [`VpThread::wait`] must follow.
    pub(super) fn order(&self, order: Order) {
        self.cancel.store(false, Ordering::Release);
        // If the thread is gone, `wait` says so.
        if let Some(orders) = &self.orders {
            let _ = orders.send(order);
        }
    }

    /// Waits until the order is carried out, at most `timeout`. None if it takes longer.
    pub(super) fn wait(&self, timeout: Duration) -> Option<Done> {
        match self.done.recv_timeout(timeout) {
            Ok(done) => Some(done),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Err(format!("the thread of VP {} is gone", self.vp)))
            }
        }
    }

    /// Takes the VP out of the guest in the midst of an order. It needs a reset then.
    pub(super) fn abandon(&self) -> Done {
        self.cancel.store(true, Ordering::Release);
        loop {
            // Again and again: a signal just before KVM_RUN is lost.
            self.kick();
            if let Some(done) = self.wait(KICK_INTERVAL) {
                return done;
            }
        }
    }

    fn kick(&self) {
        if let Some(Err(error)) = self.thread.as_ref().map(|thread| thread.kill(SIGRTMIN())) {
            log::error!("cannot interrupt VP {}: {error}", self.vp);
        }
    }
}

impl Drop for VpThread {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Release);
        drop(self.orders.take());
        // Disconnected when the thread has ended.
        while let Ok(_) | Err(RecvTimeoutError::Timeout) = self.done.recv_timeout(KICK_INTERVAL) {
            self.kick();
        }
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the thread of VP {} has panicked", self.vp);
        }
    }
}

/// The signal takes a vCPU out of KVM_RUN by its arrival alone.
fn install_kick_handler() -> Result<(), String> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            register_signal_handler(SIGRTMIN(), ignore)
                .map_err(|error| format!("a signal handler: {error}"))
        })
        .clone()
}

/// What the thread owns.
struct Runner {
    fd: VcpuFd,
    vp: u32,
    initial: InitialState,
    partition: Arc<Partition>,
    cancel: Arc<AtomicBool>,
}

impl Runner {
    fn obey(&mut self, order: Order) -> Done {
        if order == Order::Reset {
            self.complete_exit();
            self.initial.restore(&self.fd)?;
            kvm::forward_tsc_invariant(&self.fd, 0)
                .and_then(|()| kvm::forward_msrs(&self.fd, &self.partition.kernel_msrs(self.vp)))
                .map_err(|error| error.to_string())?;
        }
        while !self.cancel.load(Ordering::Acquire) {
            if self.enter_guest()? {
                return Ok(());
            }
        }
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Err(format!("VP {} does not come back from {rip:#x}", self.vp))
    }

    /// KVM finishes an instruction that caused an exit on the next entry only; this enters and
    /// leaves at once.
    fn complete_exit(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        // Always an error: EINTR.
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Runs the guest to its next exit and answers it. True if the command is done.
    fn enter_guest(&mut self) -> Result<bool, String> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Ok(false),
            Err(error) => return Err(self.failed(format!("KVM_RUN fails: {error}"))),
        };
        let hypercall_port = u16::from(self.partition.hypercall_port());
        match exit {
            VcpuExit::IoOut(port, _) if port == u16::from(DONE_PORT) => return Ok(true),
            VcpuExit::IoOut(port, _) if port == hypercall_port => {
                let partition = &self.partition;
                kvm::hypercall::answer(&mut self.fd, |registers| partition.hypercall(registers))
                    .map_err(|error| format!("hypercall: {error}"))?;
            }
            VcpuExit::IoOut(port, _) => log::debug!("OUT to {port:#x} goes nowhere"),
            VcpuExit::IoIn(_, data) => data.fill(0xff),
            VcpuExit::MmioRead(gpa, data) => {
                if !self.partition.mmio_read(gpa, data) {
                    data.fill(0xff);
                }
            }
            VcpuExit::MmioWrite(gpa, data) => {
                if !self.partition.mmio_write(gpa, data) {
                    log::debug!("store to {gpa:#x} goes nowhere");
                }
            }
            VcpuExit::X86Rdmsr(exit) => match self.partition.read_msr(self.vp, exit.index) {
                Ok(value) => *exit.data = value,
                Err(_) => *exit.error = 1,
            },
            VcpuExit::X86Wrmsr(_) => {
                let (partition, vp) = (&self.partition, self.vp);
                kvm::answer_wrmsr(&mut self.fd, |msr, value, forward| {
                    partition.write_msr_forwarding(vp, msr, value, forward)
                })
                .map_err(|error| error.to_string())?;
            }
            VcpuExit::Hyperv => {
                let partition = &self.partition;
                let exit =
                    kvm::answer_hyperv(&mut self.fd, |registers| partition.hypercall(registers))
                        .map_err(|error| format!("hypercall: {error}"))?;
                if !matches!(exit, HypervExit::Hypercall(_)) {
                    return Err(self.failed(format!("{exit:?}")));
                }
            }
            VcpuExit::Intr => {}
            other => {
                let what = format!("{other:?}");
                return Err(self.failed(what));
            }
        }
        Ok(false)
    }

    fn failed(&self, what: String) -> String {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        format!("VP {} stops at {rip:#x}: {what}", self.vp)
    }
}
