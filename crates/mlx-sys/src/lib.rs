//! Raw bindings to mlx-c, in place of the published `mlx-sys` 0.7.0.
//!
//! The names are the published crate's; only the way to the library differs: Apple's prebuilt MLX is fetched from PyPI,
//! hash-checked and linked, so neither Xcode nor CMake nor a Git client is needed. `ARCHITECTURE.md` says how.
//!
//! Dependents that link an executable read these build variables:
//!
//! | variable | meaning |
//! |---|---|
//! | `DEP_MLX_LIB_DIR` | directory of `libmlx` |
//! | `DEP_MLX_INCLUDE` | header directories of MLX and mlx-c, joined as in `PATH` |
//! | `DEP_MLX_VERSION` | version of MLX |
//! | `DEP_MLX_FLAVOUR` | which prebuilt MLX, or `prefix` when `MLX_PREFIX` chose it |
#![allow(
    non_upper_case_globals,
    non_camel_case_types,
    non_snake_case,
    missing_docs,
    unreachable_pub,
    unsafe_code
)]
#![allow(clippy::all, rustdoc::all)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));

#[cfg(not(target_arch = "aarch64"))]
mod half;
#[cfg(not(target_arch = "aarch64"))]
pub use half::*;
