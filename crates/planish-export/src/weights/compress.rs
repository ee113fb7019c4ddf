//! Integer and table forms of weight matrices, one block of rows at a time.

use coreml_mil::{DType, pack_bits, unpack_bits};
use half::f16;

use super::palettize;

/// How the weights of linear layers are stored. Embedding, norms, biases and rotary tables stay fp16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// Half floats.
    Fp16,
    /// One signed byte a weight, one scale an output channel.
    Int8,
    /// Four bits a weight, one scale for each 32 inputs of an output channel.
    Int4,
    /// Four-bit indices, one table of 16 for each 8 output channels.
    Lut4,
    /// Six-bit indices, one table of 64 for each 8 output channels.
    Lut6,
}

/// Output channels that share a table.
const TABLE_ROWS: usize = 8;
/// Inputs that share a scale.
const SCALE_BLOCK: usize = 32;

impl WeightFormat {
    /// Every format, as the command line spells them.
    pub const ALL: [(Self, &'static str); 5] = [
        (Self::Fp16, "fp16"),
        (Self::Int8, "int8"),
        (Self::Int4, "int4"),
        (Self::Lut4, "lut4"),
        (Self::Lut6, "lut6"),
    ];

    /// The name that the command line uses.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }

    /// The form of the head where the layers have this one: four bits give way to more.
    ///
    /// Every error of the head is an error of the logits, and rows of a head, one a token, differ more in size than rows
    /// of a layer; docs/coreml.md has the measurement.
    pub fn of_head(self) -> Self {
        match self {
            Self::Int4 => Self::Int8,
            Self::Lut4 => Self::Lut6,
            other => other,
        }
    }

    /// Bits of a table's index; `None` for formats without tables.
    pub fn lut_bits(self) -> Option<usize> {
        match self {
            Self::Lut4 => Some(4),
            Self::Lut6 => Some(6),
            _ => None,
        }
    }

    /// Type of the stored elements.
    pub fn data_type(self) -> DType {
        match self {
            Self::Fp16 => DType::F16,
            Self::Int8 => DType::I8,
            Self::Int4 => DType::I4,
            Self::Lut4 => DType::U4,
            Self::Lut6 => DType::U6,
        }
    }

    /// Shape of the scales or tables for a weight `[rows, columns, 1, 1]`; empty for fp16.
    pub fn side_shape(self, rows: usize, columns: usize) -> Vec<usize> {
        match self {
            Self::Fp16 => Vec::new(),
            Self::Int8 => vec![rows, 1, 1, 1],
            Self::Int4 => vec![rows, columns / scale_block(columns), 1, 1],
            Self::Lut4 | Self::Lut6 => {
                let entries = 1 << self.data_type().bits();
                vec![rows / table_rows(rows), 1, 1, 1, entries, 1]
            }
        }
    }
}

impl std::str::FromStr for WeightFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(|row| row.1).join(", ");
        Self::ALL
            .iter()
            .find(|row| row.1 == name)
            .map(|row| row.0)
            .ok_or_else(|| format!("expected one of {}", known()))
    }
}

/// The largest block up to 32 that divides the row.
fn scale_block(columns: usize) -> usize {
    (1..=SCALE_BLOCK)
        .rev()
        .find(|b| columns.is_multiple_of(*b))
        .unwrap_or(1)
}

/// The largest group up to 8 that divides the output channels.
fn table_rows(rows: usize) -> usize {
    (1..=TABLE_ROWS).rev().find(|g| rows.is_multiple_of(*g)).unwrap_or(1)
}

/// Rows that may be compressed on their own: whole table groups and whole bytes.
pub(crate) fn row_quantum(rows: usize, format: WeightFormat) -> usize {
    let group = if format.lut_bits().is_some() {
        table_rows(rows)
    } else {
        1
    };
    // Eight rows are whole bytes for any number of bits a weight.
    if group % 8 == 0 { group } else { group * 8 }
}

/// A block of rows in compressed form.
#[derive(Clone, Debug, PartialEq)]
pub struct Compressed {
    /// Packed elements.
    pub data: Vec<u8>,
    /// Scales or tables, in the order of [`WeightFormat::side_shape`].
    pub side: Vec<f16>,
    /// What the reader will compute, `[rows, columns]`.
    pub restored: Vec<f32>,
}

