//! Owned handles of the C layer and the check of its status codes.

#![allow(unsafe_code)] // every function here wraps C calls

use std::ffi::CStr;

use mlx_rs::Array;

use crate::{Error, Result, handler, install_error_handler};

/// Turns a status code of the C layer into a result.
pub(crate) fn check(status: i32, operation: &'static str) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let message = handler::take_last_message().unwrap_or_else(|| format!("status {status}"));
    Err(Error::Mlx { operation, message })
}

/// Runs a C call that fills one array handle.
pub(crate) fn array(operation: &'static str, call: impl FnOnce(*mut mlx_sys::mlx_array) -> i32) -> Result<Array> {
    install_error_handler();
    // SAFETY: a new handle is empty; the call fills it on success. `from_ptr` takes ownership, so it is freed in any case.
    unsafe {
        let mut handle = mlx_sys::mlx_array_new();
        let status = call(&mut handle);
        let array = Array::from_ptr(handle);
        check(status, operation).map(|()| array)
    }
}

pub(crate) fn mlx_version() -> Result<String> {
    install_error_handler();
    // SAFETY: the string handle is created, filled, read and freed here.
    unsafe {
        let mut handle = mlx_sys::mlx_string_new();
        let status = mlx_sys::mlx_version(&mut handle);
        let text = string(handle);
        mlx_sys::mlx_string_free(handle);
        check(status, "tell its version").map(|()| text)
    }
}

/// Copies the text of a C string handle.
///
/// # Safety
/// `handle` must be a live string handle.
unsafe fn string(handle: mlx_sys::mlx_string) -> String {
    // SAFETY: the caller promises a live handle; its data is NUL-terminated or null.
    unsafe {
        let data = mlx_sys::mlx_string_data(handle);
        if data.is_null() {
            String::new()
        } else {
            CStr::from_ptr(data).to_string_lossy().into_owned()
        }
    }
}

/// An owned list of array handles.
pub(crate) struct ArrayList(mlx_sys::mlx_vector_array);

impl ArrayList {
    pub(crate) fn empty() -> Self {
        // SAFETY: creates an empty list, freed on drop.
        Self(unsafe { mlx_sys::mlx_vector_array_new() })
    }

    pub(crate) fn of(arrays: &[Array]) -> Result<Self> {
        let mut list = Self::empty();
        // SAFETY: the list is live and owned.
        unsafe { fill(list.as_mut_ptr(), arrays) }.map(|()| list)
    }

    pub(crate) fn handle(&self) -> mlx_sys::mlx_vector_array {
        self.0
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut mlx_sys::mlx_vector_array {
        &mut self.0
    }

    pub(crate) fn to_vec(&self) -> Result<Vec<Array>> {
        to_vec(self.0)
    }
}

impl Drop for ArrayList {
    fn drop(&mut self) {
        // SAFETY: the list owns its handle.
        unsafe { mlx_sys::mlx_vector_array_free(self.0) };
    }
}

/// Makes a list hold new references to `arrays`, and nothing else.
///
/// # Safety
/// `list` must point to a list handle that is live or null.
pub(crate) unsafe fn fill(list: *mut mlx_sys::mlx_vector_array, arrays: &[Array]) -> Result<()> {
    let handles: Vec<_> = arrays.iter().map(Array::as_ptr).collect();
    // SAFETY: the caller promises the list; the array handles are live, and the list takes its own references.
    check(
        unsafe { mlx_sys::mlx_vector_array_set_data(list, handles.as_ptr(), handles.len()) },
        "fill a list of arrays",
    )
}

/// New references to the arrays of a list that someone else owns.
pub(crate) fn to_vec(list: mlx_sys::mlx_vector_array) -> Result<Vec<Array>> {
    // SAFETY: the caller holds a live list; indices stay below its length.
    let length = unsafe { mlx_sys::mlx_vector_array_size(list) };
    (0..length)
        .map(|index| {
            array("read a list of arrays", |out| unsafe {
                mlx_sys::mlx_vector_array_get(out, list, index)
            })
        })
        .collect()
}
