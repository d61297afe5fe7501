//! Devices of one IOMMU group behind a pvIOMMU, over the kernel of the tests.

use std::sync::{Arc, Mutex};

use super::fake::{Fake, Reach, all_ram, ram, reach_by, table};
use super::units::{A, B, unit};
use crate::device_id::LogicalDeviceId;
use crate::pviommu::{
    Attachment, BackendError, BackendReport, DeviceBackend, DomainName, FlushRange, IommuConfig,
    IommuMode, PvIommu, Translation,
};
use crate::vfio::moves::Mover;
use crate::vfio::unit::Unit;

/// What [`VfioDma`](crate::vfio::VfioDma) is to a device of the host.
#[derive(Debug)]
struct Member {
    unit: Arc<Mutex<Unit<Box<dyn Mover>>>>,
    id: u32,
}

impl DeviceBackend for Member {
    fn attach(&self, to: &Attachment) -> Result<(), BackendError> {
        let moved = self.unit.lock().unwrap().attach(self.id, to);
        moved.map_err(|error| BackendError(Box::new(error)))
    }

    fn flush(&self, ranges: &[FlushRange]) {
        self.unit.lock().unwrap().flush(ranges);
    }

    fn flush_all(&self) {
        self.unit.lock().unwrap().flush_all();
    }

    fn report(&self) -> BackendReport {
        BackendReport::default()
    }
}

struct Bed {
    fake: Fake,
    iommu: Arc<PvIommu>,
}

fn id(member: u32) -> LogicalDeviceId {
    LogicalDeviceId::from_domain_call(u64::from(member) << 3).unwrap()
}

impl Bed {
    /// A and B, in the default domain.
    fn new(iommufd: bool) -> Self {
        let fake = Fake::default();
        let unit = Arc::new(Mutex::new(unit(&fake, iommufd)));
        let iommu = PvIommu::new(IommuConfig::default(), ram()).unwrap();
        for (member, address) in [(A, "a"), (B, "b")] {
            unit.lock().unwrap().join(member, address).unwrap();
            let member = Member {
                unit: unit.clone(),
                id: member,
            };
            let device = id(member.id);
            iommu
                .add_device(device, IommuMode::On, Some(Arc::new(member)))
                .unwrap();
        }
        Self { fake, iommu }
    }

    /// Both in domain 5: its kernel attaches them while both are blocked, before their buses are in D0.
    fn translate(&self) {
        self.iommu.guest_gone();
        self.iommu.create(5).unwrap();
        let paged = Translation::Paged(table(1));
        self.iommu.configure(5, paged).unwrap();
        for member in [A, B] {
            let domain = DomainName::FirstStage(5);
            self.iommu.attach(domain, id(member)).unwrap();
        }
        for member in [A, B] {
            self.iommu.power_on(id(member));
        }
        assert_eq!(self.fake.reach(), reach_by(table(1)));
    }
}

#[test]
fn a_reset_takes_a_group_from_a_domain_of_the_guest_to_the_default_domain() {
    for iommufd in [false, true] {
        let bed = Bed::new(iommufd);
        bed.translate();
        bed.iommu.reset();
        assert_eq!(bed.fake.reach(), all_ram());
        // Nobody was let in more than either domain gives.
        let history = bed.fake.state().history.clone();
        let known = [all_ram(), reach_by(table(1))];
        let part = |reach: &Reach| {
            let within = |whole: &Reach| reach.iter().all(|(at, to)| whole.get(at) == Some(to));
            known.iter().any(within)
        };
        assert!(history.iter().all(part));
    }
}

#[test]
fn a_reset_leaves_a_group_alone_that_is_in_the_default_domain() {
    for iommufd in [false, true] {
        let bed = Bed::new(iommufd);
        let calls = bed.fake.state().calls;
        bed.iommu.reset();
        assert_eq!(bed.fake.state().calls, calls, "RAM is not mapped anew");
        assert_eq!(bed.fake.reach(), all_ram());
    }
}

#[test]
fn a_restore_takes_a_group_to_its_domain_and_back() {
    for iommufd in [false, true] {
        let bed = Bed::new(iommufd);
        let default = bed.iommu.save();
        bed.translate();
        let translated = bed.iommu.save();
        bed.iommu.restore(&default).unwrap();
        assert_eq!(bed.fake.reach(), all_ram());
        bed.iommu.restore(&translated).unwrap();
        assert_eq!(bed.fake.reach(), reach_by(table(1)));
    }
}
