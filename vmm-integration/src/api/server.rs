//! The VMM's end of the control socket: a thread that accepts, and one for each client.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::process::umask;
use uuid::Uuid;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Answer, Ejection, MAX_EJECT_TIMEOUT_S, MAX_LINE, MachineState, Refusal, RefusalKind, Reply,
    Request,
};
use crate::embed::{Embedding, UnplugError};
use crate::vcpu::Shared;

/// Most clients at the same time.
const MAX_CLIENTS: usize = 16;

/// Longest time that the end of the VM waits for replies to be written.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// The host refuses it.
    #[error("--api-socket {}: {source}", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// Somebody answers at it.
    #[error("--api-socket {}: another program listens there: end it or give another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The path is something else.
    #[error("--api-socket {}: exists and is no socket: give another path", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
}

/// What only the main thread can do.
#[derive(Debug)]
pub(crate) enum Order {
    /// Stop all vCPUs.
    Pause,
    /// Let them run.
    Resume,
    /// Stop all vCPUs and write the VM's state to a file.
    Snapshot(PathBuf),
    /// End the VM.
    Quit,
}

/// An order and where its outcome goes.
#[derive(Debug)]
struct Given {
    order: Order,
    done: mpsc::Sender<Result<MachineState, Refusal>>,
}

/// Orders on their way to the main thread.
#[derive(Debug)]
pub(crate) struct Orders {
    queue: Mutex<Vec<Given>>,
    state: Mutex<MachineState>,
    wake: EventFd,
    /// Clients that are still to hear that the VM ends.
    farewells: Mutex<usize>,
    farewell_said: Condvar,
}

/// A client that is to hear that the VM ends, until this is dropped.
struct Farewell<'a>(&'a Orders);

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        *lock(&self.0.farewells) -= 1;
        self.0.farewell_said.notify_all();
    }
}

impl Orders {
    /// None yet, for a machine that runs.
    ///
    /// # Errors
    ///
    /// No event descriptor to be had.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            queue: Mutex::default(),
            state: Mutex::new(MachineState::Running),
            wake: EventFd::new(EFD_NONBLOCK)?,
            farewells: Mutex::default(),
            farewell_said: Condvar::new(),
        })
    }

    /// Main thread: carries out what was ordered since the last call. `carry_out` gives the state of
    /// the machine afterwards, and whether it did what was ordered.
    pub(crate) fn carry_out(
        &self,
        mut carry_out: impl FnMut(Order) -> (MachineState, Result<(), Refusal>),
    ) {
        // Fails only when nothing was written.
        let _ = self.wake.read();
        let given = std::mem::take(&mut *lock(&self.queue));
        for Given { order, done } in given {
            let (state, result) = carry_out(order);
            *lock(&self.state) = state;
            // The client may have gone away.
            let _ = done.send(result.map(|()| state));
        }
    }

    fn give(&self, order: Order) -> Result<MachineState, Refusal> {
        let (done, outcome) = mpsc::channel();
        lock(&self.queue).push(Given { order, done });
        let ending = |_| Refusal::new(RefusalKind::Ending, "the VM is ending");
        self.wake
            .write(1)
            .map_err(|error| Refusal::new(RefusalKind::Ending, error))?;
        outcome.recv().map_err(ending)?
    }

    fn state(&self) -> MachineState {
        *lock(&self.state)
    }

    fn begin_farewell(&self) -> Farewell<'_> {
        *lock(&self.farewells) += 1;
        Farewell(self)
    }

    /// Waits until all who asked for the end have their replies, but not for ever: a client may not
    /// read.
    fn end_farewells(&self, patience: Duration) {
        let farewells = lock(&self.farewells);
        let to_come = |count: &mut usize| *count != 0;
        drop(
            self.farewell_said
                .wait_timeout_while(farewells, patience, to_come),
        );
    }
}

impl AsRawFd for Orders {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// The socket; its file goes away with it.
#[derive(Debug)]
pub(crate) struct Server {
    path: PathBuf,
    listener: Option<UnixListener>,
    /// Once it serves clients.
    orders: Option<Arc<Orders>>,
}

impl Server {
    /// Makes the socket, for its owner alone. Call it while the process has one thread: the file
    /// mode creation mask is changed for a moment.
    ///
    /// # Errors
    ///
    /// [`ApiError`].
    pub(crate) fn bind(path: &Path) -> Result<Self, ApiError> {
        let failed = |source| ApiError::Bind {
            path: path.to_owned(),
            source,
        };
        if let Ok(metadata) = fs::symlink_metadata(path) {
            let path = path.to_owned();
            if !metadata.file_type().is_socket() {
                return Err(ApiError::NoSocket { path });
            }
            if UnixStream::connect(&path).is_ok() {
                return Err(ApiError::InUse { path });
            }
            // Left behind by a VMM that was killed.
            fs::remove_file(&path).map_err(failed)?;
        }
        let old = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
        let listener = UnixListener::bind(path);
        umask(old);
        Ok(Self {
            path: path.to_owned(),
            listener: Some(listener.map_err(failed)?),
            orders: None,
        })
    }

