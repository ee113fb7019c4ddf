use std::fmt;

use serde::Serialize;

use super::retention::Retention;

/// What became of one module.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleRetention {
    /// Its path.
    pub module: String,
    /// How its weight is stored, such as `BF16` or `4 bits, groups of 64`.
    pub stored_as: String,
    /// The judgement.
    pub verdict: Verdict,
    /// The numbers; absent when the update is zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
}

/// Whether enough of an update is left, by its cosine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// At least 0.98.
    Pass,
    /// At least 0.90.
    Warn,
    /// Less.
    Fail,
    /// The update is zero.
    NoChange,
}

/// What a fuse did, or would do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FuseReport {
    /// Version of this layout.
    pub schema: u32,
    /// Whether the fused model was written.
    pub written: bool,
    /// Shards written.
    pub files: Vec<String>,
    /// Median of the cosines; absent when no module changed.
    pub median_cosine: Option<f64>,
    /// The adapted modules, sorted by path.
    pub modules: Vec<ModuleRetention>,
}

/// Modules shown in the table.
const SHOWN: usize = 10;

impl Verdict {
    pub(super) fn of(retention: Option<&Retention>) -> Self {
        match retention.map(|r| r.cosine) {
            None => Self::NoChange,
            Some(cosine) if cosine >= 0.98 => Self::Pass,
            Some(cosine) if cosine >= 0.90 => Self::Warn,
            Some(_) => Self::Fail,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Warn => "warn",
            Self::Fail => "fail",
            Self::NoChange => "no-change",
        }
    }
}

impl FuseReport {
    pub(super) fn new(mut modules: Vec<ModuleRetention>) -> Self {
        modules.sort_by(|a, b| a.module.cmp(&b.module));
        let mut cosines: Vec<f64> = modules.iter().filter_map(|m| Some(m.retention?.cosine)).collect();
        cosines.sort_by(f64::total_cmp);
        let median_cosine = cosines.get(cosines.len() / 2).copied();
        Self {
            schema: 1,
            written: false,
            files: Vec::new(),
            median_cosine,
            modules,
        }
    }

    /// The module that lost most, if any changed.
    pub fn worst(&self) -> Option<&ModuleRetention> {
        self.by_cosine().first().copied()
    }

    fn by_cosine(&self) -> Vec<&ModuleRetention> {
        let cosine = |module: &ModuleRetention| module.retention.map_or(f64::INFINITY, |r| r.cosine);
        let mut sorted: Vec<&ModuleRetention> = self.modules.iter().filter(|m| m.retention.is_some()).collect();
        sorted.sort_by(|a, b| cosine(a).total_cmp(&cosine(b)));
        sorted
    }
}

/// The worst modules and the median, as a table.
impl fmt::Display for FuseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let worst = self.by_cosine();
        writeln!(
            f,
            "{:<9} {:>8} {:>9} {:>7} {:>10}  module",
            "verdict", "cosine", "rel error", "gain", "delta rms"
        )?;
        for (module, r) in worst.iter().take(SHOWN).filter_map(|m| Some((m, m.retention?))) {
            let (verdict, name) = (module.verdict.name(), &module.module);
            let numbers = format!(
                "{:>8.4} {:>9.4} {:>7.4} {:>10.3e}",
                r.cosine, r.rel_error, r.gain, r.delta_rms
            );
            writeln!(f, "{verdict:<9} {numbers}  {name} ({})", module.stored_as)?;
        }
        if worst.len() > SHOWN {
            writeln!(f, "… and {} modules that kept more", worst.len() - SHOWN)?;
        }
        let unchanged = self.modules.len() - worst.len();
        let median = self
            .median_cosine
            .map_or("none".to_string(), |cosine| format!("{cosine:.4}"));
        write!(
            f,
            "median cosine {median}, {} modules, {unchanged} without change",
            self.modules.len()
        )
    }
}
