//! Debian package metadata: control stanzas, dependency fields, version order
//! (Debian Policy, chapters 5 and 7).
#![forbid(unsafe_code)]

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::iter::Peekable;
use std::str::Chars;
use thiserror::Error;

/// A stanza lacks a field that every binary package in an archive has.
#[derive(Debug, Error)]
#[error("package description without a field {field}")]
pub(crate) struct MissingField {
    field: &'static str,
}

/// One binary package of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) depends: Vec<Dependency>,
    /// Size of the package file in bytes; 0 where the archive does not tell.
    pub(crate) size: u64,
    /// SHA-256 of the package file, in hexadecimal.
    pub(crate) sha256: String,
}

/// One element of a dependency field. Of several alternatives only the first is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// The version of an `(= VERSION)` restriction.
    pub(crate) exactly: Option<String>,
}

/// Reads stanzas as `apt-cache show` prints them: separated by empty lines, one field a line,
/// continuation lines indented.
pub(crate) fn parse_packages(text: &str) -> Result<Vec<Package>, MissingField> {
    text.split("\n\n")
        .filter(|stanza| !stanza.trim().is_empty())
        .map(parse_package)
        .collect()
}

fn parse_package(stanza: &str) -> Result<Package, MissingField> {
    let fields: BTreeMap<&str, &str> = stanza
        .lines()
        .filter(|line| !line.starts_with([' ', '\t']))
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.trim()))
        .collect();
    let field = |field: &'static str| {
        let value = fields.get(field).ok_or(MissingField { field })?;
        Ok(value.to_string())
    };
    Ok(Package {
        name: field("Package")?,
        version: field("Version")?,
        depends: parse_depends(fields.get("Depends").unwrap_or(&"")),
        size: fields
            .get("Size")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
        sha256: field("SHA256")?,
    })
}

/// Reads a dependency field.
fn parse_depends(field: &str) -> Vec<Dependency> {
    field.split(',').filter_map(parse_dependency).collect()
}

fn parse_dependency(element: &str) -> Option<Dependency> {
    let first = element.split('|').next()?.trim();
    let end = first
        .find(|c: char| c.is_whitespace() || "([<:".contains(c))
        .unwrap_or(first.len());
    let (name, rest) = first.split_at(end);
    if name.is_empty() {
        return None;
    }
    let restriction = rest
        .split_once('(')
        .and_then(|(_, text)| text.split_once(')'))
        .map(|(text, _)| text.trim());
    Some(Dependency {
        name: name.into(),
        exactly: restriction
            .and_then(|text| text.strip_prefix('='))
            .map(|version| version.trim().into()),
    })
}

/// Order of two Debian versions, as `dpkg --compare-versions` has it.
pub(crate) fn compare_versions(a: &str, b: &str) -> Ordering {
    let (epoch_a, upstream_a, revision_a) = split_version(a);
    let (epoch_b, upstream_b, revision_b) = split_version(b);
    compare_part(epoch_a, epoch_b)
        .then_with(|| compare_part(upstream_a, upstream_b))
        .then_with(|| compare_part(revision_a, revision_b))
}

fn split_version(version: &str) -> (&str, &str, &str) {
    let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
    (epoch, upstream, revision)
}

/// Compares alternating runs of non-digits and digits.
fn compare_part(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.chars().peekable(), b.chars().peekable());
    loop {
        while a.peek().is_some_and(|c| !c.is_ascii_digit())
            || b.peek().is_some_and(|c| !c.is_ascii_digit())
        {
            let (rank_a, rank_b) = (text_rank(&mut a), text_rank(&mut b));
            if rank_a != rank_b {
                return rank_a.cmp(&rank_b);
            }
        }
        let (number_a, number_b) = (number(&mut a), number(&mut b));
        let by_number = (number_a.len().cmp(&number_b.len())).then(number_a.cmp(&number_b));
        if by_number != Ordering::Equal || (a.peek().is_none() && b.peek().is_none()) {
            return by_number;
        }
    }
}

