//! The decoder as operations of Core AI, with the interface of Apple's own language models.
//!
//! Function `main`: `input_ids [1, t]`, `position_ids [1, s]` of all tokens so far, states `keyCache` and `valueCache`
//! `[layers, 1, kv heads, context, head size]`, output `logits [1, t, v]` in f16. `t`, `s` and the context are open, so that
//! one function serves prefill and decoding; the call writes rows `s − t` to before `s` of the caches.
//!
//! Norms, rotation and attention are composites: a device may replace them by kernels of those names, so declaration and
//! body say the same. Norms, angles and scale are computed in f32.

use std::collections::HashMap;

use coreai_asset::{
    Element, TensorType, Type,
    builder::{Extent, GraphBuilder, ProgramBuilder, State, Tensor},
    program::{Parameter, Program},
};
use planish_core::arch::{
    Activation, Arch, Attention, FeedForward, GateUp, Layer, LinearSpec, Mixer, Norm, NormKind, QkNormScope,
    QkvProjections, Residual, Rope, RopePairs, RopeScaling,
};

use super::formats::Formats;
use crate::{
    Error, Result,
    weights::{Job, WeightFormat},
};

/// What a query must not see gets this added to its score, as in Apple's bodies.
const MASKED: f32 = -1e4;
/// Declarations of composites are of this version.
const VERSION: (&str, Parameter) = ("version", Parameter::Int(1));

/// A program, and what fills its weights, in its order.
pub(crate) struct Planned {
    pub(crate) program: Program,
    pub(crate) jobs: Vec<Job>,
}

/// Plans the decoder for texts of up to `context` tokens.
///
/// # Errors
/// [`Error::Unsupported`] with the capability that is missing.
pub(crate) fn plan(arch: &Arch, context: usize, formats: &Formats) -> Result<Planned> {
    if !arch.prefix.is_empty() {
        return refused("a text model inside a larger one");
    }
    let cache = cache_type(arch)?;
    let ids = TensorType::new(Element::I32, &[Some(1), None]);
    let inputs = [
        ("input_ids", Type::Tensor(ids.clone())),
        ("position_ids", Type::Tensor(ids)),
        ("keyCache", Type::Handle(cache.clone())),
        ("valueCache", Type::Handle(cache)),
    ];
    let mut decoder = Decoder {
        arch,
        context,
        formats,
        program: ProgramBuilder::new(),
        main: GraphBuilder::new("main", &inputs),
        jobs: Vec::new(),
        matrices: HashMap::new(),
    };
    let mut keys = decoder.cache("keyCache")?;
    let mut values = decoder.cache("valueCache")?;
    let call = decoder.call()?;
    let mut x = decoder.embed()?;
    for (layer_idx, layer) in arch.layers.iter().enumerate() {
        x = decoder.layer(layer_idx, layer, &x, &call, [&mut keys, &mut values])?;
    }
    let logits = decoder.logits(&x)?;
    decoder.finish([keys, values], &logits)
}

/// Keys or values of all layers, `[layers, 1, kv heads, context, head size]`.
fn cache_type(arch: &Arch) -> Result<TensorType> {
    let shape_of = |layer: &Layer| {
        let Mixer::Attention(attention) = &layer.mixer;
        (attention.n_kv_heads, attention.head_dim)
    };
    let mut shapes = arch.layers.iter().map(shape_of);
    let (kv, hd) = shapes.next().ok_or_else(|| Error::internal("a model without layers"))?;
    if shapes.any(|other| other != (kv, hd)) {
        return refused("layers with different key and value heads");
    }
    let dims = [Some(arch.layers.len()), Some(1), Some(kv), None, Some(hd)];
    Ok(TensorType::new(Element::F16, &dims))
}

fn refused<T>(capability: &str) -> Result<T> {
    Err(Error::Unsupported {
        what: format!("Core AI export: {capability}"),
    })
}

