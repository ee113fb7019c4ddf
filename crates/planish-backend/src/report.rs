//! What a probe found, as it is printed, cached and recorded with a run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Version of the layout.
pub(crate) const SCHEMA: u32 = 1;

/// Where MLX computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The main processor.
    Cpu,
    /// An Apple GPU.
    Metal,
    /// An NVIDIA GPU.
    Cuda,
}

impl Backend {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
        }
    }

    /// What `auto` tries on this system, best first.
    pub fn order() -> [Self; 2] {
        [
            if cfg!(target_os = "macos") {
                Self::Metal
            } else {
                Self::Cuda
            },
            Self::Cpu,
        ]
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = [Self::Cpu, Self::Metal, Self::Cuda];
        known
            .into_iter()
            .find(|b| b.name() == name)
            .ok_or_else(|| format!("{name:?} is none of cpu, metal, cuda"))
    }
}

/// What the parent concludes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every check passed.
    Ok,
    /// The same, on a virtual GPU with a wider bound.
    OkVirtual,
    /// Numbers differ from the CPU's: never used.
    WrongResults,
    /// There is no such device.
    NoDevice,
    /// Memory could not be had.
    Oom,
    /// The probe process died.
    Crashed,
    /// The probe process gave no answer in time.
    Hung,
    /// The probe process ended without a whole report.
    NoReport,
}

impl Verdict {
    /// Whether a run may use the device.
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Ok | Self::OkVirtual)
    }

    /// As written in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::OkVirtual => "ok_virtual",
            Self::WrongResults => "wrong_results",
            Self::NoDevice => "no_device",
            Self::Oom => "oom",
            Self::Crashed => "crashed",
            Self::Hung => "hung",
            Self::NoReport => "no_report",
        }
    }

    /// Whether the same machine would give it again, so that it may be remembered.
    pub fn is_lasting(self) -> bool {
        !matches!(self, Self::Hung | Self::NoReport | Self::Oom)
    }
}

/// What one device was found to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Version of this layout.
    pub schema: u32,
    /// The probed device.
    pub backend: Backend,
    /// The conclusion.
    pub verdict: Verdict,
    /// Stable name of what went wrong; `NONE` when nothing did.
    pub code: String,
    /// The last stage that began.
    pub stage: String,
    /// Version of the MLX library.
    pub mlx_version: String,
    /// The program.
    pub app: String,
    /// Seed of the inputs.
    pub seed: u64,
    /// The device, as far as it was identified.
    pub device: DeviceReport,
    /// Every check, in order.
    pub checks: Vec<Check>,
    /// Speed of an f32 product of two 2048 × 2048 matrices, in 10⁹ operations a second.
    pub gflops: Option<f64>,
    /// How the probe process ended.
    pub child: ChildEnd,
    /// Whether the verdict was remembered and not measured now.
    pub cached: bool,
}

impl ProbeReport {
    /// Why the device is not used, in a few words; empty when it is.
    pub fn reason(&self) -> String {
        if self.verdict.is_usable() {
            return String::new();
        }
        let failed = self.checks.iter().find(|check| check.status == CheckStatus::Fail);
        let place = failed.map_or(self.stage.as_str(), |check| check.id.as_str());
        let place = if place.is_empty() {
            String::new()
        } else {
            format!(" in {place}")
        };
        let remembered = if self.cached { " (remembered)" } else { "" };
        format!("{} ({}){place}{remembered}", self.code, self.verdict.name())
    }
}

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceReport {
    /// How many there are.
    pub count: usize,
    /// Its name.
    pub name: Option<String>,
    /// Such as `applegpu_g16s` or `sm_90`.
    pub architecture: Option<String>,
    /// Its memory.
    pub memory_bytes: Option<u64>,
    /// Most of it that a program should use.
    pub recommended_bytes: Option<u64>,
    /// Whether it is a virtual machine's.
    #[serde(rename = "virtual")]
    pub is_virtual: bool,
}

/// One comparison with the CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Such as `matmul.bf16.m9`.
    pub id: String,
    /// How it ended.
    pub status: CheckStatus,
    /// Largest difference relative to the largest expected value.
    pub max_rel: Option<f64>,
    /// Cosine of the angle between found and expected.
    pub cosine: Option<f64>,
    /// Elements that are not finite.
    pub nonfinite: usize,
    /// Milliseconds on the device.
    pub ms: f64,
    /// What went wrong, where it is more than a number.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// Within its bound.
    Pass,
    /// Outside its bound.
    Fail,
    /// Worth a remark; not held against the device.
    Warn,
    /// Not run, with the reason in the note.
    Skipped,
}

/// How the probe process ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ChildEnd {
    /// Exit code.
    pub exit: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Milliseconds it lived.
    pub wall_ms: u64,
    /// The last lines it wrote to standard error.
    pub stderr_tail: Vec<String>,
    /// Whether it was stopped because it took too long.
    pub timed_out: bool,
    /// The limits it was held to, in milliseconds: in all, and without a sign of life.
    pub limits_ms: [u64; 2],
}
