//! States as text, and texts that somebody changed.
#![forbid(unsafe_code)]

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::vpci::function::PciFunction;

/// What comes of a state that is written and read.
pub(super) fn through_json<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(
    state: &T,
) -> T {
    let text = serde_json::to_string(state).unwrap();
    let read = serde_json::from_str(&text).unwrap();
    assert_eq!(&read, state);
    read
}

/// Every place in a value.
fn places(value: &Value, here: String, all: &mut Vec<String>) {
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                places(item, format!("{here}/{index}"), all);
            }
        }
        Value::Object(members) => {
            for (name, member) in members {
                places(member, format!("{here}/{name}"), all);
            }
        }
        _ => {}
    }
    all.push(here);
}

fn change(value: &mut Value, how: usize, number: u64) {
    *value = match (how, &*value) {
        (0, Value::Number(old)) => {
            let old = old.as_u64().unwrap_or(0);
            json!(old ^ 1 << (number % 64))
        }
        (1, _) => json!(number),
        (2, _) => json!(number % 16),
        (3, Value::Array(items)) => {
            // Each item twice.
            Value::Array(items.iter().chain(items).cloned().collect())
        }
        (4, Value::Array(items)) => Value::Array(items.iter().skip(1).cloned().collect()),
        (5, _) => Value::Null,
        (6, Value::Bool(old)) => json!(!old),
        (7, _) => json!(u64::MAX),
        _ => json!([]),
    };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whoever wrote it: it is refused, or a partition comes of it that works, as far as a guest can
    /// tell without sense in its requests.
    #[test]
    fn a_changed_state_is_refused_or_harmless(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..9usize, any::<u64>()), 1..4),
        at in 0..STEPS.len(),
    ) {
        let (mut source, mut found) = (Guest::new(), Found::default());
        for step in &STEPS[..at] {
            step(&mut source, &mut found);
        }
        let state = (source.partition.save().unwrap(), source.device.save());
        let gone = state.0.buses.is_empty();
        let mut value = serde_json::to_value(&state).unwrap();
        for (place, how, number) in changes {
            let mut all = Vec::new();
            places(&value, String::new(), &mut all);
            let place = &all[place.index(all.len())];
            change(value.pointer_mut(place).unwrap(), how, number);
        }
        let Ok((partition, device)) =
            serde_json::from_value::<(PartitionState, crate::devices::testdev::TestDeviceState)>(value)
        else {
            return Ok(());
        };
        let ram = source.ram.clone();
        drop(source);
        let mut guest = Guest::over(ram);
        if gone {
            guest.partition.remove(&INSTANCE);
            guest.host.run();
        }
        let taken = guest.partition.restore(&partition).is_ok();
        let _ = guest.device.restore(device);
        if taken {
            guest.host.run();
            let again = guest.partition.save().unwrap();
            prop_assert!(guest.partition.restore(&again).is_ok(), "not its own state");
        }
        // It can be used, or used again.
        guest.partition.reset();
        guest.device.reset();
        if !gone {
            guest.main_job(0x6_0000, 0x1_0004);
        }
    }
}
