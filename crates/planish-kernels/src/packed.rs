//! Matrix products with a constant bf16 matrix that was packed beforehand.

#![allow(unsafe_code)] // vector loads and stores, and disjoint tiles of one output written by several threads

use half::bf16;
use rayon::prelude::*;

use crate::simd::{Level, level};

/// Columns of a panel: two vectors of sixteen f32.
const PANEL: usize = 32;

/// Rows that a tile computes at once: 12 · 2 accumulators, and registers left for the operands.
const ROWS: usize = 12;

/// A constant matrix in bf16, in the order in which its products are computed.
///
/// `multiply` gives `out = x · M` with `x` rounded to bf16 (nearest even) and sums in f32: the arithmetic of a bf16 linear
/// layer, except that the result is not rounded. Half the memory traffic of f32, and on processors with AVX-512 BF16 twice
/// its speed or more. Elsewhere the same numbers come from plain code, which is slow: ask [`is_fast`](Self::is_fast).
///
/// # Example
/// ```
/// use planish_kernels::PackedMatrix;
/// // W [2 outputs, 3 inputs] of a linear layer; y = x Wᵀ.
/// let weight = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
/// let forward = PackedMatrix::transposed(&weight, 2, 3);
/// let mut y = [0.0; 2];
/// forward.multiply(&[1.0, 10.0, 100.0], None, &mut y);
/// assert_eq!(y, [321.0, 654.0]);
/// ```
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    /// Rows of M, the length of a sum.
    inner: usize,
    /// Columns of M.
    columns: usize,
    /// `[columns / 32][inner / 2][32]` pairs of neighbouring rows, zero-padded.
    pairs: Vec<u32>,
}

/// A product of low rank that is added to a result while it is in registers: `out += left · right`, in f32.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// `[rows, rank]`.
    pub left: &'a [f32],
    /// `[rank, columns]`.
    pub right: &'a [f32],
    /// Inner size.
    pub rank: usize,
}

/// What a product is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AddTo {
    /// Nothing: the output holds no numbers yet.
    Nothing,
    /// The numbers that the output holds.
    Sum,
}

/// The weight of a linear layer `y = x Wᵀ`, packed for both directions.
#[derive(Debug, Clone)]
pub struct PackedLinear {
    /// `[input, output]`: inputs to outputs.
    pub forward: PackedMatrix,
    /// `[output, input]`: gradients of outputs to gradients of inputs.
    pub backward: PackedMatrix,
}

impl PackedLinear {
    /// Packs `W` `[output_dims, input_dims]`.
    pub fn new(weight: &[f32], output_dims: usize, input_dims: usize) -> Self {
        Self {
            forward: PackedMatrix::transposed(weight, output_dims, input_dims),
            backward: PackedMatrix::plain(weight, output_dims, input_dims),
        }
    }

    /// Width of the input.
    pub fn input_dims(&self) -> usize {
        self.forward.inner
    }

    /// Width of the output.
    pub fn output_dims(&self) -> usize {
        self.forward.columns
    }
}

impl PackedMatrix {
    /// Whether products run on bf16 instructions here.
    pub fn is_fast() -> bool {
        level() == Level::Avx512Bf16
    }

    /// Packs `M = Wᵀ` from `W` `[columns, inner]`, row by row: what a linear layer multiplies by.
    pub fn transposed(weight: &[f32], columns: usize, inner: usize) -> Self {
        assert_eq!(weight.len(), columns * inner);
        Self::pack(inner, columns, |row, column| weight[column * inner + row])
    }

    /// Packs `M` `[inner, columns]` as it is: what the gradient of a linear layer multiplies by.
    pub fn plain(matrix: &[f32], inner: usize, columns: usize) -> Self {
        assert_eq!(matrix.len(), columns * inner);
        Self::pack(inner, columns, |row, column| matrix[row * columns + column])
    }

    /// Rows of the matrix.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Columns of the matrix.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// `out = x · M (+ low_rank.left · low_rank.right)`; `x` is `[rows, inner]`, `out` `[rows, columns]`.
    pub fn multiply(&self, x: &[f32], low_rank: Option<LowRank<'_>>, out: &mut [f32]) {
        self.product(x, low_rank, AddTo::Nothing, out);
    }

    /// The same, added to what `out` holds.
    pub fn multiply_add(&self, x: &[f32], low_rank: Option<LowRank<'_>>, out: &mut [f32]) {
        self.product(x, low_rank, AddTo::Sum, out);
    }

