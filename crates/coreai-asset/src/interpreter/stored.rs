//! Large weights in their stored form: rows are read and restored when an operation needs them.

use std::{ops::Range, sync::Arc};

use super::value::{read_floats, read_ints};
use crate::{Asset, Element};

/// A weight `[rows, columns]`, perhaps turned, perhaps with leading dimensions of 1.
#[derive(Clone, Debug)]
pub struct Matrix {
    source: Arc<Source>,
    rows: usize,
    columns: usize,
    pub(super) is_turned: bool,
    /// Leading dimensions of 1.
    pub(super) lead: usize,
}

#[derive(Debug)]
enum Source {
    /// Elements as they are in the file.
    Plain {
        asset: Arc<Asset>,
        weight: usize,
        element: Element,
    },
    /// `scale · (data − before) + after`, each side value for a block of a row.
    Scaled {
        data: Matrix,
        scale: Vec<f32>,
        before: Vec<f32>,
        after: Vec<f32>,
        /// Rows and columns of the sides.
        sides: [usize; 2],
    },
    /// Entries of tables, one table for each block.
    Table {
        indices: Matrix,
        tables: Vec<f32>,
        entries: usize,
        sides: [usize; 2],
    },
}

impl Matrix {
    pub(super) fn plain(asset: Arc<Asset>, weight: usize, element: Element, rows: usize, columns: usize) -> Self {
        let source = Source::Plain { asset, weight, element };
        Self::of(source, rows, columns)
    }

    pub(super) fn scaled(data: Self, sides: [usize; 2], parts: [Vec<f32>; 3]) -> Self {
        let (rows, columns) = (data.rows, data.columns);
        let [scale, before, after] = parts;
        let source = Source::Scaled {
            data,
            scale,
            before,
            after,
            sides,
        };
        Self::of(source, rows, columns)
    }

    pub(super) fn table(indices: Self, sides: [usize; 2], tables: Vec<f32>, entries: usize) -> Self {
        let (rows, columns) = (indices.rows, indices.columns);
        let source = Source::Table {
            indices,
            tables,
            entries,
            sides,
        };
        Self::of(source, rows, columns)
    }

    fn of(source: Source, rows: usize, columns: usize) -> Self {
        Self {
            source: Arc::new(source),
            rows,
            columns,
            is_turned: false,
            lead: 0,
        }
    }

    /// Rows and columns as stored.
    pub(super) fn stored_shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        let own = if self.is_turned {
            [self.columns, self.rows]
        } else {
            [self.rows, self.columns]
        };
        [vec![1; self.lead], own.to_vec()].concat()
    }

    /// Stored rows as floats, `[rows, columns]` of the stored form.
    pub(super) fn stored_rows(&self, rows: Range<usize>) -> Result<Vec<f32>, String> {
        if rows.end > self.rows {
            return Err(format!("row {} of {}", rows.end, self.rows));
        }
        match &*self.source {
            Source::Plain { element, .. } => {
                let (data, count) = self.bytes(&rows)?;
                let floats = read_floats(*element, &data);
                let ints = || read_ints(*element, &data, count).unwrap_or_default();
                Ok(floats.unwrap_or_else(|| ints().into_iter().map(|v| v as f32).collect()))
            }
            Source::Scaled {
                data,
                scale,
                before,
                after,
                sides,
            } => {
                let mut values = data.stored_rows(rows.clone())?;
                self.each_with_side(&rows, *sides, &mut values, |value, side| {
                    *value = scale[side] * (*value - before[side]) + after[side];
                });
                Ok(values)
            }
            Source::Table {
                indices,
                tables,
                entries,
                sides,
            } => {
                let mut values = indices.stored_rows(rows.clone())?;
                self.each_with_side(&rows, *sides, &mut values, |value, side| {
                    *value = tables[side * entries + *value as usize];
                });
                Ok(values)
            }
        }
    }

    fn each_with_side(&self, rows: &Range<usize>, sides: [usize; 2], values: &mut [f32], f: impl Fn(&mut f32, usize)) {
        let (tall, wide) = (self.rows / sides[0], self.columns / sides[1]);
        for (row, part) in rows.clone().zip(values.chunks_mut(self.columns)) {
            for (block, part) in part.chunks_mut(wide).enumerate() {
                let side = row / tall * sides[1] + block;
                part.iter_mut().for_each(|value| f(value, side));
            }
        }
    }

    /// Data of rows and their number of elements. Rows of half bytes must begin at a whole one.
    fn bytes(&self, rows: &Range<usize>) -> Result<(Vec<u8>, usize), String> {
        let Source::Plain { asset, weight, element } = &*self.source else {
            return Err("not plain data".into());
        };
        let at = |row: usize| row * self.columns * element.bits();
        let count = (rows.end - rows.start) * self.columns;
        if !at(rows.start).is_multiple_of(8) {
            // Only rows of an odd number of 4-bit elements: read from the row before.
            let (data, wide) = self.bytes(&(rows.start - 1..rows.end))?;
            let unpacked = read_ints(*element, &data, wide).unwrap_or_default();
            let repacked: Vec<u8> = unpacked[self.columns..].chunks(2).map(pack).collect();
            return Ok((repacked, count));
        }
        let range = at(rows.start) as u64 / 8..(at(rows.end) as u64).div_ceil(8);
        let data = asset.weight(*weight, range).map_err(|e| e.to_string())?;
        Ok((data, count))
    }
}

fn pack(pair: &[i64]) -> u8 {
    let nibble = |i: usize| pair.get(i).map_or(0, |v| (*v & 15) as u8);
    nibble(0) | nibble(1) << 4
}