    /// Serves clients from now on.
    ///
    /// # Errors
    ///
    /// No thread to be had.
    pub(crate) fn start(&mut self, shared: Arc<Shared>, orders: Arc<Orders>) -> io::Result<()> {
        let Some(listener) = self.listener.take() else {
            return Ok(());
        };
        self.orders = Some(orders.clone());
        let context = Context { shared, orders };
        let accept = move || accept(&listener, &context);
        thread::Builder::new()
            .name("api".into())
            .spawn(accept)
            .map(drop)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The process ends next, with the threads that write replies.
        if let Some(orders) = &self.orders {
            orders.end_farewells(PATIENCE);
        }
        // Best effort: the next VMM finds that nobody answers there.
        let _ = fs::remove_file(&self.path);
    }
}

/// What a client's thread works with.
#[derive(Clone)]
struct Context {
    shared: Arc<Shared>,
    orders: Arc<Orders>,
}

fn accept(listener: &UnixListener, context: &Context) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let mut stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                log::warn!("control socket: {error}");
                // Out of descriptors, most likely: others will be closed.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
            clients.fetch_sub(1, Ordering::Relaxed);
            let refusal = Refusal::new(RefusalKind::Busy, "too many clients: try again");
            // The client sees the end of the stream in any case.
            let _ = write_line(&mut stream, &Reply::Error(refusal));
            continue;
        }
        let (context, count) = (context.clone(), clients.clone());
        let serve = move || {
            if let Err(error) = serve(&stream, &context) {
                log::debug!("a client of the control socket: {error}");
            }
            count.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = thread::Builder::new()
            .name("api-client".into())
            .spawn(serve)
        {
            log::warn!("control socket: {error}");
            clients.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn serve(stream: &UnixStream, context: &Context) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let length = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)?;
        if length == 0 {
            return Ok(());
        }
        let whole = line.ends_with(b"\n") || (length as u64) < MAX_LINE;
        let request = if !whole {
            Err(bad_request("the line is too long"))
        } else {
            serde_json::from_slice(&line).map_err(bad_request)
        };
        let quits = matches!(request, Ok(Request::Quit));
        let _farewell = quits.then(|| context.orders.begin_farewell());
        let reply = request.and_then(|request| context.handle(request));
        let reply = reply.map_or_else(Reply::Error, Reply::Result);
        write_line(&mut &*stream, &reply)?;
        if !whole {
            return Ok(());
        }
    }
}

