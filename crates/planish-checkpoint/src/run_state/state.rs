use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::exact::ExactF64;

/// Everything of a run that is not a tensor, as `state.json` holds it.
///
/// Floating-point numbers are [`ExactF64`]: equal state gives equal bytes, and reading loses no bit. Unknown keys are
/// errors, because a state from a newer planish may depend on them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Version of this layout.
    pub schema: u32,
    /// Where it was computed.
    #[serde(flatten)]
    pub environment: Environment,
    /// How far the run is.
    #[serde(flatten)]
    pub position: Position,
    /// Which batch comes next, and of what data.
    pub data: DataCursor,
    /// Seconds since 1970 that chat templates took for the time; templates with a date in them need the same again.
    pub template_time: Option<i64>,
    /// Best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since the best one.
    pub evaluations_without_new_best: u64,
    /// Step of the last evaluation.
    pub evaluated_at: Option<u64>,
    /// Totals since the start.
    pub counters: Counters,
    /// Recent gradient norms, oldest first.
    pub grad_norms: Vec<ExactF64>,
    /// Loss of the last report.
    pub last_loss: Option<ExactF64>,
    /// Step of the adapter in the output folder.
    pub adapter_step: Option<u64>,
    /// The reporting interval that is not over.
    pub interval: Interval,
    /// Bytes of `metrics.jsonl` that belong to the run up to here.
    pub metrics_offset: u64,
    /// SHA-256 of the resolved configuration.
    pub config_sha256: String,
    /// SHA-256 that stands for the base weights.
    pub base_sha256: String,
}

/// Software and machine: the same numbers to the bit are promised only where these are the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// The planish that computed it.
    pub planish_version: String,
    /// The MLX that computed it.
    pub mlx_version: String,
    /// `cpu` or `gpu`.
    pub backend: String,
    /// Name of the device.
    pub device: String,
    /// What computed the model's blocks there.
    pub kernels: String,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Updates done, skipped ones included: the position of the schedule.
    pub step: u64,
    /// The optimizer's own count, without skipped steps.
    pub optimizer_t: u64,
    /// Micro-batches done.
    pub micro_step: u64,
    /// Epochs begun, from 0.
    pub epoch: u64,
}

/// Which batch comes next. The plan of batches is a pure function of the hashes, the seed and the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataCursor {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Window of the epoch's plan: the batches of one update.
    pub window_index: u64,
    /// SHA-256 of the plan.
    pub plan_hash: String,
    /// SHA-256 of the data.
    pub data_hash: String,
    /// SHA-256 of the tokenizer.
    pub tokenizer_hash: String,
    /// SHA-256 of the chat template.
    pub template_hash: String,
}

/// The best evaluation so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Step of the evaluation.
    pub step: u64,
    /// Its validation loss.
    pub val_loss: ExactF64,
    /// Name of its checkpoint, such as `step-0000100`.
    pub dir: String,
}

/// Totals since the start of the run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Target tokens trained on.
    pub trained_tokens: u64,
    /// Tokens with context.
    pub total_tokens: u64,
    /// Rows.
    pub examples: u64,
    /// Steps that the guard skipped.
    pub skipped_steps: u64,
    /// Skipped steps in a row up to here.
    pub consecutive_skipped_steps: u64,
}

/// Sums over the updates since the last report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// Updates.
    pub steps: u64,
    /// Updates whose gradient was clipped.
    pub clipped: u64,
    /// Loss over the items, which are tokens or preference pairs.
    pub loss: ExactF64,
    /// The same with the weights of examples.
    pub weighted_loss: ExactF64,
    /// Means over the micro-batches of an update.
    pub means: ExactF64,
    /// Items.
    pub items: u64,
    /// Trained tokens.
    pub tokens: u64,
    /// Positions with a token.
    pub used_positions: u64,
    /// Positions.
    pub positions: u64,
    /// Learning rate of the last update.
    pub learning_rate: ExactF64,
    /// Norm of the last gradient.
    pub grad_norm: ExactF64,
    /// What the objective reports besides, by name.
    pub figures: BTreeMap<String, ExactF64>,
    /// Provenance weighting, when it is on.
    pub distrust: Option<DistrustSums>,
    /// Rows and length of every batch so far, of the whole run.
    pub shapes: BTreeSet<(u64, u64)>,
}

