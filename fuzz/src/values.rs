//! Values that mean something to the host more often than chance would have it.
#![forbid(unsafe_code)]

use arbitrary::{Arbitrary, Result, Unstructured};

use crate::machine::{HIGH_MMIO, LOW_MMIO, RAM};

/// Most steps of one input.
const MOST_STEPS: usize = 256;

/// A guest physical address: often in RAM or in an aperture, now and then at an edge, or anything.
#[derive(Debug, Clone, Copy)]
pub struct Gpa(pub u64);

impl<'a> Arbitrary<'a> for Gpa {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match u.arbitrary::<u8>()? {
            0..=191 => u64::from(u.arbitrary::<u8>()?) * 4096 + in_page(u)?,
            192..=223 => {
                let edges = [
                    RAM[0].end - 8,
                    RAM[0].end,
                    RAM[1].start - 8,
                    RAM[1].start,
                    RAM[1].end - 4096,
                    RAM[1].end - 8,
                    LOW_MMIO.start,
                    LOW_MMIO.end - 8,
                    HIGH_MMIO.start,
                    0xfee0_0000,
                ];
                *u.choose(&edges)? + in_page(u)?
            }
            _ => u.arbitrary()?,
        }))
    }
}

/// An offset in a page: often 0, often aligned.
fn in_page(u: &mut Unstructured<'_>) -> Result<u64> {
    let byte = u64::from(u.arbitrary::<u8>()?);
    Ok(match byte {
        0..=95 => 0,
        96..=223 => byte % 128 * 8,
        _ => u64::from(u.arbitrary::<u16>()?) % 4096,
    })
}

/// An I/O virtual address: often one of the first few pages, in reach of small tables.
#[derive(Debug, Clone, Copy)]
pub struct Iova(pub u64);

impl<'a> Arbitrary<'a> for Iova {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match u.arbitrary::<u8>()? {
            0..=199 => {
                // A few pages below and above the edges of tables of each level.
                let base = *u.choose(&[0, 0x20_0000 - 0x4000, 1 << 30, 1 << 39, 1 << 47])?;
                base + u64::from(u.arbitrary::<u8>()? % 8) * 4096 + in_page(u)?
            }
            200..=219 => 0xfee0_0000 + in_page(u)?,
            220..=235 => u64::MAX - in_page(u)?,
            _ => u.arbitrary()?,
        }))
    }
}

/// A number of which few values mean something: ids, counts, slots, VPs.
#[derive(Debug, Clone, Copy)]
pub struct Small(pub u32);

impl<'a> Arbitrary<'a> for Small {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match u.arbitrary::<u8>()? {
            byte @ 0..=223 => u32::from(byte % 8),
            224..=231 => u32::MAX,
            232..=239 => u32::from(u.arbitrary::<u16>()?),
            _ => u.arbitrary()?,
        }))
    }
}

/// Up to 255 bytes.
#[derive(Debug, Clone)]
pub struct Blob(pub Vec<u8>);

impl<'a> Arbitrary<'a> for Blob {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let len = usize::from(u.arbitrary::<u8>()?).min(u.len());
        Ok(Self(u.bytes(len)?.to_vec()))
    }
}

/// The steps of an input, until its bytes are used up.
#[derive(Debug, Clone)]
pub struct Steps<S>(pub Vec<S>);

impl<'a, S: Arbitrary<'a>> Arbitrary<'a> for Steps<S> {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let mut steps = Vec::new();
        while !u.is_empty() && steps.len() < MOST_STEPS {
            steps.push(u.arbitrary()?);
        }
        Ok(Self(steps))
    }
}

/// How a well-formed message is spoiled: not at all, for the most part.
#[derive(Debug, Clone)]
pub struct Spoil(Option<Spoiled>);

#[derive(Debug, Clone, Arbitrary)]
enum Spoiled {
    Cut(u8),
    Longer(Blob),
    Byte { at: u8, value: u8 },
    Word { at: u8, value: u32 },
}

impl<'a> Arbitrary<'a> for Spoil {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self(match u.arbitrary::<u8>()? {
            0..=207 => None,
            _ => Some(u.arbitrary()?),
        }))
    }
}

impl Spoil {
    /// The message as it goes out.
    pub fn apply(&self, mut message: Vec<u8>) -> Vec<u8> {
        match &self.0 {
            None => {}
            Some(Spoiled::Cut(len)) => message.truncate(usize::from(*len)),
            Some(Spoiled::Longer(more)) => message.extend(&more.0),
            Some(Spoiled::Byte { at, value }) => put(&mut message, (*at).into(), &[*value]),
            Some(Spoiled::Word { at, value }) => {
                put(&mut message, usize::from(*at) * 4, &value.to_le_bytes());
            }
        }
        message
    }
}

fn put(message: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = message.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Words as they lie in memory.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
