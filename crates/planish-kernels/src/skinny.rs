//! Products with a matrix of few rows: what a low-rank update adds to a linear layer, forward and backward.

#![allow(unsafe_code)] // calls of vector code

use rayon::prelude::*;

use crate::elementwise::dot;
use crate::simd::{mul_add, multiversion};

/// Rows of the tall matrix in a parallel piece.
const PIECE: usize = 32;

/// Columns that are summed in registers at once: with eight rows of sums they fill sixteen.
const COLUMNS: usize = 32;

/// Columns of a task.
const STRIPE: usize = 8 * COLUMNS;

/// Rows that are gone down before the next columns: they stay in the first-level cache.
const ROWS: usize = 32;

/// Rows of sums that are kept in registers at once.
const GROUP: usize = 8;

/// `out[t, r] = scale · Σ_n x[t, n] · w[r, n]`: a tall matrix times the transpose of one with few rows.
///
/// `x` is `[t, n]`, `w` `[rank, n]`, `out` `[t, rank]`.
pub fn skinny_product(x: &[f32], w: &[f32], rank: usize, scale: f32, out: &mut [f32]) {
    let width = w.len() / rank;
    assert!(w.len() == rank * width && x.len() * rank == out.len() * width);
    out.par_chunks_mut(PIECE * rank)
        .zip(x.par_chunks(PIECE * width))
        .for_each(|(out, x)| product_piece(x, w, rank, scale, out));
}

/// `out[r, n] = Σ_t c[t, r] · y[t, n]`: the transpose of a matrix with few columns times a tall one.
///
/// `c` is `[t, rank]`, `y` `[t, n]`, `out` `[rank, n]`.
pub fn skinny_transposed_product(c: &[f32], y: &[f32], rank: usize, out: &mut [f32]) {
    let width = out.len() / rank;
    assert!(out.len() == rank * width && c.len() * width == y.len() * rank);
    // Stripes of columns are summed apart, each [rank, columns] in one piece, and put in place afterwards.
    let stripes: Vec<Vec<f32>> = (0..width.div_ceil(STRIPE))
        .into_par_iter()
        .map(|stripe| {
            let columns = stripe * STRIPE..((stripe + 1) * STRIPE).min(width);
            let mut sums = vec![0.0; rank * columns.len()];
            for (c, y) in c.chunks(ROWS * rank).zip(y.chunks(ROWS * width)) {
                add_sums(c, y, rank, width, columns.start, &mut sums);
            }
            sums
        })
        .collect();
    for (stripe, sums) in stripes.iter().enumerate() {
        let columns = sums.len() / rank;
        for (r, line) in sums.chunks_exact(columns).enumerate() {
            out[r * width + stripe * STRIPE..][..columns].copy_from_slice(line);
        }
    }
}

/// `[rows, columns]` to `[columns, rows]`.
pub fn transpose(matrix: &[f32], columns: usize, out: &mut [f32]) {
    let rows = matrix.len() / columns;
    assert!(matrix.len() == rows * columns && out.len() == matrix.len());
    for (row, line) in matrix.chunks_exact(columns).enumerate() {
        for (column, value) in line.iter().enumerate() {
            out[column * rows + row] = *value;
        }
    }
}

multiversion! { fn product_piece = product_body(x: &[f32], w: &[f32], rank: usize, scale: f32, out: &mut [f32]) }

#[inline(always)]
fn product_body<const FMA: bool>(x: &[f32], w: &[f32], rank: usize, scale: f32, out: &mut [f32]) {
    let width = w.len() / rank;
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(rank)) {
        let mut groups = out.chunks_exact_mut(GROUP);
        let mut lines = w.chunks_exact(GROUP * width);
        for (out, w) in (&mut groups).zip(&mut lines) {
            let sums = dots::<FMA>(x, w);
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = scale * sum;
            }
        }
        let rest = lines.remainder().chunks_exact(width);
        for (out, w) in groups.into_remainder().iter_mut().zip(rest) {
            *out = scale * dot::<FMA>(x, w);
        }
    }
}

/// Eight dot products with one line, which is read once.
#[inline(always)]
fn dots<const FMA: bool>(x: &[f32], w: &[f32]) -> [f32; GROUP] {
    const LANES: usize = 16;
    let width = x.len();
    let mut sums = [[0_f32; LANES]; GROUP];
    let whole = width / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        let x = &x[start..start + LANES];
        for (r, sums) in sums.iter_mut().enumerate() {
            let w = &w[r * width + start..][..LANES];
            for lane in 0..LANES {
                sums[lane] = mul_add::<FMA>(x[lane], w[lane], sums[lane]);
            }
        }
    }
    let mut found = [0.0; GROUP];
    for (r, found) in found.iter_mut().enumerate() {
        let rest: f32 = (whole..width).map(|i| x[i] * w[r * width + i]).sum();
        *found = sums[r].iter().sum::<f32>() + rest;
    }
    found
}

/// Adds the products of some rows to the sums `[rank, columns]` of the columns from `start` on.
fn add_sums(c: &[f32], y: &[f32], rank: usize, width: usize, start: usize, sums: &mut [f32]) {
    let columns = sums.len() / rank;
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if crate::simd::level() >= crate::simd::Level::Avx512 {
        done = columns / COLUMNS * COLUMNS;
        for column in (0..done).step_by(COLUMNS) {
            // SAFETY: the processor has the instructions; whole blocks of columns exist.
            unsafe { wide::add_block(c, y, rank, width, start + column, &mut sums[column..], columns) };
        }
    }
    add_lines(c, y, rank, width, start, sums, done);
}

