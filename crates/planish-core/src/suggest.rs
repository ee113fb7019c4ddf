//! "Did you mean …?": the known name nearest to a mistyped one.

/// The candidate most similar to `name`, or `None` when nothing is close enough to be meant.
///
/// Close means at most a third of the letters wrong (swapped neighbours count once), or one name containing the other.
/// Ties go to the earlier candidate.
///
/// ```
/// use planish_core::suggest::nearest;
/// assert_eq!(nearest("lerning_rate", ["learning_rate", "eps"]), Some("learning_rate"));
/// assert_eq!(nearest("qproj", ["q_proj", "k_proj"]), Some("q_proj"));
/// assert_eq!(nearest("zebra", ["learning_rate", "eps"]), None);
/// ```
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_lowercase();
    candidates
        .into_iter()
        .filter_map(|candidate| distance(&name, &candidate.to_lowercase()).map(|d| (d, candidate)))
        .min_by_key(|(d, _)| *d)
        .map(|(_, candidate)| candidate)
}

/// Edits between the names, or `None` when too far apart. Containment ranks behind every plain typing error.
fn distance(name: &str, candidate: &str) -> Option<usize> {
    let longest = name.chars().count().max(candidate.chars().count());
    let edits = strsim::osa_distance(name, candidate);
    if edits * 3 <= longest.max(3) {
        return Some(edits);
    }
    let contained = name.len() >= 3 && candidate.len() >= 3 && (candidate.contains(name) || name.contains(candidate));
    contained.then_some(1000 + edits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, candidates: &[&str], expect: Option<&str>) {
        assert_eq!(nearest(name, candidates.iter().copied()), expect, "{name}");
    }

    #[test]
    fn swapped_letters_count_once() {
        check("setps", &["steps", "sets_p"], Some("steps"));
    }

    #[test]
    fn case_does_not_matter() {
        check("ADAMW", &["sgd", "adamw"], Some("adamw"));
    }

    #[test]
    fn part_of_a_name_is_recognised() {
        check("self_attn.q_proj", &["k_proj", "q_proj"], Some("q_proj"));
    }

    #[test]
    fn typing_error_wins_over_containment() {
        check("batch_siz", &["siz", "batch_size"], Some("batch_size"));
    }

    #[test]
    fn nothing_is_suggested_for_an_unrelated_or_empty_name() {
        check("xyzzy", &["steps", "eps"], None);
        check("", &["steps"], None);
    }
}
