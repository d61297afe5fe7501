//! The dispatcher: from registers to a group and back.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::cpuid::Features;
use crate::hv::HvStatus;
use crate::hv::hypercall::{Control, result_word};
use crate::mem::{GuestRam, PAGE_SIZE, RamView, Snapshot};

use super::stats::Stats;
use super::{
    Call, CallCounters, CallFormat, CallGroup, CallRegisters, Outcome, RepFormat, RepProgress,
    XmmBlock,
};

/// Bytes of fast input that need no XMM register.
const FAST_GENERAL: usize = 16;
/// Bytes of fast input and output together, with XMM0-5.
const FAST_ALL: usize = FAST_GENERAL + size_of::<XmmBlock>();
/// Bytes of the longest input and output list together: a page each.
const LISTS: usize = 2 * PAGE_SIZE as usize;

/// Decodes calls and hands them to their groups.
#[derive(Debug)]
pub struct Dispatcher {
    ram: GuestRam,
    xmm_input: bool,
    xmm_output: bool,
    groups: Vec<Arc<dyn CallGroup>>,
    stats: Stats,
}

/// A call whose control word is valid.
#[derive(Debug)]
struct Plan<'a> {
    group: &'a dyn CallGroup,
    control: Control,
    /// Bytes of the fixed and of the variable header.
    fixed: usize,
    variable: usize,
    /// Sizes of an element; `None` for a simple call.
    rep: Option<RepFormat>,
    /// Output of a simple call in bytes.
    output: usize,
}

impl Plan<'_> {
    fn header(&self) -> usize {
        self.fixed + self.variable
    }

    /// Bytes of `count` elements of `size` bytes.
    fn elements(&self, size: impl Fn(RepFormat) -> u16, count: u16) -> usize {
        self.rep
            .map_or(0, |rep| usize::from(size(rep)) * usize::from(count))
    }

    /// Bytes of the whole input list, with the elements that are done already.
    fn input_len(&self) -> usize {
        self.header() + self.elements(|rep| rep.input, self.control.rep_count())
    }

    /// Bytes of the whole output list.
    fn output_len(&self) -> usize {
        self.output + self.elements(|rep| rep.output, self.control.rep_count())
    }

    /// Elements that are still to be done.
    fn remaining(&self) -> u16 {
        self.control.rep_count() - self.control.rep_start()
    }
}

/// Where the parameter lists are.
#[derive(Debug)]
enum Lists {
    Memory {
        /// RAM for the whole call: both lists are in it.
        ram: RamView,
        input: u64,
        output: u64,
    },
    /// RDX, R8 and XMM0-5 as one block; output starts at `output`.
    Registers {
        block: [u8; FAST_ALL],
        output: usize,
    },
}

impl Lists {
    fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), HvStatus> {
        match self {
            Self::Memory { ram, input, .. } => ram
                .read(input + offset as u64, to)
                .map_err(|_| HvStatus::INVALID_ALIGNMENT),
            Self::Registers { block, .. } => {
                to.copy_from_slice(&block[offset..offset + to.len()]);
                Ok(())
            }
        }
    }

    fn write(&mut self, offset: usize, from: &[u8]) -> Result<(), HvStatus> {
        if from.is_empty() {
            return Ok(());
        }
        match self {
            Self::Memory { ram, output, .. } => ram
                .write(*output + offset as u64, from)
                .map_err(|_| HvStatus::INVALID_ALIGNMENT),
            Self::Registers { block, output } => {
                let at = *output + offset;
                block[at..at + from.len()].copy_from_slice(from);
                Ok(())
            }
        }
    }
}

/// Why a call ends before its group sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Status(HvStatus),
    InvalidOpcode,
}

impl From<HvStatus> for Refusal {
    fn from(status: HvStatus) -> Self {
        Self::Status(status)
    }
}

impl Dispatcher {
    /// A dispatcher over `ram` without groups. Of `features`, those about XMM registers matter;
    /// they must be the ones given to [`crate::cpuid::leaves`].
    pub fn new(ram: GuestRam, features: Features) -> Self {
        Self {
            ram,
            xmm_input: features.xmm_input,
            xmm_output: features.xmm_output,
            groups: Vec::new(),
            stats: Stats::default(),
        }
    }

