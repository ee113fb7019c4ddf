//! Composites computed from their declaration, as a device with kernels of these names does.
//!
//! A device may run the body or a kernel: both must give the same, so a check runs both.

use ndarray::{ArrayD, Axis, IxDyn, Slice};

use super::{
    operations::{Outcome, floats, matmul, softmax},
    value::Value,
};
use crate::program::{Composite, Parameter};

/// What Apple's bodies add to scores that a query must not see.
const MASKED: f32 = -1e4;

/// The result of a composite, by its name and parameters.
pub(super) fn run(composite: &Composite, operands: &[Value]) -> Outcome<Value> {
    let inputs = Inputs { composite, operands };
    match composite.name.as_str() {
        "rms_norm" => rms_norm(&inputs),
        "rope" => rope(&inputs),
        "scaled_dot_product_attention" => attention(&inputs),
        other => Err(format!("no kernel for {other}")),
    }
}

struct Inputs<'a> {
    composite: &'a Composite,
    operands: &'a [Value],
}

impl Inputs<'_> {
    fn optional(&self, name: &str) -> Option<&Value> {
        let at = self.composite.inputs.iter().position(|input| input == name)?;
        self.operands.get(at)
    }

    fn get(&self, name: &str) -> Outcome<&Value> {
        self.optional(name).ok_or_else(|| format!("no input {name}"))
    }

    fn tensor(&self, name: &str) -> Outcome<ArrayD<f32>> {
        Ok(floats(self.get(name)?)?.as_ref().clone())
    }

    fn float(&self, name: &str) -> Option<f32> {
        match self.composite.attribute(name) {
            Some(Parameter::Float(value)) => Some(value),
            _ => None,
        }
    }

    fn int(&self, name: &str) -> Option<i64> {
        match self.composite.attribute(name) {
            Some(Parameter::Int(value)) => Some(value),
            _ => None,
        }
    }

    fn flag(&self, name: &str) -> bool {
        self.composite.attribute(name) == Some(Parameter::Bool(true))
    }
}

/// `x / √(mean(x²) + eps) · scale` over the last axis.
fn rms_norm(inputs: &Inputs) -> Outcome<Value> {
    if inputs.int("axes") != Some(-1) {
        return Err("only a norm over the last axis is known".into());
    }
    let eps = inputs.float("eps").ok_or("no eps")?;
    let (mut x, scale) = (inputs.tensor("input")?, inputs.tensor("scale")?);
    let last = Axis(x.ndim().checked_sub(1).ok_or("a scalar")?);
    for mut lane in x.lanes_mut(last) {
        if lane.len() != scale.len() {
            return Err(format!("{} scales for {} numbers", scale.len(), lane.len()));
        }
        let mean = lane.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / lane.len() as f64;
        let inverse = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        lane.zip_mut_with(&scale, |v, s| *v *= inverse * s);
    }
    Ok(x.into())
}

/// Turns pairs `(i, i + half)` of the first `dims` numbers of each head by `position · frequency`.
fn rope(inputs: &Inputs) -> Outcome<Value> {
    if inputs.flag("interleaved") {
        return Err("only halves are turned against each other here".into());
    }
    let mut x = inputs.tensor("input")?; // [1, heads, t, d]
    let [_, _, tokens, width] = x.shape()[..] else {
        return Err(format!("input of shape {:?}", x.shape()));
    };
    let positions = match inputs.get("position_ids")? {
        Value::Int(positions) if positions.len() == tokens => positions.clone(),
        _ => return Err(format!("{tokens} positions are expected")),
    };
    let dims = inputs
        .int("dims")
        .map_or(width, |dims| (dims.max(0) as usize).min(width));
    let half = dims / 2;
    let scale = inputs.float("scale").unwrap_or(1.0);
    let frequencies: Vec<f32> = match inputs.optional("freqs") {
        Some(_) => inputs.tensor("freqs")?.iter().map(|f| f * scale).collect(),
        None => {
            let base = inputs.float("base").ok_or("neither base nor freqs")?;
            let of = |i: usize| f64::from(base).powf(-(i as f64) / half as f64) as f32 * scale;
            (0..half).map(of).collect()
        }
    };
    if frequencies.len() != half {
        return Err(format!("{} frequencies for {half} pairs", frequencies.len()));
    }
    for mut head in x
        .lanes_mut(Axis(3))
        .into_iter()
        .enumerate()
        .map(|(i, lane)| (i % tokens, lane))
    {
        let position = positions.iter().nth(head.0).copied().unwrap_or_default() as f32;
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = (position * frequency).sin_cos();
            let (low, high) = (head.1[i], head.1[i + half]);
            head.1[i] = low * cos - high * sin;
            head.1[i + half] = high * cos + low * sin;
        }
    }
    Ok(x.into())
}

/// Causal attention relative to the end: query `i` of `t` sees keys up to `s − t + i`, `window_size` of them if not 0.
fn attention(inputs: &Inputs) -> Outcome<Value> {
    let (query, key, value) = (inputs.tensor("query")?, inputs.tensor("key")?, inputs.tensor("value")?);
    let ([_, heads, tokens, width], [_, kv, length, _]) = (query.shape(), key.shape()) else {
        return Err(format!("query {:?}, key {:?}", query.shape(), key.shape()));
    };
    let (heads, tokens, kv, length) = (*heads, *tokens, *kv, *length);
    if kv == 0 || !heads.is_multiple_of(kv) || length < tokens || !inputs.flag("is_causal") {
        return Err(format!("query {:?}, key {:?}, causal", query.shape(), key.shape()));
    }
    let scale = inputs.float("scale").unwrap_or((*width as f32).sqrt().recip());
    let window = inputs
        .int("window_size")
        .filter(|w| *w > 0)
        .map_or(usize::MAX, |w| w as usize);
    let mut results = Vec::new();
    for head in 0..heads {
        let of = |x: &ArrayD<f32>, at: usize| {
            let part = x.slice_axis(Axis(1), Slice::from(at..at + 1));
            part.index_axis(Axis(1), 0).index_axis(Axis(0), 0).to_owned()
        };
        let group = head / (heads / kv);
        let keys = of(&key, group).reversed_axes();
        let scores = matmul(
            &Value::from(of(&query, head) * scale),
            &Value::from(keys.as_standard_layout().into_owned()),
        )?;
        let mut scores = floats(&scores)?.as_ref().clone(); // [t, s]
        for (place, score) in scores.indexed_iter_mut() {
            let row = length - tokens + place[0];
            let seen = place[1] <= row && row - place[1] < window;
            *score += if seen { 0.0 } else { MASKED };
        }
        let weights = softmax(&scores.into(), &[1])?;
        results.push(floats(&matmul(&weights, &Value::from(of(&value, group)))?)?);
    }
    let views: Vec<_> = results.iter().map(|r| r.view()).collect();
    let joined = ndarray::stack(Axis(0), &views).map_err(|e| e.to_string())?;
    let shape = [&[1], joined.shape()].concat();
    Ok(joined
        .into_shape_with_order(IxDyn(&shape))
        .map_err(|e| e.to_string())?
        .into())
}
