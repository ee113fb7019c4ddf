//! Blocks, graphs and programs in the making.

use std::collections::{BTreeMap, HashMap};

use half::f16;

use super::infer;
use crate::{
    Element, Error, Result, TensorType, Type,
    program::{Block, Composite, Graph, OpCode, Operation, Payload, Port, Program, ValueId, Weight},
};

/// A weight of the program being built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightId(usize);

/// A program in the making.
#[derive(Debug, Default)]
pub struct ProgramBuilder {
    program: Program,
    names: BTreeMap<String, WeightId>,
}

impl ProgramBuilder {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// Plans a weight of a number of bytes; the same name gives the same weight.
    ///
    /// # Errors
    /// [`Error::Weight`] when the name stands for a weight of another length.
    pub fn weight(&mut self, name: &str, bytes: u64) -> Result<WeightId> {
        if let Some(known) = self.names.get(name) {
            let planned = self.program.weights[known.0].bytes;
            if planned != bytes {
                return Err(Error::Weight {
                    name: name.into(),
                    problem: format!("planned with {planned} bytes and again with {bytes}"),
                });
            }
            return Ok(*known);
        }
        let id = WeightId(self.program.weights.len());
        let name = name.to_owned();
        self.names.insert(name.clone(), id);
        self.program.weights.push(Weight { name, bytes });
        Ok(id)
    }

    /// Whether a graph of this name was added.
    pub fn has_graph(&self, name: &str) -> bool {
        self.program.graph(name).is_some()
    }

    /// Adds a finished graph.
    ///
    /// # Errors
    /// [`Error::Binding`] when the name is taken.
    pub fn add(&mut self, graph: Graph) -> Result<()> {
        if self.has_graph(&graph.name) {
            return Err(Error::binding(&graph.name, "there is already a graph of this name"));
        }
        self.program.graphs.push(graph);
        Ok(())
    }

    /// The graph of a name, to invoke it.
    pub fn graph(&self, name: &str) -> Option<&Graph> {
        self.program.graph(name)
    }

    /// The program.
    pub fn finish(self) -> Program {
        self.program
    }
}

/// A tensor of the block being built.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub(super) value: ValueId,
    ty: TensorType,
}

impl Tensor {
    /// Its type.
    pub fn ty(&self) -> &TensorType {
        &self.ty
    }

    /// Its dimensions; `None` = known only at run time.
    pub fn dims(&self) -> &[Option<usize>] {
        &self.ty.dims
    }

    /// Its element type.
    pub fn element(&self) -> Element {
        self.ty.element
    }
}

/// A state: its handle, and the token that orders what is done with it.
#[derive(Clone, Debug)]
pub struct State {
    handle: ValueId,
    ty: TensorType,
    token: ValueId,
    name: String,
}

/// One dimension of a shape or bound of a slice: known now, or a tensor `[1]` of si32 at run time.
#[derive(Clone, Debug)]
pub enum Extent {
    /// A number.
    Fixed(usize),
    /// Known at run time.
    Value(Tensor),
}

impl From<usize> for Extent {
    fn from(size: usize) -> Self {
        Self::Fixed(size)
    }
}

impl From<&Tensor> for Extent {
    fn from(tensor: &Tensor) -> Self {
        Self::Value(tensor.clone())
    }
}

/// Upper bound of a slice that takes everything.
pub(super) const END: i32 = i32::MAX;

/// A list of operations in the making.
#[derive(Debug, Default)]
pub struct BlockBuilder {
    block: Block,
    /// Small constants of the block.
    constants: HashMap<(TensorType, Vec<u8>), Tensor>,
    weights: HashMap<(WeightId, TensorType), Tensor>,
}

impl BlockBuilder {
    pub(super) fn with_arguments(types: &[TensorType]) -> (Self, Vec<Tensor>) {
        let block = Block::new(types.iter().cloned().map(Type::Tensor).collect());
        let tensors = types.iter().enumerate();
        let tensors = tensors.map(|(value, ty)| Tensor {
            value: value as ValueId,
            ty: ty.clone(),
        });
        let tensors = tensors.collect();
        let builder = Self {
            block,
            ..Self::default()
        };
        (builder, tensors)
    }

    /// Closes the block with its results.
    pub(super) fn close(mut self, code: OpCode, operands: &[ValueId]) -> Block {
        self.raw(code, operands, Vec::new(), Payload::None, None);
        self.block
    }

