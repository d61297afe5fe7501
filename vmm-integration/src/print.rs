//! Standard output, whose reader may have seen enough.
#![forbid(unsafe_code)]

use std::io::{self, Write};

/// Prints a text. A reader that is gone, such as `head`, is no failure.
///
/// # Errors
///
/// Standard output cannot be written.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}