/// Takes a character that is no digit: `~` sorts before the end, letters before other characters.
fn text_rank(part: &mut Peekable<Chars<'_>>) -> i64 {
    match part.next_if(|c| !c.is_ascii_digit()) {
        None => 0,
        Some('~') => -1,
        Some(c) if c.is_ascii_alphabetic() => i64::from(u32::from(c)),
        Some(c) => i64::from(u32::from(c)) + 0x11_0000,
    }
}

/// Takes a run of digits without its leading zeros.
fn number(part: &mut Peekable<Chars<'_>>) -> String {
    let digits: String = std::iter::from_fn(|| part.next_if(char::is_ascii_digit)).collect();
    digits.trim_start_matches('0').into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZAS: &str = "\
Package: linux-image-amd64
Source: linux-signed-amd64 (7.3.4+1~bpo13+1)
Version: 7.3.4-1~bpo13+1
Depends: linux-base-amd64 (= 7.3.4-1~bpo13+1), linux-image-7.3.4+deb13-amd64 (= 7.3.4-1~bpo13+1)
Description: Linux for 64-bit PCs (meta-package)
 Depends: not-a-field
Size: 1500
SHA256: 0d0df6

Package: linux-image-7.3.4+deb13-amd64
Version: 7.3.4-1~bpo13+1
SHA256: 1234

";

    #[test]
    fn stanzas_give_packages() {
        let packages = parse_packages(STANZAS).unwrap();
        assert_eq!(packages.len(), 2);
        assert_eq!(packages[0].name, "linux-image-amd64");
        assert_eq!(packages[0].size, 1500);
        assert_eq!(packages[0].sha256, "0d0df6");
        let names: Vec<_> = packages[0]
            .depends
            .iter()
            .map(|d| d.name.as_str())
            .collect();
        assert_eq!(names, ["linux-base-amd64", "linux-image-7.3.4+deb13-amd64"]);
        assert_eq!(packages[1].size, 0);
        assert!(packages[1].depends.is_empty());
        assert!(parse_packages("\n\n").unwrap().is_empty());
    }

    #[test]
    fn a_stanza_without_name_version_or_digest_is_refused() {
        for text in [
            "Version: 1\nSHA256: 0\n",
            "Package: p\nSHA256: 0\n",
            "Package: p\nVersion: 1\n",
            "garbage",
        ] {
            assert!(parse_packages(text).is_err(), "{text}");
        }
    }

    #[test]
    fn dependencies_keep_the_first_alternative_and_exact_versions() {
        let field = "kmod, dracut | initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool, \
                     linux-binary-7.3.4+deb13-amd64 (= 7.3.4-1~bpo13+1), libc6:any (>> 2) [amd64],, \
                     tight(=1)";
        let depends = parse_depends(field);
        let pairs: Vec<_> = depends
            .iter()
            .map(|d| (d.name.as_str(), d.exactly.as_deref()))
            .collect();
        assert_eq!(
            pairs,
            [
                ("kmod", None),
                ("dracut", None),
                ("linux-binary-7.3.4+deb13-amd64", Some("7.3.4-1~bpo13+1")),
                ("libc6", None),
                ("tight", Some("1")),
            ]
        );
        assert!(parse_depends("").is_empty());
    }

    #[test]
    fn versions_compare_as_dpkg_compares_them() {
        let ascending = [
            "0",
            "1.0~rc1-1",
            "1.0-1~bpo12+1",
            "1.0-1",
            "1.0-1+deb12u1",
            "1.0+dfsg-1",
            "1.2",
            "1.10",
            "6.1.176-1",
            "6.12.95-1~bpo12+1",
            "7.2.12-1~bpo13+1",
            "7.3.4-1~bpo13+1",
            "1:0.1",
        ];
        for (index, a) in ascending.iter().enumerate() {
            for (other, b) in ascending.iter().enumerate() {
                assert_eq!(compare_versions(a, b), index.cmp(&other), "{a} {b}");
            }
        }
        assert_eq!(compare_versions("1.0", "1.0-0"), Ordering::Equal);
        assert_eq!(compare_versions("0:1.01", "1.1"), Ordering::Equal);
        assert_eq!(compare_versions("1.0a", "1.0+"), Ordering::Less);
    }
}
