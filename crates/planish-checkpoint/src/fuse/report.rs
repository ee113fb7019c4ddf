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
    /// The element type of the base, where floats are stored in f32 because rounding to it would lose an update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub widened_from: Option<String>,
    /// Median of the cosines; absent when no module changed.
    pub median_cosine: Option<f64>,
    /// Logits of the fused model against those of base and adapter; absent when nobody looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logits: Option<LogitsCheck>,
    /// The adapted modules, sorted by path.
    pub modules: Vec<ModuleRetention>,
}

/// How the fused model's logits compare with those of base and adapter, over all positions of some prompts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LogitsCheck {
    /// Prompts compared.
    pub prompts: usize,
    /// Positions compared.
    pub positions: usize,
    /// Largest difference of a logit.
    pub max_abs: f64,
    /// Largest logit in size, which says what that difference is worth.
    pub max_logit: f64,
    /// Mean of `KL(adapter ‖ fused)` in nats.
    pub mean_kl: f64,
    /// Share of positions at which the likeliest token is the same, or within [`TIE`](Self::TIE) of it before fusing.
    pub top1: f64,
}

impl LogitsCheck {
    /// Tokens nearer than this, relative to the largest logit, are as likely as each other: bf16 tells no finer.
    pub const TIE: f64 = 1.0 / 128.0;

    /// At most 0.01 nats, and the same likeliest token at 99 % of the positions.
    pub fn is_close(&self) -> bool {
        self.mean_kl <= 0.01 && self.top1 >= 0.99
    }

    /// Compares rows of logits, `[positions, vocab_size]` of each prompt.
    ///
    /// ```
    /// use planish_checkpoint::fuse::LogitsCheck;
    /// let check = LogitsCheck::compare(&[vec![1.0, 2.0]], &[vec![1.0, 2.5]], 2);
    /// assert_eq!((check.positions, check.max_abs, check.top1), (1, 0.5, 1.0));
    /// assert!(!LogitsCheck::compare(&[vec![1.0, 2.0]], &[vec![2.0, 1.0]], 2).is_close());
    /// ```
    pub fn compare(adapter: &[Vec<f32>], fused: &[Vec<f32>], vocab_size: usize) -> Self {
        let size = |row: &[f32]| row.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max);
        let max_logit = adapter.iter().map(|rows| size(rows)).fold(0.0, f64::max);
        let (mut positions, mut max_abs, mut kl, mut same) = (0, 0.0, 0.0, 0);
        let rows = |prompts: &[Vec<f32>]| prompts.iter().flat_map(|rows| rows.chunks_exact(vocab_size)).count();
        debug_assert_eq!(rows(adapter), rows(fused));
        for (before, after) in adapter.iter().zip(fused) {
            for (before, after) in before.chunks_exact(vocab_size).zip(after.chunks_exact(vocab_size)) {
                positions += 1;
                for (one, other) in before.iter().zip(after) {
                    max_abs = f64::max(max_abs, f64::from((one - other).abs()));
                }
                kl += divergence(before, after);
                let (first, now) = (likeliest(before), likeliest(after));
                same += usize::from(f64::from(before[first] - before[now]) <= Self::TIE * max_logit);
            }
        }
        let count = positions.max(1) as f64;
        Self {
            prompts: adapter.len(),
            positions,
            max_abs,
            max_logit,
            mean_kl: kl / count,
            top1: same as f64 / count,
        }
    }
}

impl fmt::Display for LogitsCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "logits on {} prompts ({} positions): largest difference {:.2e} (logits up to {:.1}), mean KL {:.2e}, same \
             likeliest token at {:.1} %",
            self.prompts,
            self.positions,
            self.max_abs,
            self.max_logit,
            self.mean_kl,
            self.top1 * 100.0
        )
    }
}

/// `KL(softmax(p) ‖ softmax(q))` in f64; infinite when `q` is not a number somewhere.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (log_p, log_q) = (log_sum_exp(p), log_sum_exp(q));
    let terms = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (f64::from(*p) - log_p, f64::from(*q) - log_q);
        p.exp() * (p - q)
    });
    let sum: f64 = terms.sum();
    if sum.is_nan() { f64::INFINITY } else { sum.max(0.0) }
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + row.iter().map(|v| (f64::from(*v) - max).exp()).sum::<f64>().ln()
}

fn likeliest(row: &[f32]) -> usize {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap_or(0)
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
            widened_from: None,
            median_cosine,
            logits: None,
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
        )?;
        if let Some(dtype) = &self.widened_from {
            write!(
                f,
                "\nstored as F32: rounding to {dtype}, the type of the base, would lose much of the update"
            )?;
        }
        self.logits.iter().try_for_each(|check| write!(f, "\n{check}"))
    }
}