/// Compresses rows of a weight.
///
/// `importance` (of each input, from calibration) weighs the errors; without it all count alike. Scales
/// and tables are rounded to fp16 before the weights are assigned. `total_rows` is the height of the whole weight, on
/// which the grouping depends; the rows must start at a multiple of the group.
pub fn compress(
    weights: &[f32],
    columns: usize,
    total_rows: usize,
    format: WeightFormat,
    importance: Option<&[f32]>,
) -> Compressed {
    match format {
        WeightFormat::Fp16 => to_half(weights),
        WeightFormat::Int8 => scaled(weights, columns, columns, 127, importance, 8),
        WeightFormat::Int4 => scaled(weights, columns, scale_block(columns), 7, importance, 4),
        WeightFormat::Lut4 => tables(weights, columns, table_rows(total_rows), 4, importance),
        WeightFormat::Lut6 => tables(weights, columns, table_rows(total_rows), 6, importance),
    }
}

fn to_half(weights: &[f32]) -> Compressed {
    let halves: Vec<f16> = weights.iter().map(|v| f16::from_f32(*v)).collect();
    let restored = halves.iter().map(|v| v.to_f32()).collect();
    Compressed {
        data: bytemuck::cast_slice(&halves).to_vec(),
        side: Vec::new(),
        restored,
    }
}

/// `data = round(w / scale)` in `−levels−1 ..= levels`, one scale for each `block` weights of a row.
fn scaled(
    weights: &[f32],
    columns: usize,
    block: usize,
    levels: i32,
    importance: Option<&[f32]>,
    bits: usize,
) -> Compressed {
    let mut elements = Vec::with_capacity(weights.len());
    let mut out = Compressed {
        data: Vec::new(),
        side: Vec::new(),
        restored: Vec::with_capacity(weights.len()),
    };
    for (i, part) in weights.chunks(block).enumerate() {
        let first = i * block % columns;
        let scale = best_scale(part, importance.map(|w| &w[first..first + part.len()]), levels);
        out.side.push(scale);
        let scale = scale.to_f32();
        for &w in part {
            let level = quantum(w, scale, levels);
            elements.push(level as i8 as u8);
            // A reader multiplies in fp16.
            out.restored.push(f16::from_f32(level * scale).to_f32());
        }
    }
    out.data = if bits == 8 {
        elements
    } else {
        pack_bits(&elements, bits)
    };
    out
}

fn quantum(weight: f32, scale: f32, levels: i32) -> f32 {
    (weight / scale)
        .round_ties_even()
        .clamp((-levels - 1) as f32, levels as f32)
}

/// The scale with the least weighted squared error among a few that clip the largest weights a little or not at all.
fn best_scale(part: &[f32], importance: Option<&[f32]>, levels: i32) -> f16 {
    let largest = part.iter().fold(0f32, |m, w| m.max(w.abs()));
    if largest == 0.0 {
        return f16::ONE; // any scale will do, but a scale of zero would divide by it
    }
    // With 255 levels clipping gains nothing.
    let candidates = if levels > 100 { 1 } else { 12 };
    let error = |scale: f32| -> f32 {
        let term = |(i, w): (usize, &f32)| {
            let miss = w - quantum(*w, scale, levels) * scale;
            importance.map_or(1.0, |v| v[i]) * miss * miss
        };
        part.iter().enumerate().map(term).sum()
    };
    let scale_of = |i: usize| {
        let scale = f16::from_f32(largest / levels as f32 * (1.0 - 0.03 * i as f32));
        if scale == f16::ZERO { f16::from_bits(1) } else { scale }
    };
    let mut best = (scale_of(0), f32::INFINITY);
    for scale in (0..candidates).map(scale_of) {
        let found = error(scale.to_f32());
        if found < best.1 {
            best = (scale, found);
        }
    }
    best.0
}

fn tables(weights: &[f32], columns: usize, group: usize, bits: usize, importance: Option<&[f32]>) -> Compressed {
    let mut elements = Vec::with_capacity(weights.len());
    let mut out = Compressed {
        data: Vec::new(),
        side: Vec::new(),
        restored: Vec::with_capacity(weights.len()),
    };
    let repeated = importance.map(|w| w.repeat(group));
    for part in weights.chunks(group * columns) {
        let (table, indices) = palettize(part, repeated.as_ref().map(|w| &w[..part.len()]), bits);
        out.restored
            .extend(indices.iter().map(|&i| table[usize::from(i)].to_f32()));
        out.side.extend(table);
        elements.extend(indices);
    }
    out.data = pack_bits(&elements, bits);
    out
}

