//! From what the user asked for to a device that works, at the least cost.

use std::path::PathBuf;
use std::time::Duration;

use planish_mlx::library::{self, GpuLibrary};

use crate::Result;
use crate::cache::{CacheKey, VerdictCache};
use crate::choose::{Choice, Requested, choose};
use crate::machine::Machine;
use crate::probe::{Limits, probe, report_of_nothing};
use crate::report::{Backend, NOT_BUILT, ProbeReport, Verdict};

/// Seed of the numbers that a probe computes with: the same everywhere, so that reports can be compared.
const SEED: u64 = 7;

/// Picks the device for a run. The processor is the measure of all others and is taken without a probe; where there is no
/// GPU, or no build for it, nothing is started at all.
///
/// # Errors
/// [`Error::Unusable`](crate::Error::Unusable) when a device was asked for by name and cannot be used.
///
/// # Example
/// ```
/// use planish_backend::{Backend, Prober, Requested, select};
/// let choice = select(Requested::Only(Backend::Cpu), &Prober::new("planish".into(), None))?;
/// assert_eq!(choice.backend, Backend::Cpu);
/// # Ok::<(), planish_backend::Error>(())
/// ```
pub fn select(requested: Requested, prober: &Prober) -> Result<Choice> {
    choose(requested, &Backend::order(), |backend| {
        Ok(match backend {
            Backend::Cpu => unprobed_cpu(),
            _ => prober.report(backend),
        })
    })
}

/// Answers for devices: from the files of the system, from memory, or by a probe.
#[derive(Debug, Clone)]
pub struct Prober {
    /// The program that runs [`child_main`](crate::child_main) under its hidden subcommand.
    pub program: PathBuf,
    /// Where verdicts are remembered; `None` asks and remembers nothing.
    pub cache: Option<VerdictCache>,
    /// Whether remembered verdicts are ignored (and replaced).
    pub afresh: bool,
    /// Longest time for one probe of a GPU; `None` is that of [`Limits::of`].
    pub time_limit: Option<Duration>,
    /// Whether to start the probe although the system shows no device: for tests of the probe itself.
    pub blind: bool,
    /// Called before a probe starts, which may take a while.
    pub announce: Option<fn(Backend)>,
    /// The machine.
    pub machine: Machine,
}

impl Prober {
    /// A prober of this machine.
    pub fn new(program: PathBuf, cache: Option<VerdictCache>) -> Self {
        Self {
            program,
            cache,
            afresh: false,
            time_limit: None,
            blind: false,
            announce: None,
            machine: Machine::look(),
        }
    }

    /// What is known of a device, found out now if need be. A probe that cannot even start is a verdict, too.
    pub fn report(&self, backend: Backend) -> ProbeReport {
        let is_blind = self.blind && backend == Backend::order()[0];
        if let Some(report) = self.beforehand(backend).filter(|_| !is_blind) {
            return report;
        }
        let key = CacheKey::of(backend, &self.program, &self.machine).ok();
        let memory = self.cache.as_ref().zip(key.as_ref());
        if let Some(report) = memory.filter(|_| !self.afresh).and_then(|(cache, key)| cache.get(key)) {
            return report;
        }
        if let Some(announce) = self.announce {
            announce(backend);
        }
        let limits = Limits::of(backend);
        let limit = self.time_limit.filter(|_| backend != Backend::Cpu);
        let limits = limit.map_or(limits, |total| limits.within(total));
        let report = probe(&self.program, backend, SEED, limits).unwrap_or_else(|error| ProbeReport {
            detail: Some(error.to_string()),
            ..report_of_nothing(backend, SEED)
        });
        let report = match backend {
            Backend::Cpu => taken_anyway(report),
            _ => report,
        };
        if let Some((cache, key)) = memory.filter(|_| report.gflops.is_some() || backend != Backend::Cpu) {
            // Not remembering costs the next run a probe, and is no reason to stop this one.
            let _ = cache.put(key, &report);
        }
        report
    }

