//! One `.mlpackage`: manifest, model specification and weight file.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use coreml_mil::{
    BuiltFunction, Dim, MAIN, SPECIFICATION_VERSION, TensorType, Type,
    proto::{self, FeatureKind},
};
use planish_tensors::ModelWeights;
use prost::Message;
use serde::Serialize;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::{
    Error, Result,
    weights::{LayerError, WeightPlan, stream},
};

const SPEC_FILE: &str = "com.apple.CoreML/model.mlmodel";
const WEIGHT_FOLDER: &str = "com.apple.CoreML/weights";

/// A package that is ready to be written: everything but the weights' values.
pub(crate) struct PlannedPackage {
    /// File name, with `.mlpackage`.
    pub(crate) file_name: String,
    /// Functions by name, in the order of the description; one called [`MAIN`] stands alone.
    pub(crate) functions: Vec<(String, BuiltFunction)>,
    pub(crate) plan: WeightPlan,
    /// Shapes that an input with unknown dimensions may take; the first is the default.
    pub(crate) enumerated: Vec<Vec<usize>>,
    pub(crate) description: String,
    pub(crate) user_defined: BTreeMap<String, String>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PackageReport {
    /// File name of the package.
    pub file_name: String,
    /// Names of its functions.
    pub functions: Vec<String>,
    /// Operations of all functions, constants included.
    pub operations: usize,
    /// Bytes of the specification.
    pub specification_bytes: u64,
    /// Bytes of the weight file.
    pub weight_bytes: u64,
}

impl PlannedPackage {
    /// Bytes that the package will take.
    pub(crate) fn byte_len(&self) -> u64 {
        self.specification().encoded_len() as u64 + self.plan.file_len() + 1024
    }

    /// Writes the package as `folder`, which must not exist.
    pub(crate) fn write(
        &self,
        folder: &Path,
        source: &ModelWeights,
        importance: &BTreeMap<String, Vec<f32>>,
    ) -> Result<(PackageReport, Vec<LayerError>)> {
        let data = folder.join("Data");
        let weights = data.join(WEIGHT_FOLDER);
        fs::create_dir_all(&weights).map_err(Error::io(&weights))?;
        let (errors, hash) = stream(&self.plan, source, importance, &weights.join("weight.bin"))?;
        let specification = self.specification().encode_to_vec();
        write_file(data.join(SPEC_FILE), &specification)?;
        write_file(folder.join("Manifest.json"), manifest(&specification, hash).as_bytes())?;
        let report = PackageReport {
            file_name: self.file_name.clone(),
            functions: self.functions.iter().map(|(name, _)| name.clone()).collect(),
            operations: self.functions.iter().map(|(_, f)| operation_count(f)).sum(),
            specification_bytes: specification.len() as u64,
            weight_bytes: self.plan.file_len(),
        };
        Ok((report, errors))
    }

    fn specification(&self) -> proto::Model {
        let functions = self
            .functions
            .iter()
            .map(|(name, f)| (name.clone(), f.message.clone()))
            .collect();
        proto::Model {
            specification_version: SPECIFICATION_VERSION,
            description: Some(self.model_description()),
            ml_program: Some(proto::Program {
                version: 1,
                functions,
                ..Default::default()
            }),
        }
    }

    fn model_description(&self) -> proto::ModelDescription {
        let metadata = Some(proto::Metadata {
            short_description: self.description.clone(),
            version_string: env!("CARGO_PKG_VERSION").into(),
            author: "planish".into(),
            license: String::new(),
            user_defined: self.user_defined.clone(),
        });
        let described = self
            .functions
            .iter()
            .map(|(name, function)| self.function_description(name, function));
        let mut described: Vec<proto::FunctionDescription> = described.collect();
        if described.len() == 1 && described[0].name == MAIN {
            let only = described.remove(0);
            let (input, output, state) = (only.input, only.output, only.state);
            return proto::ModelDescription {
                input,
                output,
                state,
                metadata,
                ..Default::default()
            };
        }
        let default_function_name = described.first().map(|f| f.name.clone()).unwrap_or_default();
        proto::ModelDescription {
            functions: described,
            default_function_name,
            metadata,
            ..Default::default()
        }
    }

