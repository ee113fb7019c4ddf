use mlx_rs::Dtype;

/// The result of a call into MLX.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between Rust and MLX.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// MLX refused an operation; `message` is its own text.
    #[error("MLX could not {operation}: {message}")]
    Mlx {
        /// What was attempted, as a verb phrase.
        operation: &'static str,
        /// MLX's message.
        message: String,
    },

    /// An operation of `mlx-rs` failed.
    #[error("MLX: {0}")]
    Operation(String),

    /// The bytes do not fill the announced shape.
    #[error("{found} bytes given for shape {shape:?} of {dtype:?}, which takes {expected}")]
    ByteLength {
        /// Announced shape.
        shape: Vec<usize>,
        /// Announced element type.
        dtype: Dtype,
        /// Bytes that the shape takes.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },

    /// A dimension is larger than MLX can index.
    #[error("shape {shape:?} has a dimension above {}, the largest that MLX can index", i32::MAX)]
    DimensionTooLarge {
        /// The refused shape.
        shape: Vec<usize>,
    },

    /// A differentiated argument was named by an index that does not exist.
    #[error("argument {index} cannot be differentiated: the function takes {count} arguments")]
    NoSuchArgument {
        /// The refused index.
        index: usize,
        /// How many arguments there are.
        count: usize,
    },

    /// The value to differentiate is no scalar.
    #[error("only a scalar can be differentiated: expected shape [], found {}", describe(.shape.as_deref()))]
    NotScalar {
        /// Shape of the function's first output; `None` when it returned nothing.
        shape: Option<Vec<i32>>,
    },

    /// MLX, or a function that it called, gave another number of arrays than the caller counts on: a mistake in this program.
    #[error("a function gave {found} arrays where {expected} were expected; please report this")]
    ArrayCount {
        /// Arrays that were expected.
        expected: usize,
        /// Arrays that came.
        found: usize,
    },

    /// Host kernels take and give f32, i32 and u32.
    #[error("host kernel {kernel}: an array is {dtype:?}; expected Float32, Int32 or Uint32")]
    HostKernelDtype {
        /// Name of the kernel.
        kernel: &'static str,
        /// The refused type.
        dtype: Dtype,
    },

    /// A device kind that this machine or this build of MLX does not offer.
    #[error("MLX sees no {kind} device here; choose another device or a build of MLX that supports it")]
    DeviceUnavailable {
        /// `cpu` or `gpu`.
        kind: &'static str,
    },

    /// A function given to MLX failed with an error of another type than its caller's.
    #[error("a function called by MLX failed: {0}")]
    Callback(String),
}

impl From<mlx_rs::error::Exception> for Error {
    fn from(exception: mlx_rs::error::Exception) -> Self {
        Error::Operation(exception.what().to_owned())
    }
}

fn describe(shape: Option<&[i32]>) -> String {
    shape.map_or_else(|| "no output".to_owned(), |shape| format!("{shape:?}"))
}
