//! Which device a run uses, and why not another.

use crate::{Backend, Error, ProbeReport, Result, Verdict};

/// Picks a device: the asked-for one or nothing, or under [`Requested::Auto`] the first usable one in `order`.
///
/// `probe` is called for one device after another until one is usable. A device whose numbers were wrong is never used,
/// whatever was asked for.
///
/// # Errors
/// [`Error::Unusable`] when a device was asked for by name; [`Error::NoneUsable`]; those of `probe`.
pub fn choose(
    requested: Requested,
    order: &[Backend],
    mut probe: impl FnMut(Backend) -> Result<ProbeReport>,
) -> Result<Choice> {
    if let Requested::Only(backend) = requested {
        let report = probe(backend)?;
        if !report.verdict.is_usable() {
            return Err(Error::Unusable {
                requested: backend,
                reason: report.reason(),
            });
        }
        return Ok(Choice {
            backend,
            verdict: report.verdict,
            report,
            rejected: Vec::new(),
        });
    }
    let mut rejected = Vec::new();
    for &backend in order {
        let report = probe(backend)?;
        if report.verdict.is_usable() {
            return Ok(Choice {
                backend,
                verdict: report.verdict,
                report,
                rejected,
            });
        }
        rejected.push(Rejected {
            backend,
            verdict: report.verdict,
            reason: report.reason(),
        });
    }
    let reasons = rejected
        .iter()
        .map(|r| format!("{}: {}", r.backend, r.reason))
        .collect();
    Err(Error::NoneUsable { reasons })
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requested {
    /// The best device that works.
    Auto,
    /// This one, or an error.
    Only(Backend),
}

/// The device of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The device.
    pub backend: Backend,
    /// Its verdict.
    pub verdict: Verdict,
    /// Its probe.
    pub report: ProbeReport,
    /// Better ones that could not be used.
    pub rejected: Vec<Rejected>,
}

/// A device that is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The device.
    pub backend: Backend,
    /// Its verdict.
    pub verdict: Verdict,
    /// Why, in a few words.
    pub reason: String,
}

impl Choice {
    /// The line to print when a better device exists but is not used; `None` when nothing was given up.
    ///
    /// That there is no GPU at all is no failure and worth no line.
    pub fn fail_over(&self) -> Option<String> {
        let given_up = self.rejected.iter().find(|r| r.verdict != Verdict::NoDevice)?;
        Some(format!(
            "backend: {} — {} not used: {} (details: planish doctor; full check: {})",
            self.backend,
            given_up.backend,
            given_up.reason,
            match given_up.backend {
                Backend::Metal => "cargo xtask metal-check",
                _ => "planish doctor --deep",
            }
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::report_of_nothing;

    fn report(backend: Backend, verdict: Verdict, code: &str) -> Result<ProbeReport> {
        Ok(ProbeReport {
            verdict,
            code: code.into(),
            stage: "matmul".into(),
            ..report_of_nothing(backend, 7)
        })
    }

    const ORDER: [Backend; 2] = [Backend::Metal, Backend::Cpu];

    #[test]
    fn auto_takes_the_first_usable_and_asks_no_further() {
        let mut asked = Vec::new();
        let choice = choose(Requested::Auto, &ORDER, |backend| {
            asked.push(backend);
            report(backend, Verdict::Ok, "NONE")
        });
        assert_eq!(choice.unwrap().backend, Backend::Metal);
        assert_eq!(asked, [Backend::Metal]);
    }

    #[test]
    fn auto_falls_over_with_one_line_that_names_the_reason() {
        let choice = choose(Requested::Auto, &ORDER, |backend| match backend {
            Backend::Metal => report(backend, Verdict::WrongResults, "PARITY_FAIL"),
            _ => report(backend, Verdict::Ok, "NONE"),
        });
        let choice = choice.unwrap();
        assert_eq!(choice.backend, Backend::Cpu);
        let line = choice.fail_over().unwrap();
        assert!(
            line.contains("cpu") && line.contains("metal not used: PARITY_FAIL"),
            "{line}"
        );
    }

    #[test]
    fn a_machine_without_gpu_gets_no_line() {
        let choice = choose(Requested::Auto, &ORDER, |backend| match backend {
            Backend::Metal => report(backend, Verdict::NoDevice, "NO_DEVICE"),
            _ => report(backend, Verdict::Ok, "NONE"),
        });
        assert_eq!(choice.unwrap().fail_over(), None);
    }

    #[test]
    fn err_named_device_is_strict() {
        for verdict in [
            Verdict::WrongResults,
            Verdict::Crashed,
            Verdict::Hung,
            Verdict::NoDevice,
            Verdict::NoReport,
        ] {
            let refused = choose(Requested::Only(Backend::Metal), &ORDER, |b| report(b, verdict, "X"));
            assert!(
                matches!(
                    refused,
                    Err(Error::Unusable {
                        requested: Backend::Metal,
                        ..
                    })
                ),
                "{verdict:?}"
            );
        }
        let none = choose(Requested::Auto, &ORDER, |b| report(b, Verdict::Crashed, "X"));
        assert!(matches!(none, Err(Error::NoneUsable { reasons }) if reasons.len() == 2));
    }
}