/// Sums over the windows of an interval.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistrustSums {
    /// Effective sample sizes.
    pub ess: ExactF64,
    /// The same as shares of the examples.
    pub ess_fraction: ExactF64,
    /// Largest weight.
    pub weight_max: ExactF64,
    /// Published values of the examples that have one.
    pub values: ExactF64,
    /// How many have one.
    pub n_values: u64,
}

/// The inputs that must be the same when a run goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunInputs {
    /// SHA-256 of the resolved configuration.
    pub config_sha256: String,
    /// SHA-256 that stands for the base weights.
    pub base_sha256: String,
    /// SHA-256 of the data.
    pub data_hash: String,
    /// SHA-256 of the tokenizer.
    pub tokenizer_hash: String,
    /// SHA-256 of the chat template.
    pub template_hash: String,
    /// SHA-256 of the plan of batches; follows from the others and the seed.
    pub plan_hash: String,
}

/// One input of a run, as refusals and overrides name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Input {
    /// The resolved configuration.
    Config,
    /// The base weights.
    Base,
    /// The training data.
    Data,
    /// The tokenizer.
    Tokenizer,
    /// The chat template.
    Template,
    /// The plan of batches.
    Plan,
}

impl Input {
    /// All of them, as a state compares them.
    pub const ALL: [Input; 6] = [
        Self::Config,
        Self::Base,
        Self::Data,
        Self::Tokenizer,
        Self::Template,
        Self::Plan,
    ];

    /// The name that is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Config => "configuration",
            Self::Base => "base model",
            Self::Data => "data",
            Self::Tokenizer => "tokenizer",
            Self::Template => "chat template",
            Self::Plan => "batch plan",
        }
    }

    /// The name in one word, which an override takes.
    pub fn word(self) -> &'static str {
        match self {
            Self::Config => "configuration",
            Self::Base => "base",
            Self::Data => "data",
            Self::Tokenizer => "tokenizer",
            Self::Template => "template",
            Self::Plan => "plan",
        }
    }
}

/// An input that is not what it was when the checkpoint was cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedInput {
    /// Which one.
    pub input: Input,
    /// Its hash in the checkpoint.
    pub saved: String,
    /// Its hash now.
    pub now: String,
}

impl fmt::Display for ChangedInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (was {}, is {})", self.input.name(), self.saved, self.now)
    }
}

impl RunState {
    /// The version of the layout that is written and read.
    pub const SCHEMA: u32 = 2;

    /// The JSON text; equal states give equal bytes.
    pub fn to_json(&self) -> Vec<u8> {
        // Strings, numbers and maps with string keys always serialise.
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        json
    }

