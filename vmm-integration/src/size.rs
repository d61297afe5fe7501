//! Memory sizes on the command line.
#![forbid(unsafe_code)]

/// Smallest RAM that is accepted, in bytes. Kernels need more; the loader says how much.
pub(crate) const MIN_MEMORY: u64 = 32 << 20;

/// Largest RAM that is accepted, in bytes.
pub(crate) const MAX_MEMORY: u64 = 1 << 40;

/// Parses `512M`, `2G` or `1T` to bytes (powers of 1024).
///
/// # Errors
///
/// A sentence for the user: no unit, not a number, or outside 32M to 1T.
pub(crate) fn parse_memory(text: &str) -> Result<u64, String> {
    let unit = match text.chars().last() {
        Some('M' | 'm') => 20,
        Some('G' | 'g') => 30,
        Some('T' | 't') => 40,
        _ => return Err("give a size with its unit, such as 512M or 2G".into()),
    };
    let digits = &text[..text.len() - 1];
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err("give a size with its unit, such as 512M or 2G".into());
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|count| count.checked_mul(1 << unit))
        .filter(|bytes| (MIN_MEMORY..=MAX_MEMORY).contains(bytes))
        .ok_or_else(|| "give a size between 32M and 1T".into())
}

/// A number of bytes for people, in the largest unit that leaves at least one.
pub(crate) fn human(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_carry_a_unit() {
        assert_eq!(parse_memory("512M"), Ok(512 << 20));
        assert_eq!(parse_memory("2g"), Ok(2 << 30));
        assert_eq!(parse_memory("1T"), Ok(1 << 40));
        for bad in [
            "", "M", "512", "-1G", "+1G", "1.5G", "1KG", "G1", "1 G", "é",
        ] {
            assert!(parse_memory(bad).unwrap_err().contains("512M"), "{bad}");
        }
    }

    #[test]
    fn sizes_are_told_in_the_largest_unit_that_leaves_one() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (8 << 20, "8.0 MiB"),
            (3 << 29, "1.5 GiB"),
            (1 << 40, "1.0 TiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn sizes_outside_the_range_are_refused() {
        assert_eq!(parse_memory("32M"), Ok(MIN_MEMORY));
        for bad in [
            "0M",
            "31M",
            "2T",
            "99999999999999999999G",
            "18014398509481985M",
        ] {
            assert!(parse_memory(bad).unwrap_err().contains("32M"), "{bad}");
        }
    }
}