    /// The numbers inside, `[columns, inner]` row by row: the `W` of [`transposed`](Self::transposed), rounded to bf16.
    pub fn unpack_transposed(&self) -> Vec<f32> {
        let half_inner = self.inner.div_ceil(2);
        let mut weight = vec![0.0; self.columns * self.inner];
        weight
            .par_chunks_mut(self.inner)
            .enumerate()
            .for_each(|(column, line)| {
                for (row, value) in line.iter_mut().enumerate() {
                    let pair = self.pairs[(column / PANEL * half_inner + row / 2) * PANEL + column % PANEL];
                    *value = bf16::from_bits((pair >> (row % 2 * 16)) as u16).to_f32();
                }
            });
        weight
    }

    /// Bytes that the matrix takes.
    pub fn bytes(&self) -> usize {
        size_of_val(self.pairs.as_slice())
    }

    fn product(&self, x: &[f32], low_rank: Option<LowRank<'_>>, add_to: AddTo, out: &mut [f32]) {
        let rows = x.len() / self.inner;
        assert_eq!(x.len(), rows * self.inner);
        assert_eq!(out.len(), rows * self.columns);
        if let Some(update) = low_rank {
            assert_eq!(update.left.len(), rows * update.rank);
            assert_eq!(update.right.len(), update.rank * self.columns);
        }
        #[cfg(target_arch = "x86_64")]
        if Self::is_fast() {
            // SAFETY: the processor has the instructions.
            return unsafe { fast::multiply(self, x, rows, low_rank, add_to, out) };
        }
        self.multiply_plainly(x, low_rank, add_to, out);
    }

    fn pack(inner: usize, columns: usize, at: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let half_inner = inner.div_ceil(2);
        let mut pairs = vec![0_u32; columns.div_ceil(PANEL) * half_inner * PANEL];
        pairs
            .par_chunks_mut(half_inner * PANEL)
            .enumerate()
            .for_each(|(panel, chunk)| {
                let bits = |row: usize, column: usize| match row < inner && column < columns {
                    true => u32::from(bf16::from_f32(at(row, column)).to_bits()),
                    false => 0,
                };
                for (index, pair) in chunk.iter_mut().enumerate() {
                    let (row, column) = (index / PANEL * 2, panel * PANEL + index % PANEL);
                    *pair = bits(row, column) | bits(row + 1, column) << 16;
                }
            });
        Self { inner, columns, pairs }
    }

    /// The definition, for processors without the instructions and for tests.
    fn multiply_plainly(&self, x: &[f32], low_rank: Option<LowRank<'_>>, add_to: AddTo, out: &mut [f32]) {
        let half_inner = self.inner.div_ceil(2);
        let rows = out
            .par_chunks_mut(self.columns)
            .zip(x.par_chunks(self.inner))
            .enumerate();
        rows.for_each(|(row, (out, x))| {
            if add_to == AddTo::Nothing {
                out.fill(0.0);
            }
            for (k, x) in x.iter().enumerate() {
                let x = bf16::from_f32(*x).to_f32();
                for (column, out) in out.iter_mut().enumerate() {
                    let pair = self.pairs[(column / PANEL * half_inner + k / 2) * PANEL + column % PANEL];
                    *out += x * bf16::from_bits((pair >> (k % 2 * 16)) as u16).to_f32();
                }
            }
            for (r, left) in low_rank
                .iter()
                .flat_map(|u| u.left[row * u.rank..][..u.rank].iter().map(move |l| (u, l)))
                .enumerate()
            {
                let (update, left) = left;
                for (out, right) in out.iter_mut().zip(&update.right[r * self.columns..]) {
                    *out += left * right;
                }
            }
        });
    }
}

#[cfg(target_arch = "x86_64")]
mod fast {
    use std::arch::x86_64::*;
    use std::cell::RefCell;
    use std::ops::Range;

    use rayon::prelude::*;

    use super::{AddTo, LowRank, PANEL, PackedMatrix, ROWS};

    /// Bytes of packed rows that a task keeps in its second-level cache beside one panel of the matrix.
    const BLOCK_BYTES: usize = 384 << 10;

    /// Pairs of inner rows that a task goes through before it starts over with the next ones: a long sum is cut, so that
    /// what it reads stays in the cache.
    const INNER_BLOCK: usize = 1024;

    /// Rows of packed pairs: `[panel of 12 rows][inner / 2][12]`.
    struct PackedRows {
        pairs: Vec<u32>,
    }

