//! What the reference VMM says about a run: the file behind its `--report` option.

#![forbid(unsafe_code)]

use crate::scenario::Kind;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Version of the layout that is understood here.
pub const HOST_REPORT_VERSION: u32 = 1;

/// The whole file. Fields not named here are ignored, so that the VMM can say more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// [`HOST_REPORT_VERSION`].
    pub version: u32,
    /// How the run ended: `poweroff`, `quit`, `reset-limit`, `interrupted` or `error`.
    pub end: String,
    /// Resets the guest asked for.
    pub resets: u32,
    /// The functions at the end.
    pub functions: Vec<HostFunction>,
    /// Snapshots taken when the guest wrote to the mark port, oldest first.
    pub marks: Vec<HostMark>,
    /// Counters of the library, by name.
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
}

/// Counters of all functions at the moment of a mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMark {
    /// The byte that the guest wrote.
    pub id: u8,
    /// The functions then.
    pub functions: Vec<HostFunction>,
    /// Exits of vCPUs to the VMM since the start.
    pub exits: u64,
    /// Flushes of device domains since the start: calls, and elements of calls with a list.
    pub flushes: u64,
    /// Calls since the start that mapped something for devices of the host, to follow tables of the
    /// guest.
    #[serde(default)]
    pub host_maps: u64,
    /// The same for unmapping.
    #[serde(default)]
    pub host_unmaps: u64,
}

/// One function as the VMM counts it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFunction {
    /// Instance GUID of its bus.
    pub bus: Uuid,
    /// PCI function number on that bus.
    pub function: u8,
    /// What it is.
    pub kind: Kind,
    /// Logical device id.
    pub logical_id: u64,
    /// PCI domain the bus GUID asks for.
    pub domain_hint: u16,
    /// MSI-X vectors.
    pub vectors: Vec<HostVector>,
    /// Its DMA.
    pub dma: HostDma,
}

/// DMA of a function as the VMM counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDma {
    /// Accesses that did not translate.
    pub faults: u64,
}

/// One MSI-X vector as the VMM counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostVector {
    /// Index in the MSI-X table.
    pub index: u32,
    /// Messages sent since the last reset of the VM.
    pub raised: u64,
    /// Messages not sent because the vector was masked or had no live handle.
    pub suppressed: u64,
}

impl HostReport {
    /// The newest mark with this id: after a reset, ids start again.
    pub fn mark(&self, id: u8) -> Option<&HostMark> {
        self.marks.iter().rev().find(|mark| mark.id == id)
    }
}

impl HostMark {
    /// Messages raised by one vector of one function up to this mark; `None` where the mark does
    /// not know the vector.
    pub fn raised(&self, bus: Uuid, function: u8, vector: u32) -> Option<u64> {
        self.functions
            .iter()
            .find(|entry| entry.bus == bus && entry.function == function)?
            .vectors
            .iter()
            .find(|entry| entry.index == vector)
            .map(|entry| entry.raised)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"version":1,"end":"poweroff","resets":0,"extra":{},
        "functions":[{"bus":"11111111-1234-4000-8000-000000000001","function":0,"kind":"blk",
            "logical_id":305419896,"domain_hint":4660,"generation":4,
            "vectors":[{"index":0,"raised":1,"suppressed":0}],"dma":{"faults":3,"last_fault":"text"}}],
        "marks":[{"id":1,"functions":[],"exits":5,"flushes":1},{"id":1,"functions":[
            {"bus":"11111111-1234-4000-8000-000000000001","function":0,"kind":"blk",
            "logical_id":305419896,"domain_hint":4660,
            "vectors":[{"index":0,"raised":1,"suppressed":0},{"index":1,"raised":9,"suppressed":0}],"dma":{"faults":0,"last_fault":null}}],"exits":9,"flushes":2}],
        "counters":{"hypercalls":12}}"#;

    #[test]
    fn a_report_parses_and_unknown_fields_are_ignored() {
        let report: HostReport = serde_json::from_str(TEXT).unwrap();
        assert_eq!(report.functions[0].domain_hint, 0x1234);
        assert_eq!(report.functions[0].dma.faults, 3);
        assert_eq!(report.counters["hypercalls"], 12);
    }

    #[test]
    fn the_newest_mark_of_an_id_is_used() {
        let report: HostReport = serde_json::from_str(TEXT).unwrap();
        let bus = report.functions[0].bus;
        let mark = report.mark(1).unwrap();
        assert_eq!(mark.raised(bus, 0, 1), Some(9));
        assert_eq!(mark.raised(bus, 0, 2), None);
        assert_eq!(mark.raised(bus, 1, 1), None);
        assert!(report.mark(2).is_none());
    }

    #[test]
    fn a_report_without_marks_is_refused() {
        let json = r#"{"version":1,"end":"poweroff","resets":0,"functions":[]}"#;
        assert!(serde_json::from_str::<HostReport>(json).is_err());
    }
}
