//! What each operation computes, after Core AI's documentation of it.

use std::sync::Arc;

use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, Axis, Dimension, IxDyn, Slice, SliceInfoElem};
use rayon::prelude::*;

use super::{
    stored::Matrix,
    value::{Value, read_floats, read_ints},
};
use crate::{
    Asset, Element, TensorType, Type,
    program::{Block, OpCode, Operation, Payload},
};

pub(super) type Outcome<T> = Result<T, String>;

/// Weights of two dimensions and more elements than this stay in their stored form.
const LARGE: usize = 1 << 14;
/// Elements of a stored matrix that one task restores.
const BLOCK_ELEMENTS: usize = 1 << 19;
/// Elements that one result may have.
const MAX_ELEMENTS: usize = 1 << 31;

/// The same expression for floats and for integers.
macro_rules! each {
    ($value:expr, $array:ident => $result:expr) => {
        match $value {
            Operand::Float($array) => Ok(Value::from($result)),
            Operand::Int($array) => Ok(Value::from($result)),
        }
    };
}

/// An operand with its elements at hand.
enum Operand {
    Float(Arc<ArrayD<f32>>),
    Int(Arc<ArrayD<i64>>),
}

/// The value of a constant.
pub(super) fn constant(asset: &Arc<Asset>, payload: &Payload, ty: &TensorType) -> Outcome<Value> {
    let shape: Vec<usize> = ty
        .dims
        .iter()
        .map(|dim| dim.ok_or("an open dimension"))
        .collect::<Result<_, _>>()?;
    let count = ty
        .count()
        .filter(|count| *count <= MAX_ELEMENTS)
        .ok_or("too many elements")?;
    match payload {
        Payload::Inline { data, splat: true } => {
            let one = elements(ty.element, data, 1)?;
            Ok(match one {
                Operand::Float(one) => filled(&shape, one.first().copied())?,
                Operand::Int(one) => filled(&shape, one.first().copied())?,
            })
        }
        Payload::Inline { data, splat: false } => shaped(elements(ty.element, data, count)?, &shape),
        Payload::Weight(index) => {
            let stored = asset.program().weights.get(*index).map_or(0, |weight| weight.bytes);
            if stored != ty.element.byte_len(count) {
                return Err(format!("a weight of {stored} bytes for {ty}"));
            }
            if let ([rows, columns], true) = (&shape[..], count > LARGE) {
                return Ok(Value::Matrix(Matrix::plain(
                    asset.clone(),
                    *index,
                    ty.element,
                    *rows,
                    *columns,
                )));
            }
            let data = asset.weight(*index, 0..stored).map_err(|e| e.to_string())?;
            shaped(elements(ty.element, &data, count)?, &shape)
        }
        _ => Err("a constant without data".into()),
    }
}

fn filled<T: Clone>(shape: &[usize], value: Option<T>) -> Outcome<Value>
where
    Value: From<ArrayD<T>>,
{
    let value = value.ok_or("a constant without its element")?;
    Ok(ArrayD::from_elem(IxDyn(shape), value).into())
}

fn elements(element: Element, data: &[u8], count: usize) -> Outcome<Operand> {
    if data.len() as u64 != element.byte_len(count) {
        return Err(format!(
            "{} bytes for {count} elements of {}",
            data.len(),
            element.name()
        ));
    }
    let flat = |e: ndarray::ShapeError| e.to_string();
    if let Some(floats) = read_floats(element, data) {
        return Ok(Operand::Float(Arc::new(
            ArrayD::from_shape_vec(IxDyn(&[count]), floats).map_err(flat)?,
        )));
    }
    let ints = read_ints(element, data, count).unwrap_or_default();
    Ok(Operand::Int(Arc::new(
        ArrayD::from_shape_vec(IxDyn(&[count]), ints).map_err(flat)?,
    )))
}

fn shaped(operand: Operand, shape: &[usize]) -> Outcome<Value> {
    each!(operand, array => reshaped(&array, shape)?)
}

fn reshaped<T: Clone>(array: &ArrayD<T>, shape: &[usize]) -> Outcome<ArrayD<T>> {
    let values: Vec<T> = array.iter().cloned().collect();
    ArrayD::from_shape_vec(IxDyn(shape), values).map_err(|_| format!("{:?} as {shape:?}", array.shape()))
}

