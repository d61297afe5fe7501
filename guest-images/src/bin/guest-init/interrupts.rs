//! Interrupt counts from `/proc/interrupts`, per MSI-X vector of a PCI function.

use crate::pci::Found;
use anyhow::{Context, Result, bail};
use guest_images::report::VectorCounts;
use std::collections::BTreeMap;

/// One numbered row of `/proc/interrupts`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) irq: u32,
    pub(crate) name: String,
    pub(crate) per_cpu: BTreeMap<u32, u64>,
}

/// Parses the table; rows of architecture counters (`NMI`, `LOC`, ...) are left out.
pub(crate) fn parse(text: &str) -> Result<Vec<Row>> {
    let mut lines = text.lines();
    let header = lines.next().context("/proc/interrupts is empty")?;
    let cpus: Vec<u32> = header
        .split_ascii_whitespace()
        .map(|word| {
            word.strip_prefix("CPU")
                .and_then(|number| number.parse().ok())
        })
        .collect::<Option<_>>()
        .with_context(|| format!("/proc/interrupts: header {header:?}"))?;
    let mut rows = Vec::new();
    for line in lines {
        let Some((number, rest)) = line.split_once(':') else {
            continue;
        };
        let Ok(irq) = number.trim().parse() else {
            continue;
        };
        let mut words = rest.split_ascii_whitespace();
        let mut per_cpu = BTreeMap::new();
        for &cpu in &cpus {
            let count = words.next().and_then(|word| word.parse().ok());
            let count = count.with_context(|| format!("/proc/interrupts: {line:?}"))?;
            per_cpu.insert(cpu, count);
        }
        let name = words.last().unwrap_or_default().to_owned();
        rows.push(Row { irq, name, per_cpu });
    }
    Ok(rows)
}

/// Index of the vector behind a name.
///
/// Of a virtio function vector 0 is the configuration vector, queue *n* has vector *n* + 1
/// (`drivers/virtio/virtio_pci_common.c`, vp_find_vqs_msix); the test device uses its first one
/// (`guest-images/linux/testdev.c`). An NVMe queue has the vector of its number
/// (`drivers/nvme/host/pci.c`, nvme_create_queue; 0 is the admin queue). A network controller of
/// Intel's has one for receiving, one for sending, and one with the interface's own name
/// (`drivers/net/ethernet/intel/e1000e/netdev.c`, e1000_request_msix). VFIO names them by number.
pub(crate) fn vector_index(name: &str) -> Option<u32> {
    if let Some(rest) = name.strip_prefix("vfio-msi") {
        let (_, rest) = rest.split_once('[')?;
        return rest.split_once(']')?.0.parse().ok();
    }
    if let Some(rest) = name.strip_prefix("nvme") {
        return rest.split_once('q')?.1.parse().ok();
    }
    let Some((_, role)) = name.split_once('-') else {
        let number = name.strip_prefix("eth")?;
        return number.parse::<u32>().is_ok().then_some(2);
    };
    match role {
        "config" | "testdev" | "rx-0" => Some(0),
        "input" | "virtqueues" | "tx-0" => Some(1),
        _ => {
            let queue: u32 = role.strip_prefix("req.")?.parse().ok()?;
            queue.checked_add(1)
        }
    }
}

/// Counts of all vectors of `function`, by MSI-X index. CPUs with no interrupt are left out.
pub(crate) fn vectors(function: &Found) -> Result<Vec<VectorCounts>> {
    let text = crate::system::read_text("/proc/interrupts")?;
    let irqs = function.msi_irqs()?;
    let mut vectors = Vec::new();
    for mut row in parse(&text)?
        .into_iter()
        .filter(|row| irqs.contains(&row.irq))
    {
        let Some(index) = vector_index(&row.name) else {
            bail!(
                "{}: irq {} has the unknown name {:?}",
                function.address,
                row.irq,
                row.name
            );
        };
        row.per_cpu.retain(|_, count| *count != 0);
        vectors.push(VectorCounts {
            address: function.address,
            index,
            name: row.name,
            irq: row.irq,
            per_cpu: row.per_cpu,
        });
    }
    vectors.sort_by_key(|vector| vector.index);
    Ok(vectors)
}