struct Decoder<'a> {
    arch: &'a Arch,
    context: usize,
    formats: &'a Formats,
    program: ProgramBuilder,
    main: GraphBuilder,
    jobs: Vec<Job>,
    /// Weights that have been restored, by tensor.
    matrices: HashMap<String, Tensor>,
}

/// A state and what it holds now.
struct Cache {
    state: State,
    held: Tensor,
}

/// Lengths and positions of a call.
struct Call {
    /// Tokens of the call, of all so far, and before it: `[1]` each.
    tokens: Tensor,
    total: Tensor,
    before: Tensor,
    /// Positions of the call's tokens, `[1, t]`.
    positions: Tensor,
}

impl Decoder<'_> {
    fn cache(&mut self, name: &str) -> Result<Cache> {
        let mut state = self.main.state(name)?;
        let held = self.main.read(&mut state);
        Ok(Cache { state, held })
    }

    fn call(&mut self) -> Result<Call> {
        let (ids, all) = (self.main.input("input_ids")?, self.main.input("position_ids")?);
        let tokens = self.main.length(&ids, 1)?;
        let total = self.main.length(&all, 1)?;
        let before = self.main.sub(&total, &tokens)?;
        let positions = self
            .main
            .slice_axis(&all, 1, Extent::from(&before), Extent::from(&total))?;
        Ok(Call {
            tokens,
            total,
            before,
            positions,
        })
    }

    fn embed(&mut self) -> Result<Tensor> {
        let ids = self.main.input("input_ids")?;
        let table = self.matrix(
            &self.arch.embedding_path(),
            [self.arch.vocab_size, self.arch.hidden_size],
        )?;
        let rows = self.main.rows(&table, &ids)?; // [1, t, d]
        self.times(&rows, self.arch.embedding_factor)
    }

    /// `x` times a number, in f32.
    fn times(&mut self, x: &Tensor, factor: f32) -> Result<Tensor> {
        times(&mut self.main, x, factor)
    }

    fn layer(
        &mut self,
        layer_idx: usize,
        layer: &Layer,
        x: &Tensor,
        call: &Call,
        caches: [&mut Cache; 2],
    ) -> Result<Tensor> {
        let path = self.arch.layer_path(layer_idx);
        let Mixer::Attention(attention) = &layer.mixer;
        let normed = self.optional_norm(x, layer.pre_mixer_norm.as_ref(), &path)?;
        let mixed = self.attention(layer_idx, attention, &normed, call, caches)?;
        let mixed = self.optional_norm(&mixed, layer.post_mixer_norm.as_ref(), &path)?;
        let mixed = self.times(&mixed, layer.residual_factor)?;
        let joined = self.main.add(x, &mixed)?;
        let fed = match layer.residual {
            Residual::Sequential => self.optional_norm(&joined, layer.pre_feed_forward_norm.as_ref(), &path)?,
            Residual::Parallel => normed,
        };
        let fed = self.feed_forward(&layer.feed_forward, &fed, &path)?;
        let fed = self.optional_norm(&fed, layer.post_feed_forward_norm.as_ref(), &path)?;
        let fed = self.times(&fed, layer.residual_factor)?;
        Ok(self.main.add(&joined, &fed)?)
    }

    fn attention(
        &mut self,
        layer_idx: usize,
        attention: &Attention,
        x: &Tensor,
        call: &Call,
        [keys, values]: [&mut Cache; 2],
    ) -> Result<Tensor> {
        let path = self.arch.layer_path(layer_idx);
        let QkvProjections::Separate { query, key, value } = &attention.projections;
        let (h, kv, hd) = (attention.n_heads, attention.n_kv_heads, attention.head_dim);
        let norms = attention
            .qk_norm
            .as_ref()
            .map(|norms| (norms.scope, [&norms.query, &norms.key]));
        let norm_of = |which: usize| norms.map(|(scope, norms)| (scope, norms[which]));
        let q = self.heads(x, &query.at(&path), h, norm_of(0), call, &path)?; // [1, h, t, hd]
        let k = self.heads(x, &key.at(&path), kv, norm_of(1), call, &path)?;
        let v = self.heads(x, &value.at(&path), kv, None, call, &path)?;
        let (q, k) = match &attention.rope {
            Some(rope) => (self.rotate(&q, rope, call)?, self.rotate(&k, rope, call)?),
            None => (q, k),
        };
        let k = self.remember(layer_idx, keys, &k, call)?; // [1, kv, s, hd]
        let v = self.remember(layer_idx, values, &v, call)?;
        let y = self.attend(attention, &q, &k, &v)?;
        let y = self.main.transpose(&y, &[0, 2, 1, 3])?;
        let y = self
            .main
            .reshape(&y, &[1.into(), Extent::from(&call.tokens), (h * hd).into()])?;
        self.linear(&y, &attention.output.at(&path))
    }

    fn heads(
        &mut self,
        x: &Tensor,
        linear: &LinearSpec,
        heads: usize,
        norm: Option<(QkNormScope, &Norm)>,
        call: &Call,
        path: &str,
    ) -> Result<Tensor> {
        let mut y = self.linear(x, linear)?;
        if let Some((QkNormScope::Width, norm)) = norm {
            y = self.norm(&y, norm, path)?;
        }
        let hd = linear.output_dims / heads;
        let y = self
            .main
            .reshape(&y, &[1.into(), Extent::from(&call.tokens), heads.into(), hd.into()])?;
        let y = self.main.transpose(&y, &[0, 2, 1, 3])?;
        match norm {
            Some((QkNormScope::Head, norm)) => self.norm(&y, norm, path),
            Some((QkNormScope::Width, _)) | None => Ok(y),
        }
    }

    fn feed_forward(&mut self, feed_forward: &FeedForward, x: &Tensor, path: &str) -> Result<Tensor> {
        let FeedForward::Gated {
            activation,
            gate_up,
            down,
        } = feed_forward;
        let GateUp::Separate { gate, up } = gate_up;
        let gate = self.linear(x, &gate.at(path))?;
        let gate = match activation {
            Activation::Silu => self.main.silu(&gate)?,
            Activation::GeluTanh => self.main.gelu(&gate, true),
        };
        let up = self.linear(x, &up.at(path))?;
        let y = self.main.mul(&gate, &up)?;
        self.linear(&y, &down.at(path))
    }

    fn logits(&mut self, x: &Tensor) -> Result<Tensor> {
        let arch = self.arch;
        let x = self.norm(x, &arch.norm, arch.prefix.trim_end_matches('.'))?;
        let path = if arch.head.is_tied {
            arch.embedding_path()
        } else {
            arch.head_path()
        };
        let head = LinearSpec {
            path,
            input_dims: arch.hidden_size,
            output_dims: arch.vocab_size,
            has_bias: false,
        };
        let logits = self.linear(&x, &head)?;
        let logits = self.times(&logits, arch.head.factor)?;
        let Some(cap) = arch.head.softcap else {
            return Ok(logits);
        };
        let wide = self.main.cast(&logits, Element::F32);
        let wide = self.times(&wide, cap.recip())?;
        let capped = self.main.tanh(&wide);
        let capped = self.times(&capped, cap)?;
        Ok(self.main.cast(&capped, Element::F16))
    }

    fn finish(mut self, caches: [Cache; 2], logits: &Tensor) -> Result<Planned> {
        let states = caches.map(|cache| cache.state);
        self.program.add(self.main.finish(&states, &[("logits", logits)]))?;
        Ok(Planned {
            program: self.program.finish(),
            jobs: self.jobs,
        })
    }

    /// `x Wᵀ (+ bias)`; weights stay `[out, in]` in the file.
    fn linear(&mut self, x: &Tensor, linear: &LinearSpec) -> Result<Tensor> {
        let weight = self.matrix(&linear.path, [linear.output_dims, linear.input_dims])?;
        let weight = self.main.transpose(&weight, &[1, 0])?;
        let y = self.main.matmul(x, &weight)?;
        if !linear.has_bias {
            return Ok(y);
        }
        let bias = self.vector(&format!("{}.bias", linear.path), linear.output_dims)?;
        Ok(self.main.add(&y, &bias)?)
    }

    /// A weight matrix of a module, restored to half floats.
    fn matrix(&mut self, module: &str, [rows, columns]: [usize; 2]) -> Result<Tensor> {
        let tensor = format!("{module}.weight");
        if let Some(known) = self.matrices.get(&tensor) {
            return Ok(known.clone());
        }
        let format = self.formats.of(&tensor);
        let stored = Stored::of(format, [rows, columns])?;
        self.jobs.push(Job::rows(&tensor, 0..rows, format));
        let data = self.constant(&tensor, stored.data)?;
        let matrix = match stored.side {
            None => data,
            Some((suffix, ty)) => {
                let side = self.constant(&format!("{tensor}.{suffix}"), ty)?;
                match format.lut_bits() {
                    Some(_) => self.main.looked_up(&data, &side)?,
                    None => self.main.scaled(&data, &side)?,
                }
            }
        };
        self.matrices.insert(tensor, matrix.clone());
        Ok(matrix)
    }

    /// A vector in half floats.
    fn vector(&mut self, tensor: &str, dims: usize) -> Result<Tensor> {
        self.jobs.push(Job::rows(tensor, 0..dims, WeightFormat::Fp16));
        self.constant(tensor, TensorType::fixed(Element::F16, &[dims]))
    }

    fn constant(&mut self, name: &str, ty: TensorType) -> Result<Tensor> {
        let bytes = ty.element.byte_len(ty.count().unwrap_or(0));
        let weight = self.program.weight(name, bytes)?;
        Ok(self.main.weight(weight, ty))
    }

    fn optional_norm(&mut self, x: &Tensor, norm: Option<&Norm>, path: &str) -> Result<Tensor> {
        match norm {
            Some(norm) => self.norm(x, norm, path),
            None => Ok(x.clone()),
        }
    }

    fn norm(&mut self, x: &Tensor, norm: &Norm, path: &str) -> Result<Tensor> {
        let tensor = format!("{}.weight", norm.at(path));
        let scale = match norm.kind {
            NormKind::Rms { offset: 0.0 } => self.vector(&tensor, norm.dims)?,
            // The sum of offset and weight is kept whole, as Apple keeps it for Gemma.
            NormKind::Rms { offset: 1.0 } => {
                self.jobs.push(Job::plus_one(&tensor));
                self.constant(&tensor, TensorType::fixed(Element::F32, &[norm.dims]))?
            }
            NormKind::Rms { .. } => return refused("norms with an offset that is not 1"),
        };
        let name = format!(
            "rms_norm_{}_{}_{:08x}",
            suffix(x.ty()),
            scale.element().name(),
            norm.eps.to_bits()
        );
        self.composite(&name, &[("input", x), ("scale", &scale)], |g, inputs| {
            let result = rms_norm(g, &inputs[0], &inputs[1], norm.eps)?;
            let attributes = [
                ("axes", Parameter::Int(-1)),
                ("eps", Parameter::Float(norm.eps)),
                VERSION,
            ];
            Ok(("rms_norm", attributes.to_vec(), result))
        })
    }

    fn rotate(&mut self, x: &Tensor, rope: &Rope, call: &Call) -> Result<Tensor> {
        if rope.pairs != RopePairs::Halves {
            return refused("rotating adjacent pairs");
        }
        if rope.constant_up_to() < self.context {
            return refused("a rotation that depends on the length of the text; use a shorter --context");
        }
        let width = x.dims().last().copied().flatten().unwrap_or_default();
        let is_partial = rope.dims < width;
        if is_partial && rope.attention_factor() != 1.0 {
            return refused("a factor on a partial rotation");
        }
        let frequencies: Vec<f32> = rope.frequencies(self.context).iter().map(|f| *f as f32).collect();
        let mut attributes = vec![
            ("interleaved", Parameter::Bool(false)),
            ("scale", Parameter::Float(1.0)),
            VERSION,
        ];
        if is_partial {
            attributes.push(("dims", Parameter::Int(rope.dims as i64)));
        }
        let is_plain = rope.scaling == RopeScaling::None;
        if is_plain {
            attributes.insert(0, ("base", Parameter::Float(rope.theta)));
        }
        // Frequencies that are not powers of one base are an input.
        let given = self.main.floats(&frequencies);
        let mut inputs = vec![("input", x), ("position_ids", &call.positions)];
        if !is_plain {
            inputs.push(("freqs", &given));
        }
        let kind = if is_plain {
            format!("{:08x}", rope.theta.to_bits())
        } else {
            "freqs".into()
        };
        let name = format!("rope_{}_{}_{kind}", suffix(x.ty()), rope.dims);
        let turned = self.composite(&name, &inputs, |g, inputs| {
            let frequencies = match inputs.get(2) {
                Some(given) => given.clone(),
                None => g.floats(&frequencies),
            };
            let result = turn(g, &inputs[0], &inputs[1], &frequencies, rope.dims)?;
            Ok(("rope", attributes, result))
        })?;
        self.times(&turned, rope.attention_factor())
    }

    /// Writes the new rows of a layer and returns all of it so far, `[1, kv, s, hd]`.
    fn remember(&mut self, layer_idx: usize, cache: &mut Cache, new: &Tensor, call: &Call) -> Result<Tensor> {
        let dims = new.dims();
        let (kv, hd) = (dims[1].unwrap_or_default(), dims[3].unwrap_or_default());
        let new = self.main.expand(new, 0)?; // [1, 1, kv, t, hd]
        let from = |row: Extent| [layer_idx.into(), 0.into(), 0.into(), row, 0.into()];
        let end = [
            (layer_idx + 1).into(),
            1.into(),
            kv.into(),
            Extent::from(&call.total),
            hd.into(),
        ];
        let begin = from(Extent::from(&call.before));
        let updated = self.main.slice_update(&cache.held, &new, &begin, &end)?;
        self.main.write(&mut cache.state, &updated)?;
        cache.held = self.main.read(&mut cache.state);
        let rows = self.main.slice(&cache.held, &from(0.into()), &end)?;
        Ok(self.main.shrink(&rows, 0)?)
    }

    fn attend(&mut self, attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        if attention.softcap.is_some() {
            return refused("a soft cap on attention");
        }
        let window = attention.window.unwrap_or(0);
        let mut attributes = vec![("is_causal", Parameter::Bool(true)), VERSION];
        if attention.scale != (attention.head_dim as f32).sqrt().recip() {
            attributes.push(("scale", Parameter::Float(attention.scale)));
        }
        attributes.push(("window_size", Parameter::Int(window as i64)));
        let scale = attention.scale.to_bits();
        let name = format!(
            "attention_{}_{}_{window}_{scale:08x}",
            suffix(q.ty()),
            attention.n_kv_heads
        );
        self.composite(&name, &[("query", q), ("key", k), ("value", v)], |g, inputs| {
            let result = attend(g, attention, window, [&inputs[0], &inputs[1], &inputs[2]])?;
            Ok(("scaled_dot_product_attention", attributes, result))
        })
    }

    /// Invokes a composite, which is written when its name comes up first.
    fn composite(
        &mut self,
        name: &str,
        inputs: &[(&str, &Tensor)],
        body: impl FnOnce(&mut GraphBuilder, &[Tensor]) -> Result<Declared>,
    ) -> Result<Tensor> {
        if !self.program.has_graph(name) {
            let ports: Vec<(&str, Type)> = inputs
                .iter()
                .map(|(name, x)| (*name, Type::Tensor(x.ty().clone())))
                .collect();
            let mut graph = GraphBuilder::new(name, &ports);
            let arguments = ports
                .iter()
                .map(|(name, _)| Ok(graph.input(name)?))
                .collect::<Result<Vec<_>>>()?;
            let (function, attributes, result) = body(&mut graph, &arguments)?;
            self.program
                .add(graph.finish_composite(function, &attributes, &result))?;
        }
        let graph = self
            .program
            .graph(name)
            .ok_or_else(|| Error::internal("a graph that was just added"))?;
        let arguments: Vec<&Tensor> = inputs.iter().map(|row| row.1).collect();
        Ok(self.main.invoke(graph, &arguments)?)
    }
}