    /// Reads the JSON text.
    ///
    /// # Errors
    /// [`Error::BadJson`] for a missing, unknown or ill-typed key, and for another schema.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self> {
        let known: serde_json::Value = serde_json::from_slice(json).map_err(|e| Error::json(path, &e))?;
        let schema = known.get("schema").and_then(serde_json::Value::as_u64);
        if schema != Some(u64::from(Self::SCHEMA)) {
            let found = schema.map_or("missing".to_string(), |schema| schema.to_string());
            let writer = known
                .get("planish_version")
                .and_then(serde_json::Value::as_str)
                .unwrap_or("unknown");
            let reason = format!(
                "`schema` is {found} (written by planish {writer}), this planish reads {}; resume with that version, or \
                 begin a run from its adapter with lora.start",
                Self::SCHEMA
            );
            return Err(Error::BadJson {
                path: path.to_path_buf(),
                reason,
            });
        }
        serde_json::from_slice(json).map_err(|e| Error::json(path, &e))
    }

    /// What is not what it was when the checkpoint was cut.
    pub fn changed_inputs(&self, now: &RunInputs) -> Vec<ChangedInput> {
        let pairs = [
            (Input::Config, &self.config_sha256, &now.config_sha256),
            (Input::Base, &self.base_sha256, &now.base_sha256),
            (Input::Data, &self.data.data_hash, &now.data_hash),
            (Input::Tokenizer, &self.data.tokenizer_hash, &now.tokenizer_hash),
            (Input::Template, &self.data.template_hash, &now.template_hash),
            (Input::Plan, &self.data.plan_hash, &now.plan_hash),
        ];
        let changed = pairs.into_iter().filter(|(_, saved, now)| saved != now);
        changed
            .map(|(input, saved, now)| ChangedInput {
                input,
                saved: saved.clone(),
                now: now.clone(),
            })
            .collect()
    }

    /// Compares the inputs of the run with those it had, leaving out those that `ignore` names.
    ///
    /// # Errors
    /// [`Error::InputsChanged`] naming every input that differs.
    pub fn check_inputs(&self, now: &RunInputs, ignore: &[Input]) -> Result<()> {
        let mut changed = self.changed_inputs(now);
        changed.retain(|change| !ignore.contains(&change.input));
        if changed.is_empty() {
            Ok(())
        } else {
            Err(Error::InputsChanged {
                step: self.position.step,
                changed,
            })
        }
    }

    /// What differs between the machine of the checkpoint and this one, as sentences: the run goes on, but not to the
    /// same bits.
    pub fn environment_changes(&self, now: &Environment) -> Vec<String> {
        let was = &self.environment;
        let pairs = [
            ("planish", &was.planish_version, &now.planish_version),
            ("MLX", &was.mlx_version, &now.mlx_version),
            ("backend", &was.backend, &now.backend),
            ("device", &was.device, &now.device),
            ("what computes", &was.kernels, &now.kernels),
        ];
        let changed = pairs.into_iter().filter(|(_, was, is)| was != is);
        changed
            .map(|(name, was, is)| format!("{name} was {was} and is {is}"))
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A state in which no field has its default.
    pub(crate) fn example(step: u64) -> RunState {
        let exact = ExactF64;
        RunState {
            schema: RunState::SCHEMA,
            environment: Environment {
                planish_version: "0.1.0".into(),
                mlx_version: "0.32.2".into(),
                backend: "cpu".into(),
                device: "test".into(),
                kernels: "test kernels".into(),
            },
            position: Position {
                step,
                optimizer_t: step - 1,
                micro_step: step * 2,
                epoch: 1,
            },
            data: DataCursor {
                epoch: 1,
                window_index: 3,
                plan_hash: "plan".into(),
                data_hash: "data".into(),
                tokenizer_hash: "tokenizer".into(),
                template_hash: "template".into(),
            },
            template_time: Some(1_700_000_000),
            best: Some(Best {
                step: 1,
                val_loss: exact(2.5),
                dir: "step-0000001".into(),
            }),
            evaluations_without_new_best: 2,
            evaluated_at: Some(4),
            counters: Counters {
                trained_tokens: 1,
                total_tokens: 2,
                examples: 3,
                skipped_steps: 1,
                consecutive_skipped_steps: 1,
            },
            grad_norms: vec![exact(0.1), exact(0.7)],
            last_loss: Some(exact(1.7)),
            adapter_step: Some(1),
            interval: Interval {
                steps: 2,
                clipped: 1,
                loss: exact(0.3),
                weighted_loss: exact(0.2),
                means: exact(0.4),
                items: 9,
                tokens: 8,
                used_positions: 7,
                positions: 16,
                learning_rate: exact(1e-4),
                grad_norm: exact(f64::INFINITY),
                figures: BTreeMap::from([("reward_margin".into(), exact(0.7))]),
                distrust: Some(DistrustSums {
                    ess: exact(1.5),
                    ess_fraction: exact(0.5),
                    weight_max: exact(2.0),
                    values: exact(0.1),
                    n_values: 3,
                }),
                shapes: BTreeSet::from([(2, 8)]),
            },
            metrics_offset: 1234,
            config_sha256: "config".into(),
            base_sha256: "base".into(),
        }
    }

    fn inputs() -> RunInputs {
        let text = |s: &str| s.to_string();
        RunInputs {
            config_sha256: text("config"),
            base_sha256: text("base"),
            data_hash: text("data"),
            tokenizer_hash: text("tokenizer"),
            template_hash: text("template"),
            plan_hash: text("plan"),
        }
    }

    proptest! {
        /// S-1: serialise, parse, serialise gives the same bytes for any f64.
        #[test]
        fn prop_state_survives_to_the_bit(bits in prop::collection::vec(any::<u64>(), 6), time in any::<i64>()) {
            let number = |i: usize| ExactF64(f64::from_bits(bits[i]));
            let mut state = example(5);
            state.template_time = Some(time);
            state.last_loss = Some(number(0));
            state.interval.loss = number(1);
            state.best.as_mut().unwrap().val_loss = number(2);
            state.interval.figures.insert("x".into(), number(3));
            state.grad_norms = vec![number(4), number(5)];
            let json = state.to_json();
            let back = RunState::from_json(&json, Path::new("state.json")).unwrap();
            prop_assert_eq!(&back, &state);
            prop_assert_eq!(back.to_json(), json);
        }
    }

    #[test]
    fn each_changed_input_is_refused_by_its_name() {
        let state = example(5);
        state.check_inputs(&inputs(), &[]).unwrap();
        type Field = fn(&mut RunInputs) -> &mut String;
        let change: [(Input, Field); 6] = [
            (Input::Config, |i| &mut i.config_sha256),
            (Input::Base, |i| &mut i.base_sha256),
            (Input::Data, |i| &mut i.data_hash),
            (Input::Tokenizer, |i| &mut i.tokenizer_hash),
            (Input::Template, |i| &mut i.template_hash),
            (Input::Plan, |i| &mut i.plan_hash),
        ];
        for (input, field) in change {
            let mut now = inputs();
            *field(&mut now) = "other".to_string();
            let Err(Error::InputsChanged { changed, .. }) = state.check_inputs(&now, &[]) else {
                panic!("{input:?}")
            };
            assert_eq!(changed.iter().map(|c| c.input).collect::<Vec<_>>(), [input]);
            state.check_inputs(&now, &[input]).unwrap();
        }
    }

    #[test]
    fn err_unknown_or_missing_key() {
        let good: serde_json::Value = serde_json::from_slice(&example(5).to_json()).unwrap();
        let refused = |value: &serde_json::Value| {
            RunState::from_json(value.to_string().as_bytes(), Path::new("state.json"))
                .unwrap_err()
                .to_string()
        };
        let keys: Vec<String> = good.as_object().unwrap().keys().cloned().collect();
        let optional = ["best", "template_time", "evaluated_at", "last_loss", "adapter_step"];
        for key in keys.iter().filter(|key| !optional.contains(&key.as_str())) {
            let mut bad = good.clone();
            bad.as_object_mut().unwrap().remove(key);
            assert!(refused(&bad).contains(key), "{key}");
        }
        for (parent, key) in [
            ("", "new"),
            ("/data", "new"),
            ("/interval", "new"),
            ("/counters", "new"),
        ] {
            let mut bad = good.clone();
            bad.pointer_mut(parent).unwrap()[key] = 1.into();
            assert!(
                refused(&bad).contains("unknown field `new`"),
                "{parent}: {}",
                refused(&bad)
            );
        }
        let mut bad = good.clone();
        bad["schema"] = 1.into();
        let reason = refused(&bad);
        assert!(
            reason.contains("`schema` is 1 (written by planish 0.1.0)") && reason.contains("lora.start"),
            "{reason}"
        );
    }

    #[test]
    fn another_machine_is_named() {
        let state = example(5);
        assert!(state.environment_changes(&state.environment).is_empty());
        let now = Environment {
            mlx_version: "0.33.0".into(),
            ..state.environment.clone()
        };
        assert_eq!(state.environment_changes(&now), ["MLX was 0.32.2 and is 0.33.0"]);
    }
}
