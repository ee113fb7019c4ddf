//! Quantised weights in MLX's form: groups along the input dimension share a scale.

use std::collections::BTreeMap;

/// The `quantization` object of a model's `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizationConfig {
    /// What holds for every embedding and linear layer without an entry of its own.
    pub default: LayerQuantization,
    /// Exceptions by module path; `None` = this module is not quantised.
    pub overrides: BTreeMap<String, Option<LayerQuantization>>,
}

/// How one module's weight is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerQuantization {
    /// Neighbouring inputs that share a scale.
    pub group_size: usize,
    /// Bits a weight.
    pub bits: usize,
    /// Number format.
    pub mode: QuantizationMode,
}

/// Number formats of quantised weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantizationMode {
    /// `w = scale · q + bias` with q an unsigned integer of 2, 3, 4, 5, 6 or 8 bits; groups of 32, 64 or 128.
    Affine,
    /// 4-bit floats, groups of 32 under a power-of-two scale (OCP microscaling).
    Mxfp4,
    /// 4-bit floats, groups of 16 under an 8-bit float scale.
    Nvfp4,
    /// 8-bit floats, groups of 32 under a power-of-two scale.
    Mxfp8,
}

impl QuantizationConfig {
    /// What holds for the module at `path`; `None` = not quantised.
    pub fn for_module(&self, path: &str) -> Option<LayerQuantization> {
        self.overrides.get(path).copied().unwrap_or(Some(self.default))
    }
}

impl QuantizationMode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Affine, Self::Mxfp4, Self::Nvfp4, Self::Mxfp8];

    /// MLX's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Affine => "affine",
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
            Self::Mxfp8 => "mxfp8",
        }
    }

    /// The bit widths it exists in.
    pub(crate) fn allowed_bits(self) -> &'static [usize] {
        match self {
            Self::Affine => &[2, 3, 4, 5, 6, 8],
            Self::Mxfp4 | Self::Nvfp4 => &[4],
            Self::Mxfp8 => &[8],
        }
    }

    /// The group sizes it exists in.
    pub(crate) fn allowed_group_sizes(self) -> &'static [usize] {
        match self {
            Self::Affine => &[32, 64, 128],
            Self::Mxfp4 | Self::Mxfp8 => &[32],
            Self::Nvfp4 => &[16],
        }
    }
}
