use super::*;
use crate::vpci::function::{Capability, MsiSpec, MsixSpec, PciIdentity};
use proptest::prelude::*;

fn layout() -> FunctionLayout {
    let mut layout = FunctionLayout {
        kind: "test",
        identity: PciIdentity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 1,
            prog_if: 2,
            subclass: 3,
            base_class: 4,
            subsystem_vendor: 0xabcd,
            subsystem: 0xef01,
            serial: 9,
        },
        capabilities: vec![Capability {
            id: 9,
            body: vec![0x11, 0x22, 0x33],
            writable: vec![0, 0xf0, 0],
        }],
        msix: Some(MsixSpec {
            vectors: 8,
            table_bar: 0,
            table_offset: 0x1000,
            pba_bar: 0,
            pba_offset: 0x2000,
        }),
        msi: Some(MsiSpec { messages: 4 }),
        ..FunctionLayout::default()
    };
    layout.bars[0] = BarSpec::Memory64 {
        size: 0x4000,
        prefetchable: true,
    };
    layout.bars[2] = BarSpec::Memory32 { size: 0x1000 };
    layout
}

fn space() -> ConfigSpace {
    ConfigSpace::new(&layout(), true).unwrap()
}

fn read(space: &ConfigSpace, offset: usize) -> u32 {
    let mut data = [0; 4];
    space.read(offset, &mut data, || 0);
    u32::from_le_bytes(data)
}

fn write(space: &ConfigSpace, offset: usize, value: u32) -> Changes {
    space.write(offset, &value.to_le_bytes())
}

/// Byte offset of the capability with an id.
fn find(space: &ConfigSpace, id: u8) -> usize {
    let mut at = read(space, 0x34) as usize & 0xff;
    while at != 0 {
        let head = read(space, at);
        if head as u8 == id {
            return at;
        }
        at = (head >> 8) as usize & 0xff;
    }
    panic!("no capability {id:#x}");
}

#[test]
fn the_header_says_who_the_function_is() {
    let space = space();
    assert_eq!(read(&space, 0), 0x5678_1234);
    assert_eq!(read(&space, 4), 0x0010_0000);
    assert_eq!(read(&space, 8), 0x0403_0201);
    assert_eq!(read(&space, 0xc), 0x0080_0000);
    assert_eq!(read(&space, 0x2c), 0xef01_abcd);
    for offset in [0x28, 0x30, 0x38, 0x3c, 0x100, 0xffc] {
        assert_eq!(read(&space, offset), 0, "{offset:#x}");
    }
    let single = ConfigSpace::new(&layout(), false).unwrap();
    assert_eq!(read(&single, 0xc), 0);
}

#[test]
fn read_only_registers_stay_as_they_are() {
    let space = space();
    for offset in [
        0, 8, 0x28, 0x2c, 0x30, 0x34, 0x38, 0x3c, 0x1c, 0x20, 0x24, 0x100,
    ] {
        let before = read(&space, offset);
        assert_eq!(write(&space, offset, !before), Changes::default());
        assert_eq!(read(&space, offset), before, "{offset:#x}");
    }
}

#[test]
fn a_bar_is_sized_by_writing_all_ones() {
    let space = space();
    assert_eq!(
        space.probed_bars(),
        [0xffff_c00c, 0xffff_ffff, 0xffff_f000, 0, 0, 0]
    );
    for (bar, want) in space.probed_bars().into_iter().enumerate() {
        write(&space, 0x10 + 4 * bar, !0);
        assert_eq!(read(&space, 0x10 + 4 * bar), want);
    }
    write(&space, 0x10, 0xfe00_1234);
    write(&space, 0x14, 1);
    assert_eq!(space.bar(0), 0x1_fe00_0000);
}

#[test]
fn bar_writes_are_dropped_while_decode_is_on() {
    let space = space();
    write(&space, 0x18, 0xfe00_0000);
    assert!(write(&space, 4, COMMAND_MEMORY).command);
    write(&space, 0x18, 0xfd00_0000);
    assert_eq!(space.bar(2), 0xfe00_0000);
    assert!(write(&space, 4, 0).command);
    write(&space, 0x18, 0xfd00_0000);
    assert_eq!(space.bar(2), 0xfd00_0000);
}

#[test]
fn the_command_register_keeps_its_bits_and_status_does_not_change() {
    let space = space();
    assert!(write(&space, 4, !0).command);
    assert_eq!(read(&space, 4), 0x0010_0546);
    assert!(!write(&space, 4, !0).command);
    space.set_command(COMMAND_MEMORY, false);
    assert_eq!(space.command(), 0x544);
}