/// What `after` counted beyond `before`, for the vectors of `after`.
pub(crate) fn delta(before: &[VectorCounts], after: &[VectorCounts]) -> Vec<VectorCounts> {
    let mut delta = after.to_vec();
    for vector in &mut delta {
        let old = before.iter().find(|old| old.irq == vector.irq);
        for (cpu, count) in &mut vector.per_cpu {
            let old = old
                .and_then(|old| old.per_cpu.get(cpu))
                .copied()
                .unwrap_or(0);
            *count = count.saturating_sub(old);
        }
        vector.per_cpu.retain(|_, count| *count != 0);
    }
    delta
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_table_gives_rows_or_an_error(table in "( {1,3}(CPU)?[0-9]{1,22}:?|\\n|[a-z-]{1,9}){0,40}") {
            let _ = parse(&table);
        }

        #[test]
        fn any_name_gives_an_index_or_none(name in "virtio[0-9]-(req\\.|input|config)?[0-9]{0,12}") {
            let _ = vector_index(&name);
        }
    }

    const TABLE: &str = "           CPU0       CPU3
   1:          9          0   IO-APIC   1-edge      i8042
  24:          0         12  Hyper-V PCIe MSI 305419896-edge      virtio0-config
  25:        107          5  Hyper-V PCIe MSI 305419897-edge      virtio0-req.0
 NMI:          0          0   Non-maskable interrupts
 ERR:          0
";

    #[test]
    fn rows_carry_counts_by_cpu_number_and_the_last_word_as_name() {
        let rows = parse(TABLE).unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[1].irq, 24);
        assert_eq!(rows[1].name, "virtio0-config");
        assert_eq!(rows[2].per_cpu, BTreeMap::from([(0, 107), (3, 5)]));
    }

    #[test]
    fn a_row_that_is_too_short_is_an_error() {
        assert!(parse("  CPU0 CPU1\n 24: 7\n").is_err());
        assert!(parse("").is_err());
        assert!(parse("  CPUx\n").is_err());
    }

    #[test]
    fn vector_names_give_the_index() {
        assert_eq!(vector_index("virtio0-config"), Some(0));
        assert_eq!(vector_index("vpci-testdev"), Some(0));
        assert_eq!(vector_index("virtio12-req.3"), Some(4));
        assert_eq!(vector_index("virtio1-input"), Some(1));
        assert_eq!(vector_index("virtio1-req.x"), None);
        assert_eq!(vector_index("virtio1-req.4294967295"), None);
        assert_eq!(vector_index("nvme0q0"), Some(0));
        assert_eq!(vector_index("nvme1q12"), Some(12));
        assert_eq!(vector_index("nvme0c1"), None);
        assert_eq!(vector_index("eth0-rx-0"), Some(0));
        assert_eq!(vector_index("eth0-tx-0"), Some(1));
        assert_eq!(vector_index("eth0"), Some(2));
        assert_eq!(vector_index("ethernet"), None);
        assert_eq!(vector_index("vfio-msix[7](0000:00:11.0)"), Some(7));
        assert_eq!(vector_index("vfio-msi[0](1234:00:00.0)"), Some(0));
        assert_eq!(vector_index("vfio-intx(0000:00:10.0)"), None);
    }

    #[test]
    fn a_delta_is_taken_per_cpu() {
        let vector = |counts: &[(u32, u64)]| VectorCounts {
            address: "1:0:0.0".parse().unwrap(),
            index: 1,
            name: "virtio0-req.0".into(),
            irq: 25,
            per_cpu: counts.iter().copied().collect(),
        };
        let delta = delta(&[vector(&[(0, 5)])], &[vector(&[(0, 5), (1, 3)])]);
        assert_eq!(delta, vec![vector(&[(1, 3)])]);
    }
}
