//! Runs a function of an opened package, one step after the other.

use std::{collections::BTreeMap, sync::Arc};

use half::f16;
use ndarray::{Array2, ArrayD, ArrayView2, Axis, Dimension, IxDyn, Slice};
use rayon::prelude::*;

use super::{
    load::{Function, Package, Step},
    value::{HalfTensor, Value},
};
use crate::{
    DType, Dim, Error, Result, TensorType, Type,
    infer::{axis_of, broadcast},
};

/// Arithmetic of the interpreter. Stored weights are fp16 in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Each result is rounded to its declared type; sums inside an operator are f32.
    F16,
    /// Results stay f32: what remains is the rounding of the weights.
    F32,
}

/// Contents of states by name.
pub type StateMap = BTreeMap<String, Arc<ArrayD<f32>>>;

const BLOCK_ELEMENTS: usize = 1 << 19;

impl Package {
    /// States of a function, filled with zeros.
    ///
    /// # Errors
    /// [`Error::Call`] for an unknown function.
    pub fn new_state(&self, function: &str) -> Result<StateMap> {
        let states = self
            .function(function)?
            .inputs
            .iter()
            .filter_map(|(name, ty, _)| match ty {
                Type::State(inner) => Some((
                    name.clone(),
                    Arc::new(ArrayD::zeros(IxDyn(&inner.shape().unwrap_or_default()))),
                )),
                Type::Tensor(_) => None,
            });
        Ok(states.collect())
    }

    /// Runs a function; states are updated in place.
    ///
    /// # Errors
    /// [`Error::Call`] for an unknown function or an input that is missing or misshapen; [`Error::Operation`] when an operation
    /// cannot be carried out (an index outside its table, a window outside its tensor).
    pub fn run(
        &self,
        function: &str,
        inputs: &BTreeMap<String, Value>,
        state: &mut StateMap,
        precision: Precision,
    ) -> Result<BTreeMap<String, Value>> {
        let function = self.function(function)?;
        let mut values: Vec<Option<Value>> = vec![None; function.value_count];
        for (name, ty, index) in &function.inputs {
            values[*index] = Some(bind_input(name, ty, inputs, precision)?);
        }
        for (index, value) in &function.constants {
            values[*index] = Some(value.clone());
        }
        let mut run = Run {
            values,
            state,
            precision,
        };
        for step in &function.steps {
            run.step(step).map_err(|problem| {
                let name = step.result.as_ref().map_or("", |(name, ..)| name.as_str());
                Error::Operation {
                    operation: format!("{} {name}", step.operator),
                    problem,
                }
            })?;
        }
        let output = |(name, index): &(String, usize)| Some((name.clone(), run.values[*index].clone()?));
        Ok(function.outputs.iter().filter_map(output).collect())
    }

    fn function(&self, name: &str) -> Result<&Function> {
        self.functions.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.function_names().collect();
            Error::call("function", name, format!("one of {}", known.join(", ")))
        })
    }
}

fn bind_input(name: &str, ty: &Type, inputs: &BTreeMap<String, Value>, precision: Precision) -> Result<Value> {
    let Type::Tensor(ty) = ty else {
        return Ok(Value::State(name.into()));
    };
    let value = inputs
        .get(name)
        .ok_or_else(|| Error::call("input", name, "must be given"))?;
    let fits = |shape: &[usize]| {
        let one = |(d, dim): (&usize, &Dim)| *dim == Dim::Fixed(*d) || *dim == Dim::Unknown;
        shape.len() == ty.rank() && shape.iter().zip(&ty.dims).all(one)
    };
    if !value.shape().is_some_and(fits) {
        return Err(Error::call(
            "input",
            name,
            format!("expected {ty}, found shape {:?}", value.shape()),
        ));
    }
    Ok(rounded(value.clone(), ty, precision))
}

type Outcome<T> = Result<T, String>;
type Floats = Arc<ArrayD<f32>>;

struct Run<'a> {
    values: Vec<Option<Value>>,
    state: &'a mut StateMap,
    precision: Precision,
}

