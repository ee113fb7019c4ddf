//! Values that flow through an interpreted function.

use std::sync::Arc;

use half::{f16, slice::HalfFloatSliceExt};
use ndarray::{ArrayD, IxDyn};

/// A value at run time. Floats are held as f32 whatever their declared type; stored weights stay fp16.
#[derive(Clone, Debug)]
pub enum Value {
    /// Results and inputs of type fp16 or fp32.
    Float(Arc<ArrayD<f32>>),
    /// Weights.
    Half(Arc<HalfTensor>),
    /// Integers of any width.
    Int(Arc<ArrayD<i32>>),
    /// Booleans.
    Bool(Arc<ArrayD<bool>>),
    /// A string.
    Text(String),
    /// A state, by name.
    State(String),
}

/// Half floats in row-major order.
#[derive(Debug)]
pub struct HalfTensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<f16>,
}

impl HalfTensor {
    /// Elements `range` as f32.
    pub(crate) fn floats(&self, range: std::ops::Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; range.len()];
        self.data[range].convert_to_f32_slice(&mut out);
        out
    }
}

impl Value {
    /// A float tensor.
    pub fn floats(shape: &[usize], values: Vec<f32>) -> Option<Self> {
        ArrayD::from_shape_vec(IxDyn(shape), values)
            .ok()
            .map(|a| Self::Float(Arc::new(a)))
    }

    /// An integer tensor.
    pub fn ints(shape: &[usize], values: Vec<i32>) -> Option<Self> {
        ArrayD::from_shape_vec(IxDyn(shape), values)
            .ok()
            .map(|a| Self::Int(Arc::new(a)))
    }

    /// Its shape; `None` for a string or a state.
    pub fn shape(&self) -> Option<&[usize]> {
        match self {
            Self::Float(a) => Some(a.shape()),
            Self::Half(a) => Some(&a.shape),
            Self::Int(a) => Some(a.shape()),
            Self::Bool(a) => Some(a.shape()),
            Self::Text(_) | Self::State(_) => None,
        }
    }

    /// The floats, weights widened; `None` for other types.
    pub fn to_floats(&self) -> Option<Arc<ArrayD<f32>>> {
        match self {
            Self::Float(a) => Some(a.clone()),
            Self::Half(a) => ArrayD::from_shape_vec(IxDyn(&a.shape), a.floats(0..a.data.len()))
                .ok()
                .map(Arc::new),
            _ => None,
        }
    }
}
