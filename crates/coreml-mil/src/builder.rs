//! Builds one function, operation by operation; what does not fit is refused where it is written.

use std::collections::{BTreeMap, HashMap, HashSet};

use half::f16;

use crate::{
    DType, Dim, Error, Literal, Operand, Result, TensorType, Type, infer,
    proto::{self, BindingKind},
};

/// The opset of every function here; it needs specification version 9 (iOS 18, macOS 15).
pub(crate) const OPSET: &str = "CoreML8";
/// How programs name the weight file.
pub(crate) const WEIGHT_FILE: &str = "@model_path/weights/weight.bin";

/// A value of a function under construction.
#[derive(Clone, Debug)]
pub struct Tensor {
    name: String,
    ty: Type,
    literal: Option<Literal>,
}

impl Tensor {
    /// Its type.
    pub fn ty(&self) -> &TensorType {
        self.ty.tensor()
    }

    /// Its shape; unknown dimensions are left out, which no caller with fixed shapes sees.
    pub fn shape(&self) -> Vec<usize> {
        self.ty()
            .dims
            .iter()
            .filter_map(|d| if let Dim::Fixed(n) = d { Some(*n) } else { None })
            .collect()
    }
}

/// A state of a function under construction.
#[derive(Clone, Debug)]
pub struct State(Tensor);

impl State {
    /// Type of the tensor inside.
    pub fn ty(&self) -> &TensorType {
        self.0.ty()
    }
}

/// A blob of the weight file, by type and offset of its metadata.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlobRef {
    /// Type and shape under which the program reads it.
    pub ty: TensorType,
    /// Offset of its metadata.
    pub offset: u64,
}

impl BlobRef {
    fn to_proto(&self) -> proto::Value {
        let blob = proto::BlobFileValue {
            file_name: WEIGHT_FILE.into(),
            offset: self.offset,
        };
        proto::Value {
            doc_string: String::new(),
            r#type: Some(self.ty.to_proto()),
            kind: Some(proto::ValueKind::BlobFile(blob)),
        }
    }
}

enum Arg<'a> {
    One(&'a Tensor),
    Many(&'a [&'a Tensor]),
    Blob(&'a BlobRef),
}

/// Builds one function.
///
/// Every operator method infers the type of its result and fails with [`Error::Operation`] where an operand does not fit;
/// what a builder has accepted, the checker and coremltools' loader accept too. Constants are stored once a function.
///
/// ```
/// use coreml_mil::{DType, FunctionBuilder, TensorType};
/// let mut b = FunctionBuilder::new();
/// let x = b.input("x", TensorType::new(DType::F16, &[1, 4, 8]))?;
/// let y = b.softmax(&x, -1)?;
/// assert_eq!(y.shape(), [1, 4, 8]);
/// assert!(b.softmax(&x, 3).is_err()); // rank 3 has no axis 3
/// let function = b.finish(&[("y", &y)])?;
/// assert_eq!(function.outputs[0].0, "y");
/// # Ok::<(), coreml_mil::Error>(())
/// ```
#[derive(Default)]
pub struct FunctionBuilder {
    inputs: Vec<(String, Type)>,
    operations: Vec<proto::Operation>,
    names: HashSet<String>,
    literals: HashMap<String, Tensor>,
    blobs: HashMap<BlobRef, Tensor>,
    scope: String,
    counter: usize,
}

/// A finished function: the protobuf message and what a description must say about it.
#[derive(Clone, Debug)]
pub struct BuiltFunction {
    /// The program's function.
    pub message: proto::Function,
    /// Name and type of each input and state, in order.
    pub inputs: Vec<(String, Type)>,
    /// Name and type of each output, in order.
    pub outputs: Vec<(String, TensorType)>,
}

impl FunctionBuilder {
    /// An empty function.
    pub fn new() -> Self {
        Self::default()
    }

    /// Prefix of the names of the operations that follow, such as `layers_3_`.
    pub fn scope(&mut self, scope: impl Into<String>) {
        self.scope = scope.into();
    }

    /// Declares an input.
    ///
    /// # Errors
    /// [`Error::Operation`] for a name that is taken or no identifier.
    pub fn input(&mut self, name: &str, ty: TensorType) -> Result<Tensor> {
        self.declare(name, Type::Tensor(ty))
    }