    /// What needs no probe: a device that is not there, or that this build cannot use.
    fn beforehand(&self, backend: Backend) -> Option<ProbeReport> {
        let refuse = |verdict, code: &str, detail: &str| {
            Some(ProbeReport {
                verdict,
                code: code.to_owned(),
                detail: Some(detail.to_owned()),
                mlx_version: planish_mlx::version().unwrap_or_default(),
                ..report_of_nothing(backend, SEED)
            })
        };
        let built_for = library::gpu_support().ok().flatten();
        match backend {
            Backend::Cpu => None,
            Backend::Metal if built_for == Some(GpuLibrary::Metal) => None,
            Backend::Metal if cfg!(target_os = "macos") => {
                refuse(Verdict::Unloadable, NOT_BUILT, "this MLX is built without Metal")
            }
            Backend::Metal => refuse(Verdict::NoDevice, NOT_BUILT, "Metal exists on macOS only"),
            Backend::Cuda if cfg!(target_os = "macos") => {
                refuse(Verdict::NoDevice, NOT_BUILT, "CUDA does not exist on macOS")
            }
            Backend::Cuda if !self.machine.has_nvidia => refuse(
                Verdict::NoDevice,
                "DEVICE_NONE",
                "no NVIDIA GPU is visible on this machine",
            ),
            Backend::Cuda if built_for == Some(GpuLibrary::Cuda) => None,
            Backend::Cuda => refuse(
                Verdict::Unloadable,
                NOT_BUILT,
                "an NVIDIA GPU is here, but this planish is built without CUDA",
            ),
        }
    }
}

/// A processor that is too busy to be measured is a processor all the same; one that computes nonsense is not.
fn taken_anyway(report: ProbeReport) -> ProbeReport {
    if matches!(report.verdict, Verdict::Hung | Verdict::NoReport) {
        let detail = report.detail.map(|detail| format!("not measured: {detail}"));
        return ProbeReport {
            verdict: Verdict::Ok,
            code: "NONE".to_owned(),
            detail,
            ..report
        };
    }
    report
}

/// The processor, taken as it is.
fn unprobed_cpu() -> ProbeReport {
    ProbeReport {
        verdict: Verdict::Ok,
        code: "NONE".to_owned(),
        ..report_of_nothing(Backend::Cpu, SEED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn prober(has_nvidia: bool) -> Prober {
        Prober {
            machine: Machine {
                has_nvidia,
                ..Machine::default()
            },
            // Nothing may be started in these tests.
            program: "/nonexistent/planish".into(),
            cache: None,
            afresh: false,
            time_limit: None,
            blind: false,
            announce: None,
        }
    }

    #[test]
    fn a_machine_without_gpu_starts_no_probe_and_prints_no_line() {
        if cfg!(target_os = "macos") {
            return;
        }
        let choice = select(Requested::Auto, &prober(false)).unwrap();
        assert_eq!((choice.backend, choice.fail_over()), (Backend::Cpu, None));
        assert_eq!(choice.rejected[0].verdict, Verdict::NoDevice);
    }

    #[test]
    fn an_idle_gpu_is_worth_a_line() {
        if library::gpu_support().unwrap().is_some() {
            return;
        }
        let choice = select(Requested::Auto, &prober(true)).unwrap();
        let line = choice.fail_over().unwrap();
        assert!(
            line.contains("cuda not used: NOT_BUILT") && line.contains("planish doctor"),
            "{line}"
        );
    }

    #[test]
    fn a_probe_that_cannot_start_is_a_reason_and_not_the_end() {
        let blind = Prober {
            blind: true,
            ..prober(true)
        };
        let choice = select(Requested::Auto, &blind).unwrap();
        assert_eq!(choice.backend, Backend::Cpu);
        assert!(choice.fail_over().unwrap().contains("cannot start"));
    }

    #[test]
    fn a_processor_too_busy_to_be_measured_is_usable_and_a_wrong_one_is_not() {
        let with = |verdict| ProbeReport {
            verdict,
            detail: Some("late".to_owned()),
            ..report_of_nothing(Backend::Cpu, SEED)
        };
        let busy = taken_anyway(with(Verdict::Hung));
        assert_eq!(
            (busy.verdict, busy.detail.as_deref()),
            (Verdict::Ok, Some("not measured: late"))
        );
        assert_eq!(taken_anyway(with(Verdict::WrongResults)).verdict, Verdict::WrongResults);
    }

    #[test]
    fn err_named_device_that_is_not_there() {
        let foreign = if cfg!(target_os = "macos") {
            Backend::Cuda
        } else {
            Backend::Metal
        };
        let refused = select(Requested::Only(foreign), &prober(true));
        assert!(matches!(refused, Err(Error::Unusable { requested, .. }) if requested == foreign));
    }
}
