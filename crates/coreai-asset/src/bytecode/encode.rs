//! From a program to the bytes around its weights.

use std::collections::HashMap;

use super::{
    ALIGNMENT, ASSET, DIALECT, DIALECT_VERSION, FILLER, GRAPH, MAGIC, VERSION,
    attribute::{AnyType, Attribute, UNKNOWN_DIM, code, type_code},
    number::{put, put_all, put_signed},
    part, section,
    signature::{Slot, graph_properties, operation_properties},
};
use crate::{
    Type,
    program::{Block, Operation, Program},
};

/// Written into the file as its producer.
const PRODUCER: &str = "planish";
/// The system version that programs with these operations ask for, as Apple writes it.
const VERSION_NEEDED: i64 = 20_260_317;

/// A file in pieces: `head`, each weight after its own header, `tail`.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) head: Vec<u8>,
    /// Header and filler before the data of each weight.
    pub(crate) weight_heads: Vec<Vec<u8>>,
    pub(crate) tail: Vec<u8>,
}

/// Encodes a program. Equal programs give equal bytes.
pub(crate) fn encode(program: &Program) -> Encoded {
    let mut tables = Tables::default();
    tables.string(DIALECT);
    let ir = tables.asset(program);
    let (weight_heads, entries, weights_len) = tables.weights(program);

    let mut head = MAGIC.to_vec();
    put(&mut head, VERSION);
    head.extend(PRODUCER.bytes().chain([0]));
    put_section(&mut head, section::DIALECTS, &tables.dialects());
    put_section(&mut head, section::ATTRIBUTE_OFFSETS, &tables.attribute_offsets());
    put_section(&mut head, section::ATTRIBUTES, &tables.attributes_and_types());
    put_section(&mut head, section::IR, &ir);
    put_section(&mut head, section::RESOURCE_OFFSETS, &entries);
    head.push(section::RESOURCES | 0x80);
    put(&mut head, weights_len);
    put(&mut head, ALIGNMENT);
    pad(&mut head, 0);

    let mut tail = Vec::new();
    put_section(&mut tail, section::STRINGS, &tables.string_section());
    put_section(&mut tail, section::PROPERTIES, &tables.property_section());
    Encoded {
        head,
        weight_heads,
        tail,
    }
}

/// Everything that the file stores once and refers to by number.
#[derive(Default)]
struct Tables {
    strings: Numbered<String>,
    attributes: Numbered<Vec<u8>>,
    types: Numbered<Vec<u8>>,
    properties: Numbered<Vec<u8>>,
    operations: Numbered<&'static str>,
}

/// Distinct items in the order of their first use.
struct Numbered<T> {
    items: Vec<T>,
    numbers: HashMap<T, u64>,
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            numbers: HashMap::new(),
        }
    }
}

impl<T: Clone + Eq + std::hash::Hash> Numbered<T> {
    fn number(&mut self, item: T) -> u64 {
        if let Some(number) = self.numbers.get(&item) {
            return *number;
        }
        let number = self.items.len() as u64;
        self.items.push(item.clone());
        self.numbers.insert(item, number);
        number
    }
}

impl Tables {
    fn string(&mut self, text: &str) -> u64 {
        self.strings.number(text.to_owned())
    }

    fn operation(&mut self, name: &'static str) -> u64 {
        self.string(name);
        self.operations.number(name)
    }

    fn asset(&mut self, program: &Program) -> Vec<u8> {
        let mut graphs = Vec::new();
        for graph in &program.graphs {
            let body = self.block(&graph.block);
            let properties = self.properties(&graph_properties(graph));
            graphs.push(self.one_operation(GRAPH, properties, &[], &[], Some(&body)));
        }
        let body = region(0, &[], &graphs);
        let needed = Attribute::Integer {
            width: 32,
            is_unsigned: true,
            value: VERSION_NEEDED,
        };
        let properties = self.properties(&[Slot::Optional(None), Slot::Optional(Some(needed))]);
        let asset = self.one_operation(ASSET, properties, &[], &[], Some(&body));
        let mut out = Vec::new();
        put(&mut out, 1 << 1); // one operation, no arguments
        out.extend(asset);
        out
    }

    fn block(&mut self, block: &Block) -> Vec<u8> {
        let location = self.attribute(&Attribute::Location);
        let mut arguments = Vec::new();
        for ty in &block.types[..block.arguments] {
            put(&mut arguments, self.ty(&AnyType::Value(ty.clone())) << 1 | 1);
            put(&mut arguments, location);
        }
        let mut head = Vec::new();
        if block.arguments > 0 {
            put(&mut head, block.arguments as u64);
            head.extend(arguments);
            head.push(0); // no use lists
        }
        let mut next = block.arguments;
        let mut operations = Vec::new();
        for operation in &block.operations {
            let results = &block.types[next..next + operation.results];
            next += operation.results;
            operations.push(self.inner_operation(operation, results));
        }
        region(block.types.len(), &head, &operations)
    }

