//! What is on this machine: the questions asked in the first two seconds, and what their answers already decide.

use crate::catalogue;
use crate::classify;
use crate::runner::{Outcome, Runner, Spec};
use crate::version::Version;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Limit of each question in milliseconds.
const TIMEOUT_MS: u64 = 10_000;

/// Environment variables that change a build; no others are recorded.
pub const ENVIRONMENT: [&str; 12] = [
    "MACOSX_DEPLOYMENT_TARGET",
    "SDKROOT",
    "DEVELOPER_DIR",
    "CC",
    "CXX",
    "CPATH",
    "LIBRARY_PATH",
    "RUSTFLAGS",
    "TOOLCHAINS",
    "CMAKE_OSX_DEPLOYMENT_TARGET",
    "CMAKE_PREFIX_PATH",
    "FETCHCONTENT_FULLY_DISCONNECTED",
];

/// The questions, label first. An absent program is an answer too.
const QUESTIONS: [(&str, &[&str]); 23] = [
    ("sw_vers", &["sw_vers"]),
    ("uname -s", &["uname", "-s"]),
    ("uname -m", &["uname", "-m"]),
    ("sysctl arm64", &["sysctl", "-n", "hw.optional.arm64"]),
    ("sysctl proc_translated", &["sysctl", "-n", "sysctl.proc_translated"]),
    ("sysctl model", &["sysctl", "-n", "hw.model"]),
    ("sysctl memory", &["sysctl", "-n", "hw.memsize"]),
    ("sysctl chip", &["sysctl", "-n", "machdep.cpu.brand_string"]),
    ("xcode-select -p", &["xcode-select", "-p"]),
    ("xcodebuild -version", &["xcodebuild", "-version"]),
    ("xcrun sdk", &["xcrun", "--sdk", "macosx", "--show-sdk-version"]),
    ("xcrun -f metal", &["xcrun", "--sdk", "macosx", "-f", "metal"]),
    (
        "xcrun metal --version",
        &["xcrun", "--sdk", "macosx", "metal", "--version"],
    ),
    ("metal component", &["xcodebuild", "-showComponent", "MetalToolchain"]),
    ("clang --version", &["clang", "--version"]),
    (
        "clt version",
        &["pkgutil", "--pkg-info=com.apple.pkg.CLTools_Executables"],
    ),
    ("which cmake", &["which", "cmake"]),
    ("cmake --version", &["cmake", "--version"]),
    ("cmake arch", &["sh", "-c", "file -L \"$(command -v cmake)\""]),
    ("rustc -vV", &["rustc", "-vV"]),
    ("rustc deployment target", &["rustc", "--print", "deployment-target"]),
    ("free disk", &["df", "-k", "."]),
    ("displays", &["system_profiler", "SPDisplaysDataType", "-json"]),
];

/// What was found. Everything that was not answered is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are those of the tools
pub struct Host {
    pub kernel: Option<String>,
    pub os: Option<Version>,
    pub os_build: Option<String>,
    pub arch: Option<String>,
    /// The process runs under Rosetta.
    pub translated: Option<bool>,
    pub model: Option<String>,
    pub chip: Option<String>,
    pub memory_bytes: Option<u64>,
    pub gpus: Vec<String>,
    pub developer_dir: Option<String>,
    pub xcode: Option<String>,
    pub xcode_build: Option<String>,
    pub sdk: Option<String>,
    /// Version of the Metal compiler, if it answered.
    pub metal: Option<String>,
    pub clt: Option<String>,
    pub clang: Option<String>,
    pub cmake: Option<CMake>,
    pub rustc: Option<String>,
    pub rustc_host: Option<String>,
    pub rustc_deployment_target: Option<String>,
    pub free_disk_bytes: Option<u64>,
    pub environment: BTreeMap<String, String>,
}

/// The CMake that a source build would run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CMake {
    pub version: Option<String>,
    pub arch: Option<String>,
}

