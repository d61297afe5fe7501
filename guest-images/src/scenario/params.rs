//! What a guest is told on its kernel command line.

#![forbid(unsafe_code)]

use super::{Function, Kind, Mode, PciAddress};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Seconds by which a guest's own watchdog fires before the run's time limit.
pub const WATCHDOG_LEAD_S: u64 = 15;

/// A PCI function that the guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Where it must appear.
    pub address: PciAddress,
    /// What it must be.
    pub kind: Kind,
}

/// What the guest role reads from its kernel command line.
///
/// Keys: `vpci.role=guest`, `vpci.mode`, `vpci.repeat`, `vpci.limit` (seconds), `vpci.expect`
/// (a comma-separated list of `ADDRESS=KIND`), `vpci.swap` (the same, absent when empty),
/// `vpci.grow` (0 or 1), `vpci.marks` (0 where no VMM listens to the mark port) and `vpci.counted`
/// (0 or 1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestParams {
    /// What to do.
    pub mode: Mode,
    /// Number of resets or rebinds.
    pub repeat: u32,
    /// Seconds until the guest's watchdog ends it.
    pub time_limit_s: u64,
    /// The functions to wait for.
    pub expect: Vec<Expected>,
    /// What takes the place of some of them in [`Mode::ReuseId`].
    pub swap: Vec<Expected>,
    /// Whether a disk grows on request.
    pub grow: bool,
    /// Whether to write marks to the mark port.
    pub marks: bool,
    /// Whether the rig counts the interrupts of host devices at each mark.
    pub counted: bool,
}

impl fmt::Display for GuestParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "vpci.role=guest vpci.mode={} vpci.repeat={} vpci.limit={} vpci.grow={} vpci.marks={} \
             vpci.counted={} vpci.expect=",
            self.mode.as_str(),
            self.repeat,
            self.time_limit_s,
            u8::from(self.grow),
            u8::from(self.marks),
            u8::from(self.counted),
        )?;
        list(f, &self.expect)?;
        if !self.swap.is_empty() {
            f.write_str(" vpci.swap=")?;
            list(f, &self.swap)?;
        }
        Ok(())
    }
}

fn list(f: &mut fmt::Formatter<'_>, items: &[Expected]) -> fmt::Result {
    for (index, expected) in items.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        write!(f, "{comma}{}={}", expected.address, expected.kind.as_str())?;
    }
    Ok(())
}

impl From<&Function> for Expected {
    fn from(function: &Function) -> Self {
        Self {
            address: function.address(),
            kind: function.kind(),
        }
    }
}

impl FromStr for GuestParams {
    type Err = String;

    fn from_str(cmdline: &str) -> Result<Self, String> {
        let words = words(cmdline);
        let number = |key: &str, default: u64| match words.get(key) {
            None => Ok(default),
            Some(text) => text
                .parse::<u64>()
                .map_err(|_| format!("{key}={text}: not a number")),
        };
        let repeat = number("vpci.repeat", 0)?;
        let expected = |key: &'static str| -> Result<Vec<Expected>, String> {
            let items = words.get(key).copied().unwrap_or_default().split(',');
            items
                .filter(|item| !item.is_empty())
                .map(|item| parse_expected(key, item))
                .collect()
        };
        Ok(Self {
            mode: words
                .get("vpci.mode")
                .map_or(Ok(Mode::Full), |m| m.parse())?,
            repeat: u32::try_from(repeat)
                .map_err(|_| format!("vpci.repeat={repeat}: too large"))?,
            time_limit_s: number("vpci.limit", 120)?,
            expect: expected("vpci.expect")?,
            swap: expected("vpci.swap")?,
            grow: number("vpci.grow", 0)? != 0,
            marks: number("vpci.marks", 1)? != 0,
            counted: number("vpci.counted", 0)? != 0,
        })
    }
}

fn parse_expected(key: &str, item: &str) -> Result<Expected, String> {
    let (address, kind) = item
        .split_once('=')
        .ok_or_else(|| format!("{key}: {item}: not ADDRESS=KIND"))?;
    let kind = Kind::EXPECTED
        .into_iter()
        .find(|known| known.as_str() == kind)
        .ok_or_else(|| format!("{key}: {kind}: no such kind"))?;
    Ok(Expected {
        address: address.parse()?,
        kind,
    })
}

/// The `key=value` words of a kernel command line; the last one of a key wins.
pub fn words(cmdline: &str) -> BTreeMap<&str, &str> {
    cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.split_once('='))
        .collect()
}
