//! Reset, kexec, D0, removal, and back ends that refuse.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::dma::DmaError;

fn passes(function: &Function, iova: u64) -> bool {
    function.dma.read(iova, &mut [0; 8]).is_ok()
}

#[test]
fn a_guest_that_is_gone_leaves_blocked_functions_until_their_bus_is_in_d0() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    bed.map(root, 0x7000_0000, 0x5000 | PAGE);
    assert_eq!(bed.attach(1, A), 0);
    bed.iommu.guest_gone();
    assert!(bed.state().0.is_empty());
    for function in [&bed.a, &bed.b] {
        assert!(!passes(function, 0x7000_0000));
        assert!(!passes(function, 0x5000));
    }
    // The next kernel's calls succeed, and its tables take effect with D0.
    let root = bed.paging_domain(1);
    bed.map(root, 0x7000_0000, 0x5000 | PAGE);
    assert_eq!(bed.attach(1, A), 0);
    assert!(!passes(&bed.a, 0x7000_0000));
    bed.iommu.power_on(id(A));
    assert!(passes(&bed.a, 0x7000_0000));
    assert!(!passes(&bed.b, 0x5000));
    bed.iommu.power_on(id(B));
    assert!(passes(&bed.b, 0x5000));
    // D0 does not touch what is attached.
    bed.iommu.power_on(id(A));
    assert!(passes(&bed.a, 0x7000_0000) && !passes(&bed.a, 0x5000));
}

#[test]
fn a_reset_deletes_everything_and_returns_to_default() {
    let mut bed = Bed::new();
    bed.paging_domain(1);
    assert_eq!(bed.attach(1, A), 0);
    bed.iommu.guest_gone();
    bed.iommu.reset();
    assert!(bed.state().0.is_empty());
    assert!(passes(&bed.a, 0x5000) && passes(&bed.b, 0x5000));
    assert!(bed.state().1.iter().all(|device| !device.held));
}

#[test]
fn an_id_that_comes_back_starts_from_the_default_state() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    bed.map(root, 0x7000_0000, 0x5000 | PAGE);
    assert_eq!(bed.attach(1, A), 0);
    assert!(passes(&bed.a, 0x7000_0000));
    bed.iommu.remove_device(id(A));
    // The old device reaches nothing, whatever happens to its id.
    assert!(!passes(&bed.a, 0x7000_0000) && !passes(&bed.a, 0x5000));
    assert_eq!(bed.attach(1, A), 0x57);
    assert_eq!(bed.delete(1), 0);
    let next = plug(&bed.iommu, &bed.ram, A, IommuMode::On);
    assert!(passes(&next, 0x5000) && !passes(&next, 0x7000_0000));
    assert!(!passes(&bed.a, 0x5000));
    assert_eq!(next.port.counters().faults, 1);
    bed.paging_domain(1);
    assert_eq!(bed.attach(1, A), 0);
    assert!(!passes(&next, 0x5000));
}

#[test]
fn a_function_may_be_blocked_until_it_is_attached() {
    let bed = Bed::new();
    let c = plug(&bed.iommu, &bed.ram, 8, IommuMode::BlockedUntilAttached);
    assert!(!passes(&c, 0x5000));
    assert_eq!((bed.create(1), bed.configure(1, 0, 0)), (0, 0));
    assert_eq!(bed.attach(1, 8), 0);
    assert!(passes(&c, 0x5000));
    assert_eq!(bed.detach(8), 0);
    assert!(!passes(&c, 0x5000));
}

