//! The control socket (`run --api-socket`, `ctl`): one JSON object a line, a request and its reply,
//! as often as the client likes. docs/control.md is its description for users.
#![forbid(unsafe_code)]

mod server;

pub(crate) use server::{ApiError, Order, Orders, Server};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::report::{DomainReport, VectorReport};

/// Longest line of a request, in bytes.
pub(crate) const MAX_LINE: u64 = 1 << 20;
/// Seconds that a guest has to let go of a bus, unless the request says otherwise
/// (docs/spec/vpci.md, section 8).
pub(crate) const EJECT_TIMEOUT_S: u32 = 60;
/// Most seconds that a request may give it.
pub(crate) const MAX_EJECT_TIMEOUT_S: u32 = 3600;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// What is plugged in.
    List,
    /// Plug in the functions of one bus.
    Plug {
        /// As in `--vpci`.
        specs: Vec<String>,
    },
    /// Ask the guest to let go of a bus or of one function of it, then take that away.
    Eject {
        /// Instance GUID.
        bus: String,
        /// Function number; the whole bus without.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        function: Option<u8>,
        /// Seconds until it is taken away whatever the guest does.
        #[serde(default = "default_timeout")]
        timeout_s: u32,
        /// Reply when it is gone instead of at once.
        #[serde(default = "default_wait")]
        wait: bool,
    },
    /// Take a bus or one function of it away at once.
    Remove {
        /// Instance GUID.
        bus: String,
        /// Function number; the whole bus without.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        function: Option<u8>,
    },
    /// Stop all vCPUs.
    Pause,
    /// Let them run.
    Resume,
    /// Write the VM's whole state to a file. The vCPUs stand still afterwards.
    Snapshot {
        /// Absolute path of a file that does not exist.
        path: String,
    },
    /// End the VM.
    Quit,
}

fn default_timeout() -> u32 {
    EJECT_TIMEOUT_S
}

fn default_wait() -> bool {
    true
}

/// The reply to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// It is done.
    Result(Answer),
    /// It is not, and nothing has changed.
    Error(Refusal),
}

/// What a request that succeeded has to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub(crate) enum Answer {
    /// To [`Request::List`].
    List(Listing),
    /// To [`Request::Plug`].
    Plugged {
        /// Instance GUID of the bus.
        plugged: String,
    },
    /// To [`Request::Eject`].
    Ejected {
        /// Instance GUID of the bus.
        ejected: String,
        /// Function number, if it was asked for one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        function: Option<u8>,
        /// How it ended.
        how: Ejection,
    },
    /// To [`Request::Remove`].
    Removed {
        /// Instance GUID of the bus.
        removed: String,
        /// Function number, if it was asked for one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        function: Option<u8>,
    },
    /// To [`Request::Snapshot`].
    Saved {
        /// The file.
        snapshot: String,
        /// Its length in bytes.
        bytes: u64,
    },
    /// To [`Request::Pause`], [`Request::Resume`] and [`Request::Quit`].
    State {
        /// What the machine does now.
        state: MachineState,
    },
}

/// How an ejection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ejection {
    /// The guest let go of all that it was asked for, or had not opened the bus.
    Released,
    /// The guest did not answer in time; what it was asked for was taken away all the same.
    TimedOut,
    /// Under way: nobody waits.
    Started,
}

/// What the machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MachineState {
    /// The vCPUs run.
    Running,
    /// They stand still.
    Paused,
    /// The VM is ending.
    Ending,
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// For programs.
    pub(crate) kind: RefusalKind,
    /// For people, in one line.
    pub(crate) message: String,
}

/// Kinds of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RefusalKind {
    /// The request is malformed, or asks for something impossible.
    BadRequest,
    /// No such bus is plugged in.
    NoSuchBus,
    /// The bus has no such function.
    NoSuchFunction,
    /// An ejection of the bus is under way, or there are too many clients.
    Busy,
    /// The functions cannot be plugged in.
    PlugRefused,
    /// The VM cannot be saved.
    SnapshotRefused,
    /// The VM is ending.
    Ending,
}