/// Function, parameters and result of a composite's body.
type Declared = (&'static str, Vec<(&'static str, Parameter)>, Tensor);

/// A type as part of a name, such as `1_t_128`.
fn suffix(ty: &TensorType) -> String {
    let dims = ty
        .dims
        .iter()
        .map(|dim| dim.map_or("t".to_owned(), |size| size.to_string()));
    dims.collect::<Vec<_>>().join("_")
}

/// `x` times a number, in f32; `x` itself for 1.
fn times(g: &mut GraphBuilder, x: &Tensor, factor: f32) -> Result<Tensor> {
    if factor == 1.0 {
        return Ok(x.clone());
    }
    let wide = g.cast(x, Element::F32);
    let factor = g.filled(Element::F32, &[], factor)?;
    let product = g.mul(&wide, &factor)?;
    Ok(g.cast(&product, x.element()))
}

/// `x / √(mean(x²) + eps)` in f32, then the scale: in half floats, or before rounding where the scale is f32.
fn rms_norm(g: &mut GraphBuilder, x: &Tensor, scale: &Tensor, eps: f32) -> Result<Tensor> {
    let wide = g.cast(x, Element::F32);
    let square = g.mul(&wide, &wide)?;
    let mean = g.mean(&square)?;
    let eps = g.filled(Element::F32, &[], eps)?;
    let mean = g.add(&mean, &eps)?;
    let inverse = g.rsqrt(&mean);
    let normed = g.mul(&wide, &inverse)?;
    let normed = g.cast(&normed, scale.element());
    let scaled = g.mul(&normed, scale)?;
    Ok(g.cast(&scaled, x.element()))
}

