//! What each operator takes and gives: one table for the builder, which refuses, and for the checker, which distrusts.
//!
//! The operators are those of a decoder (docs/coreml.md), in the forms of opset CoreML8 and no more general than
//! needed: a form that is not here is refused by name.

use std::collections::BTreeMap;

use crate::{DType, Dim, Literal, TensorType, Type};

/// An operand as inference sees it.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// Type of the value.
    pub ty: &'a Type,
    /// The value itself where it is a small constant.
    pub literal: Option<&'a Literal>,
}

/// Operands by parameter; only `concat`'s `values` has more than one.
pub type Operands<'a> = BTreeMap<&'a str, Vec<Operand<'a>>>;

type Inferred = Result<TensorType, String>;

/// Parameters of an operator: the required ones, then the optional ones.
type Signature = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
    fn(&Args) -> Inferred,
);

const OPERATORS: &[Signature] = &[
    ("add", &["x", "y"], &[], arithmetic),
    ("cast", &["x", "dtype"], &[], cast),
    ("concat", &["values", "axis", "interleave"], &[], concat),
    (
        "constexpr_blockwise_shift_scale",
        &["data", "scale"],
        &["offset"],
        blockwise_shift_scale,
    ),
    ("constexpr_lut_to_dense", &["indices", "lut"], &[], lut_to_dense),
    (
        "conv",
        &["x", "weight", "strides", "pad_type", "pad", "dilations", "groups"],
        &["bias"],
        conv,
    ),
    ("expand_dims", &["x", "axes"], &[], expand_dims),
    (
        "gather",
        &["x", "indices", "axis"],
        &["batch_dims", "validate_indices"],
        gather,
    ),
    ("greater_equal", &["x", "y"], &[], compare),
    ("identity", &["x"], &[], same),
    ("layer_norm", &["x", "axes", "epsilon"], &[], layer_norm),
    ("matmul", &["x", "y"], &["transpose_x", "transpose_y"], matmul),
    ("mul", &["x", "y"], &[], arithmetic),
    ("read_state", &["input"], &[], read_state),
    ("reshape", &["x", "shape"], &[], reshape),
    ("select", &["cond", "a", "b"], &[], select),
    ("silu", &["x"], &[], float_same),
    ("slice_by_index", &["x", "begin", "end"], &[], slice_by_index),
    ("slice_update", &["x", "update", "begin", "end"], &[], slice_update),
    ("softmax", &["x", "axis"], &[], softmax),
    ("squeeze", &["x", "axes"], &[], squeeze),
    ("tile", &["x", "reps"], &[], tile),
    ("transpose", &["x", "perm"], &[], transpose),
];

/// The result type of an operation, or `None` for `write_state`, which has no result.
///
/// # Errors
/// A sentence that says which operand does not fit and what would.
pub fn infer(operator: &str, operands: &Operands) -> Result<Option<TensorType>, String> {
    let args = Args(operands);
    if operator == "write_state" {
        args.check_names(&["input", "data"], &[])?;
        return write_state(&args).map(|()| None);
    }
    let row = OPERATORS
        .iter()
        .find(|row| row.0 == operator)
        .ok_or("no such operator is known here")?;
    args.check_names(row.1, row.2)?;
    (row.3)(&args).map(Some)
}

struct Args<'a>(&'a Operands<'a>);

impl<'a> Args<'a> {
    fn check_names(&self, required: &[&str], optional: &[&str]) -> Result<(), String> {
        for name in required {
            if self.0.get(name).is_none_or(Vec::is_empty) {
                return Err(format!("parameter {name} is missing"));
            }
        }
        for (name, bound) in self.0 {
            if !required.contains(name) && !optional.contains(name) {
                return Err(format!("it has no parameter {name}"));
            }
            if bound.len() != 1 && *name != "values" {
                return Err(format!("parameter {name} takes one value, found {}", bound.len()));
            }
        }
        Ok(())
    }

    fn operand(&self, name: &str) -> Result<&'a Operand<'a>, String> {
        self.0
            .get(name)
            .and_then(|bound| bound.first())
            .ok_or_else(|| format!("parameter {name} is missing"))
    }

