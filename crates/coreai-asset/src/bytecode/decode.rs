//! From a file to a program. The bytes come from strangers: every length, index and nesting is checked.

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use super::{
    ASSET, DIALECT, DIALECT_VERSION, GRAPH, MAGIC, VERSION,
    attribute::{AnyType, Attribute, UNKNOWN_DIM, code, type_code},
    number::{Outcome, Reader},
    part, section,
    signature::{GRAPH_SLOTS, graph_of, payload_of, property_count},
};
use crate::{
    Element, TensorType, Type,
    program::{Block, OpCode, Operation, Payload, Program, Weight},
};

/// Attributes, types and regions nest no deeper in any real file.
const MAX_DEPTH: usize = 32;
/// Only the weights of a file are larger.
const MAX_SECTION: u64 = 1 << 28;
/// Sections that a file can have, with room for some that are not known.
const MAX_SECTIONS: usize = 32;

/// A program and where its weights are in the file.
#[derive(Debug)]
pub(crate) struct StoredProgram {
    pub(crate) program: Program,
    /// Bytes of each weight in the file.
    pub(crate) weights: Vec<Range<u64>>,
}

/// Reads everything but the weights.
pub(crate) fn decode(file: &mut (impl Read + Seek)) -> Outcome<StoredProgram> {
    let sections = Sections::read(file)?;
    let mut tables = Tables::read(&sections)?;
    let weights = sections.weights(file, &tables.strings)?;
    tables.weights = weights.len();
    let graphs = tables.asset(sections.get(section::IR)?)?;
    let named = weights.iter().map(|(name, range)| Weight {
        name: name.clone(),
        bytes: range.end - range.start,
    });
    let program = Program {
        graphs,
        weights: named.collect(),
    };
    Ok(StoredProgram {
        program,
        weights: weights.into_iter().map(|row| row.1).collect(),
    })
}

/// The sections of a file; that of the weights by its place only.
struct Sections {
    bytes: Vec<(u8, Vec<u8>)>,
    resources: Option<Range<u64>>,
}

impl Sections {
    fn read(file: &mut (impl Read + Seek)) -> Outcome<Self> {
        let length = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
        let mut at = preamble(file)?;
        let mut sections = Self {
            bytes: Vec::new(),
            resources: None,
        };
        for _ in 0..MAX_SECTIONS {
            if at >= length {
                return Ok(sections);
            }
            let (id, data) = section_head(file, at)?;
            if data.end > length {
                return Err(format!("section {id} ends beyond the file"));
            }
            at = data.end;
            if id == section::RESOURCES {
                sections.resources = Some(data);
            } else {
                let bytes = read_at(file, data.start, (data.end - data.start).min(MAX_SECTION + 1))?;
                if bytes.len() as u64 > MAX_SECTION {
                    return Err(format!("section {id} is larger than {MAX_SECTION} bytes"));
                }
                sections.bytes.push((id, bytes));
            }
        }
        Err(format!("more than {MAX_SECTIONS} sections"))
    }

    fn get(&self, id: u8) -> Outcome<&[u8]> {
        let found = self.bytes.iter().find(|section| section.0 == id);
        found
            .map(|section| section.1.as_slice())
            .ok_or_else(|| format!("no section {id}"))
    }

    /// Name and place of each weight.
    fn weights(&self, file: &mut (impl Read + Seek), strings: &[String]) -> Outcome<Vec<(String, Range<u64>)>> {
        let (Ok(entries), Some(resources)) = (self.get(section::RESOURCE_OFFSETS), &self.resources) else {
            return Ok(Vec::new());
        };
        let mut reader = Reader::new(entries);
        if reader.number()? != 0 {
            return Err("resources outside the dialect".into());
        }
        let (mut out, mut at) = (Vec::new(), resources.start);
        while !reader.is_empty() {
            reader.number()?; // the dialect
            for _ in 0..reader.count()? {
                let name = text(strings, reader.index()?)?;
                let end = at.checked_add(reader.number()?).filter(|end| *end <= resources.end);
                let end = end.ok_or_else(|| format!("weight {name} ends beyond its section"))?;
                reader.byte()?; // a blob
                out.push((
                    name.to_owned(),
                    weight_data(file, at..end).map_err(|e| format!("weight {name}: {e}"))?,
                ));
                at = end;
            }
        }
        Ok(out)
    }
}

