//! The clock registers of a CMOS RTC, read-only, with the host's time in UTC.
//!
//! The FADT says that there is no CMOS RTC, so no driver binds to it; but Linux reads the wall
//! clock from these ports at boot all the same, and polls for seconds where nothing answers.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Index port; the data port follows it.
pub(crate) const INDEX: u16 = 0x70;
/// Data port.
pub(crate) const DATA: u16 = 0x71;

/// Status B: BCD values (Linux on x86 takes them for such whatever this says), 24 hours.
const STATUS_B: u8 = 0x02;
/// Status D: time is valid.
const STATUS_D: u8 = 0x80;

/// The two ports.
#[derive(Debug, Default)]
pub(crate) struct Rtc {
    index: AtomicU8,
}

impl Rtc {
    /// A write to one of the ports.
    pub(crate) fn write(&self, port: u16, value: u8) {
        if port == INDEX {
            // The top bit masks NMIs, of which there are none.
            self.index.store(value & 0x7f, Ordering::Relaxed);
        }
    }

    /// The index register.
    pub(crate) fn index(&self) -> u8 {
        self.index.load(Ordering::Relaxed)
    }

    /// A read from the data port.
    pub(crate) fn read(&self) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = now.map_or(0, |time| time.as_secs());
        register(self.index.load(Ordering::Relaxed), seconds)
    }
}

/// A register at a time in seconds since 1970.
fn register(index: u8, seconds: u64) -> u8 {
    let days = seconds / 86400;
    let (year, month, day) = civil(days);
    let value = match index {
        0 => seconds % 60,
        2 => seconds / 60 % 60,
        4 => seconds / 3600 % 24,
        // Sunday is 1, and 1 January 1970 was a Thursday.
        6 => (days + 4) % 7 + 1,
        7 => day,
        8 => month,
        9 => year % 100,
        0x32 => year / 100,
        0xb => return STATUS_B,
        0xd => return STATUS_D,
        _ => return 0,
    };
    (value / 10 * 16 + value % 10) as u8
}

/// Year, month and day of the Gregorian calendar, `days` after 1 January 1970. Years count from
/// March here, so that the leap day is their last.
fn civil(days: u64) -> (u64, u64, u64) {
    const DAYS_IN_400_YEARS: u64 = 146_097;
    // 1 March of the year 0 is 719468 days before 1970.
    let days = days + 719_468;
    let (era, day_of_era) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_come_out_right_around_leap_days() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        assert_eq!(civil(20_453), (2025, 12, 31));
        assert_eq!(civil(47_541), (2100, 3, 1));
    }

    #[test]
    fn registers_show_the_time_in_bcd() {
        // 2026-11-22 16:57:09, a Sunday.
        let at = |index| register(index, 1_795_366_629);
        let time = [4, 2, 0, 6, 7, 8, 9].map(at);
        assert_eq!(time, [0x16, 0x57, 0x09, 1, 0x22, 0x11, 0x26]);
        assert_eq!([0x32, 0xa, 0xb, 0xd].map(at), [0x20, 0, 2, 0x80]);
    }

    #[test]
    fn the_index_port_selects_and_the_clock_cannot_be_set() {
        let rtc = Rtc::default();
        rtc.write(INDEX, 0x8d);
        rtc.write(DATA, 0);
        assert_eq!(rtc.read(), STATUS_D);
    }
}
