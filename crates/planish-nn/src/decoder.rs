use planish_core::arch::Residual;
use planish_mlx::{Array, ops, transforms};

use crate::attention::{Attention, Position};
use crate::cache::KvCache;
use crate::dropout::DropoutKeys;
use crate::embedding::Embedding;
use crate::fused::{FusedAttention, FusedFeedForward, Pending, Turns};
use crate::mask::{AttentionMask, Masks};
use crate::mlp::Gated;
use crate::parameters::{Named, Parameters, Trainable, Visitor};
use crate::{Error, Linear, Result, RmsNorm, softcapped};

/// A decoder: embedding, blocks, norm, head. All architectures are this; they differ in their blocks.
#[derive(Debug, Clone)]
pub(crate) struct Decoder {
    /// What every name begins with, without its dot.
    pub(crate) prefix: String,
    pub(crate) embedding_path: String,
    pub(crate) embedding: Embedding,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Named<RmsNorm>,
    pub(crate) head: Head,
}

/// From hidden states to logits: `cap(factor · hidden Wᵀ)`.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) path: String,
    /// `None` = the embedding is the head.
    pub(crate) matrix: Option<Linear>,
    pub(crate) factor: f32,
    pub(crate) softcap: Option<f32>,
}

/// One block: `h = x + attention(norm(x))`, `y = h + feed_forward(norm(h))`, as its [`arch::Layer`](planish_core::arch::Layer) says.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) path: String,
    pub(crate) mixer_norm: Option<Named<RmsNorm>>,
    pub(crate) attention: Attention,
    pub(crate) post_mixer_norm: Option<Named<RmsNorm>>,
    pub(crate) feed_forward_norm: Option<Named<RmsNorm>>,
    pub(crate) feed_forward: Gated,
    pub(crate) post_feed_forward_norm: Option<Named<RmsNorm>>,
    pub(crate) residual: Residual,
    pub(crate) residual_factor: f32,
    pub(crate) fused: Fused,
}

/// The sub-layers of a block that are computed otherwise in training.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fused {
    pub(crate) attention: Option<FusedAttention>,
    pub(crate) feed_forward: Option<FusedFeedForward>,
}

/// What all blocks of a training pass share.
#[derive(Debug, Clone)]
struct Shared {
    masks: Masks,
    turns: Option<Turns>,
}

/// How a forward pass for training differs from one for inference.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TrainingPass<'a> {
    pub(crate) trainable: Trainable,
    pub(crate) dropout_key: Option<&'a Array>,
    pub(crate) activation_checkpointing: bool,
}