/// Checks the file's first bytes. Returns where the sections begin.
fn preamble(file: &mut (impl Read + Seek)) -> Outcome<u64> {
    let bytes = read_at(file, 0, 256)?;
    let mut reader = Reader::new(&bytes);
    if reader.take(MAGIC.len() as u64)? != MAGIC {
        return Err("not MLIR bytecode".into());
    }
    let version = reader.number()?;
    if version != VERSION {
        return Err(format!("bytecode of version {version}; version {VERSION} is known"));
    }
    let start = bytes.iter().skip(MAGIC.len()).position(|b| *b == 0);
    let start = start.ok_or("the producer's name does not end")?;
    Ok((MAGIC.len() + start + 1) as u64)
}

/// Number and data of the section at a place.
fn section_head(file: &mut (impl Read + Seek), at: u64) -> Outcome<(u8, Range<u64>)> {
    let bytes = read_at(file, at, 32)?;
    let mut reader = Reader::new(&bytes);
    let id = reader.byte()?;
    let length = reader.number()?;
    let alignment = if id & 0x80 != 0 { reader.number()? } else { 1 };
    let head = (bytes.len() - reader.left()) as u64;
    let start = (at + head).checked_next_multiple_of(alignment.max(1));
    let data = start.and_then(|start| Some(start..start.checked_add(length)?));
    Ok((id & 0x7F, data.ok_or("a section beyond all bounds")?))
}

/// The data of a weight inside its entry: after alignment, length and filler.
fn weight_data(file: &mut (impl Read + Seek), entry: Range<u64>) -> Outcome<Range<u64>> {
    let bytes = read_at(file, entry.start, (entry.end - entry.start).min(32))?;
    let mut reader = Reader::new(&bytes);
    let alignment = reader.number()?;
    let length = reader.number()?;
    let start = entry.end.checked_sub(length).filter(|start| *start >= entry.start);
    let start = start.ok_or("its data are longer than its entry")?;
    if alignment == 0 || !start.is_multiple_of(alignment) {
        return Err(format!(
            "its data begin at {start}, which is not a multiple of {alignment}"
        ));
    }
    Ok(start..entry.end)
}

fn read_at(file: &mut (impl Read + Seek), at: u64, most: u64) -> Outcome<Vec<u8>> {
    file.seek(SeekFrom::Start(at)).map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

fn text(strings: &[String], index: usize) -> Outcome<&str> {
    let found = strings.get(index).map(String::as_str);
    found.ok_or_else(|| format!("string {index} of {}", strings.len()))
}

/// What the sections before the operations hold.
struct Tables<'a> {
    strings: Vec<String>,
    operations: Vec<String>,
    attributes: Vec<&'a [u8]>,
    types: Vec<&'a [u8]>,
    properties: Vec<&'a [u8]>,
    weights: usize,
}

impl<'a> Tables<'a> {
    fn read(sections: &'a Sections) -> Outcome<Self> {
        let strings = strings(sections.get(section::STRINGS)?)?;
        let operations = dialects(sections.get(section::DIALECTS)?, &strings)?;
        let [attributes, types] = encoded(
            sections.get(section::ATTRIBUTE_OFFSETS)?,
            sections.get(section::ATTRIBUTES)?,
        )?;
        let properties = match sections.get(section::PROPERTIES) {
            Ok(bytes) => properties(bytes)?,
            Err(_) => Vec::new(),
        };
        Ok(Self {
            strings,
            operations,
            attributes,
            types,
            properties,
            weights: 0,
        })
    }

    fn text(&self, index: usize) -> Outcome<&str> {
        text(&self.strings, index)
    }

    /// A value's type.
    fn value_type(&self, index: usize) -> Outcome<Type> {
        let ty = self.ty(index, 0)?.value();
        ty.ok_or_else(|| format!("type {index} is not that of a value"))
    }

