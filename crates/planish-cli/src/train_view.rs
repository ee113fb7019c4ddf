//! What a run looks like: a live line on a terminal, a plain line an interval elsewhere.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use planish_core::units::{format_bytes, format_duration};
use planish_train::events::{EvalReport, GuardReason, GuardReport, RunPlan, StepReport, TrainReport};
use planish_train::{Event, Observer};

use crate::model::DeviceInUse;
use crate::output;

/// Weight of the newest loss in the moving average.
const SMOOTHING: f64 = 0.1;

pub(crate) struct TrainView {
    model: String,
    device: DeviceInUse,
    bar: Option<ProgressBar>,
    smooth_loss: Option<f64>,
    validation: String,
    report: Option<TrainReport>,
}

impl TrainView {
    pub(crate) fn new(model: &Path, device: DeviceInUse) -> Self {
        Self {
            model: model.display().to_string(),
            device,
            bar: None,
            smooth_loss: None,
            validation: String::new(),
            report: None,
        }
    }

    fn started(&mut self, plan: &RunPlan) {
        let share = 100.0 * plan.trainable as f64 / plan.total.max(1) as f64;
        let what = match plan.rank {
            0 => "all weights".to_string(),
            rank => format!("rank {rank}, scale {}, {} modules", plan.scale, plan.modules.len()),
        };
        self.say(&format!("model   {} on {}", self.model, self.device.word()));
        self.say(&format!(
            "train   {what}: {} of {} numbers ({share:.2} %)",
            plan.trainable, plan.total
        ));
        for line in targets(plan) {
            self.say(&line);
        }
        let data = &plan.data;
        let shapes: Vec<String> = data.shapes.iter().map(|s| format!("{}x{}", s.rows, s.length)).collect();
        self.say(&format!(
            "data    {} examples, {} trained tokens an epoch, shapes {} ({:.1} % padding)",
            data.examples,
            data.target_tokens,
            shapes.join(" "),
            100.0 * data.padding_fraction
        ));
        let (total, epoch, warmup) = (plan.total_steps, plan.steps_per_epoch, plan.warmup_steps);
        self.say(&format!("steps   {total} ({epoch} an epoch, {warmup} of warm-up)"));
        if std::io::stderr().is_terminal() {
            self.bar = Some(training_bar(plan));
        }
    }

    fn step(&mut self, step: &StepReport) {
        let before = self.smooth_loss.unwrap_or(step.loss);
        let smooth = before + SMOOTHING * (step.loss - before);
        // A loss that is no number must not stay in the average for ever.
        self.smooth_loss = Some(if smooth.is_finite() { smooth } else { before });
        let Some(bar) = &self.bar else { return };
        let report = self.report.as_ref();
        let memory = report.map(|r| {
            format!(
                " · {:.0} tok/s · {} (peak {})",
                r.tokens_per_second,
                format_bytes(r.memory.active_bytes),
                format_bytes(r.memory.peak_bytes)
            )
        });
        bar.set_position(step.position.step as u64);
        bar.set_message(format!(
            "epoch {:.2} · loss {:.3} ({:.3}){} · lr {:.1e} · |g| {:.2}{}",
            step.position.epoch,
            self.smooth_loss.unwrap_or(step.loss),
            step.loss,
            self.validation,
            step.learning_rate,
            step.grad_norm,
            memory.unwrap_or_default()
        ));
    }

    fn report(&mut self, report: &TrainReport) {
        if self.bar.is_none() {
            output::note(&format!(
                "step {}  epoch {:.2}  loss {:.4}  lr {:.2e}  grad {:.3}  {:.0} tok/s  peak {}  left {}",
                report.position.step,
                report.position.epoch,
                report.loss,
                report.lr,
                report.grad_norm,
                report.tokens_per_second,
                format_bytes(report.memory.peak_bytes),
                format_duration(Duration::try_from_secs_f64(report.eta_seconds).unwrap_or_default())
            ));
        }
        self.report = Some(report.clone());
    }

