//! Which linear layers get an adapter: patterns resolved to a list of module paths.
//!
//! | pattern | matches |
//! |---|---|
//! | `all-linear` | every linear layer inside the blocks, not the head |
//! | `q_proj`, `self_attn.q_proj` | every path that ends with these names, whole names only |
//! | `model.layers.1*.mlp.*` | every path of this form; `*` is any run of characters, `?` any single one |
//!
//! A pattern that matches nothing is an error: a mistyped name would otherwise train less than intended, in silence.

use std::fmt;
use std::num::NonZeroUsize;

use crate::{Error, Result, suggest};

/// The word for every linear layer of the blocks.
pub const ALL_LINEAR: &str = "all-linear";

/// A pattern for module paths; see the [module](self) for its three forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

/// Patterns, and the blocks they apply to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetModules {
    /// A module is a target when any of them matches.
    pub patterns: Vec<Pattern>,
    /// Modules of other blocks are left out. Modules outside all blocks (the head) are not affected.
    pub blocks: Blocks,
}

/// A choice of blocks, counted from the output end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Blocks {
    /// Every block.
    #[default]
    All,
    /// The last `n` blocks.
    Last(NonZeroUsize),
}

/// Values by pattern that differ from a common one: ranks or alphas of single modules.
#[derive(Clone, Debug, PartialEq)]
pub struct PerModule<T> {
    entries: Vec<(Pattern, T)>,
}

/// The paths among `linear_paths` that `targets` means, in their given order.
///
/// # Errors
/// [`Error::UnknownTargetModule`] for a pattern that matches none of the paths, [`Error::TargetOutsideBlocks`] for one
/// that matches only in excluded blocks, [`Error::TooManyBlocks`], [`Error::NoTargetModules`] without any pattern.
///
/// ```
/// use planish_core::target_modules::{Blocks, TargetModules, resolve};
/// let paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"];
/// let targets = TargetModules::new(["q_proj"], Blocks::from_count(1)?);
/// assert_eq!(resolve(&targets, &paths)?, ["model.layers.1.self_attn.q_proj"]);
///
/// let error = resolve(&TargetModules::new(["qproj"], Blocks::All), &paths).unwrap_err();
/// assert!(error.to_string().contains("q_proj"));
/// # Ok::<(), planish_core::Error>(())
/// ```
pub fn resolve<P: AsRef<str>>(targets: &TargetModules, linear_paths: &[P]) -> Result<Vec<String>> {
    if targets.patterns.is_empty() {
        return Err(Error::NoTargetModules);
    }
    let first_block = first_block(targets.blocks, linear_paths)?;
    let is_chosen = |path: &str| block_idx(path).is_none_or(|block| block >= first_block);
    for pattern in &targets.patterns {
        let mut matching = linear_paths
            .iter()
            .map(AsRef::as_ref)
            .filter(|path| pattern.matches(path))
            .peekable();
        if matching.peek().is_none() {
            return Err(unknown(pattern, linear_paths));
        }
        if !matching.any(is_chosen) {
            return Err(Error::TargetOutsideBlocks {
                pattern: pattern.0.clone(),
                first_block,
            });
        }
    }
    let is_target = |path: &&str| is_chosen(path) && targets.patterns.iter().any(|pattern| pattern.matches(path));
    Ok(linear_paths
        .iter()
        .map(AsRef::as_ref)
        .filter(is_target)
        .map(str::to_string)
        .collect())
}

impl TargetModules {
    /// Patterns from text.
    pub fn new<S: Into<String>>(patterns: impl IntoIterator<Item = S>, blocks: Blocks) -> Self {
        Self {
            patterns: patterns.into_iter().map(Pattern::new).collect(),
            blocks,
        }
    }
}

impl Default for TargetModules {
    fn default() -> Self {
        Self::new([ALL_LINEAR], Blocks::All)
    }
}

impl Blocks {
    /// The last `count` blocks; `0` and `-1` both mean all, as in mlx-lm.
    ///
    /// # Errors
    /// [`Error::BlockCount`] below −1.
    pub fn from_count(count: i64) -> Result<Self> {
        match count {
            -1 | 0 => Ok(Self::All),
            _ => match usize::try_from(count).ok().and_then(NonZeroUsize::new) {
                Some(n) => Ok(Self::Last(n)),
                None => Err(Error::BlockCount { count }),
            },
        }
    }
}

