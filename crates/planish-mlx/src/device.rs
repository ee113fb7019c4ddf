//! Devices as MLX sees them: how many there are, what they say of themselves, which one is the default.

#![allow(unsafe_code)] // raw device calls

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};

use crate::raw::check;
use crate::{Error, Result, install_error_handler};

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The processor.
    Cpu,
    /// A Metal or CUDA device, whichever this build of MLX was made for.
    Gpu,
}

/// One fact that a device tells about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceFact {
    /// A text, such as the device's name.
    Text(String),
    /// A number, such as bytes of memory.
    Number(usize),
}

/// How many devices of a kind are usable. The honest question: MLX's "is available" answers are constants of the build.
///
/// # Errors
/// [`Error::Mlx`] when the driver cannot be asked.
///
/// # Example
/// ```
/// use planish_mlx::device::{self, DeviceKind};
/// assert_eq!(device::count(DeviceKind::Cpu)?, 1);
/// # Ok::<(), planish_mlx::Error>(())
/// ```
pub fn count(kind: DeviceKind) -> Result<usize> {
    install_error_handler();
    let mut count = 0;
    // SAFETY: `count` is a live integer.
    check(
        unsafe { mlx_sys::mlx_device_count(&mut count, kind.raw()) },
        "count devices",
    )?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The facts that the first device of a kind tells, by name; the names depend on the backend (`device_name` is common).
///
/// # Errors
/// [`Error::DeviceUnavailable`]; [`Error::Mlx`] when the driver cannot be asked.
pub fn facts(kind: DeviceKind) -> Result<BTreeMap<String, DeviceFact>> {
    require(kind)?;
    let info = DeviceInfo::of(kind)?;
    info.keys()?
        .into_iter()
        .map(|key| info.fact(&key).map(|fact| (key, fact)))
        .collect()
}

/// The kind of the default device, on which operations run.
///
/// # Errors
/// [`Error::Operation`] when MLX does not answer.
pub fn default_kind() -> Result<DeviceKind> {
    install_error_handler();
    match mlx_rs::Device::try_default()?.get_type()? {
        mlx_rs::DeviceType::Cpu => Ok(DeviceKind::Cpu),
        mlx_rs::DeviceType::Gpu => Ok(DeviceKind::Gpu),
    }
}

/// Makes the first device of a kind the default.
///
/// # Errors
/// [`Error::DeviceUnavailable`] when there is none.
pub fn set_default(kind: DeviceKind) -> Result<()> {
    require(kind)?;
    mlx_rs::Device::set_default(&kind.device());
    Ok(())
}

impl DeviceKind {
    /// `cpu` or `gpu`.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Gpu => "gpu",
        }
    }

    fn raw(self) -> mlx_sys::mlx_device_type {
        match self {
            DeviceKind::Cpu => mlx_sys::mlx_device_type__MLX_CPU,
            DeviceKind::Gpu => mlx_sys::mlx_device_type__MLX_GPU,
        }
    }

    fn device(self) -> mlx_rs::Device {
        match self {
            DeviceKind::Cpu => mlx_rs::Device::cpu(),
            DeviceKind::Gpu => mlx_rs::Device::gpu(),
        }
    }
}

fn require(kind: DeviceKind) -> Result<()> {
    if count(kind)? == 0 {
        Err(Error::DeviceUnavailable { kind: kind.name() })
    } else {
        Ok(())
    }
}

/// An owned device-info handle.
struct DeviceInfo(mlx_sys::mlx_device_info);

impl DeviceInfo {
    fn of(kind: DeviceKind) -> Result<Self> {
        // SAFETY: both handles are created here; the device is freed here, the info on drop.
        unsafe {
            let device = mlx_sys::mlx_device_new_type(kind.raw(), 0);
            let mut info = DeviceInfo(mlx_sys::mlx_device_info_new());
            let status = mlx_sys::mlx_device_info_get(&mut info.0, device);
            mlx_sys::mlx_device_free(device);
            check(status, "describe a device").map(|()| info)
        }
    }

    fn keys(&self) -> Result<Vec<String>> {
        // SAFETY: the list is created, read and freed here; its strings are copied while it lives.
        unsafe {
            let mut list = mlx_sys::mlx_vector_string_new();
            let status = mlx_sys::mlx_device_info_get_keys(&mut list, self.0);
            let mut keys = Vec::new();
            for index in 0..mlx_sys::mlx_vector_string_size(list) {
                let mut text: *mut c_char = std::ptr::null_mut();
                if mlx_sys::mlx_vector_string_get(&mut text, list, index) == 0 && !text.is_null() {
                    keys.push(CStr::from_ptr(text).to_string_lossy().into_owned());
                }
            }
            mlx_sys::mlx_vector_string_free(list);
            keys.sort();
            check(status, "list a device's facts").map(|()| keys)
        }
    }

    fn fact(&self, key: &str) -> Result<DeviceFact> {
        let c_key = CString::new(key).map_err(|_| Error::Operation(format!("device fact {key:?} holds a NUL byte")))?;
        // SAFETY: the handle and the key are live; the text belongs to the handle and is copied at once.
        unsafe {
            let mut is_text = false;
            check(
                mlx_sys::mlx_device_info_is_string(&mut is_text, self.0, c_key.as_ptr()),
                "read a device's fact",
            )?;
            if is_text {
                let mut text: *const c_char = std::ptr::null();
                check(
                    mlx_sys::mlx_device_info_get_string(&mut text, self.0, c_key.as_ptr()),
                    "read a device's fact",
                )?;
                return Ok(DeviceFact::Text(CStr::from_ptr(text).to_string_lossy().into_owned()));
            }
            let mut number = 0;
            check(
                mlx_sys::mlx_device_info_get_size(&mut number, self.0, c_key.as_ptr()),
                "read a device's fact",
            )?;
            Ok(DeviceFact::Number(number))
        }
    }
}

impl Drop for DeviceInfo {
    fn drop(&mut self) {
        // SAFETY: the handle is owned.
        unsafe { mlx_sys::mlx_device_info_free(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_tells_its_facts() {
        facts(DeviceKind::Cpu).unwrap();
    }

    #[test]
    fn err_missing_gpu_is_named() {
        if count(DeviceKind::Gpu).unwrap() > 0 {
            println!("skipped: this machine has a GPU");
            return;
        }
        let error = set_default(DeviceKind::Gpu).unwrap_err();
        assert!(matches!(error, Error::DeviceUnavailable { kind: "gpu" }), "{error}");
    }
}
