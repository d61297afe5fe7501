//! Work that may hang in the kernel, with a limit on the time it is waited for.

use anyhow::{Result, bail};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Runs `work` in a thread of its own and gives its answer, or an error naming `what` after
/// `limit`. A thread that hangs is left behind: the machine ends soon after.
pub(crate) fn bounded<T: Send + 'static>(
    what: &str,
    limit: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        // The receiver is gone when the limit has passed, and then the answer is no use.
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(limit) {
        Ok(answer) => answer,
        Err(RecvTimeoutError::Timeout) => bail!("{what}: not done in {} s", limit.as_secs()),
        Err(RecvTimeoutError::Disconnected) => bail!("{what}: panicked"),
    }
}

/// A thread that does one piece of work after another.
#[derive(Debug)]
pub(crate) struct Worker<Q, A> {
    requests: Sender<Q>,
    answers: std::sync::mpsc::Receiver<Result<A>>,
    what: String,
}

impl<Q: Send + 'static, A: Send + 'static> Worker<Q, A> {
    /// Starts the thread; `work` answers each request.
    pub(crate) fn start(
        what: impl Into<String>,
        mut work: impl FnMut(Q) -> Result<A> + Send + 'static,
    ) -> Self {
        let (requests, inbox) = channel::<Q>();
        let (outbox, answers) = channel();
        std::thread::spawn(move || {
            while let Ok(request) = inbox.recv() {
                if outbox.send(work(request)).is_err() {
                    break;
                }
            }
        });
        Self {
            requests,
            answers,
            what: what.into(),
        }
    }

    /// Sends one request and waits for its answer at most `limit`. After an error the worker may
    /// still hold a late answer: do not ask it again.
    pub(crate) fn ask(&self, request: Q, limit: Duration) -> Result<A> {
        if self.requests.send(request).is_err() {
            bail!("{}: its thread is gone", self.what);
        }
        match self.answers.recv_timeout(limit) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => {
                bail!("{}: not done in {} s", self.what, limit.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("{}: panicked", self.what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_ends_gives_its_answer() {
        let answer = bounded("sum", Duration::from_secs(5), || Ok(1 + 1)).unwrap();
        assert_eq!(answer, 2);
    }

    #[test]
    fn work_that_hangs_or_panics_is_an_error_with_its_name() {
        let error = bounded("nap", Duration::ZERO, || {
            std::thread::sleep(Duration::from_secs(1));
            Ok(())
        });
        assert!(error.unwrap_err().to_string().contains("nap"));
        let error = bounded::<()>("crash", Duration::from_secs(5), || panic!("as planned"));
        assert!(error.unwrap_err().to_string().contains("crash: panicked"));
    }

    #[test]
    fn a_worker_answers_in_order_and_reports_a_hang() {
        let worker = Worker::start("naps", |millis: u64| {
            std::thread::sleep(Duration::from_millis(millis));
            Ok(millis)
        });
        assert_eq!(worker.ask(0, Duration::from_secs(5)).unwrap(), 0);
        assert_eq!(worker.ask(1, Duration::from_secs(5)).unwrap(), 1);
        let error = worker.ask(500, Duration::from_millis(1)).unwrap_err();
        assert!(error.to_string().contains("naps"));
    }
}