/// What a reader that multiplies in fp16 computes from the stored form: the inverse of [`compress`], for checks.
pub fn dequantize(data: &[u8], side: &[f16], rows: usize, columns: usize, format: WeightFormat) -> Vec<f32> {
    let exact = restore(data, side, [rows, columns], rows, format);
    exact.into_iter().map(|value| f16::from_f32(value).to_f32()).collect()
}

/// The stored weights in exact arithmetic, `[rows, columns]`; `total_rows` is the height of the whole weight.
pub fn restore(
    data: &[u8],
    side: &[f16],
    [rows, columns]: [usize; 2],
    total_rows: usize,
    format: WeightFormat,
) -> Vec<f32> {
    let count = rows * columns;
    let scaled = |block: usize, level: &dyn Fn(usize) -> f32| -> Vec<f32> {
        (0..count).map(|i| level(i) * side[i / block].to_f32()).collect()
    };
    match format {
        WeightFormat::Fp16 => data
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        WeightFormat::Int8 => scaled(columns, &|i| f32::from(data[i] as i8)),
        WeightFormat::Int4 => {
            let elements = unpack_bits(data, 4, count);
            scaled(scale_block(columns), &|i| f32::from((elements[i] << 4) as i8 >> 4))
        }
        WeightFormat::Lut4 | WeightFormat::Lut6 => {
            let bits = format.data_type().bits();
            let per_table = table_rows(total_rows) * columns;
            let elements = unpack_bits(data, bits, count);
            (0..count)
                .map(|i| side[((i / per_table) << bits) + usize::from(elements[i])].to_f32())
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn relative_error(weights: &[f32], restored: &[f32]) -> f64 {
        let square = |v: f64| v * v;
        let miss: f64 = weights
            .iter()
            .zip(restored)
            .map(|(a, b)| square(f64::from(a - b)))
            .sum();
        let size: f64 = weights.iter().map(|a| square(f64::from(*a))).sum();
        (miss / size).sqrt()
    }

    /// Approximately normal numbers without a dependency: sums of uniform ones.
    fn bell(count: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..12).map(|_| uniform()).sum()).collect()
    }

    #[test]
    fn more_bits_err_less() {
        let weights = bell(64 * 96);
        let error = |format| relative_error(&weights, &compress(&weights, 96, 64, format, None).restored);
        let [int8, int4, lut4, lut6] = [
            WeightFormat::Int8,
            WeightFormat::Int4,
            WeightFormat::Lut4,
            WeightFormat::Lut6,
        ]
        .map(error);
        assert!(int8 < 0.01, "{int8}");
        assert!(lut6 < 0.035, "{lut6}");
        assert!(lut4 < 0.11, "{lut4}");
        assert!(int4 < 0.11, "{int4}");
        assert!(int8 < lut6 && lut6 < lut4);
    }

    #[test]
    fn zero_weights_stay_zero() {
        for (format, _) in WeightFormat::ALL {
            let out = compress(&[0.0; 16 * 32], 32, 16, format, None);
            assert!(out.restored.iter().all(|v| *v == 0.0), "{format:?}");
            assert!(out.side.iter().all(|v| v.is_finite()), "{format:?}");
        }
    }

    proptest! {
        #[test]
        fn prop_stored_form_reads_back_as_reported(rows in 1usize..20, columns in 1usize..70, size in -20f32..4.0, which in 0usize..5) {
            let format = WeightFormat::ALL[which].0;
            let weights: Vec<f32> = bell(rows * columns).iter().map(|v| v * size.exp2()).collect();
            let out = compress(&weights, columns, rows, format, None);
            let side: usize = format.side_shape(rows, columns).iter().product();
            prop_assert_eq!(out.side.len(), if format == WeightFormat::Fp16 { 0 } else { side });
            prop_assert_eq!(out.data.len() as u64, format.data_type().byte_len(rows * columns));
            prop_assert_eq!(dequantize(&out.data, &out.side, rows, columns, format), out.restored);
        }
    }
}
