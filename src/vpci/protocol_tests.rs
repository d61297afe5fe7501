use super::super::testing::*;
use super::*;
use crate::devices::testdev::TestDevice;
use crate::hv::vpci::MessageType as T;
use proptest::prelude::*;
use zerocopy::little_endian::U16;

const BAD_DATA: u32 = 0xc000_090b;
const INSUFFICIENT_RESOURCES: u32 = 0xc000_009a;
const NOT_SUPPORTED: u32 = 0xc000_00bb;
const INVALID_STATE: u32 = 0xc000_0184;
const INVALID_PARAMETER: u32 = 0xc000_000d;
const INSUFFICIENT: u32 = 0xc000_009a;

/// A protocol on a bus of its own, without a ring.
struct Rig {
    guest: Guest,
    protocol: Protocol,
    replies: Replies,
}

fn rig() -> Rig {
    let workers = Arc::new(HandLoop::default());
    let device = TestDevice::new(8, &*workers).unwrap();
    Rig {
        guest: Guest::new(workers, vec![(0, device)], |_| {}),
        protocol: Protocol::default(),
        replies: Replies::new(wire::MAX_PAYLOAD_LEN),
    }
}

impl Rig {
    fn send(&mut self, message: &(impl IntoBytes + Immutable)) -> u32 {
        self.send_bytes(message.as_bytes())
    }

    fn send_bytes(&mut self, payload: &[u8]) -> u32 {
        self.protocol
            .handle(&self.guest.bus.core, payload, &mut self.replies);
        assert!(self.replies.completion.len() >= 4);
        status(&self.replies.completion)
    }

    fn reply<T: FromBytes>(&self) -> T {
        T::read_from_prefix(&self.replies.completion).unwrap().0
    }

    fn in_d0(mut self, version: u32) -> Self {
        assert_eq!(self.send(&query_version(version)), 0);
        assert_eq!(self.send(&d0_entry(LOW)), 0);
        self
    }

    fn live(&self) -> usize {
        let functions = &self.guest.bus.core.functions;
        functions.get(0).unwrap().interrupts.handles.live()
    }
}

#[test]
fn only_the_version_query_is_legal_before_a_version_is_accepted_and_never_after() {
    let mut rig = rig();
    for n in (0..=0x1d).filter(|n| *n != 0x13) {
        let message = wire::ResourcesAssigned {
            message_type: (0x4249_0000 + n).into(),
            ..Default::default()
        };
        assert_eq!(rig.send(&message), INVALID_STATE, "{n:#x}");
    }
    for version in [0, 0x0001_0000, 0x0001_0005, 0x0002_0000, u32::MAX] {
        assert_eq!(rig.send(&query_version(version)), 0xc000_0059);
    }
    assert_eq!(rig.send(&query_version(0x0001_0001)), 0);
    assert_eq!(rig.send(&query_version(0x0001_0001)), INVALID_STATE);
    assert_eq!(rig.protocol.version(), Some(ProtocolVersion::V1_1));
    rig.protocol.close(&rig.guest.bus.core);
    assert_eq!(rig.send(&query_version(0x0001_0004)), 0);
}

#[test]
fn each_message_type_has_its_documented_answer() {
    let mut rig = rig().in_d0(0x0001_0004);
    let answers = [
        (0x00, BAD_DATA),
        (0x01, 0),
        (0x02, BAD_DATA),
        (0x03, BAD_DATA),
        (0x05, 0),
        (0x09, NOT_SUPPORTED),
        (0x0a, NOT_SUPPORTED),
        (0x0b, BAD_DATA),
        (0x0c, NOT_SUPPORTED),
        (0x0d, NOT_SUPPORTED),
        (0x0e, NOT_SUPPORTED),
        (0x0f, 0),
        (0x10, 0),
        (0x11, 0),
        (0x12, BAD_DATA),
        (0x13, INVALID_STATE),
        (0x15, 0),
        (0x16, 0),
        (0x18, 0),
        (0x19, BAD_DATA),
        (0x1a, 0),
        (0x1c, NOT_SUPPORTED),
        (0x1d, NOT_SUPPORTED),
        (0x1e, BAD_DATA),
        (0xffff, BAD_DATA),
    ];
    for (n, want) in answers {
        let message = wire::ResourcesAssigned {
            message_type: (0x4249_0000 + n).into(),
            ..Default::default()
        };
        assert_eq!(rig.send(&message), want, "{n:#x}");
    }
    let refused = answers.iter().filter(|(_, status)| *status != 0).count();
    assert_eq!(rig.protocol.counters.refused, refused as u64);
}

