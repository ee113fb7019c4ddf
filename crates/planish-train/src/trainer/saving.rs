//! What a run leaves on disk, and how it goes on from there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mlx_rs::Array;
use planish_checkpoint::ExactF64;
use planish_checkpoint::run_state::{
    Best as SavedBest, Checkpoint, Counters, DataCursor, Input, Position as SavedPosition, RunState, Verify,
};
use planish_core::hash;
use planish_data::Cursor;
use planish_nn::Model;
use planish_tensors::HostTensor;

use super::Trainer;
use super::under_way::UnderWay;
use crate::events::{Event, Position, SaveReport};
use crate::guard::Guard;
use crate::interval::Interval;
use crate::metrics::Record;
use crate::optimizer::Optimizer;
use crate::options::{TrainOptions, Tuning};
use crate::resume::{self, Resume};
use crate::run_dir::{RunDir, to_host, trained_file};
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
        self.accept_changes(&checkpoint.state)?;
        let changes = checkpoint.state.environment_changes(&self.environment);
        self.notes.extend(
            changes
                .into_iter()
                .map(|change| format!("{change}: the bits may differ from here on")),
        );
        self.restore(&resume::arrays(&optimizer)?, &values, &checkpoint.state)?;
        if !self.evaluation_is_pending() {
            self.saved_again = Some(self.saved_before(dir)?);
        }
        Ok(())
    }

    /// Goes back to the newest checkpoint of this run; false where there is none.
    pub(super) fn go_back(&mut self, model: &mut Model) -> Result<bool> {
        let Some((_, checkpoint)) = self.files.newest(verify(&self.setup.options))? else {
            return Ok(false);
        };
        let (trained, optimizer) = split(&checkpoint);
        let values = resume::trainables(&trained.unwrap_or(checkpoint.adapter.tensors), &model.trainables())?;
        model.set_trainables(&values)?;
        self.restore(&resume::arrays(&optimizer)?, &values, &checkpoint.state)?;
        self.files.metrics().cut(self.metrics_offset)?;
        Ok(true)
    }

    /// Puts optimizer, counters and place in the data back.
    fn restore(&mut self, optimizer: &BTreeMap<String, Array>, values: &[Array], state: &RunState) -> Result<()> {
        self.optimizer.restore(optimizer, values, state.position.optimizer_t)?;

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
        self.interval = Interval::resumed(state);
        let norms: Vec<f64> = state.grad_norms.iter().map(|norm| norm.0).collect();
        self.guard = Guard::with_memory(&norms, state.counters.consecutive_skipped_steps as usize);
        self.last_loss = state.last_loss.map(|loss| loss.0);
        self.adapter_step = state.adapter_step.map(|step| step as usize);
        let best = state.best.as_ref().map(|best| (best.step as usize, best.val_loss.0));
        self.best.restore(best, state.evaluations_without_new_best as usize);
        self.evaluated_at = state.evaluated_at.map(|step| step as usize);
        // An evaluation that was interrupted belongs to the state of its step.
        self.saved_at = Some(step).filter(|_| !self.evaluation_is_pending());
        self.metrics_offset = state.metrics_offset;
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
        let trained = dir.join(trained_file(self.exporter.method()));
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
        let name = trained_file(self.exporter.method());
        self.files.record(&Record::of_save(&report, name))?;
        self.observer.on_event(&Event::Saved(report));
        self.adapter_step = Some(self.position.step);
        Ok(())
    }

    /// Writes everything that is needed to go on from here.
    pub(super) fn save_checkpoint(&mut self, model: &Model) -> Result<()> {
        if self.saved_at == Some(self.position.step) {
            return Ok(());
        }
        let started = Instant::now();
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
        self.last_save = (Instant::now(), started.elapsed());
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
        let inputs = self.inputs.clone();
        Ok(RunState {
            schema: RunState::SCHEMA,
            environment: self.environment.clone(),
            position: SavedPosition {
                step: self.position.step as u64,
                optimizer_t: self.optimizer.count()?,
                micro_step: self.position.micro_step as u64,
                epoch: self.cursor.epoch,
            },
            data: DataCursor {
                epoch: self.cursor.epoch,
                window_index: self.cursor.window_index as u64,
                plan_hash: inputs.plan_hash,
                data_hash: inputs.data_hash,
                tokenizer_hash: inputs.tokenizer_hash,
                template_hash: inputs.template_hash,
            },
            template_time: self.setup.identity.template_time,
            best: self.best.found().map(|(step, loss)| SavedBest {
                step: step as u64,
                val_loss: ExactF64(loss),
                dir: format!("step-{step:07}"),
            }),
            evaluations_without_new_best: self.best.without_new() as u64,
            evaluated_at: self.evaluated_at.map(|step| step as u64),
            counters: Counters {
                trained_tokens: self.interval.tokens,
                total_tokens: self.interval.tokens_total,
                examples: self.interval.examples,
                skipped_steps: self.interval.skipped_steps,
                consecutive_skipped_steps: refused as u64,
            },
            grad_norms: norms.into_iter().map(ExactF64).collect(),
            last_loss: self.last_loss.map(ExactF64),
            adapter_step: self.adapter_step.map(|step| step as u64),
            interval: self.interval.unfinished(),
            metrics_offset: self.files.metrics().offset(),
            config_sha256: inputs.config_sha256,
            base_sha256: inputs.base_sha256,
        })
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
    let mut opened = find(setup)?;
    if let Some(base) = setup.base {
        opened.files.set_base(base);
    }
    Ok(opened)
}

fn find(setup: &Trainer<'_>) -> Result<Opened> {
    if setup.resume == Resume::Fresh {
        return Ok(Opened {
            files: RunDir::create(setup.out)?,
            checkpoint: None,
            notes: Vec::new(),
        });
    }
    let (checkpoints, found) = RunDir::find(setup.out, verify(&setup.options))?;
    let note = found.to_string();
    Ok(Opened {
        files: RunDir::of(checkpoints)?,
        checkpoint: found.found,
        notes: vec![note],
    })
}

fn verify(options: &TrainOptions) -> Verify {
    match options.tuning {
        Tuning::Full => Verify::SizesOnly,
        Tuning::Adapters(_) => Verify::Everything,
    }
}

pub(super) fn checkpoint_name(dir: &Path) -> String {
    format!("checkpoints/{}", dir.file_name().unwrap_or_default().to_string_lossy())
}