/// Something that the answers already decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// A code of the catalogue.
    pub code: String,
    /// What shows it.
    pub detail: String,
    /// What to do, from the catalogue.
    pub remedy: String,
}

/// The answers and what they decide.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preflight {
    /// What is there.
    pub host: Host,
    /// What is wrong for one route or another.
    pub findings: Vec<Finding>,
}

/// Asks all questions through the runner. `environment` is the caller's; only [`ENVIRONMENT`] and names that begin with
/// `CMAKE` or `FETCHCONTENT` are kept.
pub fn ask(runner: &mut dyn Runner, environment: &BTreeMap<String, String>) -> Preflight {
    let answers: BTreeMap<&str, Outcome> = QUESTIONS
        .iter()
        .map(|(label, argv)| {
            let argv = argv.iter().map(|&word| word.to_owned()).collect();
            (
                *label,
                runner.run(&Spec {
                    label: (*label).to_owned(),
                    argv,
                    timeout_ms: TIMEOUT_MS,
                    ..Spec::default()
                }),
            )
        })
        .collect();
    let host = read(&answers, environment);
    let findings = decide(&host, &answers);
    Preflight { host, findings }
}

fn read(answers: &BTreeMap<&str, Outcome>, environment: &BTreeMap<String, String>) -> Host {
    let answer = |label: &str| answers.get(label).and_then(Outcome::answer).map(str::to_owned);
    let field = |label: &str, key: &str| {
        answers
            .get(label)
            .and_then(Outcome::answer)
            .and_then(|text| value_after(text, key))
    };
    let word =
        |label: &str, key: &str| field(label, key).and_then(|text| text.split_whitespace().next().map(str::to_owned));
    let kept =
        |name: &str| ENVIRONMENT.contains(&name) || name.starts_with("CMAKE") || name.starts_with("FETCHCONTENT");
    Host {
        kernel: answer("uname -s"),
        os: field("sw_vers", "ProductVersion:").and_then(|text| text.parse().ok()),
        os_build: field("sw_vers", "BuildVersion:"),
        // `uname` says x86_64 inside Rosetta; the processor is what matters, and `translated` tells the rest.
        arch: answer("sysctl arm64")
            .filter(|text| text == "1")
            .map(|_| "arm64".to_owned())
            .or_else(|| answer("uname -m")),
        translated: answer("sysctl proc_translated").map(|text| text == "1"),
        model: answer("sysctl model"),
        chip: answer("sysctl chip"),
        memory_bytes: answer("sysctl memory").and_then(|text| text.parse().ok()),
        gpus: answer("displays").map(|text| gpu_names(&text)).unwrap_or_default(),
        developer_dir: answer("xcode-select -p"),
        xcode: word("xcodebuild -version", "Xcode "),
        xcode_build: word("xcodebuild -version", "Build version "),
        sdk: answer("xcrun sdk"),
        metal: answer("xcrun metal --version").and_then(|text| text.lines().next().map(str::to_owned)),
        clt: field("clt version", "version:"),
        clang: answer("clang --version").and_then(|text| text.lines().next().map(str::to_owned)),
        cmake: answer("which cmake").map(|_| CMake {
            version: word("cmake --version", "cmake version "),
            arch: answer("cmake arch").and_then(|text| architecture(&text)),
        }),
        rustc: word("rustc -vV", "rustc "),
        rustc_host: field("rustc -vV", "host:"),
        rustc_deployment_target: answer("rustc deployment target")
            .map(|text| text.rsplit('=').next().unwrap_or_default().to_owned()),
        free_disk_bytes: answer("free disk")
            .and_then(|text| free_kilobytes(&text))
            .map(|kilobytes| kilobytes * 1024),
        environment: environment
            .iter()
            .filter(|(name, _)| kept(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
    }
}

impl Host {
    /// macOS, on whatever processor.
    pub fn is_mac(&self) -> bool {
        self.kernel.as_deref() == Some("Darwin") || self.os.is_some()
    }

    /// A Mac on which Metal can be used at all: arm64, macOS 14 or later, not under Rosetta.
    pub fn supports_metal(&self) -> bool {
        self.is_mac()
            && self.is_arm64()
            && self.os.is_none_or(|os| os >= Version::OLDEST_MACOS)
            && self.translated != Some(true)
    }

    /// The process sees an arm64 machine.
    pub fn is_arm64(&self) -> bool {
        matches!(self.arch.as_deref(), Some("arm64" | "aarch64"))
    }

    /// The part of the host by which history tells machines apart: macOS major.minor, Xcode, chip.
    pub fn key(&self) -> (String, String, String) {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".into());
        let os = self.os.map_or_else(|| or_none(&self.kernel), Version::minor);
        (
            os,
            or_none(&self.xcode),
            self.chip
                .clone()
                .or_else(|| self.arch.clone())
                .unwrap_or_else(|| "none".into()),
        )
    }
}

/// Rows of the catalogue that the answers decide, before any build.
fn decide(host: &Host, answers: &BTreeMap<&str, Outcome>) -> Vec<Finding> {
    if !host.is_mac() {
        return Vec::new();
    }
    let mut findings = Vec::new();
    if host.translated == Some(true) || !host.is_arm64() {
        findings.push(finding(
            "ARCH_X86_64",
            format!(
                "uname says {}, proc_translated {:?}",
                host.arch.as_deref().unwrap_or("nothing"),
                host.translated
            ),
        ));
    } else if host
        .rustc_host
        .as_deref()
        .is_some_and(|triple| triple == "x86_64-apple-darwin")
    {
        findings.push(finding(
            "ARCH_X86_64",
            format!("rustc builds for {}", host.rustc_host.as_deref().unwrap_or_default()),
        ));
    } else if host
        .cmake
        .as_ref()
        .is_some_and(|cmake| cmake.arch.as_deref() == Some("x86_64"))
    {
        findings.push(finding("ARCH_X86_64", "cmake is an x86_64 program".into()));
    }
    if host.metal.is_none() {
        findings.extend(metal_finding(answers));
    }
    if host.cmake.is_none() {
        findings.push(finding("CMAKE_MISSING", "no cmake in PATH".into()));
    } else if let Some(version) = host
        .cmake
        .as_ref()
        .and_then(|cmake| cmake.version.as_deref()?.parse::<Version>().ok())
        .filter(|version| *version < Version(3, 25, 0))
    {
        findings.push(finding("CMAKE_TOO_OLD", format!("cmake {version}")));
    }
    if let Some(sdk) = host
        .sdk
        .as_deref()
        .and_then(|sdk| sdk.parse::<Version>().ok())
        .filter(|sdk| *sdk < Version::OLDEST_MACOS)
    {
        findings.push(finding("SDK_TOO_OLD", format!("SDK {sdk}")));
    }
    if let Some(target) = host
        .environment
        .get("MACOSX_DEPLOYMENT_TARGET")
        .and_then(|text| text.parse::<Version>().ok())
        .filter(|target| *target < Version::OLDEST_MACOS)
    {
        findings.push(finding(
            "DEPLOY_TARGET_TOO_OLD",
            format!("MACOSX_DEPLOYMENT_TARGET is {target}"),
        ));
    }
    if host.gpus.iter().any(|name| name.contains("Paravirtual")) {
        findings.push(finding("DEVICE_PARAVIRT", host.gpus.join(", ")));
    }
    findings
}

/// Which of the toolchain's rows the answers of `xcrun` and `xcodebuild` fit.
fn metal_finding(answers: &BTreeMap<&str, Outcome>) -> Option<Finding> {
    let said = |label: &str| answers.get(label).map(Outcome::log).unwrap_or_default();
    let log = [
        "xcrun metal --version",
        "xcrun -f metal",
        "metal component",
        "xcodebuild -version",
    ]
    .map(said)
    .join("\n");
    let answer = classify::classify(log.as_bytes());
    let detail = answer
        .evidence
        .first()
        .map_or_else(|| "xcrun finds no metal".to_owned(), |line| line.text.clone());
    let code = if answer.code.starts_with("TOOLCHAIN_") {
        answer.code.as_str()
    } else {
        "TOOLCHAIN_METAL_MISSING"
    };
    Some(finding(code, detail))
}

fn finding(code: &str, detail: String) -> Finding {
    Finding {
        code: code.to_owned(),
        detail,
        remedy: catalogue::entry(code)
            .map(|entry| entry.remedy.clone())
            .unwrap_or_default(),
    }
}

fn value_after(text: &str, key: &str) -> Option<String> {
    text.lines()
        .find_map(|line| line.trim().strip_prefix(key))
        .map(|value| value.trim().to_owned())
}

fn architecture(file_says: &str) -> Option<String> {
    ["arm64", "x86_64", "aarch64", "x86-64"]
        .into_iter()
        .find(|name| file_says.contains(name))
        .map(str::to_owned)
}

/// Column 4 of the last line of `df -k`.
fn free_kilobytes(text: &str) -> Option<u64> {
    text.lines().last()?.split_whitespace().nth(3)?.parse().ok()
}

fn gpu_names(json: &str) -> Vec<String> {
    let parsed: serde_json::Value = serde_json::from_str(json).unwrap_or_default();
    let cards = parsed["SPDisplaysDataType"].as_array().cloned().unwrap_or_default();
    cards
        .iter()
        .filter_map(|card| card["sppci_model"].as_str().or_else(|| card["_name"].as_str()))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers by label; what is not named does not exist on the machine.
    struct Machine(BTreeMap<&'static str, Outcome>);

    impl Runner for Machine {
        fn run(&mut self, spec: &Spec) -> Outcome {
            let absent = Outcome {
                not_started: Some("No such file or directory".into()),
                ..Outcome::default()
            };
            self.0.get(spec.label.as_str()).cloned().unwrap_or(absent)
        }
    }

    fn says(text: &str) -> Outcome {
        Outcome {
            exit: Some(0),
            stdout: text.into(),
            ..Outcome::default()
        }
    }

    fn fails(status: i32, text: &str) -> Outcome {
        Outcome {
            exit: Some(status),
            stderr: text.into(),
            ..Outcome::default()
        }
    }

    fn mac(os: &str) -> BTreeMap<&'static str, Outcome> {
        let versions = format!("ProductName:\t\tmacOS\nProductVersion:\t\t{os}\nBuildVersion:\t\t24G90\n");
        BTreeMap::from([
            ("sw_vers", says(&versions)),
            ("uname -s", says("Darwin\n")),
            ("uname -m", says("arm64\n")),
            ("sysctl arm64", says("1\n")),
            ("sysctl proc_translated", says("0\n")),
            ("sysctl chip", says("Apple M2 Pro\n")),
            ("sysctl memory", says("34359738368\n")),
            ("which cmake", says("/opt/homebrew/bin/cmake\n")),
            ("cmake --version", says("cmake version 4.1.2\n\nmore\n")),
            ("cmake arch", says("cmake: Mach-O 64-bit executable arm64\n")),
            ("rustc -vV", says("rustc 1.95.0 (x 2026)\nhost: aarch64-apple-darwin\n")),
            ("xcodebuild -version", says("Xcode 26.1\nBuild version 17B55\n")),
            (
                "xcrun metal --version",
                says("Apple metal version 32023.850 (metalfe-32023.850)\n"),
            ),
            (
                "displays",
                says(r#"{"SPDisplaysDataType":[{"sppci_model":"Apple M2 Pro"}]}"#),
            ),
            (
                "free disk",
                says("Filesystem 1024-blocks Used Available Capacity\n/dev/disk3 1 2 1000 4% /\n"),
            ),
        ])
    }

    fn codes(machine: BTreeMap<&'static str, Outcome>, environment: &[(&str, &str)]) -> Vec<String> {
        let environment = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        ask(&mut Machine(machine), &environment)
            .findings
            .into_iter()
            .map(|finding| finding.code)
            .collect()
    }

    #[test]
    fn a_good_mac_has_no_findings() {
        let preflight = ask(
            &mut Machine(mac("26.2")),
            &BTreeMap::from([("SECRET".into(), "x".into()), ("CC".into(), "clang".into())]),
        );
        assert_eq!(preflight.findings, []);
        assert_eq!(preflight.host.os, Some(Version(26, 2, 0)));
        assert_eq!(
            (preflight.host.xcode.as_deref(), preflight.host.free_disk_bytes),
            (Some("26.1"), Some(1_024_000))
        );
        assert_eq!(preflight.host.environment.keys().collect::<Vec<_>>(), ["CC"]);
        assert!(preflight.host.supports_metal());
    }

    #[test]
    fn command_line_tools_only() {
        let mut machine = mac("15.6.1");
        machine.insert(
            "xcrun metal --version",
            fails(
                72,
                "xcrun: error: unable to find utility \"metal\", not a developer tool or in PATH\n",
            ),
        );
        machine.insert("xcodebuild -version", fails(1, "xcode-select: error: tool 'xcodebuild' requires Xcode, but active developer directory '/Library/Developer/CommandLineTools' is a command line tools instance\n"));
        assert_eq!(codes(machine, &[]), ["TOOLCHAIN_METAL_MISSING"]);
    }

    #[test]
    fn component_absent_refused_or_unseen() {
        for (component, expected) in [
            (fails(1, "error\n"), "TOOLCHAIN_COMPONENT_MISSING"),
            (
                fails(
                    70,
                    "xcodebuild: error: Failed fetching catalog for assetType (com.apple.MobileAsset.MetalToolchain), serverParameters ({})\n",
                ),
                "TOOLCHAIN_DOWNLOAD_REFUSED",
            ),
            (
                says("Asset Path: /x\nStatus: installed\n"),
                "TOOLCHAIN_COMPONENT_MISSING",
            ),
        ] {
            let mut machine = mac("26.1");
            machine.insert("xcrun metal --version", fails(1, "error: cannot execute tool 'metal' due to missing Metal Toolchain; use: xcodebuild -downloadComponent MetalToolchain\n"));
            machine.insert("metal component", component);
            assert_eq!(codes(machine, &[]), [expected]);
        }
    }

    #[test]
    fn rosetta_old_tools_and_low_target() {
        let mut machine = mac("15.0");
        machine.insert("sysctl proc_translated", says("1\n"));
        machine.insert("cmake --version", says("cmake version 3.22.1\n"));
        assert_eq!(
            codes(machine, &[("MACOSX_DEPLOYMENT_TARGET", "11.0")]),
            ["ARCH_X86_64", "CMAKE_TOO_OLD", "DEPLOY_TARGET_TOO_OLD"]
        );
    }

    #[test]
    fn virtual_machine_and_foreign_rustc() {
        let mut machine = mac("14.5");
        machine.insert(
            "displays",
            says(r#"{"SPDisplaysDataType":[{"_name":"Apple Paravirtual device"}]}"#),
        );
        machine.insert("rustc -vV", says("rustc 1.95.0\nhost: x86_64-apple-darwin\n"));
        assert_eq!(codes(machine, &[]), ["ARCH_X86_64", "DEVICE_PARAVIRT"]);
    }

    #[test]
    fn linux_has_no_findings_and_no_metal() {
        let machine = BTreeMap::from([("uname -s", says("Linux\n")), ("uname -m", says("x86_64\n"))]);
        let preflight = ask(&mut Machine(machine), &BTreeMap::new());
        assert!(preflight.findings.is_empty() && !preflight.host.supports_metal());
    }
}
