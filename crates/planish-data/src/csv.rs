//! Tables as rows: each record of a CSV file becomes a line of JSON, so that everything after reading is the same.
//!
//! RFC 4180: fields in double quotes may hold separators, line ends and doubled quotes. Empty cells are absent. A cell of a
//! list or an object (`messages`, `tools`) is a string of JSON, as tables hold it.

use crate::json::{self, Map, Value};

/// The columns of a table.
#[derive(Debug)]
pub(crate) struct Columns {
    names: Vec<String>,
    separator: char,
}

impl Columns {
    pub(crate) fn new(header: &str, separator: char) -> Self {
        Self {
            names: cells(header, separator)
                .iter()
                .map(|name| name.trim().to_string())
                .collect(),
            separator,
        }
    }

    /// A record as a line of JSON. More cells than columns are an object's fault: they are put under a name that nothing
    /// reads.
    pub(crate) fn json_line(&self, record: &str) -> String {
        let mut row = Map::new();
        for (index, cell) in cells(record, self.separator).into_iter().enumerate() {
            if cell.is_empty() {
                continue;
            }
            let name = self
                .names
                .get(index)
                .cloned()
                .unwrap_or_else(|| format!("column {}", index + 1));
            let value = value(&name, cell);
            row.insert(name, value);
        }
        Value::Object(row).to_string()
    }
}

/// Whether the quotes of a record are closed; if not, it goes on in the next line.
pub(crate) fn is_complete(record: &[u8]) -> bool {
    record.iter().filter(|byte| **byte == b'"').count().is_multiple_of(2)
}

fn value(name: &str, cell: String) -> Value {
    match (name, cell.to_ascii_lowercase().as_str()) {
        ("label", "true") => Value::Bool(true),
        ("label", "false") => Value::Bool(false),
        _ if cell.starts_with(['[', '{']) => match json::parse(&cell) {
            Some(value @ (Value::Array(_) | Value::Object(_))) => value,
            _ => Value::String(cell),
        },
        _ => Value::String(cell),
    }
}

fn cells(record: &str, separator: char) -> Vec<String> {
    let mut cells = Vec::new();
    let mut cell = String::new();
    let mut quoted = false;
    let mut characters = record.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                cell.push('"');
            }
            '"' if quoted || cell.is_empty() => quoted = !quoted,
            other if other == separator && !quoted => cells.push(std::mem::take(&mut cell)),
            other => cell.push(other),
        }
    }
    cells.push(cell);
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_become_rows() {
        let columns = Columns::new("instruction,input,output,messages,label", ',');
        let check = |record: &str, expect: &str| assert_eq!(columns.json_line(record), expect);
        check("a,,b", r#"{"instruction":"a","output":"b"}"#);
        check("\"a, \"\"b\"\"\nc\",d", r#"{"instruction":"a, \"b\"\nc","input":"d"}"#);
        check(
            ",,,\"[{\"\"role\"\": 1}]\",True",
            r#"{"messages":[{"role":1}],"label":true}"#,
        );
        check(
            "1,2,3,[x,false,more",
            r#"{"instruction":"1","input":"2","output":"3","messages":"[x","label":false,"column 6":"more"}"#,
        );
        assert!(!is_complete(b"a,\"b") && is_complete(b"a,\"b\"\"c\""));
    }
}
