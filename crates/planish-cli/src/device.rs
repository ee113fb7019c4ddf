//! From `--backend` to the device that everything runs on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use planish_backend::{Backend, Choice, Prober, Requested, VerdictCache, select};
use planish_core::run_config::BackendDevice;
use planish_mlx::device::{self, DeviceKind};

use crate::failure::usage;
use crate::output;

/// Longest time for one probe of a GPU, in seconds.
const TIME_LIMIT: &str = "PLANISH_PROBE_SECONDS";
/// A program to start in place of this one when a device is probed: for tests, and in debug builds only.
#[cfg(debug_assertions)]
const FAKE_PROBE: &str = "PLANISH_TEST_PROBE";

static AFRESH: AtomicBool = AtomicBool::new(false);

/// The device that everything runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceInUse {
    Cpu,
    Metal,
    Cuda,
}

impl DeviceInUse {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
        }
    }
}

/// Makes every probe of this process measure and not remember.
pub(crate) fn ignore_remembered_verdicts() {
    AFRESH.store(true, Ordering::Relaxed);
}

/// Makes a device the one that everything runs on: the one asked for or an error; under `auto` the best that computes
/// correctly, with one line on stderr when a better one had to be passed over.
pub(crate) fn select_device(wanted: BackendDevice) -> Result<DeviceInUse> {
    Ok(choose_device(wanted)?.0)
}

/// The same, with what the choice rests on.
pub(crate) fn choose_device(wanted: BackendDevice) -> Result<(DeviceInUse, Choice)> {
    let requested = match wanted {
        BackendDevice::Auto => Requested::Auto,
        BackendDevice::Cpu => Requested::Only(Backend::Cpu),
        BackendDevice::Metal => Requested::Only(Backend::Metal),
        BackendDevice::Cuda => Requested::Only(Backend::Cuda),
    };
    let choice = select(requested, &prober()?)?;
    if let Some(line) = choice.fail_over() {
        output::note(&line);
    }
    let (kind, in_use) = match choice.backend {
        Backend::Cpu => (DeviceKind::Cpu, DeviceInUse::Cpu),
        Backend::Metal => (DeviceKind::Gpu, DeviceInUse::Metal),
        Backend::Cuda => (DeviceKind::Gpu, DeviceInUse::Cuda),
    };
    device::set_default(kind)?;
    Ok((in_use, choice))
}

/// What answers for the devices of this machine. Verdicts are remembered in the cache directory.
pub(crate) fn prober() -> Result<Prober> {
    let cache = wheel_fetch::cache_dir().ok();
    let program = std::env::current_exe().unwrap_or_else(|_| "planish".into());
    let mut prober = Prober::new(program, cache.map(|dir| VerdictCache::new(dir.join("probe"))));
    prober.afresh = AFRESH.load(Ordering::Relaxed);
    prober.time_limit = time_limit()?;
    prober.announce = Some(announce);
    #[cfg(debug_assertions)]
    if let Some(program) = std::env::var_os(FAKE_PROBE) {
        (prober.program, prober.blind) = (program.into(), true);
    }
    Ok(prober)
}

fn time_limit() -> Result<Option<Duration>> {
    let Ok(text) = std::env::var(TIME_LIMIT) else {
        return Ok(None);
    };
    let seconds = text.parse().ok().filter(|seconds| (0.1..86400.0).contains(seconds));
    let seconds: f64 =
        seconds.ok_or_else(|| usage(format!("{TIME_LIMIT}={text} is no number of seconds above 0.1")))?;
    Ok(Some(Duration::from_secs_f64(seconds)))
}

/// A probe takes seconds, and on a fresh NVIDIA machine a minute or two: nobody should wonder.
fn announce(backend: Backend) {
    output::note(match backend {
        Backend::Cpu => "measuring the processor (once) …",
        Backend::Metal => "checking the GPU against the processor (once; the first use of Metal may compile) …",
        Backend::Cuda => "checking the GPU against the processor (once; its first use compiles kernels, about 35 s) …",
    });
}
