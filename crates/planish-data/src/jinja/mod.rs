//! The language of chat templates: Jinja2 as transformers sets it up, with Python's values.
//!
//! Templates are written for Python, and models are trained on what Python made of them. So values, operators, methods
//! and filters have Python's meaning here to the last character: integers of any size, `repr`, `%`, what is true and
//! what is undefined. Nothing can be changed in place, as in transformers' sandbox, and a rendering is bounded in time
//! and memory ([`meter`]).

mod arguments;
mod ast;
mod eval;
mod filters;
mod format;
mod lexer;
mod meter;
mod methods;
mod ops;
mod parser;
mod predicates;
mod python;
mod value;

pub(crate) use ast::Name;
pub(crate) use value::Value;

/// Why a template does not parse or does not render, and in which line.
#[derive(Debug)]
pub(crate) struct Fault {
    /// From 1.
    pub(crate) line: usize,
    pub(crate) message: String,
}

/// A parsed template.
#[derive(Debug)]
pub(crate) struct Template {
    nodes: Vec<ast::Node>,
}

impl Template {
    pub(crate) fn parse(source: &str) -> Result<Self, Fault> {
        Ok(Self {
            nodes: parser::parse(source)?,
        })
    }

    /// Renders with these variables; `now` is what `strftime_now` shows, in seconds since 1970.
    pub(crate) fn render(&self, variables: Vec<(Name, Value)>, now: i64) -> Result<String, Fault> {
        meter::start(meter::held());
        eval::render(&self.nodes, variables, now)
    }
}

/// A value as Python's `repr` writes it.
pub(crate) fn repr(value: &Value) -> Option<String> {
    meter::start(meter::held());
    python::repr(value).ok()
}

/// A value as `json.dumps(value, ensure_ascii=False)` writes it.
pub(crate) fn dumps(value: &Value) -> Option<String> {
    meter::start(meter::held());
    python::dumps(value, &python::JsonStyle::default()).ok()
}

/// `datetime.strftime` in UTC.
fn strftime(now: i64, format: &str) -> Result<String, String> {
    let bad = |error: jiff::Error| format!("strftime_now: {error}");
    let time = jiff::Timestamp::from_second(now)
        .map_err(bad)?
        .to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &time).map_err(bad)
}
