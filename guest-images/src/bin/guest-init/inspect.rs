//! What the VMM's threads and KVM do, for whoever looks into a guest that fell silent.

use crate::system::{mount_at, say};
use rustix::mount::MountFlags;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Where the counters of all VMs are.
const DEBUGFS: &str = "/sys/kernel/debug";
/// Between the two looks.
const PAUSE: Duration = Duration::from_secs(1);
/// Most lines of a thread's kernel stack.
const STACK_LINES: usize = 12;

/// Prints twice, with a second between, what each thread of process `pid` does, and which of KVM's
/// counters have moved meanwhile. Best effort: the run has failed already, or may have.
pub(crate) fn show(pid: u32) {
    // Mounted already after the first time.
    let _ = mount_at("debugfs", "debugfs", DEBUGFS, MountFlags::empty(), None);
    let before = counters(Path::new(DEBUGFS).join("kvm").as_path());
    threads(pid);
    std::thread::sleep(PAUSE);
    threads(pid);
    let after = counters(Path::new(DEBUGFS).join("kvm").as_path());
    say(&format!(
        "vpci: KVM in this second:{}",
        moved(&before, &after)
    ));
}

fn threads(pid: u32) {
    let tasks = format!("/proc/{pid}/task");
    let Ok(entries) = fs::read_dir(&tasks) else {
        say(&format!("vpci: process {pid} is gone"));
        return;
    };
    for task in entries.flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (comm, wait, call) = (read("comm"), read("wchan"), read("syscall"));
        let stat = read("stat");
        say(&format!(
            "vpci: thread {}: {}, waits in {}, call {}",
            comm.trim(),
            activity(&stat),
            wait.trim(),
            call.trim()
        ));
        for line in read("stack").lines().take(STACK_LINES) {
            say(&format!("vpci:   {}", line.trim()));
        }
    }
}

/// State, ticks in user and kernel mode, ticks in a guest, and CPU of a line of `/proc/PID/stat`.
fn activity(stat: &str) -> String {
    // The name in brackets may hold blanks.
    let Some((_, rest)) = stat.rsplit_once(')') else {
        return "unknown".into();
    };
    // Fields from the third on (proc(5)).
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or("?");
    format!(
        "state {}, {} user + {} kernel ticks, {} guest, CPU {}",
        field(3),
        field(14),
        field(15),
        field(43),
        field(39)
    )
}

/// The counters of a directory of debugfs, by name.
fn counters(directory: &Path) -> BTreeMap<String, u64> {
    let Ok(entries) = fs::read_dir(directory) else {
        return BTreeMap::new();
    };
    let counter = |entry: fs::DirEntry| {
        let text = fs::read_to_string(entry.path()).ok()?;
        let name = entry.file_name().to_string_lossy().into_owned();
        Some((name, text.trim().parse().ok()?))
    };
    entries.flatten().filter_map(counter).collect()
}

/// What differs, as ` name+N` words.
fn moved(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> String {
    let words = after.iter().filter_map(|(name, now)| {
        let then = before.get(name).copied().unwrap_or(0);
        let change = now.wrapping_sub(then) as i64;
        (change != 0).then(|| format!(" {name}{change:+}"))
    });
    let text: String = words.collect();
    if text.is_empty() {
        return " nothing has moved".into();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_s_line_is_read_past_its_name() {
        let mut fields: Vec<String> = (3..=52).map(|number| number.to_string()).collect();
        fields[0] = "R".into();
        let line = format!("12 (a b) c) {}", fields.join(" "));
        assert_eq!(
            activity(&line),
            "state R, 14 user + 15 kernel ticks, 43 guest, CPU 39"
        );
        assert_eq!(activity(""), "unknown");
        assert_eq!(
            activity("1 (x) S"),
            "state S, ? user + ? kernel ticks, ? guest, CPU ?"
        );
    }

    #[test]
    fn only_counters_that_moved_are_shown() {
        let map = |list: &[(&str, u64)]| {
            let owned = list
                .iter()
                .map(|(name, value)| ((*name).to_owned(), *value));
            owned.collect::<BTreeMap<_, _>>()
        };
        let before = map(&[("exits", 5), ("halt_exits", 7), ("pages", 3)]);
        let after = map(&[("exits", 9), ("halt_exits", 7), ("pages", 1)]);
        assert_eq!(moved(&before, &after), " exits+4 pages-2");
        assert_eq!(moved(&before, &before), " nothing has moved");
    }
}