/// Turns pairs `(i, i + dims / 2)` of `x [1, h, t, hd]` by `position · frequency`; the rest of a head stays.
fn turn(g: &mut GraphBuilder, x: &Tensor, positions: &Tensor, frequencies: &Tensor, dims: usize) -> Result<Tensor> {
    let width = x.dims().last().copied().flatten().unwrap_or_default();
    let positions = g.expand(positions, 1)?; // [1, 1, t]
    let positions = g.cast(&positions, Element::F32);
    let positions = g.expand(&positions, 3)?; // [1, 1, t, 1]
    let angles = g.mul(&positions, frequencies)?; // [1, 1, t, dims / 2]
    let (cos, sin) = (g.cos(&angles), g.sin(&angles));
    let (cos, sin) = (g.cast(&cos, x.element()), g.cast(&sin, x.element()));
    let low = g.slice_axis(x, 3, 0.into(), (dims / 2).into())?;
    let high = g.slice_axis(x, 3, (dims / 2).into(), dims.into())?;
    let (low_cos, high_sin) = (g.mul(&low, &cos)?, g.mul(&high, &sin)?);
    let (high_cos, low_sin) = (g.mul(&high, &cos)?, g.mul(&low, &sin)?);
    let (low, high) = (g.sub(&low_cos, &high_sin)?, g.add(&high_cos, &low_sin)?);
    if dims == width {
        return Ok(g.concat(3, &[&low, &high])?);
    }
    let rest = g.slice_axis(x, 3, dims.into(), width.into())?;
    Ok(g.concat(3, &[&low, &high, &rest])?)
}

