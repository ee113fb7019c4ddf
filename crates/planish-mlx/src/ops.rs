//! Operations that exist in MLX but not in the safe API of `mlx-rs`.

#![allow(unsafe_code)] // raw operation calls

use mlx_rs::{Array, Stream};

use crate::{Error, Result, raw};

/// The `N` arrays of a list.
///
/// # Errors
/// [`Error::ArrayCount`] for a list of another length.
pub fn exactly<const N: usize>(arrays: Vec<Array>) -> Result<[Array; N]> {
    arrays.try_into().map_err(|arrays: Vec<Array>| Error::ArrayCount {
        expected: N,
        found: arrays.len(),
    })
}

/// The part of `array` from `start` (inclusive) to `stop` (exclusive), one index per axis.
///
/// # Errors
/// [`crate::Error::Mlx`] when the lists do not have one entry per axis.
///
/// # Example
/// ```
/// use planish_mlx::{Array, ops};
/// let array = Array::from_slice(&[1_i32, 2, 3, 4, 5, 6], &[2, 3]);
/// let part = ops::slice(&array, &[0, 1], &[2, 3])?;
/// assert_eq!(part.contiguous()?.as_slice::<i32>(), &[2, 3, 5, 6]);
/// # Ok::<(), planish_mlx::Error>(())
/// ```
pub fn slice(array: &Array, start: &[i32], stop: &[i32]) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    let strides = vec![1; start.len()];
    // SAFETY: pointers and lengths belong to live slices.
    raw::array("slice an array", |out| unsafe {
        mlx_sys::mlx_slice(
            out,
            array.as_ptr(),
            start.as_ptr(),
            start.len(),
            stop.as_ptr(),
            stop.len(),
            strides.as_ptr(),
            strides.len(),
            stream_handle(&stream),
        )
    })
}

/// A copy of `array` whose part from `start` to `stop` is `update`; in place when nobody else holds `array`.
///
/// # Errors
/// [`crate::Error::Mlx`] when the shapes do not agree.
///
/// # Example
/// ```
/// use planish_mlx::{Array, ops};
/// let array = Array::from_slice(&[0_i32; 4], &[1, 4]);
/// let array = ops::slice_update(&array, &Array::from_slice(&[7_i32, 8], &[1, 2]), &[0, 1], &[1, 3])?;
/// assert_eq!(array.as_slice::<i32>(), &[0, 7, 8, 0]);
/// # Ok::<(), planish_mlx::Error>(())
/// ```
pub fn slice_update(array: &Array, update: &Array, start: &[i32], stop: &[i32]) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    let strides = vec![1; start.len()];
    // SAFETY: pointers and lengths belong to live slices.
    raw::array("update a slice", |out| unsafe {
        mlx_sys::mlx_slice_update(
            out,
            array.as_ptr(),
            update.as_ptr(),
            start.as_ptr(),
            start.len(),
            stop.as_ptr(),
            stop.len(),
            strides.as_ptr(),
            strides.len(),
            stream_handle(&stream),
        )
    })
}

/// `count` independent random keys from one: u32 `[2]` to u32 `[count, 2]`.
///
/// # Errors
/// [`crate::Error::Mlx`] when `key` is not a key.
pub fn split_key(key: &Array, count: i32) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    // SAFETY: all handles are live during the call.
    raw::array("split a random key", |out| unsafe {
        mlx_sys::mlx_random_split_num(out, key.as_ptr(), count, stream_handle(&stream))
    })
}

/// `array`, computed only after `others` are: an order for what a lazy graph would otherwise run in any order.
///
/// Memory depends on it: of two large intermediates only the first is alive when the second waits for its result.
///
/// # Errors
/// [`crate::Error::Mlx`].
///
/// # Example
/// ```
/// use planish_mlx::{Array, ops};
/// let first = Array::from_f32(1.0).square()?;
/// let second = ops::after(&Array::from_f32(2.0), &[first])?;
/// assert_eq!(second.item_exact::<f32>(), 2.0);
/// # Ok::<(), planish_mlx::Error>(())
/// ```
pub fn after(array: &Array, others: &[Array]) -> Result<Array> {
    match all_after(std::slice::from_ref(array), others)?.pop() {
        Some(array) => Ok(array),
        None => Err(crate::Error::Operation(
            "order two arrays: nothing came back".to_owned(),
        )),
    }
}

/// `arrays`, available only after `others` are computed; see [`after`].
///
/// # Errors
/// [`crate::Error::Mlx`].
pub(crate) fn all_after(arrays: &[Array], others: &[Array]) -> Result<Vec<Array>> {
    let inputs = raw::ArrayList::of(arrays)?;
    let others = raw::ArrayList::of(others)?;
    let mut outputs = raw::ArrayList::empty();
    // SAFETY: all lists are live during the call.
    let status = unsafe { mlx_sys::mlx_depends(outputs.as_mut_ptr(), inputs.handle(), others.handle()) };
    raw::check(status, "order two arrays")?;
    outputs.to_vec()
}

fn stream_handle(stream: &Stream) -> mlx_sys::mlx_stream {
    stream.as_ptr()
}
