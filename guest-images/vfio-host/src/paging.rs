//! Domains whose mappings are given, in place of tables of a guest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vm_vpci::backend::{AddressSpace, PagedBackend, PagedDomain, Permissions};
use vm_vpci::pviommu::{BackendError, FlushRange, PageTable};

/// A mapping: I/O virtual address, guest physical address, length, permissions.
pub(crate) type Mapping = (u64, u64, u64, Permissions);

/// Domains by the root of their table.
#[derive(Debug)]
pub(crate) struct Given {
    domains: BTreeMap<u64, Vec<Mapping>>,
    /// The address space that was filled last.
    last: Mutex<Option<Arc<dyn AddressSpace>>>,
}

impl Given {
    pub(crate) fn new(domains: BTreeMap<u64, Vec<Mapping>>) -> Arc<Self> {
        Arc::new(Self {
            domains,
            last: Mutex::default(),
        })
    }

    /// Takes the address space that was filled last. Whoever keeps it keeps its container open.
    pub(crate) fn take_space(&self) -> Option<Arc<dyn AddressSpace>> {
        let last = self.last.lock();
        last.ok()?.take()
    }
}

impl PagedBackend for Given {
    fn follow(
        &self,
        table: PageTable,
        space: Arc<dyn AddressSpace>,
    ) -> Result<Arc<dyn PagedDomain>, BackendError> {
        for (iova, gpa, len, access) in self.domains.get(&table.root).into_iter().flatten() {
            let mapped = space.map(*iova, *gpa, *len, *access);
            mapped.map_err(|error| BackendError(Box::new(error)))?;
        }
        if let Ok(mut last) = self.last.lock() {
            *last = Some(space);
        }
        Ok(Arc::new(Nothing))
    }
}

/// There is nothing to flush: whoever changes the space does so at once.
#[derive(Debug)]
struct Nothing;

impl PagedDomain for Nothing {
    fn flush(&self, _ranges: &[FlushRange]) {}

    fn flush_all(&self) {}
}
