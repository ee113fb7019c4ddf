//! The three formats that converted weights are stored in.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

/// How weights are stored after a conversion; rounding from f32 is to nearest, ties to even.
///
/// ```
/// use planish_hub::Dtype;
/// assert_eq!("bf16".parse::<Dtype>()?, Dtype::Bf16);
/// assert_eq!(Dtype::Bf16.item_bytes(), 2);
/// # Ok::<(), planish_hub::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Dtype {
    /// bfloat16: the range of f32, 8 bits of precision.
    #[default]
    Bf16,
    /// IEEE half: 11 bits of precision, largest value 65504.
    F16,
    /// IEEE single.
    F32,
}

impl Dtype {
    /// Every dtype.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::F16, Self::F32];

    /// The short name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Bytes of one number.
    pub fn item_bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// The word that `config.json` has under `torch_dtype`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }

    /// The same dtype in the safetensors crate.
    pub(crate) fn safetensors(self) -> safetensors::Dtype {
        match self {
            Self::Bf16 => safetensors::Dtype::BF16,
            Self::F16 => safetensors::Dtype::F16,
            Self::F32 => safetensors::Dtype::F32,
        }
    }

    /// Appends `values`, each rounded once. On `Err` the index of the first value that has no finite image is returned
    /// and `out` holds the values before it.
    pub(crate) fn append(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
        for (i, &value) in values.iter().enumerate() {
            let fits = match self {
                Self::F32 => {
                    out.extend_from_slice(&value.to_le_bytes());
                    value.is_finite()
                }
                Self::Bf16 => {
                    let rounded = bf16::from_f32(value);
                    out.extend_from_slice(&rounded.to_le_bytes());
                    rounded.is_finite()
                }
                Self::F16 => {
                    let rounded = f16::from_f32(value);
                    out.extend_from_slice(&rounded.to_le_bytes());
                    rounded.is_finite()
                }
            };
            if !fits {
                out.truncate(out.len() - self.item_bytes());
                return Err(i);
            }
        }
        Ok(())
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dtype {
    type Err = crate::Error;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.name() == name || dtype.torch_name() == name)
            .ok_or_else(|| crate::Error::UnknownDtype { found: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_once_to_nearest_even() {
        // 1 + 2⁻⁸ lies half way between two bf16 numbers: the even one is 1.
        let mut out = Vec::new();
        Dtype::Bf16
            .append(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0], &mut out)
            .unwrap();
        assert_eq!(out, [0x80, 0x3f, 0x82, 0x3f]);
    }

    #[test]
    fn err_value_beyond_f16() {
        let mut out = Vec::new();
        assert_eq!(Dtype::F16.append(&[1.0, 65520.0], &mut out), Err(1));
        assert_eq!(out, [0x00, 0x3c]);
        Dtype::F16.append(&[65519.0], &mut out).unwrap();
    }

    #[test]
    fn err_value_that_is_not_a_number() {
        for dtype in Dtype::ALL {
            assert_eq!(dtype.append(&[f32::NAN], &mut Vec::new()), Err(0), "{dtype}");
        }
    }
}
