//! What carries the first-stage domains of a function: tables nested on the host's IOMMU, or a shadow.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use super::nested::CannotNest;
use crate::backend::PagedBackend;
use crate::backend::nested::NestedCapabilities;
use crate::pviommu::IommuConfig;

/// Whether tables are to be nested.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Nesting {
    /// Never.
    #[default]
    Never,
    /// Where the host can.
    IfPossible,
    /// Or else the device is not to be had.
    Required,
}

/// What may carry the first-stage domains of a function. The default is nothing: such domains are
/// refused.
#[derive(Debug, Clone, Default)]
pub struct Carry {
    /// Whether tables are to be nested.
    pub nesting: Nesting,
    /// What the guest was told of its tables.
    pub guest: IommuConfig,
    /// What follows the tables where they are not nested.
    pub shadow: Option<Arc<dyn PagedBackend>>,
}

impl From<Option<Arc<dyn PagedBackend>>> for Carry {
    fn from(shadow: Option<Arc<dyn PagedBackend>>) -> Self {
        Self {
            shadow,
            ..Self::default()
        }
    }
}

impl Carry {
    /// What the host's IOMMU can do with the guest's tables, if they can be nested.
    ///
    /// # Errors
    ///
    /// [`CannotNest`]: that of the host, or because the guest was told more than hardware can do.
    pub(super) fn nestable(
        &self,
        host: impl FnOnce() -> Result<NestedCapabilities, CannotNest>,
    ) -> Result<NestedCapabilities, CannotNest> {
        if self.nesting == Nesting::Never {
            return Err(CannotNest::NotWanted);
        }
        let found = host()?;
        if !self.guest.nested {
            let width = self.guest.iova_width();
            return Err(CannotNest::Width { width });
        }
        if self.guest.five_levels && !found.five_levels {
            return Err(CannotNest::Lacks {
                what: "walks of 5 levels, which the guest was offered",
            });
        }
        if self.guest.gigabyte_pages && !found.gigabyte_pages {
            return Err(CannotNest::Lacks {
                what: "pages of 1 GiB, which the guest was offered",
            });
        }
        Ok(found)
    }
}

/// What carries the first-stage domains of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Carrier {
    /// The host's IOMMU walks the guest's tables.
    Nested,
    /// The host's address space follows them, because they cannot be nested.
    Shadow(CannotNest),
    /// Nothing: such a domain is refused.
    Nothing(CannotNest),
}

impl Carrier {
    /// One word: `nested`, `shadow` or `none`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Nested => "nested",
            Self::Shadow(_) => "shadow",
            Self::Nothing(_) => "none",
        }
    }

    /// Why tables are not nested.
    pub fn why_not_nested(&self) -> Option<&CannotNest> {
        match self {
            Self::Nested => None,
            Self::Shadow(why) | Self::Nothing(why) => Some(why),
        }
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nested => write!(f, "nested on the host's IOMMU"),
            Self::Shadow(why) => write!(f, "shadowed, not nested: {why}"),
            Self::Nothing(why) => write!(f, "refused, not nested: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: NestedCapabilities = NestedCapabilities {
        five_levels: false,
        gigabyte_pages: false,
        max_shift: 9,
    };

    fn carry(guest: IommuConfig) -> Carry {
        Carry {
            nesting: Nesting::IfPossible,
            guest,
            shadow: None,
        }
    }

    #[test]
    fn tables_are_nested_only_if_hardware_walks_all_that_the_guest_may_build() {
        let told = IommuConfig {
            nested: true,
            gigabyte_pages: false,
            ..IommuConfig::default()
        };
        let nestable = |guest| carry(guest).nestable(|| Ok(HOST));
        assert_eq!(nestable(told), Ok(HOST));
        let wide = IommuConfig {
            nested: false,
            ..told
        };
        assert_eq!(nestable(wide), Err(CannotNest::Width { width: 48 }));
        for guest in [
            IommuConfig {
                gigabyte_pages: true,
                ..told
            },
            IommuConfig {
                five_levels: true,
                ..told
            },
        ] {
            let refused = nestable(guest);
            assert!(matches!(refused, Err(CannotNest::Lacks { .. })));
        }
        let amd = carry(told).nestable(|| Err(CannotNest::Amd));
        assert_eq!(amd, Err(CannotNest::Amd));
    }

    #[test]
    fn a_host_is_not_asked_for_what_nobody_wants() {
        let carry = Carry::from(None);
        let asked = carry.nestable(|| panic!("asked"));
        assert_eq!(asked, Err(CannotNest::NotWanted));
    }
}