impl Decoder {
    /// Token ids i32 `[b, s]` → last hidden states after the final norm, `[b, s, d]`.
    pub(crate) fn hidden(&self, ids: &Array, mask: &AttentionMask, mut cache: Option<&mut KvCache>) -> Result<Array> {
        let offset = cache.as_ref().map_or(0, |cache| cache.offset());
        let masks = self.masks(mask, offset, ids.dim(1))?;
        let mut x = self.embedding.forward(ids)?;
        for (layer_idx, block) in self.blocks.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|cache| cache.layer(layer_idx));
            let mask = masks.of(block.attention.window);
            x = block.forward(&x, Position { mask, offset, cache }, None)?;
        }
        if let Some(cache) = cache {
            cache.advance(ids.dim(1));
        }
        self.norm.forward(&x)
    }

    /// The same for training: no cache; dropout, if there is a key; blocks computed again in the backward pass, if wanted.
    pub(crate) fn hidden_for_training(
        &self,
        ids: &Array,
        mask: &AttentionMask,
        pass: TrainingPass<'_>,
    ) -> Result<Array> {
        let block_keys = pass
            .dropout_key
            .map(|key| DropoutKeys::new(key, self.blocks.len()))
            .transpose()?;
        let masks = self.masks(mask, 0, ids.dim(1))?;
        let x = self.embedding.forward(ids)?;
        let shape = x.shape().to_vec();
        let first = self.blocks.iter().find(|block| block.fused.attention.is_some());
        let turns = first.and_then(|block| Some((block.attention.rope.as_ref()?, masks.of(block.attention.window))));
        let turns = turns
            .map(|(rope, mask)| Turns::new(rope, ids.dim(1) as usize, mask))
            .transpose()?;
        let shared = Shared { masks, turns };
        let mut x = Pending::done(&x)?;
        for block in &self.blocks {
            let key = block_keys.as_ref().map(DropoutKeys::take).transpose()?;
            x = if pass.activation_checkpointing {
                let x = x.sum(&shape)?;
                Pending::done(&block.forward_checkpointed(&x, &shared, key, pass.trainable)?)?
            } else {
                block.forward_for_training(x, &shape, &shared, key.as_ref())?
            };
        }
        self.norm.forward(&x.sum(&shape)?)
    }

    /// Hidden states `[..., d]` → logits `[..., v]`.
    pub(crate) fn logits(&self, hidden: &Array) -> Result<Array> {
        let hidden = scaled(hidden, self.head.factor)?;
        let logits = match &self.head.matrix {
            Some(matrix) => matrix.forward(&hidden)?,
            None => self.embedding.as_head(&hidden)?,
        };
        self.head
            .softcap
            .map_or(Ok(logits.clone()), |cap| softcapped(&logits, cap))
    }

    /// Every linear layer with its path, in the order of the computation.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut Linear)> {
        let head = self.head.matrix.iter_mut().map(|head| (self.head.path.clone(), head));
        self.blocks.iter_mut().flat_map(Block::linears_mut).chain(head)
    }

    /// Whether all blocks rotate alike.
    pub(crate) fn has_one_rope(&self) -> bool {
        let mut ropes = self.blocks.iter().map(|block| block.attention.rope.as_ref());
        match ropes.next() {
            Some(Some(first)) => ropes.all(|rope| rope.is_some_and(|rope| rope.equals(first))),
            _ => false,
        }
    }

    fn masks(&self, mask: &AttentionMask, offset: i32, length: i32) -> Result<Masks> {
        let attentions = || self.blocks.iter().map(|block| &block.attention);
        if mask.is_packed() {
            attentions()
                .filter_map(|attention| attention.rope.as_ref())
                .try_for_each(|rope| rope.check_packed(length))?;
        }
        mask.ready(offset, length, attentions().map(|attention| attention.window))
    }
}

impl Block {
    fn forward(&self, x: &Array, position: Position<'_>, keys: Option<&DropoutKeys>) -> Result<Array> {
        match self.residual {
            Residual::Sequential => self.feed(&self.attend(x, position, keys)?, keys),
            Residual::Parallel => {
                let normed = normed(&self.mixer_norm, x)?;
                let attended = scaled(&self.attention.forward(&normed, position, keys)?, self.residual_factor)?;
                let fed = scaled(&self.feed_forward.forward(&normed, keys)?, self.residual_factor)?;
                Ok(x.add(attended)?.add(fed)?)
            }
        }
    }

    fn attend(&self, x: &Array, position: Position<'_>, keys: Option<&DropoutKeys>) -> Result<Array> {
        let attended = self.attention.forward(&normed(&self.mixer_norm, x)?, position, keys)?;
        let attended = normed(&self.post_mixer_norm, &attended)?;
        Ok(x.add(scaled(&attended, self.residual_factor)?)?)
    }

    fn feed(&self, h: &Array, keys: Option<&DropoutKeys>) -> Result<Array> {
        let fed = self.feed_forward.forward(&normed(&self.feed_forward_norm, h)?, keys)?;
        let fed = normed(&self.post_feed_forward_norm, &fed)?;
        Ok(h.add(scaled(&fed, self.residual_factor)?)?)
    }

    /// The norms of a block that fused parts are written for: one before each half, without offset, and nothing else.
    pub(crate) fn plain_norms(&self) -> Option<[&RmsNorm; 2]> {
        let norms = [self.mixer_norm.as_deref()?, self.feed_forward_norm.as_deref()?];
        let has_more = self.post_mixer_norm.is_some() || self.post_feed_forward_norm.is_some();
        let is_plain = !has_more && self.residual == Residual::Sequential && self.residual_factor == 1.0;
        (is_plain && norms.iter().all(|norm| norm.offset == 0.0)).then_some(norms)
    }

