//! What a run leaves on disk, and how it goes on from there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_checkpoint::ExactF64;
use planish_checkpoint::run_state::{
    Best as SavedBest, Checkpoint, Counters, Input, Position as SavedPosition, RunState, Verify,
};
use planish_core::hash;
use planish_data::Cursor;
use planish_nn::Model;
use planish_tensors::HostTensor;

use super::Trainer;
use super::under_way::UnderWay;
use crate::events::{Event, Position, SaveReport};
use crate::guard::Guard;
use crate::metrics::Record;
use crate::optimizer::Optimizer;
use crate::options::Tuning;
use crate::resume::{self, Resume, Snapshot};
use crate::run_dir::{RunDir, to_host};
use crate::{Error, Result};

impl UnderWay<'_> {
    /// Puts a checkpoint's tensors, counters and place in the data back.
    pub(super) fn go_on_from(&mut self, dir: &Path, checkpoint: Checkpoint, model: &mut Model) -> Result<()> {
        let (trained, optimizer) = split(&checkpoint);
        let trained = trained.unwrap_or(checkpoint.adapter.tensors);
        let values = resume::trainables(&trained, &model.trainables())?;
        model.set_trainables(&values)?;
        if self.setup.resume == Resume::WeightsOnly {
            self.optimizer = Optimizer::new(
                self.setup.options.rule.clone(),
                self.setup.options.groups,
                &model.trainables(),
            )?;
            self.notes
                .push("weights only: the optimizer is new and the run starts at step 0".to_owned());
            return Ok(());
        }
        let state = checkpoint.state;
        self.accept_changes(&state)?;
        let changes = state.environment_changes(&self.environment);
        self.notes.extend(
            changes
                .into_iter()
                .map(|change| format!("{change}: the bits may differ from here on")),
        );
        self.optimizer
            .restore(&resume::arrays(&optimizer)?, &values, state.position.optimizer_t)?;

        let step = state.position.step as usize;
        self.cursor = self.plan.place(Cursor {
            epoch: state.data.epoch,
            window_index: state.data.window_index as usize,
        })?;
        self.position = Position {
            step,
            micro_step: state.position.micro_step as usize,
            epoch: self.epoch_now()?,
        };
        let kept = resume::plain(&state.accumulators);
        let list = |name: &str| kept.get(name).cloned().unwrap_or_default();
        self.interval.resume_from(&kept);
        self.interval.tokens = state.counters.trained_tokens;
        self.interval.tokens_total = state.counters.total_tokens;
        self.interval.examples = state.counters.examples;
        self.interval.skipped_steps = state.counters.skipped_steps;
        self.guard = Guard::with_memory(&list("grad_norms"), state.counters.consecutive_skipped_steps as usize);
        self.last_loss = list("last_loss").first().copied();
        self.adapter_step = list("adapter_step").first().map(|&step| step as usize);
        let without_new = list("evaluations_without_new_best").first().map_or(0, |&n| n as usize);
        let best = state.best.as_ref().map(|best| (best.step as usize, best.val_loss.0));
        self.best.restore(best, without_new);
        self.evaluated_at = Some(step);
        self.saved_at = Some(step);
        self.metrics_offset = state.metrics_offset;
        self.saved_again = Some(self.saved_before(dir)?);
        Ok(())
    }

    /// Notes the changed inputs that the caller accepts.
    ///
    /// # Errors
    /// The others.
    fn accept_changes(&mut self, state: &RunState) -> Result<()> {
        let mut accepted = self.setup.accepted.clone();
        if accepted
            .iter()
            .any(|input| matches!(input, Input::Data | Input::Config))
        {
            accepted.push(Input::Plan);
        }
        state.check_inputs(&self.inputs, &accepted)?;
        let changed = state.changed_inputs(&self.inputs);
        self.notes.extend(changed.into_iter().map(|change| {
            let name = change.input.name();
            format!("the {name} has changed, as accepted: from here on this is another run than it was")
        }));
        Ok(())
    }

    /// The report of a checkpoint that an earlier process wrote.
    fn saved_before(&self, dir: &Path) -> Result<SaveReport> {
        let is_full = self.setup.options.tuning == Tuning::Full;
        let trained = dir.join(if is_full {
            "model.safetensors.index.json"
        } else {
            "adapters.safetensors"
        });
        let io = |source| Error::Io {
            path: trained.clone(),
            action: "read",
            source,
        };
        let sha256 = hash::sha256_file(&trained).map_err(io)?;
        Ok(SaveReport {
            position: self.position,
            path: dir.to_owned(),
            sha256,
            seconds: 0.0,
        })
    }

    /// Writes the adapter into the output folder.
    pub(super) fn save_adapter(&mut self, model: &Model) -> Result<()> {
        let report = self.files.save_adapter(&self.exporter.adapter(model)?, self.position)?;
        self.files.record(&Record::of_save(&report, "adapters.safetensors"))?;
        self.observer.on_event(&Event::Saved(report));
        self.adapter_step = Some(self.position.step);
        Ok(())
    }

    /// Writes everything that is needed to go on from here.
    pub(super) fn save_checkpoint(&mut self, model: &Model) -> Result<()> {
        if self.saved_at == Some(self.position.step) {
            return Ok(());
        }
        let started = std::time::Instant::now();
        let mut tensors = self.optimizer.state()?;
        if !self.exporter.is_plain() {
            // The adapter file holds a converted form, from which the trained values cannot be had to the bit.
            tensors.extend(
                model
                    .trainables()
                    .into_iter()
                    .map(|(name, value)| (format!("{TRAINED}{name}"), value)),
            );
        }
        let optimizer = tensors.iter().map(|(name, array)| Ok((name.clone(), to_host(array)?)));
        let checkpoint = Checkpoint {
            adapter: self.exporter.adapter(model)?,
            optimizer: optimizer.collect::<Result<_>>()?,
            state: self.state()?,
        };
        let saved = self.files.save_checkpoint(&checkpoint, self.setup.options.keep_last)?;
        self.saved_at = Some(self.position.step);
        let report = SaveReport {
            position: self.position,
            path: saved.dir,
            sha256: saved.sha256,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.files
            .record(&Record::of_save(&report, &checkpoint_name(&report.path)))?;
        self.observer.on_event(&Event::Saved(report));
        Ok(())
    }

    fn state(&mut self) -> Result<RunState> {
        let (norms, refused) = self.guard.memory();
        let mut accumulators = self.interval.unfinished();
        accumulators.insert("grad_norms".to_owned(), norms);
        accumulators.insert("last_loss".to_owned(), self.last_loss.into_iter().collect());
        accumulators.insert(
            "adapter_step".to_owned(),
            self.adapter_step.iter().map(|&step| step as f64).collect(),
        );
        accumulators.insert(
            "evaluations_without_new_best".to_owned(),
            vec![self.best.without_new() as f64],
        );
        let snapshot = Snapshot {
            options: &self.setup.options,
            inputs: &self.inputs,
            environment: &self.environment,
            position: SavedPosition {
                step: self.position.step as u64,
                optimizer_t: self.optimizer.count()?,
                micro_step: self.position.micro_step as u64,
                epoch: self.cursor.epoch,
            },
            window_index: self.cursor.window_index,
            schedule: &self.schedule,
            best: self.best.found().map(|(step, loss)| SavedBest {
                step: step as u64,
                val_loss: ExactF64(loss),
                patience_left: self.best.patience_left().unwrap_or(0) as u64,
                dir: format!("step-{step:07}"),
            }),
            counters: Counters {
                trained_tokens: self.interval.tokens,
                total_tokens: self.interval.tokens_total,
                examples: self.interval.examples,
                skipped_steps: self.interval.skipped_steps,
                consecutive_skipped_steps: refused as u64,
                ema_loss: None,
            },
            weights: &self.weights,
            accumulators,
            metrics_offset: self.files.metrics().offset(),
        };
        Ok(snapshot.to_state())
    }
}

