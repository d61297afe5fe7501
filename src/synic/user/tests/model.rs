//! The SynIC against a slow model of the specification, saved and restored at any step.
use super::*;

use proptest::prelude::*;

use crate::synic::MessageState;

const QUEUE_LIMIT: usize = 3;
const VPS: u32 = 2;

/// What the guest, the host and the VMM do.
#[derive(Debug, Clone)]
enum Step {
    Write {
        vp: u32,
        msr: u32,
        value: u64,
    },
    Post {
        vp: u32,
        sint: u8,
        message_type: u32,
        payload: Vec<u8>,
    },
    Signal {
        vp: u32,
        sint: u8,
        flag: u16,
    },
    Discard {
        sint: u8,
    },
    /// The guest stores a word anywhere: it frees slots, clears flags, or is up to no good.
    Store {
        gpa: u64,
        value: u32,
    },
    Reset,
    SaveAndRestore,
}

fn step() -> impl Strategy<Value = Step> {
    let vp = || 0..VPS + 1;
    let sint = || prop_oneof![4 => Just(2u8), 2 => Just(5), 1 => 0u8..18];
    let page = (0..RAM_SIZE as u64 / PAGE_SIZE + 2).prop_map(|page| (page * PAGE_SIZE) | 1);
    let pages = prop_oneof![
        8 => page,
        1 => Just(SIMP_PAGE),
        1 => any::<u64>(),
    ];
    let sint_value = prop_oneof![
        4 => Just(0xf3u64),
        1 => Just(0x1_0000),
        1 => Just(0x4_0031),
        1 => any::<u64>(),
        1 => 0u64..0x20,
    ];
    let write = prop_oneof![
        2 => (Just(msr::SCONTROL), prop_oneof![4 => Just(1), 1 => any::<u64>()]),
        3 => (prop_oneof![Just(msr::SIMP), Just(msr::SIEFP)], pages),
        3 => (prop_oneof![Just(SINT2), Just(SINT2 + 3)], sint_value),
        4 => (Just(msr::EOM), any::<u64>()),
        1 => (msr::SCONTROL..=msr::SINT15 + 1, any::<u64>()),
    ];
    let message_type = prop_oneof![6 => Just(1u32), 1 => any::<u32>(), 1 => Just(0)];
    let payload = prop_oneof![
        6 => proptest::collection::vec(any::<u8>(), 0..9),
        1 => proptest::collection::vec(any::<u8>(), 238..243),
    ];
    let slot = (0..RAM_SIZE as u64 / SLOT_BYTES).prop_map(|slot| slot * SLOT_BYTES);
    prop_oneof![
        6 => (vp(), write).prop_map(|(vp, (msr, value))| Step::Write { vp, msr, value }),
        5 => (vp(), sint(), message_type, payload).prop_map(|(vp, sint, message_type, payload)| {
            Step::Post { vp, sint, message_type, payload }
        }),
        3 => (vp(), sint(), prop_oneof![0u16..70, 2040u16..2050])
            .prop_map(|(vp, sint, flag)| Step::Signal { vp, sint, flag }),
        1 => sint().prop_map(|sint| Step::Discard { sint }),
        3 => slot.prop_map(|gpa| Step::Store { gpa, value: 0 }),
        1 => (0..RAM_SIZE as u64 / 4, any::<u32>())
            .prop_map(|(word, value)| Step::Store { gpa: word * 4, value }),
        1 => Just(Step::Reset),
        2 => Just(Step::SaveAndRestore),
    ]
}

const SLOT_BYTES: u64 = 256;

/// A whole working set-up, so that random steps start where things happen.
fn start() -> Vec<Step> {
    let write = |vp, msr, value| Step::Write { vp, msr, value };
    (0..VPS)
        .flat_map(|vp| {
            [
                write(vp, msr::SIMP, 0x1001 + u64::from(vp) * 0x2000),
                write(vp, msr::SIEFP, 0x2001 + u64::from(vp) * 0x2000),
                write(vp, SINT2, 0xf3),
                write(vp, SINT2 + 3, 0x55),
                write(vp, msr::SCONTROL, 1),
            ]
        })
        .collect()
}

