//! The distrust fields of a row: how much authority and how much independent evidence stand behind a text.

use crate::error::{Fault, RowErrorKind};
use crate::json::{Map, Value};
use crate::record::wrong_type;

/// What a row says about its source; checked, and kept in f64 because the weights that follow from it need it.
#[derive(Debug, Clone, PartialEq)]
pub struct Provenance {
    /// Authority, 0 to 0.99.
    pub auth_weight: f64,
    /// Entropy of the evidence in bits, finite and not negative.
    pub prov_entropy: f64,
    /// A free label.
    pub source_type: Option<String>,
    /// How the numbers came about.
    pub scoring: Scoring,
}

/// How the numbers of a row came about; entropies of different scales must not meet in one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scoring {
    /// Written by hand, or of unknown origin.
    Given,
    /// Computed from a list of evidence: at most 3.7 bits.
    Evidence,
    /// The prior of the source type.
    Prior,
    /// Our keyword score, version 1.
    HeuristicV1,
    /// A placeholder for texts too short to score.
    Default,
    /// Of another program's scorer.
    Foreign,
}

impl Scoring {
    /// Whether entropies of both may be compared.
    pub(crate) fn mixes_with(self, other: Self) -> bool {
        let keyword_scale =
            |scoring| matches!(scoring, Self::Prior | Self::HeuristicV1 | Self::Default | Self::Foreign);
        !((self == Self::Evidence && keyword_scale(other)) || (other == Self::Evidence && keyword_scale(self)))
    }
}

/// Kinds of roots that evidence can go back to.
pub(crate) const EVIDENCE_KINDS: [&str; 13] = [
    "patent",
    "lab notebook",
    "experiment log",
    "measurement",
    "correspondence",
    "oral history",
    "archive",
    "academic",
    "textbook",
    "news",
    "wiki",
    "government",
    "blog",
];

/// Shannon entropy in bits of shares given as counts: `-Σ p log2 p`. Counts of 0 say nothing; no counts give 0.
///
/// ```
/// assert_eq!(planish_data::shannon_bits(&[1.0, 1.0]), 1.0);
/// assert!((planish_data::shannon_bits(&[3.0, 1.0]) - 0.811278).abs() < 1e-6);
/// assert_eq!(planish_data::shannon_bits(&[]), 0.0);
/// ```
pub fn shannon_bits(counts: &[f64]) -> f64 {
    // In order of size, so that the order of the evidence cannot change the last digit.
    let mut counts: Vec<f64> = counts.iter().copied().filter(|count| *count > 0.0).collect();
    counts.sort_by(f64::total_cmp);
    let total: f64 = counts.iter().sum();
    let bits: f64 = counts
        .iter()
        .map(|count| count / total)
        .map(|share| -share * share.log2())
        .sum();
    bits.max(0.0)
}

impl Provenance {
    /// The distrust fields of a row: both numbers, the first and a list of evidence, or neither.
    pub(crate) fn from_row(row: &Map) -> Result<Option<Self>, Fault> {
        let auth_weight = number(row, "auth_weight")?;
        let given_entropy = number(row, "prov_entropy")?;
        let evidence = evidence_entropy(row)?;
        let Some(auth_weight) = auth_weight else {
            return match given_entropy.or(evidence) {
                None => Ok(None),
                Some(_) => Err(half("auth_weight")),
            };
        };
        if !(0.0..=0.99).contains(&auth_weight) {
            return Err(out_of_range("auth_weight", auth_weight, "a number from 0 to 0.99"));
        }
        if let Some(entropy) = given_entropy.filter(|entropy| *entropy < 0.0) {
            return Err(out_of_range("prov_entropy", entropy, "a number of 0 or more"));
        }
        let scoring = scoring(row)?;
        let (prov_entropy, scoring) = match (given_entropy, evidence) {
            (None, None) => return Err(half("prov_entropy")),
            (Some(entropy), None) => (entropy, scoring.unwrap_or(Scoring::Given)),
            (None, Some(bits)) => (bits, Scoring::Evidence),
            (Some(entropy), Some(bits)) if (entropy - bits).abs() <= 5e-4 => (bits, Scoring::Evidence),
            (Some(entropy), Some(bits)) => {
                return Err(Fault::new(
                    RowErrorKind::Value,
                    format!("the evidence gives {bits:.4} bits, and prov_entropy says {entropy}"),
                    "give one of the two",
                )
                .under("prov_entropy"));
            }
        };
        Ok(Some(Self {
            auth_weight,
            prov_entropy,
            source_type: label(row)?,
            scoring,
        }))
    }
}

