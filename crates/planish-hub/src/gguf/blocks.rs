//! From quantised blocks to f32, as the format defines it: each formula in f32, in the order of the reference.

use half::{bf16, f16};

use super::TensorType;

/// Writes the numbers of `bytes` to `out`.
///
/// With `q` an integer of the block, `d` its scale and `m` its minimum (both stored as f16): `d·q` for the symmetric
/// types, `d·q + m` for `Q4_1` and `Q5_1`; the `K` types have super-blocks of 256 with small integer scales `s` (and
/// minima `t`) for each 16 or 32 numbers: `(d·s)·q` or `(d·s)·q − m·t`.
///
/// # Panics
/// When `bytes` is not exactly as long as `out.len()` numbers of this type.
///
/// # Example
/// ```
/// use planish_hub::gguf::{dequantize, TensorType};
/// let mut block = vec![0x00, 0x3c]; // scale 1.0 in f16
/// block.extend(1..=32);
/// let mut out = [0.0; 32];
/// dequantize(TensorType::Q8_0, &block, &mut out);
/// assert_eq!((out[0], out[31]), (1.0, 32.0));
/// ```
pub fn dequantize(kind: TensorType, bytes: &[u8], out: &mut [f32]) {
    let expected = kind.bytes_for(out.len() as u64);
    assert_eq!(
        Some(bytes.len() as u64),
        expected,
        "{} numbers of type {}",
        out.len(),
        kind.name()
    );
    let block = match kind {
        TensorType::F32 => |b: &[u8], y: &mut [f32]| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        TensorType::F16 => |b: &[u8], y: &mut [f32]| y[0] = half_at(b, 0),
        TensorType::BF16 => |b: &[u8], y: &mut [f32]| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        TensorType::Q4_0 => q4_0,
        TensorType::Q4_1 => q4_1,
        TensorType::Q5_0 => q5_0,
        TensorType::Q5_1 => q5_1,
        TensorType::Q8_0 => q8_0,
        TensorType::Q2_K => q2_k,
        TensorType::Q3_K => q3_k,
        TensorType::Q4_K => q4_k,
        TensorType::Q5_K => q5_k,
        TensorType::Q6_K => q6_k,
    };
    for (b, y) in bytes
        .chunks_exact(kind.block_bytes())
        .zip(out.chunks_exact_mut(kind.block_len()))
    {
        block(b, y);
    }
}

/// The f16 at byte `at`.
fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn q4_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    for (j, q) in b[2..18].iter().enumerate() {
        y[j] = d * (i32::from(q & 15) - 8) as f32;
        y[j + 16] = d * (i32::from(q >> 4) - 8) as f32;
    }
}

fn q4_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for (j, q) in b[4..20].iter().enumerate() {
        y[j] = d * f32::from(q & 15) + m;
        y[j + 16] = d * f32::from(q >> 4) + m;
    }
}

fn q5_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    let fifth_bits = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for (j, q) in b[6..22].iter().enumerate() {
        y[j] = d * (i32::from(fifth(q & 15, fifth_bits, j)) - 16) as f32;
        y[j + 16] = d * (i32::from(fifth(q >> 4, fifth_bits, j + 16)) - 16) as f32;
    }
}

fn q5_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let fifth_bits = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for (j, q) in b[8..24].iter().enumerate() {
        y[j] = d * f32::from(fifth(q & 15, fifth_bits, j)) + m;
        y[j + 16] = d * f32::from(fifth(q >> 4, fifth_bits, j + 16)) + m;
    }
}

/// Four low bits and the fifth, which is bit `j` of a separate word.
fn fifth(low: u8, fifth_bits: u32, j: usize) -> u8 {
    low | (((fifth_bits >> j) & 1) as u8) << 4
}

fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    for (y, q) in y.iter_mut().zip(&b[2..34]) {
        *y = d * f32::from(*q as i8);
    }
}

