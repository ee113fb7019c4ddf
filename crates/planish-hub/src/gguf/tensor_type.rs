//! The storage formats of GGUF tensors.

/// How the numbers of a tensor are stored. Quantised types hold rows as blocks of [`block_len`](Self::block_len) numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)] // the names are the format's own
pub enum TensorType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl TensorType {
    /// Every type that can be read.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// The name in the format's documentation.
    pub fn name(self) -> &'static str {
        self.layout().0
    }

    /// The number that stands for it in a file.
    pub fn id(self) -> u32 {
        self.layout().1
    }

    /// Numbers in one block; 1 for plain types.
    pub fn block_len(self) -> usize {
        self.layout().2
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.layout().3
    }

    /// The type with that number, or `Err` with its name when it is a type of the format that we do not read.
    pub(crate) fn from_id(id: u32) -> Result<Self, Option<&'static str>> {
        Self::ALL
            .into_iter()
            .find(|t| t.id() == id)
            .ok_or_else(|| name_of_unread(id))
    }

    /// Bytes of `n_elements` numbers, or `None` when they are no whole number of blocks or overflow.
    pub(crate) fn bytes_for(self, n_elements: u64) -> Option<u64> {
        let block_len = self.block_len() as u64;
        if !n_elements.is_multiple_of(block_len) {
            return None;
        }
        (n_elements / block_len).checked_mul(self.block_bytes() as u64)
    }

    /// Name, number in the file, numbers a block, bytes a block.
    fn layout(self) -> (&'static str, u32, usize, usize) {
        match self {
            Self::F32 => ("F32", 0, 1, 4),
            Self::F16 => ("F16", 1, 1, 2),
            Self::BF16 => ("BF16", 30, 1, 2),
            Self::Q4_0 => ("Q4_0", 2, 32, 18),
            Self::Q4_1 => ("Q4_1", 3, 32, 20),
            Self::Q5_0 => ("Q5_0", 6, 32, 22),
            Self::Q5_1 => ("Q5_1", 7, 32, 24),
            Self::Q8_0 => ("Q8_0", 8, 32, 34),
            Self::Q2_K => ("Q2_K", 10, 256, 84),
            Self::Q3_K => ("Q3_K", 11, 256, 110),
            Self::Q4_K => ("Q4_K", 12, 256, 144),
            Self::Q5_K => ("Q5_K", 13, 256, 176),
            Self::Q6_K => ("Q6_K", 14, 256, 210),
        }
    }
}

fn name_of_unread(id: u32) -> Option<&'static str> {
    Some(match id {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_lead_back_to_types() {
        for t in TensorType::ALL {
            assert_eq!(TensorType::from_id(t.id()), Ok(t));
        }
    }

    #[test]
    fn unread_types_are_named_and_unknown_ones_are_not() {
        assert_eq!(TensorType::from_id(23), Err(Some("IQ4_XS")));
        assert_eq!(TensorType::from_id(1000), Err(None));
    }

    #[test]
    fn partial_blocks_have_no_size() {
        assert_eq!(TensorType::Q4_0.bytes_for(64), Some(36));
        assert_eq!(TensorType::Q4_0.bytes_for(33), None);
        assert_eq!(TensorType::F32.bytes_for(u64::MAX), None);
    }
}
