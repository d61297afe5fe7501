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

    fn removed(&self) {
        self.unit.lock().unwrap().put_out(self.id);
    }

    fn is_alone(&self) -> bool {
        self.unit.lock().unwrap().is_alone(self.id)
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

impl Drop for Member {
    fn drop(&mut self) {
        self.unit.lock().unwrap().leave(self.id);
    }
}

struct Bed {
    fake: Fake,
    iommu: Arc<PvIommu>,
    /// Handles that outlive a removal.
    members: [Arc<Member>; 2],
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
        let members = [(A, "a"), (B, "b")].map(|(member, address)| {
            unit.lock().unwrap().join(member, address).unwrap();
            Arc::new(Member {
                unit: unit.clone(),
                id: member,
            })
        });
        let bed = Self {
            fake,
            iommu,
            members,
        };
        for member in &bed.members {
            bed.plug(member);
        }
        bed
    }

    fn plug(&self, member: &Arc<Member>) {
        let (device, backend) = (id(member.id), member.clone());
        let added = self.iommu.add_device(device, IommuMode::On, Some(backend));
        added.unwrap();
    }

    /// What the devices reached at times since there were `from` calls.
    fn history(&self, from: usize) -> Vec<Reach> {
        self.fake.state().history[from..].to_vec()
    }

    /// Both in domain 5: its kernel attaches them while both are blocked, before their buses are in D0.
    fn translate(&self) {
        self.iommu.guest_gone();
        self.create();
        for member in [A, B] {
            let domain = DomainName::FirstStage(5);
            self.iommu.attach(domain, id(member)).unwrap();
        }
        for member in [A, B] {
            self.iommu.power_on(id(member));
        }
        assert_eq!(self.fake.reach(), reach_by(table(1)));
    }

    /// One in domain 5, as the only one that counts.
    fn translate_one(&self, member: u32) {
        self.create();
        let domain = DomainName::FirstStage(5);
        self.iommu.attach(domain, id(member)).unwrap();
        assert_eq!(self.fake.reach(), reach_by(table(1)));
    }

    fn create(&self) {
        self.iommu.create(5).unwrap();
        let paged = Translation::Paged(table(1));
        self.iommu.configure(5, paged).unwrap();
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

#[test]
fn a_function_that_is_removed_disturbs_nobody_of_its_group() {
    for iommufd in [false, true] {
        for translated in [false, true] {
            let bed = Bed::new(iommufd);
            if translated {
                bed.translate();
            }
            let reach = bed.fake.reach();
            let from = bed.fake.state().history.len();
            // Its device lives on.
            bed.iommu.begin_removal(id(A));
            bed.iommu.detach(id(A)).unwrap_err();
            bed.iommu.remove_quiet_device(id(A));
            assert_eq!(bed.fake.reach(), reach);
            assert!(bed.history(from).iter().all(|then| *then == reach));
            // The other one moves on its own.
            if !translated {
                bed.translate_one(B);
            }
            bed.iommu.reset();
            assert_eq!(bed.fake.reach(), all_ram());
            // The last one takes everything with it, at once.
            bed.iommu.begin_removal(id(B));
            assert!(bed.fake.reach().is_empty());
            bed.iommu.remove_quiet_device(id(B));
            assert!(bed.fake.reach().is_empty());
        }
    }
}

#[test]
fn a_removed_function_is_blocked_if_it_may_still_do_dma() {
    for iommufd in [false, true] {
        let bed = Bed::new(iommufd);
        bed.iommu.remove_device(id(A));
        assert!(bed.fake.reach().is_empty());
        // Until it is let go of.
        drop(bed.members);
        assert_eq!(bed.fake.reach(), all_ram());
    }
}

#[test]
fn a_removed_device_counts_again_when_it_is_plugged_in_anew() {
    for iommufd in [false, true] {
        let bed = Bed::new(iommufd);
        bed.iommu.remove_quiet_device(id(A));
        bed.plug(&bed.members[0]);
        assert_eq!(bed.fake.reach(), all_ram());
        // Where it may not go the others are blocked with it, before a guest gets at it.
        bed.iommu.remove_quiet_device(id(A));
        bed.translate_one(B);
        bed.plug(&bed.members[0]);
        assert!(bed.fake.reach().is_empty());
        bed.iommu.remove_quiet_device(id(A));
        assert_eq!(bed.fake.reach(), reach_by(table(1)));
        // Dropped: it does not leave twice.
        let [a, _b] = bed.members;
        drop(a);
        assert_eq!(bed.fake.reach(), reach_by(table(1)));
    }
}
