//! The contents of test disks: a function of the disk, a generation number and the offset, so that
//! both ends can check every byte without sending any.
//!
//! Generation 0 is what the rig puts on a disk before a guest runs, generation *n* what the guest
//! writes in its *n*-th boot. The first sixteen bytes of the disk are a label which says the
//! generation, so that a guest can tell after a reset what it must find.

#![forbid(unsafe_code)]

use crate::scenario::PciAddress;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// Marks a labelled disk: the first eight bytes, little-endian.
const MAGIC: u64 = 0x3153_4944_4943_5056;
/// Size of the label in bytes.
const LABEL: usize = 16;

/// A disk's contents at one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    seed: u64,
    generation: u64,
}

impl Pattern {
    /// Contents of the disk behind the PCI function at `address`, at `generation`.
    pub fn new(address: PciAddress, generation: u64) -> Self {
        let place = (u64::from(address.domain) << 24)
            | (u64::from(address.bus) << 16)
            | (u64::from(address.device) << 8)
            | u64::from(address.function);
        Self {
            seed: mix(place) ^ mix(!generation),
            generation,
        }
    }

    /// Fills `buffer` with the contents from byte `offset` of the disk on.
    ///
    /// # Panics
    /// If `offset` or the buffer's length is no multiple of 512.
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) {
        let words = self.words(offset, buffer.len());
        for (bytes, word) in buffer.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Offset in `buffer` of the first eight bytes which differ from the disk's contents at byte
    /// `offset` of the disk; `None` when all are right.
    ///
    /// # Panics
    /// If `offset` or the buffer's length is no multiple of 512.
    pub fn mismatch(&self, offset: u64, buffer: &[u8]) -> Option<usize> {
        buffer
            .chunks_exact(8)
            .zip(self.words(offset, buffer.len()))
            .position(|(bytes, word)| bytes != word.to_le_bytes())
            .map(|index| index * 8)
    }

    fn words(self, offset: u64, len: usize) -> impl Iterator<Item = u64> {
        assert!(
            offset.is_multiple_of(512) && len.is_multiple_of(512),
            "whole sectors only"
        );
        let first = offset / 8;
        (first..first + len as u64 / 8).map(move |index| match index {
            0 => MAGIC,
            1 => self.generation,
            _ => mix(self.seed ^ index),
        })
    }
}

/// Bytes of a file that are made or checked at a time.
const CHUNK: usize = 1 << 20;

/// Makes a file of `size` bytes with a disk's contents.
///
/// # Errors
/// Those of the file.
///
/// # Panics
/// If `size` is no multiple of 1 MiB.
pub fn make_file(path: &Path, pattern: Pattern, size: u64) -> io::Result<()> {
    assert!(size.is_multiple_of(CHUNK as u64), "whole pieces only");
    let mut file = File::create(path)?;
    let mut buffer = vec![0; CHUNK];
    for offset in (0..size).step_by(CHUNK) {
        pattern.fill(offset, &mut buffer);
        file.write_all(&buffer)?;
    }
    Ok(())
}

/// Checks that the whole of a file has a disk's contents, and gives the checksum of its first
/// `size` bytes.
///
/// # Errors
/// Those of the file, and `InvalidData` with the offset of the first wrong place.
pub fn check_file(path: &Path, pattern: Pattern, size: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut buffer = vec![0; CHUNK];
    let mut checksum = Checksum::default();
    for offset in (0..length).step_by(CHUNK) {
        let buffer = &mut buffer[..CHUNK.min((length - offset) as usize)];
        file.read_exact(buffer)?;
        if let Some(wrong) = pattern.mismatch(offset, buffer) {
            let at = offset + wrong as u64;
            let text = format!("wrong contents at {at:#x}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        if offset < size {
            checksum.add(buffer);
        }
    }
    Ok(checksum.hex())
}

/// Generation that the label at the start of a disk names; `None` where there is no label.
pub fn generation(start: &[u8]) -> Option<u64> {
    let (magic, rest) = start.get(..LABEL)?.split_first_chunk::<8>()?;
    let generation = rest.first_chunk::<8>()?;
    (u64::from_le_bytes(*magic) == MAGIC).then(|| u64::from_le_bytes(*generation))
}

/// The finalizer of SplitMix64: spreads every input bit over the whole word.
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Running FNV-1a over little-endian 64-bit words.
#[derive(Clone, Copy, Debug)]
pub struct Checksum(u64);

impl Default for Checksum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Checksum {
    /// Adds `bytes`, of which a tail shorter than eight is ignored.
    pub fn add(&mut self, bytes: &[u8]) {
        for chunk in bytes.as_chunks::<8>().0 {
            self.0 = (self.0 ^ u64::from_le_bytes(*chunk)).wrapping_mul(0x100_0000_01b3);
        }
    }

    /// The sum so far, as sixteen hexadecimal digits.
    pub fn hex(self) -> String {
        format!("{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    #[test]
    fn contents_do_not_depend_on_how_they_are_cut() {
        let pattern = Pattern::new(address("1234:00:00.0"), 3);
        let mut whole = vec![0; 8192];
        pattern.fill(0, &mut whole);
        let mut part = vec![0; 1024];
        pattern.fill(4096, &mut part);
        assert_eq!(part, whole[4096..5120]);
        assert_eq!(pattern.mismatch(0, &whole), None);
    }

    #[test]
    fn one_wrong_byte_is_found_where_it_is() {
        let pattern = Pattern::new(address("1234:00:00.0"), 1);
        let mut data = vec![0; 4096];
        pattern.fill(512, &mut data);
        data[1027] ^= 1;
        assert_eq!(pattern.mismatch(512, &data), Some(1024));
    }

    #[test]
    fn disks_and_generations_and_offsets_differ() {
        let mut seen = std::collections::BTreeSet::new();
        for place in ["1234:00:00.0", "1234:00:00.1", "1235:00:00.0"] {
            for generation in 0..4 {
                for offset in [0, 512, 1 << 20] {
                    let mut data = vec![0; 512];
                    Pattern::new(address(place), generation).fill(offset, &mut data);
                    assert!(seen.insert(data[LABEL..].to_vec()));
                }
            }
        }
    }

    #[test]
    fn the_label_names_the_generation() {
        let mut data = vec![0; 512];
        Pattern::new(address("0:0:0.0"), 7).fill(0, &mut data);
        assert_eq!(generation(&data), Some(7));
        assert_eq!(generation(&data[..15]), None);
        assert_eq!(generation(&[0; 512]), None);
    }

    #[test]
    fn a_checksum_depends_on_order() {
        let (mut one, mut two) = (Checksum::default(), Checksum::default());
        one.add(&[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        two.add(&[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_ne!(one.hex(), two.hex());
        assert_eq!(one.hex().len(), 16);
    }

    #[test]
    fn a_file_holds_what_the_check_expects_and_a_wrong_byte_is_found() {
        let path = std::env::temp_dir().join(format!("vpci-disk-{}", std::process::id()));
        let address: PciAddress = "1234:00:00.0".parse().unwrap();
        make_file(&path, Pattern::new(address, 0), 2 << 20).unwrap();
        check_file(&path, Pattern::new(address, 0), 2 << 20).unwrap();
        assert!(check_file(&path, Pattern::new(address, 1), 2 << 20).is_err());
        let mut data = std::fs::read(&path).unwrap();
        data[0x10_0010] ^= 1;
        std::fs::write(&path, data).unwrap();
        let error = check_file(&path, Pattern::new(address, 0), 2 << 20).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert!(error.to_string().contains("0x100010"));
    }
}
