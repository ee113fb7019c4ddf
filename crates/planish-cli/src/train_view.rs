//! What a run looks like: a live line on a terminal, a plain line an interval elsewhere.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressFinish, ProgressState, ProgressStyle};
use planish_core::units::{format_bytes, format_duration};
use planish_train::events::{EvalReport, GuardReason, GuardReport, RunPlan, StepReport, TrainReport};
use planish_train::{Event, Observer};

use crate::model::DeviceInUse;
use crate::output;

pub(crate) struct TrainView {
    model: String,
    device: DeviceInUse,
    bar: Option<ProgressBar>,
    /// Sum of the losses since the start and their number, until there is a report.
    first_losses: (f64, usize),
    validation: Option<String>,
    report: Option<TrainReport>,
}

impl TrainView {
    pub(crate) fn new(model: &Path, device: DeviceInUse) -> Self {
        Self {
            model: model.display().to_string(),
            device,
            bar: None,
            first_losses: (0.0, 0),
            validation: None,
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
        self.first_losses.0 += step.loss * step.items as f64;
        self.first_losses.1 += step.items;
        let Some(bar) = &self.bar else { return };
        let (position, length) = (step.position.step as u64, step.total_steps);
        let taken = BAR_WIDTH + format!(" {position}/{length}  999 minutes").len();
        bar.set_position(position);
        bar.set_message(joined(&self.parts(step), terminal_width().saturating_sub(taken)));
    }

    /// What the live line says, the most important first.
    fn parts(&self, step: &StepReport) -> Vec<String> {
        // The loss of the record, as soon as there is one.
        let (sum, items) = self.first_losses;
        let loss = self
            .report
            .as_ref()
            .map_or(sum / items.max(1) as f64, |report| report.loss);
        let mut parts = vec![format!("epoch {:.2}", step.position.epoch), format!("loss {loss:.3}")];
        parts.extend(self.validation.clone());
        parts.push(format!("lr {:.1e}", step.learning_rate));
        parts.push(format!("|g| {:.2}", step.grad_norm));
        if let Some(report) = &self.report {
            parts.push(format!("{:.0} tok/s", report.tokens_per_second));
            let (active, peak) = (report.memory.active_bytes, report.memory.peak_bytes);
            parts.push(format!("{} (peak {})", format_bytes(active), format_bytes(peak)));
        }
        parts
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
        self.validation = Some(format!("val {:.3}{mark}", eval.loss));
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
            Event::Finished(_) => self.bar.take().iter().for_each(ProgressBar::abandon),
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
    let pairs = eval
        .figures
        .get("reward_margin")
        .zip(eval.figures.get("reward_accuracy"));
    let pairs = pairs.map(|(margin, share)| format!("  margin {margin:.4}  {:.0} % of the pairs right", 100.0 * share));
    perplexity.or(pairs).unwrap_or_default()
}

/// Columns of the bar itself.
const BAR_WIDTH: usize = 24;

/// The first parts that have room, whole.
fn joined(parts: &[String], room: usize) -> String {
    let mut line = String::new();
    for part in parts {
        let separator = if line.is_empty() { "" } else { " · " };
        if line.chars().count() + separator.chars().count() + part.chars().count() > room {
            break;
        }
        line.push_str(separator);
        line.push_str(part);
    }
    line
}

fn terminal_width() -> usize {
    usize::from(console::Term::stderr().size().1)
}

/// A bar that stays where the run stopped.
fn training_bar(plan: &RunPlan) -> ProgressBar {
    let bar = ProgressBar::new(plan.total_steps as u64)
        .with_position(plan.first_step as u64)
        .with_finish(ProgressFinish::Abandon);
    let left = |state: &ProgressState, line: &mut dyn std::fmt::Write| {
        if !state.is_finished() {
            let _ = write!(line, "{:#}", HumanDuration(state.eta()));
        }
    };
    // A template that is wrong falls back to indicatif's own: a progress bar is no reason to fail.
    match ProgressStyle::with_template(&format!("{{bar:{BAR_WIDTH}}} {{pos}}/{{len}} {{msg}} {{left}}")) {
        Ok(style) => bar.with_style(style.with_key("left", left)),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_is_left_out_whole() {
        let parts = ["loss 2.669", "val 1.750", "86.1 MB (peak 374 MB)"].map(str::to_owned);
        assert_eq!(joined(&parts, 80), "loss 2.669 · val 1.750 · 86.1 MB (peak 374 MB)");
        assert_eq!(joined(&parts, 45), "loss 2.669 · val 1.750");
        assert_eq!(joined(&parts, 12), "loss 2.669");
        assert_eq!(joined(&parts, 5), "");
    }

    #[test]
    fn bar_shows_the_loss_of_the_record_weighted_by_tokens() {
        let mut view = TrainView::new(Path::new("m"), crate::model::DeviceInUse::Cpu);
        let step = |loss: f64, items: usize| StepReport {
            loss,
            items,
            ..StepReport::default()
        };
        view.step(&step(1.0, 30));
        view.step(&step(5.0, 10));
        assert!(view.parts(&step(5.0, 10)).contains(&"loss 2.000".to_owned()));
        view.report(&TrainReport {
            loss: 1.5,
            ..TrainReport::default()
        });
        view.step(&step(9.0, 10));
        assert!(view.parts(&step(9.0, 10)).contains(&"loss 1.500".to_owned()));
    }
}
