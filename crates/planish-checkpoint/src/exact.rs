use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An f64 that survives JSON to the last bit, infinities and NaN included.
///
/// Written as `{"value": 0.1, "bits": "3fb999999999999a"}`: the shortest decimal that reads back as the same number, for
/// people, and the IEEE 754 bits, for us. Non-finite values have a `null` value. Two fields that disagree are an error:
/// someone changed one of them.
///
/// ```
/// use planish_checkpoint::ExactF64;
/// let text = serde_json::to_string(&ExactF64(0.1))?;
/// assert_eq!(text, r#"{"value":0.1,"bits":"3fb999999999999a"}"#);
/// assert_eq!(serde_json::from_str::<ExactF64>(&text)?, ExactF64(0.1));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct ExactF64(pub f64);

/// Equal bits: NaN equals itself, and 0 differs from -0.
impl PartialEq for ExactF64 {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl Eq for ExactF64 {}

impl From<f64> for ExactF64 {
    fn from(value: f64) -> Self {
        Self(value)
    }
}

impl fmt::Display for ExactF64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    value: Option<f64>,
    bits: String,
}

impl Serialize for ExactF64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value = self.0.is_finite().then_some(self.0);
        Raw {
            value,
            bits: format!("{:016x}", self.0.to_bits()),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ExactF64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Raw::deserialize(deserializer)?;
        let is_hex = raw.bits.len() == 16
            && raw
                .bits
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let Some(exact) = u64::from_str_radix(&raw.bits, 16)
            .ok()
            .filter(|_| is_hex)
            .map(f64::from_bits)
        else {
            return Err(D::Error::custom(format!(
                "`bits` is {:?}, expected 16 lower-case hexadecimal digits",
                raw.bits
            )));
        };
        if exact.is_finite().then_some(exact.to_bits()) != raw.value.map(f64::to_bits) {
            let value = raw.value.map_or("null".to_string(), |v| v.to_string());
            return Err(D::Error::custom(format!(
                "`value` {value} and `bits` {} are different numbers",
                raw.bits
            )));
        }
        Ok(Self(exact))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check_refused(json: &str, expect: &str) {
        let error = serde_json::from_str::<ExactF64>(json).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }

    #[test]
    fn err_fields_that_disagree() {
        check_refused(r#"{"value":0.2,"bits":"3fb999999999999a"}"#, "different numbers");
        check_refused(r#"{"value":null,"bits":"3fb999999999999a"}"#, "different numbers");
        check_refused(r#"{"value":0.1,"bits":"+fb999999999999a"}"#, "hexadecimal");
        check_refused("0.1", "invalid type");
    }

    #[test]
    fn non_finite_values_survive() {
        for value in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, -0.0] {
            let text = serde_json::to_string(&ExactF64(value)).unwrap();
            assert_eq!(
                serde_json::from_str::<ExactF64>(&text).unwrap(),
                ExactF64(value),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn prop_every_bit_pattern_survives_twice(bits in any::<u64>()) {
            let once = serde_json::to_string(&ExactF64(f64::from_bits(bits))).unwrap();
            let back: ExactF64 = serde_json::from_str(&once).unwrap();
            prop_assert_eq!(back.0.to_bits(), bits);
            prop_assert_eq!(serde_json::to_string(&back).unwrap(), once);
        }
    }
}
