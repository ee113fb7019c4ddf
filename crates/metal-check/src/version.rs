//! Versions of systems and tools: numbers with dots, compared number by number.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A version such as `15.6.1`; absent parts count as zero.
///
/// ```
/// use metal_check::version::Version;
/// let running: Version = "26.1".parse().unwrap();
/// assert!(running < "26.2".parse().unwrap());
/// assert_eq!(running, "26.1.0".parse().unwrap());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// The first version of macOS that anything here supports.
    pub const OLDEST_MACOS: Version = Version(14, 0, 0);

    /// `major.minor`, the part by which systems are told apart in history.
    pub(crate) fn minor(self) -> String {
        format!("{}.{}", self.0, self.1)
    }
}

impl FromStr for Version {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::Version(text.to_owned());
        let mut parts = [0; 3];
        for (index, part) in text.trim().split('.').enumerate() {
            let part = part.parse().map_err(|_| bad())?;
            match parts.get_mut(index) {
                Some(place) => *place = part,
                None => break,
            }
        }
        Ok(Version(parts[0], parts[1], parts[2]))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.2 {
            0 => write!(f, "{}.{}", self.0, self.1),
            patch => write!(f, "{}.{}.{patch}", self.0, self.1),
        }
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.to_string()
    }
}

impl TryFrom<String> for Version {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_refused() {
        for text in ["", "x", "14.", "14.x", "-1"] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }
}
