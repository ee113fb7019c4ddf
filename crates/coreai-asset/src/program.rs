//! What a program is: graphs of operations on typed values, and the weights that they refer to.

use crate::{TensorType, Type};

/// Everything that `main.mlirb` says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Program {
    /// Graphs, in the order of the file; public ones are functions that a caller can run.
    pub graphs: Vec<Graph>,
    /// Weights, in the order of the file.
    pub weights: Vec<Weight>,
}

impl Program {
    /// The graph with a name.
    pub fn graph(&self, name: &str) -> Option<&Graph> {
        self.graphs.iter().find(|graph| graph.name == name)
    }
}

/// Data that a constant refers to, stored apart from the operations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Name, unique in a program.
    pub name: String,
    /// Length of its data in bytes.
    pub bytes: u64,
}

/// A function, or a private graph that other graphs invoke.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    /// Name, unique in a program.
    pub name: String,
    /// Whether only other graphs can run it.
    pub is_private: bool,
    /// One for each argument of the block.
    pub inputs: Vec<Port>,
    /// One for each operand of the closing output operation.
    pub outputs: Vec<Port>,
    /// What the graph computes in terms that a device may have a kernel for.
    pub composite: Option<Composite>,
    /// The operations.
    pub block: Block,
}

/// An input or output of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Name that a caller uses.
    pub name: String,
    /// Type.
    pub ty: Type,
}

/// Declares that a graph computes a known function: `rms_norm`, `rope`, `scaled_dot_product_attention`.
#[derive(Clone, Debug, PartialEq)]
pub struct Composite {
    /// The function.
    pub name: String,
    /// Its inputs, in the order of the graph's.
    pub inputs: Vec<String>,
    /// Its parameters.
    pub attributes: Vec<(String, Parameter)>,
    /// Its outputs, in the order of the graph's.
    pub outputs: Vec<String>,
}

impl Composite {
    /// A parameter by name.
    pub fn attribute(&self, name: &str) -> Option<Parameter> {
        self.attributes.iter().find(|row| row.0 == name).map(|row| row.1)
    }
}

/// Value of a composite's parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Parameter {
    /// 64 bits, signed.
    Int(i64),
    /// 32 bits.
    Float(f32),
    /// One bit.
    Bool(bool),
}

/// A list of operations. Values are numbered from 0: arguments first, then results in order. Every block is isolated: it
/// sees its own values only.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Block {
    /// Type of each value.
    pub types: Vec<Type>,
    /// How many of the values are arguments.
    pub arguments: usize,
    /// Operations; the last one closes the block.
    pub operations: Vec<Operation>,
}

/// Number of a value in its block.
pub type ValueId = u32;

/// One operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    /// What it does.
    pub code: OpCode,
    /// Values that it reads.
    pub operands: Vec<ValueId>,
    /// Number of values that it makes.
    pub results: usize,
    /// What is fixed when the program is written.
    pub payload: Payload,
    /// For a decomposable operation the same computation in simpler ones; for a reduction what joins two elements.
    pub region: Option<Block>,
}

/// Fixed parts of an operation.
#[derive(Clone, Debug, PartialEq)]
pub enum Payload {
    /// None.
    None,
    /// Data of a constant; one element for all when `splat`.
    Inline {
        /// Little-endian elements, row-major.
        data: Vec<u8>,
        /// Whether `data` is one element that fills the tensor.
        splat: bool,
    },
    /// A constant's weight, by its index in [`Program::weights`].
    Weight(usize),
    /// The graph to invoke.
    Callee(String),
    /// Gelu by the tanh formula instead of the error function.
    Gelu {
        /// Whether the tanh formula is used.
        tanh: bool,
    },
}

/// What an operation does. Semantics are those of Core AI's documentation of the operation of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum OpCode {
    Constant,
    GetShape,
    Cast,
    Slice,
    SliceUpdate,
    Concat,
    Reshape,
    Transpose,
    ExpandDims,
    ShrinkDims,
    GatherNd,
    GatherAlongAxis,
    BatchMatmul,
    Add,
    Sub,
    Mul,
    Divide,
    Maximum,
    Greater,
    Where,
    Not,
    Rsqrt,
    Cos,
    Sin,
    Exp,
    Tanh,
    Gelu,
    Range,
    BroadcastShapes,
    BroadcastTo,
    BroadcastInDims,
    Reduce,
    BlockwiseShiftScale,
    LutToDense,
    BroadcastingBatchMatmul,
    BroadcastingAdd,
    BroadcastingSub,
    BroadcastingMul,
    BroadcastingDivide,
    BroadcastingGreater,
    BroadcastingWhere,
    ReduceSum,
    ReduceMean,
    ReduceMax,
    ReduceProduct,
    Softmax,
    Silu,
    CreateToken,
    ReadHandle,
    WriteHandle,
    Invoke,
    Output,
    Yield,
}

