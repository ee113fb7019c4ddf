//! Which repository, and which state of it.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// A model repository on the hub at a revision: a branch, tag or commit; `main` if none is given.
///
/// ```
/// use planish_hub::hugging_face::RepoId;
/// let repo: RepoId = "Qwen/Qwen3-0.6B@v1.0".parse()?;
/// assert_eq!((repo.name(), repo.revision()), ("Qwen/Qwen3-0.6B", "v1.0"));
/// assert!("../secrets".parse::<RepoId>().is_err());
/// # Ok::<(), planish_hub::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoId {
    name: String,
    revision: String,
}

impl RepoId {
    /// `ORG/NAME`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }
}

impl FromStr for RepoId {
    type Err = Error;

    /// Reads `ORG/NAME` or `ORG/NAME@REVISION`, with or without `hf:` before it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text.strip_prefix("hf:").unwrap_or(text);
        let (name, revision) = bare.split_once('@').unwrap_or((bare, "main"));
        let named = name
            .split_once('/')
            .is_some_and(|(org, name)| is_part(org) && is_part(name));
        // A revision becomes a part of a path and of an address.
        if !named || !revision.split('/').all(is_part) {
            return Err(Error::HubName { found: text.to_owned() });
        }
        Ok(Self {
            name: name.to_owned(),
            revision: revision.to_owned(),
        })
    }
}

/// Letters, digits, `-`, `_` and `.`, not beginning with a dot or dash.
fn is_part(part: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty()
        && part.len() <= 96
        && part.chars().all(plain)
        && !part.starts_with(['.', '-'])
        && !part.contains("..")
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.name)?;
        if self.revision == "main" {
            Ok(())
        } else {
            write!(f, "@{}", self.revision)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_shows_itself() {
        for text in ["hf:a/b", "hf:Org-1/Name_2.3@refs/pr/7", "hf:a/b@0123abc"] {
            assert_eq!(text.parse::<RepoId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn err_names_that_are_no_repository() {
        for text in [
            "", "hf:", "gpt2", "a/b/c", "a/", "/b", "a/../b", "a/b@", "a/b@../x", "a b/c", "a/b@-x", "a/b?x=1",
        ] {
            assert!(matches!(text.parse::<RepoId>(), Err(Error::HubName { .. })), "{text:?}");
        }
    }
}