/// One result of an operation that neither invokes nor touches a state.
pub(super) fn apply(operation: &Operation, operands: &[Value], types: &[Type]) -> Outcome<Value> {
    let ty = types
        .first()
        .and_then(Type::tensor)
        .ok_or("one tensor is expected as its result")?;
    let need = operand_count(operation.code);
    if need.is_some_and(|need| need != operands.len()) {
        return Err(format!("{} operands", operands.len()));
    }
    let x = operands.first().ok_or("it has no operand")?;
    let at = |index: usize| operands.get(index).ok_or_else(|| format!("no operand {index}"));
    match operation.code {
        OpCode::GetShape => {
            let shape = x.shape().ok_or("not a tensor")?;
            let dims = shape.iter().map(|d| *d as i64).collect();
            Value::ints(&[shape.len()], dims).ok_or_else(|| "too large a shape".into())
        }
        OpCode::Cast => cast(x, ty.element),
        OpCode::Slice => slice(x, &bounds(operands, 1)?),
        OpCode::SliceUpdate => slice_update(x, at(4)?, &bounds(operands, 1)?),
        OpCode::Concat => concat(operands),
        OpCode::Reshape => reshape(x, &numbers(at(1)?)?),
        OpCode::Transpose => transpose(x, &axes(at(1)?, None)?),
        OpCode::ExpandDims | OpCode::ShrinkDims => change_dims(operation.code, x, at(1)?),
        OpCode::GatherNd => gather(x, at(1)?),
        OpCode::GatherAlongAxis => gather_along_axis(x, at(1)?, &numbers(at(2)?)?),
        OpCode::BatchMatmul | OpCode::BroadcastingBatchMatmul => matmul(x, at(1)?),
        OpCode::Add | OpCode::BroadcastingAdd => binary(x, at(1)?, |a, b| a + b, i64::wrapping_add),
        OpCode::Sub | OpCode::BroadcastingSub => binary(x, at(1)?, |a, b| a - b, i64::wrapping_sub),
        OpCode::Mul | OpCode::BroadcastingMul => binary(x, at(1)?, |a, b| a * b, i64::wrapping_mul),
        OpCode::Divide | OpCode::BroadcastingDivide => {
            binary(x, at(1)?, |a, b| a / b, |a, b| a.checked_div(b).unwrap_or(0))
        }
        OpCode::Maximum => binary(x, at(1)?, f32::max, i64::max),
        OpCode::Greater | OpCode::BroadcastingGreater => greater(x, at(1)?),
        OpCode::Where | OpCode::BroadcastingWhere => choose(x, at(1)?, at(2)?),
        OpCode::Not => Ok(ints(x)?.mapv(|v| i64::from(v == 0)).into()),
        OpCode::Rsqrt => unary(x, |v| 1.0 / v.sqrt()),
        OpCode::Cos => unary(x, f32::cos),
        OpCode::Sin => unary(x, f32::sin),
        OpCode::Exp => unary(x, f32::exp),
        OpCode::Tanh => unary(x, f32::tanh),
        OpCode::Silu => unary(x, |v| v / (1.0 + (-v).exp())),
        OpCode::Gelu => match operation.payload {
            Payload::Gelu { tanh: true } => unary(x, gelu_tanh),
            _ => Err("gelu by the error function is not known here".into()),
        },
        OpCode::Range => range(operands),
        OpCode::BroadcastShapes => {
            let shape = broadcast(&sizes(x)?, &sizes(at(1)?)?)?;
            let dims = shape.iter().map(|d| *d as i64).collect();
            Value::ints(&[shape.len()], dims).ok_or_else(|| "too large a shape".into())
        }
        OpCode::BroadcastTo => broadcast_to(x, &sizes(at(1)?)?),
        OpCode::BroadcastInDims => broadcast_in_dims(x, at(1)?, at(2)?),
        OpCode::Reduce => {
            let region = operation.region.as_ref().ok_or("a reduction without a region")?;
            reduce_by(x, &axes(at(1)?, Some(rank(x)?))?, at(2)?, region)
        }
        OpCode::ReduceSum => reduce(x, at(1)?, 0.0, 0, |a, b| a + b, i64::wrapping_add),
        OpCode::ReduceMax => reduce(x, at(1)?, f32::MIN, i64::MIN, f32::max, i64::max),
        OpCode::ReduceProduct => reduce(x, at(1)?, 1.0, 1, |a, b| a * b, i64::wrapping_mul),
        OpCode::ReduceMean => mean(x, &axes(at(1)?, Some(rank(x)?))?),
        OpCode::Softmax => softmax(x, &axes(at(1)?, Some(rank(x)?))?),
        OpCode::BlockwiseShiftScale => restore_scaled(x, at(1)?, at(2)?, at(3)?),
        OpCode::LutToDense => restore_table(x, at(1)?),
        OpCode::Constant
        | OpCode::CreateToken
        | OpCode::ReadHandle
        | OpCode::WriteHandle
        | OpCode::Invoke
        | OpCode::Output
        | OpCode::Yield => Err("it has no value of its own".into()),
    }
}

