//! The dialect's own attributes and types: the one table of their codes.

use crate::{Element, TensorType, Type};

/// How a dimension that is known only at run time is stored.
pub(super) const UNKNOWN_DIM: i64 = i64::MIN;

/// Codes of attributes.
pub(super) mod code {
    pub(in super::super) const STRING: u64 = 1;
    pub(in super::super) const INTEGER: u64 = 2;
    pub(in super::super) const FLOAT: u64 = 3;
    pub(in super::super) const TYPE: u64 = 4;
    pub(in super::super) const ARRAY: u64 = 5;
    pub(in super::super) const DENSE: u64 = 6;
    pub(in super::super) const WEIGHT: u64 = 7;
    pub(in super::super) const NAMED: u64 = 9;
    pub(in super::super) const SYMBOL: u64 = 14;
    pub(in super::super) const PARAMETER: u64 = 16;
    pub(in super::super) const GELU_FORM: u64 = 19;
    pub(in super::super) const SOURCE_FILE: u64 = 30;
    pub(in super::super) const SOURCE_RANGE: u64 = 31;
    pub(in super::super) const LOCATION: u64 = 40;
    pub(in super::super) const DICTIONARY: u64 = 45;
    pub(in super::super) const UNIT: u64 = 46;
}

/// Codes of types that are not element types.
pub(super) mod type_code {
    pub(in super::super) const TENSOR: u64 = 2;
    pub(in super::super) const FUNCTION: u64 = 30;
    pub(in super::super) const HANDLE: u64 = 31;
    pub(in super::super) const TOKEN: u64 = 32;
    pub(in super::super) const SYMBOL: u64 = 33;
}

/// An attribute, as properties hold them.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Attribute {
    String(String),
    Integer {
        width: u64,
        is_unsigned: bool,
        value: i64,
    },
    Float(f32),
    Type(AnyType),
    Array(Vec<Self>),
    Dense {
        splat: bool,
        data: Vec<u8>,
    },
    Weight(usize),
    Named(String, Vec<Self>),
    /// A graph, by name.
    Symbol(String),
    Gelu {
        tanh: bool,
    },
    Dictionary(Vec<Self>),
    /// Where an operation comes from; every operation needs one, nothing reads it.
    Location,
}

impl Attribute {
    /// A flag as the dialect stores it.
    pub(super) fn flag(value: bool) -> Self {
        Self::Integer {
            width: 1,
            is_unsigned: true,
            value: value.into(),
        }
    }

    pub(super) fn as_flag(&self) -> Option<bool> {
        match self {
            Self::Integer { width: 1, value, .. } => Some(*value != 0),
            _ => None,
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) | Self::Symbol(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn as_array(&self) -> Option<&[Self]> {
        match self {
            Self::Array(items) | Self::Dictionary(items) => Some(items),
            _ => None,
        }
    }
}

/// A type, those that no value has included.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum AnyType {
    Value(Type),
    Element(Element),
    Function { inputs: Vec<Type>, outputs: Vec<Type> },
    Symbol,
}

impl AnyType {
    pub(super) fn value(self) -> Option<Type> {
        match self {
            Self::Value(ty) => Some(ty),
            _ => None,
        }
    }

    pub(super) fn tensor(self) -> Option<TensorType> {
        match self {
            Self::Value(Type::Tensor(ty)) => Some(ty),
            _ => None,
        }
    }
}