#[test]
fn messages_that_are_too_short_are_bad_data() {
    use std::mem::size_of;
    let lengths = [
        (T::QueryResourceRequirements, size_of::<wire::SlotMessage>()),
        (T::GetResources, size_of::<wire::GetResources>()),
        (T::BusD0Entry, size_of::<wire::BusD0Entry>()),
        (T::ResourcesAssigned, size_of::<wire::ResourcesAssigned>()),
        (T::ResourcesAssigned2, size_of::<wire::ResourcesAssigned>()),
        (T::ResourcesAssigned3, size_of::<wire::ResourcesAssigned>()),
        (T::ResourcesReleased, size_of::<wire::SlotMessage>()),
        (T::EjectionComplete, size_of::<wire::SlotMessage>()),
        (T::PowerStateChange, size_of::<wire::PowerStateChange>()),
        (T::CreateInterrupt, size_of::<wire::CreateInterrupt>()),
        (T::CreateInterrupt2, size_of::<wire::CreateInterrupt2>()),
        (T::CreateInterrupt3, size_of::<wire::CreateInterrupt3>()),
        (T::DeleteInterrupt, size_of::<wire::DeleteInterrupt>()),
        (T::ReadBlock, size_of::<wire::ReadBlock>()),
        (T::WriteBlock, size_of::<wire::WriteBlock>()),
        (T::ResetDevice, size_of::<wire::SlotMessage>()),
        (T::TdispCommand, size_of::<wire::TdispCommand>()),
    ];
    let mut rig = rig().in_d0(0x0001_0004);
    for (message, length) in lengths {
        let mut payload = message.code().to_le_bytes().to_vec();
        payload.resize(length - 1, 0);
        assert_eq!(rig.send_bytes(&payload), BAD_DATA, "{message:?}");
    }
    for length in 0..4 {
        assert_eq!(rig.send_bytes(&vec![0; length]), BAD_DATA);
    }
    let query = query_version(0x0001_0001);
    let mut fresh = self::rig();
    assert_eq!(fresh.send_bytes(&query.as_bytes()[..7]), BAD_DATA);
}

#[test]
fn slots_that_name_no_function_are_bad_data() {
    let mut rig = rig().in_d0(0x0001_0004);
    for slot in [1, 0x20, 0xff, 0x100, 1 << 31] {
        for message in [
            T::QueryResourceRequirements,
            T::GetResources,
            T::ResourcesAssigned,
            T::ResourcesReleased,
            T::EjectionComplete,
            T::CreateInterrupt,
            T::CreateInterrupt2,
            T::CreateInterrupt3,
            T::DeleteInterrupt,
            T::ResetDevice,
            T::TdispCommand,
            T::PowerStateChange,
        ] {
            let mut payload = to_slot(message, slot).as_bytes().to_vec();
            payload.resize(136, 0);
            assert_eq!(rig.send_bytes(&payload), BAD_DATA, "{message:?}");
        }
    }
}

