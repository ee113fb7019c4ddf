//! Values that flow through a running graph.

use std::sync::Arc;

use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};

use super::stored::Matrix;
use crate::Element;

/// A value at run time. Floats of every width are held as f32, integers and booleans as 64-bit integers.
#[derive(Clone, Debug)]
pub enum Value {
    /// A tensor of floats.
    Float(Arc<ArrayD<f32>>),
    /// A tensor of integers or booleans (0 and 1).
    Int(Arc<ArrayD<i64>>),
    /// A large weight, still in its stored form.
    Matrix(Matrix),
    /// A state, by the index of the graph's input.
    Handle(usize),
    /// Orders the use of states; operations run in order anyway.
    Token,
}

impl Value {
    /// A tensor of floats; `None` when the values do not fill the shape.
    pub fn floats(shape: &[usize], values: Vec<f32>) -> Option<Self> {
        let array = ArrayD::from_shape_vec(IxDyn(shape), values).ok()?;
        Some(Self::Float(Arc::new(array)))
    }

    /// A tensor of integers; `None` when the values do not fill the shape.
    pub fn ints(shape: &[usize], values: Vec<i64>) -> Option<Self> {
        let array = ArrayD::from_shape_vec(IxDyn(shape), values).ok()?;
        Some(Self::Int(Arc::new(array)))
    }

    /// Its shape; `None` for a state or a token.
    pub fn shape(&self) -> Option<Vec<usize>> {
        match self {
            Self::Float(array) => Some(array.shape().to_vec()),
            Self::Int(array) => Some(array.shape().to_vec()),
            Self::Matrix(matrix) => Some(matrix.shape()),
            Self::Handle(_) | Self::Token => None,
        }
    }
}

impl From<ArrayD<f32>> for Value {
    fn from(array: ArrayD<f32>) -> Self {
        Self::Float(Arc::new(array))
    }
}

impl From<ArrayD<i64>> for Value {
    fn from(array: ArrayD<i64>) -> Self {
        Self::Int(Arc::new(array))
    }
}

/// Elements of stored data as floats; `None` for integer types.
pub(super) fn read_floats(element: Element, data: &[u8]) -> Option<Vec<f32>> {
    let halves = data.chunks_exact(2);
    match element {
        Element::F32 => {
            let words = data.chunks_exact(4);
            Some(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        Element::F16 => Some(halves.map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        Element::Bf16 => Some(halves.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        _ => None,
    }
}

/// Elements of stored data as integers; `None` for float types.
pub(super) fn read_ints(element: Element, data: &[u8], count: usize) -> Option<Vec<i64>> {
    let word = |width: usize| data.chunks_exact(width);
    let signed4 = |nibble: u8| i64::from((nibble << 4) as i8 >> 4);
    // Two in a byte, the first in the low half.
    let nibbles = || data.iter().flat_map(|byte| [byte & 15, byte >> 4]).take(count);
    match element {
        Element::Bool => Some(data.iter().map(|b| i64::from(*b != 0)).collect()),
        Element::I8 => Some(data.iter().map(|b| i64::from(*b as i8)).collect()),
        Element::I16 => Some(word(2).map(|b| i64::from(i16::from_le_bytes([b[0], b[1]]))).collect()),
        Element::I32 => Some(
            word(4)
                .map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
        ),
        Element::U32 => Some(
            word(4)
                .map(|b| i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
        ),
        Element::U64 => {
            let eight = |b: &[u8]| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as i64;
            Some(word(8).map(eight).collect())
        }
        Element::I4 => Some(nibbles().map(signed4).collect()),
        Element::U4 => Some(nibbles().map(i64::from).collect()),
        Element::F32 | Element::F16 | Element::Bf16 => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_bit_numbers_begin_in_the_low_half() {
        assert_eq!(read_ints(Element::I4, &[0x8F, 0x07], 3), Some(vec![-1, -8, 7]));
        assert_eq!(read_ints(Element::U4, &[0x8F, 0x07], 3), Some(vec![15, 8, 7]));
    }
}