/// Every operation with its name in the file, without the dialect.
const NAMES: [(OpCode, &str); 53] = [
    (OpCode::Constant, "primitive.constant_v1"),
    (OpCode::GetShape, "primitive.get_shape_v2"),
    (OpCode::Cast, "primitive.cast_v1"),
    (OpCode::Slice, "primitive.slice_v1"),
    (OpCode::SliceUpdate, "primitive.slice_update_v1"),
    (OpCode::Concat, "primitive.concat_v1"),
    (OpCode::Reshape, "primitive.reshape_v2"),
    (OpCode::Transpose, "primitive.transpose_v1"),
    (OpCode::ExpandDims, "primitive.expand_dims_v1"),
    (OpCode::ShrinkDims, "primitive.shrink_dims_v1"),
    (OpCode::GatherNd, "primitive.gather_nd_v1"),
    (OpCode::GatherAlongAxis, "primitive.gather_along_axis_v1"),
    (OpCode::BatchMatmul, "primitive.batch_matmul_v1"),
    (OpCode::Add, "primitive.add_v1"),
    (OpCode::Sub, "primitive.sub_v1"),
    (OpCode::Mul, "primitive.mul_v1"),
    (OpCode::Divide, "primitive.divide_v1"),
    (OpCode::Maximum, "primitive.maximum_v1"),
    (OpCode::Greater, "primitive.greater_v1"),
    (OpCode::Where, "primitive.where_v1"),
    (OpCode::Not, "primitive.not_v1"),
    (OpCode::Rsqrt, "primitive.rsqrt_v1"),
    (OpCode::Cos, "primitive.cos_v1"),
    (OpCode::Sin, "primitive.sin_v1"),
    (OpCode::Exp, "primitive.exp_v1"),
    (OpCode::Tanh, "primitive.tanh_v1"),
    (OpCode::Gelu, "primitive.gelu_v1"),
    (OpCode::Range, "primitive.range_v1"),
    (OpCode::BroadcastShapes, "primitive.broadcast_shapes_v1"),
    (OpCode::BroadcastTo, "primitive.broadcast_to_v1"),
    (OpCode::BroadcastInDims, "primitive.broadcast_in_dims_v1"),
    (OpCode::Reduce, "primitive.reduce_v1"),
    (OpCode::BlockwiseShiftScale, "primitive.blockwise_shift_scale_v2"),
    (OpCode::LutToDense, "primitive.lut_to_dense_v1"),
    (OpCode::BroadcastingBatchMatmul, "broadcasting_batch_matmul_v1"),
    (OpCode::BroadcastingAdd, "broadcasting_add_v1"),
    (OpCode::BroadcastingSub, "broadcasting_sub_v1"),
    (OpCode::BroadcastingMul, "broadcasting_mul_v1"),
    (OpCode::BroadcastingDivide, "broadcasting_divide_v1"),
    (OpCode::BroadcastingGreater, "broadcasting_greater_v1"),
    (OpCode::BroadcastingWhere, "broadcasting_where_v1"),
    (OpCode::ReduceSum, "reduce_sum_v1"),
    (OpCode::ReduceMean, "reduce_mean_v1"),
    (OpCode::ReduceMax, "reduce_max_v1"),
    (OpCode::ReduceProduct, "reduce_product_v1"),
    (OpCode::Softmax, "softmax_v1"),
    (OpCode::Silu, "silu_v1"),
    (OpCode::CreateToken, "dataflow.create_token_v1"),
    (OpCode::ReadHandle, "dataflow.read_handle_v1"),
    (OpCode::WriteHandle, "dataflow.write_handle_v1"),
    (OpCode::Invoke, "dataflow.invoke_v1"),
    (OpCode::Output, "dataflow.output_v1"),
    (OpCode::Yield, "dataflow.yield_v1"),
];

impl OpCode {
    /// The name in the file, without the dialect.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }

    /// The operation with a name.
    pub fn from_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// Whether the operation carries its own decomposition.
    pub fn is_decomposable(self) -> bool {
        !self.name().contains('.')
    }
}

impl Block {
    /// A block with arguments and no operations.
    pub fn new(arguments: Vec<Type>) -> Self {
        Self {
            arguments: arguments.len(),
            types: arguments,
            operations: Vec::new(),
        }
    }

    /// Type of a value; `None` when the block has no such value.
    pub fn type_of(&self, value: ValueId) -> Option<&Type> {
        self.types.get(value as usize)
    }

    /// Tensor type of a value; `None` for anything else.
    pub fn tensor_type_of(&self, value: ValueId) -> Option<&TensorType> {
        self.type_of(value)?.tensor()
    }

    /// Adds an operation. Returns the number of its first result.
    pub fn push(&mut self, operation: Operation, results: Vec<Type>) -> ValueId {
        let first = self.types.len() as ValueId;
        debug_assert_eq!(operation.results, results.len());
        self.types.extend(results);
        self.operations.push(operation);
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_its_operation() {
        for (code, name) in NAMES {
            assert_eq!(OpCode::from_name(name), Some(code));
            assert_eq!(code.name(), name);
        }
        assert!(OpCode::Softmax.is_decomposable() && !OpCode::Exp.is_decomposable());
    }
}
