//! What is being built for what.

use std::env;
use std::process::Command;

use super::Result;

/// Oldest macOS that the result runs on, unless `MACOSX_DEPLOYMENT_TARGET` says another.
const MACOS_MINIMUM: &str = "14.0";

pub struct Target {
    pub triple: String,
    pub os: String,
    pub arch: String,
    /// Whether the machine that builds is of another kind than the one that runs.
    pub is_cross: bool,
}

impl Target {
    pub fn from_cargo() -> Result<Self> {
        let target = Self {
            triple: env::var("TARGET")?,
            os: env::var("CARGO_CFG_TARGET_OS")?,
            arch: env::var("CARGO_CFG_TARGET_ARCH")?,
            is_cross: env::var("TARGET")? != env::var("HOST")?,
        };
        println!("cargo::rerun-if-env-changed=MACOSX_DEPLOYMENT_TARGET");
        if target.is_macos() && env::var_os("MACOSX_DEPLOYMENT_TARGET").is_none() {
            // SAFETY: a build script's main thread, before any other is started. `cc` and the linker read the variable;
            // without it they would take the SDK's own version, and the program would refuse to start on older systems.
            unsafe { env::set_var("MACOSX_DEPLOYMENT_TARGET", MACOS_MINIMUM) };
        }
        Ok(target)
    }

    pub fn is_macos(&self) -> bool {
        self.os == "macos"
    }

    /// The macOS whose wheel to take: the running one, or, when building for another machine, the deployment target.
    pub fn macos_version(&self) -> (u32, u32) {
        if !self.is_macos() {
            return (0, 0);
        }
        let running = || {
            let output = Command::new("sw_vers").arg("-productVersion").output().ok()?;
            String::from_utf8(output.stdout).ok()
        };
        let wanted = || env::var("MACOSX_DEPLOYMENT_TARGET").ok();
        let text = if self.is_cross {
            wanted()
        } else {
            running().or_else(wanted)
        };
        parse_version(&text.unwrap_or_else(|| MACOS_MINIMUM.to_owned()))
    }
}

fn parse_version(text: &str) -> (u32, u32) {
    let mut parts = text.trim().split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}
