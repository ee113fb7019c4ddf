//! Opens a package: every structural rule is checked here, so that running it can only disagree in numbers.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use half::f16;
use prost::Message;

use super::{
    exec::unpack_weight,
    value::{HalfTensor, Value},
};
use crate::{
    BlobReader, DType, Dim, Error, Literal, MAIN, Operand, Operands, Result, SPECIFICATION_VERSION, TensorType, Type,
    builder::{OPSET, WEIGHT_FILE},
    infer, is_identifier,
    proto::{self, BindingKind, FeatureKind, ValueKind},
    unpack_bits,
};

/// A package that has passed all structural checks, with its weights in memory.
pub struct Package {
    pub(crate) functions: BTreeMap<String, Function>,
}

/// A function as a list of steps over numbered values.
pub(crate) struct Function {
    pub(crate) inputs: Vec<(String, Type, usize)>,
    pub(crate) outputs: Vec<(String, usize)>,
    pub(crate) steps: Vec<Step>,
    /// Values that exist before the first step: constants.
    pub(crate) constants: Vec<(usize, Value)>,
    pub(crate) value_count: usize,
}

/// One operation.
pub(crate) struct Step {
    pub(crate) operator: String,
    pub(crate) args: BTreeMap<String, Vec<usize>>,
    /// Number and declared type of the result, where there is one.
    pub(crate) result: Option<(String, usize, TensorType)>,
    /// Values that no later step reads.
    pub(crate) last_used: Vec<usize>,
    /// This `read_state` feeds only a `slice_update` that is written back next: the state may be moved, not copied.
    pub(crate) takes_state: bool,
}

impl Package {
    /// Opens a `.mlpackage` folder.
    ///
    /// Checked: manifest; specification version and opset; description against program in names, shapes and types;
    /// identifiers; order and uniqueness of definitions; parameters of every operator; inferred against declared types;
    /// state types; every blob's place, sentinel, type, size and padding, and the end of the weight file.
    ///
    /// # Errors
    /// [`Error::BadPackage`] with the rule that is broken; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let root = spec_path(path)?;
        let bytes = fs::read(&root).map_err(Error::io(&root))?;
        let bad = |problem: String| Error::bad_package(&root, problem);
        let model = proto::Model::decode(bytes.as_slice()).map_err(|e| bad(e.to_string()))?;
        let program = model.ml_program.ok_or_else(|| bad("not an ML Program".into()))?;
        let description = model.description.ok_or_else(|| bad("no description".into()))?;
        if model.specification_version != SPECIFICATION_VERSION {
            let found = model.specification_version;
            return Err(bad(format!(
                "specification version {found}, expected {SPECIFICATION_VERSION}"
            )));
        }
        if program.version != 1 {
            return Err(bad(format!("program version {}, expected 1", program.version)));
        }
        let mut weights = Weights::open(root.parent().unwrap_or(path))?;
        let described = described_functions(description).map_err(bad)?;
        let names = |m: &mut dyn Iterator<Item = &String>| m.cloned().collect::<BTreeSet<_>>();
        if names(&mut described.1.keys()) != names(&mut program.functions.keys()) {
            return Err(bad("the described functions are not the program's".into()));
        }
        let mut functions = BTreeMap::new();
        for (name, message) in &program.functions {
            let in_function = |problem: String| bad(format!("function {name}: {problem}"));
            check_description(message, &described.1[name]).map_err(in_function)?;
            let loaded = Loader::new(&mut weights).load(message);
            functions.insert(name.clone(), loaded.map_err(in_function)?);
        }
        weights.check_end()?;
        if !functions.contains_key(&described.0) {
            return Err(bad(format!("the default function {:?} is absent", described.0)));
        }
        Ok(Self { functions })
    }

    /// Names of the functions.
    pub(crate) fn function_names(&self) -> impl Iterator<Item = &str> {
        self.functions.keys().map(String::as_str)
    }

    /// Type of an input or state of a function.
    pub fn input_type(&self, function: &str, input: &str) -> Option<&TensorType> {
        self.functions
            .get(function)?
            .inputs
            .iter()
            .find(|(name, ..)| name == input)
            .map(|(_, ty, _)| ty.tensor())
    }
}