    fn ty(&self, index: usize, depth: usize) -> Outcome<AnyType> {
        let bytes = self
            .types
            .get(index)
            .ok_or_else(|| format!("type {index} of {}", self.types.len()))?;
        if depth > MAX_DEPTH {
            return Err("types nest too deep".into());
        }
        let mut reader = Reader::new(bytes);
        match reader.number()? {
            type_code::TENSOR => {
                let dims = (0..reader.count()?)
                    .map(|_| dimension(reader.signed()?))
                    .collect::<Outcome<Vec<_>>>()?;
                match self.ty(reader.index()?, depth + 1)? {
                    AnyType::Element(element) => Ok(AnyType::Value(Type::Tensor(TensorType { dims, element }))),
                    _ => Err(format!("type {index} is a tensor of something else than elements")),
                }
            }
            type_code::FUNCTION => {
                let mut all = || -> Outcome<Vec<Type>> {
                    let of = |index: usize| {
                        let ty = self.ty(index, depth + 1)?.value();
                        ty.ok_or_else(|| "a function of something else than values".to_owned())
                    };
                    reader.indices()?.into_iter().map(of).collect()
                };
                let outputs = all()?;
                Ok(AnyType::Function {
                    inputs: all()?,
                    outputs,
                })
            }
            type_code::HANDLE => {
                let inner = self.ty(reader.index()?, depth + 1)?.tensor();
                Ok(AnyType::Value(Type::Handle(
                    inner.ok_or("a handle to something else than a tensor")?,
                )))
            }
            type_code::TOKEN => Ok(AnyType::Value(Type::Token)),
            type_code::SYMBOL => Ok(AnyType::Symbol),
            other => Element::from_code(other)
                .map(AnyType::Element)
                .ok_or_else(|| format!("a type of unknown code {other}")),
        }
    }

    fn attribute(&self, index: usize, depth: usize) -> Outcome<Attribute> {
        let bytes = self.attributes.get(index);
        let bytes = bytes.ok_or_else(|| format!("attribute {index} of {}", self.attributes.len()))?;
        if depth > MAX_DEPTH {
            return Err("attributes nest too deep".into());
        }
        let mut reader = Reader::new(bytes);
        let all = |indices: Vec<usize>| -> Outcome<Vec<Attribute>> {
            indices
                .into_iter()
                .map(|item| self.attribute(item, depth + 1))
                .collect()
        };
        Ok(match reader.number()? {
            code::STRING => Attribute::String(self.text(reader.index()?)?.into()),
            code::INTEGER => {
                let (width, is_unsigned) = (reader.number()?, reader.byte()? != 0);
                let value = if width <= 8 {
                    reader.byte()?.into()
                } else {
                    reader.signed()?
                };
                Attribute::Integer {
                    width,
                    is_unsigned,
                    value,
                }
            }
            code::FLOAT => {
                let width = reader.number()?;
                if width != 32 {
                    return Err(format!("a float of {width} bits"));
                }
                Attribute::Float(f32::from_bits(reader.signed()? as u32))
            }
            code::TYPE => Attribute::Type(self.ty(reader.index()?, depth + 1)?),
            code::ARRAY => Attribute::Array(all(reader.indices()?)?),
            code::DICTIONARY => Attribute::Dictionary(all(reader.indices()?)?),
            code::DENSE => {
                let splat = reader.byte()? != 0;
                let length = reader.number()?;
                let data = reader.take(length)?.to_vec();
                Attribute::Dense { splat, data }
            }
            code::WEIGHT => match reader.index()? {
                weight if weight < self.weights => Attribute::Weight(weight),
                weight => return Err(format!("weight {weight} of {}", self.weights)),
            },
            code::NAMED => {
                let key = self.text(reader.index()?)?.to_owned();
                Attribute::Named(key, all(reader.indices()?)?)
            }
            code::SYMBOL => {
                let path = reader.indices()?;
                let [name] = path[..] else {
                    return Err(format!("a symbol of {} parts", path.len()));
                };
                Attribute::Symbol(self.text(name)?.into())
            }
            code::PARAMETER => self.attribute(reader.index()?, depth + 1)?,
            code::GELU_FORM => Attribute::Gelu {
                tanh: reader.number()? == 1,
            },
            code::LOCATION | code::SOURCE_FILE | code::SOURCE_RANGE | code::UNIT => Attribute::Location,
            other => return Err(format!("an attribute of unknown code {other}")),
        })
    }

    fn asset(&self, ir: &[u8]) -> Outcome<Vec<crate::program::Graph>> {
        let mut reader = Reader::new(ir);
        let head = reader.number()?;
        if head != 1 << 1 {
            return Err("the file does not hold exactly one asset".into());
        }
        let asset = self.operation(&mut reader)?;
        if asset.name != full(ASSET) {
            return Err(format!("the file holds {}, not an asset", asset.name));
        }
        let mut body = Reader::new(asset.region.ok_or("an asset without a region")?);
        let (count, _, arguments) = block_head(&mut body)?;
        if arguments {
            return Err("an asset with arguments".into());
        }
        (0..count).map(|_| self.graph(&mut body)).collect()
    }

