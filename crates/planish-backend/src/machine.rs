//! What the system says of this machine without anybody touching a device.

use std::fs;
use std::path::Path;

use metal_check::version::Version;

/// The GPUs of a machine, as far as the system names them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Machine {
    /// Version of macOS, there.
    pub macos: Option<Version>,
    /// Build of macOS or release of the kernel.
    pub system: String,
    /// Name of the processor.
    pub processor: Option<String>,
    /// Whether an NVIDIA device is visible.
    pub has_nvidia: bool,
    /// Names and identities of NVIDIA GPUs, where the driver lists them.
    pub nvidia: Vec<String>,
    /// Version of NVIDIA's kernel driver.
    pub nvidia_driver: Option<String>,
}

impl Machine {
    /// Asks the system. Reads a few small files; on macOS `sysctl` as well.
    pub fn look() -> Self {
        let (macos, build) = macos_version().unzip();
        let kernel = || fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let driver = fs::read_to_string("/proc/driver/nvidia/version").ok();
        Self {
            macos,
            system: build.unwrap_or_else(kernel).trim().to_owned(),
            processor: processor(),
            has_nvidia: driver.is_some() || NVIDIA_DEVICES.iter().any(|path| Path::new(path).exists()),
            nvidia: nvidia_gpus(),
            nvidia_driver: driver.as_deref().and_then(driver_version),
        }
    }
}

/// Device files of NVIDIA's driver; the last one is how Windows passes a GPU on to its Linux.
const NVIDIA_DEVICES: [&str; 3] = ["/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"];

fn macos_version() -> Option<(Version, String)> {
    let list = fs::read_to_string("/System/Library/CoreServices/SystemVersion.plist").ok()?;
    Some((
        plist_value(&list, "ProductVersion")?.parse().ok()?,
        plist_value(&list, "ProductBuildVersion")?.to_owned(),
    ))
}

/// The text after a key of a property list of the XML kind.
fn plist_value<'a>(list: &'a str, key: &str) -> Option<&'a str> {
    let (_, after) = list.split_once(&format!("<key>{key}</key>"))?;
    let (_, value) = after.split_once("<string>")?;
    value.split_once("</string>").map(|(value, _)| value)
}

fn processor() -> Option<String> {
    if cfg!(target_os = "macos") {
        let output = std::process::Command::new("sysctl")
            .args(["-n", "machdep.cpu.brand_string"])
            .output()
            .ok()?;
        return Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()).filter(|name| !name.is_empty());
    }
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.trim().to_owned())
}

fn nvidia_gpus() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/proc/driver/nvidia/gpus") else {
        return Vec::new();
    };
    let mut gpus: Vec<String> = entries
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("information")).ok())
        .map(|text| gpu_identity(&text))
        .collect();
    gpus.sort();
    gpus
}

fn gpu_identity(information: &str) -> String {
    let value = |key: &str| {
        let line = information.lines().find(|line| line.starts_with(key))?;
        line.split_once(':').map(|(_, value)| value.trim())
    };
    [value("Model"), value("GPU UUID")]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(" ")
}

/// The first number with a dot after the words for the kernel module.
fn driver_version(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.contains("Kernel Module"))?;
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn driver_version_of_both_kernel_modules() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.2";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)";
        assert_eq!(driver_version(closed).as_deref(), Some("550.54.15"));
        assert_eq!(driver_version(open).as_deref(), Some("580.65.06"));
        assert_eq!(driver_version("nothing"), None);
    }

    #[test]
    fn gpu_identity_is_name_and_number() {
        let text = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 16\nGPU UUID: \t GPU-6d1b\n";
        assert_eq!(gpu_identity(text), "NVIDIA H100 80GB HBM3 GPU-6d1b");
    }

    #[test]
    fn macos_version_from_its_property_list() {
        let list = "<dict>\n<key>ProductBuildVersion</key>\n<string>24G90</string>\n<key>ProductVersion</key>\n<string>15.6.1</string>";
        assert_eq!(plist_value(list, "ProductVersion"), Some("15.6.1"));
        assert_eq!(plist_value(list, "ProductBuildVersion"), Some("24G90"));
        assert_eq!(plist_value(list, "Other"), None);
    }
}
