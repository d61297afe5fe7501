//! How a task ends: one exit status and, unless all is well, one message.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use thiserror::Error;

/// Ends of a task other than success. Any other error counts as [`Failure::Failed`].
#[derive(Debug, Error)]
pub(crate) enum Failure {
    /// What was asked for was tried and does not hold; the details are printed already.
    #[error("{0}")]
    Failed(String),
    /// The command line asks for something that does not exist.
    #[error("{0}")]
    Usage(String),
    /// This machine lacks something; the message says what to do.
    #[error("{0}")]
    Lacking(String),
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Failure::Failed(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Lacking(_) => 3,
        }
    }
}

/// Status that `error` ends the program with.
fn status(error: &anyhow::Error) -> u8 {
    error.downcast_ref().map_or(1, Failure::status)
}

/// Prints the error of a task, if any, on one line and returns the exit status.
pub(crate) fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(status(&error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Failure;
    use super::status;
    use anyhow::Context;

    #[test]
    fn every_kind_of_failure_keeps_its_status_through_added_context() {
        for (failure, expected) in [
            (Failure::Failed("no".into()), 1),
            (Failure::Usage("what".into()), 2),
            (Failure::Lacking("no apt".into()), 3),
        ] {
            let error = Err::<(), _>(failure).context("outer").unwrap_err();
            assert_eq!(status(&error), expected);
        }
        assert_eq!(status(&anyhow::anyhow!("anything else")), 1);
    }
}
