//! The deployment target: the oldest macOS a build promises to run on, which four parties choose independently.

use crate::preflight::Host;
use crate::version::Version;
use serde::{Deserialize, Serialize};

/// Where each part of a source build takes its target from when nobody says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentTarget {
    /// `MACOSX_DEPLOYMENT_TARGET`: everybody follows it where it is set.
    pub env: Option<String>,
    /// `[env]` of `.cargo/config.toml`.
    pub cargo_config: Option<String>,
    /// What rustc takes (11.0).
    pub rustc: Option<String>,
    /// What `cc` takes: the SDK's version.
    pub sdk: Option<String>,
    /// What MLX's CMake takes: the running system.
    pub host: Option<String>,
}

impl DeploymentTarget {
    /// From the answers of the machine; `cargo_config` is the text of `.cargo/config.toml`, if there is one.
    pub fn of(host: &Host, cargo_config: Option<&str>) -> Self {
        Self {
            env: host.environment.get("MACOSX_DEPLOYMENT_TARGET").cloned(),
            cargo_config: cargo_config.and_then(in_config),
            rustc: host.rustc_deployment_target.clone(),
            sdk: host.sdk.clone(),
            host: host.os.map(Version::minor),
        }
    }

    /// The one value that all parts follow, if there is one.
    pub fn explicit(&self) -> Option<&str> {
        self.env.as_deref().or(self.cargo_config.as_deref())
    }

    /// A sentence with the values where the parts of a build would disagree.
    pub(crate) fn disagreement(&self) -> Option<String> {
        if self.explicit().is_some() {
            return None;
        }
        let parts = [
            ("rustc", &self.rustc),
            ("cc (SDK)", &self.sdk),
            ("MLX's CMake (host)", &self.host),
        ];
        let known: Vec<_> = parts
            .iter()
            .filter_map(|(who, value)| Some((*who, value.as_deref()?)))
            .collect();
        let differ = known
            .iter()
            .any(|(_, value)| value.parse::<Version>().ok() != known[0].1.parse::<Version>().ok());
        let list = || {
            known
                .iter()
                .map(|(who, value)| format!("{who} {value}"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        differ.then(|| {
            format!(
                "no MACOSX_DEPLOYMENT_TARGET is set, so one build uses several: {}; set it to 14.0",
                list()
            )
        })
    }
}

fn in_config(text: &str) -> Option<String> {
    let parsed: toml::Table = text.parse().ok()?;
    let value = parsed.get("env")?.get("MACOSX_DEPLOYMENT_TARGET")?;
    value
        .as_str()
        .or_else(|| value.get("value")?.as_str())
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_tools_disagree_unless_told() {
        let mut target = DeploymentTarget {
            rustc: Some("11.0".into()),
            sdk: Some("26.1".into()),
            host: Some("15.6".into()),
            ..Default::default()
        };
        assert!(
            target
                .disagreement()
                .is_some_and(|text| text.contains("11.0") && text.contains("26.1") && text.contains("15.6"))
        );
        target.env = Some("14.0".into());
        assert_eq!(target.disagreement(), None);
    }

    #[test]
    fn cargo_config_in_both_forms() {
        for text in [
            "[env]\nMACOSX_DEPLOYMENT_TARGET = \"14.0\"",
            "[env]\nMACOSX_DEPLOYMENT_TARGET = { value = \"14.0\", force = true }",
        ] {
            assert_eq!(
                DeploymentTarget::of(&Host::default(), Some(text)).explicit(),
                Some("14.0")
            );
        }
    }
}