/// Number of operands where it is fixed and more than one matters.
fn operand_count(code: OpCode) -> Option<usize> {
    match code {
        OpCode::GetShape | OpCode::Cast | OpCode::Not | OpCode::Silu | OpCode::Gelu => Some(1),
        OpCode::Rsqrt | OpCode::Cos | OpCode::Sin | OpCode::Exp | OpCode::Tanh => Some(1),
        OpCode::Range | OpCode::Where | OpCode::BroadcastingWhere | OpCode::Reduce => Some(3),
        OpCode::Slice | OpCode::BlockwiseShiftScale => Some(4),
        OpCode::SliceUpdate => Some(5),
        _ => None,
    }
}

fn operand(value: &Value) -> Outcome<Operand> {
    match value {
        Value::Int(array) => Ok(Operand::Int(array.clone())),
        _ => Ok(Operand::Float(floats(value)?)),
    }
}

/// The elements as floats; a stored matrix is restored whole.
pub(super) fn floats(value: &Value) -> Outcome<Arc<ArrayD<f32>>> {
    match value {
        Value::Float(array) => Ok(array.clone()),
        Value::Matrix(matrix) => {
            let [rows, columns] = matrix.stored_shape();
            let array = Array2::from_shape_vec((rows, columns), matrix.stored_rows(0..rows)?);
            let array = array.map_err(|e| e.to_string())?;
            let array = if matrix.is_turned { array.reversed_axes() } else { array };
            reshaped(&array.into_dyn(), &matrix.shape()).map(Arc::new)
        }
        Value::Int(_) | Value::Handle(_) | Value::Token => Err("floats are expected".into()),
    }
}

fn ints(value: &Value) -> Outcome<Arc<ArrayD<i64>>> {
    match value {
        Value::Int(array) => Ok(array.clone()),
        _ => Err("integers are expected".into()),
    }
}

fn rank(value: &Value) -> Outcome<usize> {
    Ok(value.shape().ok_or("not a tensor")?.len())
}

fn numbers(value: &Value) -> Outcome<Vec<i64>> {
    Ok(ints(value)?.iter().copied().collect())
}

fn sizes(value: &Value) -> Outcome<Vec<usize>> {
    let size = |n: i64| usize::try_from(n).map_err(|_| format!("a size of {n}"));
    numbers(value)?.into_iter().map(size).collect()
}

/// Axes, negative ones counted from the end; all below `rank` where it is given.
fn axes(value: &Value, rank: Option<usize>) -> Outcome<Vec<usize>> {
    let one = |n: i64| {
        let axis = if n < 0 { n + rank.unwrap_or(0) as i64 } else { n };
        let fits = axis >= 0 && rank.is_none_or(|rank| axis < rank as i64);
        if fits {
            Ok(axis as usize)
        } else {
            Err(format!("axis {n}"))
        }
    };
    numbers(value)?.into_iter().map(one).collect()
}

fn cast(x: &Value, element: Element) -> Outcome<Value> {
    match (operand(x)?, element) {
        (Operand::Float(a), Element::F32 | Element::F16 | Element::Bf16) => Ok(Value::Float(a)),
        (Operand::Float(a), Element::Bool) => Ok(a.mapv(|v| i64::from(v != 0.0)).into()),
        (Operand::Float(a), _) => Ok(a.mapv(|v| v as i64).into()),
        (Operand::Int(a), Element::F32 | Element::F16 | Element::Bf16) => Ok(a.mapv(|v| v as f32).into()),
        (Operand::Int(a), Element::Bool) => Ok(a.mapv(|v| i64::from(v != 0)).into()),
        (Operand::Int(a), _) => Ok(Value::Int(a)),
    }
}

/// Begin, end and stride of each dimension.
type Bounds = Vec<[i64; 3]>;

fn bounds(operands: &[Value], first: usize) -> Outcome<Bounds> {
    let [begin, end, stride] = operands.get(first..first + 3).ok_or("bounds are missing")? else {
        return Err("bounds are missing".into());
    };
    let (begin, end, stride) = (numbers(begin)?, numbers(end)?, numbers(stride)?);
    if begin.len() != end.len() || end.len() != stride.len() {
        return Err("bounds of unequal length".into());
    }
    Ok((0..begin.len()).map(|i| [begin[i], end[i], stride[i]]).collect())
}

