//! Which MLX library is loaded: where it lies, what it was built for, which BLAS serves it.

#![allow(unsafe_code)] // asks the dynamic loader

use std::ffi::{CStr, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::raw::check;
use crate::{Result, install_error_handler};

/// The kind of GPU that a build of MLX has kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GpuLibrary {
    /// Apple's.
    Metal,
    /// NVIDIA's.
    Cuda,
}

/// What this MLX was built for, whether or not such a device is here; `None` for a build for the processor alone.
///
/// Touches no device.
///
/// # Errors
/// [`crate::Error::Mlx`] when MLX does not answer.
///
/// # Example
/// ```
/// use planish_mlx::library::{self, GpuLibrary};
/// let built_for = library::gpu_support()?;
/// assert!(cfg!(target_os = "macos") || built_for != Some(GpuLibrary::Metal));
/// # Ok::<(), planish_mlx::Error>(())
/// ```
pub fn gpu_support() -> Result<Option<GpuLibrary>> {
    install_error_handler();
    let (mut metal, mut cuda) = (false, false);
    // SAFETY: both flags are live; the functions answer from constants of the build.
    unsafe {
        check(
            mlx_sys::mlx_metal_is_available(&mut metal),
            "tell what it was built for",
        )?;
        check(mlx_sys::mlx_cuda_is_available(&mut cuda), "tell what it was built for")?;
    }
    Ok(match (metal, cuda) {
        (true, _) => Some(GpuLibrary::Metal),
        (_, true) => Some(GpuLibrary::Cuda),
        _ => None,
    })
}

/// The file that MLX was loaded from, with links resolved; `None` where it is part of the program.
pub fn path() -> Option<PathBuf> {
    // `mlx::core::version()`, which only libmlx itself defines.
    let address = symbol(c"_ZN3mlx4core7versionEv")?;
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: `info` is live and written by the call; the name it points to belongs to the loader and is copied at once.
    let name = unsafe {
        if libc::dladdr(address, &mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        CStr::from_ptr(info.dli_fname).to_bytes()
    };
    let path = Path::new(OsStr::from_bytes(name));
    Some(std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()))
}

/// The kernels that OpenBLAS chose for this processor, such as `SkylakeX`; `None` where another BLAS is loaded.
pub fn openblas_kernels() -> Option<String> {
    let address = symbol(c"scipy_openblas_get_corename").or_else(|| symbol(c"openblas_get_corename"))?;
    // SAFETY: OpenBLAS declares the function so; it returns a constant string.
    unsafe {
        let corename: extern "C" fn() -> *const c_char = std::mem::transmute(address);
        let name = corename();
        (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}

fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a lookup by a NUL-terminated name among the libraries that are loaded already.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_a_file_beside_its_neighbours() {
        let path = path().unwrap();
        assert!(
            path.file_name().unwrap().to_string_lossy().starts_with("libmlx."),
            "{path:?}"
        );
        assert!(path.exists());
    }

    #[test]
    fn linux_computes_with_openblas() {
        if cfg!(target_os = "linux") && std::env::var_os("MLX_PREFIX").is_none() {
            assert!(openblas_kernels().is_some_and(|name| !name.is_empty()));
        }
    }
}