    fn tensor(&self, name: &str) -> Result<&'a TensorType, String> {
        match self.operand(name)?.ty {
            Type::Tensor(ty) => Ok(ty),
            Type::State(_) => Err(format!("{name} is a state, expected a tensor")),
        }
    }

    fn state(&self, name: &str) -> Result<&'a TensorType, String> {
        match self.operand(name)?.ty {
            Type::State(ty) => Ok(ty),
            Type::Tensor(ty) => Err(format!("{name} is {ty}, expected a state")),
        }
    }

    /// A tensor whose dimensions are all known.
    fn fixed(&self, name: &str) -> Result<(DType, Vec<usize>), String> {
        let ty = self.tensor(name)?;
        let shape = ty
            .shape()
            .ok_or_else(|| format!("{name} is {ty}, expected known dimensions"))?;
        Ok((ty.dtype, shape))
    }

    fn literal(&self, name: &str) -> Result<&'a Literal, String> {
        self.operand(name)?
            .literal
            .ok_or_else(|| format!("{name} must be a constant"))
    }

    fn ints(&self, name: &str) -> Result<&'a [i32], String> {
        self.literal(name)?
            .ints()
            .ok_or_else(|| format!("{name} must hold int32"))
    }

    fn int(&self, name: &str) -> Result<i32, String> {
        match self.ints(name)? {
            [value] if self.tensor(name)?.rank() == 0 => Ok(*value),
            _ => Err(format!("{name} must be an int32 scalar")),
        }
    }

    fn flag(&self, name: &str) -> Result<bool, String> {
        if !self.0.contains_key(name) {
            return Ok(false);
        }
        self.literal(name)?
            .flag()
            .ok_or_else(|| format!("{name} must be a bool scalar"))
    }
}

fn expect(condition: bool, problem: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(problem()) }
}

/// An axis from the front, from one that may count from the back.
pub(crate) fn axis_of(axis: i32, rank: usize) -> Result<usize, String> {
    let from_front = if axis < 0 { axis + rank as i32 } else { axis };
    usize::try_from(from_front)
        .ok()
        .filter(|&a| a < rank)
        .ok_or_else(|| format!("axis {axis} of a tensor of rank {rank}"))
}

/// Numpy's broadcasting of two shapes.
pub(crate) fn broadcast(x: &[usize], y: &[usize]) -> Option<Vec<usize>> {
    let rank = x.len().max(y.len());
    let dim = |shape: &[usize], i: usize| (i + shape.len()).checked_sub(rank).map_or(1, |j| shape[j]);
    (0..rank)
        .map(|i| match (dim(x, i), dim(y, i)) {
            (a, b) if a == b => Some(a),
            (1, b) => Some(b),
            (a, 1) => Some(a),
            _ => None,
        })
        .collect()
}

fn broadcast_types(x: &TensorType, y: &TensorType) -> Result<Vec<Dim>, String> {
    expect(x.dtype == y.dtype, || {
        format!("x is {x} and y is {y}: the types must be equal")
    })?;
    if y.rank() == 0 {
        return Ok(x.dims.clone()); // also when dimensions of x are unknown
    }
    let shapes = x.shape().zip(y.shape());
    let shape = shapes
        .and_then(|(a, b)| broadcast(&a, &b))
        .ok_or_else(|| format!("{x} and {y} do not broadcast"))?;
    Ok(shape.into_iter().map(Dim::Fixed).collect())
}

fn arithmetic(args: &Args) -> Inferred {
    let (x, y) = (args.tensor("x")?, args.tensor("y")?);
    expect(x.dtype.is_float() || x.dtype == DType::I32, || {
        format!("x is {x}, expected numbers")
    })?;
    Ok(TensorType {
        dtype: x.dtype,
        dims: broadcast_types(x, y)?,
    })
}

fn compare(args: &Args) -> Inferred {
    Ok(TensorType {
        dtype: DType::Bool,
        dims: broadcast_types(args.tensor("x")?, args.tensor("y")?)?,
    })
}

fn cast(args: &Args) -> Inferred {
    let Literal::Str(name) = args.literal("dtype")? else {
        return Err("dtype must be a string".into());
    };
    let dtype = DType::from_name(name).ok_or_else(|| format!("unknown dtype {name:?}"))?;
    Ok(TensorType {
        dtype,
        dims: args.tensor("x")?.dims.clone(),
    })
}