    /// An output that several tasks write, each its own tiles.
    #[derive(Clone, Copy)]
    struct Shared(*mut f32);
    // SAFETY: tasks write disjoint tiles.
    unsafe impl Send for Shared {}
    // SAFETY: as above.
    unsafe impl Sync for Shared {}

    impl Shared {
        fn get(self) -> *mut f32 {
            self.0
        }
    }

    thread_local! {
        static ROWS_BUFFER: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
    }

    /// # Safety
    /// AVX-512 F and BF16 must be there; lengths as `PackedMatrix::multiply` checked them.
    pub(super) unsafe fn multiply(
        matrix: &PackedMatrix,
        x: &[f32],
        rows: usize,
        low_rank: Option<LowRank<'_>>,
        add_to: AddTo,
        out: &mut [f32],
    ) {
        let half_inner = matrix.inner.div_ceil(2);
        let panels_of_rows = rows.div_ceil(ROWS);
        let mut packed = PackedRows {
            pairs: ROWS_BUFFER.take(),
        };
        packed.pairs.resize(panels_of_rows * half_inner * ROWS, 0);
        packed
            .pairs
            .par_chunks_mut(half_inner * ROWS)
            .enumerate()
            .for_each(|(panel, pairs)| {
                // SAFETY: the caller promised the instructions.
                unsafe {
                    pack_rows(
                        &x[panel * ROWS * matrix.inner..],
                        (rows - panel * ROWS).min(ROWS),
                        matrix.inner,
                        pairs,
                    )
                };
            });

        let block = (BLOCK_BYTES / (half_inner.min(INNER_BLOCK) * ROWS * 4)).clamp(1, panels_of_rows.max(1));
        let blocks = panels_of_rows.div_ceil(block);
        let panels = matrix.columns.div_ceil(PANEL);
        // Enough tasks that the last ones even out, few enough that each is worth starting.
        let tasks_wanted = 4 * rayon::current_num_threads();
        let splits = tasks_wanted.div_ceil(blocks.max(1)).clamp(1, panels);
        let per_split = panels.div_ceil(splits);
        let shared = Shared(out.as_mut_ptr());
        let tasks = blocks * panels.div_ceil(per_split);
        (0..tasks).into_par_iter().for_each(|task| {
            let (block_idx, split) = (task % blocks, task / blocks);
            let row_panels = block_idx * block..((block_idx + 1) * block).min(panels_of_rows);
            for start in (0..half_inner).step_by(INNER_BLOCK) {
                let inner = start..(start + INNER_BLOCK).min(half_inner);
                // The low-rank part joins the last piece of the sum.
                let low_rank = low_rank.filter(|_| inner.end == half_inner);
                for panel in split * per_split..((split + 1) * per_split).min(panels) {
                    for row_panel in row_panels.clone() {
                        let pairs = &packed.pairs[row_panel * half_inner * ROWS..][..half_inner * ROWS];
                        let place = Place {
                            panel,
                            inner: inner.clone(),
                            first_row: row_panel * ROWS,
                            rows,
                            adds: start > 0 || add_to == AddTo::Sum,
                        };
                        // SAFETY: tiles of different tasks do not overlap.
                        unsafe { tile(matrix, pairs, &place, low_rank, shared.get()) };
                    }
                }
            }
        });
        ROWS_BUFFER.set(packed.pairs);
    }

