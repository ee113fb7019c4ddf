//! One line to one row: parsed, checked, rendered, tokenised. No line knows of another here.

use std::path::{Path, PathBuf};

use crate::error::{Error, Fault, Result, RowError, RowErrorKind};
use crate::format::Format;
use crate::json::{self, Map, Value};
use crate::layout::Layout;
use crate::lines::{Line, Lines};
use crate::mask::{Masker, Samples};
use crate::notes::{Note, NoteKind};
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
    pub(crate) layout: Layout,
    /// The row says itself that its answer is a bad one, and has no samples.
    pub(crate) is_bad_answer: bool,
    /// What the author of the row should know.
    pub(crate) notes: Vec<Note>,
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
    let row = json::parse_object(text, line.terminated)?;
    let layout = Layout::of(&row, &options.fields, options.format);
    let read = || {
        let own = layout.read(&row, &options.fields)?;
        let format = match options.format {
            Some(format) if layout == Layout::Own || layout == Layout::Trl => format,
            _ => options.fields.infer(&own)?,
        };
        let is_bad_answer = is_bad_answer(&own, format);
        let record = Record::from_row(&own, format, &options.fields)?;
        let (samples, mut notes) = if is_bad_answer {
            (Samples::Unrolled(Vec::new()), Vec::new())
        } else {
            masker.samples(&record)?
        };
        notes.extend(unread(&row, layout, format, options));
        if let Some(note) = notes.iter().find(|note| options.strict && note.kind == NoteKind::Lost) {
            let fix = "remove the field, or set data.strict = false";
            return Err(Fault::new(RowErrorKind::Unused, note.text.clone(), fix));
        }
        Ok(Row {
            line: line.number,
            format,
            layout,
            is_bad_answer,
            provenance: Provenance::from_row(&own)?,
            margin: match &record {
                Record::Preference(pair) => pair.margin,
                _ => None,
            },
            n_fields: row.len(),
            notes,
            samples,
        })
    };
    read().map_err(|fault| layout.fault(fault, &row, &options.fields))
}

/// Whether a row says that nobody wants its answer, as rows for KTO do.
fn is_bad_answer(row: &Map, format: Format) -> bool {
    let is_conversation = matches!(format, Format::Completions | Format::Chat | Format::Tools);
    is_conversation && row.get("label") == Some(&Value::Bool(false))
}

/// Fields of a row that nothing reads in its format.
fn unread(row: &Map, layout: Layout, format: Format, options: &DataOptions) -> Vec<Note> {
    const OF_ALL: [&str; 10] = [
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
    let names = &options.fields;
    let is_read = |name: &str| {
        let rendered = format != Format::Text && matches!(name, "tools" | "template_kwargs");
        rendered
            || layout.reads(name)
            || match format {
                Format::Text => name == names.text,
                Format::Completions => [&names.prompt, &names.completion].iter().any(|known| *known == name),
                Format::Chat | Format::Tools => name == names.messages,
                Format::Preference => {
                    [&names.prompt, &names.chosen, &names.rejected]
                        .iter()
                        .any(|known| *known == name)
                        || name == "margin"
                }
            }
            || match name {
                "system" => layout != Layout::Own || matches!(format, Format::Completions | Format::Preference),
                "label" => is_label(row, format),
                _ => OF_ALL.contains(&name),
            }
    };
    let said = row.iter().filter(|(_, value)| !value.is_null());
    said.filter(|(name, _)| !is_read(name))
        .map(|(name, _)| Note::unread(name))
        .collect()
}

fn is_label(row: &Map, format: Format) -> bool {
    matches!(row.get("label"), Some(Value::Bool(_))) && !matches!(format, Format::Text | Format::Preference)
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