/// 16 scales and minima of 4 bits, then 256 numbers of 2 bits, then `d`, `m`.
fn q2_k(b: &[u8], y: &mut [f32]) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, m) = (half_at(b, 80), half_at(b, 82));
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let (scale, minimum) = (d * f32::from(scales[group] & 15), m * f32::from(scales[group] >> 4));
        let (first, shift) = two_bit_place(group);
        for (l, y) in y.iter_mut().enumerate() {
            *y = scale * f32::from((qs[first + l] >> shift) & 3) - minimum;
        }
    }
}

/// 256 third bits (inverted), 256 numbers of 2 bits, 16 scales of 6 bits, then `d`.
fn q3_k(b: &[u8], y: &mut [f32]) {
    let (third_bits, qs, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half_at(b, 108);
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let low = if group < 8 {
            scales[group] & 15
        } else {
            scales[group - 8] >> 4
        };
        let high = (scales[8 + group % 4] >> (2 * (group / 4))) & 3;
        let scale = d * (i32::from(low | high << 4) - 32) as f32;
        let (first, shift) = two_bit_place(group);
        // Bit 4·(which half) + (which quarter of it) of a byte whose place repeats every 32 numbers.
        let third_bit = group / 2;
        for (l, y) in y.iter_mut().enumerate() {
            let third = (third_bits[first % 32 + l] >> third_bit) & 1;
            let q = i32::from((qs[first + l] >> shift) & 3) - if third == 0 { 4 } else { 0 };
            *y = scale * q as f32;
        }
    }
}

/// Where the 16 two-bit numbers of a group lie: first byte and shift. Each 32 bytes hold 128 numbers, quarter by quarter.
fn two_bit_place(group: usize) -> (usize, usize) {
    (32 * (group / 8) + 16 * (group % 2), 2 * ((group % 8) / 2))
}

/// `d`, `m`, 8 scales and minima of 6 bits, 256 numbers of 4 bits.
fn q4_k(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let (scales, qs) = (&b[4..16], &b[16..144]);
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (s, t) = six_bit_pair(scales, group);
        let (scale, minimum) = (d * f32::from(s), m * f32::from(t));
        let (first, shift) = (32 * (group / 2), 4 * (group % 2));
        for (l, y) in y.iter_mut().enumerate() {
            *y = scale * f32::from((qs[first + l] >> shift) & 15) - minimum;
        }
    }
}

/// As `Q4_K`, with 256 fifth bits between the scales and the numbers.
fn q5_k(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let (scales, fifth_bits, qs) = (&b[4..16], &b[16..48], &b[48..176]);
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (s, t) = six_bit_pair(scales, group);
        let (scale, minimum) = (d * f32::from(s), m * f32::from(t));
        let (first, shift) = (32 * (group / 2), 4 * (group % 2));
        for (l, y) in y.iter_mut().enumerate() {
            let q = (qs[first + l] >> shift) & 15 | ((fifth_bits[l] >> group) & 1) << 4;
            *y = scale * f32::from(q) - minimum;
        }
    }
}

/// Scale and minimum of group `j`: eight pairs of 6-bit numbers in 12 bytes.
fn six_bit_pair(scales: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        (
            scales[j + 4] & 15 | (scales[j - 4] >> 6) << 4,
            scales[j + 4] >> 4 | (scales[j] >> 6) << 4,
        )
    }
}

/// 256 times 4 low bits, 256 times 2 high bits, 16 signed scales of 8 bits, then `d`.
fn q6_k(b: &[u8], y: &mut [f32]) {
    let (lows, highs, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half_at(b, 208);
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[group] as i8);
        // Half of the super-block, quarter of the half (32 numbers), place within the quarter.
        let (half, quarter, place) = (group / 8, (group % 8) / 2, 16 * (group % 2));
        for (l, y) in y.iter_mut().enumerate() {
            let low = lows[64 * half + 32 * (quarter % 2) + place + l] >> (4 * (quarter / 2)) & 15;
            let high = highs[32 * half + place + l] >> (2 * quarter) & 3;
            *y = scale * (i32::from(low | high << 4) - 32) as f32;
        }
    }
}
