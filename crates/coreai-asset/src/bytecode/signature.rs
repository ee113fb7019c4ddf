//! Properties of operations: between the program's own terms and the dialect's attributes.

use super::attribute::{AnyType, Attribute};
use super::number::Outcome;
use crate::{
    Type,
    program::{Composite, Graph, OpCode, Parameter, Payload, Port},
};

/// Key under which an input or output has its name.
const NAME: &str = "aicode.name";
/// Marks an input as a state that the program changes.
const MUTATION: &str = "MutableBuffers.buffer_mutation";

/// Properties of a graph in the file's order; `None` is an absent optional one.
pub(super) fn graph_properties(graph: &Graph) -> Vec<Slot> {
    let types = |ports: &[Port]| ports.iter().map(|port| port.ty.clone()).collect();
    let function = AnyType::Function {
        inputs: types(&graph.inputs),
        outputs: types(&graph.outputs),
    };
    let private = Attribute::flag(graph.is_private);
    vec![
        Slot::Required(Attribute::Array(graph.inputs.iter().map(port_attributes).collect())),
        Slot::Optional(graph.composite.as_ref().map(composite_attribute)),
        Slot::Required(Attribute::flag(false)), // externalize
        Slot::Required(Attribute::Type(function)),
        Slot::Required(private.clone()),
        Slot::Required(Attribute::String(graph.name.clone())),
        Slot::Required(private), // noInline: a private graph here is a composite
        Slot::Required(Attribute::Array(Vec::new())), // paramDecls
        Slot::Required(Attribute::Array(graph.outputs.iter().map(port_attributes).collect())),
    ]
}

/// Which of a graph's properties are optional, in the file's order.
pub(super) const GRAPH_SLOTS: [bool; 9] = [false, true, false, false, false, false, false, false, false];

/// A property that must be there, or one that may be.
pub(super) enum Slot {
    Required(Attribute),
    Optional(Option<Attribute>),
}

fn port_attributes(port: &Port) -> Attribute {
    let named = |key: &str| Attribute::Named(key.into(), vec![Attribute::String(port.name.clone())]);
    let is_state = matches!(port.ty, Type::Handle(_));
    Attribute::Array(
        is_state
            .then_some(MUTATION)
            .into_iter()
            .chain([NAME])
            .map(named)
            .collect(),
    )
}

fn composite_attribute(composite: &Composite) -> Attribute {
    let names = |names: &[String]| Attribute::Array(names.iter().cloned().map(Attribute::String).collect());
    let parameters = composite
        .attributes
        .iter()
        .map(|(key, value)| Attribute::Named(key.clone(), vec![parameter_attribute(*value)]));
    let parts = [
        ("input_names", names(&composite.inputs)),
        ("op_attrs", Attribute::Dictionary(parameters.collect())),
        ("output_names", names(&composite.outputs)),
    ];
    let parts = parts.map(|(key, value)| Attribute::Named(key.into(), vec![value]));
    Attribute::Named(composite.name.clone(), parts.into())
}

fn parameter_attribute(value: Parameter) -> Attribute {
    match value {
        Parameter::Float(value) => Attribute::Float(value),
        Parameter::Int(value) => Attribute::Integer {
            width: 64,
            is_unsigned: false,
            value,
        },
        Parameter::Bool(value) => Attribute::Integer {
            width: 1,
            is_unsigned: false,
            value: value.into(),
        },
    }
}

/// A graph without its operations, from its properties.
pub(super) fn graph_of(properties: &[Option<Attribute>]) -> Outcome<Graph> {
    let at = |index: usize| properties.get(index).and_then(Option::as_ref);
    let named = |index: usize, what: &str| at(index).ok_or_else(|| format!("a graph without its {what}"));
    let name = named(5, "name")?.as_str().ok_or("a graph's name is not text")?;
    let Attribute::Type(AnyType::Function { inputs, outputs }) = named(3, "type")? else {
        return Err(format!("the type of graph {name} is not a function"));
    };
    Ok(Graph {
        name: name.into(),
        is_private: named(4, "visibility")?
            .as_flag()
            .ok_or("a graph's visibility is not a flag")?,
        inputs: ports(named(0, "inputs")?, inputs)?,
        outputs: ports(named(8, "outputs")?, outputs)?,
        composite: at(1).map(composite_of).transpose()?,
        block: Default::default(),
    })
}