fn select(args: &Args) -> Inferred {
    let (cond, a, b) = (args.tensor("cond")?, args.tensor("a")?, args.tensor("b")?);
    let fits = cond.dtype == DType::Bool && a == b && a.dims == cond.dims;
    expect(fits, || {
        format!("cond is {cond}, a {a}, b {b}: expected equal shapes, a bool and two equal types")
    })?;
    Ok(a.clone())
}

fn same(args: &Args) -> Inferred {
    args.tensor("x").cloned()
}

fn float_same(args: &Args) -> Inferred {
    let x = args.tensor("x")?;
    expect(x.dtype.is_float(), || format!("x is {x}, expected floats"))?;
    Ok(x.clone())
}

fn softmax(args: &Args) -> Inferred {
    let x = float_same(args)?;
    axis_of(args.int("axis")?, x.rank())?;
    Ok(x)
}

fn layer_norm(args: &Args) -> Inferred {
    let x = float_same(args)?;
    for &axis in args.ints("axes")? {
        axis_of(axis, x.rank())?;
    }
    let epsilon = args.tensor("epsilon")?;
    expect(epsilon.rank() == 0 && epsilon.dtype == x.dtype, || {
        format!("epsilon is {epsilon} for x of {x}")
    })?;
    args.literal("epsilon")?;
    Ok(x)
}

/// Only the 1×1 form: a matrix product on [n, c, h, w].
fn conv(args: &Args) -> Inferred {
    let ((dtype, x), (weight_dtype, weight)) = (args.fixed("x")?, args.fixed("weight")?);
    expect(x.len() == 4 && weight.len() == 4, || {
        format!("x {x:?} and weight {weight:?}, expected rank 4")
    })?;
    expect(
        weight[2..] == [1, 1] && weight[1] == x[1] && dtype.is_float() && weight_dtype == dtype,
        || {
            format!(
                "weight {weight_dtype}{weight:?} for x {dtype}{x:?}, expected {dtype}[out, {}, 1, 1]",
                x[1]
            )
        },
    )?;
    let plain = args.ints("strides")? == [1, 1]
        && args.ints("pad")? == [0; 4]
        && args.ints("dilations")? == [1, 1]
        && args.int("groups")? == 1
        && *args.literal("pad_type")? == Literal::Str("valid".into());
    expect(plain, || "only a plain 1×1 convolution is supported".into())?;
    if args.0.contains_key("bias") {
        let (bias_dtype, bias) = args.fixed("bias")?;
        expect(bias_dtype == dtype && bias == [weight[0]], || {
            format!("bias {bias_dtype}{bias:?}, expected {dtype}[{}]", weight[0])
        })?;
    }
    Ok(TensorType::new(dtype, &[x[0], weight[0], x[2], x[3]]))
}

fn matmul(args: &Args) -> Inferred {
    let ((dtype, mut x), (y_dtype, mut y)) = (args.fixed("x")?, args.fixed("y")?);
    let problem = format!("x {dtype}{x:?} and y {y_dtype}{y:?} do not multiply");
    expect(
        dtype.is_float() && dtype == y_dtype && x.len() >= 2 && x.len() == y.len(),
        || problem.clone(),
    )?;
    let last = x.len() - 1;
    if args.flag("transpose_x")? {
        x.swap(last - 1, last);
    }
    if args.flag("transpose_y")? {
        y.swap(last - 1, last);
    }
    expect(x[last] == y[last - 1], || problem.clone())?;
    let mut shape = broadcast(&x[..last - 1], &y[..last - 1]).ok_or(problem)?;
    shape.extend([x[last - 1], y[last]]);
    Ok(TensorType::new(dtype, &shape))
}

