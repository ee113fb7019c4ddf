use mlx_rs::linalg::svd;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::ops::{addmm, concatenate, sqrt};
use mlx_rs::{Stream, stop_gradient, with_stream};
use planish_core::target_modules::{PerModule, TargetModules};
use planish_mlx::{Array, Dtype};

use crate::dropout::{DropoutKeys, dropout};
use crate::linear::Linear;
use crate::parameters::{Parameters, Role, Visitor, join};
use crate::weight::LinearBase;
use crate::{Error, Result};

/// Which low-rank update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoraMethod {
    /// `W + scale · (A B)ᵀ`.
    #[default]
    Lora,
    /// The same, with a trained length for each output row (weight decomposition).
    Dora,
}

/// How strongly the update counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LoraScale {
    /// The factor itself, as mlx-lm stores it.
    Fixed(f64),
    /// `alpha / rank`.
    Alpha(f64),
    /// `alpha / sqrt(rank)` (rsLoRA).
    RankStabilised(f64),
}

/// Where a fresh update starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoraInit {
    /// `A` random, `B` zero: the layer equals its base.
    #[default]
    Zero,
    /// The `rank` strongest singular directions of the weight, which is left with the rest: the layer equals its base, and
    /// what trains first is what the weight does most (PiSSA). The base weights of the model change.
    Pissa,
}

/// Which adapters to attach, where.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// LoRA or DoRA.
    pub method: LoraMethod,
    /// Rank where `ranks` has no entry.
    pub rank: usize,
    /// Strength where `alphas` has no entry.
    pub scale: LoraScale,
    /// Probability that an input of the update is dropped in training.
    pub dropout: f32,
    /// Modules to adapt.
    pub targets: TargetModules,
    /// Ranks of single modules.
    pub ranks: PerModule<usize>,
    /// Alphas (or, under [`LoraScale::Fixed`], factors) of single modules.
    pub alphas: PerModule<f64>,
    /// Where the update starts.
    pub init: LoraInit,
}

/// A trainable low-rank update of one linear layer.
///
/// `y = base(x) + scale · (dropout(x) A) B`; DoRA then multiplies each output by `m / ‖W + scale · (A B)ᵀ‖_row`, the norm
/// under a stopped gradient. `B` starts at zero, so a fresh layer equals its base. `A`, `B` and `m` are f32 and the only
/// arrays that train; products are computed in the input's dtype, which is the output's.
///
/// # Shapes
/// `A`: `[input_dims, rank]` · `B`: `[rank, output_dims]` · `m`: `[output_dims]`, all f32.
///
/// # Reference
/// Hu et al. 2021, arXiv 2106.09685 §4.1; Liu et al. 2024, arXiv 2402.09353 (DoRA). Same layout as mlx-lm.
#[derive(Debug, Clone)]
pub struct LoraAdapter {
    /// `A`.
    pub a: Array,
    /// `B`.
    pub b: Array,
    /// DoRA's `m`.
    pub magnitude: Option<Array>,
    /// The final multiplier.
    pub scale: f64,
    /// Probability that an input of the update is dropped in training.
    pub dropout: f32,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            method: LoraMethod::Lora,
            rank: 8,
            scale: LoraScale::Alpha(16.0),
            dropout: 0.0,
            targets: TargetModules::default(),
            ranks: PerModule::new(Vec::<(String, usize)>::new()),
            alphas: PerModule::new(Vec::<(String, f64)>::new()),
            init: LoraInit::Zero,
        }
    }
}

impl LoraScale {
    /// The final multiplier for a rank; `alpha` replaces this setting's own number.
    pub fn factor(self, alpha: f64, rank: usize) -> f64 {
        match self {
            LoraScale::Fixed(_) => alpha,
            LoraScale::Alpha(_) => alpha / rank as f64,
            LoraScale::RankStabilised(_) => alpha / (rank as f64).sqrt(),
        }
    }

    /// The number inside.
    pub fn value(self) -> f64 {
        match self {
            LoraScale::Fixed(value) | LoraScale::Alpha(value) | LoraScale::RankStabilised(value) => value,
        }
    }
}

impl LoraAdapter {
    /// A fresh adapter for `linear`: `A` uniform in `±1/sqrt(input_dims)`, a function of `seed` and `path` alone; `B` zero;
    /// `m` the row norms of the base weight.
    pub(crate) fn fresh(
        linear: &Linear,
        path: &str,
        rank: usize,
        scale: f64,
        config: &LoraConfig,
        seed: u64,
    ) -> Result<Self> {
        if rank == 0 {
            return Err(Error::ZeroRank { path: path.to_owned() });
        }
        let (output_dims, input_dims) = linear.base.dims();
        if config.init == LoraInit::Pissa {
            linear.base.require_dense(path, "PiSSA")?;
            return Self::principal(&linear.base.dense_weight()?, path, rank, scale, config);
        }
        let bound = 1.0 / (input_dims as f32).sqrt();
        let key = mlx_rs::random::key(module_seed(seed, path))?;
        let a = mlx_rs::random::uniform::<_, f32>(-bound, bound, &[input_dims as i32, rank as i32], &key)?;
        let b = Array::zeros::<f32>(&[rank as i32, output_dims as i32])?;
        let magnitude = match config.method {
            LoraMethod::Lora => None,
            LoraMethod::Dora => Some(row_norms(&linear.base.dense_weight()?)?),
        };
        Ok(LoraAdapter {
            a,
            b,
            magnitude,
            scale,
            dropout: config.dropout,
        })
    }