    fn forward_for_training(&self, x: Pending, shape: &[i32], shared: &Shared, key: Option<&Array>) -> Result<Pending> {
        let keys = key
            .map(|key| DropoutKeys::new(key, Attention::N_LINEARS + Gated::N_LINEARS))
            .transpose()?;
        let keys = keys.as_ref();
        let mask = shared.masks.of(self.attention.window);
        let position = || Position {
            mask,
            offset: 0,
            cache: None,
        };
        let Some([mixer_norm, feed_forward_norm]) = self.plain_norms() else {
            return Pending::done(&self.forward(&x.sum(shape)?, position(), keys)?);
        };
        let fused = self.fused.attention.as_ref().zip(shared.turns.as_ref());
        let h = match fused.filter(|_| keys.is_none() || FusedAttention::is_without_dropout(&self.attention)) {
            Some((fused, turns)) => fused.forward(&self.attention, mixer_norm, &x, shape, mask, turns)?,
            None => Pending::done(&self.attend(&x.sum(shape)?, position(), keys)?)?,
        };
        let fused = self.fused.feed_forward.as_ref();
        match fused.filter(|_| keys.is_none() || FusedFeedForward::is_without_dropout(&self.feed_forward)) {
            Some(fused) => fused.forward(&self.feed_forward, feed_forward_norm, &h),
            None => Pending::done(&self.feed(&h.sum(shape)?, keys)?),
        }
    }

    /// Keeps only `x` for the backward pass. The trainable arrays are inputs, since gradients flow to inputs only; the key is
    /// one too, else a trace would keep the dropout masks, which depend on nothing else.
    fn forward_checkpointed(
        &self,
        x: &Array,
        shared: &Shared,
        key: Option<Array>,
        trainable: Trainable,
    ) -> Result<Array> {
        let mut inputs = vec![x.clone()];
        inputs.extend(self.collect(trainable).into_iter().map(|(_, array)| array));
        let n_parameters = inputs.len() - 1;
        inputs.extend(key);
        let (mut block, shared) = (self.clone(), shared.clone());
        let [y] = ops::exactly(transforms::checkpoint::<Error, _>(
            move |inputs| {
                let Some((x, rest)) = inputs.split_first() else {
                    return Ok(Vec::new());
                };
                let (parameters, key) = rest.split_at(n_parameters);
                block.replace(trainable, parameters);
                let (x, shape) = (Pending::done(x)?, x.shape());
                let y = block.forward_for_training(x, shape, &shared, key.first())?;
                Ok(vec![y.sum(shape)?])
            },
            &inputs,
        )?)?;
        Ok(y)
    }

    /// Its linear layers with their paths, in the order of the computation.
    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        let linears = self
            .attention
            .linears_mut()
            .into_iter()
            .chain(self.feed_forward.linears_mut());
        linears
            .map(|linear| (format!("{}.{}", self.path, linear.name), &mut linear.module))
            .collect()
    }
}

/// `x` through a norm, if there is one.
fn normed(norm: &Option<Named<RmsNorm>>, x: &Array) -> Result<Array> {
    match norm {
        Some(norm) => norm.forward(x),
        None => Ok(x.clone()),
    }
}

/// `factor · x`, in the dtype of `x`.
fn scaled(x: &Array, factor: f32) -> Result<Array> {
    match factor {
        1.0 => Ok(x.clone()),
        factor => Ok(x.multiply(Array::from_f32(factor).as_dtype(x.dtype())?)?),
    }
}

impl Parameters for Decoder {
    fn visit(&mut self, _: &str, visitor: &mut Visitor<'_>) {
        self.embedding.visit(&self.embedding_path, visitor);
        self.blocks.iter_mut().for_each(|block| block.visit("", visitor));
        self.norm.visit(&self.prefix, visitor);
        self.head.matrix.visit(&self.head.path, visitor);
    }
}

impl Parameters for Block {
    fn visit(&mut self, _: &str, visitor: &mut Visitor<'_>) {
        let path = &self.path;
        self.mixer_norm.visit(path, visitor);
        self.attention.visit(path, visitor);
        self.post_mixer_norm.visit(path, visitor);
        self.feed_forward_norm.visit(path, visitor);
        self.feed_forward.visit(path, visitor);
        self.post_feed_forward_norm.visit(path, visitor);
    }
}
