//! Numbers that a device computed wrongly, read out of parity lines.

use super::incident::Find;
use super::lines::Sorted;
use crate::catalogue::{self, Strength};
use regex::Regex;
use std::sync::LazyLock;

/// Cosine of a device's result with the f32 result of the CPU below which it is wrong (bf16 and f16; see `predict`).
const MIN_COSINE: f64 = 0.999;
/// Relative error above which an f32 result is wrong.
const MAX_RELATIVE_F32: f64 = 1e-3;
/// No sane activation or product of the probe is this large; broken kernels gave 1e35.
const MAX_ABSOLUTE: f64 = 1e10;

/// Parity lines whose numbers are out of bounds.
pub(super) fn failures(sorted: &Sorted) -> Vec<Find> {
    let table = catalogue::entries();
    let Some(rank) = table.iter().position(|entry| entry.code == "PARITY_FAIL") else {
        return Vec::new();
    };
    let out = sorted.live().filter(|(_, line)| is_out_of_bounds(line));
    out.map(|(index, _)| Find {
        entry: &table[rank],
        rank,
        rule: None,
        first: index,
        last: index,
        strength: Strength::Specific,
        phase_only: false,
    })
    .collect()
}

fn is_out_of_bounds(line: &str) -> bool {
    let is_f32 = line.to_lowercase().contains("f32") || line.to_lowercase().contains("float32");
    MEASURED.as_ref().is_some_and(|measured| {
        measured
            .captures_iter(line)
            .any(|found| match found[1].to_lowercase().as_str() {
                name if name.starts_with("cos") => value(&found[2]).is_nan() || value(&found[2]) < MIN_COSINE,
                name if name.starts_with("max_rel") || name.starts_with("rel") => {
                    !value(&found[2]).is_finite() || (is_f32 && value(&found[2]) > MAX_RELATIVE_F32)
                }
                _ => value(&found[2]).is_nan() || value(&found[2]).abs() >= MAX_ABSOLUTE,
            })
    })
}

fn value(text: &str) -> f64 {
    text.trim_end_matches(',').parse().unwrap_or(f64::NAN)
}

static MEASURED: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"(?i)\b(cos(?:ine)?(?:[ _]?sim(?:ilarity)?)?|max[ _]?abs(?:[ _]?(?:err(?:or)?|diff))?|max[ _]?rel(?:[ _]?err(?:or)?)?|rel[ _]?err(?:or)?)\b\W{0,4}(?:=|:|is)?\s*(-?nan|[-+]?inf(?:inity)?|[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?:\b|$)").ok()
});

#[cfg(test)]
mod tests {
    use super::is_out_of_bounds;

    #[test]
    fn numbers_decide() {
        for wrong in [
            "parity bf16 M=512   cos nan         max_abs inf",
            "cos 0.0000000 max_abs 5.2e+35",
            "bf16 m9 cosine: 0.41",
            "f32 M=8 max_rel 0.02",
            "cosine = -nan",
        ] {
            assert!(is_out_of_bounds(wrong), "{wrong}");
        }
        for right in [
            "parity bf16 M=512 cos 0.9999998 max_abs 3.1e-2",
            "f32 max_rel 2.1e-5",
            "cos 1.0000000",
            "f16 max_rel 0.01 cos 0.9998",
            "cosine schedule 0.5",
            "cost 3",
        ] {
            assert!(!is_out_of_bounds(right), "{right}");
        }
    }
}