    fn function_description(&self, name: &str, function: &BuiltFunction) -> proto::FunctionDescription {
        let mut out = proto::FunctionDescription {
            name: name.into(),
            ..Default::default()
        };
        for (name, ty) in &function.inputs {
            match ty {
                Type::Tensor(ty) => out.input.push(feature(name, FeatureKind::MultiArray(self.array(ty)))),
                Type::State(ty) => {
                    let state = proto::StateFeatureType {
                        array_type: Some(self.array(ty)),
                    };
                    out.state.push(feature(name, FeatureKind::State(state)));
                }
            }
        }
        let outputs = function.outputs.iter();
        out.output = outputs
            .map(|(name, ty)| feature(name, FeatureKind::MultiArray(output_array(ty))))
            .collect();
        out
    }

    /// An input: its shape, or the enumerated shapes where a dimension is open.
    fn array(&self, ty: &TensorType) -> proto::ArrayFeatureType {
        let data_type = ty.dtype.array_type().map_or(0, |t| t as i32);
        let sizes = |shape: &[usize]| shape.iter().map(|&d| d as i64).collect::<Vec<_>>();
        if let Some(shape) = ty.shape() {
            return proto::ArrayFeatureType {
                shape: sizes(&shape),
                data_type,
                enumerated_shapes: None,
            };
        }
        let shapes = self
            .enumerated
            .iter()
            .map(|shape| proto::ArrayShape { shape: sizes(shape) })
            .collect();
        let shape = self.enumerated.first().map(|s| sizes(s)).unwrap_or_default();
        proto::ArrayFeatureType {
            shape,
            data_type,
            enumerated_shapes: Some(proto::EnumeratedShapes { shapes }),
        }
    }
}

/// An output whose shape depends on the call is described without a shape.
fn output_array(ty: &TensorType) -> proto::ArrayFeatureType {
    let open = ty.dims.contains(&Dim::Unknown);
    let shape = if open {
        Vec::new()
    } else {
        ty.shape().unwrap_or_default()
    };
    proto::ArrayFeatureType {
        shape: shape.into_iter().map(|d| d as i64).collect(),
        data_type: ty.dtype.array_type().map_or(0, |t| t as i32),
        enumerated_shapes: None,
    }
}

fn feature(name: &str, kind: FeatureKind) -> proto::FeatureDescription {
    let r#type = Some(proto::FeatureType {
        kind: Some(kind),
        is_optional: false,
    });
    proto::FeatureDescription {
        name: name.into(),
        short_description: String::new(),
        r#type,
    }
}

fn operation_count(function: &BuiltFunction) -> usize {
    function
        .message
        .block_specializations
        .values()
        .map(|block| block.operations.len())
        .sum()
}

/// The keys are any unique strings; taken from the content they are the same for the same model.
fn manifest(specification: &[u8], weights_hash: u64) -> String {
    let key = |salt: u64| uuid(xxh3_128_with_seed(specification, weights_hash ^ salt));
    let (model, weights) = (key(1), key(2));
    let item = |description: &str, name: &str, path: &str| json!({ "author": "com.apple.CoreML", "description": description, "name": name, "path": path });
    let mut items = BTreeMap::new();
    items.insert(&model, item("CoreML Model Specification", "model.mlmodel", SPEC_FILE));
    items.insert(&weights, item("CoreML Model Weights", "weights", WEIGHT_FOLDER));
    let manifest = json!({
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": model,
    });
    format!("{manifest:#}\n")
}

fn uuid(bits: u128) -> String {
    let hex = format!("{bits:032X}");
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

fn write_file(path: PathBuf, bytes: &[u8]) -> Result<()> {
    fs::write(&path, bytes).map_err(Error::io(&path))
}
