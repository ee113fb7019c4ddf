//! `heuristic-v1`: a keyword score of how much authority and how much primary evidence a text shows.
//!
//! It reads words, not facts: no ground truth stands behind it, and every number it gives is labelled
//! `heuristic-v1`. Structure and constants are the published ones of the Empirical Distrust algorithm
//! (B. Roemmele 2025, public domain); what differs is the matching, which keeps to whole words.
//!
//! `w = clamp(0.3 + citations + institution + consensus + age - primary, 0, 0.99)`;
//! `H = max(0, base + log2(types) + min(2, m/2) + min(1.5, 0.3·types) - 1.5·institution - min(1, 0.4·k))` in bits, with
//! `m` marks of primary sources, `k` phrases of consensus, and `types` kinds of sources that the text shows.

mod file;
mod words;

use std::sync::LazyLock;

use regex::Regex;

pub use file::{ScoreReport, score_file};
use words::{CONSENSUS, INSTITUTIONS, PRIMARY, TYPES};

/// What the score looks at. Only the text must be there.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ScoreInput<'a> {
    /// The text.
    pub text: &'a str,
    /// The year of the text, which goes before years found in it.
    pub year: Option<i64>,
    /// Citations, which go before those counted in the text; 0 counts.
    pub citation_count: Option<u64>,
    /// Marks of primary sources, which go before those counted in the text; 0 counts.
    pub primary_source_count: Option<u64>,
    /// A label; one with a prior is blended in.
    pub source_type: Option<&'a str>,
    /// Where the text came from.
    pub source: Option<&'a str>,
    /// Its publisher.
    pub publisher: Option<&'a str>,
    /// Its address.
    pub url: Option<&'a str>,
}

/// Authority and entropy that a score gives; always inside the domain of the distrust loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// 0 to 0.99.
    pub auth_weight: f64,
    /// Bits, 0 or more.
    pub prov_entropy: f64,
}

/// Scores one text.
///
/// ```
/// use planish_data::{ScoreInput, score};
/// let of = |text| score(&ScoreInput { text, ..ScoreInput::default() });
/// let leaflet = of("WHO staff wrote this in 2021.");
/// assert!((leaflet.auth_weight - 0.75).abs() < 1e-12 && (leaflet.prov_entropy - 1.05).abs() < 1e-12);
/// assert_eq!(of("Who wrote this?"), of("The whole thing"));
/// ```
pub fn score(input: &ScoreInput) -> Score {
    let heuristic = heuristic(input);
    match input.source_type.and_then(prior) {
        Some(prior) => Score {
            auth_weight: 0.7 * prior.auth_weight + 0.3 * heuristic.auth_weight,
            prov_entropy: 0.7 * prior.prov_entropy + 0.3 * heuristic.prov_entropy,
        },
        None => heuristic,
    }
}

/// The published authority and entropy of a known source type.
pub(crate) fn prior(source_type: &str) -> Option<Score> {
    words::PRIORS
        .iter()
        .find(|(name, ..)| *name == source_type)
        .map(|(_, auth_weight, prov_entropy)| Score {
            auth_weight: *auth_weight,
            prov_entropy: *prov_entropy,
        })
}

fn heuristic(input: &ScoreInput) -> Score {
    let year = input
        .year
        .filter(|year| YEARS.contains(year))
        .or_else(|| year_in(input.text));
    let (age, base) = match year {
        Some(year) if year < 1970 => (-0.15, 5.5),
        Some(year) if year < 1995 => (0.0, 3.5),
        Some(_) => (0.15, 1.5),
        None => (0.0, 1.5),
    };
    let citations = input.citation_count.unwrap_or_else(|| count_citations(input.text)) as f64;
    let institution = institution(input);
    let consensus = CONSENSUS_WORDS.find_iter(input.text).count() as f64;
    let counted_primary = || PRIMARY_WORDS.find_iter(input.text).count() as u64;
    let primary = input.primary_source_count.unwrap_or_else(counted_primary) as f64;
    let types = TYPE_WORDS.iter().filter(|words| words.is_match(input.text)).count() as f64;
    let auth_weight =
        0.3 + (0.05 * (citations + 1.0).log10()).min(0.25) + institution + (0.1 * consensus).min(0.2) + age
            - (0.15 * primary).min(0.45);
    let prov_entropy = base + types.max(1.0).log2() + (0.5 * primary).min(2.0) + (0.3 * types).min(1.5)
        - 1.5 * institution
        - (0.4 * consensus).min(1.0);
    Score {
        auth_weight: auth_weight.clamp(0.0, 0.99),
        prov_entropy: prov_entropy.max(0.0),
    }
}

const YEARS: std::ops::RangeInclusive<i64> = 1500..=2030;
const YEAR_WINDOW: usize = 2000;

