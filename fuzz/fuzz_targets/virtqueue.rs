//! Fuzzes one target: docs/fuzzing.md.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vpci_fuzz::targets::virtqueue(bytes));