/// Negative bounds are counted from the end, then both are clamped to the dimension.
fn selection(shape: &[usize], bounds: &Bounds) -> Outcome<Vec<SliceInfoElem>> {
    if shape.len() != bounds.len() {
        return Err(format!("{} bounds for {shape:?}", bounds.len()));
    }
    let one = |(size, [begin, end, stride]): (&usize, &[i64; 3])| {
        if *stride < 1 {
            return Err(format!("a stride of {stride}"));
        }
        let size = *size as i64;
        let place = |at: i64| (if at < 0 { at + size } else { at }).clamp(0, size) as isize;
        let (begin, end) = (place(*begin), place(*end));
        Ok(SliceInfoElem::Slice {
            start: begin,
            end: Some(end.max(begin)),
            step: *stride as isize,
        })
    };
    shape.iter().zip(bounds).map(one).collect()
}

fn slice(x: &Value, bounds: &Bounds) -> Outcome<Value> {
    let selection = selection(&x.shape().ok_or("not a tensor")?, bounds)?;
    each!(operand(x)?, array => array.slice(&selection[..]).to_owned())
}

fn slice_update(x: &Value, update: &Value, bounds: &Bounds) -> Outcome<Value> {
    let selection = selection(&x.shape().ok_or("not a tensor")?, bounds)?;
    let update = floats(update)?;
    let mut whole = floats(x)?.as_ref().clone();
    let mut place = whole.slice_mut(&selection[..]);
    if place.shape() != update.shape() {
        return Err(format!("{:?} into a place of {:?}", update.shape(), place.shape()));
    }
    place.assign(&update);
    Ok(whole.into())
}

fn concat(operands: &[Value]) -> Outcome<Value> {
    let [axis, parts @ ..] = operands else {
        return Err("nothing to join".into());
    };
    // Apple's converter joins scalars as vectors of one element.
    let vector = |part: &Value| match rank(part)? {
        0 => shaped(operand(part)?, &[1]),
        _ => Ok(part.clone()),
    };
    let parts: Vec<Value> = parts.iter().map(vector).collect::<Outcome<_>>()?;
    let first = parts.first().ok_or("nothing to join")?;
    let axis = *axes(axis, Some(rank(first)?))?.first().ok_or("no axis")?;
    let join = |e: ndarray::ShapeError| e.to_string();
    if matches!(first, Value::Int(_)) {
        let parts: Vec<Arc<ArrayD<i64>>> = parts.iter().map(ints).collect::<Outcome<_>>()?;
        let views: Vec<ArrayViewD<i64>> = parts.iter().map(|part| part.view()).collect();
        return Ok(ndarray::concatenate(Axis(axis), &views).map_err(join)?.into());
    }
    let parts: Vec<Arc<ArrayD<f32>>> = parts.iter().map(floats).collect::<Outcome<_>>()?;
    let views: Vec<ArrayViewD<f32>> = parts.iter().map(|part| part.view()).collect();
    Ok(ndarray::concatenate(Axis(axis), &views).map_err(join)?.into())
}

fn reshape(x: &Value, dims: &[i64]) -> Outcome<Value> {
    let shape = x.shape().ok_or("not a tensor")?;
    let count: usize = shape.iter().product();
    let known: usize = dims.iter().filter(|d| **d >= 0).map(|d| *d as usize).product();
    let one = |d: &i64| match usize::try_from(*d) {
        Ok(size) => Ok(size),
        Err(_) if *d == -1 && known > 0 => Ok(count / known),
        Err(_) => Err(format!("a dimension of {d}")),
    };
    let target: Vec<usize> = dims.iter().map(one).collect::<Outcome<_>>()?;
    shaped(operand(x)?, &target)
}

fn transpose(x: &Value, order: &[usize]) -> Outcome<Value> {
    if let (Value::Matrix(matrix), [1, 0]) = (x, order) {
        let mut turned = matrix.clone();
        turned.is_turned = !turned.is_turned;
        return Ok(Value::Matrix(turned));
    }
    let mut sorted = order.to_vec();
    sorted.sort_unstable();
    if sorted != (0..rank(x)?).collect::<Vec<_>>() {
        return Err(format!("order {order:?} of rank {}", rank(x)?));
    }
    each!(operand(x)?, array => array.view().permuted_axes(IxDyn(order)).as_standard_layout().into_owned())
}

fn change_dims(code: OpCode, x: &Value, by: &Value) -> Outcome<Value> {
    let mut shape = x.shape().ok_or("not a tensor")?;
    let count = numbers(by)?.len();
    let is_new = code == OpCode::ExpandDims;
    let full = if is_new { shape.len() + count } else { shape.len() };
    let mut axes = axes(by, Some(full))?;
    axes.sort_unstable();
    if is_new {
        axes.into_iter().for_each(|axis| shape.insert(axis, 1));
    } else {
        for axis in axes.into_iter().rev() {
            if shape.remove(axis) != 1 {
                return Err(format!("dimension {axis} is not 1"));
            }
        }
    }
    shaped(operand(x)?, &shape)
}