impl Run<'_> {
    fn step(&mut self, step: &Step) -> Outcome<()> {
        let result = self.execute(step)?;
        for index in &step.last_used {
            self.values[*index] = None;
        }
        let (Some((_, index, ty)), Some(value)) = (&step.result, result) else {
            return Ok(());
        };
        if let (Some(declared), Some(found)) = (ty.shape(), value.shape())
            && declared != found
        {
            return Err(format!("it computed shape {found:?}, declared is {ty}"));
        }
        self.values[*index] = Some(rounded(value, ty, self.precision));
        Ok(())
    }

    fn execute(&mut self, step: &Step) -> Outcome<Option<Value>> {
        let float = |a: ArrayD<f32>| Some(Value::Float(Arc::new(a)));
        Ok(match step.operator.as_str() {
            "write_state" => {
                let (name, data) = (self.state_name(step)?, self.floats(step, "data")?);
                self.state.insert(name, data);
                None
            }
            "read_state" => {
                let name = self.state_name(step)?;
                let held = if step.takes_state {
                    self.state.remove(&name)
                } else {
                    self.state.get(&name).cloned()
                };
                Some(Value::Float(held.ok_or_else(|| format!("state {name} was not given"))?))
            }
            "slice_update" => {
                let (begin, end) = (self.ints(step, "begin")?, self.ints(step, "end")?);
                let update = self.floats(step, "update")?;
                let x = self.take_floats(step, "x")?;
                Some(Value::Float(slice_update(x, &update, &begin, &end)?))
            }
            "add" | "mul" => Some(self.arithmetic(step)?),
            "gather" => Some(gather(
                self.value(step, "x")?,
                &self.ints(step, "indices")?,
                self.shape(step, "indices")?,
                self.int(step, "axis")?,
            )?),
            "conv" => float(self.conv(step)?),
            "concat" => Some(self.concat(step)?),
            "silu" => float(self.floats(step, "x")?.mapv(|v| v / (1.0 + (-v).exp()))),
            "softmax" => float(softmax(self.floats(step, "x")?.as_ref(), self.int(step, "axis")?)?),
            "layer_norm" => float(self.layer_norm(step)?),
            "matmul" => float(self.matmul(step)?),
            "cast" => Some(self.cast(step)?),
            "greater_equal" => Some(self.greater_equal(step)?),
            "select" => Some(self.select(step)?),
            _ => Some(self.movement(step)?),
        })
    }

    /// Operators that only move data, of any type.
    fn movement(&self, step: &Step) -> Outcome<Value> {
        match self.value(step, "x")? {
            Value::Int(a) => Ok(Value::Int(Arc::new(self.moved(step, a)?))),
            Value::Bool(a) => Ok(Value::Bool(Arc::new(self.moved(step, a)?))),
            other => {
                let floats = other.to_floats().ok_or("x is no tensor")?;
                Ok(Value::Float(Arc::new(self.moved(step, &floats)?)))
            }
        }
    }

    fn moved<T: Clone>(&self, step: &Step, x: &ArrayD<T>) -> Outcome<ArrayD<T>> {
        let declared = || {
            step.result
                .as_ref()
                .and_then(|(_, _, ty)| ty.shape())
                .ok_or("a result of unknown shape")
        };
        match step.operator.as_str() {
            "identity" => Ok(x.clone()),
            // The new shape was derived from the parameters when the package was opened.
            "reshape" | "expand_dims" | "squeeze" => {
                let flat: Vec<T> = x.iter().cloned().collect();
                ArrayD::from_shape_vec(IxDyn(&declared()?), flat).map_err(|e| e.to_string())
            }
            "transpose" => {
                let perm = self.ints(step, "perm")?;
                let axes = perm
                    .iter()
                    .map(|p| axis_of(*p, x.ndim()))
                    .collect::<Outcome<Vec<_>>>()?;
                Ok(x.view().permuted_axes(IxDyn(&axes)).as_standard_layout().into_owned())
            }
            "slice_by_index" => {
                let (begin, end) = (self.ints(step, "begin")?, self.ints(step, "end")?);
                let part = x.slice_each_axis(|a| window(&begin, &end, a.axis.index()));
                Ok(part.as_standard_layout().into_owned())
            }
            "tile" => {
                let mut out = x.clone();
                for (axis, reps) in self.ints(step, "reps")?.iter().enumerate() {
                    let copies = vec![out.view(); (*reps).max(0) as usize];
                    out = ndarray::concatenate(Axis(axis), &copies).map_err(|e| e.to_string())?;
                }
                Ok(out.as_standard_layout().into_owned())
            }
            other => Err(format!("operator {other} cannot be run")),
        }
    }

    fn arithmetic(&self, step: &Step) -> Outcome<Value> {
        let add = step.operator == "add";
        let (x, y) = (self.value(step, "x")?, self.value(step, "y")?);
        let out = if let (Value::Int(x), Value::Int(y)) = (x, y) {
            let sum = zip(
                x,
                y,
                |a: i32, b: i32| if add { a.wrapping_add(b) } else { a.wrapping_mul(b) },
            )?;
            Value::Int(Arc::new(sum))
        } else {
            let (x, y) = (self.floats(step, "x")?, self.floats(step, "y")?);
            Value::Float(Arc::new(zip(&x, &y, |a: f32, b: f32| if add { a + b } else { a * b })?))
        };
        Ok(out)
    }

    fn greater_equal(&self, step: &Step) -> Outcome<Value> {
        match (self.value(step, "x")?, self.value(step, "y")?) {
            (Value::Int(x), Value::Int(y)) => Ok(Value::Bool(Arc::new(zip(x, y, |a: i32, b: i32| a >= b)?))),
            _ => Err("only integers are compared".into()),
        }
    }

    fn select(&self, step: &Step) -> Outcome<Value> {
        match (
            self.value(step, "cond")?,
            self.value(step, "a")?,
            self.value(step, "b")?,
        ) {
            (Value::Bool(cond), Value::Int(a), Value::Int(b))
                if cond.shape() == a.shape() && a.shape() == b.shape() =>
            {
                let mut out = b.as_ref().clone();
                ndarray::Zip::from(&mut out)
                    .and(cond.as_ref())
                    .and(a.as_ref())
                    .for_each(|o, c, a| {
                        if *c {
                            *o = *a;
                        }
                    });
                Ok(Value::Int(Arc::new(out)))
            }
            _ => Err("only integers of one shape are selected".into()),
        }
    }

    fn cast(&self, step: &Step) -> Outcome<Value> {
        let target = step.result.as_ref().map(|(_, _, ty)| ty.dtype);
        match (self.value(step, "x")?, target) {
            (value @ Value::Int(_), Some(DType::I32 | DType::I16 | DType::U16)) => Ok(value.clone()),
            (value @ (Value::Float(_) | Value::Half(_)), Some(DType::F16 | DType::F32)) => Ok(value.clone()),
            _ => Err("this conversion is not supported".into()),
        }
    }

    fn concat(&self, step: &Step) -> Outcome<Value> {
        let bound = step.args.get("values").ok_or("values is missing")?;
        let values: Vec<&Value> = bound.iter().filter_map(|i| self.values[*i].as_ref()).collect();
        let rank = values.first().and_then(|v| v.shape()).map_or(0, <[usize]>::len);
        let axis = Axis(axis_of(self.int(step, "axis")?, rank)?);
        if values.iter().all(|v| matches!(v, Value::Int(_))) {
            let arrays = values
                .iter()
                .filter_map(|v| if let Value::Int(a) = v { Some(a.view()) } else { None });
            let joined = ndarray::concatenate(axis, &arrays.collect::<Vec<_>>()).map_err(|e| e.to_string())?;
            return Ok(Value::Int(Arc::new(joined.as_standard_layout().into_owned())));
        }
        let arrays: Vec<Floats> = values
            .iter()
            .map(|v| v.to_floats().ok_or("mixed types"))
            .collect::<Result<_, _>>()?;
        let views: Vec<_> = arrays.iter().map(|a| a.view()).collect();
        let joined = ndarray::concatenate(axis, &views).map_err(|e| e.to_string())?;
        Ok(Value::Float(Arc::new(joined.as_standard_layout().into_owned())))
    }

    /// A 1×1 convolution of `[1, c, h, w]`: `W [o, c] · x [c, h·w]`, in blocks of rows.
    fn conv(&self, step: &Step) -> Outcome<ArrayD<f32>> {
        let x = self.floats(step, "x")?;
        let shape = x.shape().to_vec();
        if shape[0] != 1 {
            return Err(format!("a batch of {}", shape[0]));
        }
        let (channels, columns) = (shape[1], shape[2] * shape[3]);
        let x = matrix(&x, channels, columns)?;
        let weight = self.value(step, "weight")?;
        let rows = weight.shape().map_or(0, |s| s[0]);
        let mut out = Array2::<f32>::zeros((rows, columns));
        let chunk = (BLOCK_ELEMENTS / channels.max(1)).max(1);
        let widened = match weight {
            Value::Half(_) => None,
            other => Some(other.to_floats().ok_or("the weight is no tensor")?),
        };
        let blocks: Vec<_> = out.axis_chunks_iter_mut(Axis(0), chunk).collect();
        blocks
            .into_par_iter()
            .enumerate()
            .try_for_each(|(i, mut target)| -> Outcome<()> {
                let elements = i * chunk * channels..(i * chunk + target.nrows()) * channels;
                let block = match (weight, &widened) {
                    (Value::Half(half), _) => half.floats(elements),
                    (_, Some(floats)) => floats.as_slice().ok_or("a strided weight")?[elements].to_vec(),
                    _ => return Err("the weight is no tensor".into()),
                };
                let block = ArrayView2::from_shape((target.nrows(), channels), &block).map_err(|e| e.to_string())?;
                ndarray::linalg::general_mat_mul(1.0, &block, &x, 0.0, &mut target);
                Ok(())
            })?;
        if step.args.contains_key("bias") {
            let bias = self.floats(step, "bias")?;
            for (mut row, b) in out.rows_mut().into_iter().zip(bias.iter()) {
                row += *b;
            }
        }
        let flat: Vec<f32> = out.into_iter().collect();
        ArrayD::from_shape_vec(IxDyn(&[1, rows, shape[2], shape[3]]), flat).map_err(|e| e.to_string())
    }

    fn layer_norm(&self, step: &Step) -> Outcome<ArrayD<f32>> {
        let (x, axes) = (self.floats(step, "x")?, self.ints(step, "axes")?);
        let epsilon = f64::from(*self.floats(step, "epsilon")?.first().ok_or("no epsilon")?);
        let [axis] = axes.as_slice() else {
            return Err("more than one axis is not supported".into());
        };
        let mut out = x.as_ref().clone();
        for mut lane in out.lanes_mut(Axis(axis_of(*axis, x.ndim())?)) {
            let count = lane.len() as f64;
            let mean = lane.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
            let variance = lane.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / count;
            let scale = 1.0 / (variance + epsilon).sqrt();
            lane.mapv_inplace(|v| ((f64::from(v) - mean) * scale) as f32);
        }
        Ok(out)
    }

    fn matmul(&self, step: &Step) -> Outcome<ArrayD<f32>> {
        let (x, y) = (self.floats(step, "x")?, self.floats(step, "y")?);
        let turned = |name: &str| -> Outcome<bool> {
            if !step.args.contains_key(name) {
                return Ok(false);
            }
            match self.value(step, name)? {
                Value::Bool(flag) => Ok(flag.iter().all(|f| *f)),
                _ => Err(format!("{name} is no bool")),
            }
        };
        let (turn_x, turn_y) = (turned("transpose_x")?, turned("transpose_y")?);
        let batch = |a: &ArrayD<f32>| a.shape()[..a.ndim() - 2].to_vec();
        if batch(&x) != batch(&y) {
            return Err(format!("batches {:?} and {:?} differ", batch(&x), batch(&y)));
        }
        let shape = step
            .result
            .as_ref()
            .and_then(|(_, _, ty)| ty.shape())
            .ok_or("a result of unknown shape")?;
        let last2 = |a: &ArrayD<f32>| (a.shape()[a.ndim() - 2], a.shape()[a.ndim() - 1]);
        let ((xr, xc), (yr, yc)) = (last2(&x), last2(&y));
        let (x, y) = (x.as_slice().ok_or("x is strided")?, y.as_slice().ok_or("y is strided")?);
        let mut out = Vec::with_capacity(shape.iter().product());
        for (x, y) in x.chunks_exact((xr * xc).max(1)).zip(y.chunks_exact((yr * yc).max(1))) {
            let (x, y) = (ArrayView2::from_shape((xr, xc), x), ArrayView2::from_shape((yr, yc), y));
            let (x, y) = (x.map_err(|e| e.to_string())?, y.map_err(|e| e.to_string())?);
            let (x, y) = (
                if turn_x { x.reversed_axes() } else { x },
                if turn_y { y.reversed_axes() } else { y },
            );
            out.extend(x.dot(&y).iter().copied());
        }
        ArrayD::from_shape_vec(IxDyn(&shape), out).map_err(|e| e.to_string())
    }

    fn index(&self, step: &Step, name: &str) -> Outcome<usize> {
        step.args
            .get(name)
            .and_then(|bound| bound.first())
            .copied()
            .ok_or_else(|| format!("{name} is missing"))
    }

    fn value(&self, step: &Step, name: &str) -> Outcome<&Value> {
        self.values[self.index(step, name)?]
            .as_ref()
            .ok_or_else(|| format!("{name} has no value"))
    }

    fn shape(&self, step: &Step, name: &str) -> Outcome<&[usize]> {
        self.value(step, name)?
            .shape()
            .ok_or_else(|| format!("{name} is no tensor"))
    }

    fn floats(&self, step: &Step, name: &str) -> Outcome<Floats> {
        self.value(step, name)?
            .to_floats()
            .ok_or_else(|| format!("{name} holds no floats"))
    }

    /// A float operand that is given up where this is its last use, so that it can be changed in place.
    fn take_floats(&mut self, step: &Step, name: &str) -> Outcome<Floats> {
        let index = self.index(step, name)?;
        let floats = self.floats(step, name)?;
        if step.last_used.contains(&index) {
            self.values[index] = None;
        }
        Ok(floats)
    }

    fn ints(&self, step: &Step, name: &str) -> Outcome<Vec<i32>> {
        match self.value(step, name)? {
            Value::Int(a) => Ok(a.iter().copied().collect()),
            _ => Err(format!("{name} holds no integers")),
        }
    }

    fn int(&self, step: &Step, name: &str) -> Outcome<i32> {
        self.ints(step, name)?
            .first()
            .copied()
            .ok_or_else(|| format!("{name} is empty"))
    }

    fn state_name(&self, step: &Step) -> Outcome<String> {
        match self.value(step, "input")? {
            Value::State(name) => Ok(name.clone()),
            _ => Err("input is no state".into()),
        }
    }
}

