//! What every role needs of the machine: mounts, modules, console, watchdog, power.

use anyhow::{Context, Result, bail};
use guest_images::modules::{MODULE_LIST, module_name};
use guest_images::report::EVENT_PREFIX;
use guest_images::report::FAIL_PREFIX;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

static CONSOLE: OnceLock<Mutex<File>> = OnceLock::new();
static STEP: Mutex<String> = Mutex::new(String::new());

/// Mounts the kernel's file systems and a tmpfs for scratch files.
pub(crate) fn mount_base() -> Result<()> {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
    ] {
        mount_at(kind, kind, target, MountFlags::empty(), None)?;
    }
    Ok(())
}

/// Mounts one file system, making its directory; one that is mounted already is left alone.
pub(crate) fn mount_at(
    source: &str,
    kind: &str,
    target: &str,
    flags: MountFlags,
    options: Option<&str>,
) -> Result<()> {
    let what = || format!("mount {kind} {source} at {target}");
    fs::create_dir_all(target).with_context(what)?;
    let options = options.map(CString::new).transpose().with_context(what)?;
    match mount(source, target, kind, flags, options.as_deref()) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(error).with_context(what),
    }
}

/// Opens the console for [`say`].
pub(crate) fn open_console() -> Result<()> {
    let console = OpenOptions::new()
        .write(true)
        .open("/dev/console")
        .context("/dev/console")?;
    CONSOLE.get_or_init(|| Mutex::new(console));
    Ok(())
}

/// Writes raw bytes to the console.
pub(crate) fn put(bytes: &[u8]) {
    let Some(console) = CONSOLE.get() else {
        // Before the console is there, the kernel's standard error is the only way out.
        let _ = std::io::stderr().write_all(bytes);
        return;
    };
    let mut console = console.lock().unwrap_or_else(|error| error.into_inner());
    // Nobody is left to tell about a console that fails.
    let _ = console.write_all(bytes);
}

/// Writes one line to the console, in one call so that other writers do not come between.
pub(crate) fn say(line: &str) {
    put(format!("{line}\n").as_bytes());
}

/// Asks for something from outside, on a line of its own: with the kernel's messages kept off the
/// console for the moment.
pub(crate) fn ask(event: &str) {
    const LEVELS: &str = "/proc/sys/kernel/printk";
    // Best effort: a line that the kernel cut is a failure that shows it.
    let old = read_text(LEVELS);
    let _ = write_text(LEVELS, "1");
    say(&format!("\n{EVENT_PREFIX}{event}"));
    // What is still on its way out would have the kernel's next message in its middle.
    drain();
    if let Ok(levels) = old {
        let _ = write_text(LEVELS, levels.split_whitespace().next().unwrap_or("4"));
    }
}

/// Waits until all that was written has left the console.
fn drain() {
    if let Some(console) = CONSOLE.get() {
        let console = console.lock().unwrap_or_else(|error| error.into_inner());
        let _ = rustix::termios::tcdrain(&*console);
    }
}

/// Has the kernel print the tasks that wait for something, and what each CPU does: for whoever
/// looks into a failure. Best effort, for the run has failed already.
pub(crate) fn show_blocked() {
    let _ = write_text("/proc/sys/kernel/printk", "8");
    for command in ["w", "l"] {
        let _ = write_text("/proc/sysrq-trigger", command);
    }
    if let Ok(text) = read_text("/proc/interrupts") {
        say(&text);
    }
}

/// Names the step that begins: on the console, and for the watchdog.
pub(crate) fn step(name: impl Into<String>) {
    let name = name.into();
    say(&format!("vpci: {:.1} s: {name}", uptime()));
    *STEP.lock().unwrap_or_else(|error| error.into_inner()) = name;
}

/// Seconds since the kernel started; 0 when it cannot be read.
pub(crate) fn uptime() -> f64 {
    fs::read_to_string("/proc/uptime")
        .ok()
        .and_then(|text| text.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0.0)
}

/// Ends the machine after `limit`, with a line that names the step it hung in.
pub(crate) fn start_watchdog(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        let step = STEP
            .lock()
            .unwrap_or_else(|error| error.into_inner())
            .clone();
        say(&format!(
            "{FAIL_PREFIX}watchdog: not done after {} s, in step: {step}",
            limit.as_secs()
        ));
        end(RebootCommand::PowerOff)
    });
}

/// Ends the machine; never returns.
pub(crate) fn end(how: RebootCommand) -> ! {
    if let Err(error) = reboot(how) {
        say(&format!("{FAIL_PREFIX}{how:?}: {error}"));
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Loads those modules of the initramfs that are `wanted`, by name, in the order of its list;
/// without a list there are none.
pub(crate) fn load_modules(wanted: impl Fn(&str) -> bool) -> Result<usize> {
    let list = match fs::read_to_string(MODULE_LIST) {
        Ok(list) => list,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error).context(MODULE_LIST),
    };
    let mut loaded = 0;
    let is_wanted = |path: &&str| module_name(Path::new(path)).is_none_or(|name| wanted(&name));
    for path in list.lines().filter(is_wanted) {
        load_module(path).with_context(|| format!("module {path}"))?;
        loaded += 1;
    }
    Ok(loaded)
}

fn load_module(path: &str) -> Result<()> {
    let file = File::open(path)?;
    match finit_module(&file, c"", 0) {
        // Built in, or loaded by the kernel on its own.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Polls `probe` until it gives a value; an error naming `what` after `limit`.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            bail!("{what}: not seen in {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A small file's text without the blanks around it; the error names the file.
pub(crate) fn read_text(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .with_context(|| path.display().to_string())
}

/// Writes a word to a control file; the error names the file and the word.
pub(crate) fn write_text(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("write {text} to {}", path.display()))
}

/// Numbers of the online CPUs.
pub(crate) fn online_cpus() -> Result<Vec<u32>> {
    let text = read_text("/sys/devices/system/cpu/online")?;
    parse_cpu_list(&text).with_context(|| format!("online CPUs {text:?}"))
}

/// Parses the kernel's list format, for example `0-2,5`.
pub(crate) fn parse_cpu_list(text: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for range in text
        .split(',')
        .map(str::trim)
        .filter(|range| !range.is_empty())
    {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        if last > 8192 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_cpu_list("0"), Some(vec![0]));
        assert_eq!(parse_cpu_list("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_cpu_list(""), Some(vec![]));
        assert_eq!(parse_cpu_list("0-x"), None);
        assert_eq!(parse_cpu_list("0-4294967295"), None);
    }
}
