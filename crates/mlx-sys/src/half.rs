//! 16-bit floats where the C compiler has no type for them.
//!
//! mlx-c declares its half-precision functions only where `<arm_fp16.h>` exists. `shim/half.cpp` supplies them for the
//! other architectures; both types are the bare bits.

use crate::mlx_array;

/// An IEEE 754 binary16 number as its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct float16_t(pub u16);

/// A bfloat16 number as its bits.
pub type bfloat16_t = u16;

unsafe extern "C" {
    pub fn mlx_array_item_float16(res: *mut float16_t, arr: mlx_array) -> ::std::os::raw::c_int;
    pub fn mlx_array_item_bfloat16(res: *mut bfloat16_t, arr: mlx_array) -> ::std::os::raw::c_int;
    pub fn mlx_array_data_float16(arr: mlx_array) -> *const float16_t;
    pub fn mlx_array_data_bfloat16(arr: mlx_array) -> *const bfloat16_t;
}