    /// Adds a group. Where two groups know a call, the one added first takes it.
    #[must_use]
    pub fn with_group(mut self, group: Arc<dyn CallGroup>) -> Self {
        self.groups.push(group);
        self
    }

    /// Counts since the partition was created.
    pub fn counters(&self) -> CallCounters {
        self.stats.snapshot()
    }

    /// Executes the call that a VP made. `enabled` says whether hypercalls are enabled
    /// ([`crate::msr::PartitionMsrs::hypercalls_enabled`]).
    pub fn call(&self, enabled: bool, registers: &mut dyn CallRegisters) -> Outcome {
        if !enabled || (registers.cpl() != 0 && !mutant!("hypercall-at-any-cpl")) {
            self.stats.count_invalid_opcode();
            return Outcome::InvalidOpcode;
        }
        let control = Control(registers.control());
        let plan = match self.plan(control) {
            Ok(plan) => plan,
            Err(status) => {
                self.stats.count(control.code(), Err(status));
                let result = result_word(Err(status), 0);
                return Outcome::Complete { result };
            }
        };
        match self.run(&plan, registers) {
            Ok(progress) => self.finish(&plan, progress),
            Err(Refusal::Status(status)) => {
                let progress = RepProgress {
                    done: 0,
                    status: Err(status),
                };
                self.finish(&plan, progress)
            }
            Err(Refusal::InvalidOpcode) => {
                self.stats.count_invalid_opcode();
                Outcome::InvalidOpcode
            }
        }
    }

