//! Collecting values from files, `--set` and flags, each with its place for messages.

use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Compat, RunConfig, Setting};
use crate::{Error, Result, suggest};

/// Keys that say one thing in two ways: giving one unsets the other.
const EXCLUSIVE: [[&str; 2]; 2] = [["lora.alpha", "lora.scale"], ["train.steps", "train.epochs"]];

/// The defaults of mlx-lm 0.32 where they differ from ours; `train.compat = "mlx-lm"` puts them under every other source.
const MLX_LM_DEFAULTS: [(&str, &str); 16] = [
    ("optimizer.name", "adam"),
    ("optimizer.learning_rate", "1e-5"),
    ("optimizer.clip_norm", "0"),
    ("schedule.name", "constant"),
    ("schedule.warmup_steps", "0"),
    ("lora.rank", "8"),
    ("lora.scale", "20"),
    ("lora.layers", "16"),
    ("train.steps", "1000"),
    ("train.batch_size", "4"),
    ("train.eval_every", "200"),
    ("train.val_batches", "25"),
    ("train.save_best", "false"),
    ("checkpoint.every", "100"),
    ("logging.report_every", "10"),
    ("train.accumulation", "1"),
];

/// Collects values; the order of calls does not matter between sources, and within one the last value wins.
#[derive(Debug, Default)]
pub struct RunConfigBuilder {
    assignments: Vec<Assignment>,
}

#[derive(Debug)]
struct Assignment {
    source: Source,
    origin: String,
    key: String,
    value: Value,
}

/// Where a value comes from; later ones win.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Preset,
    File,
    Set,
    Flag,
}

/// A value before its key's type is known.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Toml(toml::Value),
    Text(String),
}

impl RunConfigBuilder {
    /// Takes the values of a `run.toml`. Paths in it are relative to the working directory, as on the command line.
    ///
    /// # Errors
    /// [`Error::Read`], and as [`text`](Self::text).
    pub fn file(self, path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::read(path, error))?;
        self.text(&text, &path.display().to_string())
    }

    /// Takes the values of TOML text; errors name `origin` and the line.
    ///
    /// # Errors
    /// [`Error::RunSyntax`], [`Error::RunUnknownKey`], [`Error::RunValue`].
    pub fn text(mut self, text: &str, origin: &str) -> Result<Self> {
        let table = DeTable::parse(text).map_err(|error| Error::RunSyntax {
            origin: format!("{origin}:{}", error.span().map_or(1, |span| line_of(text, span.start))),
            message: error.message().to_string(),
        })?;
        let mut entries = Vec::new();
        flatten("", table.get_ref(), &mut entries);
        for (key, value) in entries {
            let origin = format!("{origin}:{}", line_of(text, value.span().start));
            self.assign(Source::File, origin, key, Value::Toml(to_value(value.get_ref())))?;
        }
        Ok(self)
    }

    /// Takes one `section.key=value`, as given to `--set`. The value needs no quotes.
    ///
    /// # Errors
    /// [`Error::RunSyntax`] without `=`, [`Error::RunUnknownKey`], [`Error::RunValue`].
    pub fn set(mut self, assignment: &str) -> Result<Self> {
        let origin = format!("--set {assignment}");
        let Some((key, value)) = assignment.split_once('=') else {
            return Err(Error::RunSyntax {
                origin,
                message: "expected section.key=value".into(),
            });
        };
        self.assign(Source::Set, origin, key.trim().into(), Value::Text(value.trim().into()))?;
        Ok(self)
    }

    /// Takes the value of a command-line flag such as `--model` for its `key`.
    ///
    /// # Errors
    /// [`Error::RunUnknownKey`], [`Error::RunValue`].
    pub fn flag(mut self, flag: &str, key: &str, value: &str) -> Result<Self> {
        self.assign(
            Source::Flag,
            format!("{flag} {value}"),
            key.into(),
            Value::Text(value.into()),
        )?;
        Ok(self)
    }

    /// Lays the sources over the defaults and checks the whole.
    ///
    /// # Errors
    /// [`Error::RunConflict`] when one source gives both of two exclusive keys; [`Error::RunValue`] for a value out of
    /// range or at odds with another.
    pub fn build(mut self) -> Result<RunConfig> {
        self.refuse_conflicts()?;
        if self.wants_mlx_lm() {
            for (key, value) in MLX_LM_DEFAULTS {
                let origin = format!("the defaults of mlx-lm: {key}={value}");
                self.assign(Source::Preset, origin, key.into(), Value::Text(value.into()))?;
            }
        }
        self.assignments.sort_by_key(|assignment| assignment.source);
        let mut config = RunConfig::default();
        for assignment in &self.assignments {
            unset_twin(&mut config, &assignment.key);
            config.assign(&assignment.key, &assignment.value);
        }
        config.validate().map_err(|problem| Error::RunValue {
            origin: self.origin_of(&problem.keys),
            key: problem.keys[0].into(),
            found: problem.found,
            expected: problem.expected,
        })?;
        Ok(config)
    }

    fn assign(&mut self, source: Source, origin: String, key: String, value: Value) -> Result<()> {
        match RunConfig::default().assign(&key, &value) {
            None => {
                let known: Vec<String> = RunConfig::keys()
                    .iter()
                    .map(|known| format!("{}.{}", known.section, known.name))
                    .collect();
                let nearest = nearest_key(&key, &known);
                return Err(Error::RunUnknownKey { origin, key, nearest });
            }
            Some(false) => return Err(unacceptable(origin, key, &value)),
            Some(true) => self.assignments.push(Assignment {
                source,
                origin,
                key,
                value,
            }),
        }
        Ok(())
    }

    /// What the strongest source says of `train.compat`.
    fn wants_mlx_lm(&self) -> bool {
        let given = self
            .assignments
            .iter()
            .filter(|assignment| assignment.key == "train.compat");
        let strongest = given.max_by_key(|assignment| assignment.source);
        strongest.and_then(|assignment| assignment.value.parse()) == Some(Compat::MlxLm)
    }

    fn refuse_conflicts(&self) -> Result<()> {
        for keys in EXCLUSIVE {
            for source in [Source::File, Source::Set, Source::Flag] {
                let given = |key: &str| self.assignments.iter().find(|a| a.source == source && a.key == key);
                if let (Some(_), Some(second)) = (given(keys[0]), given(keys[1])) {
                    return Err(Error::RunConflict {
                        origin: second.origin.clone(),
                        keys,
                    });
                }
            }
        }
        Ok(())
    }

    /// Where the strongest value of any of `keys` was given.
    fn origin_of(&self, keys: &[&str]) -> String {
        let given = self
            .assignments
            .iter()
            .rev()
            .find(|assignment| keys.contains(&assignment.key.as_str()));
        given.map_or_else(|| "defaults".into(), |assignment| assignment.origin.clone())
    }
}