#[test]
fn messages_of_a_later_version_are_bad_data() {
    let mut rig = rig().in_d0(0x0001_0001);
    assert_eq!(rig.send(&create(0, 0x30, 1, 0)), BAD_DATA);
    assert_eq!(rig.send(&assigned(0)), BAD_DATA);
    let mut first = assigned(0);
    first.message_type = T::ResourcesAssigned.code().into();
    assert_eq!(rig.send(&first), 0);
    let relations = wire::BusRelations::read_from_prefix(&rig.replies.relations);
    assert!(relations.is_err(), "none but for a query and D0 entry");
    assert_eq!(rig.send(&header(T::QueryBusRelations)), 0);
    let (head, rest) = wire::BusRelations::read_from_prefix(&rig.replies.relations).unwrap();
    assert_eq!(head.message_type.get(), T::BusRelations.code());
    assert_eq!(rest.len(), 20);
}

#[test]
fn messages_beyond_the_limit_are_refused_and_counted() {
    let mut rig = rig().in_d0(0x0001_0004);
    let most = wire::MAX_MESSAGES;
    for _ in 0..most {
        assert_eq!(rig.send(&create(0, 0x30, 1, 0)), 0);
    }
    for refused in 1..=2 {
        assert_eq!(rig.send(&create(0, 0x30, 1, 0)), INSUFFICIENT_RESOURCES);
        assert_eq!(rig.protocol.counters.exhausted_interrupts, refused);
        assert_eq!(rig.live(), most);
    }
}

#[test]
fn version_1_1_sends_a_mask_and_all_ones_means_any_vp() {
    let mut rig = rig().in_d0(0x0001_0001);
    let message = |mask: u64| wire::CreateInterrupt {
        message_type: T::CreateInterrupt.code().into(),
        slot: 0.into(),
        interrupt: wire::InterruptDescriptor {
            vector: 0xef,
            count: 1.into(),
            processor_mask: mask.into(),
            ..Default::default()
        },
    };
    for mask in [u64::MAX, 8, 0x18] {
        assert_eq!(rig.send(&message(mask)), 0);
        assert_eq!(
            rig.reply::<wire::CreateInterruptReply>()
                .message
                .count
                .get(),
            1
        );
    }
    for mask in [0, 0x10, 1 << 63] {
        assert_eq!(rig.send(&message(mask)), INVALID_PARAMETER);
    }
    assert_eq!(rig.live(), 3);
}

#[test]
fn interrupts_are_created_for_vectors_counts_and_vps_that_exist() {
    let mut rig = rig().in_d0(0x0001_0004);
    let reply = |rig: &Rig| rig.reply::<wire::CreateInterruptReply>().message;
    assert_eq!(rig.send(&create(0, 0xef, 1, 3)), 0);
    assert_eq!(
        (reply(&rig).data.get(), reply(&rig).address.get()),
        (0, ADDRESS)
    );
    assert_eq!(rig.send(&create(0, 0x20, 32, 0)), 0);
    assert_eq!((reply(&rig).data.get(), reply(&rig).count.get()), (32, 32));
    let bad = |change: fn(&mut wire::InterruptDescriptor3)| {
        let mut message = create(0, 0x30, 1, 0);
        change(&mut message.interrupt);
        message
    };
    for message in [
        bad(|i| i.vector = 0x0f.into()),
        bad(|i| i.vector = 0x100.into()),
        bad(|i| i.count = 0.into()),
        bad(|i| i.count = 33.into()),
        bad(|i| i.delivery_mode = 2),
        bad(|i| i.processor_count = 0.into()),
        bad(|i| i.processor_count = 33.into()),
        bad(|i| i.processor_count = u16::MAX.into()),
        bad(|i| i.processors[0] = 4.into()),
        bad(|i| {
            i.processor_count = 2.into();
            i.processors[1] = U16::new(u16::MAX);
        }),
    ] {
        assert_eq!(rig.send(&message), INVALID_PARAMETER);
        assert_eq!(
            rig.replies.completion.len(),
            4,
            "a failure is just the status"
        );
    }
    assert_eq!(rig.send(&bad(|i| i.delivery_mode = 1)), 0);
    while rig.send(&create(0, 0x30, 1, 0)) == 0 {}
    assert_eq!(rig.live(), wire::MAX_MESSAGES);
    assert_eq!(rig.send(&create(0, 0x30, 1, 0)), INSUFFICIENT);
    let second = wire::CreateInterrupt2 {
        message_type: T::CreateInterrupt2.code().into(),
        slot: 0.into(),
        interrupt: wire::InterruptDescriptor2 {
            vector: 0x30,
            count: 1.into(),
            processor_count: 1.into(),
            ..Default::default()
        },
    };
    assert_eq!(rig.send(&second), INSUFFICIENT);
    rig.send(&delete(
        0,
        wire::Message {
            data: 9.into(),
            address: ADDRESS.into(),
            ..Default::default()
        },
    ));
    assert_eq!(rig.send(&second), 0);
    assert_eq!(reply(&rig).data.get(), 9);
}

