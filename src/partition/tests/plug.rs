//! Plugging in, and what is left of a bus that was refused.
#![forbid(unsafe_code)]

use super::*;

/// A bus with `device` as its functions `numbers`.
fn plug(
    guest: &Guest,
    instance: Uuid,
    device: &Arc<TestDevice>,
    numbers: &[u8],
) -> Result<(), PlugError> {
    let functions = numbers.iter();
    guest.partition.plug(BusSpec {
        instance,
        functions: functions
            .map(|number| FunctionSpec::new(*number, device.clone()))
            .collect(),
    })
}

#[test]
fn a_device_whose_bus_was_refused_can_be_plugged_in_later() {
    let (mut guest, relid) = main_job(0x5_0003, 0x1_0004);
    let device = TestDevice::new(9, &*guest.host).unwrap();
    let twin = plug(&guest, INSTANCE, &device, &[0]);
    assert!(matches!(twin, Err(PlugError::DuplicateId(_))));
    assert!(guest.partition.remove(&INSTANCE));
    guest.host.run();
    guest.expect_message(2);
    let malformed = plug(&guest, INSTANCE, &device, &[0, 8]);
    assert!(matches!(malformed, Err(PlugError::Bus(_))));
    let early = plug(&guest, INSTANCE, &device, &[0]);
    assert!(matches!(early, Err(PlugError::Offer(_))), "{early:?}");
    let release = [13, 0, 0, 0, 0, 0, 0, 0, relid as u8, 0, 0, 0];
    assert_eq!(guest.post(1, &release), 0);
    guest.host.run();
    plug(&guest, INSTANCE, &device, &[0]).unwrap();
    guest.partition.reset();
    guest.rings = None;
    guest.main_job(0x5_0003, 0x1_0004);
}

#[test]
fn a_device_that_the_pviommu_had_no_room_for_can_be_plugged_in_later() {
    let config = IommuConfig {
        max_functions: 2,
        ..IommuConfig::default()
    };
    let mut guest = Guest::with_iommu(ram(256), config);
    let other = uuid!("00000003-0002-0008-8000-000000000000");
    let device = TestDevice::new(9, &*guest.host).unwrap();
    let second = TestDevice::new(10, &*guest.host).unwrap();
    let functions = vec![
        FunctionSpec::new(0, device.clone()),
        FunctionSpec::new(1, second),
    ];
    let spec = BusSpec {
        instance: other,
        functions,
    };
    let full = guest.partition.plug(spec).unwrap_err();
    assert!(matches!(full, PlugError::Iommu(_)), "{full}");
    assert_eq!(guest.partition.iommu().unwrap().devices.len(), 1);
    assert!(guest.partition.remove(&INSTANCE));
    plug(&guest, INSTANCE, &device, &[0]).unwrap();
    guest.main_job(0x5_0003, 0x1_0004);
}

#[test]
fn the_devices_of_a_removed_bus_are_the_callers_again_whatever_the_guest_does() {
    for open in [false, true] {
        let mut guest = Guest::new();
        guest.boot();
        assert!(guest.contact(0x5_0003));
        let relid = if open {
            guest.probe(0x1_0004)
        } else {
            guest.offers()[0].0
        };
        let spare = TestDevice::new(9, &*guest.host).unwrap();
        let device = Arc::downgrade(&std::mem::replace(&mut guest.device, spare));
        assert!(guest.partition.remove(&INSTANCE));
        assert!(device.upgrade().is_none(), "open: {open}");
        // The guest is told, and never answers.
        guest.host.run();
        assert_eq!(word(&guest.expect_message(2), 8), relid);
        let spare = guest.device.clone();
        let early = plug(&guest, INSTANCE, &spare, &[0]);
        assert!(matches!(early, Err(PlugError::Offer(_))), "{early:?}");
    }
}