multiversion! {
    fn add_lines = add_lines_body(
        c: &[f32], y: &[f32], rank: usize, width: usize, start: usize, sums: &mut [f32], first_column: usize,
    )
}

/// The same for the columns from `first_column` of the sums on, a line after the other.
#[inline(always)]
fn add_lines_body<const FMA: bool>(
    c: &[f32],
    y: &[f32],
    rank: usize,
    width: usize,
    start: usize,
    sums: &mut [f32],
    first_column: usize,
) {
    let columns = sums.len() / rank;
    if first_column == columns {
        return;
    }
    for (c, y) in c.chunks_exact(rank).zip(y.chunks_exact(width)) {
        let y = &y[start + first_column..start + columns];
        for (c, sums) in c.iter().zip(sums.chunks_exact_mut(columns)) {
            for (sum, y) in sums[first_column..].iter_mut().zip(y) {
                *sum = mul_add::<FMA>(*c, *y, *sum);
            }
        }
    }
}

/// Compilers turn the loops below around and gather; hence by hand.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // vector loads and stores
mod wide {
    use std::arch::x86_64::*;

    use super::GROUP;

    /// Adds to all sums of 32 columns, eight rows of them in registers at a time.
    ///
    /// # Safety
    /// AVX-512 F must be there, `y` have 32 columns from `start` on, and `sums` 32 in each of `rank` lines.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn add_block(
        c: &[f32],
        y: &[f32],
        rank: usize,
        width: usize,
        start: usize,
        sums: &mut [f32],
        columns: usize,
    ) {
        let rows = c.len() / rank;
        assert!(rows * width <= y.len() && (rank - 1) * columns + super::COLUMNS <= sums.len());
        assert!(start + super::COLUMNS <= width);
        let whole = rank / GROUP * GROUP;
        let place = |first: usize| Place {
            rank,
            first,
            width,
            start,
            columns,
            rows,
        };
        // SAFETY: the lengths were compared above.
        unsafe {
            for first in (0..whole).step_by(GROUP) {
                add::<GROUP>(c.as_ptr(), y.as_ptr(), sums.as_mut_ptr(), &place(first));
            }
            for first in whole..rank {
                add::<1>(c.as_ptr(), y.as_ptr(), sums.as_mut_ptr(), &place(first));
            }
        }
    }

    struct Place {
        rank: usize,
        /// First row of sums.
        first: usize,
        width: usize,
        /// First column of `y`.
        start: usize,
        /// Length of a line of sums.
        columns: usize,
        rows: usize,
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn add<const R: usize>(c: *const f32, y: *const f32, sums: *mut f32, place: &Place) {
        // SAFETY: `add_block` compared the lengths.
        unsafe {
            let line = |r: usize| sums.add((place.first + r) * place.columns);
            let mut block = [[_mm512_setzero_ps(); 2]; R];
            for (r, sum) in block.iter_mut().enumerate() {
                *sum = [_mm512_loadu_ps(line(r)), _mm512_loadu_ps(line(r).add(16))];
            }
            for row in 0..place.rows {
                let y = y.add(row * place.width + place.start);
                let c = c.add(row * place.rank + place.first);
                let (y0, y1) = (_mm512_loadu_ps(y), _mm512_loadu_ps(y.add(16)));
                for (r, sum) in block.iter_mut().enumerate() {
                    let c = _mm512_set1_ps(*c.add(r));
                    sum[0] = _mm512_fmadd_ps(c, y0, sum[0]);
                    sum[1] = _mm512_fmadd_ps(c, y1, sum[1]);
                }
            }
            for (r, sum) in block.iter().enumerate() {
                _mm512_storeu_ps(line(r), sum[0]);
                _mm512_storeu_ps(line(r).add(16), sum[1]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.731 + seed).sin()).collect()
    }

    fn check(tokens: usize, width: usize, rank: usize) {
        let (x, w, c) = (
            numbers(tokens * width, 0.1),
            numbers(rank * width, 0.2),
            numbers(tokens * rank, 0.3),
        );
        let mut found = vec![f32::NAN; tokens * rank];
        skinny_product(&x, &w, rank, 0.5, &mut found);
        for t in 0..tokens {
            for r in 0..rank {
                let expect: f64 = (0..width)
                    .map(|n| f64::from(x[t * width + n]) * f64::from(w[r * width + n]))
                    .sum();
                assert!((f64::from(found[t * rank + r]) - 0.5 * expect).abs() < 1e-4);
            }
        }
        let mut found = vec![f32::NAN; rank * width];
        skinny_transposed_product(&c, &x, rank, &mut found);
        for r in 0..rank {
            for n in 0..width {
                let expect: f64 = (0..tokens)
                    .map(|t| f64::from(c[t * rank + r]) * f64::from(x[t * width + n]))
                    .sum();
                assert!((f64::from(found[r * width + n]) - expect).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn products_match_the_definition_at_every_edge() {
        for (tokens, width, rank) in [
            (1, 1, 1),
            (3, 17, 2),
            (70, 64, 8),
            (33, 100, 11),
            (5, 32, 16),
            (40, 600, 3),
        ] {
            check(tokens, width, rank);
        }
    }

    #[test]
    fn transpose_turns_rows_into_columns() {
        let mut out = [0.0; 6];
        transpose(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3, &mut out);
        assert_eq!(out, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