/// A compressed weight, unpacked to fp16: `scale · (data − offset)`, or entries of tables.
pub(super) fn unpack_weight(data: &Value, side: &Value, offset: Option<&Value>) -> Outcome<Value> {
    let Value::Int(data) = data else {
        return Err("compressed weights are integers".into());
    };
    let side = side.to_floats().ok_or("scales and tables are floats")?;
    let offset = match offset {
        None => None,
        Some(Value::Int(offset)) => Some(offset.iter().copied().collect::<Vec<_>>()),
        Some(_) => return Err("offsets are integers".into()),
    };
    let (shape, side_shape) = (data.shape(), side.shape());
    let blocks: Vec<usize> = shape.iter().zip(side_shape).map(|(d, s)| d / s).collect();
    let entries: usize = side_shape[shape.len()..].iter().product();
    let is_table = side_shape.len() > shape.len();
    let side = side.as_slice().ok_or("a strided operand")?;
    let halves = data.indexed_iter().map(|(at, element)| {
        let group = at
            .slice()
            .iter()
            .zip(&blocks)
            .zip(side_shape)
            .fold(0, |g, ((i, b), s)| g * s + i / b);
        let value = if is_table {
            side[group * entries + *element as usize]
        } else {
            (element - offset.as_ref().map_or(0, |o| o[group])) as f32 * side[group]
        };
        f16::from_f32(value)
    });
    Ok(Value::Half(Arc::new(HalfTensor {
        shape: shape.to_vec(),
        data: halves.collect(),
    })))
}