/// Sub-tensors by their leading indices: `indices [.., q]` into the first `q` dimensions.
fn gather(x: &Value, indices: &Value) -> Outcome<Value> {
    let indices = ints(indices)?;
    let (lead, q) = match indices.shape().split_last() {
        Some((q, lead)) => (lead.to_vec(), *q),
        None => return Err("indices without a dimension".into()),
    };
    let shape = x.shape().ok_or("not a tensor")?;
    if q == 0 || q > shape.len() {
        return Err(format!("{q} indices into {shape:?}"));
    }
    let place = |index: &[i64]| -> Outcome<usize> {
        index.iter().zip(&shape).try_fold(0, |at, (i, size)| {
            let wrapped = if *i < 0 { i + *size as i64 } else { *i };
            let inside = usize::try_from(wrapped).ok().filter(|i| i < size);
            inside
                .map(|i| at * size + i)
                .ok_or_else(|| format!("index {i} of {size}"))
        })
    };
    let flat: Vec<i64> = indices.iter().copied().collect();
    let places: Vec<usize> = flat.chunks(q).map(place).collect::<Outcome<_>>()?;
    let result = [&lead[..], &shape[q..]].concat();
    if let (Value::Matrix(matrix), 1) = (x, q)
        && !matrix.is_turned
        && matrix.lead == 0
    {
        let rows: Vec<Vec<f32>> = places
            .iter()
            .map(|row| matrix.stored_rows(*row..row + 1))
            .collect::<Outcome<_>>()?;
        return Value::floats(&result, rows.concat()).ok_or_else(|| "rows of another shape".into());
    }
    let size: usize = shape[q..].iter().product();
    each!(operand(x)?, array => taken(&array, &places, size, &result)?)
}

fn taken<T: Clone>(array: &ArrayD<T>, places: &[usize], size: usize, shape: &[usize]) -> Outcome<ArrayD<T>> {
    let all: Vec<T> = array.iter().cloned().collect();
    let values = places
        .iter()
        .flat_map(|at| all[at * size..(at + 1) * size].iter().cloned());
    ArrayD::from_shape_vec(IxDyn(shape), values.collect()).map_err(|e| e.to_string())
}

fn gather_along_axis(x: &Value, indices: &Value, axis: &[i64]) -> Outcome<Value> {
    let (x, indices) = (floats(x)?, ints(indices)?);
    let axis = usize::try_from(*axis.first().ok_or("no axis")?).map_err(|e| e.to_string())?;
    if axis >= x.ndim() || indices.ndim() != x.ndim() {
        return Err(format!("axis {axis} of {:?}", x.shape()));
    }
    let mut shape = x.shape().to_vec();
    shape[axis] = indices.shape()[axis];
    let indices = indices.broadcast(IxDyn(&shape)).ok_or("indices do not broadcast")?;
    let mut out = ArrayD::zeros(IxDyn(&shape));
    for (place, value) in out.indexed_iter_mut() {
        let mut from = place.clone();
        from[axis] = usize::try_from(indices[place.slice()]).map_err(|e| e.to_string())?;
        *value = *x.get(from.slice()).ok_or("an index beyond the axis")?;
    }
    Ok(out.into())
}

/// NumPy's rule.
fn broadcast(a: &[usize], b: &[usize]) -> Outcome<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[usize], i: usize| (i + dims.len()).checked_sub(rank).map_or(1, |own| dims[own]);
    let join = |i: usize| match (at(a, i), at(b, i)) {
        (1, other) | (other, 1) => Ok(other),
        (x, y) if x == y => Ok(x),
        _ => Err(format!("{a:?} and {b:?} do not broadcast")),
    };
    (0..rank).map(join).collect()
}

fn broadcast_to(x: &Value, shape: &[usize]) -> Outcome<Value> {
    let own = x.shape().ok_or("not a tensor")?;
    if shape
        .iter()
        .try_fold(1usize, |n, d| n.checked_mul(*d))
        .is_none_or(|n| n > MAX_ELEMENTS)
    {
        return Err(format!("{shape:?} is too large"));
    }
    if let (Value::Matrix(matrix), Some(lead)) = (x, shape.len().checked_sub(own.len()))
        && shape[lead..] == own
        && shape[..lead].iter().all(|d| *d == 1)
    {
        let mut wide = matrix.clone();
        wide.lead += lead;
        return Ok(Value::Matrix(wide));
    }
    let fail = || format!("{own:?} to {shape:?}");
    each!(operand(x)?, array => array.broadcast(IxDyn(shape)).ok_or_else(fail)?.to_owned())
}

