//! Result types of operations, from the types of their operands.

use super::graph::{END, Extent};
use crate::{Element, Error, Result, TensorType, program::OpCode};

/// The error for operands that do not fit.
pub(super) fn unfit(code: OpCode, problem: impl Into<String>) -> Error {
    Error::operands(code.name(), problem)
}

/// NumPy's rule: dimensions are compared from the right, 1 gives way to the other.
pub(super) fn broadcast(code: OpCode, a: &[Option<usize>], b: &[Option<usize>]) -> Result<Vec<Option<usize>>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[Option<usize>], i: usize| match (i + dims.len()).checked_sub(rank) {
        Some(own) => dims[own],
        None => Some(1),
    };
    let join = |i: usize| match (at(a, i), at(b, i)) {
        (Some(1), other) | (other, Some(1)) => Ok(other),
        (Some(x), Some(y)) if x != y => Err(unfit(code, format!("{a:?} and {b:?} do not broadcast"))),
        (Some(x), _) | (_, Some(x)) => Ok(Some(x)),
        (None, None) => Ok(None),
    };
    (0..rank).map(join).collect()
}

/// `x [.., m, k]` times `y [.., k, n]`, leading dimensions broadcast.
pub(super) fn matmul(code: OpCode, x: &TensorType, y: &TensorType) -> Result<TensorType> {
    let fail = || unfit(code, format!("{x} times {y}"));
    let (Some((x_lead, &[m, k])), Some((y_lead, &[k2, n]))) =
        (x.dims.split_last_chunk::<2>(), y.dims.split_last_chunk::<2>())
    else {
        return Err(fail());
    };
    let inner = k.is_none() || k2.is_none() || k == k2;
    if !inner || x.element != y.element || !x.element.is_float() {
        return Err(fail());
    }
    let mut dims = broadcast(code, x_lead, y_lead)?;
    dims.extend([m, n]);
    Ok(TensorType::new(x.element, &dims))
}

pub(super) fn slice(x: &TensorType, begin: &[Extent], end: &[Extent]) -> Result<TensorType> {
    if begin.len() != x.rank() || end.len() != x.rank() {
        return Err(unfit(OpCode::Slice, format!("{} bounds for {x}", begin.len())));
    }
    let one = |((dim, begin), end): ((&Option<usize>, &Extent), &Extent)| match (dim, begin, end) {
        (dim, Extent::Fixed(0), Extent::Fixed(end)) if *end == END as usize => Ok(*dim),
        (Some(size), Extent::Fixed(begin), Extent::Fixed(end)) => match size.min(end).checked_sub(*begin) {
            Some(length) if *end <= *size || *end == END as usize => Ok(Some(length)),
            _ => Err(unfit(OpCode::Slice, format!("{begin} to {end} of {size}"))),
        },
        (None, Extent::Fixed(_), Extent::Fixed(_)) | (_, Extent::Value(_), _) | (_, _, Extent::Value(_)) => Ok(None),
    };
    let dims: Vec<Option<usize>> = x.dims.iter().zip(begin).zip(end).map(one).collect::<Result<_>>()?;
    Ok(TensorType::new(x.element, &dims))
}

pub(super) fn concat(axis: usize, parts: &[&TensorType]) -> Result<TensorType> {
    let fail = || {
        let all: Vec<String> = parts.iter().map(|ty| ty.to_string()).collect();
        unfit(OpCode::Concat, format!("{} along axis {axis}", all.join(", ")))
    };
    let [first, rest @ ..] = parts else {
        return Err(fail());
    };
    let mut joined = (*first).clone();
    if axis >= joined.rank() {
        return Err(fail());
    }
    for part in rest {
        let mut fitted = (*part).clone();
        if fitted.rank() != joined.rank() {
            return Err(fail());
        }
        fitted.dims[axis] = joined.dims[axis];
        if !fitted.agrees(&joined) {
            return Err(fail());
        }
        joined.dims[axis] = joined.dims[axis].zip(part.dims[axis]).map(|(a, b)| a + b);
    }
    Ok(joined)
}

pub(super) fn reshape(x: &TensorType, dims: &[Extent]) -> Result<TensorType> {
    let dims = dims.iter().map(|dim| match dim {
        Extent::Fixed(size) => Some(*size),
        Extent::Value(_) => None,
    });
    let ty = TensorType::new(x.element, &dims.collect::<Vec<_>>());
    match (x.count(), ty.count()) {
        (Some(had), Some(wants)) if had != wants => Err(unfit(OpCode::Reshape, format!("{x} as {ty}"))),
        _ => Ok(ty),
    }
}

pub(super) fn transpose(x: &TensorType, order: &[usize]) -> Result<TensorType> {
    let mut sorted = order.to_vec();
    sorted.sort_unstable();
    if sorted != (0..x.rank()).collect::<Vec<_>>() {
        return Err(unfit(OpCode::Transpose, format!("order {order:?} of {x}")));
    }
    let dims: Vec<Option<usize>> = order.iter().map(|axis| x.dims[*axis]).collect();
    Ok(TensorType::new(x.element, &dims))
}

/// Result of restoring compressed data: the first `rank` dimensions of `side` divide those of `data`.
pub(super) fn blocks(code: OpCode, data: &TensorType, side: &TensorType, rank: usize) -> Result<TensorType> {
    let divides = |(d, s): (&Option<usize>, &Option<usize>)| match (d, s) {
        (Some(d), Some(s)) => *s > 0 && d.is_multiple_of(*s),
        _ => false,
    };
    let fits = data.rank() == rank && side.rank() >= rank && data.dims.iter().zip(&side.dims).all(divides);
    if !fits || data.element.is_float() || !side.element.is_float() {
        return Err(unfit(code, format!("{data} with {side}")));
    }
    Ok(data.with(side.element))
}

/// A reduction over an axis keeps the dimension.
pub(super) fn reduced(code: OpCode, x: &TensorType, axis: usize) -> Result<TensorType> {
    if axis >= x.rank() {
        return Err(unfit(code, format!("axis {axis} of {x}")));
    }
    let mut ty = x.clone();
    ty.dims[axis] = Some(1);
    Ok(ty)
}

/// Both operands of an elementwise operation must have one element type.
pub(super) fn elementwise(code: OpCode, a: &TensorType, b: &TensorType) -> Result<TensorType> {
    if a.element != b.element {
        return Err(unfit(code, format!("{a} and {b}")));
    }
    let element = if code == OpCode::BroadcastingGreater {
        Element::Bool
    } else {
        a.element
    };
    Ok(TensorType::new(element, &broadcast(code, &a.dims, &b.dims)?))
}
