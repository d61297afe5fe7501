//! Hyper-V virtual PCI bus and pvIOMMU for KVM-based VMMs.
#![deny(unsafe_code)]