/// Rounds floats to their declared type where the precision asks for it.
fn rounded(value: Value, ty: &TensorType, precision: Precision) -> Value {
    match value {
        Value::Float(mut array) if ty.dtype == DType::F16 && precision == Precision::F16 => {
            // What is already rounded need not be copied: a state or a slice of one.
            if array
                .iter()
                .any(|v| f16::from_f32(*v).to_f32().to_bits() != v.to_bits())
            {
                Arc::make_mut(&mut array).mapv_inplace(|v| f16::from_f32(v).to_f32());
            }
            Value::Float(array)
        }
        other => other,
    }
}

fn matrix<'a>(x: &'a ArrayD<f32>, rows: usize, columns: usize) -> Outcome<ArrayView2<'a, f32>> {
    let slice = x.as_slice().ok_or("a strided operand")?;
    ArrayView2::from_shape((rows, columns), slice).map_err(|e| e.to_string())
}

fn window(begin: &[i32], end: &[i32], axis: usize) -> Slice {
    Slice::from(begin[axis] as isize..end[axis] as isize)
}

fn check_window(begin: &[i32], end: &[i32], shape: &[usize]) -> Outcome<()> {
    let inside = |i: usize| 0 <= begin[i] && begin[i] <= end[i] && end[i] as usize <= shape[i];
    if begin.len() == shape.len() && end.len() == shape.len() && (0..shape.len()).all(inside) {
        return Ok(());
    }
    Err(format!("window {begin:?} to {end:?} of shape {shape:?}"))
}