impl Pattern {
    /// Any text is a pattern; whether it matches something shows when it is resolved.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Whether the pattern means this module.
    pub fn matches(&self, path: &str) -> bool {
        if self.0 == ALL_LINEAR {
            return block_idx(path).is_some();
        }
        if self.0.contains(['*', '?']) {
            return glob_matches(self.0.as_bytes(), path.as_bytes());
        }
        path.strip_suffix(self.0.as_str())
            .is_some_and(|before| before.is_empty() || before.ends_with('.'))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<T: Copy + PartialEq> PerModule<T> {
    /// Values from pairs of pattern and value.
    pub fn new<S: Into<String>>(entries: impl IntoIterator<Item = (S, T)>) -> Self {
        Self {
            entries: entries
                .into_iter()
                .map(|(text, value)| (Pattern::new(text), value))
                .collect(),
        }
    }

    /// The value for each of `paths`, `common` where no pattern matches.
    ///
    /// # Errors
    /// [`Error::UnknownTargetModule`] for a pattern that matches none of the paths; [`Error::AmbiguousModule`] when two
    /// patterns give one module different values.
    pub fn resolve<P: AsRef<str>>(&self, common: T, paths: &[P]) -> Result<Vec<T>> {
        for (pattern, _) in &self.entries {
            if !paths.iter().any(|path| pattern.matches(path.as_ref())) {
                return Err(unknown(pattern, paths));
            }
        }
        paths
            .iter()
            .map(|path| Ok(self.value_for(path.as_ref())?.unwrap_or(common)))
            .collect()
    }

    fn value_for(&self, path: &str) -> Result<Option<T>> {
        let mut found: Option<&(Pattern, T)> = None;
        for entry in self.entries.iter().filter(|(pattern, _)| pattern.matches(path)) {
            match found {
                Some((first, value)) if *value != entry.1 => {
                    let patterns = [first.0.clone(), entry.0.0.clone()];
                    return Err(Error::AmbiguousModule {
                        path: path.into(),
                        patterns,
                    });
                }
                _ => found = Some(entry),
            }
        }
        Ok(found.map(|(_, value)| *value))
    }
}

/// The number of a block's first `layers.N` segment; `None` outside the blocks.
fn block_idx(path: &str) -> Option<usize> {
    let mut segments = path.split('.');
    segments.by_ref().find(|segment| *segment == "layers")?;
    segments.next()?.parse().ok()
}

fn first_block<P: AsRef<str>>(blocks: Blocks, paths: &[P]) -> Result<usize> {
    let Blocks::Last(n) = blocks else { return Ok(0) };
    let available = paths
        .iter()
        .filter_map(|path| block_idx(path.as_ref()))
        .max()
        .map_or(0, |last| last + 1);
    available.checked_sub(n.get()).ok_or(Error::TooManyBlocks {
        wanted: n.get(),
        available,
    })
}

fn unknown<P: AsRef<str>>(pattern: &Pattern, paths: &[P]) -> Error {
    let mut names: Vec<&str> = Vec::new();
    for path in paths {
        let name = last_name(path.as_ref());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let nearest = suggest::nearest(last_name(&pattern.0), names.iter().copied());
    Error::UnknownTargetModule {
        pattern: pattern.0.clone(),
        nearest: nearest.map(str::to_string),
        available: names.join(", "),
    }
}

fn last_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// `*` any run, `?` any one byte. On a mismatch only the last `*` needs to try again, so the time is at most the product
/// of the lengths, whatever the pattern.
fn glob_matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((after_star, start)) = retry else { return false };
                retry = Some((after_star, start + 1));
                p = after_star;
                t = start + 1;
            }
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn paths() -> Vec<String> {
        let mut paths: Vec<String> = (0..12)
            .flat_map(|i| {
                ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"].map(|n| format!("model.layers.{i}.{n}"))
            })
            .collect();
        paths.push("lm_head".into());
        paths
    }

    fn count(patterns: &[&str], blocks: i64) -> usize {
        let targets = TargetModules::new(patterns.iter().copied(), Blocks::from_count(blocks).unwrap());
        resolve(&targets, &paths()).unwrap().len()
    }

    #[test]
    fn all_linear_leaves_the_head_out() {
        assert_eq!(count(&["all-linear"], -1), 36);
        assert_eq!(count(&["all-linear", "lm_head"], -1), 37);
    }

    #[test]
    fn names_match_whole_segments_at_the_end() {
        assert_eq!(count(&["q_proj"], -1), 12);
        assert_eq!(count(&["self_attn.q_proj"], -1), 12);
        assert!(!Pattern::new("proj").matches("model.layers.0.self_attn.q_proj"));
        assert!(Pattern::new("lm_head").matches("lm_head"));
    }

    #[test]
    fn globs_match_the_whole_path() {
        assert_eq!(count(&["model.layers.*.self_attn.q_proj"], -1), 12);
        assert_eq!(count(&["model.layers.1*.mlp.up_proj"], -1), 3);
        assert_eq!(count(&["*.layers.?.mlp.*"], -1), 10);
        assert!(!Pattern::new("*.q_proj").matches("model.layers.0.self_attn.q_proj.lora"));
    }

    #[test]
    fn modules_matched_twice_are_listed_once() {
        assert_eq!(count(&["q_proj", "self_attn.q_proj", "*q_proj"], -1), 12);
    }

    #[test]
    fn last_blocks_are_counted_from_the_end_and_zero_means_all() {
        assert_eq!(count(&["q_proj"], 0), 12);
        assert_eq!(count(&["q_proj"], 12), 12);
        let last = resolve(
            &TargetModules::new(["q_proj", "lm_head"], Blocks::from_count(2).unwrap()),
            &paths(),
        )
        .unwrap();
        assert_eq!(
            last,
            [
                "model.layers.10.self_attn.q_proj",
                "model.layers.11.self_attn.q_proj",
                "lm_head"
            ]
        );
    }

    fn error(patterns: &[&str], blocks: Blocks) -> Error {
        resolve(&TargetModules::new(patterns.iter().copied(), blocks), &paths()).unwrap_err()
    }

    #[test]
    fn err_unknown_name_suggests_and_lists() {
        let error = error(&["q_proj", "self_attn.v_proj"], Blocks::All);
        assert_eq!(
            error.to_string(),
            "target module `self_attn.v_proj` matches no linear layer; nearest is `q_proj`; there are: q_proj, k_proj, up_proj, lm_head"
        );
    }

    #[test]
    fn err_outside_the_chosen_blocks() {
        let two = Blocks::from_count(2).unwrap();
        assert!(matches!(
            error(&["*.layers.0.*"], two),
            Error::TargetOutsideBlocks { first_block: 10, .. }
        ));
    }

    #[test]
    fn err_more_blocks_than_the_model_has() {
        let many = Blocks::from_count(13).unwrap();
        assert!(matches!(
            error(&["q_proj"], many),
            Error::TooManyBlocks {
                wanted: 13,
                available: 12
            }
        ));
        assert!(matches!(Blocks::from_count(-2), Err(Error::BlockCount { count: -2 })));
    }

    #[test]
    fn err_no_pattern() {
        assert!(matches!(error(&[], Blocks::All), Error::NoTargetModules));
    }

    #[test]
    fn per_module_values_override_the_common_one() {
        let ranks = PerModule::new([("up_proj", 32), ("*.layers.0.*.q_proj", 4)]);
        let paths = [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.up_proj",
        ];
        assert_eq!(ranks.resolve(8, &paths).unwrap(), [4, 8, 32]);
    }

    #[test]
    fn err_per_module_values_contradict_or_match_nothing() {
        let paths = ["model.layers.0.self_attn.q_proj"];
        let contradiction = PerModule::new([("q_proj", 1), ("self_attn.q_proj", 2)]).resolve(8, &paths);
        assert!(matches!(contradiction, Err(Error::AmbiguousModule { .. })));
        assert!(
            PerModule::new([("q_proj", 1), ("self_attn.q_proj", 1)])
                .resolve(8, &paths)
                .is_ok()
        );
        assert!(matches!(
            PerModule::new([("z", 1)]).resolve(8, &paths),
            Err(Error::UnknownTargetModule { .. })
        ));
    }

    proptest! {
        #[test]
        fn prop_glob_agrees_with_the_definition(pattern in "[ab*?]{0,6}", text in "[ab]{0,6}") {
            fn slow(p: &[u8], t: &[u8]) -> bool {
                match (p.split_first(), t.split_first()) {
                    (None, _) => t.is_empty(),
                    (Some((b'*', rest)), None) => slow(rest, t),
                    (Some((b'*', rest)), Some((_, tail))) => slow(rest, t) || slow(p, tail),
                    (Some((c, rest)), Some((d, tail))) => (*c == b'?' || c == d) && slow(rest, tail),
                    (Some(_), None) => false,
                }
            }
            prop_assert_eq!(glob_matches(pattern.as_bytes(), text.as_bytes()), slow(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
