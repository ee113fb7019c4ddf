//! The builds worth trying on a machine: generation × route × features × deployment target.

use crate::Error;
use crate::preflight::Preflight;
use crate::version::Version;
use crate::wheel;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A released pair of mlx-rs and mlx-sys, and the MLX that it builds. A failure belongs to that MLX, not to the crates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// Version of mlx-rs, by which the pair is called.
    pub mlx_rs: String,
    /// Version of mlx-sys.
    pub mlx_sys: String,
    /// Tag of MLX.
    pub mlx: String,
    /// Older than, the same as or newer than the one this project is locked to.
    pub age: Age,
}

/// Compared with the lock file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Age {
    Older,
    Pinned,
    Newer,
}

/// The committed list; nothing on crates.io lies between 0.25 and 0.32.
pub fn known_generations() -> Vec<Generation> {
    let generation = |mlx_rs: &str, mlx_sys: &str, mlx: &str, age| Generation {
        mlx_rs: mlx_rs.into(),
        mlx_sys: mlx_sys.into(),
        mlx: mlx.into(),
        age,
    };
    vec![
        generation("0.33.0", "0.7.0", "0.32.2", Age::Pinned),
        generation("0.32.0", "0.6.0", "0.32.2", Age::Older),
        generation("0.25.3", "0.2.0", "0.25.1", Age::Older),
    ]
}

/// How MLX gets into the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// The published library, no Metal compiler needed.
    Prebuilt,
    /// CMake compiles MLX with its kernels.
    Source,
    /// CMake compiles MLX; kernels are compiled at run time.
    SourceJit,
}

/// What of MLX is switched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Features {
    #[serde(rename = "metal")]
    Metal,
    #[serde(rename = "metal+accelerate")]
    MetalAccelerate,
    /// The CPU of a Mac.
    #[serde(rename = "accelerate")]
    Accelerate,
    /// The CPU of a Linux machine.
    #[serde(rename = "cpu")]
    Cpu,
    /// An NVIDIA GPU.
    #[serde(rename = "cuda")]
    Cuda,
}

impl Features {
    /// The word in an id.
    pub fn word(self) -> &'static str {
        match self {
            Features::Metal => "metal",
            Features::MetalAccelerate => "metal+accelerate",
            Features::Accelerate => "accelerate",
            Features::Cpu => "cpu",
            Features::Cuda => "cuda",
        }
    }

    /// Whether a GPU is what it is about.
    pub fn is_gpu(self) -> bool {
        !matches!(self, Features::Accelerate | Features::Cpu)
    }
}

/// One build to try.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Which release.
    pub generation: Generation,
    /// How it is built.
    pub route: Route,
    /// What is switched on.
    pub features: Features,
    /// Deployment target, `as-is` for whatever the user's environment says, or `linux`.
    pub target: String,
    /// Whether it must pass before anything is said about a GPU.
    pub is_control: bool,
}

impl fmt::Display for Candidate {
    /// `<generation>/<route>/<features>/dt<target>`, the id that history is kept by.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let route = match self.route {
            Route::Prebuilt => "prebuilt",
            Route::Source => "source",
            Route::SourceJit => "source-jit",
        };
        let prefix = if self.target.starts_with(|first: char| first.is_ascii_digit()) {
            "dt"
        } else {
            ""
        };
        write!(
            f,
            "{}/{route}/{}/{prefix}{}",
            self.generation.mlx_rs,
            self.features.word(),
            self.target
        )
    }
}

/// Why a candidate is not even tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skip {
    /// A code of the catalogue.
    pub code: String,
    /// What shows it.
    pub detail: String,
}

/// What to look at when the list is made.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    /// The whole matrix instead of the locked generation at 14.0.
    pub full: bool,
    /// A Mac (the real one, or assumed for a test).
    pub is_mac: bool,
    /// An NVIDIA GPU is there.
    pub has_cuda: bool,
    /// Running macOS.
    pub macos: Option<Version>,
    /// A release newer than the locked one, if the index knows one.
    pub newest: Option<Generation>,
}

