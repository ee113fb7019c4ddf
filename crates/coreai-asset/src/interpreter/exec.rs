//! Runs a graph, one operation after the other.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use half::f16;
use ndarray::{ArrayD, IxDyn};

use super::{kernels, operations, value::Value};
use crate::{
    Asset, Element, Error, Result, TensorType, Type,
    program::{Block, Graph, OpCode, Operation, Payload},
};

/// Arithmetic of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Each result is rounded to its declared type; sums inside one operation are f32.
    Declared,
    /// Half floats are computed and kept as f32: what remains is the rounding of the stored weights.
    F32,
}

/// What the machine knows beyond primitive operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Understanding {
    /// Decomposable operations and declared composites are computed by kernels, as a device with kernels does.
    Kernels,
    /// Everything is computed by the bodies that the program carries.
    Bodies,
}

/// Contents of states by name.
pub type States = BTreeMap<String, Arc<ArrayD<f32>>>;
/// Results of a function by name.
pub type Outputs = BTreeMap<String, Value>;

/// An asset, ready to run.
#[derive(Clone, Debug)]
pub struct Machine {
    asset: Arc<Asset>,
    arithmetic: Arithmetic,
    understanding: Understanding,
}

impl Machine {
    /// Opens the asset in a folder.
    ///
    /// # Errors
    /// As [`Asset::open`].
    pub fn open(folder: &Path) -> Result<Self> {
        Ok(Self {
            asset: Arc::new(Asset::open(folder)?),
            arithmetic: Arithmetic::Declared,
            understanding: Understanding::Kernels,
        })
    }

    /// The same asset run in another way.
    pub fn with(&self, arithmetic: Arithmetic, understanding: Understanding) -> Self {
        Self {
            asset: self.asset.clone(),
            arithmetic,
            understanding,
        }
    }

    /// The asset.
    pub fn asset(&self) -> &Asset {
        &self.asset
    }

    /// States of a function, filled with zeros; `open` is the length of dimensions that the program leaves open.
    ///
    /// # Errors
    /// [`Error::Binding`] for an unknown function.
    pub fn new_states(&self, function: &str, open: usize) -> Result<States> {
        let zeros = |ty: &TensorType| {
            let shape: Vec<usize> = ty.dims.iter().map(|dim| dim.unwrap_or(open)).collect();
            Arc::new(ArrayD::zeros(IxDyn(&shape)))
        };
        let states = self
            .function(function)?
            .inputs
            .iter()
            .filter_map(|port| match &port.ty {
                Type::Handle(ty) => Some((port.name.clone(), zeros(ty))),
                Type::Tensor(_) | Type::Token => None,
            });
        Ok(states.collect())
    }

    /// Runs a function; states are changed in place.
    ///
    /// # Errors
    /// [`Error::Binding`] for an unknown function, or an input or state that is missing or misshapen;
    /// [`Error::Operands`] when an operation cannot be carried out or gives another type than declared.
    pub fn run(&self, function: &str, inputs: &BTreeMap<String, Value>, states: &mut States) -> Result<Outputs> {
        let graph = self.function(function)?;
        let mut arguments = Vec::new();
        for (index, port) in graph.inputs.iter().enumerate() {
            arguments.push(match &port.ty {
                Type::Tensor(ty) => bound(&port.name, ty, inputs.get(&port.name).cloned())?,
                Type::Handle(ty) => {
                    let state = states.get(&port.name).map(|held| Value::Float(held.clone()));
                    bound(&port.name, ty, state)?;
                    Value::Handle(index)
                }
                Type::Token => return Err(Error::binding(&port.name, "a token is not an input")),
            });
        }
        let mut run = Run {
            machine: self,
            graph,
            states,
            depth: 0,
        };
        let results = run.block(&graph.block, arguments)?;
        let named = graph.outputs.iter().zip(results);
        let tensors = named.filter(|(_, value)| !matches!(value, Value::Token));
        Ok(tensors.map(|(port, value)| (port.name.clone(), value)).collect())
    }

    fn function(&self, name: &str) -> Result<&Graph> {
        let graph = self.asset.program().graph(name).filter(|graph| !graph.is_private);
        graph.ok_or_else(|| Error::binding(name, "no function of this name"))
    }
}

fn bound(name: &str, ty: &TensorType, value: Option<Value>) -> Result<Value> {
    let value = value.ok_or_else(|| Error::binding(name, "must be given"))?;
    let is_float = matches!(value, Value::Float(_));
    match value.shape() {
        Some(shape) if ty.admits(&shape) && is_float == ty.element.is_float() => Ok(value),
        shape => Err(Error::binding(name, format!("expected {ty}, found shape {shape:?}"))),
    }
}

/// A function on its way.
struct Run<'a> {
    machine: &'a Machine,
    /// The public graph, whose inputs handles refer to.
    graph: &'a Graph,
    states: &'a mut States,
    /// Graphs that invoke each other.
    depth: usize,
}

