//! What the environment says about the hub, in the variables that Hugging Face's own tools read.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::{Error, Result};

/// Where the hub is, who we are to it, and where its files are kept.
#[derive(Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// Address of the hub without a slash at the end; `None` for the public one. `HF_ENDPOINT`.
    pub endpoint: Option<String>,
    /// `HF_TOKEN`, or the content of the token file (`HF_TOKEN_PATH`, else `token` in the hub's home).
    pub token: Option<String>,
    /// Use what is in the cache and no network. `HF_HUB_OFFLINE`.
    pub offline: bool,
    /// The cache of repositories: `HF_HUB_CACHE`, else `hub` in the home, which is `HF_HOME`, else `huggingface` in the
    /// user's cache directory.
    pub cache: PathBuf,
}

impl HubSettings {
    /// Reads the environment and the token file.
    ///
    /// # Errors
    /// [`Error::HubVariable`] for an endpoint that is no address, or when nothing says where the user's files live.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var_os(name))
    }

    /// As [`from_env`](Self::from_env), with the variables that `var` knows.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub(crate) fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let set = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &str| set(name).map(|value| value.to_string_lossy().trim().to_owned());
        let path = |name: &str| set(name).map(PathBuf::from);
        let user_cache = || path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
        let home = path("HF_HOME").or_else(|| user_cache().map(|cache| cache.join("huggingface")));
        let home = home.ok_or(Error::HubVariable {
            variable: "HF_HOME",
            found: String::new(),
            expected: "a directory (HOME is not set either)",
        })?;
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        Ok(Self {
            endpoint: text("HF_ENDPOINT").map(endpoint).transpose()?,
            token: text("HF_TOKEN")
                .or_else(|| std::fs::read_to_string(token_file).ok().map(|t| t.trim().to_owned()))
                .filter(|token| !token.is_empty()),
            offline: text("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
        })
    }
}

/// Never shows the token.
impl std::fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .field("cache", &self.cache)
            .finish()
    }
}

fn endpoint(value: String) -> Result<String> {
    if !(value.starts_with("http://") || value.starts_with("https://")) {
        let expected = "an address that begins with http:// or https://";
        return Err(Error::HubVariable {
            variable: "HF_ENDPOINT",
            found: value,
            expected,
        });
    }
    Ok(value.trim_end_matches('/').to_owned())
}

/// As Hugging Face's Python library reads its switches.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(vars: &[(&str, &str)]) -> Result<HubSettings> {
        let find = |name: &str| {
            vars.iter()
                .find(|(n, _)| *n == name)
                .map(|(_, value)| OsString::from(value))
        };
        HubSettings::from_vars(find)
    }

    #[test]
    fn places_follow_the_variables() {
        let check =
            |vars: &[(&str, &str)], expect: &str| assert_eq!(settings(vars).unwrap().cache, PathBuf::from(expect));
        check(&[("HOME", "/h")], "/h/.cache/huggingface/hub");
        check(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub");
        check(&[("HOME", "/h"), ("HF_HOME", "/f")], "/f/hub");
        check(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")], "/c");
    }

    #[test]
    fn token_comes_from_the_variable_before_the_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "from_file\n").unwrap();
        let home = ("HF_HOME", dir.path().to_str().unwrap());
        assert_eq!(settings(&[home]).unwrap().token.as_deref(), Some("from_file"));
        assert_eq!(
            settings(&[home, ("HF_TOKEN", " mine ")]).unwrap().token.as_deref(),
            Some("mine")
        );
        assert_eq!(settings(&[home, ("HF_TOKEN_PATH", "/none")]).unwrap().token, None);
    }

    #[test]
    fn switches_are_read_as_words() {
        for (value, expect) in [("1", true), ("YES", true), ("0", false), ("", false)] {
            assert_eq!(
                settings(&[("HOME", "/h"), ("HF_HUB_OFFLINE", value)]).unwrap().offline,
                expect,
                "{value:?}"
            );
        }
    }

    #[test]
    fn err_endpoint_without_a_scheme() {
        let error = settings(&[("HOME", "/h"), ("HF_ENDPOINT", "localhost:80")]).unwrap_err();
        assert!(
            matches!(
                error,
                Error::HubVariable {
                    variable: "HF_ENDPOINT",
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn token_is_not_shown() {
        let shown = format!("{:?}", settings(&[("HOME", "/h"), ("HF_TOKEN", "secret")]).unwrap());
        assert!(!shown.contains("secret"), "{shown}");
    }
}