/// Marks trained values among the optimizer's tensors.
const TRAINED: &str = "trained/";

/// The trained values of a checkpoint whose adapter file holds another form of them, and the optimizer's own tensors.
fn split(checkpoint: &Checkpoint) -> (Option<Tensors>, Tensors) {
    let (mut trained, mut optimizer) = (Tensors::new(), Tensors::new());
    for (name, tensor) in &checkpoint.optimizer {
        match name.strip_prefix(TRAINED) {
            Some(name) => trained.insert(name.to_owned(), tensor.clone()),
            None => optimizer.insert(name.clone(), tensor.clone()),
        };
    }
    (Some(trained).filter(|trained| !trained.is_empty()), optimizer)
}

type Tensors = BTreeMap<String, HostTensor>;

/// An output folder that is ready to be written to.
pub(super) struct Opened {
    pub(super) files: RunDir,
    /// What to go on from, and its directory.
    pub(super) checkpoint: Option<(PathBuf, Checkpoint)>,
    /// What to say about it.
    pub(super) notes: Vec<String>,
}

pub(super) fn open(setup: &Trainer<'_>) -> Result<Opened> {
    if setup.resume == Resume::Fresh {
        return Ok(Opened {
            files: RunDir::create(setup.out)?,
            checkpoint: None,
            notes: Vec::new(),
        });
    }
    let verify = if setup.options.tuning == Tuning::Full {
        Verify::SizesOnly
    } else {
        Verify::Everything
    };
    let (checkpoints, found) = RunDir::find(setup.out, verify)?;
    let note = found.to_string();
    Ok(Opened {
        files: RunDir::of(checkpoints)?,
        checkpoint: found.found,
        notes: vec![note],
    })
}

pub(super) fn checkpoint_name(dir: &Path) -> String {
    format!("checkpoints/{}", dir.file_name().unwrap_or_default().to_string_lossy())
}
