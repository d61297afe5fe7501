use super::*;
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;
use zerocopy::IntoBytes;

use crate::cpuid::Features;
use crate::hv::hypercall::{
    Control, PARTITION_SELF, PostMessageInput, RetargetInput, SignalEventInput, result_word,
};
use crate::mem::{GuestRam, PAGE_SIZE, RamMap};

mod calls;
mod properties;
mod rep;

pub(super) const RAM_SIZE: usize = 0x4000;
pub(super) const VPS: u32 = 80;

pub(super) fn ram() -> GuestRam {
    let map = RamMap::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).expect("test RAM");
    GuestRam::new(&map)
}

pub(super) fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; RAM_SIZE];
    ram.read(0, &mut bytes).unwrap();
    bytes
}

/// The registers of a VP at CPL 0.
#[derive(Debug, Clone, Default)]
pub(super) struct Registers {
    pub(super) cpl: u8,
    pub(super) control: u64,
    pub(super) input: u64,
    pub(super) output: u64,
    pub(super) xmm: Option<Vec<u8>>,
    pub(super) xmm_fetches: u32,
}

impl CallRegisters for Registers {
    fn cpl(&self) -> u8 {
        self.cpl
    }
    fn control(&self) -> u64 {
        self.control
    }
    fn input(&self) -> u64 {
        self.input
    }
    fn output(&self) -> u64 {
        self.output
    }
    fn xmm(&mut self) -> Option<XmmBlock> {
        self.xmm_fetches += 1;
        self.xmm.as_deref()?.try_into().ok()
    }
    fn set_xmm(&mut self, xmm: &XmmBlock) {
        self.xmm = Some(xmm.to_vec());
    }
}

/// Records what reaches the typed traits, and answers as told.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    pub(super) posts: Mutex<Vec<(u32, u32, Vec<u8>)>>,
    pub(super) events: Mutex<Vec<(u32, u16)>>,
    pub(super) retargets: Mutex<Vec<RetargetInterrupt>>,
}

impl MessageCalls for Recorder {
    fn post_message(&self, message: &PostMessage<'_>) -> Result<(), HvStatus> {
        self.posts.lock().unwrap().push((
            message.connection_id,
            message.message_type,
            message.payload.to_vec(),
        ));
        match message.connection_id {
            1 | 4 => Ok(()),
            _ => Err(HvStatus::INVALID_CONNECTION_ID),
        }
    }

    fn signal_event(&self, connection_id: u32, flag: u16) -> Result<(), HvStatus> {
        self.events.lock().unwrap().push((connection_id, flag));
        Ok(())
    }
}

impl InterruptCalls for Recorder {
    fn retarget_device_interrupt(&self, request: &RetargetInterrupt) -> Result<(), HvStatus> {
        self.retargets.lock().unwrap().push(request.clone());
        Ok(())
    }
}

pub(super) struct Bed {
    pub(super) ram: GuestRam,
    pub(super) calls: Arc<Recorder>,
    pub(super) dispatcher: Dispatcher,
}

impl Bed {
    pub(super) fn new(features: Features) -> Self {
        let ram = ram();
        let calls = Arc::new(Recorder::default());
        let dispatcher = Dispatcher::new(ram.clone(), features)
            .with_group(Arc::new(MessageGroup::new(calls.clone())))
            .with_group(Arc::new(InterruptGroup::new(calls.clone(), VPS)))
            .with_group(Arc::new(rep::TestGroup::default()));
        Self {
            ram,
            calls,
            dispatcher,
        }
    }

    pub(super) fn call(&self, registers: &mut Registers) -> Outcome {
        self.dispatcher.call(true, registers)
    }

    pub(super) fn memory_call(&self, control: u64, input: u64, output: u64) -> Outcome {
        self.call(&mut Registers {
            control,
            input,
            output,
            ..Registers::default()
        })
    }

    /// Puts `list` at `gpa` and makes a call with it.
    pub(super) fn call_with(&self, control: u64, gpa: u64, list: &[u8]) -> Outcome {
        self.ram.write(gpa, list).unwrap();
        self.memory_call(control, gpa, 0)
    }
}

pub(super) fn done(status: Result<(), HvStatus>) -> Outcome {
    Outcome::Complete {
        result: result_word(status, 0),
    }
}

pub(super) fn features(xmm_input: bool, xmm_output: bool) -> Features {
    Features {
        xmm_input,
        xmm_output,
        ..Features::default()
    }
}
