//! What can be wrong with a configuration.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure of this crate, with the place and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A configuration file is larger than any real one: probably not a configuration.
    #[error("{}: {bytes} bytes, expected a configuration file of at most {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The largest size accepted.
        limit: u64,
    },
    /// The text is not JSON.
    #[error("{}:{line}:{column}: not valid JSON: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser met.
        message: String,
    },
    /// A key of a model's `config.json` is absent, has the wrong type, or a value out of range.
    #[error("{}: `{key}`: found {found}, expected {expected}", path.display())]
    ModelKey {
        /// The file.
        path: PathBuf,
        /// The key, dotted when nested.
        key: String,
        /// What was there.
        found: String,
        /// What is accepted.
        expected: String,
    },
    /// A key of a model's `config.json` asks for a computation that planish does not have; loading it all the same
    /// would give wrong numbers.
    #[error("{}: `{key}` = {found} is not supported: {reason}", path.display())]
    UnsupportedModel {
        /// The file.
        path: PathBuf,
        /// The key, dotted when nested.
        key: String,
        /// Its value.
        found: String,
        /// What is supported instead.
        reason: String,
    },
    /// No pattern was given.
    #[error("no target modules: name at least one, or `all-linear`")]
    NoTargetModules,
    /// A pattern matches no linear layer of the model.
    #[error(
        "target module `{pattern}` matches no linear layer{}; there are: {available}",
        nearest_is(nearest)
    )]
    UnknownTargetModule {
        /// As given.
        pattern: String,
        /// A name that may have been meant.
        nearest: Option<String>,
        /// The last names of all linear layers.
        available: String,
    },
    /// A pattern matches only in blocks that the choice of blocks leaves out.
    #[error("target module `{pattern}` matches only blocks before {first_block}, which `lora.layers` leaves out")]
    TargetOutsideBlocks {
        /// As given.
        pattern: String,
        /// The first block chosen.
        first_block: usize,
    },
    /// More blocks were asked for than the model has.
    #[error("the last {wanted} blocks were asked for, but the model has {available}; -1 means all")]
    TooManyBlocks {
        /// Blocks asked for.
        wanted: usize,
        /// Blocks there are.
        available: usize,
    },
    /// A number of blocks that means nothing.
    #[error("{count} blocks: expected the number of last blocks, or 0 or -1 for all")]
    BlockCount {
        /// As given.
        count: i64,
    },
    /// Two patterns give one module different values.
    #[error("`{path}` is matched by `{}` and `{}`, which give different values: make one narrower", patterns[0], patterns[1])]
    AmbiguousModule {
        /// The module.
        path: String,
        /// The patterns.
        patterns: [String; 2],
    },
    /// A run configuration is not TOML.
    #[error("{origin}: not valid TOML: {message}")]
    RunSyntax {
        /// Where: file and line, or the option as typed.
        origin: String,
        /// What the parser met.
        message: String,
    },
    /// A run configuration has a key that does not exist.
    #[error("{origin}: unknown key `{key}`{}", nearest_is(nearest))]
    RunUnknownKey {
        /// Where: file and line, or the option as typed.
        origin: String,
        /// As given, dotted.
        key: String,
        /// A key that may have been meant.
        nearest: Option<String>,
    },
    /// A key of a run configuration has a value of the wrong type or out of range.
    #[error("{origin}: `{key}`: found {found}, expected {expected}")]
    RunValue {
        /// Where: file and line, or the option as typed.
        origin: String,
        /// The key, dotted.
        key: String,
        /// As given.
        found: String,
        /// What is accepted.
        expected: String,
    },
    /// Two keys that say the same thing in two ways are both given in one place.
    #[error("{origin}: `{}` and `{}` are both given: give one, the other follows from it", keys[0], keys[1])]
    RunConflict {
        /// Where: file and line, or the option as typed.
        origin: String,
        /// The keys, dotted.
        keys: [&'static str; 2],
    },
}

impl Error {
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read {
            path: path.to_path_buf(),
            source,
        }
    }
}

fn nearest_is(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!("; nearest is `{name}`"))
        .unwrap_or_default()
}