    fn raw(
        &mut self,
        code: OpCode,
        operands: &[ValueId],
        results: Vec<Type>,
        payload: Payload,
        region: Option<Block>,
    ) -> ValueId {
        let operation = Operation {
            code,
            operands: operands.to_vec(),
            results: results.len(),
            payload,
            region,
        };
        self.block.push(operation, results)
    }

    /// Adds an operation with one tensor result.
    pub(super) fn emit(&mut self, code: OpCode, operands: &[&Tensor], ty: TensorType, region: Option<Block>) -> Tensor {
        let operands: Vec<ValueId> = operands.iter().map(|tensor| tensor.value).collect();
        let value = self.raw(code, &operands, vec![Type::Tensor(ty.clone())], Payload::None, region);
        Tensor { value, ty }
    }

    /// A constant written among the operations, all elements given or, for `splat`, one for all.
    pub(super) fn inline(&mut self, ty: TensorType, data: Vec<u8>, splat: bool) -> Tensor {
        let key = (ty.clone(), data.clone());
        if let Some(known) = self.constants.get(&key) {
            return known.clone();
        }
        let payload = Payload::Inline { data, splat };
        let value = self.raw(OpCode::Constant, &[], vec![Type::Tensor(ty.clone())], payload, None);
        let tensor = Tensor { value, ty };
        self.constants.insert(key, tensor.clone());
        tensor
    }

    /// A weight as a constant.
    pub fn weight(&mut self, weight: WeightId, ty: TensorType) -> Tensor {
        let key = (weight, ty.clone());
        if let Some(known) = self.weights.get(&key) {
            return known.clone();
        }
        let payload = Payload::Weight(weight.0);
        let value = self.raw(OpCode::Constant, &[], vec![Type::Tensor(ty.clone())], payload, None);
        let tensor = Tensor { value, ty };
        self.weights.insert(key, tensor.clone());
        tensor
    }

    /// A vector of si32.
    pub fn ints(&mut self, values: &[i32]) -> Tensor {
        let splat = values.len() == 1;
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.inline(TensorType::fixed(Element::I32, &[values.len()]), data, splat)
    }

    /// A scalar of si32.
    pub fn int(&mut self, value: i32) -> Tensor {
        self.inline(TensorType::fixed(Element::I32, &[]), value.to_le_bytes().to_vec(), true)
    }

    /// A vector of ui32.
    pub(super) fn unsigned(&mut self, values: &[usize]) -> Tensor {
        let splat = values.len() == 1;
        let data = values.iter().flat_map(|v| (*v as u32).to_le_bytes()).collect();
        self.inline(TensorType::fixed(Element::U32, &[values.len()]), data, splat)
    }

    /// Numbers of f32.
    pub fn floats(&mut self, values: &[f32]) -> Tensor {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.inline(
            TensorType::fixed(Element::F32, &[values.len()]),
            data,
            values.len() == 1,
        )
    }

    /// A tensor filled with one number, which must be whole for integer types.
    ///
    /// # Errors
    /// [`Error::Operands`] for an element type without such a constant.
    pub fn filled(&mut self, element: Element, dims: &[usize], value: f32) -> Result<Tensor> {
        let data = match element {
            Element::F32 => value.to_le_bytes().to_vec(),
            Element::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            Element::I32 => (value as i32).to_le_bytes().to_vec(),
            Element::U64 => (value as u64).to_le_bytes().to_vec(),
            Element::I16 => (value as i16).to_le_bytes().to_vec(),
            Element::I8 | Element::I4 | Element::U4 => vec![value as i8 as u8],
            Element::Bool | Element::Bf16 | Element::U32 => {
                return Err(infer::unfit(
                    OpCode::Constant,
                    format!("no constants of {}", element.name()),
                ));
            }
        };
        Ok(self.inline(TensorType::fixed(element, dims), data, true))
    }

    /// Shape `[rank]` of a tensor, ui32.
    pub fn shape_of(&mut self, x: &Tensor) -> Tensor {
        let ty = TensorType::fixed(Element::U32, &[x.ty.rank()]);
        self.emit(OpCode::GetShape, &[x], ty, None)
    }