    fn graph(&self, reader: &mut Reader<'a>) -> Outcome<crate::program::Graph> {
        let raw = self.operation(reader)?;
        if raw.name != full(GRAPH) {
            return Err(format!("the asset holds {}, not a graph", raw.name));
        }
        let properties = raw.properties.ok_or("a graph without properties")?;
        let mut graph = graph_of(&self.property_values(properties, &GRAPH_SLOTS)?)?;
        let body = raw
            .region
            .ok_or_else(|| format!("graph {} without a region", graph.name))?;
        let named = |e: String| format!("graph {}: {e}", graph.name);
        graph.block = self.block(body, 0).map_err(named)?;
        let expected: Vec<&Type> = graph.inputs.iter().map(|port| &port.ty).collect();
        let found: Vec<&Type> = graph.block.types.iter().take(graph.block.arguments).collect();
        if expected != found {
            return Err(format!("graph {}: its arguments are not its inputs", graph.name));
        }
        Ok(graph)
    }

    fn block(&self, bytes: &'a [u8], depth: usize) -> Outcome<Block> {
        if depth > MAX_DEPTH {
            return Err("regions nest too deep".into());
        }
        let mut reader = Reader::new(bytes);
        let (count, values, has_arguments) = block_head(&mut reader)?;
        let mut block = Block::new(if has_arguments {
            self.arguments(&mut reader)?
        } else {
            Vec::new()
        });
        for _ in 0..count {
            let raw = self.operation(&mut reader)?;
            let short = raw.name.strip_prefix(DIALECT).and_then(|name| name.strip_prefix('.'));
            let code = short
                .and_then(OpCode::from_name)
                .ok_or_else(|| format!("unknown operation {}", raw.name))?;
            let operation = self
                .inner(code, &raw, &block, depth)
                .map_err(|e| format!("{}: {e}", code.name()))?;
            block.push(operation, raw.results);
        }
        if block.types.len() != values {
            return Err(format!("{values} values announced, {} made", block.types.len()));
        }
        Ok(block)
    }

    fn arguments(&self, reader: &mut Reader<'a>) -> Outcome<Vec<Type>> {
        let count = reader.count()?;
        let mut types = Vec::new();
        for _ in 0..count {
            let ty = reader.number()?;
            if ty & 1 == 1 {
                reader.number()?; // a location
            }
            types.push(self.value_type((ty >> 1) as usize)?);
        }
        if reader.byte()? != 0 {
            return Err("a block with use lists".into());
        }
        Ok(types)
    }

    fn inner(&self, code: OpCode, raw: &RawOperation<'a>, block: &Block, depth: usize) -> Outcome<Operation> {
        let slots = vec![false; property_count(code)];
        let properties = match raw.properties {
            Some(bytes) => self.property_values(bytes, &slots)?,
            None => Vec::new(),
        };
        let operand = |value: &usize| match *value < block.types.len() {
            true => Ok(*value as u32),
            false => Err(format!("operand {value} is not yet known")),
        };
        let payload = match payload_of(code, &properties)? {
            Payload::Weight(_) if raw.results.len() != 1 => return Err("a weight without a type".into()),
            payload => payload,
        };
        Ok(Operation {
            code,
            operands: raw.operands.iter().map(operand).collect::<Outcome<_>>()?,
            results: raw.results.len(),
            payload,
            region: raw.region.map(|body| self.block(body, depth + 1)).transpose()?,
        })
    }

    fn property_values(&self, bytes: &[u8], optional: &[bool]) -> Outcome<Vec<Option<Attribute>>> {
        let mut reader = Reader::new(bytes);
        let mut value = |is_optional: &bool| {
            let number = reader.index()?;
            match (is_optional, number & 1) {
                (false, _) => self.attribute(number, 0).map(Some),
                (true, 1) => self.attribute(number >> 1, 0).map(Some),
                (true, _) => Ok(None),
            }
        };
        optional.iter().map(&mut value).collect()
    }