#[test]
fn deleting_an_unknown_message_is_harmless_and_counted() {
    let mut rig = rig().in_d0(0x0001_0004);
    let message = wire::Message {
        data: 0x4321.into(),
        address: 0xfee0_0000.into(),
        ..Default::default()
    };
    assert_eq!(rig.send(&delete(0, message)), 0);
    assert_eq!(rig.protocol.counters.unknown_deletes, 1);
}

#[test]
fn outside_d0_the_functions_take_no_resources() {
    let mut rig = rig();
    assert_eq!(rig.send(&query_version(0x0001_0004)), 0);
    assert_eq!(rig.send(&create(0, 0x30, 1, 0)), INVALID_STATE);
    assert_eq!(rig.send(&assigned(0)), INVALID_STATE);
    let power = wire::PowerStateChange {
        message_type: T::PowerStateChange.code().into(),
        slot: 0.into(),
        state: wire::POWER_D0.into(),
    };
    assert_eq!(rig.send(&power), INVALID_STATE);
    for message in [
        T::QueryResourceRequirements,
        T::ResourcesReleased,
        T::EjectionComplete,
    ] {
        assert_eq!(rig.send(&to_slot(message, 0)), 0);
    }
    assert_eq!(rig.send(&header(T::QueryBusRelations)), 0);
    assert_eq!(rig.live(), 0);
}

#[test]
fn a_config_window_lies_on_free_mmio_and_a_refused_one_changes_nothing() {
    let mut rig = rig().in_d0(0x0001_0004);
    for window in [
        0,
        0x1000,
        LOW + 0x800,
        LOW - 0x1000,
        LOW + 0x100_0000 - 0x1000,
        !0xfff,
    ] {
        assert_eq!(rig.send(&d0_entry(window)), INVALID_PARAMETER);
        assert_eq!(rig.protocol.window(), Some(LOW));
    }
    // The old place counts as taken until the new one is.
    assert_eq!(rig.send(&d0_entry(LOW + 0x1000)), INVALID_PARAMETER);
    assert_eq!(rig.protocol.counters.refused_windows, 7);
    assert_eq!(rig.send(&d0_entry(LOW)), 0);
    assert_eq!(rig.send(&d0_entry(HIGH)), 0);
    assert_eq!(rig.protocol.window(), Some(HIGH));
    assert_eq!(rig.guest.load32(LOW + 0x1000), !0);
    assert_eq!(rig.guest.load32(HIGH + 0x1000), 0x5650_1234);
}

