//! Running other programs: errors name the command line and how it ended.
#![forbid(unsafe_code)]

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use std::io;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::Command;
use std::process::Stdio;

/// Command line of `command` as it could be typed, for messages.
pub(crate) fn display(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

/// Prints a text on standard output. A reader that is gone, such as `head`, is no failure.
pub(crate) fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot print")
        }
        _ => Ok(()),
    }
}

/// Runs `command` with its output on this program's; an error unless it exits with 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start `{}`", display(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", display(command));
    }
    Ok(())
}

/// Runs `command` with all its output on this program's standard error, because standard output
/// is for results; an error unless it exits with 0.
pub(crate) fn run_on_stderr(command: &mut Command) -> Result<()> {
    let stderr = std::io::stderr().as_fd().try_clone_to_owned()?;
    run(command.stdout(stderr))
}

/// Runs `command` and returns its standard output; an error, with what it wrote to standard
/// error, unless it exits with 0.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", display(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` ended with {}: {}",
            display(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("output of `{}` is not UTF-8", display(command)))
}

#[cfg(test)]
mod tests {
    use super::output;
    use super::run;
    use std::process::Command;

    #[test]
    fn errors_name_the_command_and_its_end() {
        let error = output(Command::new("sh").args(["-c", "echo why >&2; exit 7"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("exit 7"), "{error}");
        assert!(error.contains("why"), "{error}");
        let error = run(&mut Command::new("/no/such/program")).unwrap_err();
        assert!(
            format!("{error:#}").contains("/no/such/program"),
            "{error:#}"
        );
    }

    #[test]
    fn output_is_returned_whole() {
        assert_eq!(
            output(Command::new("echo").arg("two words")).unwrap(),
            "two words\n"
        );
    }
}