/// The path of the specification, through a manifest that must be right.
fn spec_path(package: &Path) -> Result<PathBuf> {
    let path = package.join("Manifest.json");
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let bad = |problem: &str| Error::bad_package(&path, problem);
    let manifest: serde_json::Value = serde_json::from_str(&text).map_err(|e| bad(&e.to_string()))?;
    if manifest["fileFormatVersion"] != "1.0.0" {
        return Err(bad("fileFormatVersion is not 1.0.0"));
    }
    let root = manifest["rootModelIdentifier"]
        .as_str()
        .ok_or_else(|| bad("no rootModelIdentifier"))?;
    let items = manifest["itemInfoEntries"]
        .as_object()
        .ok_or_else(|| bad("no itemInfoEntries"))?;
    for item in items.values() {
        if ["author", "description", "name", "path"]
            .iter()
            .any(|key| !item[*key].is_string())
        {
            return Err(bad("an item lacks author, description, name or path"));
        }
        let target = package.join("Data").join(item["path"].as_str().unwrap_or_default());
        if !target.exists() {
            return Err(bad(&format!("{} is absent", target.display())));
        }
    }
    let root = items
        .get(root)
        .and_then(|item| item["path"].as_str())
        .ok_or_else(|| bad("the root item is absent"))?;
    Ok(package.join("Data").join(root))
}

type Described = BTreeMap<String, proto::FunctionDescription>;

/// The default function and the description of each function.
fn described_functions(description: proto::ModelDescription) -> Result<(String, Described), String> {
    let top_level = !(description.input.is_empty() && description.output.is_empty() && description.state.is_empty());
    if description.functions.is_empty() {
        let only = proto::FunctionDescription {
            name: MAIN.into(),
            input: description.input,
            output: description.output,
            state: description.state,
        };
        return Ok((MAIN.into(), BTreeMap::from([(MAIN.into(), only)])));
    }
    if top_level {
        return Err("the description has both functions and features of its own".into());
    }
    let count = description.functions.len();
    let by_name: Described = description.functions.into_iter().map(|f| (f.name.clone(), f)).collect();
    if by_name.len() != count {
        return Err("a function is described twice".into());
    }
    Ok((description.default_function_name, by_name))
}