#[test]
fn accesses_are_bytes_words_or_double_words_inside_a_double_word() {
    let space = space();
    let mut byte = [0];
    space.read(3, &mut byte, || 0);
    assert_eq!(byte, [0x56]);
    let mut word = [0; 2];
    space.read(1, &mut word, || 0);
    assert_eq!(word, [0x12, 0x78]);
    space.read(3, &mut word, || 0);
    assert_eq!(word, [0xff; 2]);
    let mut wide = [0; 8];
    space.read(0, &mut wide, || 0);
    assert_eq!(wide, [0xff; 8]);
    let mut last = [1; 4];
    space.read(0xffc, &mut last, || 0);
    assert_eq!(last, [0; 4]);
    space.read(0x1000, &mut last, || 0);
    assert_eq!(last, [0xff; 4]);
    space.write(0x1a, &[0x77, 0x66]);
    assert_eq!(space.bar(2), 0x6677_0000);
    space.write(0x1b, &[0x11, 0x22]);
    assert_eq!(space.bar(2), 0x6677_0000);
}

#[test]
fn the_capability_list_holds_the_devices_own_then_msix_then_msi() {
    let space = space();
    assert_eq!(find(&space, 9), 0x40);
    assert_eq!(read(&space, 0x40), 0x2211_4809);
    assert_eq!(read(&space, 0x44), 0x33);
    let msix = find(&space, 0x11);
    assert_eq!(msix, 0x48);
    assert_eq!(read(&space, msix) >> 16, 7);
    assert_eq!(read(&space, msix + 4), 0x1000);
    assert_eq!(read(&space, msix + 8), 0x2000);
    let msi = find(&space, 5);
    assert_eq!(read(&space, msi) >> 16, 0x0184);
    assert_eq!(read(&space, msi) >> 8 & 0xff, 0);
    write(&space, 0x40, !0);
    assert_eq!(read(&space, 0x40), 0xf211_4809);
}

#[test]
fn msi_and_msix_registers_reach_the_caller() {
    let space = space();
    let msix = find(&space, 0x11);
    assert!(write(&space, msix, 0x8000_0000).msix);
    let control = space.msix().unwrap();
    assert!(control.enabled && !control.masked);
    assert!(space.write(msix + 3, &[0xc0]).msix);
    assert!(space.msix().unwrap().masked);
    let msi = find(&space, 5);
    assert!(write(&space, msi + 4, 0xfee0_0003).msi);
    write(&space, msi + 8, 1);
    write(&space, msi + 12, 0xffff_0044);
    write(&space, msi + 16, !0);
    assert!(write(&space, msi, 0x0071_0000).msi);
    assert_eq!(
        space.msi(),
        Some(MsiRegisters {
            enabled: true,
            messages: 4,
            address: 0x1_fee0_0000,
            data: 0x44,
            mask: 0xf,
        })
    );
    assert_eq!(write(&space, msi + 20, !0), Changes::default());
    let mut pending = [0; 4];
    space.read(msi + 20, &mut pending, || 5);
    assert_eq!(pending, [5, 0, 0, 0]);
}

#[test]
fn capabilities_that_do_not_fit_are_refused() {
    let mut layout = layout();
    let long = |len| {
        vec![Capability {
            id: 9,
            body: vec![0; len],
            writable: vec![0; len],
        }]
    };
    // 192 bytes less MSI-X (12) and MSI (24) leave 156, head included.
    layout.capabilities = long(154);
    ConfigSpace::new(&layout, false).unwrap();
    layout.capabilities = long(155);
    assert_eq!(
        ConfigSpace::new(&layout, false).unwrap_err(),
        LayoutError::CapabilitiesTooLong
    );
}

proptest! {
    #[test]
    fn no_access_changes_a_read_only_bit_and_saving_keeps_all(
        accesses in proptest::collection::vec(
            (0usize..0x1100, proptest::collection::vec(any::<u8>(), 0..9)),
            1..80
        )
    ) {
        let space = space();
        for (offset, data) in &accesses {
            space.write(*offset, data);
            let mut back = data.clone();
            space.read(*offset, &mut back, || 0);
            let saved = space.save();
            prop_assert!(space.accepts(&saved));
            let twin = self::space();
            twin.restore(&saved);
            prop_assert_eq!(twin.save(), saved);
            let at = offset & !3;
            if at < 0x1000 {
                prop_assert_eq!(read(&twin, at), read(&space, at));
            }
        }
        let mut bad = space.save();
        bad[0] ^= 1;
        prop_assert!(!space.accepts(&bad));
        prop_assert!(!space.accepts(&bad[1..]));
        space.reset();
        for offset in (0..0x1000).step_by(4) {
            prop_assert_eq!(read(&space, offset), read(&self::space(), offset));
        }
    }
}