    fn inner_operation(&mut self, operation: &Operation, results: &[Type]) -> Vec<u8> {
        let body = operation.region.as_ref().map(|region| self.block(region));
        let slots = operation_properties(&operation.payload);
        let properties = match slots.is_empty() {
            true => None,
            false => self.properties(&slots),
        };
        self.one_operation(
            operation.code.name(),
            properties,
            &operation.operands,
            results,
            body.as_deref(),
        )
    }

    fn one_operation(
        &mut self,
        name: &'static str,
        properties: Option<u64>,
        operands: &[u32],
        results: &[Type],
        body: Option<&[u8]>,
    ) -> Vec<u8> {
        let present = |bit: u8, is_there: bool| if is_there { bit } else { 0 };
        let mut out = Vec::new();
        put(&mut out, self.operation(name));
        out.push(
            present(part::RESULTS, !results.is_empty())
                | present(part::OPERANDS, !operands.is_empty())
                | present(part::REGIONS, body.is_some())
                | present(part::PROPERTIES, properties.is_some()),
        );
        let location = self.attribute(&Attribute::Location);
        put(&mut out, location);
        if let Some(properties) = properties {
            put(&mut out, properties);
        }
        if !results.is_empty() {
            let types: Vec<u64> = results.iter().map(|ty| self.ty(&AnyType::Value(ty.clone()))).collect();
            put_all(&mut out, &types);
        }
        if !operands.is_empty() {
            let operands: Vec<u64> = operands.iter().map(|value| u64::from(*value)).collect();
            put_all(&mut out, &operands);
        }
        if let Some(body) = body {
            put(&mut out, 1 << 1 | 1); // one region, isolated
            put_section(&mut out, section::IR, body);
        }
        out
    }

    /// Number of a list of properties.
    fn properties(&mut self, slots: &[Slot]) -> Option<u64> {
        let mut out = Vec::new();
        for slot in slots {
            match slot {
                Slot::Required(attribute) => put(&mut out, self.attribute(attribute)),
                Slot::Optional(Some(attribute)) => put(&mut out, self.attribute(attribute) << 1 | 1),
                Slot::Optional(None) => put(&mut out, 0),
            }
        }
        Some(self.properties.number(out))
    }

    fn attribute(&mut self, attribute: &Attribute) -> u64 {
        let mut out = Vec::new();
        match attribute {
            Attribute::String(text) => put_all_raw(&mut out, &[code::STRING, self.string(text)]),
            Attribute::Integer {
                width,
                is_unsigned,
                value,
            } => {
                put_all_raw(&mut out, &[code::INTEGER, *width]);
                out.push((*is_unsigned).into());
                if *width <= 8 {
                    out.push(*value as u8);
                } else {
                    put_signed(&mut out, *value);
                }
            }
            Attribute::Float(value) => {
                put_all_raw(&mut out, &[code::FLOAT, 32]);
                put_signed(&mut out, value.to_bits().into());
            }
            Attribute::Type(ty) => put_all_raw(&mut out, &[code::TYPE, self.ty(ty)]),
            Attribute::Array(items) => {
                put(&mut out, code::ARRAY);
                put_all(&mut out, &self.attributes(items));
            }
            Attribute::Dense { splat, data } => {
                put(&mut out, code::DENSE);
                out.push((*splat).into());
                put(&mut out, data.len() as u64);
                out.extend(data);
            }
            Attribute::Weight(index) => put_all_raw(&mut out, &[code::WEIGHT, *index as u64]),
            Attribute::Named(key, values) => {
                put_all_raw(&mut out, &[code::NAMED, self.string(key)]);
                put_all(&mut out, &self.attributes(values));
            }
            Attribute::Symbol(name) => {
                let mut symbol = Vec::new();
                put_all_raw(&mut symbol, &[code::SYMBOL, 1, self.string(name)]);
                let symbol = self.attributes.number(symbol);
                put_all_raw(&mut out, &[code::PARAMETER, symbol, self.ty(&AnyType::Symbol)]);
            }
            Attribute::Gelu { tanh } => put_all_raw(&mut out, &[code::GELU_FORM, (*tanh).into()]),
            Attribute::Dictionary(entries) => {
                put(&mut out, code::DICTIONARY);
                put_all(&mut out, &self.attributes(entries));
            }
            Attribute::Location => self.location(&mut out),
        }
        self.attributes.number(out)
    }

    fn attributes(&mut self, items: &[Attribute]) -> Vec<u64> {
        items.iter().map(|item| self.attribute(item)).collect()
    }

    fn location(&mut self, out: &mut Vec<u8>) {
        let (file, empty) = (self.string(PRODUCER), self.string(""));
        let mut nested = |numbers: &[u64]| {
            let mut bytes = Vec::new();
            put_all_raw(&mut bytes, numbers);
            self.attributes.number(bytes)
        };
        let file = nested(&[code::SOURCE_FILE, file, empty, empty]);
        let range = nested(&[code::SOURCE_RANGE, file, 0, 0, 0, 0]);
        let unit = nested(&[code::UNIT]);
        put_all_raw(out, &[code::LOCATION, range, unit, 0, 0]);
    }