    /// Declares a state.
    ///
    /// # Errors
    /// [`Error::Operation`] as [`FunctionBuilder::input`]; also for a type other than fp16, the only one that Core ML takes.
    pub fn state(&mut self, name: &str, ty: TensorType) -> Result<State> {
        if ty.dtype != DType::F16 {
            return Err(mil("state", format!("{name} is {ty}; Core ML takes fp16 states only")));
        }
        self.declare(name, Type::State(ty)).map(State)
    }

    fn declare(&mut self, name: &str, ty: Type) -> Result<Tensor> {
        self.claim(name)?;
        self.inputs.push((name.into(), ty.clone()));
        Ok(Tensor {
            name: name.into(),
            ty,
            literal: None,
        })
    }

    /// A constant in the weight file.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn blob(&mut self, blob: &BlobRef) -> Result<Tensor> {
        if let Some(known) = self.blobs.get(blob) {
            return Ok(known.clone());
        }
        let tensor = self.constant("weight", &blob.ty, blob.to_proto(), None)?;
        self.blobs.insert(blob.clone(), tensor.clone());
        Ok(tensor)
    }

    /// Element-wise sum, broadcast.
    ///
    /// # Errors
    /// [`Error::Operation`], as every operator below.
    pub fn add(&mut self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        self.op("add", &[("x", Arg::One(x)), ("y", Arg::One(y))])
    }

    /// Element-wise product, broadcast.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn mul(&mut self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        self.op("mul", &[("x", Arg::One(x)), ("y", Arg::One(y))])
    }

    /// Product with a number.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn scale(&mut self, x: &Tensor, factor: f32) -> Result<Tensor> {
        let factor = self.scalar_f16(factor)?;
        self.mul(x, &factor)
    }

    /// A 1×1 convolution: `weight [out, in, 1, 1]` on `x [1, in, 1, t]` gives `[1, out, 1, t]`.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn conv(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (strides, pad, dilations) = (self.vector(&[1, 1])?, self.vector(&[0; 4])?, self.vector(&[1, 1])?);
        let (pad_type, groups) = (self.text("valid")?, self.scalar_i32(1)?);
        let mut args = vec![
            ("x", Arg::One(x)),
            ("weight", Arg::One(weight)),
            ("strides", Arg::One(&strides)),
            ("pad_type", Arg::One(&pad_type)),
            ("pad", Arg::One(&pad)),
            ("dilations", Arg::One(&dilations)),
            ("groups", Arg::One(&groups)),
        ];
        args.extend(bias.map(|b| ("bias", Arg::One(b))));
        self.op("conv", &args)
    }

    /// Normalises the last axis to mean 0 and variance 1, without gain or bias.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn layer_norm(&mut self, x: &Tensor, epsilon: f32) -> Result<Tensor> {
        let (axes, epsilon) = (self.vector(&[-1])?, self.scalar_f16(epsilon)?);
        self.op(
            "layer_norm",
            &[
                ("x", Arg::One(x)),
                ("axes", Arg::One(&axes)),
                ("epsilon", Arg::One(&epsilon)),
            ],
        )
    }

    /// Softmax along an axis.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn softmax(&mut self, x: &Tensor, axis: i32) -> Result<Tensor> {
        let axis = self.scalar_i32(axis)?;
        self.op("softmax", &[("x", Arg::One(x)), ("axis", Arg::One(&axis))])
    }

    /// `x · sigmoid(x)`.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn silu(&mut self, x: &Tensor) -> Result<Tensor> {
        self.op("silu", &[("x", Arg::One(x))])
    }

    /// Matrix product of the last two axes, the earlier ones broadcast.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn matmul(&mut self, x: &Tensor, y: &Tensor, transpose_y: bool) -> Result<Tensor> {
        let (no, flag) = (self.flag(false)?, self.flag(transpose_y)?);
        let args = [
            ("x", Arg::One(x)),
            ("y", Arg::One(y)),
            ("transpose_x", Arg::One(&no)),
            ("transpose_y", Arg::One(&flag)),
        ];
        self.op("matmul", &args)
    }

    /// Joins tensors along an axis.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn concat(&mut self, values: &[&Tensor], axis: i32) -> Result<Tensor> {
        let (axis, interleave) = (self.scalar_i32(axis)?, self.flag(false)?);
        let args = [
            ("values", Arg::Many(values)),
            ("axis", Arg::One(&axis)),
            ("interleave", Arg::One(&interleave)),
        ];
        self.op("concat", &args)
    }

    /// The window `begin .. end` of each axis.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn slice(&mut self, x: &Tensor, begin: &[usize], end: &[usize]) -> Result<Tensor> {
        let (begin, end) = (self.sizes(begin)?, self.sizes(end)?);
        self.op(
            "slice_by_index",
            &[("x", Arg::One(x)), ("begin", Arg::One(&begin)), ("end", Arg::One(&end))],
        )
    }

    /// `x` with the window `begin .. end` replaced; both may be computed.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn slice_update(&mut self, x: &Tensor, update: &Tensor, begin: &Tensor, end: &Tensor) -> Result<Tensor> {
        let args = [
            ("x", Arg::One(x)),
            ("update", Arg::One(update)),
            ("begin", Arg::One(begin)),
            ("end", Arg::One(end)),
        ];
        self.op("slice_update", &args)
    }

    /// Rows of `x` chosen by `indices`, which must lie in `0 .. rows`: nothing wraps or clamps them.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn gather(&mut self, x: &Tensor, indices: &Tensor) -> Result<Tensor> {
        let (zero, validate) = (self.scalar_i32(0)?, self.flag(false)?);
        let args = [
            ("x", Arg::One(x)),
            ("indices", Arg::One(indices)),
            ("axis", Arg::One(&zero)),
            ("batch_dims", Arg::One(&zero)),
            ("validate_indices", Arg::One(&validate)),
        ];
        self.op("gather", &args)
    }

    /// The same elements in another shape.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn reshape(&mut self, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
        let shape = self.sizes(shape)?;
        self.op("reshape", &[("x", Arg::One(x)), ("shape", Arg::One(&shape))])
    }

    /// Axes in another order.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn transpose(&mut self, x: &Tensor, perm: &[i32]) -> Result<Tensor> {
        let perm = self.vector(perm)?;
        self.op("transpose", &[("x", Arg::One(x)), ("perm", Arg::One(&perm))])
    }

    /// A new axis of size 1.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn expand_dims(&mut self, x: &Tensor, axis: i32) -> Result<Tensor> {
        let axes = self.vector(&[axis])?;
        self.op("expand_dims", &[("x", Arg::One(x)), ("axes", Arg::One(&axes))])
    }

    /// Removes an axis of size 1.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn squeeze(&mut self, x: &Tensor, axis: i32) -> Result<Tensor> {
        let axes = self.vector(&[axis])?;
        self.op("squeeze", &[("x", Arg::One(x)), ("axes", Arg::One(&axes))])
    }

    /// Repeats each axis as a whole.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn tile(&mut self, x: &Tensor, reps: &[usize]) -> Result<Tensor> {
        let reps = self.sizes(reps)?;
        self.op("tile", &[("x", Arg::One(x)), ("reps", Arg::One(&reps))])
    }

    /// The content of a state as the writes so far have left it.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn read_state(&mut self, state: &State) -> Result<Tensor> {
        self.op("read_state", &[("input", Arg::One(&state.0))])
    }

    /// Replaces the content of a state.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn write_state(&mut self, state: &State, data: &Tensor) -> Result<()> {
        self.emit(
            "write_state",
            &[("input", Arg::One(&state.0)), ("data", Arg::One(data))],
        )
        .map(|_| ())
    }

    /// A weight stored as integers with one scale for each block: `scale · data`.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn blockwise_shift_scale(&mut self, data: &BlobRef, scale: &BlobRef) -> Result<Tensor> {
        self.op(
            "constexpr_blockwise_shift_scale",
            &[("data", Arg::Blob(data)), ("scale", Arg::Blob(scale))],
        )
    }

    /// A weight stored as indices into tables, one table for each block.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn lut_to_dense(&mut self, indices: &BlobRef, lut: &BlobRef) -> Result<Tensor> {
        self.op(
            "constexpr_lut_to_dense",
            &[("indices", Arg::Blob(indices)), ("lut", Arg::Blob(lut))],
        )
    }

    /// An fp16 number.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub(crate) fn scalar_f16(&mut self, value: f32) -> Result<Tensor> {
        self.literal(Literal::F16(vec![f16::from_f32(value)]), &[])
    }

    /// An int32 number.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn scalar_i32(&mut self, value: i32) -> Result<Tensor> {
        self.literal(Literal::I32(vec![value]), &[])
    }

    /// A vector of int32.
    ///
    /// # Errors
    /// [`Error::Operation`].
    pub fn vector(&mut self, values: &[i32]) -> Result<Tensor> {
        self.literal(Literal::I32(values.to_vec()), &[values.len()])
    }

    fn sizes(&mut self, values: &[usize]) -> Result<Tensor> {
        let values: Result<Vec<i32>, _> = values.iter().map(|&v| i32::try_from(v)).collect();
        self.vector(&values.map_err(|_| mil("const", "a size above the int32 range".into()))?)
    }

    fn flag(&mut self, value: bool) -> Result<Tensor> {
        self.literal(Literal::Bool(vec![value]), &[])
    }

    fn text(&mut self, value: &str) -> Result<Tensor> {
        self.literal(Literal::Str(value.into()), &[])
    }

    fn literal(&mut self, value: Literal, shape: &[usize]) -> Result<Tensor> {
        let key = format!("{value:?}{shape:?}");
        if let Some(known) = self.literals.get(&key) {
            return Ok(known.clone());
        }
        let ty = TensorType::new(value.dtype(), shape);
        let message = value.to_proto(&ty);
        let tensor = self.constant("const", &ty, message, Some(value))?;
        self.literals.insert(key, tensor.clone());
        Ok(tensor)
    }

    fn constant(
        &mut self,
        hint: &str,
        ty: &TensorType,
        message: proto::Value,
        literal: Option<Literal>,
    ) -> Result<Tensor> {
        let name = self.fresh(hint)?;
        let output = proto::NamedValueType {
            name: name.clone(),
            r#type: Some(ty.to_proto()),
        };
        let attributes = BTreeMap::from([("name".into(), name_value(&name)), ("val".into(), message)]);
        let operation = proto::Operation {
            r#type: "const".into(),
            outputs: vec![output],
            attributes,
            ..Default::default()
        };
        self.operations.push(operation);
        Ok(Tensor {
            name,
            ty: Type::Tensor(ty.clone()),
            literal,
        })
    }

    /// An operation with one result.
    fn op(&mut self, operator: &'static str, args: &[(&'static str, Arg)]) -> Result<Tensor> {
        self.emit(operator, args)?
            .ok_or_else(|| Error::internal(format!("{operator} has no result")))
    }

    fn emit(&mut self, operator: &'static str, args: &[(&'static str, Arg)]) -> Result<Option<Tensor>> {
        let result = infer_args(operator, args)?;
        let name = self.fresh(operator)?;
        let inputs = args
            .iter()
            .map(|(parameter, arg)| ((*parameter).into(), argument(arg)))
            .collect();
        let outputs = result.iter().map(|ty| proto::NamedValueType {
            name: name.clone(),
            r#type: Some(ty.to_proto()),
        });
        self.operations.push(proto::Operation {
            r#type: operator.into(),
            inputs,
            outputs: outputs.collect(),
            blocks: Vec::new(),
            attributes: BTreeMap::from([("name".into(), name_value(&name))]),
        });
        Ok(result.map(|ty| Tensor {
            name,
            ty: Type::Tensor(ty),
            literal: None,
        }))
    }

    fn fresh(&mut self, hint: &str) -> Result<String> {
        let name = format!("{}{hint}_{}", self.scope, self.counter);
        self.counter += 1;
        self.claim(&name)?;
        Ok(name)
    }

    fn claim(&mut self, name: &str) -> Result<()> {
        if !is_identifier(name) {
            return Err(mil(name, "the name is no identifier".into()));
        }
        if !self.names.insert(name.into()) {
            return Err(mil(name, "the name is taken".into()));
        }
        Ok(())
    }

    /// Gives the outputs their names and returns the function.
    ///
    /// # Errors
    /// [`Error::Operation`] for a name that is taken, a constant or an input as output.
    pub fn finish(mut self, outputs: &[(&str, &Tensor)]) -> Result<BuiltFunction> {
        for (name, tensor) in outputs {
            self.claim(name)?;
            self.rename(&tensor.name, name)?;
        }
        let block = proto::Block {
            inputs: Vec::new(),
            outputs: outputs.iter().map(|(name, _)| (*name).into()).collect(),
            operations: self.operations,
        };
        let inputs = self.inputs.iter();
        let message = proto::Function {
            inputs: inputs.map(|(name, ty)| named_type(name, ty)).collect(),
            opset: OPSET.into(),
            block_specializations: BTreeMap::from([(OPSET.into(), block)]),
        };
        let outputs = outputs
            .iter()
            .map(|(name, tensor)| ((*name).into(), tensor.ty().clone()))
            .collect();
        Ok(BuiltFunction {
            message,
            inputs: self.inputs,
            outputs,
        })
    }

    fn rename(&mut self, old: &str, new: &str) -> Result<()> {
        let makers = self.operations.iter_mut().filter(|op| op.r#type != "const");
        let mut outputs = makers.flat_map(|op| op.outputs.iter_mut());
        let output = outputs.find(|output| output.name == old);
        output
            .ok_or_else(|| mil(new, format!("{old} is no operation's result")))?
            .name = new.into();
        let bindings = self.operations.iter_mut().flat_map(|op| op.inputs.values_mut());
        for binding in bindings.flat_map(|argument| argument.arguments.iter_mut()) {
            if let Some(BindingKind::Name(name)) = &mut binding.kind
                && name == old
            {
                *name = new.into();
            }
        }
        Ok(())
    }
}

