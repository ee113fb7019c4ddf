//! Types and constant values of MIL, and their protobuf forms.

use half::f16;

use crate::{
    DType,
    proto::{self, DataType, DimensionKind, TensorValueKind, ValueTypeKind},
};

/// One dimension of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// Known when the package is written.
    Fixed(usize),
    /// Chosen by the caller of the function.
    Unknown,
}

/// Element type and shape; a scalar has the shape `[]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub dims: Vec<Dim>,
}

impl TensorType {
    /// A type whose dimensions are all known.
    pub fn new(dtype: DType, shape: &[usize]) -> Self {
        Self {
            dtype,
            dims: shape.iter().map(|&d| Dim::Fixed(d)).collect(),
        }
    }

    /// The shape, unless a dimension is unknown.
    pub fn shape(&self) -> Option<Vec<usize>> {
        self.dims
            .iter()
            .map(|d| if let Dim::Fixed(n) = d { Some(*n) } else { None })
            .collect()
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Number of elements, unless a dimension is unknown or the product overflows.
    pub fn count(&self) -> Option<usize> {
        self.shape()?
            .iter()
            .try_fold(1usize, |product, &d| product.checked_mul(d))
    }

    pub(crate) fn to_proto(&self) -> proto::ValueType {
        let dimensions = self
            .dims
            .iter()
            .map(|dim| proto::Dimension {
                kind: Some(dimension_kind(*dim)),
            })
            .collect();
        let tensor = proto::TensorType {
            data_type: self.dtype.mil() as i32,
            rank: self.dims.len() as i64,
            dimensions,
        };
        proto::ValueType {
            kind: Some(ValueTypeKind::Tensor(tensor)),
        }
    }
}

fn dimension_kind(dim: Dim) -> DimensionKind {
    match dim {
        Dim::Fixed(size) => DimensionKind::Constant(proto::ConstantDimension { size: size as u64 }),
        Dim::Unknown => DimensionKind::Unknown(proto::UnknownDimension { variadic: false }),
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, dim) in self.dims.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            match dim {
                Dim::Fixed(size) => write!(f, "{comma}{size}")?,
                Dim::Unknown => write!(f, "{comma}?")?,
            }
        }
        f.write_str("]")
    }
}

/// Type of a value in a function: a tensor, or a state that holds one between calls.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// A tensor.
    Tensor(TensorType),
    /// A state; the tensor inside is read and written by operations.
    State(TensorType),
}

impl Type {
    /// The tensor type, of the state's content too.
    pub fn tensor(&self) -> &TensorType {
        match self {
            Self::Tensor(inner) | Self::State(inner) => inner,
        }
    }

    pub(crate) fn to_proto(&self) -> proto::ValueType {
        match self {
            Self::Tensor(inner) => inner.to_proto(),
            Self::State(inner) => {
                let wrapped_type = Some(Box::new(inner.to_proto()));
                proto::ValueType {
                    kind: Some(ValueTypeKind::State(Box::new(proto::StateType { wrapped_type }))),
                }
            }
        }
    }

    pub(crate) fn from_proto(raw: &proto::ValueType) -> Result<Self, String> {
        match &raw.kind {
            Some(ValueTypeKind::Tensor(tensor)) => tensor_from_proto(tensor).map(Self::Tensor),
            Some(ValueTypeKind::State(state)) => match state.wrapped_type.as_deref().map(|t| &t.kind) {
                Some(Some(ValueTypeKind::Tensor(tensor))) => tensor_from_proto(tensor).map(Self::State),
                _ => Err("a state that wraps no tensor".into()),
            },
            None => Err("a value that is neither tensor nor state".into()),
        }
    }
}

impl std::fmt::Display for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tensor(inner) => inner.fmt(f),
            Self::State(inner) => write!(f, "state<{inner}>"),
        }
    }
}