    /// Length of one dimension, `[1]` of si32.
    ///
    /// # Errors
    /// [`Error::Operands`] for an axis that the tensor does not have.
    pub fn length(&mut self, x: &Tensor, axis: usize) -> Result<Tensor> {
        if axis >= x.ty.rank() {
            return Err(infer::unfit(OpCode::GetShape, format!("axis {axis} of {}", x.ty)));
        }
        let shape = self.shape_of(x);
        let shape = self.cast(&shape, Element::I32);
        self.slice(&shape, &[axis.into()], &[(axis + 1).into()])
    }

    /// The same numbers in another element type.
    pub fn cast(&mut self, x: &Tensor, element: Element) -> Tensor {
        if x.element() == element {
            return x.clone();
        }
        self.emit(OpCode::Cast, &[x], x.ty.with(element), None)
    }

    /// Elements from `begin` to before `end` in each dimension.
    ///
    /// # Errors
    /// [`Error::Operands`] for bounds that do not fit.
    pub fn slice(&mut self, x: &Tensor, begin: &[Extent], end: &[Extent]) -> Result<Tensor> {
        let ty = infer::slice(&x.ty, begin, end)?;
        let [begin, end, stride] = self.bounds(begin, end)?;
        Ok(self.emit(OpCode::Slice, &[x, &begin, &end, &stride], ty, None))
    }

    /// Elements from `begin` to before `end` of one dimension, and all of the others.
    ///
    /// # Errors
    /// [`Error::Operands`] for bounds that do not fit.
    pub fn slice_axis(&mut self, x: &Tensor, axis: usize, begin: Extent, end: Extent) -> Result<Tensor> {
        let whole = |fill: usize, at: Extent| {
            let one = |i| if i == axis { at.clone() } else { Extent::Fixed(fill) };
            (0..x.ty.rank()).map(one).collect::<Vec<_>>()
        };
        let (begin, end) = (whole(0, begin), whole(END as usize, end));
        self.slice(x, &begin, &end)
    }

    /// `x` with `update` in the place from `begin` to before `end`.
    ///
    /// # Errors
    /// [`Error::Operands`] when the update does not fill the place.
    pub fn slice_update(&mut self, x: &Tensor, update: &Tensor, begin: &[Extent], end: &[Extent]) -> Result<Tensor> {
        let place = infer::slice(&x.ty, begin, end)?;
        if !place.agrees(&update.ty) {
            return Err(infer::unfit(
                OpCode::SliceUpdate,
                format!("{} into a place of {place}", update.ty),
            ));
        }
        let [begin, end, stride] = self.bounds(begin, end)?;
        let operands = [x, &begin, &end, &stride, update];
        Ok(self.emit(OpCode::SliceUpdate, &operands, x.ty.clone(), None))
    }

    fn bounds(&mut self, begin: &[Extent], end: &[Extent]) -> Result<[Tensor; 3]> {
        let strides = vec![1; begin.len()];
        Ok([self.extents(begin)?, self.extents(end)?, self.ints(&strides)])
    }

    /// A vector of si32 from numbers and values of run time.
    fn extents(&mut self, extents: &[Extent]) -> Result<Tensor> {
        let mut parts: Vec<Tensor> = Vec::new();
        let mut fixed: Vec<i32> = Vec::new();
        for extent in extents {
            match extent {
                Extent::Fixed(size) => fixed.push(i32::try_from(*size).unwrap_or(END)),
                Extent::Value(tensor) => {
                    if !fixed.is_empty() {
                        parts.push(self.ints(&std::mem::take(&mut fixed)));
                    }
                    parts.push(tensor.clone());
                }
            }
        }
        if !fixed.is_empty() {
            parts.push(self.ints(&fixed));
        }
        let parts: Vec<&Tensor> = parts.iter().collect();
        self.concat(0, &parts)
    }

    /// Tensors one after the other along an axis.
    ///
    /// # Errors
    /// [`Error::Operands`] when another dimension or the element type differs.
    pub fn concat(&mut self, axis: usize, parts: &[&Tensor]) -> Result<Tensor> {
        if let [only] = parts {
            return Ok((*only).clone());
        }
        let types: Vec<&TensorType> = parts.iter().map(|part| &part.ty).collect();
        let ty = infer::concat(axis, &types)?;
        let axis = self.int(axis as i32);
        let operands: Vec<&Tensor> = std::iter::once(&axis).chain(parts.iter().copied()).collect();
        Ok(self.emit(OpCode::Concat, &operands, ty, None))
    }

