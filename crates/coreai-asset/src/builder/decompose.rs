//! Operations that carry their own decomposition: a region over their operands in simpler operations.
//!
//! A system that knows the operation ignores the region; one that does not runs it. Five templates: elementwise
//! operations broadcast both sides first, so does a product of matrices on its leading dimensions; sums, means, softmax
//! and silu are built from these.

use super::{
    graph::{BlockBuilder, Tensor},
    infer,
};
use crate::{
    Element, Result, TensorType,
    program::{Block, OpCode},
};

impl BlockBuilder {
    /// `a + b`.
    ///
    /// # Errors
    /// As for every operation here: [`Error::Operands`](crate::Error::Operands) for operands that do not fit.
    pub fn add(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.elementwise(OpCode::BroadcastingAdd, OpCode::Add, a, b)
    }

    /// `a − b`.
    ///
    /// # Errors
    /// See [`add`](Self::add).
    pub fn sub(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.elementwise(OpCode::BroadcastingSub, OpCode::Sub, a, b)
    }

    /// `a · b`, element by element.
    ///
    /// # Errors
    /// See [`add`](Self::add).
    pub fn mul(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.elementwise(OpCode::BroadcastingMul, OpCode::Mul, a, b)
    }

    /// `a / b`.
    ///
    /// # Errors
    /// See [`add`](Self::add).
    pub fn divide(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.elementwise(OpCode::BroadcastingDivide, OpCode::Divide, a, b)
    }

    /// `a > b`.
    ///
    /// # Errors
    /// See [`add`](Self::add).
    pub fn greater(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.elementwise(OpCode::BroadcastingGreater, OpCode::Greater, a, b)
    }

    fn elementwise(&mut self, code: OpCode, primitive: OpCode, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let ty = infer::elementwise(code, a.ty(), b.ty())?;
        let region = region(&[a, b], |r, x| {
            let (a, b) = (r.shape_of(&x[0]), r.shape_of(&x[1]));
            let shape = r.broadcast_shapes(&a, &b)?;
            let a = r.broadcast_to(&x[0], &shape, &ty.dims);
            let b = r.broadcast_to(&x[1], &shape, &ty.dims);
            Ok(r.emit(primitive, &[&a, &b], ty.clone(), None))
        })?;
        Ok(self.emit(code, &[a, b], ty, Some(region)))
    }

    /// Product of matrices, `x [.., m, k]` times `y [.., k, n]`; leading dimensions broadcast.
    ///
    /// # Errors
    /// See [`add`](Self::add).
    pub fn matmul(&mut self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let code = OpCode::BroadcastingBatchMatmul;
        let ty = infer::matmul(code, x.ty(), y.ty())?;
        let lead = ty.dims[..ty.rank() - 2].to_vec();
        let region = region(&[x, y], |r, operands| {
            let [x, y] = operands else {
                return Err(infer::unfit(code, "two operands"));
            };
            if lead.is_empty() {
                return Ok(r.emit(OpCode::BatchMatmul, &[x, y], ty.clone(), None));
            }
            let (x_shape, y_shape) = (r.shape_of(x), r.shape_of(y));
            let parts = |r: &mut Self, shape: &Tensor, rank: usize| -> Result<[Tensor; 2]> {
                let head = r.slice(shape, &[0.into()], &[(rank - 2).into()])?;
                Ok([head, r.slice(shape, &[(rank - 2).into()], &[rank.into()])?])
            };
            let [x_lead, x_matrix] = parts(r, &x_shape, x.ty().rank())?;
            let [y_lead, y_matrix] = parts(r, &y_shape, y.ty().rank())?;
            let shape = r.broadcast_shapes(&x_lead, &y_lead)?;
            let wide = |r: &mut Self, x: &Tensor, matrix: &Tensor| -> Result<Tensor> {
                let target = r.concat(0, &[&shape, matrix])?;
                let dims = [&lead[..], &x.dims()[x.ty().rank() - 2..]].concat();
                Ok(r.broadcast_to(x, &target, &dims))
            };
            let (x, y) = (wide(r, x, &x_matrix)?, wide(r, y, &y_matrix)?);
            Ok(r.emit(OpCode::BatchMatmul, &[&x, &y], ty.clone(), None))
        })?;
        Ok(self.emit(code, &[x, y], ty, Some(region)))
    }

    /// Mean over the last axis, which stays with length 1.
    ///
    /// # Errors
    /// See [`add`](Self::add).
    pub fn mean(&mut self, x: &Tensor) -> Result<Tensor> {
        let code = OpCode::ReduceMean;
        let axis = last_axis(code, x)?;
        let ty = infer::reduced(code, x.ty(), axis)?;
        let axes = self.ints(&[axis as i32]);
        let region = region(&[x, &axes], |r, x| {
            let sum = r.reduce_over(OpCode::ReduceSum, &x[0], &x[1], open(x[0].ty()))?;
            let shape = r.shape_of(&x[0]);
            let index = r.reshape(&x[1], &[1.into(), 1.into()])?;
            let count = r.emit(
                OpCode::GatherNd,
                &[&shape, &index],
                TensorType::fixed(Element::U32, &[1]),
                None,
            );
            let count = r.cast(&count, Element::U64);
            let zero = r.ints(&[0]);
            let count = r.reduce_over(OpCode::ReduceProduct, &count, &zero, count.ty().clone())?;
            let count = r.cast(&count, sum.element());
            r.divide(&sum, &count)
        })?;
        Ok(self.emit(code, &[x, &axes], ty, Some(region)))
    }

