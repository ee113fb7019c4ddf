//! Types of values: tensors with known and unknown dimensions, handles to states, tokens that order their use.

use std::fmt;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Element {
    Bool,
    F32,
    F16,
    Bf16,
    I32,
    I16,
    I8,
    I4,
    U64,
    U32,
    U4,
}

/// Every element type with its code in the file, its name in Core AI's text form and its width in bits.
const TABLE: [(Element, u64, &str, usize); 11] = [
    (Element::Bool, 4, "i1", 8),
    (Element::F32, 6, "f32", 32),
    (Element::F16, 7, "f16", 16),
    (Element::Bf16, 8, "bf16", 16),
    (Element::I32, 18, "si32", 32),
    (Element::I16, 19, "si16", 16),
    (Element::I8, 20, "si8", 8),
    (Element::I4, 21, "si4", 4),
    (Element::U64, 23, "ui64", 64),
    (Element::U32, 24, "ui32", 32),
    (Element::U4, 27, "ui4", 4),
];

impl Element {
    pub(crate) fn code(self) -> u64 {
        self.row().1
    }

    pub(crate) fn from_code(code: u64) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == code).map(|row| row.0)
    }

    /// The name in Core AI's text form, such as `si32`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Bits of one stored element.
    pub fn bits(self) -> usize {
        self.row().3
    }

    /// Bytes that `count` elements take; a half-filled last byte counts.
    pub fn byte_len(self, count: usize) -> u64 {
        (count as u64 * self.bits() as u64).div_ceil(8)
    }

    /// Whether elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    fn row(self) -> &'static (Self, u64, &'static str, usize) {
        // The table names every variant; a test walks them all.
        TABLE.iter().find(|row| row.0 == self).unwrap_or(&TABLE[0])
    }
}

/// Shape and element type of a tensor; `None` is a dimension known only at run time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Dimensions, outermost first; none for a scalar.
    pub dims: Vec<Option<usize>>,
    /// Element type.
    pub element: Element,
}

impl TensorType {
    /// A tensor whose dimensions may be unknown.
    pub fn new(element: Element, dims: &[Option<usize>]) -> Self {
        Self {
            dims: dims.to_vec(),
            element,
        }
    }

    /// A tensor whose dimensions are known.
    pub fn fixed(element: Element, dims: &[usize]) -> Self {
        Self {
            dims: dims.iter().copied().map(Some).collect(),
            element,
        }
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Number of elements; `None` when a dimension is unknown or the product does not fit.
    pub fn count(&self) -> Option<usize> {
        self.dims
            .iter()
            .try_fold(1usize, |product, dim| product.checked_mul((*dim)?))
    }

    /// The same shape with another element type.
    pub fn with(&self, element: Element) -> Self {
        Self {
            dims: self.dims.clone(),
            element,
        }
    }

    /// Whether a tensor of this shape at run time has this type.
    pub fn admits(&self, shape: &[usize]) -> bool {
        let fits = |(dim, size): (&Option<usize>, &usize)| dim.is_none_or(|d| d == *size);
        self.rank() == shape.len() && self.dims.iter().zip(shape).all(fits)
    }

    /// Whether some tensor has both types.
    pub fn agrees(&self, other: &Self) -> bool {
        let fits = |(a, b): (&Option<usize>, &Option<usize>)| a.is_none() || b.is_none() || a == b;
        self.element == other.element && self.rank() == other.rank() && self.dims.iter().zip(&other.dims).all(fits)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for dim in &self.dims {
            match dim {
                Some(size) => write!(f, "{size}x")?,
                None => f.write_str("?x")?,
            }
        }
        f.write_str(self.element.name())
    }
}

/// Type of a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// A tensor.
    Tensor(TensorType),
    /// A state that the caller owns and the program changes.
    Handle(TensorType),
    /// Orders reads and writes of states.
    Token,
}

impl Type {
    /// The tensor type; `None` for a handle or a token.
    pub fn tensor(&self) -> Option<&TensorType> {
        match self {
            Self::Tensor(ty) => Some(ty),
            Self::Handle(_) | Self::Token => None,
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor(ty) => ty.fmt(f),
            Self::Handle(ty) => write!(f, "handle<{ty}>"),
            Self::Token => f.write_str("token"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_its_own_row() {
        for (element, code, name, bits) in TABLE {
            assert_eq!((element.code(), element.name(), element.bits()), (code, name, bits));
            assert_eq!(Element::from_code(code), Some(element));
        }
    }

    #[test]
    fn types_read_as_in_core_ai_text() {
        let ty = TensorType::new(Element::F16, &[Some(1), None, Some(8)]);
        assert_eq!(ty.to_string(), "1x?x8xf16");
        assert!(ty.admits(&[1, 5, 8]) && !ty.admits(&[1, 5, 9]));
        assert_eq!(
            (ty.count(), TensorType::fixed(Element::I4, &[3, 5]).count()),
            (None, Some(15))
        );
        assert_eq!(Element::I4.byte_len(15), 8);
    }
}
