//! Two tiny shaders that tell a too old shading language from a mixed toolchain, in seconds.
//!
//! A 2025 report read `no matching function for call to 'atomic_load_explicit'` as proof that MLX's kernels were broken. Two
//! other causes are likelier: a target whose language has no float atomics, or headers and compiler of two toolchains. The
//! probe compiles at the effective target, at 14.0 and at 11.0, where it must fail.

use crate::runner::{Runner, Spec};
use serde::{Deserialize, Serialize};

/// The shader of the probe.
pub const SOURCE: &str = include_str!("micro_probe.metal");
/// Targets after the effective one.
const TARGETS: [&str; 2] = ["14.0", "11.0"];
const TIMEOUT_MS: u64 = 60_000;

/// One compilation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compiled {
    /// Deployment target.
    pub target: String,
    /// `__METAL_VERSION__` there.
    pub metal_version: Option<String>,
    /// Whether the shader compiled.
    pub passed: bool,
    /// Everything the compiler said.
    pub output: String,
}

/// What the three compilations together say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Conclusion {
    /// The effective target's language lacks what MLX calls.
    LanguageTooOld,
    /// It fails even at 14.0.
    MixedToolchain,
    /// The toolchain compiles it; a failing full build is about its sources.
    ToolchainFine,
    /// It compiled at 11.0, where it must fail: the target does not decide here.
    ControlFailed,
}

impl Conclusion {
    /// From pass or fail at the effective target, at 14.0 and at 11.0.
    ///
    /// ```
    /// use metal_check::micro_probe::Conclusion;
    /// assert_eq!(Conclusion::of(false, true, false), Conclusion::LanguageTooOld);
    /// assert_eq!(Conclusion::of(true, true, true), Conclusion::ControlFailed);
    /// ```
    pub fn of(effective: bool, at_14: bool, at_11: bool) -> Self {
        match (effective, at_14, at_11) {
            (_, _, true) => Self::ControlFailed,
            (_, false, false) => Self::MixedToolchain,
            (false, true, false) => Self::LanguageTooOld,
            (true, true, false) => Self::ToolchainFine,
        }
    }

    /// One sentence with what to do.
    pub(crate) fn sentence(self) -> &'static str {
        match self {
            Self::LanguageTooOld => {
                "the effective deployment target is too old for float atomics: set MACOSX_DEPLOYMENT_TARGET=14.0 and clean that target directory"
            }
            Self::MixedToolchain => {
                "the shader fails even at 14.0, likely a mixed toolchain: select one Xcode with DEVELOPER_DIR, compare `xcrun metal --version` with the SDK, use native arm64 tools; meanwhile use the prebuilt route"
            }
            Self::ToolchainFine => {
                "the toolchain compiles float atomics; if a full build fails it is about those kernel sources: try the newer generation, meanwhile use the prebuilt route"
            }
            Self::ControlFailed => {
                "the shader compiles even at 11.0, so the deployment target does not decide the language on this toolchain; the printed __METAL_VERSION__ says what does"
            }
        }
    }
}

/// The result of the probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MicroProbe {
    /// At the effective target, 14.0 and 11.0.
    pub compiled: Vec<Compiled>,
    /// What they say together.
    pub conclusion: Conclusion,
}

/// Compiles the shader in `directory`, where the caller has written [`SOURCE`] as `micro_probe.metal`.
pub fn run(runner: &mut dyn Runner, directory: &str, effective: &str) -> MicroProbe {
    let compiled: Vec<Compiled> = [effective]
        .into_iter()
        .chain(TARGETS)
        .enumerate()
        .map(|(index, target)| compile(runner, directory, index, target))
        .collect();
    let conclusion = Conclusion::of(compiled[0].passed, compiled[1].passed, compiled[2].passed);
    MicroProbe { compiled, conclusion }
}

fn compile(runner: &mut dyn Runner, directory: &str, index: usize, target: &str) -> Compiled {
    let minimum = format!("-mmacosx-version-min={target}");
    let mut metal = |what: &str, arguments: &[&str], stdin: Option<&str>| {
        let argv = ["xcrun", "-sdk", "macosx", "metal", &minimum]
            .iter()
            .chain(arguments)
            .map(|&word| word.to_owned())
            .collect();
        runner.run(&Spec {
            label: format!("micro-probe {index} {what}"),
            argv,
            stdin: stdin.map(str::to_owned),
            directory: Some(directory.to_owned()),
            timeout_ms: TIMEOUT_MS,
            ..Spec::default()
        })
    };
    let version = metal(
        "version",
        &["-E", "-x", "metal", "-P", "-"],
        Some("__METAL_VERSION__\n"),
    );
    let object = format!("micro_probe_{index}.air");
    let outcome = metal("compile", &["-c", "micro_probe.metal", "-o", &object], None);
    Compiled {
        target: target.to_owned(),
        metal_version: version.answer().and_then(|text| text.lines().last().map(str::to_owned)),
        passed: outcome.is_success(),
        output: outcome.log().trim().to_owned(),
    }
}
