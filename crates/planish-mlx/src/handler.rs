//! One error handler for `mlx-rs` and for our raw calls.

#![allow(unsafe_code)] // registers a C callback

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Once;

/// Replaces MLX's error handler, which ends the process, by one that turns failures into errors.
///
/// Safe to call often and from any thread; the first call does the work.
pub fn install_error_handler() {
    INSTALLED.call_once(|| {
        // mlx-rs registers its own handler at its first operation. Let it do so now, lest it replace ours later.
        let _ = mlx_rs::memory::active_memory();
        // SAFETY: `on_error` is a function of the expected type that never unwinds and needs no data.
        unsafe { mlx_sys::mlx_set_error_handler(Some(on_error), std::ptr::null_mut(), None) };
    });
}

/// Takes the last message that MLX reported on this thread.
pub(crate) fn take_last_message() -> Option<String> {
    LAST_MESSAGE.with(|last| last.borrow_mut().take())
}

static INSTALLED: Once = Once::new();

thread_local! {
    static LAST_MESSAGE: RefCell<Option<String>> = const { RefCell::new(None) };
}

unsafe extern "C" {
    /// The handler of `mlx-rs`, which keeps the message for its own errors.
    fn default_mlx_error_handler(message: *const c_char, data: *mut c_void);
}

/// Keeps the message for both readers: ours and, through its own handler, `mlx-rs`.
extern "C" fn on_error(message: *const c_char, data: *mut c_void) {
    // SAFETY: MLX passes a NUL-terminated string that lives during the call.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    // "text at file:line" of the C layer: the place helps nobody who uses planish.
    let text = text.rsplit_once(" at ").map_or(&*text, |(what, _)| what).to_owned();
    let _ = LAST_MESSAGE.try_with(|last| last.replace(Some(text)));
    // SAFETY: same contract as above; the function is part of mlx-rs, which is linked.
    unsafe { default_mlx_error_handler(message, data) };
}
