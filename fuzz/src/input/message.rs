//! Messages to VMBus.
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;

use super::Step;
use crate::guest::Guest;
use crate::values::{Blob, Gpa, Small, Spoil, words};

/// Versions that a guest may ask for.
const VERSIONS: [u32; 8] = [
    0x4_0000, 0x4_0001, 0x5_0000, 0x5_0001, 0x5_0002, 0x5_0003, 0x6_0000, 0x3_0000,
];

/// A message, posted from a VP to a connection.
#[derive(Debug, Clone, Arbitrary)]
pub struct Message {
    vp: bool,
    contact: bool,
    what: What,
    spoil: Spoil,
}

/// What it says.
#[derive(Debug, Clone, Arbitrary)]
enum What {
    Contact {
        version: u8,
        vp: Small,
        target: Option<u64>,
    },
    RequestOffers,
    GpadlHeader {
        relid: Small,
        gpadl: Small,
        ranges: Small,
        count: u8,
        bytes: Small,
        offset: Small,
        pages: Vec<Gpa>,
    },
    /// The GPADL of a bus's rings.
    Rings {
        relid: Small,
        gpadl: Small,
        bus: bool,
    },
    GpadlBody {
        gpadl: Small,
        pages: Vec<Gpa>,
    },
    Teardown {
        relid: Small,
        gpadl: Small,
    },
    Open {
        relid: Small,
        gpadl: Small,
        vp: Small,
        downstream: Small,
    },
    Close(Small),
    Modify {
        relid: Small,
        vp: Small,
    },
    Released(Small),
    Unload,
    TlConnect(Blob),
    Any {
        number: Small,
        body: Blob,
    },
}

/// Ids of GPADLs: those of the guest's own rings among them.
fn gpadl(id: Small) -> u32 {
    match id.0 {
        0..=1 => 0xe1e10 + id.0,
        other => other,
    }
}

impl What {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Contact {
                version,
                vp,
                target,
            } => {
                let version = VERSIONS[usize::from(*version) % VERSIONS.len()];
                let usual = if version < 0x5_0000 { 0x9000 } else { 2 };
                let target = target.unwrap_or(usual);
                let target = [target as u32, (target >> 32) as u32];
                words(&[
                    14, 0, version, vp.0, target[0], target[1], 0xa000, 0, 0xb000, 0,
                ])
            }
            Self::RequestOffers => words(&[3, 0, 0, 0, 0, 0, 0, 0]),
            Self::GpadlHeader {
                relid,
                gpadl: id,
                ranges,
                count,
                bytes,
                offset,
                pages,
            } => {
                let len = 8 + u32::from(*count) * 8;
                let head = ranges.0 << 16 | len;
                let mut message = words(&[8, 0, relid.0, gpadl(*id), head]);
                // Mostly as many bytes as pages.
                let bytes = match bytes.0 {
                    0..=6 => u32::from(*count) * 4096,
                    other => other,
                };
                message.extend(words(&[bytes, offset.0 & 0xfff]));
                message.extend(pages.iter().flat_map(|page| (page.0 >> 12).to_le_bytes()));
                message.truncate(240);
                message
            }
            Self::Rings {
                relid,
                gpadl: id,
                bus,
            } => {
                let mut message = words(&[8, 0, relid.0, gpadl(*id), 1 << 16 | 56, 6 * 4096, 0]);
                let first = Guest::rings((*bus).into())[0].control() >> 12;
                message.extend((first..first + 6).flat_map(u64::to_le_bytes));
                message
            }
            Self::GpadlBody { gpadl: id, pages } => {
                let mut message = words(&[9, 0, 0, gpadl(*id)]);
                message.extend(pages.iter().flat_map(|page| (page.0 >> 12).to_le_bytes()));
                message.truncate(240);
                message
            }
            Self::Teardown { relid, gpadl: id } => words(&[11, 0, relid.0, gpadl(*id)]),
            Self::Open {
                relid,
                gpadl: id,
                vp,
                downstream,
            } => {
                let mut message = words(&[5, 0, relid.0, 7, gpadl(*id), vp.0, downstream.0]);
                message.resize(148, 0);
                message
            }
            Self::Close(relid) => words(&[7, 0, relid.0]),
            Self::Modify { relid, vp } => words(&[22, 0, relid.0, vp.0]),
            Self::Released(relid) => words(&[13, 0, relid.0]),
            Self::Unload => words(&[16, 0]),
            Self::TlConnect(body) => {
                let mut message = words(&[21, 0]);
                message.extend(&body.0);
                message.truncate(240);
                message
            }
            Self::Any { number, body } => {
                let mut message = words(&[number.0, 0]);
                message.extend(&body.0);
                message.truncate(240);
                message
            }
        }
    }
}

impl Step for Message {
    fn apply(&self, guest: &mut Guest) {
        let mut message = self.spoil.apply(self.what.encode());
        message.truncate(240);
        let contact = self.contact != matches!(self.what, What::Contact { .. });
        let connection = if contact { 4 } else { 1 };
        guest.post(self.vp.into(), connection, &message);
    }
}