/// Causal attention of `q [1, h, t, hd]` to `k`, `v` `[1, kv, s, hd]`. Query heads that share a key head are a batch of it.
fn attend(g: &mut GraphBuilder, attention: &Attention, window: usize, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let (kv, group, hd) = (attention.n_kv_heads, attention.n_queries_per_kv(), attention.head_dim);
    let (t, s) = (g.length(q, 2)?, g.length(k, 2)?);
    let mask = mask(g, &t, &s, window, q.element())?; // [t, s]
    let q = times(g, q, attention.scale)?;
    let q = g.reshape(&q, &[kv.into(), group.into(), Extent::from(&t), hd.into()])?;
    let shared = |g: &mut GraphBuilder, x: &Tensor| {
        let dims = [kv.into(), 1.into(), Extent::from(&s), hd.into()];
        Ok::<_, Error>(g.reshape(x, &dims)?)
    };
    let k = shared(g, k)?;
    let k = g.transpose(&k, &[0, 1, 3, 2])?; // [kv, 1, hd, s]
    let scores = g.matmul(&q, &k)?;
    let scores = g.add(&scores, &mask)?;
    let weights = g.softmax(&scores)?; // [kv, group, t, s]
    let v = shared(g, v)?;
    let y = g.matmul(&weights, &v)?;
    Ok(g.reshape(&y, &[1.into(), (kv * group).into(), Extent::from(&t), hd.into()])?)
}