impl Value {
    pub(super) fn parse<T: Setting>(&self) -> Option<T> {
        match self {
            Self::Toml(value) => T::from_toml(value),
            Self::Text(text) => T::from_text(text),
        }
    }

    fn as_typed(&self) -> String {
        match self {
            Self::Toml(value) => value.to_string(),
            Self::Text(text) => format!("`{text}`"),
        }
    }
}

fn unset_twin(config: &mut RunConfig, key: &str) {
    match key {
        "lora.alpha" => config.lora.scale = None,
        "lora.scale" => config.lora.alpha = None,
        "train.steps" => config.train.epochs = None,
        "train.epochs" => config.train.steps = None,
        _ => {}
    }
}

/// Whole paths first; then the last names alone, for a key in the wrong section or without any.
fn nearest_key(key: &str, known: &[String]) -> Option<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_string();
    let same_name = known.iter().find(|path| last(path) == last(key)).cloned();
    same_name
        .or_else(|| suggest::nearest(key, known.iter().map(String::as_str)).map(str::to_string))
        .or_else(|| {
            let names: Vec<String> = known.iter().map(|path| last(path)).collect();
            let near = suggest::nearest(&last(key), names.iter().map(String::as_str))?;
            known.iter().find(|path| last(path) == near).cloned()
        })
}

fn unacceptable(origin: String, key: String, value: &Value) -> Error {
    let keys = RunConfig::keys();
    let known = keys
        .iter()
        .find(|known| key == format!("{}.{}", known.section, known.name));
    let mut expected = known.map(|known| known.expected.clone()).unwrap_or_default();
    let text = match value {
        Value::Toml(toml::Value::String(text)) | Value::Text(text) => text.as_str(),
        Value::Toml(_) => "",
    };
    if let Some(near) = suggest::nearest(text, RunConfig::words_of(&key)) {
        expected.push_str(&format!("; nearest is {near}"));
    }
    Error::RunValue {
        origin,
        key,
        found: value.as_typed(),
        expected,
    }
}

/// Every leaf with its dotted path. Tables are sections; no key has a table for a value.
fn flatten<'a>(prefix: &str, table: &'a DeTable<'a>, entries: &mut Vec<(String, &'a Spanned<DeValue<'a>>)>) {
    for (name, value) in table {
        let path = if prefix.is_empty() {
            name.get_ref().to_string()
        } else {
            format!("{prefix}.{}", name.get_ref())
        };
        match value.get_ref() {
            DeValue::Table(inner) if !inner.is_empty() || is_section(&path) => flatten(&path, inner, entries),
            _ => entries.push((path, value)),
        }
    }
}