/// One VP as the specification tells it, on plain bytes.
#[derive(Debug, Clone)]
struct ModelVp {
    apic_id: u32,
    scontrol: u64,
    siefp: u64,
    simp: u64,
    sints: [u64; 16],
    queue: Vec<(u8, u32, Vec<u8>)>,
    refused: bool,
}

impl ModelVp {
    fn new(vp: u32) -> Self {
        Self {
            apic_id: vp * 2,
            scontrol: 0,
            siefp: 0,
            simp: 0,
            sints: [0x1_0000; 16],
            queue: Vec::new(),
            refused: false,
        }
    }

    fn read(&self, msr: u32) -> Option<u64> {
        Some(match msr {
            0x4000_0080 => self.scontrol,
            0x4000_0081 => 1,
            0x4000_0082 => self.siefp,
            0x4000_0083 => self.simp,
            0x4000_0084 => 0,
            0x4000_0090..0x4000_00a0 => self.sints[(msr & 0xf) as usize],
            _ => return None,
        })
    }

    fn interrupt(&self, sint: u8) -> Option<Msi> {
        let value = self.sints[usize::from(sint)];
        (value & 0x5_0000 == 0).then(|| Msi::fixed(self.apic_id, value as u8))
    }
}

#[derive(Debug)]
struct Model {
    memory: Vec<u8>,
    vps: Vec<ModelVp>,
    msis: Vec<Msi>,
    drains: u32,
}

impl Model {
    fn new() -> Self {
        Self {
            memory: vec![0; RAM_SIZE],
            vps: (0..VPS).map(ModelVp::new).collect(),
            msis: Vec::new(),
            drains: 0,
        }
    }

    fn write(&mut self, vp: u32, msr: u32, value: u64) -> Result<(), GpFault> {
        let this = self.vps.get_mut(vp as usize).ok_or(GpFault)?;
        match msr {
            0x4000_0080 => this.scontrol = value,
            0x4000_0082 | 0x4000_0083 => {
                let register = match msr {
                    0x4000_0082 => &mut this.siefp,
                    _ => &mut this.simp,
                };
                let page = value >> 12 << 12;
                if value & 1 != 0 {
                    let old = *register;
                    let range = page as usize..page.saturating_add(0x1000) as usize;
                    let bytes = self.memory.get_mut(range).ok_or(GpFault)?;
                    if old & 1 == 0 || old >> 12 != value >> 12 {
                        bytes.fill(0);
                    }
                }
                *register = value;
            }
            0x4000_0084 => {}
            0x4000_0090..0x4000_00a0 => {
                if value & 0x1_0000 == 0 && value & 0xff < 16 {
                    return Err(GpFault);
                }
                this.sints[(msr & 0xf) as usize] = value;
            }
            _ => return Err(GpFault),
        }
        self.deliver(vp);
        Ok(())
    }

    fn post(
        &mut self,
        vp: u32,
        sint: u8,
        message_type: u32,
        payload: &[u8],
    ) -> Result<(), SynicError> {
        if sint > 15 || message_type == 0 || payload.len() > 240 {
            return Err(SynicError::OutOfRange { sint });
        }
        let this = self
            .vps
            .get_mut(vp as usize)
            .ok_or(SynicError::NoVp { vp })?;
        if this.queue.len() == QUEUE_LIMIT {
            this.refused = true;
            return Err(SynicError::QueueFull { vp });
        }
        this.queue.push((sint, message_type, payload.to_vec()));
        self.deliver(vp);
        Ok(())
    }

    fn deliver(&mut self, vp: u32) {
        let this = &mut self.vps[vp as usize];
        while !this.queue.is_empty() && this.scontrol & 1 != 0 && this.simp & 1 != 0 {
            let (sint, message_type, payload) = this.queue[0].clone();
            let start = (this.simp >> 12 << 12) as usize + usize::from(sint) * 256;
            let slot = &mut self.memory[start..start + 256];
            if slot[..4] != [0; 4] {
                slot[5] |= 1;
                break;
            }
            slot.fill(0);
            slot[..4].copy_from_slice(&message_type.to_le_bytes());
            slot[4] = payload.len() as u8;
            slot[16..16 + payload.len()].copy_from_slice(&payload);
            this.queue.remove(0);
            self.msis.extend(this.interrupt(sint));
        }
        if this.refused && this.queue.len() < QUEUE_LIMIT {
            this.refused = false;
            self.drains += 1;
        }
    }