fn concat(args: &Args) -> Inferred {
    expect(!args.flag("interleave")?, || "interleave is not supported".into())?;
    let values = args.0.get("values").map(Vec::as_slice).unwrap_or_default();
    let mut joined: Option<(DType, Vec<usize>)> = None;
    for value in values {
        let Type::Tensor(ty) = value.ty else {
            return Err("values holds a state".into());
        };
        let shape = ty
            .shape()
            .ok_or_else(|| format!("values holds {ty}, expected known dimensions"))?;
        let Some((dtype, total)) = &mut joined else {
            joined = Some((ty.dtype, shape));
            continue;
        };
        let axis = axis_of(args.int("axis")?, total.len())?;
        let fits = ty.dtype == *dtype
            && shape.len() == total.len()
            && (0..shape.len()).all(|i| i == axis || shape[i] == total[i]);
        expect(fits, || format!("values holds {ty} beside {dtype}{total:?}"))?;
        total[axis] += shape[axis];
    }
    let (dtype, shape) = joined.ok_or("values is empty")?;
    axis_of(args.int("axis")?, shape.len())?;
    Ok(TensorType::new(dtype, &shape))
}

/// `0 ≤ begin < end ≤ size` on each axis.
fn window(begin: &[i32], end: &[i32], shape: &[usize]) -> Result<Vec<usize>, String> {
    expect(begin.len() == shape.len() && end.len() == shape.len(), || {
        format!("begin {begin:?} and end {end:?} for shape {shape:?}: one number for each axis")
    })?;
    let sizes = (0..shape.len()).map(|i| {
        let inside = 0 <= begin[i] && begin[i] < end[i] && end[i] as usize <= shape[i];
        inside.then(|| (end[i] - begin[i]) as usize)
    });
    let sizes: Option<Vec<usize>> = sizes.collect();
    sizes.ok_or_else(|| format!("begin {begin:?} and end {end:?} leave shape {shape:?}"))
}

fn slice_by_index(args: &Args) -> Inferred {
    let (dtype, x) = args.fixed("x")?;
    Ok(TensorType::new(
        dtype,
        &window(args.ints("begin")?, args.ints("end")?, &x)?,
    ))
}

fn slice_update(args: &Args) -> Inferred {
    let ((dtype, x), (update_dtype, update)) = (args.fixed("x")?, args.fixed("update")?);
    let fits = dtype == update_dtype && x.len() == update.len() && x.iter().zip(&update).all(|(x, u)| u <= x);
    expect(fits, || format!("update {update_dtype}{update:?} for x {dtype}{x:?}"))?;
    for name in ["begin", "end"] {
        let ty = args.tensor(name)?;
        let want = TensorType::new(DType::I32, &[x.len()]);
        expect(*ty == want, || format!("{name} is {ty}, expected {want}"))?;
    }
    if let (Ok(begin), Ok(end)) = (args.ints("begin"), args.ints("end")) {
        let window = window(begin, end, &x)?;
        expect(window == update, || {
            format!("update {update:?} for a window of {window:?}")
        })?;
    }
    Ok(TensorType::new(dtype, &x))
}

fn gather(args: &Args) -> Inferred {
    let (x, indices) = (args.tensor("x")?, args.tensor("indices")?);
    let integers = matches!(indices.dtype, DType::I32 | DType::I16 | DType::U16);
    expect(integers, || format!("indices are {indices}, expected integers"))?;
    if args.0.contains_key("batch_dims") {
        expect(args.int("batch_dims")? == 0, || "batch_dims is not supported".into())?;
    }
    args.flag("validate_indices")?;
    let axis = axis_of(args.int("axis")?, x.rank())?;
    let dims = [&x.dims[..axis], &indices.dims, &x.dims[axis + 1..]].concat();
    Ok(TensorType { dtype: x.dtype, dims })
}

fn reshape(args: &Args) -> Inferred {
    let ((dtype, x), target) = (args.fixed("x")?, args.ints("shape")?);
    let shape: Option<Vec<usize>> = target
        .iter()
        .map(|&d| usize::try_from(d).ok().filter(|&d| d > 0))
        .collect();
    let count: usize = x.iter().product();
    let shape = shape.filter(|s| s.iter().product::<usize>() == count);
    Ok(TensorType::new(
        dtype,
        &shape.ok_or_else(|| format!("x {x:?} does not fill shape {target:?}"))?,
    ))
}

fn transpose(args: &Args) -> Inferred {
    let ((dtype, x), perm) = (args.fixed("x")?, args.ints("perm")?);
    let axes: Vec<usize> = perm.iter().map(|&p| axis_of(p, x.len())).collect::<Result<_, _>>()?;
    let mut sorted = axes.clone();
    sorted.sort_unstable();
    expect(sorted.into_iter().eq(0..x.len()), || {
        format!("perm {perm:?} is no permutation of rank {}", x.len())
    })?;
    Ok(TensorType::new(dtype, &axes.iter().map(|&a| x[a]).collect::<Vec<_>>()))
}

