//! The bytes of the hypercall page (docs/spec/kvm.md, section 6).
//!
//! The *plain* page makes every call by port I/O, which exits on every KVM. The *hybrid* page makes
//! the calls that the host's kernel is better at with the CPU's own instruction, and the rest by
//! port I/O. Which way a call takes is decided by code in the guest, so it is no boundary: the guest
//! may execute either instruction at will, and both ways lead to checks of their own.
#![forbid(unsafe_code)]

use crate::hv::hypercall::{
    FLUSH_VIRTUAL_ADDRESS_LIST, FLUSH_VIRTUAL_ADDRESS_LIST_EX, FLUSH_VIRTUAL_ADDRESS_SPACE,
    FLUSH_VIRTUAL_ADDRESS_SPACE_EX, NOTIFY_LONG_SPIN_WAIT, SEND_SYNTHETIC_CLUSTER_IPI,
    SEND_SYNTHETIC_CLUSTER_IPI_EX, SIGNAL_EVENT,
};
use crate::mem::PAGE_SIZE;

/// Bytes of a page.
const PAGE: usize = PAGE_SIZE as usize;
/// Byte behind the code: INT3.
const FILL: u8 = 0xcc;
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
const RET: u8 = 0xc3;
/// OUT imm8, EAX.
const OUT: u8 = 0xe7;
/// JE and JNE rel8.
const JE: u8 = 0x74;
const JNE: u8 = 0x75;

/// The instruction by which a guest calls the host's kernel, fixed by the vendor of the host's CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallInstruction {
    /// Intel and those compatible with its VMX.
    Vmcall,
    /// AMD and those compatible with its SVM.
    Vmmcall,
}

impl CallInstruction {
    /// Its three bytes.
    pub const fn bytes(self) -> [u8; 3] {
        match self {
            Self::Vmcall => [0x0f, 0x01, 0xc1],
            Self::Vmmcall => [0x0f, 0x01, 0xd9],
        }
    }
}

/// The calls that the host's kernel answers itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelCalls {
    /// How the guest reaches it.
    pub instruction: CallInstruction,
    /// The four calls that flush TLBs, with sparse sets of VPs too.
    pub flush: bool,
    /// The two calls that send an IPI to a set of VPs.
    pub send_ipi: bool,
    /// HvNotifyLongSpinWait.
    pub spin_wait: bool,
    /// HvSignalEvent: the kernel has the connections' eventfds
    /// ([`ConnectionEvents`](crate::vmm::ConnectionEvents)).
    pub signal_event: bool,
}

impl KernelCalls {
    /// The codes that take the kernel's way whatever their input.
    fn codes(&self) -> impl Iterator<Item = u8> {
        const FLUSH: &[u16] = &[
            FLUSH_VIRTUAL_ADDRESS_SPACE,
            FLUSH_VIRTUAL_ADDRESS_LIST,
            FLUSH_VIRTUAL_ADDRESS_SPACE_EX,
            FLUSH_VIRTUAL_ADDRESS_LIST_EX,
        ];
        const IPI: &[u16] = &[SEND_SYNTHETIC_CLUSTER_IPI, SEND_SYNTHETIC_CLUSTER_IPI_EX];
        let groups = [
            (self.flush, FLUSH),
            (self.send_ipi, IPI),
            (self.spin_wait, &[NOTIFY_LONG_SPIN_WAIT][..]),
        ];
        groups
            .into_iter()
            .filter(|(offered, _)| *offered)
            .flat_map(|(_, codes)| codes.iter().map(|code| *code as u8))
    }
}

/// The code at the start of the page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageCode {
    bytes: Vec<u8>,
}

impl PageCode {
    /// Every call by an OUT to `port`: ENDBR64; OUT port, EAX; RET (docs/spec/kvm.md, section 6.1).
    pub fn plain(port: u8) -> Self {
        let mut bytes = ENDBR64.to_vec();
        bytes.extend([OUT, port, RET]);
        Self { bytes }
    }

