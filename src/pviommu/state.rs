//! Saved form of a pvIOMMU: domains, their configuration, and who is where. Caches start empty,
//! counts start anew; the tables are in guest RAM.
#![forbid(unsafe_code)]

use super::directory::{Directory, IommuMode};
use super::table::InsertError;
use super::translation::Translation;
use super::unit::PvIommu;
use crate::device_id::LogicalDeviceId;
use crate::hv::pviommu::{DOMAIN_DEFAULT, DOMAIN_NULL};

/// A pvIOMMU as plain data.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct IommuState {
    /// [`IommuState::VERSION`].
    pub version: u32,
    /// The guest's domains, by number.
    pub domains: Vec<DomainState>,
    /// Functions behind the pvIOMMU, by id.
    pub devices: Vec<DeviceState>,
}

impl IommuState {
    /// The one version of this layout.
    pub const VERSION: u32 = 1;
}

/// A domain as plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct DomainState {
    /// Its number.
    pub number: u32,
    /// What it does; `None` until it is configured.
    pub translation: Option<Translation>,
}

/// A function behind the pvIOMMU as plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct DeviceState {
    /// Its id, zero-extended.
    pub id: u64,
    /// Number of its domain, or 0 for the default domain.
    pub domain: u32,
    /// Blocked until its bus is brought to D0.
    pub held: bool,
}

/// Why a saved pvIOMMU was refused. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IommuStateError {
    /// A layout that this version of the library does not know.
    #[error("pvIOMMU state has the unknown version {version}")]
    Version {
        /// Version found.
        version: u32,
    },
    /// A domain has an impossible number, or that of another one, or a table that it cannot have.
    #[error("domain {number} of the pvIOMMU state is impossible")]
    Domain {
        /// Its number.
        number: u32,
    },
    /// There are more domains than this pvIOMMU has.
    #[error("pvIOMMU state has {count} domains; the limit is {max}")]
    TooManyDomains {
        /// Domains of the state.
        count: usize,
        /// Limit here.
        max: u32,
    },
    /// The functions behind the pvIOMMU are others, or one is in a domain that there is not.
    #[error("pvIOMMU state does not match device {id:#x}")]
    Device {
        /// The id.
        id: u64,
    },
    /// The functions behind the pvIOMMU are others.
    #[error("pvIOMMU state has {found} devices; {expected} are plugged in")]
    DeviceCount {
        /// Devices here.
        expected: usize,
        /// Devices of the state.
        found: usize,
    },
}

impl PvIommu {
    /// The pvIOMMU as plain data.
    pub fn save(&self) -> IommuState {
        let directory = self.read();
        let domains = directory.domains.iter();
        let devices = directory.devices.iter();
        let behind = devices.filter(|(_, _, device)| device.mode != IommuMode::Off);
        IommuState {
            version: IommuState::VERSION,
            domains: domains
                .map(|(number, _, domain)| DomainState {
                    number,
                    translation: domain.translation,
                })
                .collect(),
            devices: behind
                .map(|(id, slot, device)| DeviceState {
                    id: id.code(),
                    domain: directory
                        .domain_of(slot)
                        .and_then(|slot| directory.domains.get(slot))
                        .map_or(DOMAIN_DEFAULT, |domain| domain.number),
                    held: device.held,
                })
                .collect(),
        }
    }

    /// Takes over a saved pvIOMMU, in a VM that is paused, whose RAM is restored and which has the
    /// same functions plugged in.
    ///
    /// # Errors
    ///
    /// [`IommuStateError`]; nothing has changed then.
    pub fn restore(&self, state: &IommuState) -> Result<(), IommuStateError> {
        let mut directory = self.write();
        self.check(&directory, state)?;
        let former = self.attachments(&directory);
        directory.clear_domains();
        for saved in &state.domains {
            if let Ok(slot) = directory.create(saved.number)
                && let Some(domain) = directory.domains.get_mut(slot)
            {
                domain.translation = saved.translation;
                self.forget_faults(slot);
            }
        }
        for saved in &state.devices {
            let id = LogicalDeviceId::from_domain_call(saved.id);
            let Some(slot) = id.and_then(|id| directory.devices.find(id)) else {
                continue;
            };
            let domain = directory.domains.find(saved.domain);
            directory.place(slot, domain);
            if let Some(device) = directory.devices.get_mut(slot) {
                device.held = saved.held;
            }
        }
        self.settle_all(&directory, &former);
        Ok(())
    }

    fn check(&self, directory: &Directory, state: &IommuState) -> Result<(), IommuStateError> {
        let version = state.version;
        if version != IommuState::VERSION {
            return Err(IommuStateError::Version { version });
        }
        // A directory of the same limits finds what the real one would refuse.
        let max = self.config().max_domains;
        let mut trial = Directory::new(max, 1);
        for DomainState {
            number,
            translation,
        } in state.domains.iter().copied()
        {
            let possible = !matches!(number, DOMAIN_DEFAULT | DOMAIN_NULL)
                && translation.is_none_or(|to| self.is_possible(&to));
            match trial.create(number) {
                Ok(_) if possible => {}
                Err(InsertError::Full) => {
                    let count = state.domains.len();
                    return Err(IommuStateError::TooManyDomains { count, max });
                }
                _ => return Err(IommuStateError::Domain { number }),
            }
        }
        let mut behind: Vec<u64> = directory
            .devices
            .iter()
            .filter(|(_, _, device)| device.mode != IommuMode::Off)
            .map(|(id, ..)| id.code())
            .collect();
        let expected = behind.len();
        for saved in &state.devices {
            let id = saved.id;
            let known = behind.iter().position(|code| *code == id);
            let place = known.ok_or(IommuStateError::Device { id })?;
            behind.swap_remove(place);
            if saved.domain != DOMAIN_DEFAULT && trial.domains.find(saved.domain).is_none() {
                return Err(IommuStateError::Device { id });
            }
        }
        if !behind.is_empty() {
            let found = state.devices.len();
            return Err(IommuStateError::DeviceCount { expected, found });
        }
        Ok(())
    }
}