    /// Rounds rows to bf16 pairs, interleaved so that one tile step reads twelve neighbours.
    #[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl,avx512dq")]
    unsafe fn pack_rows(x: &[f32], rows: usize, inner: usize, pairs: &mut [u32]) {
        for row in 0..ROWS {
            if row >= rows {
                pairs.iter_mut().skip(row).step_by(ROWS).for_each(|pair| *pair = 0);
                continue;
            }
            let line = &x[row * inner..][..inner];
            let mut chunks = line.chunks_exact(16);
            let mut at = row;
            for chunk in &mut chunks {
                // SAFETY: sixteen numbers are there; the result is sixteen bf16.
                let rounded: [u32; 8] =
                    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(chunk.as_ptr()))) };
                for pair in rounded {
                    pairs[at] = pair;
                    at += ROWS;
                }
            }
            for rest in chunks.remainder().chunks(2) {
                let bits = |value: Option<&f32>| value.map_or(0, |v| u32::from(half::bf16::from_f32(*v).to_bits()));
                pairs[at] = bits(rest.first()) | bits(rest.get(1)) << 16;
                at += ROWS;
            }
        }
    }

    /// Which part of which tile.
    struct Place {
        /// Panel of columns.
        panel: usize,
        /// Pairs of inner rows.
        inner: Range<usize>,
        first_row: usize,
        /// Rows of the whole output.
        rows: usize,
        /// Whether the output holds a part of the sum.
        adds: bool,
    }

    /// Computes up to 12 rows of one panel.
    ///
    /// # Safety
    /// `out` is `[rows, columns]`; nobody else touches this tile.
    #[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl,avx512dq")]
    unsafe fn tile(matrix: &PackedMatrix, pairs: &[u32], place: &Place, low_rank: Option<LowRank<'_>>, out: *mut f32) {
        // SAFETY: passed on.
        unsafe {
            match (place.rows - place.first_row).min(ROWS) {
                1 => tile_of::<1>(matrix, pairs, place, low_rank, out),
                2 => tile_of::<2>(matrix, pairs, place, low_rank, out),
                3 | 4 => tile_of::<4>(matrix, pairs, place, low_rank, out),
                5..=8 => tile_of::<8>(matrix, pairs, place, low_rank, out),
                _ => tile_of::<ROWS>(matrix, pairs, place, low_rank, out),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl,avx512dq")]
    #[inline]
    unsafe fn tile_of<const R: usize>(
        matrix: &PackedMatrix,
        pairs: &[u32],
        place: &Place,
        low_rank: Option<LowRank<'_>>,
        out: *mut f32,
    ) {
        let half_inner = matrix.inner.div_ceil(2);
        let (column, first_row) = (place.panel * PANEL, place.first_row);
        let valid = (place.rows - first_row).min(R);
        let [low, high] = masks((matrix.columns - column).min(PANEL));
        // SAFETY: the panel holds half_inner · 32 pairs and `pairs` half_inner · 12; loads and stores of the output are
        // masked to the tile's width and stop at its last row.
        unsafe {
            let left = pairs.as_ptr().add(place.inner.start * ROWS);
            let right = matrix
                .pairs
                .as_ptr()
                .add((place.panel * half_inner + place.inner.start) * PANEL);
            let mut sums = accumulate::<R>(left, right, place.inner.len());
            for r in 0..low_rank.map_or(0, |update| update.rank) {
                let Some(update) = low_rank else { break };
                let line = update.right.as_ptr().add(r * matrix.columns + column);
                let b0 = _mm512_maskz_loadu_ps(low, line);
                let b1 = _mm512_maskz_loadu_ps(high, line.wrapping_add(16));
                for (row, sum) in sums.iter_mut().enumerate().take(valid) {
                    let a = _mm512_set1_ps(*update.left.get_unchecked((first_row + row) * update.rank + r));
                    sum[0] = _mm512_fmadd_ps(a, b0, sum[0]);
                    sum[1] = _mm512_fmadd_ps(a, b1, sum[1]);
                }
            }
            for (row, sum) in sums.iter_mut().enumerate().take(valid) {
                let line = out.add((first_row + row) * matrix.columns + column);
                if place.adds {
                    sum[0] = _mm512_add_ps(sum[0], _mm512_maskz_loadu_ps(low, line));
                    sum[1] = _mm512_add_ps(sum[1], _mm512_maskz_loadu_ps(high, line.wrapping_add(16)));
                }
                _mm512_mask_storeu_ps(line, low, sum[0]);
                _mm512_mask_storeu_ps(line.wrapping_add(16), high, sum[1]);
            }
        }
    }

    /// The sums of a tile over `steps` pairs of inner rows.
    ///
    /// Not inlined: where the sums are indexed by variables later, the compiler would store all of them in every step.
    ///
    /// # Safety
    /// `left` holds `steps · 12` pairs and `right` `steps · 32`.
    #[target_feature(enable = "avx512f,avx512bf16,avx512bw,avx512vl,avx512dq")]
    #[inline(never)]
    unsafe fn accumulate<const R: usize>(
        mut left: *const u32,
        mut right: *const u32,
        steps: usize,
    ) -> [[__m512; 2]; R] {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        // SAFETY: promised by the caller.
        unsafe {
            for _ in 0..steps {
                let b0: __m512bh = std::mem::transmute(_mm512_loadu_epi32(right.cast()));
                let b1: __m512bh = std::mem::transmute(_mm512_loadu_epi32(right.add(16).cast()));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let a: __m512bh = std::mem::transmute(_mm512_set1_epi32(*left.add(row) as i32));
                    sum[0] = _mm512_dpbf16_ps(sum[0], a, b0);
                    sum[1] = _mm512_dpbf16_ps(sum[1], a, b1);
                }
                left = left.add(ROWS);
                right = right.add(PANEL);
            }
        }
        sums
    }

    /// Which of 32 columns exist, for two vectors.
    fn masks(width: usize) -> [u16; 2] {
        let bits = ((1_u64 << width) - 1) as u32;
        [bits as u16, (bits >> 16) as u16]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in [−1, 1) that repeat after a long while.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_769).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn check(rows: usize, inner: usize, columns: usize, rank: usize) {
        let (x, m) = (numbers(rows * inner, 1), numbers(inner * columns, 2));
        let (left, right) = (numbers(rows * rank, 3), numbers(rank * columns, 4));
        let update = (rank > 0).then_some(LowRank {
            left: &left,
            right: &right,
            rank,
        });
        let packed = PackedMatrix::plain(&m, inner, columns);
        let mut found = vec![f32::NAN; rows * columns];
        packed.multiply(&x, update, &mut found);
        let round = |v: f32| f64::from(bf16::from_f32(v).to_f32());
        for row in 0..rows {
            for column in 0..columns {
                let product = |k: usize| round(x[row * inner + k]) * round(m[k * columns + column]);
                let low = |r: usize| f64::from(left[row * rank + r]) * f64::from(right[r * columns + column]);
                let expect = (0..inner).map(product).sum::<f64>() + (0..rank).map(low).sum::<f64>();
                let found = f64::from(found[row * columns + column]);
                // f32 sums of `inner` products below 1.
                assert!(
                    (found - expect).abs() < 1e-6 * (inner as f64).max(8.0),
                    "{rows}×{inner}×{columns} at {row},{column}: {found} {expect}"
                );
            }
        }
    }

    #[test]
    fn products_of_every_edge() {
        for rows in [1, 2, 3, 5, 8, 9, 12, 13, 25, 50] {
            for (inner, columns) in [(1, 1), (2, 31), (3, 32), (17, 33), (64, 48), (50, 100)] {
                check(rows, inner, columns, 0);
                check(rows, inner, columns, 3);
            }
        }
        check(300, 130, 70, 8);
        // Longer than one block of the sum.
        check(14, 4500, 40, 2);
    }

    #[test]
    fn plain_code_and_vector_code_agree() {
        let (rows, inner, columns) = (37, 45, 67);
        let (x, m) = (numbers(rows * inner, 1), numbers(inner * columns, 2));
        let packed = PackedMatrix::plain(&m, inner, columns);
        let (mut one, mut other) = (vec![0.0; rows * columns], vec![0.0; rows * columns]);
        packed.multiply(&x, None, &mut one);
        packed.multiply_plainly(&x, None, AddTo::Nothing, &mut other);
        assert!(one.iter().zip(&other).all(|(a, b)| (a - b).abs() < 1e-4));
    }

    #[test]
    fn sums_are_added_to() {
        let (rows, inner, columns) = (37, 45, 67);
        let (x, m) = (numbers(rows * inner, 1), numbers(inner * columns, 2));
        let packed = PackedMatrix::plain(&m, inner, columns);
        let mut once = vec![0.0; rows * columns];
        packed.multiply(&x, None, &mut once);
        let (mut fast, mut plain) = (once.clone(), once.clone());
        packed.multiply_add(&x, None, &mut fast);
        packed.multiply_plainly(&x, None, AddTo::Sum, &mut plain);
        for found in [fast, plain] {
            assert!(
                found
                    .iter()
                    .zip(&once)
                    .all(|(twice, once)| (twice - 2.0 * once).abs() < 1e-4)
            );
        }
    }

    #[test]
    fn unpacking_gives_the_rounded_weight() {
        let (inner, columns) = (7, 40);
        let weight = numbers(inner * columns, 5);
        let rounded: Vec<f32> = weight.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
        assert_eq!(
            PackedMatrix::transposed(&weight, columns, inner).unpack_transposed(),
            rounded
        );
    }

    #[test]
    fn transposed_packing_equals_packing_the_transpose() {
        let (inner, columns) = (7, 40);
        let weight = numbers(inner * columns, 5); // [columns, inner]
        let transpose: Vec<f32> = (0..inner * columns)
            .map(|i| weight[i % columns * inner + i / columns])
            .collect();
        let one = PackedMatrix::transposed(&weight, columns, inner);
        assert_eq!(one.pairs, PackedMatrix::plain(&transpose, inner, columns).pairs);
    }
}