    /// The kernel's calls by its instruction, the rest by an OUT to `port` (docs/spec/kvm.md, section
    /// 6.2). Changes only RAX and the flags on the way, which a guest gives up anyway.
    ///
    /// All calls of 32-bit code take the port: there EAX is part of the control word, and a kernel
    /// that makes the calls in question is a 64-bit one. HvSignalEvent takes the kernel's way in its
    /// one usual form only, fast with flag 0; whatever else there is to say about it is said in one
    /// place, behind the port.
    pub fn hybrid(port: u8, calls: &KernelCalls) -> Self {
        let mut code = Assembler::default();
        code.put(&ENDBR64);
        // cmp eax, eax; then MOVSXD EAX, EAX in 64-bit code, which leaves ZF set, but ARPL AX, AX
        // in 32-bit code, which clears it and changes nothing else.
        code.put(&[0x39, 0xc0, 0x63, 0xc0]);
        code.jump_to_port(JNE);
        // movzx eax, cx: the call code.
        code.put(&[0x0f, 0xb7, 0xc1]);
        for number in calls.codes() {
            // cmp eax, imm8
            code.put(&[0x83, 0xf8, number]);
            code.jump_to_call(JE);
        }
        if calls.signal_event {
            let [low, high] = SIGNAL_EVENT.to_le_bytes();
            // cmp rcx, imm32: the whole control word, with nothing but the code and the fast bit.
            code.put(&[0x48, 0x81, 0xf9, low, high, 1, 0]);
            code.jump_to_port(JNE);
            // mov rax, rdx; shr rax, 24: a connection id, flag 0 and nothing reserved.
            code.put(&[0x48, 0x89, 0xd0, 0x48, 0xc1, 0xe8, 24]);
            code.jump_to_call(JE);
        }
        Self {
            bytes: code.finish(port, calls.instruction),
        }
    }

    /// The code alone.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A whole page: the code, and INT3 behind it.
    pub(crate) fn page(&self) -> [u8; PAGE] {
        let mut page = [FILL; PAGE];
        for (to, from) in page.iter_mut().zip(&self.bytes) {
            *to = *from;
        }
        page
    }
}

/// Code with short jumps forward to its two ends.
#[derive(Debug, Default)]
struct Assembler {
    bytes: Vec<u8>,
    to_port: Vec<usize>,
    to_call: Vec<usize>,
}

impl Assembler {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn jump_to_port(&mut self, condition: u8) {
        self.to_port.push(self.bytes.len());
        self.put(&[condition, 0]);
    }

    fn jump_to_call(&mut self, condition: u8) {
        self.to_call.push(self.bytes.len());
        self.put(&[condition, 0]);
    }

    fn finish(mut self, port: u8, instruction: CallInstruction) -> Vec<u8> {
        let (to_port, to_call) = (self.to_port.clone(), self.to_call.clone());
        self.land(to_port);
        self.put(&[OUT, port, RET]);
        self.land(to_call);
        self.put(&instruction.bytes());
        self.put(&[RET]);
        self.bytes
    }