#[test]
fn power_states_switch_memory_decode() {
    let mut rig = rig().in_d0(0x0001_0004);
    rig.guest.config_write(0, 0x14, (HIGH >> 32) as u32);
    let mut power = |state: u32| {
        rig.send(&wire::PowerStateChange {
            message_type: T::PowerStateChange.code().into(),
            slot: 0.into(),
            state: state.into(),
        })
    };
    assert_eq!(power(1), 0);
    assert_eq!(power(2), BAD_DATA);
    assert_eq!(power(0), BAD_DATA);
    assert_eq!(rig.guest.config_read(0, 4) & 2, 2);
    assert_eq!(rig.guest.load32(HIGH), crate::devices::testdev::MAGIC);
    let off = wire::PowerStateChange {
        message_type: T::PowerStateChange.code().into(),
        slot: 0.into(),
        state: 4.into(),
    };
    assert_eq!(rig.send(&off), 0);
    assert_eq!(rig.guest.config_read(0, 4) & 2, 0);
    assert_eq!(rig.guest.load32(HIGH), !0);
}

#[test]
fn blocks_and_tdisp_are_checked_before_they_are_not_supported() {
    let mut rig = rig().in_d0(0x0001_0004);
    let mut block = |message: T, length: u32, data: usize| {
        let head = wire::WriteBlock {
            message_type: message.code().into(),
            block: 7.into(),
            slot: 0.into(),
            length: length.into(),
        };
        let mut payload = head.as_bytes().to_vec();
        payload.resize(16 + data, 0);
        rig.send_bytes(&payload)
    };
    assert_eq!(block(T::ReadBlock, 128, 0), NOT_SUPPORTED);
    assert_eq!(block(T::ReadBlock, 129, 0), BAD_DATA);
    assert_eq!(block(T::WriteBlock, 128, 128), NOT_SUPPORTED);
    assert_eq!(block(T::WriteBlock, 128, 127), BAD_DATA);
    assert_eq!(block(T::WriteBlock, 129, 200), BAD_DATA);
    assert_eq!(block(T::WriteBlock, u32::MAX, 0), BAD_DATA);
    let mut tdisp = |length: u64| {
        let head = wire::TdispCommand {
            message_type: T::TdispCommand.code().into(),
            slot: 0.into(),
            length: length.into(),
        };
        let mut payload = head.as_bytes().to_vec();
        payload.resize(16 + 8, 0);
        rig.send_bytes(&payload)
    };
    assert_eq!(tdisp(8), NOT_SUPPORTED);
    assert_eq!(tdisp(9), BAD_DATA);
    assert_eq!(tdisp(u64::MAX), BAD_DATA);
}

/// RESOURCES_ASSIGNED3 that places BAR 0 and maps `vectors`.
fn windows_style(bar: u64, length: u32, vectors: &[u32]) -> Vec<u8> {
    let mut head = assigned(0);
    head.message_type = T::ResourcesAssigned3.code().into();
    head.memory[0] = wire::ResourceDescriptor {
        resource_type: wire::resource_type::MEMORY,
        address: bar.into(),
        length: length.into(),
        ..Default::default()
    };
    head.msi_count = (vectors.len() as u32).into();
    let mut payload = head.as_bytes().to_vec();
    for vector in vectors {
        let end = payload.len() + wire::REQUEST_ENTRY_V3;
        payload.extend(create(0, *vector, 1, 1).interrupt.as_bytes());
        payload.resize(end, 0);
    }
    payload
}

#[test]
fn assigned_resources_place_bars_and_map_interrupts() {
    let mut rig = rig().in_d0(0x0001_0004);
    assert_eq!(
        rig.send_bytes(&windows_style(HIGH, 0x4000, &[0x30, 0x31])),
        0
    );
    let reply: wire::ResourcesAssignedReply = rig.reply();
    assert_eq!(reply.msi_count.get(), 2);
    assert_eq!(reply.memory[0].address.get(), HIGH);
    assert_eq!(rig.replies.completion.len(), 136 + 2 * 72);
    for (index, entry) in rig.replies.completion[136..].chunks(72).enumerate() {
        let message = wire::Message::read_from_prefix(entry).unwrap().0;
        assert_eq!(message.data.get(), index as u32);
        assert_eq!(message.count.get(), 1);
        assert!(entry[16..].iter().all(|byte| *byte == 0));
    }
    assert_eq!(rig.guest.load32(HIGH), !0, "decode comes on later");
    rig.guest.config_write(0, 4, 2);
    assert_eq!(rig.guest.load32(HIGH), crate::devices::testdev::MAGIC);
    let request = wire::GetResources {
        message_type: T::GetResources.code().into(),
        ..Default::default()
    };
    rig.send(&request);
    let resources: wire::GetResourcesReply = rig.reply();
    assert_eq!((resources.version.get(), resources.count.get()), (1, 6));
    assert_eq!(resources.memory[0].address.get(), HIGH);
    assert_eq!(resources.memory[0].length.get(), 0x4000);
    assert_eq!(resources.memory[1], wire::ResourceDescriptor::default());
}