/// The entropy of `evidence: [{kind, count?}]`, when a row has it.
pub(crate) fn evidence_entropy(row: &Map) -> Result<Option<f64>, Fault> {
    let list = match row.get("evidence") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type("list of evidence", other).under("evidence")),
    };
    let mut counts = [0.0; EVIDENCE_KINDS.len()];
    for (index, item) in list.iter().enumerate() {
        let (kind, count) = evidence_item(item).map_err(|fault| fault.under_index(index).under("evidence"))?;
        counts[kind] += count;
    }
    if counts.iter().all(|count| *count == 0.0) {
        return Err(Fault::new(
            RowErrorKind::Empty,
            "the evidence counts nothing",
            "name at least one piece, or leave it out",
        )
        .under("evidence"));
    }
    Ok(Some(shannon_bits(&counts)))
}

fn evidence_item(item: &Value) -> Result<(usize, f64), Fault> {
    let Value::Object(object) = item else {
        return Err(wrong_type("object with \"kind\"", item));
    };
    let kind = match object.get("kind") {
        Some(Value::String(kind)) => kind.replace(['_', '-'], " "),
        Some(other) => return Err(wrong_type("string", other).under("kind")),
        None => return Err(half("kind")),
    };
    let index = EVIDENCE_KINDS.iter().position(|known| *known == kind).ok_or_else(|| {
        Fault::new(
            RowErrorKind::Value,
            format!("{kind:?} is no kind of evidence"),
            format!("use one of: {}", EVIDENCE_KINDS.join(", ")),
        )
        .under("kind")
    })?;
    let count = number(object, "count")?.unwrap_or(1.0);
    if count < 0.0 {
        return Err(out_of_range("count", count, "a number of 0 or more"));
    }
    Ok((index, count))
}

fn scoring(row: &Map) -> Result<Option<Scoring>, Fault> {
    let (name, value) = match (row.get("scoring"), row.get("scoring_method")) {
        (Some(value), _) if !value.is_null() => ("scoring", value),
        (_, Some(value)) if !value.is_null() => ("scoring_method", value),
        _ => return Ok(None),
    };
    let Value::String(text) = value else {
        return Err(wrong_type("string", value).under(name));
    };
    match text.as_str() {
        "given" => Ok(Some(Scoring::Given)),
        "evidence" => Ok(Some(Scoring::Evidence)),
        "prior" => Ok(Some(Scoring::Prior)),
        "heuristic-v1" => Ok(Some(Scoring::HeuristicV1)),
        "default" => Ok(Some(Scoring::Default)),
        "hybrid" | "dynamic" => Ok(Some(Scoring::Foreign)),
        other => Err(Fault::new(
            RowErrorKind::Value,
            format!("{other:?} is no way of scoring"),
            "use given, evidence, prior, heuristic-v1 or default",
        )
        .under(name)),
    }
}

fn label(row: &Map) -> Result<Option<String>, Fault> {
    match row.get("source_type") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(label)) => Ok(Some(label.clone())),
        Some(other) => Err(wrong_type("string", other).under("source_type")),
    }
}

pub(crate) fn number(row: &Map, name: &str) -> Result<Option<f64>, Fault> {
    match row.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(wrong_type("number", value).under(name)),
        },
    }
}

fn half(missing: &str) -> Fault {
    Fault::new(
        RowErrorKind::MissingField,
        format!("the field {missing:?} is missing"),
        "give auth_weight with prov_entropy or evidence, or none of them, in every row",
    )
}

fn out_of_range(name: &str, found: f64, expected: &str) -> Fault {
    Fault::new(
        RowErrorKind::Value,
        format!("expected {expected}, found {found}"),
        format!("write {expected}"),
    )
    .under(name)
}