/// Repeats along the given axes, which have length 1.
fn broadcast_in_dims(x: &Value, sizes_of: &Value, along: &Value) -> Outcome<Value> {
    let mut shape = x.shape().ok_or("not a tensor")?;
    for (axis, size) in axes(along, Some(shape.len()))?.into_iter().zip(sizes(sizes_of)?) {
        shape[axis] = size;
    }
    broadcast_to(x, &shape)
}

fn binary(a: &Value, b: &Value, float: impl Fn(f32, f32) -> f32, int: impl Fn(i64, i64) -> i64) -> Outcome<Value> {
    match (operand(a)?, operand(b)?) {
        (Operand::Float(a), Operand::Float(b)) => Ok(zipped(&a, &b, float)?.into()),
        (Operand::Int(a), Operand::Int(b)) => Ok(zipped(&a, &b, int)?.into()),
        _ => Err("floats and integers".into()),
    }
}

fn greater(a: &Value, b: &Value) -> Outcome<Value> {
    match (operand(a)?, operand(b)?) {
        (Operand::Float(a), Operand::Float(b)) => Ok(zipped(&a, &b, |x, y| i64::from(x > y))?.into()),
        (Operand::Int(a), Operand::Int(b)) => Ok(zipped(&a, &b, |x, y| i64::from(x > y))?.into()),
        _ => Err("floats and integers".into()),
    }
}

/// `f` of each pair of elements after broadcasting.
fn zipped<T: Copy, U>(a: &ArrayD<T>, b: &ArrayD<T>, f: impl Fn(T, T) -> U) -> Outcome<ArrayD<U>> {
    let shape = broadcast(a.shape(), b.shape())?;
    let wide = |x: &ArrayD<T>| x.broadcast(IxDyn(&shape)).map(|v| v.to_owned());
    let (a, b) = (
        wide(a).ok_or("a does not broadcast")?,
        wide(b).ok_or("b does not broadcast")?,
    );
    let values = a.iter().zip(b.iter()).map(|(x, y)| f(*x, *y)).collect();
    ArrayD::from_shape_vec(IxDyn(&shape), values).map_err(|e| e.to_string())
}

fn choose(condition: &Value, a: &Value, b: &Value) -> Outcome<Value> {
    let (condition, a, b) = (ints(condition)?, floats(a)?, floats(b)?);
    let shape = broadcast(condition.shape(), &broadcast(a.shape(), b.shape())?)?;
    let fail = || format!("broadcast to {shape:?}");
    let condition = condition.broadcast(IxDyn(&shape)).ok_or_else(fail)?;
    let (a, b) = (
        a.broadcast(IxDyn(&shape)).ok_or_else(fail)?,
        b.broadcast(IxDyn(&shape)).ok_or_else(fail)?,
    );
    let pairs = condition.iter().zip(a.iter().zip(b.iter()));
    let values = pairs.map(|(c, (a, b))| if *c != 0 { *a } else { *b }).collect();
    Value::floats(&shape, values).ok_or_else(fail)
}

fn unary(x: &Value, f: impl Fn(f32) -> f32) -> Outcome<Value> {
    Ok(floats(x)?.mapv(f).into())
}