fn tensor_from_proto(raw: &proto::TensorType) -> Result<TensorType, String> {
    let dtype = DType::from_mil(raw.data_type).ok_or_else(|| format!("unknown data type {}", raw.data_type))?;
    if raw.rank != raw.dimensions.len() as i64 {
        return Err(format!("rank {} with {} dimensions", raw.rank, raw.dimensions.len()));
    }
    let dims = raw.dimensions.iter().map(|dim| match dim.kind {
        Some(DimensionKind::Constant(proto::ConstantDimension { size })) => usize::try_from(size)
            .map(Dim::Fixed)
            .map_err(|_| format!("dimension {size}")),
        Some(DimensionKind::Unknown(_)) => Ok(Dim::Unknown),
        None => Err("a dimension without a size".into()),
    });
    Ok(TensorType {
        dtype,
        dims: dims.collect::<Result<_, String>>()?,
    })
}

/// A small constant, stored inside the program.
#[derive(Clone, Debug, PartialEq)]
pub enum Literal {
    /// Booleans.
    Bool(Vec<bool>),
    /// 32-bit integers.
    I32(Vec<i32>),
    /// Half floats.
    F16(Vec<f16>),
    /// Floats.
    F32(Vec<f32>),
    /// One string.
    Str(String),
}

impl Literal {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Bool(_) => DType::Bool,
            Self::I32(_) => DType::I32,
            Self::F16(_) => DType::F16,
            Self::F32(_) => DType::F32,
            Self::Str(_) => DType::String,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Bool(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::Str(_) => 1,
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The integers, if it holds integers.
    pub fn ints(&self) -> Option<&[i32]> {
        if let Self::I32(values) = self {
            Some(values)
        } else {
            None
        }
    }

    /// The single boolean, if it is one.
    pub fn flag(&self) -> Option<bool> {
        if let Self::Bool(values) = self {
            values.first().copied().filter(|_| values.len() == 1)
        } else {
            None
        }
    }

    /// The floats as f32, if it holds floats.
    pub fn floats(&self) -> Option<Vec<f32>> {
        match self {
            Self::F16(values) => Some(values.iter().map(|v| v.to_f32()).collect()),
            Self::F32(values) => Some(values.clone()),
            _ => None,
        }
    }

    pub(crate) fn to_proto(&self, ty: &TensorType) -> proto::Value {
        let kind = match self {
            Self::Bool(values) => TensorValueKind::Bools(proto::Bools { values: values.clone() }),
            Self::I32(values) => TensorValueKind::Ints(proto::Ints { values: values.clone() }),
            Self::F16(values) => {
                let values = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                TensorValueKind::Bytes(proto::Bytes { values })
            }
            Self::F32(values) => TensorValueKind::Floats(proto::Floats { values: values.clone() }),
            Self::Str(value) => TensorValueKind::Strings(proto::Strings {
                values: vec![value.clone()],
            }),
        };
        let tensor = Some(proto::TensorValue { kind: Some(kind) });
        proto::Value {
            doc_string: String::new(),
            r#type: Some(ty.to_proto()),
            kind: Some(proto::ValueKind::Immediate(proto::ImmediateValue { tensor })),
        }
    }

    /// Decodes an immediate value; `Ok(None)` for element types that no operator of ours reads.
    pub(crate) fn from_proto(raw: &proto::TensorValue, ty: &TensorType) -> Result<Option<Self>, String> {
        let literal = match (&raw.kind, ty.dtype) {
            (Some(TensorValueKind::Bools(v)), DType::Bool) => Self::Bool(v.values.clone()),
            (Some(TensorValueKind::Ints(v)), DType::I32) => Self::I32(v.values.clone()),
            (Some(TensorValueKind::Floats(v)), DType::F32) => Self::F32(v.values.clone()),
            (Some(TensorValueKind::Strings(v)), DType::String) if v.values.len() == 1 => Self::Str(v.values[0].clone()),
            (Some(TensorValueKind::Bytes(v)), DType::F16) if v.values.len().is_multiple_of(2) => Self::F16(
                v.values
                    .chunks_exact(2)
                    .map(|b| f16::from_le_bytes([b[0], b[1]]))
                    .collect(),
            ),
            (Some(TensorValueKind::Bytes(_) | TensorValueKind::Ints(_)), dtype) if dtype.mil() >= DataType::Int8 => {
                return Ok(None);
            }
            _ => return Err(format!("an immediate value in the wrong form for {ty}")),
        };
        if ty.count() != Some(literal.len()) {
            return Err(format!("{} elements for {ty}", literal.len()));
        }
        Ok(Some(literal))
    }
}
