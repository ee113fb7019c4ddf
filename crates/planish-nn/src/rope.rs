use std::sync::{Arc, Mutex, PoisonError};

use planish_core::arch::{self, RopePairs, RopeScaling};
use planish_mlx::Array;

use crate::{Error, Result};

/// Rotary position embedding as an architecture describes it: pairs of the first numbers of a head turn by
/// `position · frequency`, and grow by a factor with some scalings.
///
/// # Reference
/// Su et al. 2021, arXiv 2104.09864.
#[derive(Debug, Clone)]
pub struct Rope {
    description: arch::Rope,
    head_dim: usize,
    /// What heads are multiplied by before they turn, `[h_d]` f32; `None` = 1.
    amplitude: Option<Array>,
    /// Periods divided by 2π, `[dims / 2]` f32, of sequences within the original context, where they are no plain powers of theta.
    periods: Option<Array>,
    /// The last table that was asked for, and for how many tokens.
    angles: Arc<Mutex<Arc<Angles>>>,
}

/// Cosines and sines of the positions `0..length`, `[length, h_d / 2]` each.
#[derive(Debug, Default)]
pub(crate) struct Angles {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl Rope {
    /// The rotation of heads of `head_dim`.
    pub fn new(description: &arch::Rope, head_dim: usize) -> Self {
        let factor = description.attention_factor();
        let of_number = |index: usize| if index < description.dims { factor } else { 1.0 };
        let amplitude = (factor != 1.0).then(|| (0..head_dim).map(of_number).collect::<Vec<f32>>());
        let is_plain = description.scaling == RopeScaling::None;
        Rope {
            periods: (!is_plain).then(|| periods(description, 1)),
            amplitude: amplitude.map(|values| Array::from_slice(&values, &[head_dim as i32])),
            description: description.clone(),
            head_dim,
            angles: Arc::default(),
        }
    }

    /// Whether it is made from this description.
    pub(crate) fn is(&self, description: &arch::Rope, head_dim: usize) -> bool {
        self.description == *description && self.head_dim == head_dim
    }

    /// Whether it turns the same way as another one.
    pub(crate) fn equals(&self, other: &Rope) -> bool {
        self.is(&other.description, other.head_dim)
    }

    /// Whether all of a head turns, in pairs half a head apart: what our own kernels are written for.
    pub(crate) fn turns_halves(&self) -> bool {
        self.description.dims == self.head_dim && self.description.pairs == RopePairs::Halves
    }

    /// Cosines and sines of the first `length` positions of a sequence of `length` tokens, amplitude included; shared by all blocks.
    pub(crate) fn angles(&self, length: usize) -> Arc<Angles> {
        let mut kept = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.cos.len() != length * self.description.dims / 2 {
            let frequencies = self.description.frequencies(length);
            let factor = f64::from(self.description.attention_factor());
            let angle = |position: usize| frequencies.iter().map(move |f| position as f64 * f);
            let all = || (0..length).flat_map(angle);
            *kept = Arc::new(Angles {
                cos: all().map(|angle| (factor * angle.cos()) as f32).collect(),
                sin: all().map(|angle| (factor * angle.sin()) as f32).collect(),
            });
        }
        kept.clone()
    }

    /// Rotates `x` `[b, n, s, h_d]`, whose first token stands at position `offset`.
    ///
    /// # Errors
    /// [`Error::Mlx`] when `x` has another shape.
    pub fn forward(&self, x: &Array, offset: i32) -> Result<Array> {
        let turning = self.turning((offset + x.dim(2)) as usize);
        Ok(mlx_rs::fast::rope(
            self.amplified(x)?,
            turning.dims,
            turning.is_adjacent,
            turning.theta,
            1.0,
            offset,
            turning.periods.as_ref(),
        )?)
    }

    /// Rotates `x` `[b, n, s, h_d]`, each token by its own position: i32 `[b · s]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::PackedBeyondContext`].
    pub(crate) fn forward_at(&self, x: &Array, positions: &Array) -> Result<Array> {
        let shape = [x.dim(0), x.dim(2), x.dim(1), x.dim(3)];
        let turning = self.turning(x.dim(2) as usize);
        // Every token is a row of its own, because MLX takes one position a row.
        let tokens = self.amplified(x)?.transpose_axes(&[0, 2, 1, 3])?;
        let tokens = tokens.reshape(&[-1, x.dim(1), 1, x.dim(3)])?; // [b · s, n, 1, h_d]
        let turned = mlx_rs::fast::rope_dynamic(
            tokens,
            turning.dims,
            turning.is_adjacent,
            turning.theta,
            1.0,
            positions,
            turning.periods.as_ref(),
        )?;
        Ok(turned.reshape(&shape)?.transpose_axes(&[0, 2, 1, 3])?)
    }

