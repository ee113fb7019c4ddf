use mlx_rs::ops::{concatenate, zeros_dtype};
use planish_mlx::{Array, ops};

use crate::Result;
use crate::mask::kept_tokens;

/// Tokens that one growth of the cache makes room for.
const GROWTH: i32 = 256;

/// Keys and values of the tokens seen so far, for all blocks of one model, so that generation computes new tokens only.
///
/// Buffers grow in blocks of 256 tokens and are written in place. Blocks with a window keep only what it reaches back to.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    length: i32,
}

/// Keys and values of one block, `[b, n_kv, capacity, h_d]`.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerCache {
    buffers: Option<(Array, Array)>,
    /// Position of the buffers' first token.
    first: i32,
}

impl KvCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// Whether no token was seen.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The arrays inside, to evaluate them without reading logits.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.layers
            .iter()
            .filter_map(|layer| layer.buffers.as_ref())
            .flat_map(|(keys, values)| [keys, values])
    }

    pub(crate) fn offset(&self) -> i32 {
        self.length
    }

    pub(crate) fn layer(&mut self, layer_idx: usize) -> &mut LayerCache {
        if self.layers.len() <= layer_idx {
            self.layers.resize_with(layer_idx + 1, LayerCache::default);
        }
        &mut self.layers[layer_idx]
    }

    /// Counts the tokens that every block has written.
    pub(crate) fn advance(&mut self, count: i32) {
        self.length += count;
    }
}

impl LayerCache {
    /// Writes keys and values `[b, n_kv, s, h_d]` at position `offset` and returns those of all tokens that a window reaches from
    /// there: of the last `window − 1` before them, and of themselves.
    pub(crate) fn extend(
        &mut self,
        keys: &Array,
        values: &Array,
        offset: i32,
        window: Option<i32>,
    ) -> Result<(Array, Array)> {
        let kept = kept_tokens(offset, window);
        self.forget(offset - kept, offset, keys.dim(2))?;
        let (old_keys, old_values) = self.buffers.take().unzip();
        let (start, end) = (offset - self.first, offset - self.first + keys.dim(2));
        let all_keys = write(old_keys, keys, start)?;
        let all_values = write(old_values, values, start)?;
        let seen = (
            part(&all_keys, start - kept, end)?,
            part(&all_values, start - kept, end)?,
        );
        self.buffers = Some((all_keys, all_values));
        Ok(seen)
    }

    /// Drops the tokens before position `needed` when `count` new ones after position `end` do not fit behind them.
    fn forget(&mut self, needed: i32, end: i32, count: i32) -> Result<()> {
        let Some((keys, values)) = &self.buffers else {
            return Ok(());
        };
        if needed == self.first || end - self.first + count <= keys.dim(2) {
            return Ok(());
        }
        let (start, stop) = (needed - self.first, end - self.first);
        self.buffers = Some((part(keys, start, stop)?, part(values, start, stop)?));
        self.first = needed;
        Ok(())
    }
}

/// Writes `new` at `offset` into `buffer`, which grows first if it must. Taking the buffer lets MLX write in place.
fn write(buffer: Option<Array>, new: &Array, offset: i32) -> Result<Array> {
    let [rows, heads, length, head_dim] = [new.dim(0), new.dim(1), new.dim(2), new.dim(3)];
    let end = offset + length;
    let capacity = buffer.as_ref().map_or(0, |buffer| buffer.dim(2));
    let buffer = match buffer {
        Some(buffer) if end <= capacity => buffer,
        buffer => {
            let room = (end - capacity + GROWTH - 1) / GROWTH * GROWTH;
            let fresh = zeros_dtype(&[rows, heads, room, head_dim], new.dtype())?;
            match buffer {
                Some(buffer) => concatenate(&[buffer, fresh], 2)?,
                None => fresh,
            }
        }
    };
    Ok(ops::slice_update(
        &buffer,
        new,
        &[0, 0, offset, 0],
        &[rows, heads, end, head_dim],
    )?)
}

/// The tokens `start..end` of a buffer.
fn part(buffer: &Array, start: i32, end: i32) -> Result<Array> {
    Ok(ops::slice(
        buffer,
        &[0, 0, start, 0],
        &[buffer.dim(0), buffer.dim(1), end, buffer.dim(3)],
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(start: i32, count: i32) -> Array {
        let values: Vec<f32> = (start..start + count).map(|value| value as f32).collect();
        Array::from_slice(&values, &[1, 1, count, 1])
    }

    #[test]
    fn tokens_come_back_in_order_across_growth() {
        let mut layer = LayerCache::default();
        let mut offset = 0;
        for count in [5, 1, 249, 1, 1, 300, 1] {
            let new = tokens(offset, count);
            let (keys, values) = layer.extend(&new, &new, offset, None).unwrap();
            offset += count;
            let expect: Vec<f32> = (0..offset).map(|value| value as f32).collect();
            assert_eq!(keys.contiguous().unwrap().as_slice::<f32>(), expect);
            assert_eq!(values.contiguous().unwrap().as_slice::<f32>(), expect);
        }
        assert_eq!(layer.buffers.unwrap().0.dim(2), 768);
    }

    #[test]
    fn window_keeps_what_it_reaches_and_no_more() {
        let mut layer = LayerCache::default();
        let mut offset = 0;
        for count in [5, 300, 7].into_iter().chain([1; 900]) {
            let new = tokens(offset, count);
            let (keys, _) = layer.extend(&new, &new, offset, Some(20)).unwrap();
            let expect: Vec<f32> = ((offset - 19).max(0)..offset + count)
                .map(|value| value as f32)
                .collect();
            assert_eq!(keys.contiguous().unwrap().as_slice::<f32>(), expect);
            offset += count;
        }
        assert!(layer.buffers.unwrap().0.dim(2) <= 512);
    }
}