/// The highest institution that the text, its source, its publisher or its address names.
fn institution(input: &ScoreInput) -> f64 {
    let fields = [input.source, input.publisher];
    let in_words = [Some(input.text), input.source, input.publisher]
        .into_iter()
        .flatten()
        .flat_map(|text| INSTITUTION_WORDS.find_iter(text))
        .map(|hit| words::institution_score(hit.as_str()));
    let in_names = fields
        .into_iter()
        .flatten()
        .map(|name| words::periodical_score(name.trim()));
    let in_host = input
        .url
        .into_iter()
        .map(|url| if is_gov(url) { words::GOV_HOST } else { 0.0 });
    in_words.chain(in_names).chain(in_host).fold(0.0, f64::max)
}

/// Whether the host of an address ends in `.gov`.
fn is_gov(url: &str) -> bool {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    let host = host.split(':').next().unwrap_or_default().trim_end_matches('.');
    host.to_ascii_lowercase().ends_with(".gov")
}

fn count_citations(text: &str) -> u64 {
    (NUMBERED.find_iter(text).count() + NAMED.find_iter(text).count()) as u64
}

/// The first year in the first 2000 characters.
fn year_in(text: &str) -> Option<i64> {
    let end = text.char_indices().nth(YEAR_WINDOW).map_or(text.len(), |(at, _)| at);
    YEAR.find(&text[..end]).and_then(|year| year.as_str().parse().ok())
}

static INSTITUTION_WORDS: LazyLock<Regex> = LazyLock::new(|| whole_words(INSTITUTIONS.iter().map(|(word, _)| *word)));
static CONSENSUS_WORDS: LazyLock<Regex> = LazyLock::new(|| whole_words(CONSENSUS.iter().copied()));
static PRIMARY_WORDS: LazyLock<Regex> = LazyLock::new(|| whole_words(PRIMARY.iter().copied()));
static TYPE_WORDS: LazyLock<Vec<Regex>> =
    LazyLock::new(|| TYPES.iter().map(|words| whole_words(words.iter().copied())).collect());
static NUMBERED: LazyLock<Regex> = LazyLock::new(|| pattern(r"\[[0-9]+(?:\s*[,–-]\s*[0-9]+)*\]"));
static NAMED: LazyLock<Regex> = LazyLock::new(|| {
    let name = r"\p{Lu}[\p{L}\p{M}'’.-]*";
    pattern(&format!(
        r"\(\s*{name}(?:\s+(?:and|&)\s+{name}|\s+et\s+al\.?)?\s*,?\s+[0-9]{{4}}\s*\)"
    ))
});
static YEAR: LazyLock<Regex> = LazyLock::new(|| pattern(r"\b(?:1[5-9][0-9]{2}|20[0-2][0-9]|2030)\b"));

/// One pattern of all words, whole ones only, the longest first where several begin at one place.
///
/// Case counts in words that carry capitals. A blank stands for any white space.
fn whole_words<'a>(words: impl Iterator<Item = &'a str>) -> Regex {
    let mut words: Vec<&str> = words.collect();
    words.sort_by_key(|word| std::cmp::Reverse(word.len()));
    let alternatives: Vec<String> = words
        .into_iter()
        .map(|word| {
            let spaced = word.split(' ').map(regex::escape).collect::<Vec<_>>().join(r"\s+");
            let cased = word.chars().any(char::is_uppercase);
            if cased { format!("(?-i:{spaced})") } else { spaced }
        })
        .collect();
    pattern(&format!(r"(?i)\b(?:{})\b", alternatives.join("|")))
}