    /// The same elements in another shape.
    ///
    /// # Errors
    /// [`Error::Operands`] when the known dimensions cannot hold the elements.
    pub fn reshape(&mut self, x: &Tensor, dims: &[Extent]) -> Result<Tensor> {
        let ty = infer::reshape(&x.ty, dims)?;
        let dims = match dims {
            [] => self.inline(TensorType::fixed(Element::I32, &[0]), Vec::new(), false),
            dims => self.extents(dims)?,
        };
        Ok(self.emit(OpCode::Reshape, &[x, &dims], ty, None))
    }

    /// Dimensions in another order.
    ///
    /// # Errors
    /// [`Error::Operands`] when `order` is not a permutation.
    pub fn transpose(&mut self, x: &Tensor, order: &[usize]) -> Result<Tensor> {
        let ty = infer::transpose(&x.ty, order)?;
        let order = self.unsigned(order);
        Ok(self.emit(OpCode::Transpose, &[x, &order], ty, None))
    }

    /// A new dimension of length 1 at `axis`.
    ///
    /// # Errors
    /// [`Error::Operands`] for an axis beyond the rank.
    pub fn expand(&mut self, x: &Tensor, axis: usize) -> Result<Tensor> {
        if axis > x.ty.rank() {
            return Err(infer::unfit(OpCode::ExpandDims, format!("axis {axis} of {}", x.ty)));
        }
        let mut ty = x.ty.clone();
        ty.dims.insert(axis, Some(1));
        let axes = self.ints(&[axis as i32]);
        Ok(self.emit(OpCode::ExpandDims, &[x, &axes], ty, None))
    }

    /// Without the dimension of length 1 at `axis`.
    ///
    /// # Errors
    /// [`Error::Operands`] when the dimension is not known to be 1.
    pub fn shrink(&mut self, x: &Tensor, axis: usize) -> Result<Tensor> {
        if x.ty.dims.get(axis) != Some(&Some(1)) {
            return Err(infer::unfit(
                OpCode::ShrinkDims,
                format!("axis {axis} of {} is not 1", x.ty),
            ));
        }
        let mut ty = x.ty.clone();
        ty.dims.remove(axis);
        let axes = self.ints(&[axis as i32]);
        Ok(self.emit(OpCode::ShrinkDims, &[x, &axes], ty, None))
    }

    /// Rows of a table by their numbers: `table [n, …]`, `indices [..]` of si32 → `[.., …]`.
    ///
    /// # Errors
    /// [`Error::Operands`] when the indices are not si32.
    pub fn rows(&mut self, table: &Tensor, indices: &Tensor) -> Result<Tensor> {
        if indices.element() != Element::I32 || table.ty.rank() == 0 {
            return Err(infer::unfit(
                OpCode::GatherNd,
                format!("{} by {}", table.ty, indices.ty),
            ));
        }
        let dims = [&indices.ty.dims[..], &table.ty.dims[1..]].concat();
        let indices = self.expand(indices, indices.ty.rank())?;
        let ty = TensorType::new(table.element(), &dims);
        Ok(self.emit(OpCode::GatherNd, &[table, &indices], ty, None))
    }

    /// `begin, begin + 1 ..` to before `end`, which are scalars of si32.
    ///
    /// # Errors
    /// [`Error::Operands`] for anything but scalars of si32.
    pub fn range(&mut self, begin: &Tensor, end: &Tensor) -> Result<Tensor> {
        let scalar = TensorType::fixed(Element::I32, &[]);
        if begin.ty != scalar || end.ty != scalar {
            return Err(infer::unfit(OpCode::Range, format!("{} to {}", begin.ty, end.ty)));
        }
        let step = self.int(1);
        let ty = TensorType::new(Element::I32, &[None]);
        Ok(self.emit(OpCode::Range, &[begin, end, &step], ty, None))
    }

    /// Gelu of each element.
    pub fn gelu(&mut self, x: &Tensor, tanh: bool) -> Tensor {
        let ty = x.ty.clone();
        let payload = Payload::Gelu { tanh };
        let value = self.raw(OpCode::Gelu, &[x.value], vec![Type::Tensor(ty.clone())], payload, None);
        Tensor { value, ty }
    }

