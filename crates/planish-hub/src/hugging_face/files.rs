//! Which files of a repository make up the model.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value as Json;

use super::RepoId;
use crate::error::io_at;
use crate::{Error, Result};

/// The first file that is looked at.
pub(super) const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Everything but weights, and all of it small.
const SMALL: [&str; 14] = [
    CONFIG,
    TOKENIZER,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
];

/// The names of a repository's files, known to include what is needed.
#[derive(Debug)]
pub(super) struct Listing {
    names: BTreeSet<String>,
}

impl Listing {
    pub(super) fn new(repo: &RepoId, names: Vec<String>) -> Result<Self> {
        let listing = Self {
            names: names.into_iter().collect(),
        };
        match listing.problem() {
            Some(problem) => Err(Error::HubUnusable {
                repo: repo.to_string(),
                problem,
            }),
            None => Ok(listing),
        }
    }

    /// What to fetch before the weights, the configuration first.
    pub(super) fn small_files(&self) -> impl Iterator<Item = &str> {
        let index = (!self.has(WEIGHTS)).then_some(INDEX);
        SMALL.into_iter().chain(index).filter(|name| self.has(name))
    }

    /// The safetensors files: one, or those that the index names.
    pub(super) fn weight_files(&self, repo: &RepoId, snapshot: &Path) -> Result<Vec<String>> {
        if self.has(WEIGHTS) {
            return Ok(vec![WEIGHTS.to_owned()]);
        }
        let path = snapshot.join(INDEX);
        let text = std::fs::read_to_string(&path).map_err(io_at(&path))?;
        let shards = shards(&text).map_err(|problem| Error::HubUnusable {
            repo: repo.to_string(),
            problem: format!("{INDEX}: {problem}"),
        })?;
        // Names from a file of strangers: only a plain name that the list of files has too.
        match shards
            .iter()
            .find(|shard| shard.contains(['/', '\\']) || !self.has(shard))
        {
            Some(absent) => Err(Error::HubUnusable {
                repo: repo.to_string(),
                problem: format!("{INDEX} names {absent:?}, which the repository does not have"),
            }),
            None => Ok(shards.into_iter().collect()),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    fn problem(&self) -> Option<String> {
        if !self.has(CONFIG) {
            let gguf = self.names.iter().find(|name| name.ends_with(".gguf"));
            let hint = gguf.map(|name| format!("; it has {name}: download that and run planish import"));
            return Some(format!("there is no {CONFIG}{}", hint.unwrap_or_default()));
        }
        if !self.has(WEIGHTS) && !self.has(INDEX) {
            let pickles = self
                .names
                .iter()
                .any(|name| name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth"));
            let found = if pickles {
                "only pickles, which planish never reads because they can run code"
            } else {
                "none"
            };
            return Some(format!(
                "no {WEIGHTS} and no {INDEX} ({found}): choose a repository or revision with safetensors"
            ));
        }
        if !self.has(TOKENIZER) {
            return Some(format!(
                "there is no {TOKENIZER}, the only form of tokenizer that planish reads: choose a repository or revision that has it"
            ));
        }
        None
    }
}

/// The distinct file names in an index.
fn shards(text: &str) -> Result<BTreeSet<String>, String> {
    let index: Json = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let map = index
        .get("weight_map")
        .and_then(Json::as_object)
        .ok_or("there is no object `weight_map`")?;
    let name = |(tensor, file): (&String, &Json)| {
        file.as_str()
            .map(str::to_owned)
            .ok_or_else(|| format!("the file of {tensor:?} is no text"))
    };
    map.iter().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(names: &[&str]) -> Result<Listing> {
        Listing::new(
            &"a/b".parse().unwrap(),
            names.iter().map(|name| (*name).to_owned()).collect(),
        )
    }

    #[test]
    fn pickles_and_strangers_are_not_fetched() {
        let names = [
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "pytorch_model.bin",
            "train.py",
            "sub/config.json",
        ];
        let listing = listing(&names).unwrap();
        assert_eq!(
            listing.small_files().collect::<Vec<_>>(),
            ["config.json", "tokenizer.json"]
        );
    }

    #[test]
    fn one_file_wins_over_an_index() {
        let names = ["config.json", "tokenizer.json", "model.safetensors", INDEX];
        let listing = listing(&names).unwrap();
        assert!(listing.small_files().all(|name| name != INDEX));
        let files = listing
            .weight_files(&"a/b".parse().unwrap(), Path::new("nowhere"))
            .unwrap();
        assert_eq!(files, [WEIGHTS]);
    }

    #[test]
    fn err_unusable_repositories_say_why() {
        let check = |names: &[&str], expect: &str| {
            let error = listing(names).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        };
        check(&["model.Q4_0.gguf"], "planish import");
        check(&["config.json", "tokenizer.json", "pytorch_model.bin"], "pickles");
        check(&["config.json", "tokenizer.json"], "none");
        check(
            &["config.json", "model.safetensors", "tokenizer.model"],
            "tokenizer.json",
        );
    }

    #[test]
    fn err_index_that_leaves_the_repository() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join(INDEX),
            r#"{"weight_map": {"w": "../../x.safetensors"}}"#,
        )
        .unwrap();
        let listing = listing(&["config.json", "tokenizer.json", INDEX]).unwrap();
        let error = listing.weight_files(&"a/b".parse().unwrap(), dir.path()).unwrap_err();
        assert!(error.to_string().contains("../../x.safetensors"), "{error}");
    }
}
