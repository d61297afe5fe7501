//! The init process of test guests.

fn main() {}
