//! Values of a template: what Python would hold at the same place.

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::rc::Rc;
use std::sync::Arc;

use super::ast::{For, Macro, Name};
use super::eval::Scope;
use super::meter::{self, Held};
use crate::json::{Number, Value as Json};

/// Why a template cannot go on; the line is added by who knows it.
pub(super) type Result<T> = std::result::Result<T, String>;

#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// What is not there, and the message that using it gives.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    /// An integer beyond 128 bits: written and compared, not computed with.
    BigInt(Rc<str>),
    Float(f64),
    Text(Text),
    Seq(Rc<Seq>),
    Dict(Rc<Dict>),
    Namespace(Rc<RefCell<Vec<(Name, Value)>>>),
    Macro(Rc<Callable>),
    Loop(Rc<LoopState>),
    /// A function of the environment.
    Function(&'static str),
    /// A method that is about to be called.
    Method(Rc<(Value, Name)>),
    /// `cycler(…)` and its position.
    Cycler(Rc<(Vec<Value>, Cell<usize>)>),
    /// `joiner(…)`: nothing at first, then the text.
    Joiner(Rc<(Text, Cell<bool>)>),
}

/// A string that is shared.
#[derive(Clone, Debug)]
pub(crate) struct Text(Rc<Held<Box<str>>>);

/// What looks like a list.
#[derive(Debug)]
pub(crate) struct Seq {
    pub(super) kind: SeqKind,
    items: Held<Vec<Value>>,
    depth: usize,
    /// Items that a generator has given; it gives none twice.
    given: Cell<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SeqKind {
    List,
    Tuple,
    Range,
    Keys,
    Values,
    Items,
    Generator,
}

/// A dictionary, in the order in which its keys came.
#[derive(Debug)]
pub(crate) struct Dict {
    items: Held<Vec<(Value, Value)>>,
    depth: usize,
}

/// A macro with the variables it was defined among.
#[derive(Debug)]
pub(crate) struct Callable {
    pub(super) code: Arc<Macro>,
    pub(super) scope: Rc<Scope>,
}

/// `loop` inside a `for`.
#[derive(Debug)]
pub(crate) struct LoopState {
    pub(super) items: Vec<Value>,
    pub(super) index: Cell<usize>,
    pub(super) depth: usize,
    pub(super) last_changed: RefCell<Option<Value>>,
    /// Of a recursive loop, so that it can be called.
    pub(super) code: Option<(Arc<For>, Rc<Scope>)>,
}

/// Levels of lists and dictionaries; templates can nest without end, and the stack cannot.
const MAX_DEPTH: usize = 200;
/// Bytes of a value in a list.
const SLOT: usize = size_of::<Value>();

impl Text {
    pub(super) fn new(text: impl Into<Box<str>>) -> Self {
        let text = text.into();
        let bytes = text.len();
        Self(Rc::new(Held::new(text, bytes)))
    }
}

impl std::ops::Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0.value
    }
}

impl Seq {
    pub(super) fn items(&self) -> &[Value] {
        &self.items.value
    }
}

impl Dict {
    pub(super) fn items(&self) -> &[(Value, Value)] {
        &self.items.value
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        let found = |(name, _): &&(Value, Value)| matches!(name, Value::Text(name) if **name == *key);
        self.items().iter().find(found).map(|(_, value)| value)
    }

    pub(super) fn get_value(&self, key: &Value) -> Result<Option<&Value>> {
        if let Value::Text(key) = key {
            return Ok(self.get(key));
        }
        for (name, value) in self.items() {
            if name.equals(key)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }
}

impl Value {
    pub(super) fn undefined(message: impl Into<String>) -> Self {
        Self::Undefined(message.into().into())
    }

    /// Text that is known to be small.
    pub(super) fn text(text: impl Into<Box<str>>) -> Self {
        Self::Text(Text::new(text))
    }

    /// A new text, which counts as work.
    pub(super) fn new_text(text: String) -> Result<Self> {
        meter::room(text.len())?;
        Ok(Self::text(text))
    }

    pub(super) fn list(items: Vec<Value>) -> Result<Self> {
        Self::seq(SeqKind::List, items)
    }

    pub(super) fn seq(kind: SeqKind, items: Vec<Value>) -> Result<Self> {
        meter::room(items.len() * SLOT)?;
        let depth = deeper(items.iter())?;
        let bytes = items.len() * SLOT;
        Ok(Self::Seq(Rc::new(Seq {
            kind,
            items: Held::new(items, bytes),
            depth,
            given: Cell::new(0),
        })))
    }