/// The candidates in the order in which they are tried: the control first, then the prebuilt route, then the rest.
pub fn candidates(scope: &Scope) -> Vec<Candidate> {
    let known = known_generations();
    let pinned = &known[0];
    if !scope.is_mac {
        let one = |features, is_control| Candidate {
            generation: pinned.clone(),
            route: Route::Prebuilt,
            features,
            target: "linux".into(),
            is_control,
        };
        return [one(Features::Cpu, true)]
            .into_iter()
            .chain(scope.has_cuda.then(|| one(Features::Cuda, false)))
            .collect();
    }
    let mut list = vec![
        Candidate {
            generation: pinned.clone(),
            route: Route::Prebuilt,
            features: Features::Accelerate,
            target: "14.0".into(),
            is_control: true,
        },
        Candidate {
            generation: pinned.clone(),
            route: Route::Prebuilt,
            features: Features::Metal,
            target: "14.0".into(),
            is_control: false,
        },
        Candidate {
            generation: pinned.clone(),
            route: Route::Source,
            features: Features::MetalAccelerate,
            target: "14.0".into(),
            is_control: false,
        },
    ];
    if scope.full {
        let newest_target = scope.macos.filter(|macos| *macos >= Version(26, 2, 0)).map(|_| "26.2");
        let targets: Vec<&str> = ["14.0"].into_iter().chain(newest_target).chain(["as-is"]).collect();
        for generation in known.iter().chain(&scope.newest) {
            for route in [Route::Source, Route::SourceJit] {
                for features in [Features::MetalAccelerate, Features::Accelerate] {
                    for target in &targets {
                        let candidate = Candidate {
                            generation: generation.clone(),
                            route,
                            features,
                            target: (*target).to_owned(),
                            is_control: false,
                        };
                        let makes_sense = route == Route::Source || features.is_gpu();
                        if makes_sense && !list.contains(&candidate) {
                            list.push(candidate);
                        }
                    }
                }
            }
        }
    }
    list
}

/// The candidates with these ids, in the order of the list.
///
/// # Errors
/// [`Error::UnknownCandidate`] naming the nearest id.
pub fn choose(list: Vec<Candidate>, ids: &[String]) -> Result<Vec<Candidate>, Error> {
    let names: Vec<String> = list.iter().map(Candidate::to_string).collect();
    if let Some(unknown) = ids.iter().find(|id| !names.contains(id)) {
        let nearest = names
            .iter()
            .max_by_key(|name| shared_parts(name, unknown))
            .cloned()
            .unwrap_or_default();
        return Err(Error::UnknownCandidate {
            id: unknown.clone(),
            nearest,
        });
    }
    Ok(list
        .into_iter()
        .filter(|candidate| ids.is_empty() || ids.contains(&candidate.to_string()))
        .collect())
}

fn shared_parts(one: &str, other: &str) -> usize {
    one.split('/').zip(other.split('/')).filter(|(a, b)| a == b).count()
}