    /// The `rank` strongest singular directions of a weight: `scale · (A B)ᵀ = U_r S_r V_rᵀ`, `S` shared evenly by both.
    ///
    /// Meng et al. 2024, arXiv 2404.02948.
    fn principal(weight: &Array, path: &str, rank: usize, scale: f64, config: &LoraConfig) -> Result<Self> {
        let most = weight.dim(0).min(weight.dim(1)) as usize;
        if rank > most {
            return Err(Error::RankTooLarge {
                path: path.to_owned(),
                rank,
                most,
            });
        }
        let weight = weight.as_dtype(Dtype::Float32)?;
        // MLX has the decomposition on the main processor alone.
        let (u, s, vt) = with_stream(&Stream::cpu(), || svd(&weight))?;
        let rank = rank as i32;
        let half = sqrt(s.try_index(..rank)?.divide(Array::from_f32(scale as f32))?)?; // [r]
        let a = vt.try_index(..rank)?.transpose()?.multiply(&half)?; // [in, r]
        let b = u.try_index((.., ..rank))?.multiply(&half)?.transpose()?; // [r, out]
        mlx_rs::transforms::eval([&a, &b])?;
        Ok(LoraAdapter {
            a,
            b,
            magnitude: None,
            scale,
            dropout: config.dropout,
        })
    }

    /// `base_output + scale · (dropout(x) A) B`.
    pub(crate) fn add_update(&self, base_output: &Array, x: &Array, keys: Option<&DropoutKeys>) -> Result<Array> {
        let a = self.a.as_dtype(x.dtype())?;
        let inner = match keys {
            Some(keys) if self.dropout > 0.0 => dropout(x, self.dropout, &keys.take()?)?.matmul(a)?,
            _ => x.matmul(a)?,
        };
        self.add_product(base_output, &inner)
    }

    /// `base_output + scale · inner B`.
    pub(crate) fn add_product(&self, base_output: &Array, inner: &Array) -> Result<Array> {
        let b = self.b.as_dtype(inner.dtype())?;
        let (mut inner, mut scale) = (rows(inner)?, self.scale as f32);
        if inner.dtype() != Dtype::Float32 {
            // Where traffic counts: the gradient of a scaled product scales the whole gradient of the output.
            let scaled = inner.as_dtype(Dtype::Float32)?.multiply(Array::from_f32(scale))?;
            (inner, scale) = (scaled.as_dtype(inner.dtype())?, 1.0);
        }
        // One product over all rows: MLX would otherwise run one for each batch row.
        let output = addmm(rows(base_output)?, inner, b, scale, None)?;
        Ok(output.reshape(base_output.shape())?)
    }

    /// `x A` of several adapters as one product, `[rows, sum of ranks]`: reading `x` is most of the work.
    pub(crate) fn all_inner(adapters: &[&LoraAdapter], x: &Array) -> Result<Array> {
        let narrowed: Vec<Array> = adapters
            .iter()
            .map(|adapter| adapter.a.as_dtype(x.dtype()))
            .collect::<Result<_, _>>()?;
        Ok(rows(x)?.matmul(concatenate(&narrowed, 1)?)?)
    }

    /// The same cut into the parts of the adapters, each `[rows, rank]`.
    pub(crate) fn inner_together(adapters: &[&LoraAdapter], x: &Array) -> Result<Vec<Array>> {
        let all = Self::all_inner(adapters, x)?;
        let ends: Vec<i32> = adapters
            .iter()
            .scan(0, |end, adapter| {
                *end += adapter.rank() as i32;
                Some(*end)
            })
            .collect();
        Ok(all.split_at_indices(&ends[..ends.len() - 1], -1)?)
    }

    /// DoRA's factor for each output; the identity for LoRA.
    pub(crate) fn rescale(&self, y: &Array, base: &LinearBase) -> Result<Array> {
        let Some(magnitude) = &self.magnitude else {
            return Ok(y.clone());
        };
        let adapted = base.dense_weight()?.as_dtype(Dtype::Float32)?.add(self.delta()?)?;
        let norms = stop_gradient(row_norms(&adapted)?)?;
        Ok(y.multiply(magnitude.divide(norms)?.as_dtype(y.dtype())?)?)
    }

    /// `ΔW = scale · (A B)ᵀ`, f32 `[output_dims, input_dims]`.
    ///
    /// # Errors
    /// [`Error::Mlx`].
    pub fn delta(&self) -> Result<Array> {
        Ok(self
            .a
            .matmul(&self.b)?
            .transpose()?
            .multiply(Array::from_f32(self.scale as f32))?)
    }

    /// The rank `r`.
    pub fn rank(&self) -> usize {
        self.a.dim(1) as usize
    }
}

impl Parameters for LoraAdapter {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        visitor(&join(path, "lora_a"), Role::Adapter, &mut self.a);
        visitor(&join(path, "lora_b"), Role::Adapter, &mut self.b);
        if let Some(magnitude) = &mut self.magnitude {
            visitor(&join(path, "m"), Role::Adapter, magnitude);
        }
    }
}

/// `[..., n]` as `[rows, n]`.
pub(crate) fn rows(array: &Array) -> Result<Array> {
    Ok(array.reshape(&[-1, array.dim(-1)])?)
}

/// Euclidean length of each row, f32 `[rows]`.
fn row_norms(weight: &Array) -> Result<Array> {
    Ok(sqrt(weight.as_dtype(Dtype::Float32)?.square()?.sum_axis(-1, false)?)?)
}

/// A seed for one module: FNV-1a over the run's seed and the module's path, so that neither order nor number of the other
/// modules matters.
pub(crate) fn module_seed(seed: u64, path: &str) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let bytes = seed.to_le_bytes().into_iter().chain(path.bytes());
    bytes.fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}
