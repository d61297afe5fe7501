//! One line of the diagnosis, and the table of all.
#![forbid(unsafe_code)]

use std::fmt::Write;

use serde::Serialize;

/// How something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Status {
    /// There and fit for use.
    Ok,
    /// There, but not set up for this use.
    Note,
    /// Works, with a restriction.
    Limited,
    /// Not there.
    Missing,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// Part of the host that a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Topic {
    /// What guests need.
    Kvm,
    /// KVM's own Hyper-V emulation.
    HyperV,
    /// What tracking a guest's page tables needs.
    Tracking,
    /// What passing devices through needs.
    PassThrough,
    /// The machine, and what tests need.
    Machine,
}

impl Topic {
    const ALL: [Self; 5] = [
        Self::Kvm,
        Self::HyperV,
        Self::Tracking,
        Self::PassThrough,
        Self::Machine,
    ];

    fn title(self) -> &'static str {
        match self {
            Self::Kvm => "KVM",
            Self::HyperV => "Hyper-V emulation of KVM",
            Self::Tracking => "Tracking of page tables",
            Self::PassThrough => "Passing devices through",
            Self::Machine => "Machine",
        }
    }
}

/// What was looked for, what is there, and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// Part of the host.
    pub(crate) topic: Topic,
    /// What was looked for.
    pub(crate) name: String,
    /// How it stands.
    pub(crate) status: Status,
    /// What is there.
    pub(crate) found: String,
    /// What follows from it.
    pub(crate) follows: String,
    /// What to do about it; absent where nothing needs to be, or can be, done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advice: Option<String>,
}

impl Finding {
    /// A finding without advice.
    pub(crate) fn new(topic: Topic, name: &str, status: Status) -> Self {
        Self {
            topic,
            name: name.to_owned(),
            status,
            found: String::new(),
            follows: String::new(),
            advice: None,
        }
    }

    /// Says how it stands.
    pub(crate) fn status(mut self, status: Status) -> Self {
        self.status = status;
        self
    }

    /// Says what is there.
    pub(crate) fn found(mut self, found: impl Into<String>) -> Self {
        self.found = found.into();
        self
    }

    /// Says what follows.
    pub(crate) fn follows(mut self, follows: impl Into<String>) -> Self {
        self.follows = follows.into();
        self
    }

    /// Says what to do.
    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// The findings as a table: one line each, below the titles of their topics.
pub(crate) fn table(findings: &[Finding]) -> String {
    let width = |field: fn(&Finding) -> &str| {
        let widths = findings
            .iter()
            .map(|finding| field(finding).chars().count());
        widths.max().unwrap_or(0)
    };
    let (name, found) = (width(|f| &f.name), width(|f| &f.found).min(24));
    let mut text = String::new();
    for topic in Topic::ALL {
        let mut lines = findings.iter().filter(|f| f.topic == topic).peekable();
        if lines.peek().is_some() {
            text += &format!("{}\n", topic.title());
        }
        for finding in lines {
            text += &line(finding, name, found);
        }
    }
    text
}

fn line(finding: &Finding, name: usize, found: usize) -> String {
    let mut line = format!(
        "  {:<8} {:<name$}  {:<found$}  {}",
        finding.status.word(),
        finding.name,
        finding.found,
        finding.follows,
    );
    if let Some(advice) = &finding.advice {
        // Writing to a string cannot fail.
        let _ = write!(line, "; to do: {advice}");
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_one_line_a_finding_below_the_title_of_its_topic() {
        let findings = [
            Finding::new(Topic::Machine, "cores", Status::Ok)
                .found("2")
                .follows("enough"),
            Finding::new(Topic::Kvm, "/dev/kvm", Status::Missing)
                .found("not there")
                .follows("no guest")
                .advise("load kvm"),
        ];
        assert_eq!(
            table(&findings),
            "KVM\n  missing  /dev/kvm  not there  no guest; to do: load kvm\n\
             Machine\n  ok       cores     2          enough\n"
        );
    }
}
