//! VMBus server.
#![forbid(unsafe_code)]