/// Names, order of outputs, types and shapes of the description against the program.
fn check_description(function: &proto::Function, described: &proto::FunctionDescription) -> Result<(), String> {
    let mut inputs: BTreeMap<&str, &proto::FeatureDescription> = BTreeMap::new();
    for feature in described.input.iter().chain(&described.state) {
        if inputs.insert(&feature.name, feature).is_some() {
            return Err(format!("{} is described twice", feature.name));
        }
    }
    if inputs.len() != function.inputs.len() {
        return Err(format!(
            "{} inputs described, the function has {}",
            inputs.len(),
            function.inputs.len()
        ));
    }
    for input in &function.inputs {
        let ty = Type::from_proto(input.r#type.as_ref().unwrap_or(&proto::ValueType::default()))?;
        let feature = inputs
            .get(input.name.as_str())
            .ok_or_else(|| format!("input {} is not described", input.name))?;
        check_feature(feature, &ty)?;
    }
    let block = only_block(function)?;
    let names: Vec<&String> = described.output.iter().map(|f| &f.name).collect();
    if names != block.outputs.iter().collect::<Vec<_>>() {
        return Err(format!("outputs {:?}, described are {names:?}", block.outputs));
    }
    for feature in &described.output {
        let made = block
            .operations
            .iter()
            .flat_map(|op| &op.outputs)
            .find(|o| o.name == feature.name);
        let made = made.ok_or_else(|| format!("no operation makes the output {}", feature.name))?;
        check_feature(
            feature,
            &Type::from_proto(made.r#type.as_ref().unwrap_or(&proto::ValueType::default()))?,
        )?;
    }
    Ok(())
}

fn check_feature(feature: &proto::FeatureDescription, ty: &Type) -> Result<(), String> {
    let kind = feature.r#type.as_ref().and_then(|t| t.kind.as_ref());
    let array = match (kind, ty) {
        (Some(FeatureKind::MultiArray(array)), Type::Tensor(_)) => array,
        (Some(FeatureKind::State(state)), Type::State(inner)) => {
            if inner.dtype != DType::F16 {
                return Err(format!("state {} is {inner}; Core ML takes fp16 only", feature.name));
            }
            state
                .array_type
                .as_ref()
                .ok_or_else(|| format!("state {} has no type", feature.name))?
        }
        _ => return Err(format!("{} is described as another kind than {ty}", feature.name)),
    };
    let tensor = ty.tensor();
    let disagree = || {
        format!(
            "{} is described with shape {:?}, the program has {ty}",
            feature.name, array.shape
        )
    };
    if tensor.dtype.array_type().is_none_or(|t| t as i32 != array.data_type) {
        return Err(format!(
            "{} is described with data type {}, the program has {ty}",
            feature.name, array.data_type
        ));
    }
    let fits = |shape: &[i64]| {
        let dims = &tensor.dims;
        let one = |(s, d): (&i64, &Dim)| match d {
            Dim::Fixed(n) => *s == *n as i64,
            Dim::Unknown => *s > 0,
        };
        shape.len() == dims.len() && shape.iter().zip(dims).all(one)
    };
    match &array.enumerated_shapes {
        Some(list) => {
            let listed = list.shapes.iter().any(|s| s.shape == array.shape);
            if listed && list.shapes.iter().all(|s| fits(&s.shape)) {
                Ok(())
            } else {
                Err(disagree())
            }
        }
        // The shape of an output that follows an input's may be left away.
        None if array.shape.is_empty() && tensor.shape().is_none() => Ok(()),
        None if tensor.shape().is_some() && fits(&array.shape) => Ok(()),
        None => Err(disagree()),
    }
}

fn only_block(function: &proto::Function) -> Result<&proto::Block, String> {
    if function.opset != OPSET {
        return Err(format!("opset {:?}, expected {OPSET}", function.opset));
    }
    match function.block_specializations.get(OPSET) {
        Some(block) if function.block_specializations.len() == 1 => Ok(block),
        _ => Err(format!("expected one block, for {OPSET}")),
    }
}

/// What is known of a value while a function is read.
struct Known {
    index: usize,
    ty: Type,
    literal: Option<Literal>,
}

struct Loader<'a> {
    weights: &'a mut Weights,
    known: HashMap<String, Known>,
    operation_names: BTreeSet<String>,
    constants: Vec<(usize, Value)>,
    count: usize,
}

impl<'a> Loader<'a> {
    fn new(weights: &'a mut Weights) -> Self {
        Self {
            weights,
            known: HashMap::new(),
            operation_names: BTreeSet::new(),
            constants: Vec::new(),
            count: 0,
        }
    }

    fn load(mut self, message: &proto::Function) -> Result<Function, String> {
        let mut inputs = Vec::new();
        for input in &message.inputs {
            let ty = Type::from_proto(input.r#type.as_ref().ok_or("an input without a type")?)?;
            let index = self.define(&input.name, ty.clone(), None)?;
            inputs.push((input.name.clone(), ty, index));
        }
        let block = only_block(message)?;
        let mut steps = Vec::new();
        for operation in &block.operations {
            let step = self.operation(operation).map_err(|problem| {
                let name = operation.outputs.first().map_or("", |o| o.name.as_str());
                format!("operation {} {name}: {problem}", operation.r#type)
            })?;
            steps.extend(step);
        }
        let mut outputs = Vec::new();
        for name in &block.outputs {
            let known = self
                .known
                .get(name)
                .ok_or_else(|| format!("output {name} is undefined"))?;
            outputs.push((name.clone(), known.index));
        }
        mark_last_uses(&mut steps, &inputs, &outputs, &self.constants);
        mark_moved_states(&mut steps);
        Ok(Function {
            inputs,
            outputs,
            steps,
            constants: self.constants,
            value_count: self.count,
        })
    }

    fn define(&mut self, name: &str, ty: Type, literal: Option<Literal>) -> Result<usize, String> {
        if !is_identifier(name) {
            return Err(format!("the name {name:?} is no identifier"));
        }
        let index = self.count;
        if self.known.insert(name.into(), Known { index, ty, literal }).is_some() {
            return Err(format!("the name {name} is defined twice"));
        }
        self.count += 1;
        Ok(index)
    }

    fn operation(&mut self, operation: &proto::Operation) -> Result<Option<Step>, String> {
        if !operation.blocks.is_empty() {
            return Err("nested blocks are not supported".into());
        }
        match literal_of(operation.attributes.get("name"))? {
            Some(Literal::Str(name)) if self.operation_names.insert(name.clone()) => {}
            _ => return Err("it has no name of its own".into()),
        }
        if operation.r#type == "const" {
            return self.constant(operation).map(|()| None);
        }
        if operation.attributes.len() != 1 {
            return Err("it has attributes beside its name".into());
        }
        let args = self.arguments(operation)?;
        let result = self.check_types(operation, &args)?;
        if operation.r#type.starts_with("constexpr_") {
            return self.compressed_weight(operation, &args, result).map(|()| None);
        }
        let args: BTreeMap<String, Vec<usize>> = args
            .into_iter()
            .map(|(name, bound)| (name, bound.iter().map(|b| b.index).collect()))
            .collect();
        let result = self.define_result(operation, result)?;
        let operator = operation.r#type.clone();
        Ok(Some(Step {
            operator,
            args,
            result,
            last_used: Vec::new(),
            takes_state: false,
        }))
    }

    fn define_result(
        &mut self,
        operation: &proto::Operation,
        inferred: Option<TensorType>,
    ) -> Result<Option<(String, usize, TensorType)>, String> {
        match (inferred, operation.outputs.as_slice()) {
            (None, []) => Ok(None),
            (Some(inferred), [output]) => {
                let declared = Type::from_proto(output.r#type.as_ref().ok_or("a result without a type")?)?;
                if declared != Type::Tensor(inferred.clone()) {
                    return Err(format!("it is declared {declared}, its operands give {inferred}"));
                }
                let index = self.define(&output.name, declared, None)?;
                Ok(Some((output.name.clone(), index, inferred)))
            }
            (_, outputs) => Err(format!("{} results", outputs.len())),
        }
    }

    /// Unpacks a weight at once: all its operands are constants.
    fn compressed_weight(
        &mut self,
        operation: &proto::Operation,
        args: &BTreeMap<String, Vec<Known>>,
        inferred: Option<TensorType>,
    ) -> Result<(), String> {
        let value_of = |name: &str| -> Option<&Value> {
            let index = args.get(name)?.first()?.index;
            self.constants
                .iter()
                .rev()
                .find(|(i, _)| *i == index)
                .map(|(_, value)| value)
        };
        let (data, side) = if args.contains_key("lut") {
            ("indices", "lut")
        } else {
            ("data", "scale")
        };
        let (data, side) = (
            value_of(data).ok_or("no constant data")?,
            value_of(side).ok_or("no constant side data")?,
        );
        let key = (address(data), address(side));
        let value = match self.weights.unpacked.get(&key) {
            Some(known) => known.clone(),
            None => unpack_weight(data, side, value_of("offset"))?,
        };
        self.weights.unpacked.insert(key, value.clone());
        let packed: BTreeSet<usize> = args.values().flatten().map(|known| known.index).collect();
        self.constants.retain(|(index, _)| !packed.contains(index));
        let (_, index, _) = self.define_result(operation, inferred)?.ok_or("it has no result")?;
        self.constants.push((index, value));
        Ok(())
    }

    fn constant(&mut self, operation: &proto::Operation) -> Result<(), String> {
        let ([output], true) = (operation.outputs.as_slice(), operation.inputs.is_empty()) else {
            return Err("a constant has one result and no inputs".into());
        };
        let value = operation.attributes.get("val").ok_or("it has no value")?;
        let bound = self.bind_value(value)?;
        let declared = Type::from_proto(output.r#type.as_ref().ok_or("a result without a type")?)?;
        if declared != bound.ty {
            return Err(format!("it is declared {declared}, its value is {}", bound.ty));
        }
        // The value has a number already; the name is another way to reach it.
        if !is_identifier(&output.name) {
            return Err(format!("the name {:?} is no identifier", output.name));
        }
        let known = Known {
            index: bound.index,
            ty: bound.ty,
            literal: bound.literal,
        };
        if self.known.insert(output.name.clone(), known).is_some() {
            return Err(format!("the name {} is defined twice", output.name));
        }
        Ok(())
    }

    fn arguments(&mut self, operation: &proto::Operation) -> Result<BTreeMap<String, Vec<Known>>, String> {
        let mut out = BTreeMap::new();
        for (parameter, argument) in &operation.inputs {
            let mut bound = Vec::new();
            for binding in &argument.arguments {
                bound.push(match &binding.kind {
                    Some(BindingKind::Name(name)) => {
                        let known = self
                            .known
                            .get(name)
                            .ok_or_else(|| format!("it reads {name} before it is defined"))?;
                        Known {
                            index: known.index,
                            ty: known.ty.clone(),
                            literal: known.literal.clone(),
                        }
                    }
                    Some(BindingKind::Value(value)) => self.bind_value(value)?,
                    None => return Err(format!("parameter {parameter} is bound to nothing")),
                });
            }
            out.insert(parameter.clone(), bound);
        }
        Ok(out)
    }

    fn check_types(
        &self,
        operation: &proto::Operation,
        args: &BTreeMap<String, Vec<Known>>,
    ) -> Result<Option<TensorType>, String> {
        let operands: Operands = args
            .iter()
            .map(|(name, bound)| {
                let operands = bound.iter().map(|known| Operand {
                    ty: &known.ty,
                    literal: known.literal.as_ref(),
                });
                (name.as_str(), operands.collect())
            })
            .collect();
        infer(&operation.r#type, &operands)
    }

    fn bind_value(&mut self, value: &proto::Value) -> Result<Known, String> {
        let ty = match Type::from_proto(value.r#type.as_ref().ok_or("a value without a type")?)? {
            Type::Tensor(ty) => ty,
            Type::State(_) => return Err("a constant state".into()),
        };
        let shape = ty.shape().ok_or("a constant of unknown shape")?;
        let (runtime, literal) = match &value.kind {
            Some(ValueKind::Immediate(_)) => {
                let literal = literal_of(Some(value))?.ok_or_else(|| format!("an immediate value of type {ty}"))?;
                (runtime_value(&literal, &shape)?, Some(literal))
            }
            Some(ValueKind::BlobFile(blob)) => (self.weights.value(blob, &ty)?, None),
            None => return Err("a value without content".into()),
        };
        let index = self.count;
        self.count += 1;
        self.constants.push((index, runtime));
        Ok(Known {
            index,
            ty: Type::Tensor(ty),
            literal,
        })
    }
}

/// Identifies a blob's value, which functions share.
fn address(value: &Value) -> usize {
    match value {
        Value::Half(a) => Arc::as_ptr(a) as usize,
        Value::Int(a) => Arc::as_ptr(a) as usize,
        Value::Float(a) => Arc::as_ptr(a) as usize,
        Value::Bool(a) => Arc::as_ptr(a) as usize,
        Value::Text(_) | Value::State(_) => 0,
    }
}

fn literal_of(value: Option<&proto::Value>) -> Result<Option<Literal>, String> {
    let Some(value) = value else { return Ok(None) };
    let (Some(ty), Some(ValueKind::Immediate(immediate))) = (&value.r#type, &value.kind) else {
        return Ok(None);
    };
    let Type::Tensor(ty) = Type::from_proto(ty)? else {
        return Ok(None);
    };
    match &immediate.tensor {
        Some(tensor) => Literal::from_proto(tensor, &ty),
        None => Ok(None),
    }
}

fn runtime_value(literal: &Literal, shape: &[usize]) -> Result<Value, String> {
    let value = match literal {
        Literal::Str(text) => Some(Value::Text(text.clone())),
        Literal::I32(values) => Value::ints(shape, values.clone()),
        Literal::F16(_) | Literal::F32(_) => literal.floats().and_then(|v| Value::floats(shape, v)),
        Literal::Bool(values) => ndarray::ArrayD::from_shape_vec(ndarray::IxDyn(shape), values.clone())
            .ok()
            .map(|a| Value::Bool(Arc::new(a))),
    };
    value.ok_or_else(|| format!("{} elements for shape {shape:?}", literal.len()))
}

/// Notes at each step which values nobody reads afterwards. Inputs, outputs and constants stay.
fn mark_last_uses(
    steps: &mut [Step],
    inputs: &[(String, Type, usize)],
    outputs: &[(String, usize)],
    constants: &[(usize, Value)],
) {
    let mut keep: BTreeSet<usize> = inputs.iter().map(|(.., i)| *i).collect();
    keep.extend(outputs.iter().map(|(_, i)| *i));
    keep.extend(constants.iter().map(|(i, _)| *i));
    for step in steps.iter_mut().rev() {
        let read = step.args.values().flatten().copied().collect::<BTreeSet<_>>();
        step.last_used = read.into_iter().filter(|i| keep.insert(*i)).collect();
    }
}

/// Marks `read_state` steps whose value is only updated and written back before the state is touched again, so that the
/// interpreter may move the state instead of copying it. The result is the same either way.
fn mark_moved_states(steps: &mut [Step]) {
    let uses = |steps: &[Step], value: usize| {
        steps
            .iter()
            .flat_map(|s| s.args.values().flatten())
            .filter(|i| **i == value)
            .count()
    };
    let moved: Vec<bool> = (0..steps.len())
        .map(|at| {
            if steps[at].operator != "read_state" || at + 2 >= steps.len() {
                return false;
            }
            let (update, write) = (&steps[at + 1], &steps[at + 2]);
            let result = |step: &Step| step.result.as_ref().map(|(_, i, _)| *i);
            let (Some(read), Some(updated)) = (result(&steps[at]), result(update)) else {
                return false;
            };
            update.operator == "slice_update"
                && update.args.get("x").is_some_and(|x| *x == [read])
                && write.operator == "write_state"
                && write.args.get("data").is_some_and(|d| *d == [updated])
                && write.args.get("input") == steps[at].args.get("input")
                && uses(steps, read) == 1
                && uses(steps, updated) == 1
        })
        .collect();
    for (step, moved) in steps.iter_mut().zip(moved) {
        step.takes_state = moved;
    }
}

/// The weight file; each blob is read once, whoever refers to it.
struct Weights {
    folder: PathBuf,
    reader: Option<BlobReader>,
    values: HashMap<(u64, TensorType), Value>,
    /// Compressed weights in their plain form, by the addresses of their parts.
    unpacked: HashMap<(usize, usize), Value>,
    used: BTreeSet<u64>,
}

impl Weights {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("weights/weight.bin");
        let reader = if path.exists() {
            Some(BlobReader::open(&path)?)
        } else {
            None
        };
        Ok(Self {
            folder: folder.to_owned(),
            reader,
            values: HashMap::new(),
            unpacked: HashMap::new(),
            used: BTreeSet::new(),
        })
    }

    fn value(&mut self, blob: &proto::BlobFileValue, ty: &TensorType) -> Result<Value, String> {
        if blob.file_name != WEIGHT_FILE {
            return Err(format!("weights in {:?}, expected {WEIGHT_FILE}", blob.file_name));
        }
        let key = (blob.offset, ty.clone());
        if let Some(value) = self.values.get(&key) {
            return Ok(value.clone());
        }
        let reader = self
            .reader
            .as_mut()
            .ok_or_else(|| format!("{}: no weight file", self.folder.display()))?;
        let (shape, count) = (
            ty.shape().unwrap_or_default(),
            ty.count().ok_or("a blob of unknown shape")?,
        );
        let raw = reader.read(blob.offset, ty.dtype, count).map_err(|e| e.to_string())?;
        let value = decode(&raw, ty.dtype, &shape, count)?;
        self.used.insert(blob.offset);
        self.values.insert(key, value.clone());
        Ok(value)
    }

    /// The chain of blobs must reach the end of the file, through every blob that the program uses.
    fn check_end(&mut self) -> Result<()> {
        let Some(reader) = &mut self.reader else { return Ok(()) };
        let chain: BTreeSet<u64> = reader.offsets()?.into_iter().collect();
        match self.used.iter().find(|offset| !chain.contains(offset)) {
            Some(offset) => Err(Error::bad_package(
                &self.folder,
                format!("the program reads a blob at {offset} inside another"),
            )),
            None => Ok(()),
        }
    }
}

fn decode(raw: &[u8], dtype: DType, shape: &[usize], count: usize) -> Result<Value, String> {
    let halves = || raw.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]));
    let value = match dtype {
        DType::F16 => Some(Value::Half(Arc::new(HalfTensor {
            shape: shape.into(),
            data: halves().collect(),
        }))),
        DType::F32 => {
            let values = raw
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            Value::floats(shape, values)
        }
        DType::I32 => {
            let values = raw
                .chunks_exact(4)
                .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            Value::ints(shape, values)
        }
        DType::I8 => Value::ints(shape, raw.iter().map(|b| i32::from(*b as i8)).collect()),
        DType::I4 => {
            let signed = |v: u8| i32::from((v << 4) as i8 >> 4);
            Value::ints(shape, unpack_bits(raw, 4, count).into_iter().map(signed).collect())
        }
        DType::U8 | DType::U6 | DType::U4 | DType::U3 | DType::U2 | DType::U1 => Value::ints(
            shape,
            unpack_bits(raw, dtype.bits(), count)
                .into_iter()
                .map(i32::from)
                .collect(),
        ),
        _ => None,
    };
    value.ok_or_else(|| format!("a blob of type {dtype}"))
}