    fn ty(&mut self, ty: &AnyType) -> u64 {
        let mut out = Vec::new();
        match ty {
            AnyType::Element(element) => put(&mut out, element.code()),
            AnyType::Value(Type::Tensor(tensor)) => {
                put_all_raw(&mut out, &[type_code::TENSOR, tensor.rank() as u64]);
                for dim in &tensor.dims {
                    put_signed(&mut out, dim.map_or(UNKNOWN_DIM, |size| size as i64));
                }
                put(&mut out, self.ty(&AnyType::Element(tensor.element)));
            }
            AnyType::Value(Type::Handle(tensor)) => {
                let inner = self.ty(&AnyType::Value(Type::Tensor(tensor.clone())));
                put_all_raw(&mut out, &[type_code::HANDLE, inner]);
            }
            AnyType::Value(Type::Token) => put(&mut out, type_code::TOKEN),
            AnyType::Function { inputs, outputs } => {
                let mut all = |types: &[Type]| -> Vec<u64> {
                    types.iter().map(|ty| self.ty(&AnyType::Value(ty.clone()))).collect()
                };
                let (inputs, outputs) = (all(inputs), all(outputs));
                put(&mut out, type_code::FUNCTION);
                put_all(&mut out, &outputs); // results come first
                put_all(&mut out, &inputs);
            }
            AnyType::Symbol => put(&mut out, type_code::SYMBOL),
        }
        self.types.number(out)
    }

    /// Headers of the weights, the section that locates them, and the length of their own section.
    fn weights(&mut self, program: &Program) -> (Vec<Vec<u8>>, Vec<u8>, u64) {
        let (mut heads, mut entries, mut length) = (Vec::new(), Vec::new(), 0u64);
        put(&mut entries, 0); // no groups of external keys
        if !program.weights.is_empty() {
            put_all_raw(&mut entries, &[0, program.weights.len() as u64]); // of dialect 0
        }
        for weight in &program.weights {
            let mut head = Vec::new();
            put_all_raw(&mut head, &[ALIGNMENT, weight.bytes]);
            pad(&mut head, length);
            put_all_raw(
                &mut entries,
                &[self.string(&weight.name), head.len() as u64 + weight.bytes],
            );
            entries.push(0); // a blob
            length += head.len() as u64 + weight.bytes;
            heads.push(head);
        }
        (heads, entries, length)
    }

    fn dialects(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        put_all_raw(&mut out, &[1, self.string(DIALECT) << 1 | 1]);
        let mut version = Vec::new();
        put(&mut version, DIALECT_VERSION);
        put_section(&mut out, section::DIALECT_VERSIONS, &version);
        let count = self.operations.items.len() as u64;
        put_all_raw(&mut out, &[count, 0, count]);
        for name in self.operations.items.clone() {
            put(&mut out, self.string(name) << 1 | 1); // registered
        }
        out
    }

    fn attribute_offsets(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_all_raw(
            &mut out,
            &[self.attributes.items.len() as u64, self.types.items.len() as u64],
        );
        for items in [&self.attributes.items, &self.types.items] {
            put_all_raw(&mut out, &[0, items.len() as u64]); // all of dialect 0
            items
                .iter()
                .for_each(|item| put(&mut out, (item.len() as u64) << 1 | 1)); // with an encoding of its own
        }
        out
    }

    fn attributes_and_types(&self) -> Vec<u8> {
        [self.attributes.items.concat(), self.types.items.concat()].concat()
    }

    fn string_section(&self) -> Vec<u8> {
        let strings = &self.strings.items;
        let mut out = Vec::new();
        let lengths: Vec<u64> = strings.iter().rev().map(|text| text.len() as u64 + 1).collect();
        put_all(&mut out, &lengths);
        strings.iter().for_each(|text| out.extend(text.bytes().chain([0])));
        out
    }

    fn property_section(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, self.properties.items.len() as u64);
        for item in &self.properties.items {
            put(&mut out, item.len() as u64);
            out.extend(item);
        }
        out
    }
}

/// A region of one block.
fn region(values: usize, arguments: &[u8], operations: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    put_all_raw(&mut out, &[1, values as u64]);
    put(
        &mut out,
        (operations.len() as u64) << 1 | u64::from(!arguments.is_empty()),
    );
    out.extend(arguments);
    out.extend(operations.concat());
    out
}

fn put_section(out: &mut Vec<u8>, id: u8, bytes: &[u8]) {
    out.push(id);
    put(out, bytes.len() as u64);
    out.extend(bytes);
}

/// Numbers without a count before them.
fn put_all_raw(out: &mut Vec<u8>, numbers: &[u64]) {
    numbers.iter().for_each(|number| put(out, *number));
}

/// Fills up to the next aligned place of what began at `start`.
fn pad(out: &mut Vec<u8>, start: u64) {
    while !(start + out.len() as u64).is_multiple_of(ALIGNMENT) {
        out.push(FILLER);
    }
}