    /// Refuses several sequences in rows of `length` tokens where the frequencies depend on the length of a sequence.
    pub(crate) fn check_packed(&self, length: i32) -> Result<()> {
        match self.description.constant_up_to() {
            limit if length as usize > limit => Err(Error::PackedBeyondContext { length, limit }),
            _ => Ok(()),
        }
    }

    fn amplified(&self, x: &Array) -> Result<Array> {
        match &self.amplitude {
            Some(amplitude) => Ok(x.multiply(amplitude.as_dtype(x.dtype())?)?),
            None => Ok(x.clone()),
        }
    }

    /// MLX's arguments for a sequence of `length` tokens.
    fn turning(&self, length: usize) -> Turning {
        let periods = match &self.periods {
            Some(_) if length > self.description.constant_up_to() => Some(periods(&self.description, length)),
            kept => kept.clone(),
        };
        Turning {
            dims: self.description.dims as i32,
            is_adjacent: self.description.pairs == RopePairs::Adjacent,
            theta: periods.is_none().then_some(self.description.theta),
            periods,
        }
    }
}

/// What MLX's rotation is told.
struct Turning {
    dims: i32,
    is_adjacent: bool,
    /// Where the periods are its plain powers.
    theta: Option<f32>,
    /// Periods divided by 2π, `[dims / 2]` f32.
    periods: Option<Array>,
}

fn periods(description: &arch::Rope, length: usize) -> Array {
    let frequencies = description.frequencies(length);
    let periods: Vec<f32> = frequencies.iter().map(|f| (1.0 / f) as f32).collect();
    Array::from_slice(&periods, &[periods.len() as i32])
}

#[cfg(test)]
mod tests {
    use planish_mlx::host;

    use super::*;

    fn rope(pairs: RopePairs, dims: usize, scaling: RopeScaling) -> Rope {
        let description = arch::Rope {
            theta: 100.0,
            dims,
            pairs,
            scaling,
        };
        Rope::new(&description, 4)
    }

    #[test]
    fn linear_scaling_divides_positions() {
        let x = Array::from_slice(&[0.3_f32, -0.2, 0.9, 0.1], &[1, 1, 1, 4]);
        let rope = |scaling| rope(RopePairs::Halves, 4, scaling);
        let stretched = rope(RopeScaling::Linear { factor: 4.0 }).forward(&x, 8).unwrap();
        let plain = rope(RopeScaling::None).forward(&x, 2).unwrap();
        assert!(stretched.all_close(&plain, 1e-6, 1e-6, None).unwrap());
    }

    fn check_turned(rope: Rope, partner: usize) {
        let x = Array::from_slice(&[1.0_f32, 0.0, 0.0, 0.0], &[1, 1, 1, 4]);
        let turned = host::to_f32_vec(&rope.forward(&x, 1).unwrap()).unwrap();
        let mut expect = [0.0; 4];
        (expect[0], expect[partner]) = (1f32.cos(), 1f32.sin());
        assert!(
            turned.iter().zip(expect).all(|(one, other)| (one - other).abs() < 1e-6),
            "{turned:?}"
        );
    }

    #[test]
    fn pairs_are_half_the_turned_part_apart_or_adjacent() {
        check_turned(rope(RopePairs::Halves, 4, RopeScaling::None), 2);
        check_turned(rope(RopePairs::Halves, 2, RopeScaling::None), 1);
        check_turned(rope(RopePairs::Adjacent, 4, RopeScaling::None), 1);
    }

    #[test]
    fn amplitude_of_yarn_reaches_turned_numbers_alone() {
        let yarn = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 2.0,
            original_max_position_embeddings: 64,
        };
        let x = Array::from_slice(&[1.0_f32, 1.0, 1.0, 1.0], &[1, 1, 1, 4]);
        let rope = rope(RopePairs::Halves, 2, yarn);
        let turned = host::to_f32_vec(&rope.forward(&x, 0).unwrap()).unwrap();
        assert_eq!(turned, [2.0, 2.0, 1.0, 1.0]);
        assert_eq!(rope.angles(1).cos, [2.0]);
    }
}
