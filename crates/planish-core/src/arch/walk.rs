//! The walk over an architecture: every tensor and every linear layer, with name, shape and meaning.

use super::{Arch, FeedForward, GateUp, Layer, Linear, Mixer, Norm, NormKind, QkvProjections};

/// One tensor of a checkpoint, unquantised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchTensor {
    /// Such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// `weight` or `bias`.
    pub kind: &'static str,
    /// Row-major; a linear weight is `[output_dims, input_dims]`.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

/// What a module is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The table of token vectors.
    Embedding,
    /// The norm after the last layer.
    FinalNorm,
    /// The output head where it is not the embedding.
    Head,
    /// A part of the layer of this index.
    Layer(usize, Part),
}

/// What a module of a layer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names of the fields of `Layer`, `Attention` and `FeedForward`"
)]
pub enum Part {
    PreMixerNorm,
    Query,
    Key,
    Value,
    QueryNorm,
    KeyNorm,
    AttentionOutput,
    PostMixerNorm,
    PreFeedForwardNorm,
    Gate,
    Up,
    Down,
    PostFeedForwardNorm,
}

/// One linear layer with its whole path: `y = x Wᵀ (+ bias)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Module path, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Width of `x`.
    pub input_dims: usize,
    /// Width of `y`.
    pub output_dims: usize,
    /// Whether there is a bias `[output_dims]`.
    pub has_bias: bool,
}

/// A module of a layer.
enum Module<'a> {
    Linear(&'a Linear),
    Norm(&'a Norm),
}

impl Arch {
    /// Path of the embedding.
    pub fn embedding_path(&self) -> String {
        format!("{}model.embed_tokens", self.prefix)
    }

    /// Path of the output head, whether it has a tensor of its own or not.
    pub fn head_path(&self) -> String {
        format!("{}lm_head", self.prefix)
    }

    /// Path of the final norm.
    pub fn norm_path(&self) -> String {
        format!("{}{}", self.prefix, self.norm.name)
    }

    /// Path of a layer, such as `model.layers.0`.
    pub fn layer_path(&self, layer_idx: usize) -> String {
        format!("{}model.layers.{layer_idx}", self.prefix)
    }

    /// Every tensor of the model, in the order of the computation, as if nothing were quantised.
    pub fn tensors(&self) -> Vec<ArchTensor> {
        let vocabulary = vec![self.vocab_size, self.hidden_size];
        let mut tensors = vec![tensor(
            self.embedding_path(),
            "weight",
            vocabulary.clone(),
            Role::Embedding,
        )];
        for (layer_idx, layer) in self.layers.iter().enumerate() {
            let path = self.layer_path(layer_idx);
            for (part, module) in layer.modules() {
                module.tensors(&path, Role::Layer(layer_idx, part), &mut tensors);
            }
        }
        Module::Norm(&self.norm).tensors(self.prefix.trim_end_matches('.'), Role::FinalNorm, &mut tensors);
        if !self.head.is_tied {
            tensors.push(tensor(self.head_path(), "weight", vocabulary, Role::Head));
        }
        tensors
    }

    /// The linear layers of all layers, in the order of the computation: what an adapter can attach to. The head and the
    /// embedding are not among them.
    pub fn linears(&self) -> Vec<LinearSpec> {
        let of_layer = |(layer_idx, layer): (usize, &Layer)| {
            let path = self.layer_path(layer_idx);
            let linears = layer.modules().into_iter().filter_map(|(_, module)| match module {
                Module::Linear(linear) => Some(linear.at(&path)),
                Module::Norm(_) => None,
            });
            linears.collect::<Vec<_>>()
        };
        self.layers.iter().enumerate().flat_map(of_layer).collect()
    }

    /// How many numbers the model has.
    pub fn n_parameters(&self) -> usize {
        self.tensors()
            .iter()
            .map(|tensor| tensor.shape.iter().product::<usize>())
            .sum()
    }
}

impl Layer {
    /// Every module, in the order of the computation.
    fn modules(&self) -> Vec<(Part, Module<'_>)> {
        let mut modules = Vec::new();
        modules.extend(Module::of_norm(Part::PreMixerNorm, &self.pre_mixer_norm));
        match &self.mixer {
            Mixer::Attention(attention) => {
                match &attention.projections {
                    QkvProjections::Separate { query, key, value } => modules.extend([
                        (Part::Query, Module::Linear(query)),
                        (Part::Key, Module::Linear(key)),
                        (Part::Value, Module::Linear(value)),
                    ]),
                }
                modules.push((Part::AttentionOutput, Module::Linear(&attention.output)));
                if let Some(norms) = &attention.qk_norm {
                    modules.push((Part::QueryNorm, Module::Norm(&norms.query)));
                    modules.push((Part::KeyNorm, Module::Norm(&norms.key)));
                }
            }
        }
        modules.extend(Module::of_norm(Part::PostMixerNorm, &self.post_mixer_norm));
        modules.extend(Module::of_norm(Part::PreFeedForwardNorm, &self.pre_feed_forward_norm));
        match &self.feed_forward {
            FeedForward::Gated { gate_up, down, .. } => {
                match gate_up {
                    GateUp::Separate { gate, up } => {
                        modules.extend([(Part::Gate, Module::Linear(gate)), (Part::Up, Module::Linear(up))])
                    }
                }
                modules.push((Part::Down, Module::Linear(down)));
            }
        }
        modules.extend(Module::of_norm(Part::PostFeedForwardNorm, &self.post_feed_forward_norm));
        modules
    }
}

impl<'a> Module<'a> {
    fn of_norm(part: Part, norm: &'a Option<Norm>) -> Option<(Part, Self)> {
        norm.as_ref().map(|norm| (part, Module::Norm(norm)))
    }

    fn tensors(&self, path: &str, role: Role, list: &mut Vec<ArchTensor>) {
        let (name, weight, bias) = match self {
            Module::Linear(linear) => (
                linear.name,
                vec![linear.output_dims, linear.input_dims],
                linear.has_bias.then_some(linear.output_dims),
            ),
            Module::Norm(norm) => match norm.kind {
                NormKind::Rms { .. } => (norm.name, vec![norm.dims], None),
            },
        };
        let module = join(path, name);
        list.push(tensor(module.clone(), "weight", weight, role));
        list.extend(bias.map(|dims| tensor(module, "bias", vec![dims], role)));
    }
}

impl Linear {
    /// The same under the path of its layer.
    pub fn at(&self, path: &str) -> LinearSpec {
        LinearSpec {
            path: join(path, self.name),
            input_dims: self.input_dims,
            output_dims: self.output_dims,
            has_bias: self.has_bias,
        }
    }
}

impl Norm {
    /// Its module path under that of its layer.
    pub fn at(&self, path: &str) -> String {
        join(path, self.name)
    }
}

impl ArchTensor {
    /// Such as `model.layers.0.self_attn.q_proj.weight`.
    pub fn name(&self) -> String {
        format!("{}.{}", self.module, self.kind)
    }
}

fn tensor(module: String, kind: &'static str, shape: Vec<usize>, role: Role) -> ArchTensor {
    ArchTensor {
        module,
        kind,
        shape,
        role,
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}