    /// `1 / √x` of each element.
    pub fn rsqrt(&mut self, x: &Tensor) -> Tensor {
        self.emit(OpCode::Rsqrt, &[x], x.ty.clone(), None)
    }

    /// Cosine of each element.
    pub fn cos(&mut self, x: &Tensor) -> Tensor {
        self.emit(OpCode::Cos, &[x], x.ty.clone(), None)
    }

    /// Sine of each element.
    pub fn sin(&mut self, x: &Tensor) -> Tensor {
        self.emit(OpCode::Sin, &[x], x.ty.clone(), None)
    }

    /// `e` to the power of each element.
    pub fn exp(&mut self, x: &Tensor) -> Tensor {
        self.emit(OpCode::Exp, &[x], x.ty.clone(), None)
    }

    /// Hyperbolic tangent of each element.
    pub fn tanh(&mut self, x: &Tensor) -> Tensor {
        self.emit(OpCode::Tanh, &[x], x.ty.clone(), None)
    }

    /// `scale · data`: integers `[o, i]` with one scale for each block of inputs, `[o, i / block]`.
    ///
    /// # Errors
    /// [`Error::Operands`] when the scales do not divide the data.
    pub fn scaled(&mut self, data: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let code = OpCode::BlockwiseShiftScale;
        let ty = infer::blocks(code, &data.ty, &scale.ty, scale.ty.rank())?;
        let dims: Vec<usize> = scale.ty.dims.iter().map(|d| d.unwrap_or_default()).collect();
        let before = self.filled(data.element(), &dims, 0.0)?;
        let after = self.filled(scale.element(), &dims, 0.0)?;
        Ok(self.emit(code, &[data, scale, &before, &after], ty, None))
    }

    /// Entries of tables by index: indices `[o, i]`, tables `[o / group, 1, entries, 1]`.
    ///
    /// # Errors
    /// [`Error::Operands`] when the tables do not divide the indices.
    pub fn looked_up(&mut self, indices: &Tensor, tables: &Tensor) -> Result<Tensor> {
        let code = OpCode::LutToDense;
        if tables.ty.rank() != indices.ty.rank() + 2 {
            return Err(infer::unfit(
                code,
                format!("{} with tables of {}", indices.ty, tables.ty),
            ));
        }
        let ty = infer::blocks(code, &indices.ty, &tables.ty, indices.ty.rank())?;
        let axis = self.filled(Element::I16, &[], 0.0)?;
        Ok(self.emit(code, &[indices, tables, &axis], ty, None))
    }

    /// Runs a graph of one tensor result.
    ///
    /// # Errors
    /// [`Error::Operands`] when the arguments do not have the types of its inputs.
    pub fn invoke(&mut self, graph: &Graph, arguments: &[&Tensor]) -> Result<Tensor> {
        let given: Vec<Type> = arguments.iter().map(|x| Type::Tensor(x.ty.clone())).collect();
        let wanted: Vec<Type> = graph.inputs.iter().map(|port| port.ty.clone()).collect();
        let (true, [output]) = (given == wanted, &graph.outputs[..]) else {
            let all = |types: &[Type]| types.iter().map(Type::to_string).collect::<Vec<_>>().join(", ");
            return Err(infer::unfit(
                OpCode::Invoke,
                format!("{} takes ({}), given ({})", graph.name, all(&wanted), all(&given)),
            ));
        };
        let Some(ty) = output.ty.tensor().cloned() else {
            return Err(infer::unfit(
                OpCode::Invoke,
                format!("{} does not give a tensor", graph.name),
            ));
        };
        let operands: Vec<ValueId> = arguments.iter().map(|x| x.value).collect();
        let payload = Payload::Callee(graph.name.clone());
        let value = self.raw(OpCode::Invoke, &operands, vec![Type::Tensor(ty.clone())], payload, None);
        Ok(Tensor { value, ty })
    }

    /// What a state holds.
    pub fn read(&mut self, state: &mut State) -> Tensor {
        let ty = state.ty.clone();
        let results = vec![Type::Tensor(ty.clone()), Type::Token];
        let value = self.raw(
            OpCode::ReadHandle,
            &[state.handle, state.token],
            results,
            Payload::None,
            None,
        );
        state.token = value + 1;
        Tensor { value, ty }
    }