    /// Later values of a key replace earlier ones and stay at their place.
    pub(super) fn dict(pairs: Vec<(Value, Value)>) -> Result<Self> {
        meter::room(pairs.len() * 2 * SLOT)?;
        let mut items: Vec<(Value, Value)> = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            key.check_key()?;
            meter::steps(items.len() / 8 + 1)?;
            let mut at = None;
            for (index, (known, _)) in items.iter().enumerate() {
                if known.equals(&key)? {
                    at = Some(index);
                    break;
                }
            }
            match at {
                Some(at) => items[at].1 = value,
                None => items.push((key, value)),
            }
        }
        Self::dict_of_unique(items)
    }

    fn dict_of_unique(items: Vec<(Value, Value)>) -> Result<Self> {
        let depth = deeper(items.iter().map(|(_, value)| value))?;
        let bytes = items.len() * 2 * SLOT;
        Ok(Self::Dict(Rc::new(Dict {
            items: Held::new(items, bytes),
            depth,
        })))
    }

    fn check_key(&self) -> Result<()> {
        match self {
            Self::Dict(_) | Self::Namespace(_) => Err(format!("unhashable type: '{}'", self.type_name())),
            Self::Seq(seq) if seq.kind == SeqKind::List => Err("unhashable type: 'list'".into()),
            _ => Ok(()),
        }
    }