    /// A reduction over given axes, to a known type.
    fn reduce_over(&mut self, code: OpCode, x: &Tensor, axes: &Tensor, ty: TensorType) -> Result<Tensor> {
        let region = region(&[x, axes], |r, operands| r.reduce(code, &operands[0], &operands[1]))?;
        Ok(self.emit(code, &[x, axes], ty, Some(region)))
    }

    /// The primitive reduction: sums of half floats are kept in f32 until they are done.
    fn reduce(&mut self, code: OpCode, x: &Tensor, axes: &Tensor) -> Result<Tensor> {
        let element = x.element();
        let (start, join) = match code {
            OpCode::ReduceSum => (0.0, OpCode::Add),
            OpCode::ReduceProduct => (1.0, OpCode::Mul),
            OpCode::ReduceMax if element == Element::F16 => (-65_504.0, OpCode::Maximum),
            OpCode::ReduceMax => (f32::MIN, OpCode::Maximum),
            _ => return Err(infer::unfit(code, "not a reduction")),
        };
        let held = match (element, join) {
            (Element::F16, OpCode::Add) => Element::F32,
            _ => element,
        };
        let start = self.filled(held, &[], start)?;
        let scalar = |element| TensorType::fixed(element, &[]);
        let (mut body, items) = Self::with_arguments(&[scalar(held), scalar(element)]);
        let item = body.cast(&items[1], held);
        let joined = body.emit(join, &[&items[0], &item], scalar(held), None);
        let body = body.close(OpCode::Yield, &[joined.value]);
        Ok(self.emit(OpCode::Reduce, &[x, axes, &start], open(x.ty()), Some(body)))
    }

    /// `e^(x − max) / Σ e^(x − max)` over the last axis.
    ///
    /// # Errors
    /// See [`add`](Self::add).
    pub fn softmax(&mut self, x: &Tensor) -> Result<Tensor> {
        let code = OpCode::Softmax;
        let axis = last_axis(code, x)?;
        let reduced = infer::reduced(code, x.ty(), axis)?;
        let axis = self.int(axis as i32);
        let region = region(&[x, &axis], |r, x| {
            let axes = r.reshape(&x[1], &[1.into()])?;
            let max = r.reduce_over(OpCode::ReduceMax, &x[0], &axes, reduced.clone())?;
            let shifted = r.sub(&x[0], &max)?;
            let exp = r.exp(&shifted);
            let sum = r.reduce_over(OpCode::ReduceSum, &exp, &axes, reduced)?;
            r.divide(&exp, &sum)
        })?;
        Ok(self.emit(code, &[x, &axis], x.ty().clone(), Some(region)))
    }

    /// `x / (1 + e^−x)`.
    ///
    /// # Errors
    /// See [`add`](Self::add).
    pub fn silu(&mut self, x: &Tensor) -> Result<Tensor> {
        let region = region(&[x], |r, x| {
            let zero = r.filled(x[0].element(), &[1], 0.0)?;
            let one = r.filled(x[0].element(), &[1], 1.0)?;
            let negative = r.sub(&zero, &x[0])?;
            let exp = r.exp(&negative);
            let sum = r.add(&one, &exp)?;
            let share = r.divide(&one, &sum)?;
            r.mul(&x[0], &share)
        })?;
        Ok(self.emit(OpCode::Silu, &[x], x.ty().clone(), Some(region)))
    }

    fn broadcast_shapes(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let rank = |x: &Tensor| x.dims().first().copied().flatten();
        let longest = rank(a).max(rank(b));
        let ty = TensorType::new(Element::U32, &[longest]);
        Ok(self.emit(OpCode::BroadcastShapes, &[a, b], ty, None))
    }

    fn broadcast_to(&mut self, x: &Tensor, shape: &Tensor, dims: &[Option<usize>]) -> Tensor {
        self.emit(
            OpCode::BroadcastTo,
            &[x, shape],
            TensorType::new(x.element(), dims),
            None,
        )
    }
}

/// A region over operands that yields one tensor.
fn region(operands: &[&Tensor], body: impl FnOnce(&mut BlockBuilder, &[Tensor]) -> Result<Tensor>) -> Result<Block> {
    let types: Vec<TensorType> = operands.iter().map(|x| x.ty().clone()).collect();
    let (mut builder, arguments) = BlockBuilder::with_arguments(&types);
    let result = body(&mut builder, &arguments)?;
    Ok(builder.close(OpCode::Yield, &[result.value]))
}

/// The same rank, all dimensions unknown: axes are values inside a region.
fn open(ty: &TensorType) -> TensorType {
    TensorType::new(ty.element, &vec![None; ty.rank()])
}

fn last_axis(code: OpCode, x: &Tensor) -> Result<usize> {
    let rank = x.ty().rank();
    rank.checked_sub(1)
        .ok_or_else(|| infer::unfit(code, "a scalar has no axis"))
}
