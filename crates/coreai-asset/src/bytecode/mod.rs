//! MLIR bytecode, version 6, of the one dialect `aicode`, version 2.
//!
//! The container (sections, tables, variable-length integers) is MLIR's and documented there under "Bytecode Format".
//! Types, attributes and properties are encoded by the dialect itself; `attribute` holds its codes. Every region is
//! isolated, so it is a section of its own and its values are numbered from zero.

mod attribute;
mod decode;
mod encode;
mod number;
mod signature;

pub(crate) use decode::decode;
pub(crate) use encode::{Encoded, encode};

/// Version of the container.
const VERSION: u64 = 6;
const MAGIC: &[u8; 4] = b"ML\xefR";
/// The dialect and the version of its encoding.
const DIALECT: &str = "aicode";
const DIALECT_VERSION: u64 = 2;
/// What the closing and opening operations of a file are called.
const ASSET: &str = "serialization.asset";
const GRAPH: &str = "dataflow.graph_v1";
/// Fills gaps before aligned data.
const FILLER: u8 = 0xCB;
/// Weights begin at multiples of this.
const ALIGNMENT: u64 = 16;

/// Numbers of the sections.
mod section {
    pub(super) const STRINGS: u8 = 0;
    pub(super) const DIALECTS: u8 = 1;
    pub(super) const ATTRIBUTES: u8 = 2;
    pub(super) const ATTRIBUTE_OFFSETS: u8 = 3;
    pub(super) const IR: u8 = 4;
    pub(super) const RESOURCES: u8 = 5;
    pub(super) const RESOURCE_OFFSETS: u8 = 6;
    pub(super) const DIALECT_VERSIONS: u8 = 7;
    pub(super) const PROPERTIES: u8 = 8;
}

/// Bits of an operation that say which parts follow.
mod part {
    pub(super) const ATTRIBUTES: u8 = 1;
    pub(super) const RESULTS: u8 = 2;
    pub(super) const OPERANDS: u8 = 4;
    pub(super) const SUCCESSORS: u8 = 8;
    pub(super) const REGIONS: u8 = 16;
    pub(super) const PROPERTIES: u8 = 64;
}

/// Entry point of the fuzz target: any bytes are read without a panic.
#[doc(hidden)]
pub mod fuzzing {
    /// Reads bytes as a file.
    pub fn program(bytes: &[u8]) -> bool {
        super::decode::decode(&mut std::io::Cursor::new(bytes)).is_ok()
    }
}
