use std::fmt;

/// What reading or writing an adapter had to do besides moving bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterReport {
    /// Modules padded with zeros to the common rank, which changes no update.
    pub padded: Vec<String>,
    /// Modules whose own scale went into `lora_b`.
    pub folded: Vec<FoldNote>,
    /// Modules of zeros, put in where a layer lacks a module that others have.
    pub holes: Vec<String>,
    /// Everything else worth knowing, as sentences.
    pub notes: Vec<String>,
}

/// A scale folded into `lora_b`, or out of it.
#[derive(Clone, Debug, PartialEq)]
pub struct FoldNote {
    /// The module.
    pub module: String,
    /// What `lora_b` was multiplied by.
    pub factor: f64,
    /// Whether every product was exact; otherwise each is within 1 ulp.
    pub exact: bool,
}

impl AdapterReport {
    /// Whether nothing but moving bytes was needed.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

/// One line a finding; nothing when there is none.
impl fmt::Display for AdapterReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = Vec::new();
        if !self.padded.is_empty() {
            lines.push(format!(
                "padded with zeros to the common rank: {}",
                self.padded.join(", ")
            ));
        }
        for fold in &self.folded {
            let exactness = if fold.exact { "exactly" } else { "within 1 ulp" };
            lines.push(format!(
                "{}: scale folded into lora_b by {}, {exactness}",
                fold.module, fold.factor
            ));
        }
        if !self.holes.is_empty() {
            lines.push(format!(
                "filled with zeros, because other layers have the module: {}",
                self.holes.join(", ")
            ));
        }
        lines.extend(self.notes.iter().cloned());
        f.write_str(&lines.join("\n"))
    }
}
