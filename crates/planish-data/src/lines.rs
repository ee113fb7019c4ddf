//! Reading a file line by line without ever holding more than one bounded line. What gzip has compressed is unpacked on the
//! way, and a record of a table (`.csv`, `.tsv`) is a line of JSON.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

use crate::csv::{self, Columns};

/// One line of a file, without its line break.
pub(crate) struct Line {
    /// From 1.
    pub(crate) number: usize,
    /// What the line holds; at most the limit.
    pub(crate) bytes: Vec<u8>,
    /// The line was longer than the limit, and the rest was passed over.
    pub(crate) too_long: bool,
    /// A line break followed.
    pub(crate) terminated: bool,
}

/// The lines of a file, with what was met at their ends.
pub(crate) struct Lines {
    reader: Box<dyn BufRead + Send>,
    /// The separator of a table, and its columns once they are read.
    table: Option<(char, Option<Columns>)>,
    limit: usize,
    number: usize,
    digest: Sha256,
    /// Lines that begin with the UTF-8 byte-order mark, which was passed over: the first, or one where files were joined.
    pub(crate) byte_order_marks: usize,
    /// Lines that ended with carriage return and line feed.
    pub(crate) crlf: usize,
}

const CHUNK: usize = 1 << 16;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

impl Lines {
    pub(crate) fn open(path: &Path, limit: usize) -> io::Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.is_dir() {
            return Err(io::Error::new(
                io::ErrorKind::IsADirectory,
                "expected a file, found a directory",
            ));
        }
        let mut file = BufReader::with_capacity(CHUNK, file);
        let is_gzip = file.fill_buf()?.starts_with(&[0x1f, 0x8b]);
        Ok(Self {
            reader: if is_gzip {
                Box::new(BufReader::with_capacity(CHUNK, MultiGzDecoder::new(file)))
            } else {
                Box::new(file)
            },
            table: separator(path).map(|separator| (separator, None)),
            limit,
            number: 0,
            digest: Sha256::new(),
            byte_order_marks: 0,
            crlf: 0,
        })
    }

    /// The next line, or nothing at the end.
    pub(crate) fn next_line(&mut self) -> io::Result<Option<Line>> {
        if self.table.is_none() {
            return self.raw_line();
        }
        let Some(mut line) = self.record()? else {
            return Ok(None);
        };
        let Some((separator, columns)) = &mut self.table else {
            return Ok(Some(line));
        };
        let Ok(text) = std::str::from_utf8(&line.bytes) else {
            return Ok(Some(line));
        };
        let Some(columns) = columns else {
            *columns = Some(Columns::new(text, *separator));
            // The header is a line without a row.
            line.bytes.clear();
            return Ok(Some(line));
        };
        if !text.trim().is_empty() && !line.too_long {
            line.bytes = columns.json_line(text).into_bytes();
        }
        Ok(Some(line))
    }

    /// A record of a table: a line, and more where its quotes go on.
    fn record(&mut self) -> io::Result<Option<Line>> {
        let Some(mut line) = self.raw_line()? else {
            return Ok(None);
        };
        while !csv::is_complete(&line.bytes) && !line.too_long {
            let Some(more) = self.raw_line()? else { break };
            line.bytes.push(b'\n');
            line.bytes.extend(more.bytes);
            line.too_long = more.too_long || line.bytes.len() > self.limit;
            line.terminated = more.terminated;
        }
        Ok(Some(line))
    }

    fn raw_line(&mut self) -> io::Result<Option<Line>> {
        let mut line = Line {
            number: self.number + 1,
            bytes: Vec::new(),
            too_long: false,
            terminated: false,
        };
        let mut any = false;
        while !line.terminated {
            let chunk = self.reader.fill_buf()?;
            if chunk.is_empty() {
                break;
            }
            any = true;
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let content = &chunk[..end.unwrap_or(chunk.len())];
            let room = self.limit.saturating_sub(line.bytes.len());
            line.too_long |= content.len() > room;
            line.bytes.extend_from_slice(&content[..content.len().min(room)]);
            line.terminated = end.is_some();
            let used = content.len() + usize::from(line.terminated);
            self.digest.update(&chunk[..used]);
            self.reader.consume(used);
        }
        if !any {
            return Ok(None);
        }
        self.number += 1;
        self.trim_ends(&mut line);
        Ok(Some(line))
    }

    /// SHA-256 of everything that was read, in hexadecimal.
    pub(crate) fn sha256(self) -> String {
        crate::hex(&self.digest.finalize())
    }

    fn trim_ends(&mut self, line: &mut Line) {
        if line.bytes.starts_with(BYTE_ORDER_MARK) {
            line.bytes.drain(..BYTE_ORDER_MARK.len());
            self.byte_order_marks += 1;
        }
        if !line.too_long && line.terminated && line.bytes.last() == Some(&b'\r') {
            line.bytes.pop();
            self.crlf += 1;
        }
    }
}

/// What separates the cells of a table, by the name of its file.
fn separator(path: &Path) -> Option<char> {
    let name = path.file_name()?.to_str()?.to_lowercase();
    match name.strip_suffix(".gz").unwrap_or(&name).rsplit_once('.')?.1 {
        "csv" => Some(','),
        "tsv" => Some('\t'),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], limit: usize) -> (Vec<Line>, usize, usize) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let mut lines = Lines::open(file.path(), limit).unwrap();
        let mut all = Vec::new();
        while let Some(line) = lines.next_line().unwrap() {
            all.push(line);
        }
        (all, lines.byte_order_marks, lines.crlf)
    }

    #[test]
    fn marks_line_ends_and_lengths_are_told() {
        let (lines, bom, crlf) = read(b"\xef\xbb\xbfab\r\n\nabcdefgh\nlast", 7);
        assert_eq!(bom, 1);
        assert_eq!(crlf, 1);
        let got: Vec<_> = lines
            .iter()
            .map(|l| (l.number, l.bytes.as_slice(), l.too_long, l.terminated))
            .collect();
        assert_eq!(
            got,
            [
                (1, b"ab".as_slice(), false, true),
                (2, b"", false, true),
                (3, b"abcdefg", true, true),
                (4, b"last", false, false)
            ]
        );
    }

    #[test]
    fn a_long_line_holds_no_more_than_the_limit() {
        let mut bytes = vec![b'x'; 3_000_000];
        bytes.extend_from_slice(b"\nafter");
        let (lines, ..) = read(&bytes, 1000);
        assert!(lines[0].too_long && lines[0].bytes.len() == 1000);
        assert_eq!(lines[1].bytes, b"after");
    }
}