/// Whether the preflight already decides that this candidate cannot be built here.
pub fn skip(candidate: &Candidate, preflight: &Preflight, offline: bool) -> Option<Skip> {
    let host = &preflight.host;
    if candidate.target == "linux" {
        return None;
    }
    let found = |code: &str| {
        preflight
            .findings
            .iter()
            .find(|finding| finding.code == code || (code == "TOOLCHAIN" && finding.code.starts_with("TOOLCHAIN_")))
    };
    let as_skip = |finding: &crate::preflight::Finding| Skip {
        code: finding.code.clone(),
        detail: finding.detail.clone(),
    };
    if let Some(finding) = found("ARCH_X86_64") {
        return Some(as_skip(finding));
    }
    match candidate.route {
        Route::Prebuilt => match wheel::select(
            host.os.unwrap_or(Version::OLDEST_MACOS),
            host.arch.as_deref().unwrap_or("arm64"),
        ) {
            Ok(_) => None,
            Err(_) => Some(Skip {
                code: "DYLIB_TARGET_TOO_NEW".into(),
                detail: format!(
                    "no prebuilt MLX for macOS {}",
                    host.os.map_or_else(|| "unknown".into(), |os| os.to_string())
                ),
            }),
        },
        Route::Source | Route::SourceJit => {
            let metal = candidate.features.is_gpu().then(|| found("TOOLCHAIN")).flatten();
            let other = || {
                ["CMAKE_MISSING", "CMAKE_TOO_OLD", "SDK_TOO_OLD"]
                    .into_iter()
                    .find_map(found)
            };
            let target = || found("DEPLOY_TARGET_TOO_OLD").filter(|_| candidate.target == "as-is");
            let network = || {
                offline.then(|| Skip {
                    code: "FETCH_OFFLINE".into(),
                    detail: "--offline, and a source build clones MLX".into(),
                })
            };
            metal.or_else(other).or_else(target).map(as_skip).or_else(network)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::{Finding, Host};

    fn mac(full: bool) -> Scope {
        Scope {
            full,
            is_mac: true,
            macos: Some(Version(26, 2, 0)),
            ..Scope::default()
        }
    }

    fn ids(scope: &Scope) -> Vec<String> {
        candidates(scope).iter().map(Candidate::to_string).collect()
    }

    #[test]
    fn default_is_control_then_prebuilt_then_source() {
        assert_eq!(
            ids(&mac(false)),
            [
                "0.33.0/prebuilt/accelerate/dt14.0",
                "0.33.0/prebuilt/metal/dt14.0",
                "0.33.0/source/metal+accelerate/dt14.0"
            ]
        );
    }

    #[test]
    fn linux_runs_what_it_has() {
        assert_eq!(ids(&Scope::default()), ["0.33.0/prebuilt/cpu/linux"]);
        assert_eq!(
            ids(&Scope {
                has_cuda: true,
                ..Scope::default()
            })[1],
            "0.33.0/prebuilt/cuda/linux"
        );
    }

    #[test]
    fn full_has_every_generation_and_target_once() {
        let all = ids(&mac(true));
        for id in [
            "0.25.3/source/metal+accelerate/dt14.0",
            "0.32.0/source-jit/metal+accelerate/as-is",
            "0.33.0/source/accelerate/dt26.2",
        ] {
            assert!(all.iter().any(|one| one == id), "{id} in {all:?}");
        }
        let mut once = all.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), all.len());
    }

    #[test]
    fn err_unknown_candidate_names_the_nearest() {
        let error = choose(candidates(&mac(false)), &["0.33.0/prebuilt/metal/dt15.0".into()]).unwrap_err();
        assert!(
            error.to_string().contains("nearest: 0.33.0/prebuilt/metal/dt14.0"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_compiler_skips_source_and_not_prebuilt() {
        let finding = Finding {
            code: "TOOLCHAIN_COMPONENT_MISSING".into(),
            detail: "x".into(),
            remedy: String::new(),
        };
        let host = Host {
            os: Some(Version(15, 6, 1)),
            arch: Some("arm64".into()),
            ..Host::default()
        };
        let preflight = Preflight {
            host,
            findings: vec![finding],
        };
        let codes: Vec<Option<String>> = candidates(&mac(false))
            .iter()
            .map(|one| skip(one, &preflight, false).map(|skip| skip.code))
            .collect();
        assert_eq!(codes, [None, None, Some("TOOLCHAIN_COMPONENT_MISSING".into())]);
    }

    #[test]
    fn rosetta_skips_everything() {
        let finding = Finding {
            code: "ARCH_X86_64".into(),
            detail: "x".into(),
            remedy: String::new(),
        };
        let preflight = Preflight {
            host: Host::default(),
            findings: vec![finding],
        };
        assert!(
            candidates(&mac(false))
                .iter()
                .all(|one| skip(one, &preflight, false).is_some())
        );
    }
}