    /// Changes what a state holds.
    ///
    /// # Errors
    /// [`Error::Operands`] for a tensor of another type.
    pub fn write(&mut self, state: &mut State, x: &Tensor) -> Result<()> {
        if x.ty != state.ty {
            return Err(infer::unfit(
                OpCode::WriteHandle,
                format!("{} into a state of {}", x.ty, state.ty),
            ));
        }
        let operands = [state.handle, x.value, state.token];
        state.token = self.raw(OpCode::WriteHandle, &operands, vec![Type::Token], Payload::None, None);
        Ok(())
    }
}

/// A graph in the making: inputs first, then operations, then [`finish`](Self::finish).
#[derive(Debug)]
pub struct GraphBuilder {
    name: String,
    inputs: Vec<Port>,
    body: BlockBuilder,
}

impl std::ops::Deref for GraphBuilder {
    type Target = BlockBuilder;

    fn deref(&self) -> &BlockBuilder {
        &self.body
    }
}

impl std::ops::DerefMut for GraphBuilder {
    fn deref_mut(&mut self) -> &mut BlockBuilder {
        &mut self.body
    }
}

impl GraphBuilder {
    /// A graph without operations. States are given as handles.
    pub fn new(name: &str, inputs: &[(&str, Type)]) -> Self {
        let ports = inputs.iter().map(|(name, ty)| Port {
            name: (*name).into(),
            ty: ty.clone(),
        });
        let block = Block::new(inputs.iter().map(|row| row.1.clone()).collect());
        Self {
            name: name.into(),
            inputs: ports.collect(),
            body: BlockBuilder {
                block,
                ..BlockBuilder::default()
            },
        }
    }

    /// An input that is a tensor.
    ///
    /// # Errors
    /// [`Error::Binding`] when there is none of that name.
    pub fn input(&self, name: &str) -> Result<Tensor> {
        let (value, port) = self.port(name)?;
        let ty = port.ty.tensor().ok_or_else(|| Error::binding(name, "not a tensor"))?;
        Ok(Tensor { value, ty: ty.clone() })
    }

    /// An input that is a state, with a token of its own.
    ///
    /// # Errors
    /// [`Error::Binding`] when there is none of that name.
    pub fn state(&mut self, name: &str) -> Result<State> {
        let (handle, port) = self.port(name)?;
        let Type::Handle(ty) = port.ty.clone() else {
            return Err(Error::binding(name, "not a state"));
        };
        let token = self
            .body
            .raw(OpCode::CreateToken, &[], vec![Type::Token], Payload::None, None);
        Ok(State {
            handle,
            ty,
            token,
            name: name.into(),
        })
    }

    fn port(&self, name: &str) -> Result<(ValueId, &Port)> {
        let at = self.inputs.iter().position(|port| port.name == name);
        let at = at.ok_or_else(|| Error::binding(name, "no input of this name"))?;
        Ok((at as ValueId, &self.inputs[at]))
    }

    /// The graph of a function: tokens of the states first, then tensors.
    pub fn finish(self, states: &[State], outputs: &[(&str, &Tensor)]) -> Graph {
        let tokens = states
            .iter()
            .map(|state| (state.name.as_str(), state.token, Type::Token));
        let tensors = outputs
            .iter()
            .map(|(name, x)| (*name, x.value, Type::Tensor(x.ty.clone())));
        let rows: Vec<(&str, ValueId, Type)> = tokens.chain(tensors).collect();
        let operands: Vec<ValueId> = rows.iter().map(|row| row.1).collect();
        let ports = rows.into_iter().map(|(name, _, ty)| Port { name: name.into(), ty });
        Graph {
            name: self.name,
            is_private: false,
            inputs: self.inputs,
            outputs: ports.collect(),
            composite: None,
            block: self.body.close(OpCode::Output, &operands),
        }
    }

    /// The private graph of a composite with one output, named `output`.
    pub fn finish_composite(
        self,
        function: &str,
        attributes: &[(&str, crate::program::Parameter)],
        output: &Tensor,
    ) -> Graph {
        let declared = Composite {
            name: function.into(),
            inputs: self.inputs.iter().map(|port| port.name.clone()).collect(),
            attributes: attributes.iter().map(|(key, value)| ((*key).into(), *value)).collect(),
            outputs: vec!["output".into()],
        };
        Graph {
            is_private: true,
            composite: Some(declared),
            ..self.finish(&[], &[("output", output)])
        }
    }
}
