//! The library's counters under the names that reports use.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use vm_vpci::backend::shadow::ShadowCounters;
use vm_vpci::partition::PartitionCounters;
use vm_vpci::pviommu::IommuCounters;
use vm_vpci::vpci::bus::{BusReport, FunctionReport};

/// All counters, as `layer.counter`.
pub(crate) fn by_name(counters: &PartitionCounters) -> BTreeMap<String, u64> {
    let PartitionCounters {
        hypercalls,
        synic,
        vmbus,
        mmio,
    } = counters;
    let mut named: BTreeMap<String, u64> = [
        ("hypercall.unknown_codes", hypercalls.unknown_codes),
        ("hypercall.invalid_opcodes", hypercalls.invalid_opcodes),
        ("hypercall.restarts", hypercalls.restarts),
        ("synic.posted", synic.posted),
        ("synic.delivered", synic.delivered),
        ("synic.queue_full", synic.queue_full),
        ("synic.discarded", synic.discarded),
        ("synic.events", synic.events),
        ("synic.events_merged", synic.events_merged),
        ("synic.events_refused", synic.events_refused),
        ("synic.interrupts", synic.interrupts),
        ("vmbus.messages", vmbus.messages),
        ("vmbus.connections", vmbus.connections),
        ("vmbus.contacts_refused", vmbus.contacts_refused),
        ("vmbus.gpadls_refused", vmbus.gpadls_refused),
        ("vmbus.opens_refused", vmbus.opens_refused),
        ("vmbus.modifies_refused", vmbus.modifies_refused),
        ("vmbus.dropped_short", vmbus.dropped_short),
        ("vmbus.dropped_unknown", vmbus.dropped_unknown),
        ("vmbus.dropped_host_only", vmbus.dropped_host_only),
        ("vmbus.dropped_not_offered", vmbus.dropped_not_offered),
        ("vmbus.dropped_not_connected", vmbus.dropped_not_connected),
        ("vmbus.dropped_bad_target", vmbus.dropped_bad_target),
        (
            "vmbus.dropped_unknown_channel",
            vmbus.dropped_unknown_channel,
        ),
        ("vmbus.dropped_unknown_gpadl", vmbus.dropped_unknown_gpadl),
        ("vmbus.dropped_wrong_state", vmbus.dropped_wrong_state),
        ("vmbus.dropped_rescinded", vmbus.dropped_rescinded),
        ("vmbus.inbox_full", vmbus.inbox_full),
        ("vmbus.superseded", vmbus.superseded),
        ("mmio.unclaimed", mmio.unclaimed),
        ("mmio.refused", mmio.refused),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect();
    for call in &hypercalls.calls {
        let name = format!("hypercall.{:#06x}", call.code);
        named.insert(format!("{name}.succeeded"), call.succeeded);
        named.insert(format!("{name}.failed"), call.failed);
    }
    for (status, count) in &hypercalls.statuses {
        named.insert(format!("hypercall.status.{status:#06x}"), *count);
    }
    named
}

/// The counters of buses, as `vpci.counter`: those of all that are plugged in, together.
pub(crate) fn buses_by_name(buses: &[BusReport]) -> BTreeMap<String, u64> {
    let sum = |count: fn(&BusReport) -> u64| buses.iter().map(count).sum();
    let functions = |count: fn(&FunctionReport) -> u64| {
        let all = buses.iter().flat_map(|bus| &bus.functions);
        all.map(count).sum()
    };
    [
        ("vpci.requests", sum(|bus| bus.protocol.requests)),
        ("vpci.refused", sum(|bus| bus.protocol.refused)),
        (
            "vpci.unknown_deletes",
            sum(|bus| bus.protocol.unknown_deletes),
        ),
        (
            "vpci.refused_windows",
            sum(|bus| bus.protocol.refused_windows),
        ),
        (
            "vpci.exhausted_interrupts",
            sum(|bus| bus.protocol.exhausted_interrupts),
        ),
        ("vpci.corrupt_rings", sum(|bus| bus.corrupt_rings)),
        ("vpci.refused_bars", functions(|f| f.refused_bars)),
        ("vpci.failed_unmaps", functions(|f| f.failed_unmaps)),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// The counters of a pvIOMMU, as `iommu.counter`.
pub(crate) fn iommu_by_name(counters: &IommuCounters) -> BTreeMap<String, u64> {
    let IommuCounters {
        domains_refused,
        functions_refused,
        backend_refusals,
        flushes,
        flushed_ranges,
        default_domain_faults,
    } = *counters;
    [
        ("iommu.domains_refused", domains_refused),
        ("iommu.functions_refused", functions_refused),
        ("iommu.backend_refusals", backend_refusals),
        ("iommu.flushes", flushes),
        ("iommu.flushed_ranges", flushed_ranges),
        ("iommu.default_domain_faults", default_domain_faults),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// The counters of shadowed domains, as `shadow.counter`.
pub(crate) fn shadow_by_name(counters: &ShadowCounters) -> BTreeMap<String, u64> {
    let ShadowCounters {
        stores,
        lost_exchanges,
        flushes,
        maps,
        unmaps,
        blocked,
        tracked_pages,
        tables,
        mappings,
    } = *counters;
    [
        ("shadow.stores", stores),
        ("shadow.lost_exchanges", lost_exchanges),
        ("shadow.flushes", flushes),
        ("shadow.maps", maps),
        ("shadow.unmaps", unmaps),
        ("shadow.blocked", blocked),
        ("shadow.tracked_pages", tracked_pages),
        ("shadow.tables", tables),
        ("shadow.mappings", mappings),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}
