use planish_mlx::{Array, ops, transforms};

use crate::attention::{Attention, Position};
use crate::cache::KvCache;
use crate::dropout::DropoutKeys;
use crate::embedding::Embedding;
use crate::fused::{FusedAttention, FusedFeedForward, Pending, Turns};
use crate::mask::ReadyMask;
use crate::mlp::SwiGlu;
use crate::parameters::{Parameters, Trainable, Visitor, join};
use crate::{Error, Linear, Result, RmsNorm};

/// Linear layers in one block.
const LINEARS_PER_BLOCK: usize = 7;

/// A decoder: embedding, blocks, norm, head. All families are this; they differ in how the blocks are made.
#[derive(Debug, Clone)]
pub(crate) struct Decoder {
    pub(crate) embedding: Embedding,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: RmsNorm,
    /// `None` = the embedding is the head.
    pub(crate) head: Option<Linear>,
}

/// One pre-norm block: `h = x + attention(norm(x))`, `y = h + feed_forward(norm(h))`.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) attention_norm: RmsNorm,
    pub(crate) attention: Attention,
    pub(crate) feed_forward_norm: RmsNorm,
    pub(crate) feed_forward: SwiGlu,
    pub(crate) fused: Fused,
}

/// The sub-layers of a block that are computed otherwise in training.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fused {
    pub(crate) attention: Option<FusedAttention>,
    pub(crate) feed_forward: Option<FusedFeedForward>,
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
    pub(crate) fn hidden(&self, ids: &Array, mask: &ReadyMask, mut cache: Option<&mut KvCache>) -> Result<Array> {
        let offset = cache.as_ref().map_or(0, |cache| cache.offset());
        let mut x = self.embedding.forward(ids)?;
        for (layer_idx, block) in self.blocks.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|cache| cache.layer(layer_idx));
            x = block.forward(&x, Position { mask, offset, cache }, None)?;
        }
        if let Some(cache) = cache {
            cache.advance(ids.dim(1));
        }
        self.norm.forward(&x)
    }

    /// The same for training: no cache; dropout, if there is a key; blocks computed again in the backward pass, if wanted.
    pub(crate) fn hidden_for_training(&self, ids: &Array, mask: &ReadyMask, pass: TrainingPass<'_>) -> Result<Array> {
        let block_keys = pass
            .dropout_key
            .map(|key| DropoutKeys::new(key, self.blocks.len()))
            .transpose()?;
        let x = self.embedding.forward(ids)?;
        let shape = x.shape().to_vec();
        let first = self.blocks.iter().find(|block| block.fused.attention.is_some());
        let turns = first
            .map(|block| Turns::new(&block.attention.rope, ids.dim(1) as usize, mask))
            .transpose()?;
        let mut x = Pending::done(&x)?;
        for block in &self.blocks {
            let key = block_keys.as_ref().map(DropoutKeys::take).transpose()?;
            x = if pass.activation_checkpointing {
                let x = x.sum(&shape)?;
                Pending::done(&block.forward_checkpointed(&x, mask, turns.as_ref(), key, pass.trainable)?)?
            } else {
                block.forward_for_training(x, &shape, mask, turns.as_ref(), key.as_ref())?
            };
        }
        self.norm.forward(&x.sum(&shape)?)
    }

    /// Hidden states `[..., d]` → logits `[..., v]`.
    pub(crate) fn logits(&self, hidden: &Array) -> Result<Array> {
        match &self.head {
            Some(head) => head.forward(hidden),
            None => self.embedding.as_head(hidden),
        }
    }

    /// Every linear layer with its path, in the order of the computation.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut Linear)> {
        let blocks = self.blocks.iter_mut().enumerate().flat_map(|(layer_idx, block)| {
            block
                .linears_mut()
                .into_iter()
                .map(move |(name, linear)| (format!("model.layers.{layer_idx}.{name}"), linear))
        });
        blocks.chain(self.head.iter_mut().map(|head| ("lm_head".to_owned(), head)))
    }
}

impl Block {
    fn forward(&self, x: &Array, position: Position<'_>, keys: Option<&DropoutKeys>) -> Result<Array> {
        self.feed(&self.attend(x, position, keys)?, keys)
    }

    fn attend(&self, x: &Array, position: Position<'_>, keys: Option<&DropoutKeys>) -> Result<Array> {
        let normed = self.attention_norm.forward(x)?;
        Ok(x.add(self.attention.forward(&normed, position, keys)?)?)
    }

