use mlx_rs::error::Exception;

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// MLX refused an operation.
    #[error("MLX: {}", .0.what())]
    Mlx(#[from] Exception),

    /// A call into MLX failed.
    #[error(transparent)]
    MlxLayer(#[from] planish_mlx::Error),

    /// Two inputs do not fit together.
    #[error("{what}: expected shape {expected:?}, found {found:?}")]
    ShapeMismatch {
        /// The input that is wrong.
        what: &'static str,
        /// The shape the other inputs ask for.
        expected: Vec<i32>,
        /// The shape it has.
        found: Vec<i32>,
    },

    /// Two lists that run in parallel have different lengths.
    #[error("{what}: expected {expected} values, found {found}")]
    LengthMismatch {
        /// The list that is wrong.
        what: &'static str,
        /// Length of the list it is paired with.
        expected: usize,
        /// Its own length.
        found: usize,
    },

    /// A number is outside the range in which its formula is defined, or not finite.
    #[error("{}{name}: {value} is outside {range}", row.map(|r| format!("row {r}: ")).unwrap_or_default())]
    OutOfRange {
        /// The field or setting.
        name: &'static str,
        /// The rejected number.
        value: f64,
        /// The accepted range, in words.
        range: &'static str,
        /// Zero-based row, when the number belongs to one.
        row: Option<usize>,
    },

    /// Every example would get weight zero, so there is nothing to normalise by.
    #[error("no row of {rows} has a positive distrust weight under link = \"{link}\"; use link = \"tempered\"")]
    NoPositiveWeight {
        /// How many rows were weighted.
        rows: usize,
        /// Name of the link function.
        link: &'static str,
    },

    /// No token is trained, so a mean over tokens does not exist.
    #[error("{rows} rows with no trained token between them: check the loss mask and the length limit")]
    NoTrainedTokens {
        /// How many rows were given.
        rows: usize,
    },
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