    /// Lets jumps land here. The longest page is shorter than a short jump reaches.
    fn land(&mut self, jumps: Vec<usize>) {
        let here = self.bytes.len();
        for at in jumps {
            self.bytes[at + 1] = (here - at - 2) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PORT: u8 = 0x8d;

    fn all(instruction: CallInstruction) -> KernelCalls {
        KernelCalls {
            instruction,
            flush: true,
            send_ipi: true,
            spin_wait: true,
            signal_event: true,
        }
    }

    /// How a call leaves the page.
    #[derive(Debug, PartialEq, Eq)]
    enum Way {
        Port,
        Kernel(CallInstruction),
    }

    /// Executes the page on a CPU that knows just the instructions that it may have. Panics on any
    /// other, and unless a RET follows the call. `eax` is what a 32-bit caller has in EAX.
    fn execute(code: &PageCode, long: bool, rcx: u64, rdx: u64, eax: u32) -> Way {
        let page = code.page();
        let (mut rax, mut zero, mut at) = (u64::from(eax), false, 0);
        loop {
            let rest = &page[at..];
            let (len, way) = match rest {
                [0xf3, 0x0f, 0x1e, 0xfa, ..] => (4, None),
                [0x39, 0xc0, ..] => {
                    zero = true;
                    (2, None)
                }
                [0x63, 0xc0, ..] => {
                    match long {
                        true => rax = u64::from(rax as u32),
                        false => zero = false,
                    }
                    (2, None)
                }
                [0x0f, 0xb7, 0xc1, ..] => {
                    rax = u64::from(rcx as u16);
                    (3, None)
                }
                [0x83, 0xf8, imm, ..] => {
                    zero = rax as u32 == u32::from(*imm);
                    (3, None)
                }
                [0x48, 0x81, 0xf9, a, b, c, d, ..] => {
                    assert!(long);
                    zero = rcx == i64::from(i32::from_le_bytes([*a, *b, *c, *d])) as u64;
                    (7, None)
                }
                [0x48, 0x89, 0xd0, ..] => {
                    assert!(long);
                    rax = rdx;
                    (3, None)
                }
                [0x48, 0xc1, 0xe8, shift, ..] => {
                    assert!(long);
                    rax >>= shift;
                    zero = rax == 0;
                    (4, None)
                }
                [JE, rel, ..] => (2 + usize::from(*rel) * usize::from(zero), None),
                [JNE, rel, ..] => (2 + usize::from(*rel) * usize::from(!zero), None),
                [OUT, PORT, RET, ..] => (0, Some(Way::Port)),
                [0x0f, 0x01, 0xc1, RET, ..] => (0, Some(Way::Kernel(CallInstruction::Vmcall))),
                [0x0f, 0x01, 0xd9, RET, ..] => (0, Some(Way::Kernel(CallInstruction::Vmmcall))),
                other => panic!("unknown code {:x?} at {at}", &other[..8]),
            };
            if let Some(way) = way {
                let kept = long || rax as u32 == eax;
                assert!(kept, "EAX is part of a 32-bit caller's control word");
                return way;
            }
            at += len;
        }
    }

    #[test]
    fn the_plain_page_is_the_seven_bytes_of_the_specification() {
        let code = PageCode::plain(PORT);
        assert_eq!(code.bytes(), [0xf3, 0x0f, 0x1e, 0xfa, 0xe7, 0x8d, 0xc3]);
        assert!(code.page()[7..].iter().all(|byte| *byte == 0xcc));
        assert_eq!(execute(&code, false, 2, 0, 2), Way::Port);
    }

    #[test]
    fn the_hybrid_page_has_the_bytes_of_the_specification() {
        let calls = KernelCalls {
            flush: false,
            spin_wait: false,
            ..all(CallInstruction::Vmmcall)
        };
        let expected = [
            0xf3, 0x0f, 0x1e, 0xfa, // endbr64
            0x39, 0xc0, 0x63, 0xc0, 0x75, 0x1f, // cmp eax, eax; movsxd eax, eax; jne port
            0x0f, 0xb7, 0xc1, // movzx eax, cx
            0x83, 0xf8, 0x0b, 0x74, 0x1a, // cmp eax, 0x0b; je call
            0x83, 0xf8, 0x15, 0x74, 0x15, // cmp eax, 0x15; je call
            0x48, 0x81, 0xf9, 0x5d, 0, 1, 0, 0x75, 0x09, // cmp rcx, 0x1005d; jne port
            0x48, 0x89, 0xd0, 0x48, 0xc1, 0xe8, 24, 0x74, 0x03, // rdx >> 24; je call
            0xe7, 0x8d, 0xc3, // port: out 0x8d, eax; ret
            0x0f, 0x01, 0xd9, 0xc3, // call: vmmcall; ret
        ];
        assert_eq!(PageCode::hybrid(PORT, &calls).bytes(), expected);
        let vmcall = PageCode::hybrid(PORT, &all(CallInstruction::Vmcall));
        assert!(vmcall.bytes().ends_with(&[0x0f, 0x01, 0xc1, 0xc3]));
    }

    #[test]
    fn the_kernel_gets_its_own_calls_and_the_port_the_rest() {
        let vmmcall = CallInstruction::Vmmcall;
        let code = PageCode::hybrid(PORT, &all(vmmcall));
        for number in [0x02, 0x03, 0x08, 0x0b, 0x13, 0x14, 0x15] {
            // Fast or not, with a rep count or without: the kernel judges the control word.
            for control in [number, number | 1 << 16, number | 3 << 32] {
                let way = execute(&code, true, control, !0, 0);
                assert_eq!(way, Way::Kernel(vmmcall), "{control:#x}");
                assert_eq!(
                    execute(&code, false, control, !0, control as u32),
                    Way::Port
                );
            }
        }
        for number in [0x5c, 0x7e, 0x8001, 0x0102, 0x1_0000, 0] {
            assert_eq!(execute(&code, true, number, 0, 0), Way::Port, "{number:#x}");
        }
    }

    #[test]
    fn only_the_plainest_signal_goes_to_the_kernel() {
        let vmmcall = CallInstruction::Vmmcall;
        let code = PageCode::hybrid(PORT, &all(vmmcall));
        let way = |rcx, rdx| execute(&code, true, rcx, rdx, 0);
        assert_eq!(way(0x1_005d, 0x10001), Way::Kernel(vmmcall));
        assert_eq!(way(0x1_005d, 0xff_ffff), Way::Kernel(vmmcall));
        for (rcx, rdx) in [
            (0x005d, 0x1000),           // in memory
            (0x1_005d, 0x100_0000),     // no such connection id
            (0x1_005d, 1 << 32),        // flag 1
            (0x1_005d, 1 << 48),        // reserved
            (0x1_0001_005d, 1),         // a rep count
            (0x3_005d, 1),              // a variable header
            (0x8001_005d, 1),           // nested
            (0xffff_ffff_8001_005d, 1), // a sign-extended constant must not match
        ] {
            assert_eq!(way(rcx, rdx), Way::Port, "{rcx:#x} {rdx:#x}");
        }
    }

    #[test]
    fn what_the_kernel_does_not_offer_takes_the_port() {
        let none = KernelCalls {
            flush: false,
            send_ipi: false,
            spin_wait: false,
            signal_event: false,
            ..all(CallInstruction::Vmcall)
        };
        let code = PageCode::hybrid(PORT, &none);
        for number in 0..0x100 {
            assert_eq!(execute(&code, true, number, 0, 0), Way::Port);
            assert_eq!(execute(&code, true, 0x1_0000 | number, 0, 0), Way::Port);
        }
    }

    proptest! {
        #[test]
        fn every_call_leaves_the_page_one_way_or_the_other(
            flush: bool, send_ipi: bool, spin_wait: bool, signal_event: bool, long: bool,
            rcx in prop_oneof![any::<u64>(), 0u64..0x100, 0x1_0000u64..0x1_0100],
            rdx in prop_oneof![any::<u64>(), 0u64..0x200_0000],
            eax: u32,
        ) {
            let instruction = CallInstruction::Vmcall;
            let calls = KernelCalls { instruction, flush, send_ipi, spin_wait, signal_event };
            let code = PageCode::hybrid(PORT, &calls);
            let kernel = long && match rcx as u16 {
                0x02 | 0x03 | 0x13 | 0x14 => flush,
                0x0b | 0x15 => send_ipi,
                0x08 => spin_wait,
                0x5d => signal_event && rcx == 0x1_005d && rdx < 1 << 24,
                _ => false,
            };
            let expected = if kernel { Way::Kernel(instruction) } else { Way::Port };
            prop_assert_eq!(execute(&code, long, rcx, rdx, eax), expected);
        }
    }
}