fn ports(attribute: &Attribute, types: &[Type]) -> Outcome<Vec<Port>> {
    let items = attribute.as_array().unwrap_or_default();
    if items.len() != types.len() {
        return Err(format!("{} names for {} inputs or outputs", items.len(), types.len()));
    }
    let name_of = |item: &Attribute| {
        let named = item.as_array()?.iter().find_map(|entry| match entry {
            Attribute::Named(key, values) if key == NAME => values.first(),
            _ => None,
        });
        Some(named?.as_str()?.to_owned())
    };
    let port = |(item, ty): (&Attribute, &Type)| Port {
        name: name_of(item).unwrap_or_default(),
        ty: ty.clone(),
    };
    Ok(items.iter().zip(types).map(port).collect())
}

fn composite_of(attribute: &Attribute) -> Outcome<Composite> {
    let Attribute::Named(name, parts) = attribute else {
        return Err("a composite's declaration has no name".into());
    };
    let part = |key: &str| {
        parts.iter().find_map(|part| match part {
            Attribute::Named(found, values) if found == key => values.first()?.as_array(),
            _ => None,
        })
    };
    let names = |key: &str| {
        let items = part(key).unwrap_or_default().iter();
        items.filter_map(|item| item.as_str().map(str::to_owned)).collect()
    };
    let attributes = part("op_attrs")
        .unwrap_or_default()
        .iter()
        .filter_map(|entry| match entry {
            Attribute::Named(key, values) => Some((key.clone(), parameter_of(values.first()?)?)),
            _ => None,
        });
    Ok(Composite {
        name: name.clone(),
        inputs: names("input_names"),
        attributes: attributes.collect(),
        outputs: names("output_names"),
    })
}

fn parameter_of(attribute: &Attribute) -> Option<Parameter> {
    match attribute {
        Attribute::Float(value) => Some(Parameter::Float(*value)),
        Attribute::Integer { width: 1, value, .. } => Some(Parameter::Bool(*value != 0)),
        Attribute::Integer { value, .. } => Some(Parameter::Int(*value)),
        _ => None,
    }
}

/// Properties of an operation inside a graph; empty when it has none.
pub(super) fn operation_properties(payload: &Payload) -> Vec<Slot> {
    match payload {
        Payload::None => Vec::new(),
        Payload::Inline { data, splat } => vec![Slot::Required(Attribute::Dense {
            splat: *splat,
            data: data.clone(),
        })],
        Payload::Weight(index) => vec![Slot::Required(Attribute::Weight(*index))],
        Payload::Gelu { tanh } => vec![Slot::Required(Attribute::Gelu { tanh: *tanh })],
        Payload::Callee(name) => vec![
            Slot::Required(Attribute::Array(Vec::new())),
            Slot::Required(Attribute::Symbol(name.clone())),
            Slot::Required(Attribute::Array(Vec::new())),
        ],
    }
}

/// Number of properties that an operation has.
pub(super) fn property_count(code: OpCode) -> usize {
    match code {
        OpCode::Constant | OpCode::Gelu => 1,
        OpCode::Invoke => 3,
        _ => 0,
    }
}

/// The payload of an operation from its properties.
pub(super) fn payload_of(code: OpCode, properties: &[Option<Attribute>]) -> Outcome<Payload> {
    let at = |index: usize| properties.get(index).and_then(Option::as_ref);
    match (code, at(0), at(1)) {
        (OpCode::Constant, Some(Attribute::Dense { splat, data }), _) => Ok(Payload::Inline {
            data: data.clone(),
            splat: *splat,
        }),
        (OpCode::Constant, Some(Attribute::Weight(index)), _) => Ok(Payload::Weight(*index)),
        (OpCode::Gelu, Some(Attribute::Gelu { tanh }), _) => Ok(Payload::Gelu { tanh: *tanh }),
        (OpCode::Invoke, _, Some(Attribute::Symbol(name))) => Ok(Payload::Callee(name.clone())),
        (OpCode::Constant | OpCode::Gelu | OpCode::Invoke, ..) => {
            Err(format!("{} has no value of its kind", code.name()))
        }
        _ => Ok(Payload::None),
    }
}
