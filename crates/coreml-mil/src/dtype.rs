//! Element types: their three encodings (program, weight file, description), width and packing.

use crate::proto::{ArrayDataType, DataType};

/// Element type of a tensor in a package.
///
/// One type, three codes: [`DType::mil`] in the program, [`DType::blob_code`] in the weight file and
/// [`DType::array_type`] in the model description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum DType {
    Bool,
    String,
    F16,
    F32,
    Bf16,
    I8,
    I16,
    I32,
    U8,
    U16,
    U32,
    I4,
    U4,
    U3,
    U2,
    U1,
    U6,
}

/// Every type, with its MIL code and, where the weight file can hold it, its code there.
const TABLE: [(DType, DataType, Option<u32>, &str); 17] = [
    (DType::Bool, DataType::Bool, None, "bool"),
    (DType::String, DataType::String, None, "string"),
    (DType::F16, DataType::Float16, Some(1), "fp16"),
    (DType::F32, DataType::Float32, Some(2), "fp32"),
    (DType::U8, DataType::Uint8, Some(3), "uint8"),
    (DType::I8, DataType::Int8, Some(4), "int8"),
    (DType::Bf16, DataType::Bfloat16, Some(5), "bf16"),
    (DType::I16, DataType::Int16, Some(6), "int16"),
    (DType::U16, DataType::Uint16, Some(7), "uint16"),
    (DType::I4, DataType::Int4, Some(8), "int4"),
    (DType::U1, DataType::Uint1, Some(9), "uint1"),
    (DType::U2, DataType::Uint2, Some(10), "uint2"),
    (DType::U4, DataType::Uint4, Some(11), "uint4"),
    (DType::U3, DataType::Uint3, Some(12), "uint3"),
    (DType::U6, DataType::Uint6, Some(13), "uint6"),
    (DType::I32, DataType::Int32, Some(14), "int32"),
    (DType::U32, DataType::Uint32, Some(15), "uint32"),
];

impl DType {
    /// The code in the program.
    pub fn mil(self) -> DataType {
        self.row().1
    }

    /// The code in a blob's metadata; `None` for types that the weight file cannot hold.
    pub fn blob_code(self) -> Option<u32> {
        self.row().2
    }

    /// The name that Core ML's text form uses, such as `fp16`.
    pub fn name(self) -> &'static str {
        self.row().3
    }

    /// The type with a MIL code.
    pub(crate) fn from_mil(code: i32) -> Option<Self> {
        TABLE.iter().find(|row| row.1 as i32 == code).map(|row| row.0)
    }

    /// The type with a weight file code.
    pub(crate) fn from_blob_code(code: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.2 == Some(code)).map(|row| row.0)
    }

    /// The type with a name.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.3 == name).map(|row| row.0)
    }

    /// The code in the description; `None` for types that no input or output may have.
    pub fn array_type(self) -> Option<ArrayDataType> {
        match self {
            Self::F16 => Some(ArrayDataType::Float16),
            Self::F32 => Some(ArrayDataType::Float32),
            Self::I32 => Some(ArrayDataType::Int32),
            Self::I8 => Some(ArrayDataType::Int8),
            _ => None,
        }
    }

    /// Bits of one element in the weight file (a string has none).
    pub fn bits(self) -> usize {
        match self {
            Self::String => 0,
            Self::U1 => 1,
            Self::U2 => 2,
            Self::U3 => 3,
            Self::I4 | Self::U4 => 4,
            Self::U6 => 6,
            Self::Bool | Self::I8 | Self::U8 => 8,
            Self::F16 | Self::Bf16 | Self::I16 | Self::U16 => 16,
            Self::F32 | Self::I32 | Self::U32 => 32,
        }
    }

    /// Bytes that `count` elements take, padding bits of the last byte included.
    pub fn byte_len(self, count: usize) -> u64 {
        (count as u64 * self.bits() as u64).div_ceil(8)
    }

    /// Whether elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::F32 | Self::Bf16)
    }

    fn row(self) -> &'static (DType, DataType, Option<u32>, &'static str) {
        // The table names every variant; the test below walks them all.
        TABLE.iter().find(|row| row.0 == self).unwrap_or(&TABLE[0])
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Packs elements of `bits` bits (1 to 8) into a bit stream, least significant bit first.
///
/// Element `i` takes bits `i * bits ..`; elements of 3 and 6 bits cross bytes. Signed elements are packed in two's
/// complement, so pass them as `value as u8`; bits above `bits` are ignored.
///
/// ```
/// use coreml_mil::{pack_bits, unpack_bits};
/// assert_eq!(pack_bits(&[1, 2, 3], 6), [0b10_000001, 0b0011_0000, 0]);
/// assert_eq!(unpack_bits(&pack_bits(&[1, 2, 3], 6), 6, 3), [1, 2, 3]);
/// ```
pub fn pack_bits(values: &[u8], bits: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity((values.len() * bits).div_ceil(8));
    let mask = ((1u32 << bits) - 1) as u8;
    let (mut pending, mut filled) = (0u32, 0usize);
    for value in values {
        pending |= u32::from(value & mask) << filled;
        filled += bits;
        while filled >= 8 {
            out.push(pending as u8);
            pending >>= 8;
            filled -= 8;
        }
    }
    if filled > 0 {
        out.push(pending as u8);
    }
    out
}

/// The first `count` elements of a bit stream of [`pack_bits`], each zero-extended to a byte.
pub fn unpack_bits(packed: &[u8], bits: usize, count: usize) -> Vec<u8> {
    let mask = ((1u32 << bits) - 1) as u8;
    (0..count)
        .map(|i| {
            let (byte, shift) = (i * bits / 8, i * bits % 8);
            let low = u16::from(packed[byte]);
            let high = if shift + bits > 8 {
                u16::from(packed[byte + 1])
            } else {
                0
            };
            ((low | high << 8) >> shift) as u8 & mask
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_type_has_its_own_row() {
        for (dtype, mil, blob, name) in TABLE {
            assert_eq!(dtype.mil(), mil);
            assert_eq!(DType::from_mil(mil as i32), Some(dtype));
            assert_eq!(DType::from_name(name), Some(dtype));
            assert_eq!(blob.and_then(DType::from_blob_code), blob.map(|_| dtype));
        }
    }

    proptest! {
        #[test]
        fn prop_packed_bits_come_back(values in proptest::collection::vec(any::<u8>(), 0..70), bits in 1usize..=8) {
            let mask = ((1u32 << bits) - 1) as u8;
            let want: Vec<u8> = values.iter().map(|v| v & mask).collect();
            let packed = pack_bits(&values, bits);
            prop_assert_eq!(packed.len(), (values.len() * bits).div_ceil(8));
            prop_assert_eq!(unpack_bits(&packed, bits, values.len()), want);
        }
    }
}