#[test]
fn members_come_and_go_in_any_order() {
    let bed = Bed::with(IommuConfig::default());
    let functions: Vec<_> = (1..6)
        .map(|n| plug(&bed.iommu, &bed.ram, n * 8, IommuMode::On))
        .collect();
    assert_eq!((bed.create(1), bed.create(2)), (0, 0));
    for n in 1..6 {
        assert_eq!(bed.attach(1, n * 8), 0);
    }
    // From the middle, the end and the start of the list.
    for (n, left) in [(3, 4), (5, 3), (1, 2), (2, 1), (4, 0)] {
        assert_eq!(bed.delete(1), 0x19);
        assert_eq!(bed.attach(2, n * 8), 0);
        assert_eq!(bed.state().0[0].devices, left);
    }
    assert_eq!(bed.delete(1), 0);
    assert_eq!(bed.configure(2, 0, 0), 0);
    assert!(functions.iter().all(|function| passes(function, 0x5000)));
}

/// A back end that can be told to refuse.
#[derive(Debug, Default)]
struct Moody {
    refuses: AtomicBool,
    told: std::sync::Mutex<Vec<Translation>>,
}

impl DeviceBackend for Moody {
    fn attach(&self, to: &Attachment) -> Result<(), BackendError> {
        if self.refuses.load(Ordering::SeqCst) && to.translation != Translation::Blocked {
            return Err(BackendError("no room".into()));
        }
        self.told.lock().unwrap().push(to.translation);
        Ok(())
    }
    fn flush(&self, _ranges: &[FlushRange]) {}
    fn flush_all(&self) {}
    fn report(&self) -> BackendReport {
        BackendReport::default()
    }
}

#[test]
fn a_back_end_that_refuses_leaves_everything_as_it_was() {
    let mut bed = Bed::new();
    let moody = Arc::new(Moody::default());
    bed.iommu
        .add_device(id(8), IommuMode::On, Some(moody.clone()))
        .unwrap();
    let root = bed.paging_domain(1);
    bed.map(root, 0x7000_0000, 0x5000 | PAGE);
    assert_eq!((bed.attach(1, 8), bed.attach(1, A)), (0, 0));
    moody.refuses.store(true, Ordering::SeqCst);
    let before = bed.state();
    // The domain's other device obeys the old table again.
    assert_eq!(bed.configure(1, 0, 0), 0x71);
    assert_eq!(bed.state(), before);
    assert!(passes(&bed.a, 0x7000_0000) && !passes(&bed.a, 0x5000));
    assert_eq!(bed.detach(8), 0x71);
    assert_eq!(bed.state().1, before.1);
    assert_eq!(bed.iommu.report().counters.backend_refusals, 2);
    // Where nobody can be told, it is blocked.
    bed.iommu.reset();
    assert_eq!(
        moody.told.lock().unwrap().last(),
        Some(&Translation::Blocked)
    );
}

#[test]
fn a_flush_waits_for_the_access_under_way_and_for_no_other_functions() {
    let mut bed = Bed::new();
    let root = bed.paging_domain(1);
    bed.map(root, 0x7000_0000, 0x5000 | PAGE);
    assert_eq!(bed.attach(1, A), 0);
    let (inside, leave) = (std::sync::Barrier::new(3), std::sync::Barrier::new(3));
    let done = AtomicBool::new(false);
    let pause = || {
        inside.wait();
        leave.wait();
    };
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| {
            bed.a.dma.with(0x7000_0000, 8, Access::Write, |_| {
                pause();
                std::thread::sleep(std::time::Duration::from_millis(20));
                done.store(true, Ordering::SeqCst);
            })
        });
        let other = scope.spawn(|| bed.b.dma.with(0x5000, 8, Access::Read, |_| pause()));
        inside.wait();
        // The calls that do not concern the first function do not wait for it.
        assert_eq!((bed.create(2), bed.flush(2)), (0, 0));
        leave.wait();
        assert_eq!(bed.flush(1), 0);
        assert!(done.load(Ordering::SeqCst));
        slow.join().unwrap().unwrap();
        other.join().unwrap().unwrap();
    });
    assert_eq!(
        bed.a.dma.read(0x5000, &mut [0]),
        Err(DmaError::Fault {
            iova: 0x5000,
            len: 1
        })
    );
}
