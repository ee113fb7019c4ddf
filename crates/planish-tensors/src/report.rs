use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use planish_core::units::format_bytes;

use super::dtype::Dtype;
use crate::error::{Error, Result};

/// How many findings of one kind are kept word for word; the others are counted.
pub const MAX_LISTED: usize = 20;

/// What happened to each tensor at loading.
///
/// Strict loading fails when any list has an entry. The texts are written for people; the counts are exact.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Tensors found with the expected name, shape and type.
    pub loaded: usize,
    /// Their bytes, by element type.
    pub bytes_by_dtype: BTreeMap<Dtype, u64>,
    /// Expected, not in the files.
    pub missing: Findings<String>,
    /// In the files, not expected.
    pub unexpected: Findings<String>,
    /// Unexpected tensors that a rule allowed; not a failure.
    pub ignored: Findings<String>,
    /// Of another shape than expected.
    pub shape: Findings<Mismatch>,
    /// Of a type that would lose information, or that is no weight.
    pub dtype: Findings<Mismatch>,
    /// In two shards.
    pub duplicate: Findings<String>,
    /// Named by the index, absent from the shard it names.
    pub misplaced: Findings<String>,
    /// In a shard, absent from the index.
    pub unlisted: Findings<String>,
    /// Shards named by the index that do not exist.
    pub missing_shard: Findings<String>,
    /// Shards in the folder that the index does not name.
    pub unused_shard: Findings<String>,
}

impl LoadReport {
    /// Whether everything fits.
    pub fn is_clean(&self) -> bool {
        self.count() == 0
    }

    /// Number of findings of all kinds.
    pub fn count(&self) -> usize {
        self.sections().iter().map(|section| section.count).sum::<usize>()
    }

    /// The report itself when it is clean.
    ///
    /// # Errors
    /// [`Error::Refused`] with the report when it is not.
    pub fn into_result(self, path: &Path) -> Result<Self> {
        if self.is_clean() {
            return Ok(self);
        }
        Err(Error::Refused {
            path: path.to_path_buf(),
            report: Box::new(self),
        })
    }

    fn sections(&self) -> [Section; 9] {
        [
            self.missing_shard.section("missing shard"),
            self.unused_shard.section("unused shard"),
            self.duplicate.section("duplicate"),
            self.misplaced.section("misplaced"),
            self.unlisted.section("not in the index"),
            self.missing.section("missing"),
            self.unexpected.section("unexpected"),
            self.shape.section("shape"),
            self.dtype.section("dtype"),
        ]
    }
}

/// One section a kind; a clean report is one line.
impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = format_bytes(self.bytes_by_dtype.values().sum());
        write!(f, "{} tensors loaded, {total}", self.loaded)?;
        for (i, (dtype, bytes)) in self.bytes_by_dtype.iter().enumerate() {
            write!(
                f,
                "{}{dtype} {}",
                if i == 0 { " (" } else { ", " },
                format_bytes(*bytes)
            )?;
        }
        if !self.bytes_by_dtype.is_empty() {
            f.write_str(")")?;
        }
        if self.ignored.count > 0 {
            write!(f, ", {} ignored as allowed", self.ignored.count)?;
        }
        for section in self.sections().iter().filter(|section| section.count > 0) {
            write!(f, "\n  {} ({}):", section.title, section.count)?;
            for line in &section.lines {
                write!(f, "\n    {line}")?;
            }
            if section.count > section.lines.len() {
                write!(f, "\n    … and {} more", section.count - section.lines.len())?;
            }
        }
        Ok(())
    }
}

struct Section {
    title: &'static str,
    count: usize,
    lines: Vec<String>,
}

/// Findings of one kind: the first [`MAX_LISTED`] of them, and how many there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Findings<T> {
    /// The first ones.
    pub listed: Vec<T>,
    /// All of them.
    pub count: usize,
}

impl<T> Default for Findings<T> {
    fn default() -> Self {
        Self {
            listed: Vec::new(),
            count: 0,
        }
    }
}

impl<T> Findings<T> {
    /// Counts one more; `describe` is called only when it will be listed.
    pub fn add(&mut self, describe: impl FnOnce() -> T) {
        if self.listed.len() < MAX_LISTED {
            self.listed.push(describe());
        }
        self.count += 1;
    }

    fn section(&self, title: &'static str) -> Section
    where
        T: fmt::Display,
    {
        Section {
            title,
            count: self.count,
            lines: self.listed.iter().map(T::to_string).collect(),
        }
    }
}

/// A tensor that is there, but not as expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The tensor.
    pub name: String,
    /// What was wanted.
    pub expected: String,
    /// What the file has.
    pub found: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}, found {}", self.name, self.expected, self.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_cut_but_counts_are_not() {
        let mut report = LoadReport {
            loaded: 3,
            ..LoadReport::default()
        };
        for i in 0..25 {
            report.missing.add(|| format!("w{i} [2, 2]"));
        }
        assert_eq!((report.missing.listed.len(), report.count()), (20, 25));
        let text = report.to_string();
        assert!(text.contains("missing (25):\n    w0 [2, 2]\n"), "{text}");
        assert!(text.ends_with("… and 5 more"), "{text}");
    }

    #[test]
    fn clean_report_is_one_line() {
        let bytes_by_dtype = BTreeMap::from([(Dtype::BF16, 2_000_000_000), (Dtype::F32, 4_000)]);
        let report = LoadReport {
            loaded: 2,
            bytes_by_dtype,
            ..LoadReport::default()
        };
        let text = report.to_string();
        assert!(
            text.starts_with("2 tensors loaded, 2") && text.contains("(BF16 2"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
    }
}