fn gelu_tanh(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

fn range(operands: &[Value]) -> Outcome<Value> {
    let one = |i: usize| -> Outcome<i64> {
        numbers(&operands[i])?
            .first()
            .copied()
            .ok_or_else(|| "no number".into())
    };
    let (begin, end, step) = (one(0)?, one(1)?, one(2)?);
    if step < 1 || end - begin > MAX_ELEMENTS as i64 {
        return Err(format!("{begin} to {end} by {step}"));
    }
    let values: Vec<i64> = (begin..end).step_by(step as usize).collect();
    Value::ints(&[values.len()], values).ok_or_else(|| "range".into())
}

/// A reduction with any body: it is run on whole slices, since its operations work element by element.
fn reduce_by(x: &Value, axes: &[usize], start: &Value, region: &Block) -> Outcome<Value> {
    let mut x = x.clone();
    for axis in axes {
        let length = x
            .shape()
            .and_then(|s| s.get(*axis).copied())
            .ok_or("axis beyond the rank")?;
        let part = |i: usize| -> Outcome<Value> {
            each!(operand(&x)?, array => array.slice_axis(Axis(*axis), Slice::from(i..i + 1)).to_owned())
        };
        let mut held = start.clone();
        for i in 0..length {
            held = elementwise_body(region, vec![held, part(i)?])?;
        }
        x = held;
    }
    Ok(x)
}

fn elementwise_body(region: &Block, arguments: Vec<Value>) -> Outcome<Value> {
    let mut values = arguments;
    for operation in &region.operations {
        let operands: Vec<Value> = operation
            .operands
            .iter()
            .filter_map(|id| values.get(*id as usize).cloned())
            .collect();
        if operation.code == OpCode::Yield {
            return operands
                .into_iter()
                .next()
                .ok_or_else(|| "a body without a result".into());
        }
        let ty = region.types.get(values.len()).cloned().ok_or("a body without types")?;
        values.push(apply(operation, &operands, &[ty])?);
    }
    Err("no operation closes the body".into())
}

fn reduce(
    x: &Value,
    by: &Value,
    float_start: f32,
    int_start: i64,
    float: impl Fn(f32, f32) -> f32,
    int: impl Fn(i64, i64) -> i64,
) -> Outcome<Value> {
    let axes = axes(by, Some(rank(x)?))?;
    match operand(x)? {
        Operand::Float(array) => Ok(folded(&array, &axes, float_start, float).into()),
        Operand::Int(array) => Ok(folded(&array, &axes, int_start, int).into()),
    }
}

/// Folds axes, which stay with length 1.
fn folded<T: Copy>(array: &ArrayD<T>, axes: &[usize], start: T, f: impl Fn(T, T) -> T) -> ArrayD<T> {
    axes.iter().fold(array.clone(), |array, axis| {
        array
            .fold_axis(Axis(*axis), start, |a, b| f(*a, *b))
            .insert_axis(Axis(*axis))
    })
}

fn mean(x: &Value, axes: &[usize]) -> Outcome<Value> {
    let x = floats(x)?;
    let count: usize = axes.iter().map(|axis| x.shape()[*axis]).product();
    Ok(folded(&x, axes, 0.0, |a, b| a + b).mapv(|v| v / count as f32).into())
}

/// Along the first of `axes`.
pub(super) fn softmax(x: &Value, axes: &[usize]) -> Outcome<Value> {
    let axis = Axis(*axes.first().ok_or("no axis")?);
    let mut out = floats(x)?.as_ref().clone();
    for mut lane in out.lanes_mut(axis) {
        let max = lane.iter().copied().fold(f32::MIN, f32::max);
        lane.mapv_inplace(|v| (v - max).exp());
        let sum: f32 = lane.sum();
        lane.mapv_inplace(|v| v / sum);
    }
    Ok(out.into())
}

/// `x [.., m, k]` times `y [.., k, n]`.
pub(super) fn matmul(x: &Value, y: &Value) -> Outcome<Value> {
    if let Value::Matrix(matrix) = y
        && matrix.is_turned
    {
        return times_stored(floats(x)?.as_ref(), matrix);
    }
    let (x, y) = (floats(x)?, floats(y)?);
    let fail = || format!("{:?} times {:?}", x.shape(), y.shape());
    let (Some((x_lead, &[m, k])), Some((y_lead, &[k2, n]))) =
        (x.shape().split_last_chunk::<2>(), y.shape().split_last_chunk::<2>())
    else {
        return Err(fail());
    };
    if k != k2 {
        return Err(fail());
    }
    let lead = broadcast(x_lead, y_lead)?;
    let wide = |a: &ArrayD<f32>, rows: usize, columns: usize| -> Outcome<ArrayD<f32>> {
        let shape = [&lead[..], &[rows, columns]].concat();
        let wide = a.broadcast(IxDyn(&shape)).ok_or_else(fail)?.to_owned();
        let batch: usize = lead.iter().product();
        wide.into_shape_with_order(IxDyn(&[batch, rows, columns]))
            .map_err(|e| e.to_string())
    };
    let (x3, y3) = (wide(&x, m, k)?, wide(&y, k, n)?);
    let mut out = Vec::with_capacity(x3.shape()[0] * m * n);
    for (a, b) in x3.outer_iter().zip(y3.outer_iter()) {
        let two = |v: ArrayViewD<'_, f32>| v.into_dimensionality::<ndarray::Ix2>().map(|v| v.to_owned());
        let (a, b) = (two(a).map_err(|e| e.to_string())?, two(b).map_err(|e| e.to_string())?);
        out.extend(a.dot(&b).iter());
    }
    Value::floats(&[&lead[..], &[m, n]].concat(), out).ok_or_else(fail)
}

/// `x Wᵀ` with `W` restored in blocks of rows.
fn times_stored(x: &ArrayD<f32>, matrix: &Matrix) -> Outcome<Value> {
    let [rows, columns] = matrix.stored_shape();
    let (lead, width) = x
        .shape()
        .split_last()
        .map(|(w, lead)| (lead.to_vec(), *w))
        .ok_or("a scalar")?;
    if width != columns || lead.len() < matrix.lead + 1 {
        return Err(format!("{:?} times {:?}", x.shape(), matrix.shape()));
    }
    let count: usize = lead.iter().product();
    let flat: Vec<f32> = x.iter().copied().collect();
    let flat = Array2::from_shape_vec((count, columns), flat).map_err(|e| e.to_string())?;
    let step = (BLOCK_ELEMENTS / columns.max(1)).max(1);
    let starts: Vec<usize> = (0..rows).step_by(step).collect();
    let block = |start: &usize| -> Outcome<Array2<f32>> {
        let end = (start + step).min(rows);
        let weight = matrix.stored_rows(*start..end)?;
        let weight = ArrayView2::from_shape((end - start, columns), &weight).map_err(|e| e.to_string())?;
        Ok(flat.dot(&weight.t()))
    };
    let blocks: Vec<Array2<f32>> = starts.par_iter().map(block).collect::<Outcome<_>>()?;
    let views: Vec<ArrayView2<f32>> = blocks.iter().map(|b| b.view()).collect();
    let joined = ndarray::concatenate(Axis(1), &views).map_err(|e| e.to_string())?;
    let shape = [&lead[..], &[rows]].concat();
    Value::floats(&shape, joined.iter().copied().collect()).ok_or_else(|| "product".into())
}

fn restore_scaled(data: &Value, scale: &Value, before: &Value, after: &Value) -> Outcome<Value> {
    let sides = side_shape(data, scale, 2)?;
    let flat = |v: &Value| -> Outcome<Vec<f32>> {
        match operand(v)? {
            Operand::Float(a) => Ok(a.iter().copied().collect()),
            Operand::Int(a) => Ok(a.iter().map(|v| *v as f32).collect()),
        }
    };
    let parts = [flat(scale)?, flat(before)?, flat(after)?];
    if parts.iter().any(|part| part.len() != sides[0] * sides[1]) {
        return Err("scales and offsets of unequal shape".into());
    }
    match data {
        Value::Matrix(matrix) => Ok(Value::Matrix(Matrix::scaled(matrix.clone(), sides, parts))),
        _ => by_blocks(data, sides, |value, side| {
            parts[0][side] * (value - parts[1][side]) + parts[2][side]
        }),
    }
}

fn restore_table(indices: &Value, tables: &Value) -> Outcome<Value> {
    let sides = side_shape(indices, tables, 4)?;
    let shape = tables.shape().unwrap_or_default();
    let entries = shape[2];
    let tables: Vec<f32> = floats(tables)?.iter().copied().collect();
    match indices {
        Value::Matrix(matrix) => Ok(Value::Matrix(Matrix::table(matrix.clone(), sides, tables, entries))),
        _ => by_blocks(indices, sides, |value, side| tables[side * entries + value as usize]),
    }
}

/// Rows and columns of what restores data `[rows, columns]`, which they divide.
fn side_shape(data: &Value, side: &Value, rank: usize) -> Outcome<[usize; 2]> {
    let (data, side) = (data.shape().unwrap_or_default(), side.shape().unwrap_or_default());
    let ([rows, columns], [tall, wide, rest @ ..]) = (&data[..], &side[..]) else {
        return Err(format!("{data:?} with {side:?}"));
    };
    let divides = |a: usize, b: usize| b > 0 && a.is_multiple_of(b);
    let known_vector = rest.get(1).is_none_or(|vector| *vector == 1);
    if side.len() != rank || !divides(*rows, *tall) || !divides(*columns, *wide) || !known_vector {
        return Err(format!("{data:?} with {side:?}"));
    }
    Ok([*tall, *wide])
}

fn by_blocks(data: &Value, sides: [usize; 2], f: impl Fn(f32, usize) -> f32) -> Outcome<Value> {
    let data = ints(data)?;
    let (rows, columns) = (data.shape()[0], data.shape()[1]);
    let (tall, wide) = (rows / sides[0], columns / sides[1]);
    let value = |place: ndarray::IxDyn| f(data[place.slice()] as f32, place[0] / tall * sides[1] + place[1] / wide);
    Ok(ArrayD::from_shape_fn(IxDyn(&[rows, columns]), value).into())
}