#[test]
fn assigned_resources_that_cannot_be_had_leave_nothing_behind() {
    let mut rig = rig().in_d0(0x0001_0004);
    for (payload, want) in [
        (windows_style(HIGH, 0x2000, &[]), INVALID_PARAMETER),
        (windows_style(HIGH + 0x1000, 0x4000, &[]), INVALID_PARAMETER),
        (
            windows_style(HIGH, 0x4000, &[0x30, 0x31, 3]),
            INVALID_PARAMETER,
        ),
    ] {
        assert_eq!(rig.send_bytes(&payload), want);
        assert_eq!(rig.live(), 0);
        assert_eq!(rig.guest.config_read(0, 0x14), 0);
    }
    // Counts that the payload does not cover, or that nobody can ask for.
    for count in [1u32, 494, 495, u32::MAX] {
        let mut payload = windows_style(HIGH, 0x4000, &[]);
        payload[128..132].copy_from_slice(&count.to_le_bytes());
        assert_eq!(rig.send_bytes(&payload), BAD_DATA, "{count}");
    }
    // The most that fits in a packet is mapped; with a small ring the answer does not fit.
    let most = vec![0x30; (wire::MAX_PAYLOAD_LEN - 136) / wire::REQUEST_ENTRY_V3];
    assert_eq!(rig.send_bytes(&windows_style(HIGH, 0x4000, &most)), 0);
    assert_eq!(rig.live(), most.len());
    assert_eq!(rig.send(&to_slot(T::ResourcesReleased, 0)), 0);
    assert_eq!(rig.live(), 0);
    rig.replies = Replies::new(256);
    assert_eq!(
        rig.send_bytes(&windows_style(HIGH, 0x4000, &most)),
        INSUFFICIENT
    );
    assert_eq!(rig.live(), 0);
    // Bytes behind the list, which OpenVMM's guest sends, mean nothing.
    let mut padded = windows_style(HIGH, 0x4000, &[]);
    padded.resize(136 + 80, 0);
    assert_eq!(rig.send_bytes(&padded), 0);
}

proptest! {
    #[test]
    fn any_bytes_get_one_answer_of_bounded_size(
        payloads in proptest::collection::vec(
            (0u32..0x20, proptest::collection::vec(any::<u8>(), 0..300)),
            1..60
        ),
        version in 0x0001_0001u32..=0x0001_0004,
    ) {
        let mut rig = rig().in_d0(version);
        for (n, bytes) in payloads {
            let mut payload = (0x4249_0000 + n).to_le_bytes().to_vec();
            payload.extend(&bytes);
            rig.send_bytes(&payload);
            // The slot is right as often as not.
            if payload.len() >= 8 {
                payload[4..8].fill(0);
                rig.send_bytes(&payload);
            }
            rig.send_bytes(&bytes);
            prop_assert!(rig.replies.completion.len() <= wire::MAX_PAYLOAD_LEN);
            prop_assert!(rig.replies.relations.len() <= Replies::MAX_RELATIONS);
            prop_assert!(rig.live() <= wire::MAX_MESSAGES);
        }
    }
}
