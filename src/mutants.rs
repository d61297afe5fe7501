//! The mutants of the conformance suite's mutation check (docs/mutants.md).
//!
//! Compiled only with `--cfg vpci_mutants`. One mutant at a time is selected, when the process
//! starts, by the variable `VPCI_MUTANT`; without it the library is sound.
#![forbid(unsafe_code)]

use std::env;
use std::sync::OnceLock;

/// Each mutant: its name in `mutant!`, and what the library does while it is selected.
pub const ALL: &[(&str, &str)] = &[
    // Hypercalls.
    ("hypercall-at-any-cpl", "a call from CPL 3 is executed"),
    (
        "hypercall-misaligned-list",
        "a parameter list need not be aligned",
    ),
    (
        "hypercall-list-across-pages",
        "a parameter list may cross a page",
    ),
    (
        "hypercall-xmm-not-offered",
        "input in XMM registers is taken though it is not offered",
    ),
    (
        "hypercall-variable-header",
        "a variable header is taken by a call that has none",
    ),
    (
        "hypercall-reserved-bits",
        "reserved bits of the control word are ignored",
    ),
    (
        "post-payload-cut",
        "a payload longer than 240 bytes is cut instead of refused",
    ),
    (
        "retarget-any-partition",
        "a retarget for another partition is executed",
    ),
    (
        "retarget-reserved-fields",
        "reserved fields of a retarget are ignored",
    ),
    (
        "retarget-any-vector",
        "a retarget to a vector beyond 255 takes its low byte",
    ),
    (
        "retarget-set-format",
        "the format of a retarget's processor set is ignored",
    ),
    (
        "sparse-set-banks-missing",
        "a processor set may have fewer banks than its mask says",
    ),
    // MSRs, hypercall page, CPUID.
    (
        "msr-unknown-reads-zero",
        "an MSR that does not exist reads as 0",
    ),
    ("msr-vp-index", "VP_INDEX is 0 on every VP"),
    (
        "os-id-clear-keeps-page",
        "the hypercall page stays when GUEST_OS_ID is cleared",
    ),
    (
        "hypercall-page-lock-ignored",
        "a locked hypercall page can be moved",
    ),
    (
        "hypercall-page-without-identity",
        "the hypercall page is enabled for a guest without GUEST_OS_ID",
    ),
    (
        "hypercalls-without-page",
        "calls are executed after the hypercall page was disabled",
    ),
    (
        "hypercall-page-left-behind",
        "the RAM under the hypercall page does not come back",
    ),
    (
        "cpuid-xmm-offered",
        "CPUID offers XMM input that is refused",
    ),
    // SynIC.
    ("synic-eom-lost", "EOM delivers nothing"),
    (
        "synic-queue-unlimited",
        "the message queue of a VP has no limit",
    ),
    (
        "synic-events-while-off",
        "event flags are set while the SynIC is off",
    ),
    (
        "synic-event-raised-again",
        "a flag that is set already interrupts once more",
    ),
    ("synic-masked-sint-raises", "a masked SINT interrupts"),
    (
        "synic-polled-sint-raises",
        "a SINT in polling mode interrupts",
    ),
    ("synic-low-vector", "a SINT takes a vector below 16"),
    (
        "synic-page-not-cleared",
        "message and event flags pages are not cleared when they are placed",
    ),
    (
        "synic-no-pending-flag",
        "the message pending flag is not set",
    ),
    (
        "synic-slot-overwritten",
        "a message is written over one that the guest has not taken",
    ),
    ("reset-keeps-synic", "a reset leaves the SynICs on"),
    // VMBus.
    (
        "contact-keeps-channels",
        "a second contact leaves the channels of the first open",
    ),
    (
        "contact-any-version",
        "a version that does not exist is accepted",
    ),
    ("unload-unanswered", "UNLOAD gets no response"),
    (
        "offers-twice",
        "a second REQUEST_OFFERS is answered, with new channel ids",
    ),
    ("offer-not-dedicated", "an offer has no dedicated interrupt"),
    (
        "open-missing-vp",
        "a channel opens with its interrupt at a VP that does not exist",
    ),
    (
        "modify-unanswered",
        "MODIFY_CHANNEL gets no response at 5.3 and later",
    ),
    (
        "modify-missing-vp",
        "a channel's interrupt moves to a VP that does not exist",
    ),
    (
        "removal-not-rescinded",
        "the offer of a bus that was removed before it was opened stays",
    ),
    (
        "torn-down-while-open",
        "GPADL_TORNDOWN comes while the channel uses the pages",
    ),
    (
        "gpadl-id-taken",
        "a GPADL replaces another one with the same id",
    ),
    ("gpadl-no-limit", "the number of GPADLs has no limit"),
    (
        "gpadl-outside-ram",
        "a GPADL may name pages that are not RAM",
    ),
    (
        "inbox-full-drops",
        "a message for which there is no room is lost with status SUCCESS",
    ),
    (
        "signal-any-flag",
        "a signal with a flag number other than 0 is taken",
    ),
    // Rings.
    (
        "ring-index-not-reread",
        "the guest's write index is read once, when the channel opens",
    ),
    (
        "ring-index-may-go-back",
        "the guest's read index may go back",
    ),
    (
        "ring-packet-too-long",
        "a packet that is longer than what was written is taken",
    ),
    (
        "ring-room-not-signalled",
        "a guest that waits for room is not signalled",
    ),
    (
        "ring-unknown-flags",
        "unknown flags of a packet are ignored",
    ),
    (
        "ring-no-features",
        "the host's ring does not announce the pending send size",
    ),
    (
        "ring-mask-ignored",
        "the guest is signalled though it masked the ring",
    ),
    (
        "ring-signal-always",
        "the guest is signalled for every packet",
    ),
    (
        "ring-trailer",
        "the trailer of a packet does not hold its start",
    ),
    ("ring-goes-on-broken", "a ring that broke a rule goes on"),
    // vPCI.
    ("vpci-version-twice", "the version can be negotiated again"),
    (
        "vpci-newer-message",
        "a message of a newer version is handled",
    ),
    (
        "vpci-without-d0",
        "requests that need D0 are handled without it",
    ),
    (
        "d0-exit-keeps-window",
        "the config window stays after D0 exit and close",
    ),
    (
        "close-keeps-functions",
        "functions are not reset by D0 exit and close",
    ),
    (
        "create-missing-vp",
        "an interrupt is created for VPs that do not exist",
    ),
    ("vpci-no-completion", "no request is completed"),
    (
        "multicast-to-one",
        "a multicast interrupt goes to one VP only",
    ),
    (
        "closed-bus-still-answers",
        "a bus keeps its channel when it is closed",
    ),
    (
        "removed-bus-still-known",
        "the functions of a removed bus keep their ids",
    ),
    // Orderly removal.
    ("eject-never-sent", "the guest is not asked"),
    (
        "ejected-at-first",
        "the host is told when the guest has let go of one function",
    ),
    (
        "ejected-never-told",
        "the host is not told that the guest has let go",
    ),
    // Configuration space, BARs.
    (
        "bar-written-while-decoding",
        "a BAR changes while memory decode is on",
    ),
    (
        "config-read-only-written",
        "read-only bits of configuration space can be written",
    ),
    (
        "reset-keeps-config",
        "configuration space survives the reset of its function",
    ),
    (
        "bar-outside-apertures",
        "a region may lie outside of the buses' MMIO ranges",
    ),
    ("bar-over-another", "a region may lie over another"),
    (
        "decode-off-keeps-bar",
        "a BAR answers after memory decode was switched off",
    ),
    // Interrupts, DMA.
    ("create-no-message", "an interrupt of 0 messages is created"),
    (
        "multi-msi-misaligned",
        "several messages do not start at a multiple of their number",
    ),
    (
        "create-unlimited",
        "the number of live messages has no limit",
    ),
    ("deleted-handle-lives", "a deleted handle still delivers"),
    (
        "retarget-without-effect",
        "a retarget succeeds and moves nothing",
    ),
    (
        "handle-address-ignored",
        "a message is known by its data alone",
    ),
    (
        "unmask-loses-pending",
        "a pending MSI-X interrupt is lost when its entry is unmasked",
    ),
    (
        "masked-interrupt-lost",
        "an interrupt of a masked MSI-X entry is lost",
    ),
    (
        "function-mask-ignored",
        "the function mask of MSI-X is ignored",
    ),
    (
        "msix-delivers-disabled",
        "MSI-X delivers while it is disabled",
    ),
    (
        "msi-unmask-loses-pending",
        "a pending MSI is lost when it is unmasked",
    ),
    ("pending-bits-hidden", "the pending bits of MSI-X read as 0"),
    ("dma-without-master", "DMA works with bus mastering off"),
    // The pvIOMMU.
    (
        "domain-any-partition",
        "a device domain call for another partition is executed",
    ),
    (
        "domain-reserved-bytes",
        "reserved bytes of a device domain are ignored",
    ),
    (
        "id-any-upper-half",
        "the upper half of a device id is ignored",
    ),
    ("id-sign-refused", "a sign-extended device id is refused"),
    (
        "property-always-behind",
        "every function is said to be behind the pvIOMMU",
    ),
    (
        "create-again-succeeds",
        "CREATE of a number in use succeeds",
    ),
    (
        "create-limit-status",
        "the limit on domains is met with the status of another limit",
    ),
    (
        "delete-in-use",
        "a domain with devices in it can be deleted",
    ),
    (
        "domain-new-is-identity",
        "a domain that is not configured is the identity",
    ),
    (
        "default-never-blocks",
        "a device that is to be blocked until attached is not",
    ),
    ("configure-any-root", "a root outside RAM is accepted"),
    (
        "configure-five-levels",
        "tables of 5 levels are accepted where they are not offered",
    ),
    (
        "configure-blocked-alone",
        "blocked without translation enabled is accepted",
    ),
    (
        "configure-not-live",
        "CONFIGURE does not reach the devices in the domain",
    ),
    (
        "attach-not-behind",
        "a function that is not behind the pvIOMMU can be attached",
    ),
    (
        "attach-twice-succeeds",
        "ATTACH to the domain that the device is in succeeds",
    ),
    (
        "attach-keeps-old",
        "after ATTACH the device still obeys its former domain",
    ),
    (
        "attach-keeps-cache",
        "after a move translations of the former domain are used",
    ),
    ("detach-without-effect", "DETACH succeeds and does nothing"),
    ("flush-forgets-nothing", "FLUSH succeeds and does nothing"),
    (
        "flush-list-first-only",
        "of a flush list only the first element is done",
    ),
    (
        "flush-list-one-device",
        "a flush list is for one device of the domain",
    ),
    (
        "flush-list-low-bits",
        "a flush begins at the page that its element names, not at its block",
    ),
    (
        "iotlb-flush-keeps-large",
        "a flush of an address keeps large pages",
    ),
    (
        "iotlb-long-flush-lost",
        "a flush of many pages does nothing",
    ),
    (
        "iotlb-hit-ignores-writes",
        "a page that was read once can be written",
    ),
    ("walk-user-ignored", "entries for supervisors let DMA pass"),
    ("walk-writable-ignored", "read-only entries let writes pass"),
    ("walk-reserved-bits", "reserved bits of entries are ignored"),
    ("walk-leaf-anywhere", "leaves at levels 4 and 5 are pages"),
    ("walk-sets-no-accessed", "the accessed bit is not set"),
    ("walk-sets-no-dirty", "the dirty bit is not set"),
    ("walk-dirties-on-read", "a read sets the dirty bit"),
    (
        "interrupts-translated",
        "the interrupt range is translated like any other",
    ),
    ("faults-not-by-domain", "faults are not counted by domain"),
    (
        "kexec-keeps-domains",
        "domains survive the end of the guest's identity",
    ),
    (
        "kexec-holds-nothing",
        "DMA of a former kernel goes on in the next one",
    ),
    (
        "power-on-keeps-held",
        "devices of a former kernel stay blocked",
    ),
    ("reset-keeps-domains", "domains survive a reset"),
];

/// Whether the mutant is the one that was selected.
///
/// # Panics
///
/// If the selected one does not exist: a run of nothing would look like a survivor.
pub fn is_selected(name: &str) -> bool {
    static SELECTED: OnceLock<Option<String>> = OnceLock::new();
    let selected = SELECTED.get_or_init(|| {
        let selected = env::var("VPCI_MUTANT").ok().filter(|name| !name.is_empty());
        if let Some(selected) = &selected {
            let known = ALL.iter().any(|(name, _)| name == selected);
            assert!(known, "VPCI_MUTANT={selected}: there is no such mutant");
        }
        selected
    });
    selected.as_deref() == Some(name)
}