    /// Checks the control word against the format of its call.
    fn plan(&self, control: Control) -> Result<Plan<'_>, HvStatus> {
        let code = control.code();
        let (group, format) = self
            .groups
            .iter()
            .find_map(|group| Some((group.as_ref(), group.format(code)?)))
            .ok_or(HvStatus::INVALID_HYPERCALL_CODE)?;
        check_control(control, &format)?;
        Ok(Plan {
            group,
            control,
            fixed: usize::from(format.fixed),
            variable: usize::from(control.variable_qwords()) * 8,
            rep: format.rep,
            output: usize::from(format.output),
        })
    }

    fn run(
        &self,
        plan: &Plan<'_>,
        registers: &mut dyn CallRegisters,
    ) -> Result<RepProgress, Refusal> {
        let mut lists = if plan.control.is_fast() {
            self.fast_lists(plan, registers)?
        } else {
            self.memory_lists(plan, registers)?
        };
        // The smallest buffer that holds the lists, so that clearing it costs next to nothing.
        let progress = match plan.input_len() + plan.output_len() {
            0..=64 => self.execute::<64>(plan, &mut lists),
            65..=256 => self.execute::<256>(plan, &mut lists),
            257..=1024 => self.execute::<1024>(plan, &mut lists),
            _ => self.execute::<LISTS>(plan, &mut lists),
        }?;
        if let Lists::Registers { block, .. } = &lists
            && plan.output_len() != 0
            && let Some(xmm) = block.last_chunk()
        {
            registers.set_xmm(xmm);
        }
        Ok(progress)
    }

    /// Checks that both lists are aligned, inside one page and RAM, and apart from each other. The
    /// address of an empty list is ignored.
    fn memory_lists(
        &self,
        plan: &Plan<'_>,
        registers: &dyn CallRegisters,
    ) -> Result<Lists, HvStatus> {
        let (input, output) = (registers.input(), registers.output());
        let (input_len, output_len) = (plan.input_len() as u64, plan.output_len() as u64);
        let ram = self.ram.view();
        check_list(&ram, input, input_len, false)?;
        if output_len != 0 {
            check_list(&ram, output, output_len, true)?;
            // Both are RAM, so neither sum wraps.
            if input < output + output_len && output < input + input_len {
                return Err(HvStatus::INVALID_ALIGNMENT);
            }
        }
        Ok(Lists::Memory { ram, input, output })
    }

    fn fast_lists(
        &self,
        plan: &Plan<'_>,
        registers: &mut dyn CallRegisters,
    ) -> Result<Lists, Refusal> {
        let (input_len, output_len) = (plan.input_len(), plan.output_len());
        let output = input_len.next_multiple_of(FAST_GENERAL);
        if input_len > FAST_ALL || output + output_len > FAST_ALL {
            return Err(HvStatus::INVALID_HYPERCALL_INPUT.into());
        }
        if (input_len > FAST_GENERAL && !self.xmm_input && !mutant!("hypercall-xmm-not-offered"))
            || (output_len > 0 && !self.xmm_output)
        {
            return Err(Refusal::InvalidOpcode);
        }
        let mut block = [0; FAST_ALL];
        block[..8].copy_from_slice(&registers.input().to_le_bytes());
        block[8..16].copy_from_slice(&registers.output().to_le_bytes());
        if input_len > FAST_GENERAL || output_len > 0 {
            let xmm = registers.xmm().ok_or(Refusal::InvalidOpcode)?;
            block[FAST_GENERAL..].copy_from_slice(&xmm);
        }
        Ok(Lists::Registers { block, output })
    }

    /// Copies the input to a buffer of `N` bytes, executes, and places the output.
    fn execute<const N: usize>(
        &self,
        plan: &Plan<'_>,
        lists: &mut Lists,
    ) -> Result<RepProgress, HvStatus> {
        let mut buffer = [0; N];
        let start = plan.control.rep_start();
        let count = plan.remaining();
        let skipped = plan.elements(|rep| rep.input, start);
        let elements = plan.elements(|rep| rep.input, count);
        let (input, rest) = buffer.split_at_mut(plan.header() + elements);
        if skipped == 0 {
            lists.read(0, input)?;
        } else {
            let (header, elements) = input.split_at_mut(plan.header());
            lists.read(0, header)?;
            lists.read(plan.header() + skipped, elements)?;
        }
        let (header, elements) = input.split_at(plan.header());
        let (fixed, variable) = header.split_at(plan.fixed);
        let call = Call {
            code: plan.control.code(),
            fixed,
            variable,
            elements,
            count,
        };
        if plan.rep.is_some() {
            let output = &mut rest[..plan.elements(|rep| rep.output, count)];
            let mut progress = plan.group.execute_rep(&call, output);
            progress.done = progress.done.min(count);
            let written = plan.elements(|rep| rep.output, progress.done);
            let offset = plan.elements(|rep| rep.output, start);
            lists.write(offset, &output[..written])?;
            return Ok(progress);
        }
        let output = &mut rest[..plan.output];
        let status = plan.group.execute(&call, output);
        if status.is_ok() {
            lists.write(0, output)?;
        }
        Ok(RepProgress { done: 0, status })
    }

    /// Turns progress into the result, or into another round of a rep call.
    fn finish(&self, plan: &Plan<'_>, progress: RepProgress) -> Outcome {
        let done = plan.control.rep_start() + progress.done;
        if progress.status.is_ok() && done < plan.control.rep_count() {
            self.stats.count_restart();
            let control = plan.control.with_rep_start(done).0;
            return Outcome::Restart { control };
        }
        self.stats.count(plan.control.code(), progress.status);
        let result = result_word(progress.status, done);
        Outcome::Complete { result }
    }
}

fn check_list(ram: &Snapshot, gpa: u64, len: u64, write: bool) -> Result<(), HvStatus> {
    let aligned = gpa.is_multiple_of(8) || mutant!("hypercall-misaligned-list");
    let in_page = gpa % PAGE_SIZE + len <= PAGE_SIZE || mutant!("hypercall-list-across-pages");
    let fits = aligned && in_page && ram.check(gpa, len, write).is_ok();
    fits.then_some(()).ok_or(HvStatus::INVALID_ALIGNMENT)
}

/// Checks reserved bits, rep fields and variable header against the call's format.
fn check_control(control: Control, format: &CallFormat) -> Result<(), HvStatus> {
    let (count, start) = (control.rep_count(), control.rep_start());
    let rep_fits = match format.rep {
        Some(_) => start < count,
        None => count == 0 && start == 0,
    };
    let variable_fits =
        format.variable || control.variable_qwords() == 0 || mutant!("hypercall-variable-header");
    if (control.has_reserved_bits() && !mutant!("hypercall-reserved-bits"))
        || !rep_fits
        || !variable_fits
    {
        return Err(HvStatus::INVALID_HYPERCALL_INPUT);
    }
    Ok(())
}