    fn evaluated(&mut self, eval: &EvalReport) {
        let mark = if eval.best { " (best)" } else { "" };
        self.validation = format!(" · val {:.3}{mark}", eval.loss);
        self.say(&format!(
            "step {}  validation loss {:.4}{}{mark}",
            eval.position.step,
            eval.loss,
            quality(eval)
        ));
    }

    fn guard(&self, guard: &GuardReport) {
        let (step, norm, rows) = (guard.position.step, guard.grad_norm, guard.rows.join(", "));
        self.say(&match guard.reason {
            GuardReason::NotFinite => format!("warning: step {step} was not finite and left out; rows {rows}"),
            GuardReason::Spike => {
                format!("warning: step {step} has a gradient of norm {norm:.1}, far above usual; rows {rows}")
            }
        });
    }

    /// A line above the bar, if there is one.
    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::note(text)),
            None => output::note(text),
        }
    }
}

impl Observer for TrainView {
    fn on_event(&mut self, event: &Event) {
        match event {
            Event::Started(plan) => self.started(plan),
            Event::Step(step) => self.step(step),
            Event::Report(report) => self.report(report),
            Event::Evaluated(eval) => self.evaluated(eval),
            Event::Guard(guard) => self.guard(guard),
            Event::Note(text) => self.say(text),
            Event::Finished(_) => self.bar.take().iter().for_each(ProgressBar::finish),
            _ => {}
        }
    }
}

/// The adapted modules, those of one name and one kind together.
fn targets(plan: &RunPlan) -> Vec<String> {
    let mut kinds: Vec<(&str, usize, f64, usize)> = Vec::new();
    for (path, &(rank, scale)) in plan.modules.iter().zip(&plan.own_rank_and_scale) {
        // The name inside its block: `self_attn.q_proj`.
        let name = path
            .rsplitn(3, '.')
            .nth(2)
            .map_or(path.as_str(), |before| &path[before.len() + 1..]);
        match kinds
            .iter_mut()
            .find(|kind| (kind.0, kind.1, kind.2) == (name, rank, scale))
        {
            Some(kind) => kind.3 += 1,
            None => kinds.push((name, rank, scale, 1)),
        }
    }
    let is_uniform = kinds
        .windows(2)
        .all(|pair| (pair[0].1, pair[0].2) == (pair[1].1, pair[1].2));
    if is_uniform {
        let names: Vec<String> = kinds
            .iter()
            .map(|(name, .., count)| format!("{name} ×{count}"))
            .collect();
        return if names.is_empty() {
            Vec::new()
        } else {
            vec![format!("modules {}", names.join(", "))]
        };
    }
    let line = |(name, rank, scale, count): &(&str, usize, f64, usize)| {
        format!("module  {name} ×{count}: rank {rank}, scale {scale}")
    };
    kinds.iter().map(line).collect()
}

/// Perplexity of tokens, or margin and accuracy of pairs.
fn quality(eval: &EvalReport) -> String {
    let perplexity = eval.perplexity.zip(eval.perplexity_se);
    let perplexity = perplexity.map(|(perplexity, se)| format!("  perplexity {perplexity:.3} ± {se:.3}"));
    let pairs = eval.preference.map(|pairs| {
        let percent = 100.0 * pairs.accuracy;
        format!("  margin {:.4}  {percent:.0} % of the pairs right", pairs.margin)
    });
    perplexity.or(pairs).unwrap_or_default()
}

fn training_bar(plan: &RunPlan) -> ProgressBar {
    let bar = ProgressBar::new(plan.total_steps as u64).with_position(plan.first_step as u64);
    // A template that is wrong falls back to indicatif's own: a progress bar is no reason to fail.
    match ProgressStyle::with_template("{bar:24} {pos}/{len} {wide_msg} {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