fn is_section(path: &str) -> bool {
    RunConfig::sections()
        .iter()
        .any(|(section, _)| *section == path || section.starts_with(&format!("{path}.")))
}

fn to_value(value: &DeValue<'_>) -> toml::Value {
    match value {
        DeValue::String(text) => toml::Value::String(text.to_string()),
        // Numbers beyond 64 bits stay text, which no numeric key accepts.
        DeValue::Integer(n) => i64::from_str_radix(n.as_str(), n.radix())
            .map_or_else(|_| toml::Value::String(n.as_str().into()), toml::Value::Integer),
        DeValue::Float(x) => x
            .as_str()
            .parse()
            .map_or_else(|_| toml::Value::String(x.as_str().into()), toml::Value::Float),
        DeValue::Boolean(b) => toml::Value::Boolean(*b),
        DeValue::Datetime(at) => toml::Value::Datetime(*at),
        DeValue::Array(items) => toml::Value::Array(items.iter().map(|item| to_value(item.get_ref())).collect()),
        DeValue::Table(table) => toml::Value::Table(
            table
                .iter()
                .map(|(name, value)| (name.get_ref().to_string(), to_value(value.get_ref())))
                .collect(),
        ),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn from(text: &str) -> Result<RunConfig> {
        RunConfig::builder().text(text, "run.toml")?.build()
    }

    fn check_err<T: std::fmt::Debug>(result: Result<T>, expect: &str) {
        assert_eq!(result.unwrap_err().to_string(), expect);
    }

    #[test]
    fn flag_wins_over_set_over_file_in_any_order_of_calls() {
        let file = "[lora]\nrank = 1\n[train]\nseed = 1\n[optimizer]\neps = 1e-3";
        let builder = RunConfig::builder().flag("--rank", "lora.rank", "3").unwrap();
        let builder = builder.set("lora.rank=2").unwrap().set("train.seed=2").unwrap();
        let config = builder.text(file, "run.toml").unwrap().build().unwrap();
        assert_eq!(
            (config.lora.rank, config.train.seed, config.optimizer.eps),
            (3, 2, 1e-3)
        );
    }

    #[test]
    fn mlx_lm_brings_its_defaults_under_everything_given() {
        let builder = RunConfig::builder().set("train.compat=mlx-lm").unwrap();
        let builder = builder
            .text("[optimizer]\nlearning_rate = 2e-5\n[lora]\nalpha = 8", "x")
            .unwrap();
        let config = builder.build().unwrap();
        assert_eq!(
            (config.optimizer.name.word(), config.optimizer.learning_rate),
            ("adam", 2e-5)
        );
        assert_eq!(
            (config.lora.scale(), config.lora.layers, config.train.steps),
            (1.0, 16, Some(1000))
        );
        let again = RunConfig::builder()
            .text(&config.to_toml(), "x")
            .unwrap()
            .build()
            .unwrap();
        assert_eq!(again, config);
        let error = RunConfig::builder().set("train.compat=mlx-lm").unwrap();
        let error = error
            .set("optimizer.name=muon")
            .unwrap()
            .build()
            .unwrap_err()
            .to_string();
        assert!(error.contains("adam or adamw"), "{error}");
        assert!(
            RunConfig::builder()
                .set("data.mask_prompt=true")
                .unwrap()
                .build()
                .is_err()
        );
    }

    #[test]
    fn later_set_wins() {
        let config = RunConfig::builder()
            .set("lora.rank=2")
            .unwrap()
            .set("lora.rank=4")
            .unwrap()
            .build()
            .unwrap();
        assert_eq!(config.lora.rank, 4);
    }

    #[test]
    fn nested_section_and_dotted_keys_are_read() {
        let config = from("loss.distrust.mode = \"weight\"\n[loss]\nchunk_tokens = 512\n[loss.distrust]\nfloor = 0.2");
        // Dotted keys and a header for the same table exclude each other in TOML.
        assert!(config.is_err());
        let config = from("[loss]\nchunk_tokens = 512\ndistrust.mode = \"weight\"").unwrap();
        assert_eq!(config.distrust.mode.word(), "weight");
        assert_eq!(config.loss.chunk_tokens, Some(512));
    }

    #[test]
    fn scale_clears_the_default_alpha_and_the_weaker_source() {
        let config = from("[lora]\nscale = 20.0").unwrap();
        assert_eq!((config.lora.alpha, config.lora.scale()), (None, 20.0));
        let config = RunConfig::builder()
            .text("[lora]\nscale = 20.0", "x")
            .unwrap()
            .set("lora.alpha=8")
            .unwrap();
        let config = config.build().unwrap();
        assert_eq!(
            (config.lora.alpha, config.lora.scale, config.lora.scale()),
            (Some(8.0), None, 1.0)
        );
    }

    #[test]
    fn err_alpha_and_scale_in_one_source() {
        check_err(
            from("[lora]\nalpha = 16\nscale = 2.0"),
            "run.toml:3: `lora.alpha` and `lora.scale` are both given: give one, the other follows from it",
        );
        let both = RunConfig::builder()
            .set("lora.alpha=16")
            .unwrap()
            .set("lora.scale=2")
            .unwrap()
            .build();
        assert!(matches!(both, Err(Error::RunConflict { .. })));
    }

    #[test]
    fn err_steps_and_epochs_in_one_source() {
        assert!(matches!(
            from("[train]\nsteps = 10\nepochs = 1"),
            Err(Error::RunConflict { .. })
        ));
    }

    #[test]
    fn err_unknown_key_names_the_nearest_and_the_line() {
        check_err(
            from("[lora]\nrank = 4\nrnak = 8"),
            "run.toml:3: unknown key `lora.rnak`; nearest is `lora.rank`",
        );
        check_err(
            from("[train]\nlearning_rate = 1e-4"),
            "run.toml:2: unknown key `train.learning_rate`; nearest is `optimizer.learning_rate`",
        );
        check_err(
            from("rank = 1"),
            "run.toml:1: unknown key `rank`; nearest is `lora.rank`",
        );
        check_err(from("[zebra]"), "run.toml:1: unknown key `zebra`");
        check_err(
            RunConfig::builder().set("train.step=5").map(|_| ()),
            "--set train.step=5: unknown key `train.step`; nearest is `train.steps`",
        );
    }

    #[test]
    fn err_wrong_type_says_what_is_accepted() {
        check_err(
            from("[lora]\n\nrank = \"8\""),
            "run.toml:3: `lora.rank`: found \"8\", expected a whole number",
        );
        check_err(
            from("lora = 3"),
            "run.toml:1: unknown key `lora`; nearest is `lora.rank`",
        );
        check_err(
            from("[schedule]\nname = \"cosin\""),
            "run.toml:2: `schedule.name`: found \"cosin\", expected one of constant, linear, cosine, cosine_restarts, polynomial, wsd; nearest is cosine",
        );
        check_err(
            RunConfig::builder().set("train.steps=-1").map(|_| ()),
            "--set train.steps=-1: `train.steps`: found `-1`, expected a whole number",
        );
        check_err(
            from("[train]\nseed = 99999999999999999999"),
            "run.toml:2: `train.seed`: found \"99999999999999999999\", expected a whole number",
        );
    }

    #[test]
    fn err_syntax_has_the_line() {
        assert!(matches!(from("[lora]\nrank = = 1"), Err(Error::RunSyntax { origin, .. }) if origin == "run.toml:2"));
        assert!(matches!(
            RunConfig::builder().set("lora.rank"),
            Err(Error::RunSyntax { .. })
        ));
    }

    #[test]
    fn err_out_of_range_value_points_to_where_it_was_given() {
        check_err(
            RunConfig::builder()
                .text("[lora]\nrank = 4", "run.toml")
                .unwrap()
                .set("lora.dropout=1")
                .unwrap()
                .build(),
            "--set lora.dropout=1: `lora.dropout`: found 1, expected at least 0 and below 1",
        );
    }

    proptest! {
        #[test]
        fn prop_any_text_never_panics(text in "(\\[[a-z.]{0,8}\\]\n|[a-z.]{0,6} ?= ?[-0-9a-z\"\\[\\]{}.,]{0,8}\n){0,6}") {
            let _ = from(&text);
        }

        #[test]
        fn prop_written_configuration_round_trips(
            rank in 1_usize..512, alpha in prop::option::of(0.1_f64..1e3), dropout in 0.0_f64..1.0, limit in prop::option::of(1_u64..1 << 50),
            steps in prop::option::of(100_usize..9999), eps in 1e-12_f64..1e-2, path in "[ -~äß\\n]{1,12}",
        ) {
            let mut config = RunConfig::default();
            config.lora.rank = rank;
            config.lora.dropout = dropout;
            config.lora.alpha = alpha;
            config.lora.scale = alpha.is_none().then_some(2.5);
            config.train.steps = steps;
            config.optimizer.eps = eps;
            config.model.path = Some(path.into());
            config.backend.memory_limit = limit.map(super::super::ByteSize);
            prop_assert_eq!(from(&config.to_toml()).unwrap(), config);
        }
    }
}