    fn signal(&mut self, vp: u32, sint: u8, flag: u16) -> Result<(), SynicError> {
        if sint > 15 || flag > 2047 {
            return Err(SynicError::OutOfRange { sint });
        }
        let this = self.vps.get(vp as usize).ok_or(SynicError::NoVp { vp })?;
        let masked = this.sints[usize::from(sint)] & 0x1_0000 != 0;
        if this.scontrol & 1 == 0 || this.siefp & 1 == 0 || masked {
            return Err(SynicError::Disabled { vp });
        }
        let start = (this.siefp >> 12 << 12) as usize + usize::from(sint) * 256;
        let byte = &mut self.memory[start + usize::from(flag / 8)];
        if *byte & 1 << (flag % 8) == 0 {
            *byte |= 1 << (flag % 8);
            self.msis.extend(this.interrupt(sint));
        }
        Ok(())
    }

    fn discard(&mut self, sint: u8) {
        for vp in 0..VPS {
            let queue = &mut self.vps[vp as usize].queue;
            queue.retain(|message| message.0 != sint);
            self.deliver(vp);
        }
    }
}

/// The thing itself, beside its model.
struct Pair {
    bed: Bed,
    /// In hybrid mode.
    kernel: Option<Arc<Kernel>>,
    trigger: Arc<Counter>,
    model: Model,
}

impl Pair {
    fn new(hybrid: bool) -> Self {
        let mut bed = Bed::new(VPS, QUEUE_LIMIT);
        let kernel = hybrid.then(|| Kernel::new(bed.sink.clone()));
        if let Some(kernel) = &kernel {
            bed.synic = bed.synic.with_lines(kernel.clone());
        }
        let trigger = Arc::new(Counter::default());
        bed.synic.set_drain_trigger(trigger.clone());
        let pair = Self {
            bed,
            kernel,
            trigger,
            model: Model::new(),
        };
        pair.give_kernel();
        pair
    }

    /// What a VMM does before the guest runs, after a reset and after a restore.
    fn give_kernel(&self) {
        let Some(kernel) = &self.kernel else { return };
        for vp in 0..VPS {
            for (msr, value) in self.bed.synic.forwarded_msrs(vp) {
                kernel.take(vp, msr, value);
            }
        }
    }

    fn write(&self, vp: u32, msr: u32, value: u64) -> Result<(), GpFault> {
        let synic = &self.bed.synic;
        match &self.kernel {
            None => synic.write_msr(vp, msr, value),
            Some(kernel) => synic.write_msr_forwarding(vp, msr, value, &mut |msr, value| {
                kernel.take(vp, msr, value);
            }),
        }
    }

    fn apply(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let (synic, model) = (&self.bed.synic, &mut self.model);
        match step {
            Step::Write { vp, msr, value } => {
                let seen = self.write(*vp, *msr, *value);
                prop_assert_eq!(seen, self.model.write(*vp, *msr, *value));
            }
            Step::Post {
                vp,
                sint,
                message_type,
                payload,
            } => {
                let seen = synic.post_message(*vp, *sint, *message_type, payload);
                prop_assert_eq!(seen, model.post(*vp, *sint, *message_type, payload));
            }
            Step::Signal { vp, sint, flag } => {
                let seen = synic.signal_event(*vp, *sint, *flag);
                prop_assert_eq!(seen, model.signal(*vp, *sint, *flag));
            }
            Step::Discard { sint } => {
                synic.discard_messages(*sint);
                model.discard(*sint);
            }
            Step::Store { gpa, value } => {
                let bytes = value.to_le_bytes();
                self.bed.ram.write(*gpa, &bytes).unwrap();
                model.memory[*gpa as usize..][..4].copy_from_slice(&bytes);
            }
            Step::Reset => {
                synic.reset();
                model.vps = (0..VPS).map(ModelVp::new).collect();
                self.give_kernel();
            }
            Step::SaveAndRestore => {
                self.renew();
                self.give_kernel();
            }
        }
        self.compare()
    }

