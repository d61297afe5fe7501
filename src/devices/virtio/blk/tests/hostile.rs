//! Random requests on random chains: the device never panics, always comes to rest, and answers
//! what it can.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// A buffer of a random chain; the first 16 bytes of the readable ones are the header.
fn buf() -> impl Strategy<Value = Buf> {
    let gpa = prop_oneof![
        6 => DATA..DATA + 0x1000,
        1 => crate::devices::virtio::testing::RAM_SIZE - 700
            ..crate::devices::virtio::testing::RAM_SIZE + 700,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        3 => Just(512u32),
        3 => Just(1u32),
        3 => 0u32..1100,
        1 => any::<u32>(),
    ];
    (gpa, len, any::<bool>()).prop_map(|(gpa, len, write)| Buf { gpa, len, write })
}

fn kind() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => prop::sample::select(vec![
            VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
        ]),
        1 => any::<u32>(),
    ]
}

fn sector() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0u64..16, 1 => SECTORS - 2..SECTORS + 2, 1 => any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_request_is_answered_or_the_device_asks_for_a_reset(
        requests in vec((kind(), sector(), vec(buf(), 0..6), any::<bool>()), 1..8),
        indirect: bool,
    ) {
        let bed = bed();
        let ram = &bed.guest.ram;
        let mut queue = bed.guest.start(VERSION_1 | FLUSH | INDIRECT, 1).remove(0);
        for (kind, sector, mut bufs, tidy) in requests {
            bufs.sort_by_key(|buf| tidy && buf.write);
            bufs.insert(0, bed.header(kind, sector));
            if tidy {
                bufs.push(into(STATUS, 1));
            }
            ram.write(STATUS, &[0xee]).unwrap();
            let head = if indirect {
                queue.add_indirect(ram, 0x9_0000, &bufs)
            } else {
                queue.add(ram, &bufs)
            };
            bed.guest.kick(&queue);
            bed.host.run();
            match queue.used(ram) {
                Some((answered, len)) => {
                    prop_assert_eq!(answered, head);
                    let room: u64 =
                        bufs.iter().filter(|b| b.write).map(|b| u64::from(b.len)).sum();
                    prop_assert!(u64::from(len) <= room);
                    if tidy {
                        prop_assert!(bed.guest.bytes(STATUS, 1)[0] <= UNSUPP);
                    }
                }
                None => {
                    prop_assert_eq!(bed.guest.status(), 0x4f);
                    queue = bed.guest.start(VERSION_1 | FLUSH | INDIRECT, 1).remove(0);
                }
            }
            prop_assert_eq!(queue.used(ram), None);
        }
        prop_assert_eq!(bed.image.as_file().metadata().unwrap().len(), SECTORS * 512);
    }
}
