//! Opening nodes of `/dev`.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::PathBuf;

use super::error::VfioError;

/// Opens a node for the device at `address`; `advice` says what makes it appear.
pub(super) fn open(address: &str, node: PathBuf, advice: &'static str) -> Result<File, VfioError> {
    let address = || address.to_owned();
    match File::options().read(true).write(true).open(&node) {
        Ok(file) => Ok(file),
        Err(error) => Err(match (error.kind(), error.raw_os_error()) {
            (_, Some(libc::EBUSY)) => VfioError::InUse {
                address: address(),
                node,
            },
            (io::ErrorKind::PermissionDenied, _) => VfioError::NoPermission {
                address: address(),
                node,
            },
            (io::ErrorKind::NotFound, _) | (_, Some(libc::ENODEV | libc::ENXIO)) => {
                VfioError::NoNode {
                    address: address(),
                    node,
                    advice,
                }
            }
            _ => VfioError::Host {
                address: address(),
                what: "opening its node",
                error,
            },
        }),
    }
}