    /// Moves to another SynIC over the same memory.
    fn renew(&mut self) {
        let state = self.bed.synic.save();
        let config = SynicConfig {
            apic_ids: (0..VPS).map(|vp| vp * 2).collect(),
            queue_limit: QUEUE_LIMIT,
        };
        let mut synic = UserSynic::new(&config, self.bed.ram.clone(), self.bed.sink.clone());
        if let Some(kernel) = &self.kernel {
            synic = synic.with_lines(kernel.clone());
        }
        synic.set_drain_trigger(self.trigger.clone());
        assert_eq!(synic.restore(&state), Ok(()));
        assert_eq!(synic.save(), state);
        self.bed.synic = synic;
    }

    fn compare(&mut self) -> Result<(), TestCaseError> {
        for vp in 0..VPS {
            for number in 0x4000_007f..0x4000_00a2 {
                let expected = self.model.vps[vp as usize].read(number).ok_or(GpFault);
                prop_assert_eq!(self.bed.synic.read_msr(vp, number), expected);
                // Reads are the kernel's to answer, but for these two.
                if let Some(kernel) = &self.kernel
                    && ![msr::SVERSION, msr::EOM].contains(&number)
                {
                    prop_assert_eq!(kernel.read(vp, number).ok_or(GpFault), expected);
                }
            }
        }
        if let Some(kernel) = &self.kernel {
            prop_assert_eq!(kernel.lost.load(Ordering::SeqCst), 0);
        }
        prop_assert_eq!(self.bed.sink.take(), std::mem::take(&mut self.model.msis));
        prop_assert_eq!(self.trigger.0.load(Ordering::SeqCst), self.model.drains);
        prop_assert!(self.bed.memory() == self.model.memory, "memory differs");
        Ok(())
    }
}

proptest! {
    #[test]
    fn the_synic_behaves_like_its_model_across_save_and_restore(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        let mut pair = Pair::new(false);
        for step in start().iter().chain(&steps) {
            pair.apply(step)?;
        }
    }

    #[test]
    fn the_synic_behaves_like_the_same_model_with_one_in_the_kernel_beside_it(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        let mut pair = Pair::new(true);
        for step in start().iter().chain(&steps) {
            pair.apply(step)?;
        }
    }

    #[test]
    fn any_state_is_taken_over_whole_or_refused_without_effect(
        version in prop_oneof![9 => Just(SynicState::VERSION), 1 => any::<u32>()],
        vps in proptest::collection::vec(any_vp_state(), 1..4),
    ) {
        let bed = Bed::linux(VPS, QUEUE_LIMIT);
        let (memory, before) = (bed.memory(), bed.synic.save());
        let state = SynicState { version, vps };
        let expected = match bed.synic.restore(&state) {
            Ok(()) => state,
            Err(_) => before,
        };
        prop_assert_eq!(bed.synic.save(), expected);
        prop_assert!(bed.memory() == memory, "memory changed");
    }
}

fn any_vp_state() -> impl Strategy<Value = VpSynicState> {
    let page = || prop_oneof![9 => 0x1000u64..0x5000, 1 => any::<u64>()];
    let message = (
        0u8..17,
        0u32..9,
        proptest::collection::vec(any::<u8>(), 0..9),
    )
        .prop_map(|(sint, message_type, payload)| MessageState {
            sint,
            message_type,
            payload,
        });
    (
        any::<u64>(),
        page(),
        page(),
        prop_oneof![9 => 0x10u64..0x100, 1 => any::<u64>()],
        proptest::collection::vec(message, 0..5),
        any::<bool>(),
    )
        .prop_map(
            |(scontrol, siefp, simp, sint, queue, refused)| VpSynicState {
                scontrol,
                siefp,
                simp,
                sints: [sint; SINT_COUNT],
                queue,
                refused,
            },
        )
}