    fn operation(&self, reader: &mut Reader<'a>) -> Outcome<RawOperation<'a>> {
        let name = reader.index()?;
        let name = self
            .operations
            .get(name)
            .ok_or_else(|| format!("operation name {name}"))?;
        let parts = reader.byte()?;
        reader.number()?; // a location
        if parts & part::ATTRIBUTES != 0 {
            reader.number()?; // nothing here uses the dictionary
        }
        let mut raw = RawOperation {
            name: name.clone(),
            ..RawOperation::default()
        };
        if parts & part::PROPERTIES != 0 {
            let index = reader.index()?;
            let found = self.properties.get(index);
            raw.properties = Some(found.copied().ok_or_else(|| format!("properties {index}"))?);
        }
        if parts & part::RESULTS != 0 {
            raw.results = reader
                .indices()?
                .into_iter()
                .map(|ty| self.value_type(ty))
                .collect::<Outcome<_>>()?;
        }
        if parts & part::OPERANDS != 0 {
            raw.operands = reader.indices()?;
        }
        if parts & part::SUCCESSORS != 0 {
            return Err(format!("{name} has successors"));
        }
        if parts & part::REGIONS != 0 {
            raw.region = Some(isolated_region(reader).map_err(|e| format!("{name}: {e}"))?);
        }
        Ok(raw)
    }
}

/// An operation before its name is understood.
#[derive(Default)]
struct RawOperation<'a> {
    name: String,
    properties: Option<&'a [u8]>,
    results: Vec<Type>,
    operands: Vec<usize>,
    region: Option<&'a [u8]>,
}

fn isolated_region<'a>(reader: &mut Reader<'a>) -> Outcome<&'a [u8]> {
    if reader.number()? != (1 << 1 | 1) {
        return Err("expected one isolated region".into());
    }
    let id = reader.byte()?;
    if id != section::IR {
        return Err(format!("section {id} in place of a region"));
    }
    let length = reader.number()?;
    reader.take(length)
}

/// Number of operations and values of a region's only block, and whether it has arguments.
fn block_head(reader: &mut Reader<'_>) -> Outcome<(usize, usize, bool)> {
    let blocks = reader.number()?;
    if blocks != 1 {
        return Err(format!("{blocks} blocks in a region"));
    }
    let values = reader.index()?;
    let head = reader.index()?;
    Ok((head >> 1, values, head & 1 == 1))
}

fn dimension(stored: i64) -> Outcome<Option<usize>> {
    match stored {
        UNKNOWN_DIM => Ok(None),
        size => usize::try_from(size)
            .map(Some)
            .map_err(|_| format!("a dimension of {size}")),
    }
}

fn full(name: &str) -> String {
    format!("{DIALECT}.{name}")
}

fn strings(bytes: &[u8]) -> Outcome<Vec<String>> {
    let mut reader = Reader::new(bytes);
    let lengths = reader.indices()?;
    let mut out = Vec::new();
    for length in lengths.into_iter().rev() {
        let text = reader.take(length as u64)?;
        let text = text.strip_suffix(&[0]).ok_or("a string without an end")?;
        out.push(String::from_utf8_lossy(text).into_owned());
    }
    Ok(out)
}

/// Names of operations, with their dialect.
fn dialects(bytes: &[u8], strings: &[String]) -> Outcome<Vec<String>> {
    let mut reader = Reader::new(bytes);
    let mut names = Vec::new();
    for _ in 0..reader.count()? {
        let head = reader.index()?;
        names.push(text(strings, head >> 1)?);
        if head & 1 == 0 {
            continue;
        }
        if reader.byte()? != section::DIALECT_VERSIONS {
            return Err("a dialect without its version".into());
        }
        let length = reader.number()?;
        let version = Reader::new(reader.take(length)?).number()?;
        if version != DIALECT_VERSION {
            return Err(format!(
                "dialect of version {version}; version {DIALECT_VERSION} is known"
            ));
        }
    }
    reader.number()?; // number of operations in all
    let mut operations = Vec::new();
    while !reader.is_empty() {
        let dialect = reader.index()?;
        let dialect = names.get(dialect).ok_or_else(|| format!("dialect {dialect}"))?;
        for name in reader.indices()? {
            operations.push(format!("{dialect}.{}", text(strings, name >> 1)?));
        }
    }
    Ok(operations)
}

/// The bytes of each attribute and type.
fn encoded<'a>(offsets: &[u8], data: &'a [u8]) -> Outcome<[Vec<&'a [u8]>; 2]> {
    let mut reader = Reader::new(offsets);
    let counts = [reader.index()?, reader.index()?];
    let mut data = Reader::new(data);
    let mut group = |count: usize| -> Outcome<Vec<&'a [u8]>> {
        let mut out = Vec::new();
        while out.len() < count {
            reader.number()?; // the dialect
            for length in reader.indices()? {
                out.push(data.take(length as u64 >> 1)?);
            }
        }
        Ok(out)
    };
    Ok([group(counts[0])?, group(counts[1])?])
}

fn properties(bytes: &[u8]) -> Outcome<Vec<&[u8]>> {
    let mut reader = Reader::new(bytes);
    let count = reader.count()?;
    let one = |_| {
        let length = reader.number()?;
        reader.take(length)
    };
    (0..count).map(one).collect()
}