/// What is added to scores `[t, s]`: query `i` is at `s − t + i` and sees itself and what came before, at most `window` tokens
/// unless that is 0.
fn mask(g: &mut GraphBuilder, t: &Tensor, s: &Tensor, window: usize, element: Element) -> Result<Tensor> {
    let before = g.sub(s, t)?;
    let (from, to) = (g.reshape(&before, &[])?, g.reshape(s, &[])?);
    let zero = g.int(0);
    let (rows, columns) = (g.range(&from, &to)?, g.range(&zero, &to)?);
    let (rows, columns) = (g.expand(&rows, 1)?, g.expand(&columns, 0)?);
    let later = g.greater(&columns, &rows)?;
    let mut hidden = g.cast(&later, element);
    if window > 0 {
        let width = g.ints(&[window as i32 - 1]);
        let reached = g.add(&columns, &width)?;
        let left_behind = g.greater(&rows, &reached)?;
        let left_behind = g.cast(&left_behind, element);
        hidden = g.add(&hidden, &left_behind)?; // never both
    }
    let masked = g.filled(element, &[], MASKED)?;
    Ok(g.mul(&hidden, &masked)?)
}

/// Types of a stored matrix: its elements, and its scales or tables with their name.
struct Stored {
    data: TensorType,
    side: Option<(&'static str, TensorType)>,
}

impl Stored {
    fn of(format: WeightFormat, [rows, columns]: [usize; 2]) -> Result<Self> {
        let side = format.side_shape(rows, columns);
        let halves = |dims: &[usize]| TensorType::fixed(Element::F16, dims);
        let (element, side) = match format {
            WeightFormat::Fp16 => (Element::F16, None),
            WeightFormat::Int8 => (Element::I8, Some(("scale", halves(&side[..2])))),
            WeightFormat::Int4 => (Element::I4, Some(("scale", halves(&side[..2])))),
            WeightFormat::Lut4 => (Element::U4, Some(("table", halves(&[side[0], 1, 16, 1])))),
            WeightFormat::Lut6 => return refused("tables of 64 entries"),
        };
        Ok(Self {
            data: TensorType::fixed(element, &[rows, columns]),
            side,
        })
    }
}