fn slice_update(mut x: Floats, update: &ArrayD<f32>, begin: &[i32], end: &[i32]) -> Outcome<Floats> {
    check_window(begin, end, x.shape())?;
    let array = Arc::make_mut(&mut x);
    let mut part = array.slice_each_axis_mut(|a| window(begin, end, a.axis.index()));
    if part.shape() != update.shape() {
        return Err(format!(
            "update {:?} for a window of {:?}",
            update.shape(),
            part.shape()
        ));
    }
    part.assign(update);
    Ok(x)
}

fn gather(x: &Value, indices: &[i32], indices_shape: &[usize], axis: i32) -> Outcome<Value> {
    let shape = x.shape().ok_or("x is no tensor")?;
    if axis != 0 || shape.is_empty() {
        return Err("only rows can be gathered".into());
    }
    let width: usize = shape[1..].iter().product();
    let out_shape = [indices_shape, &shape[1..]].concat();
    let mut out = Vec::with_capacity(indices.len() * width);
    for &index in indices {
        let row = usize::try_from(index).ok().filter(|i| *i < shape[0]);
        let row = row.ok_or_else(|| format!("index {index} of {} rows", shape[0]))?;
        let elements = row * width..(row + 1) * width;
        match x {
            Value::Half(half) => out.extend(half.floats(elements)),
            Value::Float(floats) => out.extend_from_slice(&floats.as_slice().ok_or("x is strided")?[elements]),
            _ => return Err("only floats can be gathered".into()),
        }
    }
    Value::floats(&out_shape, out).ok_or_else(|| "a gather of the wrong size".into())
}

fn softmax(x: &ArrayD<f32>, axis: i32) -> Outcome<ArrayD<f32>> {
    let mut out = x.clone();
    for mut lane in out.lanes_mut(Axis(axis_of(axis, x.ndim())?)) {
        let max = lane.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        lane.mapv_inplace(|v| (v - max).exp());
        let sum: f32 = lane.sum();
        lane.mapv_inplace(|v| v / sum);
    }
    Ok(out)
}

fn zip<A: Copy, T: Clone + Default>(x: &ArrayD<A>, y: &ArrayD<A>, f: impl Fn(A, A) -> T) -> Outcome<ArrayD<T>> {
    let shape = broadcast(x.shape(), y.shape()).ok_or("shapes do not broadcast")?;
    let (x, y) = (x.broadcast(IxDyn(&shape)), y.broadcast(IxDyn(&shape)));
    let (x, y) = (x.ok_or("x does not broadcast")?, y.ok_or("y does not broadcast")?);
    let mut out = ArrayD::from_elem(IxDyn(&shape), T::default());
    ndarray::Zip::from(&mut out)
        .and(x)
        .and(y)
        .for_each(|o, a, b| *o = f(*a, *b));
    Ok(out)
}