    /// A value from a row.
    pub(crate) fn from_json(json: &Json) -> Self {
        match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(Number::Int(number)) => Self::Int(*number),
            Json::Number(Number::BigInt(digits)) => Self::BigInt(digits.as_str().into()),
            Json::Number(Number::Float(number)) => Self::Float(*number),
            Json::String(text) => Self::text(text.as_str()),
            // What a row holds is no more than a line holds, and no deeper than JSON may be.
            Json::Array(list) => Self::from_items(list.iter().map(Self::from_json).collect()),
            Json::Object(map) => {
                Self::from_pairs(map.iter().map(|(key, value)| (key.as_str(), Self::from_json(value))))
            }
        }
    }

    /// A list of what a row holds.
    pub(crate) fn from_items(items: Vec<Value>) -> Self {
        let depth = 1 + items.iter().map(Self::depth).max().unwrap_or(0);
        let bytes = items.len() * SLOT;
        Self::Seq(Rc::new(Seq {
            kind: SeqKind::List,
            items: Held::new(items, bytes),
            depth,
            given: Cell::new(0),
        }))
    }

    /// A dictionary with keys that are known to differ.
    fn from_pairs<'a>(pairs: impl Iterator<Item = (&'a str, Value)>) -> Self {
        let items: Vec<_> = pairs.map(|(key, value)| (Self::text(key), value)).collect();
        let depth = 1 + items.iter().map(|(_, value)| value.depth()).max().unwrap_or(0);
        let bytes = items.len() * 2 * SLOT;
        Self::Dict(Rc::new(Dict {
            items: Held::new(items, bytes),
            depth,
        }))
    }

    fn depth(&self) -> usize {
        match self {
            Self::Seq(seq) => seq.depth,
            Self::Dict(dict) => dict.depth,
            Self::Namespace(_) | Self::Method(_) | Self::Cycler(_) | Self::Macro(_) => 1,
            _ => 0,
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    /// An integer; `True` is 1.
    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Bool(value) => Some(i128::from(*value)),
            _ => None,
        }
    }

    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(number) => Some(*number),
            Self::BigInt(digits) => digits.parse().ok(),
            _ => self.as_int().map(|number| number as f64),
        }
    }

    pub(super) fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(number) => *number != 0,
            Self::Float(number) => *number != 0.0,
            Self::Text(text) => !text.is_empty(),
            Self::Seq(seq) => seq.kind == SeqKind::Generator || !seq.items().is_empty(),
            Self::Dict(dict) => !dict.items().is_empty(),
            _ => true,
        }
    }

    /// The type as Python calls it.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) | Self::BigInt(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::Seq(seq) => match seq.kind {
                SeqKind::List => "list",
                SeqKind::Tuple => "tuple",
                SeqKind::Range => "range",
                SeqKind::Keys => "dict_keys",
                SeqKind::Values => "dict_values",
                SeqKind::Items => "dict_items",
                SeqKind::Generator => "generator",
            },
            Self::Dict(_) => "dict",
            Self::Namespace(_) => "Namespace",
            Self::Macro(_) => "Macro",
            Self::Loop(_) => "LoopContext",
            Self::Function(_) | Self::Method(_) => "function",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
        }
    }

    /// The items that a loop goes through.
    pub(super) fn iterate(&self) -> Result<Vec<Value>> {
        let items: Vec<Value> = match self {
            Self::Undefined(_) => Vec::new(),
            Self::Seq(seq) if seq.kind == SeqKind::Generator => {
                let from = seq.given.replace(seq.items().len());
                seq.items()[from..].to_vec()
            }
            Self::Seq(seq) => seq.items().to_vec(),
            Self::Dict(dict) => dict.items().iter().map(|(key, _)| key.clone()).collect(),
            Self::Text(text) => {
                meter::room(text.len() * SLOT)?;
                text.chars()
                    .map(|character| Self::text(character.to_string()))
                    .collect()
            }
            Self::Loop(state) => {
                let from = state.index.get() + 1;
                state.items.get(from..).unwrap_or_default().to_vec()
            }
            other => return Err(format!("'{}' object is not iterable", other.type_name())),
        };
        meter::room(items.len() * SLOT)?;
        Ok(items)
    }

    /// The first item, of which a generator is relieved.
    pub(super) fn take_first(&self) -> Result<Option<Value>> {
        match self {
            Self::Seq(seq) if seq.kind == SeqKind::Generator => {
                let at = seq.given.get();
                seq.given.set(seq.items().len().min(at + 1));
                Ok(seq.items().get(at).cloned())
            }
            Self::Seq(seq) => Ok(seq.items().first().cloned()),
            Self::Text(text) => Ok(text.chars().next().map(|character| Self::text(character.to_string()))),
            other => Ok(other.iterate()?.into_iter().next()),
        }
    }

    /// `len(value)`
    pub(super) fn length(&self) -> Result<usize> {
        match self {
            Self::Undefined(_) => Ok(0),
            Self::Text(text) => {
                meter::steps(text.len() / 64)?;
                Ok(text.chars().count())
            }
            Self::Seq(seq) if seq.kind != SeqKind::Generator => Ok(seq.items().len()),
            Self::Dict(dict) => Ok(dict.items().len()),
            Self::Loop(state) => Ok(state.items.len()),
            other => Err(format!("object of type '{}' has no len()", other.type_name())),
        }
    }

    /// `==`
    pub(super) fn equals(&self, other: &Self) -> Result<bool> {
        meter::steps(1)?;
        Ok(match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Text(a), Self::Text(b)) => **a == **b,
            (Self::BigInt(a), Self::BigInt(b)) => a == b,
            (Self::Seq(a), Self::Seq(b)) => {
                if Rc::ptr_eq(a, b) {
                    return Ok(true);
                }
                let comparable = a.kind == b.kind && a.kind != SeqKind::Generator;
                if !comparable || a.items().len() != b.items().len() {
                    return Ok(false);
                }
                for (a, b) in a.items().iter().zip(b.items()) {
                    if !a.equals(b)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Self::Dict(a), Self::Dict(b)) => {
                if a.items().len() != b.items().len() {
                    return Ok(false);
                }
                for (key, value) in a.items() {
                    match b.get_value(key)? {
                        Some(other) if value.equals(other)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Macro(a), Self::Macro(b)) => Rc::ptr_eq(a, b),
            (Self::Function(a), Self::Function(b)) => a == b,
            (Self::Float(a), b) | (b, Self::Float(a)) => b.as_float() == Some(*a),
            (a, b) => a.as_int().is_some() && a.as_int() == b.as_int(),
        })
    }

    /// `<`, where Python has an order.
    pub(super) fn compare(&self, other: &Self) -> Result<Ordering> {
        meter::steps(1)?;
        let order = match (self, other) {
            (Self::Text(a), Self::Text(b)) => Some(a.cmp(b)),
            (Self::Seq(a), Self::Seq(b)) if a.kind == b.kind => {
                for (a, b) in a.items().iter().zip(b.items()) {
                    if !a.equals(b)? {
                        return a.compare(b);
                    }
                }
                Some(a.items().len().cmp(&b.items().len()))
            }
            (a, b) => match (a.as_int(), b.as_int()) {
                (Some(a), Some(b)) => Some(a.cmp(&b)),
                _ => a.as_float().zip(b.as_float()).and_then(|(a, b)| a.partial_cmp(&b)),
            },
        };
        order.ok_or_else(|| {
            let (left, right) = (self.type_name(), other.type_name());
            format!("'<' not supported between instances of '{left}' and '{right}'")
        })
    }

    /// `item in self`
    pub(super) fn contains(&self, item: &Self) -> Result<bool> {
        match self {
            Self::Text(text) => match item {
                Self::Text(part) => {
                    meter::steps(text.len() / 64)?;
                    Ok(text.contains(&**part))
                }
                other => Err(format!(
                    "'in <string>' requires string as left operand, not {}",
                    other.type_name()
                )),
            },
            Self::Dict(dict) => Ok(dict.get_value(item)?.is_some()),
            Self::Seq(_) | Self::Undefined(_) => {
                for value in self.iterate()? {
                    if value.equals(item)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            other => Err(format!("argument of type '{}' is not iterable", other.type_name())),
        }
    }
}

/// The depth of what holds these values.
fn deeper<'a>(values: impl Iterator<Item = &'a Value>) -> Result<usize> {
    let depth = 1 + values.map(Value::depth).max().unwrap_or(0);
    if depth > MAX_DEPTH {
        return Err(format!("a value is nested more than {MAX_DEPTH} deep"));
    }
    Ok(depth)
}