    fn feed(&self, h: &Array, keys: Option<&DropoutKeys>) -> Result<Array> {
        let normed = self.feed_forward_norm.forward(h)?;
        Ok(h.add(self.feed_forward.forward(&normed, keys)?)?)
    }

    fn forward_for_training(
        &self,
        x: Pending,
        shape: &[i32],
        mask: &ReadyMask,
        turns: Option<&Turns>,
        key: Option<&Array>,
    ) -> Result<Pending> {
        let keys = key.map(|key| DropoutKeys::new(key, LINEARS_PER_BLOCK)).transpose()?;
        let keys = keys.as_ref();
        let fused = self.fused.attention.as_ref().zip(turns);
        let h = match fused.filter(|_| keys.is_none() || FusedAttention::is_without_dropout(&self.attention)) {
            Some((fused, turns)) => fused.forward(&self.attention, &self.attention_norm, &x, shape, mask, turns)?,
            None => {
                let position = Position {
                    mask,
                    offset: 0,
                    cache: None,
                };
                Pending::done(&self.attend(&x.sum(shape)?, position, keys)?)?
            }
        };
        let fused = self.fused.feed_forward.as_ref();
        match fused.filter(|_| keys.is_none() || FusedFeedForward::is_without_dropout(&self.feed_forward)) {
            Some(fused) => fused.forward(&self.feed_forward, &self.feed_forward_norm, &h),
            None => Pending::done(&self.feed(&h.sum(shape)?, keys)?),
        }
    }

    /// Keeps only `x` for the backward pass. The trainable arrays are inputs, since gradients flow to inputs only; the key is
    /// one too, else a trace would keep the dropout masks, which depend on nothing else.
    fn forward_checkpointed(
        &self,
        x: &Array,
        mask: &ReadyMask,
        turns: Option<&Turns>,
        key: Option<Array>,
        trainable: Trainable,
    ) -> Result<Array> {
        let mut inputs = vec![x.clone()];
        inputs.extend(self.collect(trainable).into_iter().map(|(_, array)| array));
        let n_parameters = inputs.len() - 1;
        inputs.extend(key);
        let (mut block, mask, turns) = (self.clone(), mask.clone(), turns.cloned());
        let [y] = ops::exactly(transforms::checkpoint::<Error, _>(
            move |inputs| {
                let Some((x, rest)) = inputs.split_first() else {
                    return Ok(Vec::new());
                };
                let (parameters, key) = rest.split_at(n_parameters);
                block.replace(trainable, parameters);
                let (x, shape) = (Pending::done(x)?, x.shape());
                let y = block.forward_for_training(x, shape, &mask, turns.as_ref(), key.first())?;
                Ok(vec![y.sum(shape)?])
            },
            &inputs,
        )?)?;
        Ok(y)
    }

    fn linears_mut(&mut self) -> [(&'static str, &mut Linear); LINEARS_PER_BLOCK] {
        let (attention, feed_forward) = (&mut self.attention, &mut self.feed_forward);
        [
            ("self_attn.q_proj", &mut attention.query),
            ("self_attn.k_proj", &mut attention.key),
            ("self_attn.v_proj", &mut attention.value),
            ("self_attn.o_proj", &mut attention.output),
            ("mlp.gate_proj", &mut feed_forward.gate),
            ("mlp.up_proj", &mut feed_forward.up),
            ("mlp.down_proj", &mut feed_forward.down),
        ]
    }
}

impl Parameters for Decoder {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        let model = join(path, "model");
        self.embedding.visit(&join(&model, "embed_tokens"), visitor);
        for (layer_idx, block) in self.blocks.iter_mut().enumerate() {
            block.visit(&format!("{model}.layers.{layer_idx}"), visitor);
        }
        self.norm.visit(&join(&model, "norm"), visitor);
        if let Some(head) = &mut self.head {
            head.visit(&join(path, "lm_head"), visitor);
        }
    }
}

impl Parameters for Block {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.attention_norm.visit(&join(path, "input_layernorm"), visitor);
        self.attention.visit(&join(path, "self_attn"), visitor);
        self.feed_forward_norm
            .visit(&join(path, "post_attention_layernorm"), visitor);
        self.feed_forward.visit(&join(path, "mlp"), visitor);
    }
}