/// Composites do not nest deeper.
const MAX_DEPTH: usize = 16;

impl Run<'_> {
    /// Runs a block. Returns the operands of the operation that closes it.
    fn block(&mut self, block: &Block, arguments: Vec<Value>) -> Result<Vec<Value>> {
        let mut values = arguments;
        for operation in &block.operations {
            let operands: Vec<Value> = operation
                .operands
                .iter()
                .map(|id| values[*id as usize].clone())
                .collect();
            if matches!(operation.code, OpCode::Output | OpCode::Yield) {
                return Ok(operands);
            }
            let types = &block.types[values.len()..values.len() + operation.results];
            let results = self.operation(operation, operands, types)?;
            let checked = results
                .into_iter()
                .zip(types)
                .map(|(value, ty)| self.checked(operation, value, ty));
            let checked = checked.collect::<Result<Vec<_>>>()?;
            if checked.len() != operation.results {
                return Err(Error::operands(
                    operation.code.name(),
                    "another number of results than declared",
                ));
            }
            values.extend(checked);
        }
        Err(Error::operands("block", "no operation closes it"))
    }

    fn operation(&mut self, operation: &Operation, operands: Vec<Value>, types: &[Type]) -> Result<Vec<Value>> {
        let fail = |problem: String| Error::operands(operation.code.name(), problem);
        let by_body = self.machine.understanding == Understanding::Bodies;
        match (operation.code, &operation.payload, &operation.region) {
            (OpCode::Constant, payload, _) => {
                let ty = types
                    .first()
                    .and_then(Type::tensor)
                    .ok_or_else(|| fail("not a tensor".into()))?;
                operations::constant(&self.machine.asset, payload, ty)
                    .map(|v| vec![v])
                    .map_err(fail)
            }
            (OpCode::Invoke, Payload::Callee(name), _) => self.invoke(name, operands),
            (OpCode::CreateToken, ..) => Ok(vec![Value::Token]),
            (OpCode::ReadHandle, ..) => Ok(vec![Value::Float(self.state(&operands)?.clone()), Value::Token]),
            (OpCode::WriteHandle, ..) => {
                let Some(Value::Float(new)) = operands.get(1).cloned() else {
                    return Err(fail("the new content is not a tensor of floats".into()));
                };
                *self.state(&operands)? = new;
                Ok(vec![Value::Token])
            }
            (code, _, Some(region)) if by_body && code.is_decomposable() => {
                if region.arguments != operands.len() {
                    return Err(fail("its decomposition has other operands".into()));
                }
                self.block(region, operands)
            }
            _ => operations::apply(operation, &operands, types)
                .map(|v| vec![v])
                .map_err(fail),
        }
    }

    fn invoke(&mut self, name: &str, operands: Vec<Value>) -> Result<Vec<Value>> {
        let graph = self.machine.asset.program().graph(name);
        let graph = graph.ok_or_else(|| Error::binding(name, "no graph of this name"))?;
        if graph.inputs.len() != operands.len() {
            return Err(Error::binding(name, "invoked with another number of operands"));
        }
        if let (Understanding::Kernels, Some(composite)) = (self.machine.understanding, &graph.composite) {
            let result = kernels::run(composite, &operands);
            return result.map(|v| vec![v]).map_err(|problem| Error::binding(name, problem));
        }
        if self.depth == MAX_DEPTH {
            return Err(Error::binding(name, "graphs invoke each other without end"));
        }
        self.depth += 1;
        let results = self.block(&graph.block, operands);
        self.depth -= 1;
        results
    }

    fn state(&mut self, operands: &[Value]) -> Result<&mut Arc<ArrayD<f32>>> {
        let index = match operands.first() {
            Some(Value::Handle(index)) => *index,
            _ => return Err(Error::operands("handle", "not a state")),
        };
        let name = &self.graph.inputs[index].name;
        self.states
            .get_mut(name)
            .ok_or_else(|| Error::binding(name, "must be given"))
    }

    /// The value in its declared type: the shape must fit, floats are rounded.
    fn checked(&self, operation: &Operation, value: Value, ty: &Type) -> Result<Value> {
        let Some(ty) = ty.tensor() else {
            return Ok(value);
        };
        let shape = value.shape().unwrap_or_default();
        let is_int = matches!(value, Value::Int(_));
        if !ty.admits(&shape) || (is_int && ty.element.is_float()) {
            let problem = format!("declared as {ty}, gives shape {shape:?}");
            return Err(Error::operands(operation.code.name(), problem));
        }
        let Value::Float(array) = &value else {
            return Ok(value);
        };
        if self.machine.arithmetic == Arithmetic::F32 || ty.element != Element::F16 {
            return Ok(value);
        }
        Ok(array.mapv(|v| f16::from_f32(v).to_f32()).into())
    }
}
