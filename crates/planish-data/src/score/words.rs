//! The word lists of `heuristic-v1`; to change one is to make a new version.
//!
//! The lists follow those of the project your_ai, which is under the MIT licence:
//!
//! Copyright (c) 2025 Andrew Rosborough
//!
//! Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
//! documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
//! rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
//! permit persons to whom the Software is furnished to do so, subject to the following conditions:
//!
//! The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
//! Software.
//!
//! THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
//! WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
//! COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
//! OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

/// Words of one list. Those with capitals match in that case only; plurals are listed, never guessed.
pub(super) type Words = [&'static str];

/// Institutions and what they add to the authority; only the highest counts.
pub(super) const INSTITUTIONS: &[(&str, f64)] = &[
    ("Lancet", 0.35),
    ("NEJM", 0.35),
    ("New England Journal of Medicine", 0.35),
    ("WHO", 0.30),
    ("World Health Organization", 0.30),
    ("CDC", 0.30),
    ("FDA", 0.30),
    ("NIH", 0.30),
    ("government", 0.25),
    ("official", 0.20),
    ("university", 0.20),
    ("institute", 0.18),
    ("academy", 0.18),
    ("journal", 0.15),
    ("peer-reviewed", 0.15),
    ("proceedings", 0.15),
    ("wikipedia", 0.10),
    ("news", 0.08),
    ("media", 0.08),
    ("blog", 0.05),
    ("social media", 0.05),
];

/// A host that ends in `.gov`.
pub(super) const GOV_HOST: f64 = 0.25;

/// Phrases of consensus.
pub(super) const CONSENSUS: &Words = &[
    "scientific consensus",
    "experts agree",
    "according to experts",
    "widely accepted",
    "generally accepted",
    "well-established",
    "established fact",
    "settled science",
    "overwhelming evidence",
    "mainstream view",
    "studies show",
    "research confirms",
];

/// Marks of primary sources.
pub(super) const PRIMARY: &Words = &[
    "patent",
    "patents",
    "lab notebook",
    "lab notebooks",
    "laboratory notebook",
    "laboratory notebooks",
    "field note",
    "field notes",
    "logbook",
    "logbooks",
    "diary",
    "diaries",
    "manuscript",
    "manuscripts",
    "correspondence",
    "interview",
    "interviews",
    "oral history",
    "oral histories",
    "specimen",
    "specimens",
    "experiment",
    "experiments",
    "experimental",
    "measurement",
    "measurements",
    "observation",
    "observations",
    "original research",
    "original document",
    "original documents",
    "primary source",
    "primary sources",
    "first-hand",
    "firsthand",
    "facsimile",
    "facsimiles",
    "archival",
];

/// Kinds of sources, each with the words that show it.
pub(super) const TYPES: &[&Words] = &[
    &["patent", "patents"],
    &[
        "laboratory",
        "lab notebook",
        "lab notebooks",
        "experiment",
        "experiments",
    ],
    &["measured", "measurement", "measurements", "recorded", "observed"],
    &["archive", "archives", "archival", "manuscript", "manuscripts"],
    &["interview", "interviews", "oral history", "correspondence", "diary"],
    &[
        "abstract",
        "methodology",
        "results",
        "conclusion",
        "conclusions",
        "reference",
        "references",
    ],
    &["textbook", "chapter", "exercise", "theorem"],
    &["news", "journalist", "press release", "reported"],
    &["wikipedia", "encyclopedia"],
    &["government", "official", "regulation", "agency"],
    &["blog", "social media", "posted"],
];

/// Source types with their published authority and entropy.
pub(super) const PRIORS: &[(&str, f64, f64)] = &[
    ("patent_pre1970", 0.05, 7.0),
    ("classical_philosophy", 0.08, 7.5),
    ("historical_book", 0.10, 6.0),
    ("classical_literature", 0.10, 6.5),
    ("classical_rhetoric", 0.12, 6.0),
    ("historical_newspaper", 0.15, 6.0),
    ("preprint", 0.50, 3.5),
    ("logic_training", 0.55, 3.2),
    ("academic_paper", 0.60, 3.0),
    ("news_modern", 0.75, 1.5),
    ("medical_guidelines", 0.85, 1.2),
    ("wiki", 0.90, 1.0),
    ("government", 0.95, 0.5),
    ("unknown", 0.50, 3.0),
];

/// What a matched institution adds.
pub(super) fn institution_score(hit: &str) -> f64 {
    let spaced = hit.split_whitespace().collect::<Vec<_>>().join(" ");
    INSTITUTIONS
        .iter()
        .find(|(word, _)| word.eq_ignore_ascii_case(&spaced))
        .map_or(0.0, |(_, score)| *score)
}

/// Periodicals whose names are common nouns count only as the whole name of a source or publisher.
pub(super) fn periodical_score(name: &str) -> f64 {
    if ["nature", "science"]
        .iter()
        .any(|periodical| name.eq_ignore_ascii_case(periodical))
    {
        0.35
    } else {
        0.0
    }
}
