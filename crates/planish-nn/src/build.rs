//! From an architecture to the modules that compute it: the one place where this crate takes its enums apart.

use planish_core::arch::{self, Arch, FeedForward, GateUp, Layer, Mixer, Norm, NormKind, QkNormScope, QkvProjections};

use crate::attention::{Attention, HeadNorms};
use crate::decoder::{Block, Decoder, Fused, Head};
use crate::mlp::Gated;
use crate::parameters::Named;
use crate::weights::Weights;
use crate::{Linear, Result, RmsNorm, Rope};

/// The decoder that `arch` describes, from `weights`.
pub(crate) fn decoder(arch: &Arch, weights: &mut Weights<'_>) -> Result<Decoder> {
    let embedding = weights.embedding(&arch.embedding_path(), arch.embedding_factor, arch.head.is_tied)?;
    let mut builder = Builder {
        weights,
        ropes: Vec::new(),
    };
    let layers = arch.layers.iter().enumerate();
    let blocks = layers
        .map(|(layer_idx, layer)| builder.block(layer, arch.layer_path(layer_idx)))
        .collect::<Result<Vec<Block>>>()?;
    let prefix = arch.prefix.trim_end_matches('.').to_owned();
    let norm = builder.norm(&arch.norm, &prefix)?;
    let matrix = match arch.head.is_tied {
        true => None,
        false => Some(builder.weights.linear(&arch.head_path(), false)?),
    };
    Ok(Decoder {
        prefix,
        embedding_path: arch.embedding_path(),
        embedding,
        blocks,
        norm,
        head: Head {
            path: arch.head_path(),
            matrix,
            factor: arch.head.factor,
            softcap: arch.head.softcap,
        },
    })
}

struct Builder<'a, 'w> {
    weights: &'a mut Weights<'w>,
    /// Rotations so far: layers of one kind share their tables.
    ropes: Vec<Rope>,
}

impl Builder<'_, '_> {
    fn block(&mut self, layer: &Layer, path: String) -> Result<Block> {
        let Mixer::Attention(attention) = &layer.mixer;
        Ok(Block {
            mixer_norm: self.optional_norm(&layer.pre_mixer_norm, &path)?,
            attention: self.attention(attention, &path)?,
            post_mixer_norm: self.optional_norm(&layer.post_mixer_norm, &path)?,
            feed_forward_norm: self.optional_norm(&layer.pre_feed_forward_norm, &path)?,
            feed_forward: self.feed_forward(&layer.feed_forward, &path)?,
            post_feed_forward_norm: self.optional_norm(&layer.post_feed_forward_norm, &path)?,
            residual: layer.residual,
            residual_factor: layer.residual_factor,
            fused: Fused::default(),
            path,
        })
    }

    fn attention(&mut self, attention: &arch::Attention, path: &str) -> Result<Attention> {
        let QkvProjections::Separate { query, key, value } = &attention.projections;
        let head_norms = match &attention.qk_norm {
            Some(norms) => Some(HeadNorms {
                is_per_head: match norms.scope {
                    QkNormScope::Head => true,
                    QkNormScope::Width => false,
                },
                query: self.norm(&norms.query, path)?,
                key: self.norm(&norms.key, path)?,
            }),
            None => None,
        };
        Ok(Attention {
            query: self.linear(query, path)?,
            key: self.linear(key, path)?,
            value: self.linear(value, path)?,
            output: self.linear(&attention.output, path)?,
            joint: None,
            head_norms,
            n_heads: attention.n_heads as i32,
            n_kv_heads: attention.n_kv_heads as i32,
            head_dim: attention.head_dim as i32,
            rope: attention.rope.as_ref().map(|rope| self.rope(rope, attention.head_dim)),
            window: attention.window.and_then(|window| i32::try_from(window).ok()),
            scale: attention.scale,
            softcap: attention.softcap,
            kernels: self.weights.kernels(),
        })
    }

    fn feed_forward(&mut self, feed_forward: &FeedForward, path: &str) -> Result<Gated> {
        let FeedForward::Gated {
            activation,
            gate_up,
            down,
        } = feed_forward;
        let GateUp::Separate { gate, up } = gate_up;
        Ok(Gated {
            activation: *activation,
            gate: self.linear(gate, path)?,
            up: self.linear(up, path)?,
            down: self.linear(down, path)?,
            kernels: self.weights.kernels(),
        })
    }

    fn linear(&mut self, linear: &arch::Linear, path: &str) -> Result<Named<Linear>> {
        let whole = linear.at(path);
        Ok(Named {
            name: linear.name,
            module: self.weights.linear(&whole.path, whole.has_bias)?,
        })
    }

    fn norm(&mut self, norm: &Norm, path: &str) -> Result<Named<RmsNorm>> {
        let NormKind::Rms { offset } = norm.kind;
        Ok(Named {
            name: norm.name,
            module: self.weights.rms_norm(&norm.at(path), norm.eps, offset)?,
        })
    }

    fn optional_norm(&mut self, norm: &Option<Norm>, path: &str) -> Result<Option<Named<RmsNorm>>> {
        norm.as_ref().map(|norm| self.norm(norm, path)).transpose()
    }

    fn rope(&mut self, description: &arch::Rope, head_dim: usize) -> Rope {
        if let Some(rope) = self.ropes.iter().find(|rope| rope.is(description, head_dim)) {
            return rope.clone();
        }
        let rope = Rope::new(description, head_dim);
        self.ropes.push(rope.clone());
        rope
    }
}