fn expand_dims(args: &Args) -> Inferred {
    let ((dtype, mut shape), axes) = (args.fixed("x")?, args.ints("axes")?);
    let rank = shape.len() + axes.len();
    let mut axes: Vec<usize> = axes.iter().map(|&a| axis_of(a, rank)).collect::<Result<_, _>>()?;
    axes.sort_unstable();
    expect(axes.windows(2).all(|pair| pair[0] != pair[1]), || {
        "axes holds one axis twice".into()
    })?;
    for axis in axes {
        shape.insert(axis, 1);
    }
    Ok(TensorType::new(dtype, &shape))
}

fn squeeze(args: &Args) -> Inferred {
    let (dtype, shape) = args.fixed("x")?;
    let axes = args
        .ints("axes")?
        .iter()
        .map(|&a| axis_of(a, shape.len()))
        .collect::<Result<Vec<_>, _>>()?;
    expect(axes.iter().all(|&a| shape[a] == 1), || {
        format!("axes {axes:?} of {shape:?} are not all 1")
    })?;
    let left: Vec<usize> = (0..shape.len())
        .filter(|i| !axes.contains(i))
        .map(|i| shape[i])
        .collect();
    Ok(TensorType::new(dtype, &left))
}

fn tile(args: &Args) -> Inferred {
    let ((dtype, x), reps) = (args.fixed("x")?, args.ints("reps")?);
    expect(reps.len() == x.len() && reps.iter().all(|&r| r > 0), || {
        format!("reps {reps:?} for shape {x:?}")
    })?;
    Ok(TensorType::new(
        dtype,
        &x.iter().zip(reps).map(|(d, &r)| d * r as usize).collect::<Vec<_>>(),
    ))
}

fn read_state(args: &Args) -> Inferred {
    args.state("input").cloned()
}

fn write_state(args: &Args) -> Result<(), String> {
    let (state, data) = (args.state("input")?, args.tensor("data")?);
    expect(state == data, || format!("data is {data}, the state holds {state}"))
}

/// `scale · (data − offset)`, each scale for a block of elements.
fn blockwise_shift_scale(args: &Args) -> Inferred {
    let ((dtype, data), (scale_dtype, scale)) = (args.fixed("data")?, args.fixed("scale")?);
    let narrow = matches!(dtype, DType::I4 | DType::U4 | DType::I8 | DType::U8);
    expect(narrow && scale_dtype.is_float(), || {
        format!("data is {dtype}, scale {scale_dtype}")
    })?;
    let blocks = data.len() == scale.len() && data.iter().zip(&scale).all(|(&d, &s)| s > 0 && d % s == 0);
    expect(blocks, || format!("scale {scale:?} does not divide data {data:?}"))?;
    if args.0.contains_key("offset") {
        let (offset_dtype, offset) = args.fixed("offset")?;
        expect(offset_dtype == dtype && offset == scale, || {
            format!("offset {offset_dtype}{offset:?}")
        })?;
    }
    Ok(TensorType::new(scale_dtype, &data))
}

/// Indices into tables; `lut` is [..one entry for each block.., 2^bits, 1].
fn lut_to_dense(args: &Args) -> Inferred {
    let ((dtype, indices), (lut_dtype, lut)) = (args.fixed("indices")?, args.fixed("lut")?);
    let unsigned = matches!(
        dtype,
        DType::U1 | DType::U2 | DType::U3 | DType::U4 | DType::U6 | DType::U8
    );
    expect(unsigned && lut_dtype.is_float(), || {
        format!("indices are {dtype}, lut {lut_dtype}")
    })?;
    let rank = indices.len();
    let fits = lut.len() == rank + 2
        && lut[rank..] == [1 << dtype.bits(), 1]
        && indices.iter().zip(&lut).all(|(&i, &t)| t > 0 && i % t == 0);
    expect(fits, || format!("lut {lut:?} for indices {dtype}{indices:?}"))?;
    Ok(TensorType::new(lut_dtype, &indices))
}