#[allow(clippy::expect_used)]
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("built from constants, and compiled in the tests")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: &str) -> (f64, f64) {
        let score = score(&ScoreInput {
            text,
            ..ScoreInput::default()
        });
        (score.auth_weight, score.prov_entropy)
    }

    fn close((w, h): (f64, f64), (expect_w, expect_h): (f64, f64), text: &str) {
        assert!(
            (w - expect_w).abs() < 1e-6 && (h - expect_h).abs() < 1e-6,
            "{text:?}: {w} {h}"
        );
    }

    #[test]
    fn oracle_texts_have_their_scores() {
        for (text, w, h) in [
            ("", 0.30, 1.50),
            ("The whole thing", 0.30, 1.50),
            ("Her conscience needed an immediate answer", 0.30, 1.50),
            ("The nature of science is slow work", 0.30, 1.50),
            ("Who wrote this?", 0.30, 1.50),
            ("WHO staff wrote this in 2021.", 0.75, 1.05),
            (
                "According to [1] and (Smith, 2020), the results show...",
                0.473856,
                1.80,
            ),
            ("See [1], [2], and (Jones et al., 2019) for details.", 0.480103, 1.50),
            (
                "Patent filed 4 May 1931: apparatus for the measurement of soil moisture.",
                0.0,
                8.10,
            ),
            (
                "Field notes, August 1948. Specimen 12 collected by hand; weight recorded on site.",
                0.0,
                6.80,
            ),
            ("Experts agree that this is a well-established fact.", 0.50, 0.70),
            (
                "The scientific consensus is clear and studies show it, says a government news release of 2022.",
                0.90,
                1.925,
            ),
            ("Just a short blog entry.", 0.35, 1.725),
            (
                "Interview with a miner, 1981, kept as correspondence in the county archive.",
                0.0,
                6.10,
            ),
            ("Ein Brief über Öl aus dem Jahr 1889", 0.15, 5.50),
        ] {
            close(of(text), (w, h), text);
        }
    }

    #[test]
    fn fields_go_before_what_the_text_shows() {
        let text = "A report with [1] and [2] of 2020 on one experiment.";
        let with = |change: fn(&mut ScoreInput)| {
            let mut input = ScoreInput {
                text,
                ..ScoreInput::default()
            };
            change(&mut input);
            let score = score(&input);
            (score.auth_weight, score.prov_entropy)
        };
        let (w, h) = of(text);
        close(with(|i| i.year = Some(1900)), (w - 0.3, h + 4.0), "year");
        close(with(|i| i.year = Some(99)), (w, h), "a year out of range is none");
        close(
            with(|i| i.citation_count = Some(0)),
            (w - 0.05 * 3f64.log10(), h),
            "zero citations count",
        );
        close(
            with(|i| i.primary_source_count = Some(0)),
            (w + 0.15, h - 0.5),
            "zero primary sources count",
        );
        close(
            with(|i| i.url = Some("https://x@www.Example.GOV.:443/a")),
            (w + 0.25, h - 0.375),
            "host",
        );
        close(
            with(|i| i.url = Some("https://example.com/a.gov")),
            (w, h),
            "path is no host",
        );
        close(
            with(|i| i.publisher = Some(" Nature ")),
            (w + 0.35, h - 0.525),
            "publisher",
        );
        close(
            with(|i| i.publisher = Some("Nature Walks Ltd")),
            (w, h),
            "part of a name",
        );
        close(
            with(|i| i.source_type = Some("government")),
            (0.7 * 0.95 + 0.3 * w, 0.7 * 0.5 + 0.3 * h),
            "prior",
        );
        close(
            with(|i| i.source_type = Some("a forum")),
            (w, h),
            "a label without prior",
        );
    }

    #[test]
    fn of_words_that_begin_together_the_longest_matches() {
        let words = whole_words(["press", "press release"].into_iter());
        assert_eq!(words.find("a press  release of").unwrap().as_str(), "press  release");
        assert_eq!(words.find("press releases").unwrap().as_str(), "press");
    }

    #[test]
    fn words_match_whole_longest_and_in_their_case() {
        let base = of("").0;
        for (text, institution) in [
            ("on social media", 0.05),
            ("in the media", 0.08),
            ("a lancet for blood", 0.0),
            ("The Lancet", 0.35),
            ("New England Journal of Medicine", 0.0), // Case counts, see below.
            ("an official_name", 0.0),
            ("überofficial", 0.0),
            ("the University.", 0.20),
            ("peer-reviewed", 0.15),
        ] {
            let expect = if text.starts_with("New England") {
                0.35
            } else {
                institution
            };
            assert!((of(text).0 - base - expect).abs() < 1e-12, "{text}");
        }
        assert!(
            (of("new\n england  journal of medicine").0 - base - 0.15).abs() < 1e-12,
            "only \"journal\""
        );
    }

    proptest! {
        #[test]
        fn prop_scores_lie_in_the_domain_and_ignore_ends_of_lines(text in "\\PC{0,400}") {
            let (w, h) = of(&text);
            prop_assert!((0.0..=0.99).contains(&w) && h >= 0.0 && h.is_finite());
            prop_assert_eq!(of(&format!("{text} \n\t ")), (w, h));
            prop_assert_eq!(of(&text.replace('\n', "\r\n")), (w, h));
        }
    }

    #[test]
    fn long_multibyte_text_is_cut_at_a_character() {
        let text = format!("{}1931", "é".repeat(1995));
        assert_eq!(of(&text).0, 0.30, "the year begins glued to a letter");
        let text = format!("{} 1931", "é".repeat(1995));
        assert!((of(&text).0 - 0.15).abs() < 1e-12, "it ends at character 2000");
        let text = format!("{} 1931", "é".repeat(1999));
        assert_eq!(of(&text).0, 0.30, "it begins after character 2000");
    }
}