fn infer_args(operator: &'static str, args: &[(&'static str, Arg)]) -> Result<Option<TensorType>> {
    let blob_types: Vec<Option<Type>> = args
        .iter()
        .map(|(_, arg)| {
            if let Arg::Blob(blob) = arg {
                Some(Type::Tensor(blob.ty.clone()))
            } else {
                None
            }
        })
        .collect();
    let mut operands = BTreeMap::new();
    for ((parameter, arg), blob_type) in args.iter().zip(&blob_types) {
        let bound = match (arg, blob_type) {
            (Arg::One(tensor), _) => vec![operand(tensor)],
            (Arg::Many(tensors), _) => tensors.iter().map(|tensor| operand(tensor)).collect(),
            (Arg::Blob(_), ty) => ty.iter().map(|ty| Operand { ty, literal: None }).collect(),
        };
        operands.insert(*parameter, bound);
    }
    infer(operator, &operands).map_err(|problem| mil(operator, problem))
}

fn operand(tensor: &Tensor) -> Operand<'_> {
    Operand {
        ty: &tensor.ty,
        literal: tensor.literal.as_ref(),
    }
}

fn argument(arg: &Arg) -> proto::Argument {
    let by_name = |tensor: &Tensor| proto::Binding {
        kind: Some(BindingKind::Name(tensor.name.clone())),
    };
    let arguments = match arg {
        Arg::One(tensor) => vec![by_name(tensor)],
        Arg::Many(tensors) => tensors.iter().map(|tensor| by_name(tensor)).collect(),
        Arg::Blob(blob) => vec![proto::Binding {
            kind: Some(BindingKind::Value(blob.to_proto())),
        }],
    };
    proto::Argument { arguments }
}

fn named_type(name: &str, ty: &Type) -> proto::NamedValueType {
    proto::NamedValueType {
        name: name.into(),
        r#type: Some(ty.to_proto()),
    }
}

fn name_value(name: &str) -> proto::Value {
    Literal::Str(name.into()).to_proto(&TensorType::new(DType::String, &[]))
}

fn mil(operation: &str, problem: String) -> Error {
    Error::Operation {
        operation: operation.into(),
        problem,
    }
}

/// Whether Core ML takes a name: `[A-Za-z_][A-Za-z0-9_@]*`.
pub fn is_identifier(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'@')
}