impl Refusal {
    pub(crate) fn new(kind: RefusalKind, message: impl ToString) -> Self {
        Self {
            kind,
            message: message.to_string(),
        }
    }
}

/// What is plugged in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listing {
    /// What the machine does.
    pub(crate) state: MachineState,
    /// The buses in the order in which they were plugged in.
    pub(crate) buses: Vec<BusStatus>,
    /// Domains that the guest made, if there is a pvIOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) domains: Option<Vec<DomainReport>>,
}

/// A bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BusStatus {
    /// Instance GUID.
    pub(crate) bus: String,
    /// PCI domain that a Linux guest gives it.
    pub(crate) domain_hint: u16,
    /// The guest has the channel open.
    pub(crate) open: bool,
    /// Protocol version in force, such as `1.4`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<String>,
    /// The functions.
    pub(crate) functions: Vec<FunctionStatus>,
}

/// A function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FunctionStatus {
    /// Function number.
    pub(crate) function: u8,
    /// `blk`, `rng` or `testdev`.
    pub(crate) kind: String,
    /// Logical device id.
    pub(crate) logical_id: u32,
    /// Whether it is behind the pvIOMMU.
    pub(crate) iommu: bool,
    /// Where its BARs are mapped, by index in decimal: serde reads no other keys in what may be one of
    /// several answers.
    pub(crate) bars: BTreeMap<String, u64>,
    /// Interrupt messages that the guest has.
    pub(crate) live_messages: usize,
    /// Interrupts by vector.
    pub(crate) vectors: Vec<VectorReport>,
    /// DMA accesses that did not translate.
    pub(crate) dma_faults: u64,
    /// The last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_fault: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn request(text: serde_json::Value) -> Result<Request, String> {
        serde_json::from_value(text).map_err(|error| error.to_string())
    }

    #[test]
    fn requests_have_the_documented_form() {
        assert_eq!(request(json!({"command": "list"})), Ok(Request::List));
        assert_eq!(
            request(json!({"command": "eject", "bus": "b"})),
            Ok(Request::Eject {
                bus: "b".into(),
                function: None,
                timeout_s: 60,
                wait: true
            })
        );
        assert_eq!(
            request(json!({"command": "remove", "bus": "b", "function": 3})),
            Ok(Request::Remove {
                bus: "b".into(),
                function: Some(3)
            })
        );
        for function in [json!(-1), json!(256), json!("3")] {
            let text = json!({"command": "eject", "bus": "b", "function": function});
            assert!(request(text).is_err());
        }
        assert_eq!(
            request(json!({"command": "plug", "specs": ["rng"]})),
            Ok(Request::Plug {
                specs: vec!["rng".into()]
            })
        );
        let error = request(json!({"command": "fly"})).unwrap_err();
        assert!(error.contains("`fly`"), "{error}");
        let error = request(json!({"command": "eject"})).unwrap_err();
        assert!(error.contains("`bus`"), "{error}");
        let error = request(json!({"command": "remove", "bus": "b", "x": 1})).unwrap_err();
        assert!(error.contains("`x`"), "{error}");
    }

    #[test]
    fn replies_have_the_documented_form() {
        let form = |reply: &Reply| serde_json::to_value(reply).unwrap();
        let done = Reply::Result(Answer::Ejected {
            ejected: "b".into(),
            function: None,
            how: Ejection::TimedOut,
        });
        assert_eq!(
            form(&done),
            json!({"result": {"ejected": "b", "how": "timed-out"}})
        );
        let one = Reply::Result(Answer::Removed {
            removed: "b".into(),
            function: Some(2),
        });
        assert_eq!(
            form(&one),
            json!({"result": {"removed": "b", "function": 2}})
        );
        let refused = Reply::Error(Refusal::new(RefusalKind::NoSuchBus, "no"));
        assert_eq!(
            form(&refused),
            json!({"error": {"kind": "no-such-bus", "message": "no"}})
        );
        for reply in [done, one, refused] {
            let text = serde_json::to_string(&reply).unwrap();
            assert_eq!(serde_json::from_str::<Reply>(&text).unwrap(), reply);
        }
    }
}
