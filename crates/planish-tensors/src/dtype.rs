use std::fmt;

use half::{bf16, f16};

/// The element type of a stored tensor; little-endian in files and in memory.
///
/// The order of the variants is the order of the safetensors format: files hold wider types first, so that every tensor
/// of a file we wrote starts at a multiple of its element size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Dtype {
    Bool,
    U8,
    I8,
    F8E5M2,
    F8E4M3,
    F8E8M0,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Every element type that can be read and written.
    pub const ALL: [Self; 17] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::F8E5M2,
        Self::F8E4M3,
        Self::F8E8M0,
        Self::I16,
        Self::U16,
        Self::F16,
        Self::BF16,
        Self::I32,
        Self::U32,
        Self::F32,
        Self::C64,
        Self::F64,
        Self::I64,
        Self::U64,
    ];

    /// The name used in safetensors headers.
    ///
    /// ```
    /// use planish_tensors::Dtype;
    /// assert_eq!(Dtype::BF16.name(), "BF16");
    /// assert_eq!(Dtype::from_name("BF16"), Some(Dtype::BF16));
    /// ```
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E8M0 => "F8_E8M0",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::C64 => "C64",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
        }
    }

    /// The type of that header name, if it is one that can be read.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E5M2 | Self::F8E4M3 | Self::F8E8M0 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::C64 | Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// Whether every value of the type is exact in f32: `F32`, `F16` or `BF16`.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// The word that `config.json` has under `torch_dtype`, for floats.
    pub fn torch_name(self) -> Option<&'static str> {
        match self {
            Self::F32 => Some("float32"),
            Self::F16 => Some("float16"),
            Self::BF16 => Some("bfloat16"),
            _ => None,
        }
    }

    /// Appends `values`, each rounded once, to nearest with ties to even. On `Err` the index of the first value that has no
    /// finite image is returned, and `out` holds the values before it.
    ///
    /// # Panics
    /// For another type than `F32`, `F16` or `BF16`.
    ///
    /// ```
    /// use planish_tensors::Dtype;
    /// let mut out = Vec::new();
    /// assert_eq!(Dtype::F16.append(&[1.0, 65520.0], &mut out), Err(1));
    /// assert_eq!(out, [0x00, 0x3c]);
    /// ```
    pub fn append(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
        assert!(self.is_float(), "numbers are not stored as {self}");
        for (i, &value) in values.iter().enumerate() {
            let is_finite = match self {
                Self::F16 => {
                    let rounded = f16::from_f32(value);
                    out.extend_from_slice(&rounded.to_le_bytes());
                    rounded.is_finite()
                }
                Self::BF16 => {
                    let rounded = bf16::from_f32(value);
                    out.extend_from_slice(&rounded.to_le_bytes());
                    rounded.is_finite()
                }
                _ => {
                    out.extend_from_slice(&value.to_le_bytes());
                    value.is_finite()
                }
            };
            if !is_finite {
                out.truncate(out.len() - self.size());
                return Err(i);
            }
        }
        Ok(())
    }

    /// Bytes of a tensor of this type, or `None` when the number does not fit.
    pub fn byte_len(self, shape: &[usize]) -> Option<usize> {
        shape
            .iter()
            .try_fold(self.size(), |product, dim| product.checked_mul(*dim))
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_once_to_nearest_even() {
        // 1 + 2⁻⁸ lies half way between two bf16 numbers: the even one is 1.
        let mut out = Vec::new();
        Dtype::BF16
            .append(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0], &mut out)
            .unwrap();
        assert_eq!(out, [0x80, 0x3f, 0x82, 0x3f]);
    }

    #[test]
    fn err_value_beyond_f16_and_not_below() {
        assert_eq!(Dtype::F16.append(&[65520.0], &mut Vec::new()), Err(0));
        Dtype::F16.append(&[65519.0], &mut Vec::new()).unwrap();
    }

    #[test]
    fn err_value_that_is_not_a_number() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            assert_eq!(dtype.append(&[f32::NAN], &mut Vec::new()), Err(0), "{dtype}");
        }
    }
}