fn write_line(stream: &mut impl Write, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn bad_request(message: impl ToString) -> Refusal {
    Refusal::new(RefusalKind::BadRequest, message)
}

fn parse_bus(text: &str) -> Result<Uuid, Refusal> {
    Uuid::try_parse(text).map_err(|_| bad_request(format!("'{text}' is no GUID of a bus")))
}

/// What a request is about: a bus, or one function of it.
#[derive(Debug, Clone, Copy)]
struct Target {
    bus: Uuid,
    function: Option<u8>,
}

impl Target {
    fn parse(bus: &str, function: Option<u8>) -> Result<Self, Refusal> {
        let bus = parse_bus(bus)?;
        Ok(Self { bus, function })
    }

    fn remove(self, embedding: &Embedding) -> Result<(), UnplugError> {
        match self.function {
            None => embedding.remove(&self.bus),
            Some(function) => embedding.remove_function(&self.bus, function),
        }
    }
}

impl Context {
    fn embedding(&self) -> &Embedding {
        &self.shared.embedding
    }

    fn handle(&self, request: Request) -> Result<Answer, Refusal> {
        let state = |state| Ok(Answer::State { state });
        match request {
            Request::List => Ok(Answer::List(self.embedding().list(self.orders.state()))),
            Request::Plug { specs } => {
                let refused = |error| Refusal::new(RefusalKind::PlugRefused, error);
                let bus = self.embedding().plug(&specs).map_err(refused)?;
                Ok(Answer::Plugged {
                    plugged: bus.to_string(),
                })
            }
            Request::Eject {
                bus,
                function,
                timeout_s,
                wait,
            } => self.eject(&bus, function, timeout_s, wait),
            Request::Remove { bus, function } => {
                let target = Target::parse(&bus, function)?;
                target.remove(self.embedding()).map_err(unplug_refused)?;
                let removed = bus;
                Ok(Answer::Removed { removed, function })
            }
            Request::Pause => state(self.orders.give(Order::Pause)?),
            Request::Resume => state(self.orders.give(Order::Resume)?),
            Request::Snapshot { path } => self.snapshot(path),
            Request::Quit => state(self.orders.give(Order::Quit)?),
        }
    }

    fn snapshot(&self, path: String) -> Result<Answer, Refusal> {
        if !Path::new(&path).is_absolute() {
            return Err(bad_request(format!("'{path}' is no absolute path")));
        }
        self.orders.give(Order::Snapshot(PathBuf::from(&path)))?;
        // Nobody but the user has touched it since.
        let bytes = fs::metadata(&path).map_or(0, |file| file.len());
        Ok(Answer::Saved {
            snapshot: path,
            bytes,
        })
    }

    fn eject(
        &self,
        bus: &str,
        function: Option<u8>,
        timeout_s: u32,
        wait: bool,
    ) -> Result<Answer, Refusal> {
        let target = Target::parse(bus, function)?;
        if timeout_s > MAX_EJECT_TIMEOUT_S {
            let most = format!("a guest gets at most {MAX_EJECT_TIMEOUT_S} seconds");
            return Err(bad_request(most));
        }
        let (done, outcome) = mpsc::channel();
        let tell = move || {
            // Nobody listens any more after a timeout.
            let _ = done.send(());
        };
        let embedding = self.embedding();
        let asked = match target.function {
            None => embedding.eject(&target.bus, Box::new(tell)),
            Some(number) => embedding.eject_function(&target.bus, number, Box::new(tell)),
        };
        let incarnation = asked.map_err(unplug_refused)?;
        let shared = self.shared.clone();
        let finish = move || {
            let how = match outcome.recv_timeout(Duration::from_secs(timeout_s.into())) {
                Err(RecvTimeoutError::Timeout) => Ejection::TimedOut,
                Ok(()) | Err(RecvTimeoutError::Disconnected) => Ejection::Released,
            };
            // Somebody else may have removed it meanwhile, which is as good, and even plugged in
            // another one, which must stay.
            let Target { bus, function } = target;
            let _ = shared.embedding.remove_ejected(&bus, function, incarnation);
            how
        };
        let how = if wait {
            finish()
        } else {
            let name = "api-eject".to_owned();
            let background = move || {
                finish();
            };
            thread::Builder::new()
                .name(name)
                .spawn(background)
                .map_err(|error| Refusal::new(RefusalKind::Busy, error))?;
            Ejection::Started
        };
        Ok(Answer::Ejected {
            ejected: bus.to_owned(),
            function,
            how,
        })
    }
}

fn unplug_refused(error: UnplugError) -> Refusal {
    let kind = match error {
        UnplugError::NoSuchBus => RefusalKind::NoSuchBus,
        UnplugError::NoSuchFunction { .. } => RefusalKind::NoSuchFunction,
        UnplugError::Function0 => RefusalKind::BadRequest,
        UnplugError::Busy => RefusalKind::Busy,
    };
    Refusal::new(kind, error)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_socket_is_its_owners_alone_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let server = Server::bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(Server::bind(&path), Err(ApiError::InUse { .. })));
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_was_left_behind_is_replaced_and_another_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Server::bind(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        let error = Server::bind(&path).unwrap_err();
        assert!(matches!(error, ApiError::NoSocket { .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        let nowhere = dir.path().join("none/s");
        let error = Server::bind(&nowhere).unwrap_err().to_string();
        assert!(error.starts_with("--api-socket ") && error.contains("none/s"));
    }

    #[test]
    fn the_vm_ends_when_who_asked_for_it_has_the_reply() {
        let orders = Arc::new(Orders::new().unwrap());
        let (begun, wait) = mpsc::channel();
        let client = {
            let orders = orders.clone();
            thread::spawn(move || {
                let _farewell = orders.begin_farewell();
                begun.send(()).unwrap();
                thread::sleep(Duration::from_millis(50));
            })
        };
        wait.recv().unwrap();
        orders.end_farewells(Duration::from_secs(60));
        assert_eq!(*lock(&orders.farewells), 0);
        client.join().unwrap();
        // A client that does not read holds nothing up.
        let _farewell = orders.begin_farewell();
        orders.end_farewells(Duration::from_millis(1));
    }

    #[test]
    fn an_order_waits_for_the_main_thread() {
        let orders = Arc::new(Orders::new().unwrap());
        let client = {
            let orders = orders.clone();
            thread::spawn(move || orders.give(Order::Pause))
        };
        while orders.state() == MachineState::Running {
            orders.carry_out(|order| match order {
                Order::Pause => (MachineState::Paused, Ok(())),
                _ => (MachineState::Running, Ok(())),
            });
            thread::yield_now();
        }
        assert_eq!(client.join().unwrap(), Ok(MachineState::Paused));
    }
}
