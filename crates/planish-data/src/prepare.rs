//! One line to one row: parsed, checked, rendered, tokenised. No line knows of another here.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Fault, Result, RowError, RowErrorKind};
use crate::format::Format;
use crate::json;
use crate::lines::{Line, Lines};
use crate::mask::{Masker, Samples};
use crate::options::DataOptions;
use crate::provenance::Provenance;
use crate::record::Record;

/// A good row, before the length limit.
pub(crate) struct Row {
    pub(crate) line: usize,
    pub(crate) format: Format,
    pub(crate) samples: Samples,
    pub(crate) provenance: Option<Provenance>,
    /// The margin that a preference row asks for.
    pub(crate) margin: Option<f64>,
    pub(crate) n_fields: usize,
    /// Fields that nothing reads.
    pub(crate) extra_fields: Vec<String>,
}

/// The row of a line; nothing for a blank one. The error has no path yet.
pub(crate) fn row_of(line: &Line, masker: &Masker) -> Result<Option<Row>, RowError> {
    if line.too_long {
        return Err(located(line, "", 1, too_long(masker.options.max_line_bytes)));
    }
    let text = std::str::from_utf8(&line.bytes).map_err(|error| {
        let before = String::from_utf8_lossy(&line.bytes[..error.valid_up_to()]);
        located(
            line,
            "",
            before.chars().count() + 1,
            not_utf8(&line.bytes, error.valid_up_to()),
        )
    })?;
    if text.trim_ascii().is_empty() {
        return Ok(None);
    }
    parse(line, text, masker).map(Some).map_err(|fault| {
        let column = fault.column.unwrap_or_else(|| json::column_of(text, &fault.at));
        located(line, &fault.field(), column, fault)
    })
}

/// The first `n` rows of a file, one after another.
pub(crate) fn first_rows(path: &Path, masker: &Masker, n: usize) -> Result<Vec<Result<Row, RowError>>> {
    let mut lines = Lines::open(path, masker.options.max_line_bytes).map_err(|error| Error::io(path, error))?;
    let mut rows = Vec::new();
    while rows.len() < n {
        let Some(line) = lines.next_line().map_err(|error| Error::io(path, error))? else {
            break;
        };
        let row = row_of(&line, masker).map_err(|error| RowError {
            path: path.into(),
            ..error
        });
        rows.extend(row.transpose());
    }
    Ok(rows)
}

fn parse(line: &Line, text: &str, masker: &Masker) -> Result<Row, Fault> {
    let options = masker.options;
    let object = json::parse_object(text, line.terminated)?;
    let format = match options.format {
        Some(format) => format,
        None => options.fields.infer(&object)?,
    };
    let record = Record::from_row(&object, format, &options.fields)?;
    Ok(Row {
        line: line.number,
        format,
        provenance: Provenance::from_row(&object)?,
        margin: match &record {
            Record::Preference(pair) => pair.margin,
            _ => None,
        },
        n_fields: object.len(),
        extra_fields: extra_fields(&object, options),
        samples: masker.samples(&record)?,
    })
}

fn extra_fields(object: &Map<String, Value>, options: &DataOptions) -> Vec<String> {
    const USED: [&str; 14] = [
        "system",
        "tools",
        "template_kwargs",
        "margin",
        "auth_weight",
        "prov_entropy",
        "source_type",
        "evidence",
        "scoring",
        "scoring_method",
        "year",
        "citation_count",
        "primary_source_count",
        "metadata",
    ];
    let names = options.fields.known();
    object
        .keys()
        .filter(|key| !USED.contains(&key.as_str()) && !names.contains(&key.as_str()))
        .cloned()
        .collect()
}

pub(crate) fn located(line: &Line, field: &str, column: usize, fault: Fault) -> RowError {
    RowError {
        path: PathBuf::new(),
        line: line.number,
        column,
        field: field.into(),
        kind: fault.kind,
        message: fault.message,
        fix: fault.fix,
    }
}

fn not_utf8(bytes: &[u8], at: usize) -> Fault {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") || bytes.starts_with(b"\0{") {
        return Fault::new(
            RowErrorKind::Encoding,
            "expected UTF-8, found UTF-16",
            "save the file as UTF-8",
        );
    }
    Fault::new(
        RowErrorKind::Encoding,
        format!("expected UTF-8, found the byte 0x{:02x}", bytes[at]),
        "save the file as UTF-8",
    )
}

fn too_long(limit: usize) -> Fault {
    Fault::new(
        RowErrorKind::LineTooLong,
        format!("the line is longer than {limit} bytes"),
        "split the row, or check that rows end with a line break",
    )
}
