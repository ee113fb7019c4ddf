//! How runs end: faults of the device, divergence, interruptions and mistakes; what they leave behind.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use planish_data::{Batch, Window};
use planish_nn::{LoraConfig, Model};
use planish_train::objective::{About, Collated, Fill, Item, Objective, Outcome, Pass};
use planish_train::optimizer::{Adam, Rule};
use planish_train::{
    End, Error, Event, Result, Resume, Sft, Silent, StopFlag, TrainOptions, Trainer, Tuning, schedule::Shape,
};

use crate::world::{World, lora, options, relative_distance, tiny_model, train, uneven_rows, values};

/// Supervised fine-tuning on a device that gives up on more than so many rows at a time, after some passes that it does.
#[derive(Debug)]
struct Fragile {
    most_rows: i32,
    good_passes: Cell<usize>,
    message: &'static str,
}

const WATCHDOG: &str = "[METAL] Command buffer execution failed: Caused GPU Timeout Error \
                        (00000002:kIOGPUCommandBufferCallbackErrorTimeout)";

impl Fragile {
    fn after(good_passes: usize, most_rows: i32, message: &'static str) -> Rc<Self> {
        let good_passes = Cell::new(good_passes);
        Rc::new(Self {
            most_rows,
            good_passes,
            message,
        })
    }
}

impl Objective for Fragile {
    fn item(&self) -> Item {
        Sft.item()
    }

    fn collate(&self, batch: &Batch, window: &Window, about: &About<'_>, fill: Fill) -> Result<Collated> {
        Sft.collate(batch, window, about, fill)
    }

    fn forward(&self, model: &Model, batch: &Collated, pass: Pass<'_>) -> Result<Outcome> {
        let left = self.good_passes.get();
        self.good_passes.set(left.saturating_sub(1));
        if left == 0 && batch.tokens.ids().dim(0) > self.most_rows {
            return Err(Error::MlxLayer(planish_mlx::Error::Operation(self.message.to_owned())));
        }
        Sft.forward(model, batch, pass)
    }
}

fn four_rows() -> TrainOptions {
    TrainOptions {
        batch_size: 4,
        shape: Shape::Constant,
        rule: Rule::Adam(Adam {
            eps: 1e-4,
            ..Adam::default()
        }),
        ..options(4)
    }
}

#[test]
fn device_that_gives_up_gets_smaller_pieces_and_the_run_goes_on() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let straight = train(four_rows(), &data, None, &world.path("straight"));
    let memory = "[malloc_or_wait] Unable to allocate 40000000 bytes.";
    for (good_passes, most_rows, message) in [(0, 1, WATCHDOG), (2, 2, WATCHDOG), (1, 1, memory)] {
        let mut notes = Vec::new();
        let mut watch = |event: &Event| {
            if let Event::Note(note) = event {
                notes.push(note.clone());
            }
        };
        let mut model = tiny_model();
        let out = world.path(&format!("{good_passes}-{most_rows}-{}", message.len()));
        let run = Trainer::new(four_rows(), &data, &out).objective(Fragile::after(good_passes, most_rows, message));
        let summary = run.run(&mut model, &mut watch).unwrap();
        assert_eq!((summary.end, summary.position.step), (End::Completed, 4));
        assert_eq!(summary.tokens, straight.summary.tokens);
        assert!(notes.iter().any(|note| note.contains("smaller pieces")), "{notes:?}");
        let distance = relative_distance(&values(&model.trainables()), &straight.values());
        assert!(distance < 1e-4, "{distance}");
    }
}

#[test]
fn err_device_that_cannot_do_one_row_ends_the_run_with_its_error() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let out = world.path("out");
    let run = Trainer::new(four_rows(), &data, &out).objective(Fragile::after(0, 0, WATCHDOG));
    let error = run.run(&mut tiny_model(), &mut Silent).unwrap_err();
    assert!(
        error.to_string().contains("kIOGPUCommandBufferCallbackErrorTimeout"),
        "{error}"
    );
    assert!(!out.exists(), "a run that did not begin leaves nothing");
}

#[test]
fn failure_before_the_first_update_leaves_nothing_and_a_later_one_says_so() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let run = |name: &str, good_passes| {
        let out = world.path(name);
        let setup = Trainer::new(four_rows(), &data, &out).objective(Fragile::after(good_passes, 0, "no such kernel"));
        assert!(setup.run(&mut tiny_model(), &mut Silent).is_err());
        out
    };
    assert!(!run("at once", 0).exists());
    std::fs::create_dir(world.path("empty")).unwrap();
    assert_eq!(std::fs::read_dir(run("empty", 0)).unwrap().count(), 0);
    run("later", 2);
    let last = world.metrics("later").pop().unwrap();
    assert_eq!((&last["kind"], &last["reason"]), (&"end".into(), &"failed".into()));
}

#[test]
fn err_run_that_ends_in_nan_has_diverged_and_keeps_no_bad_adapter() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let valid = world.data("valid.jsonl", &uneven_rows(2));
    for (name, valid) in [("with", Some(&valid)), ("without", None)] {
        let options = TrainOptions {
            learning_rate: 1e30,
            ..options(2)
        };
        let out = world.path(name);
        let mut run = Trainer::new(options, &data, &out);
        if let Some(valid) = valid {
            run = run.valid(valid);
        }
        let error = run.run(&mut tiny_model(), &mut Silent).unwrap_err();
        assert!(matches!(error, Error::NotFinite { step: 2, .. }), "{error}");
        assert!(error.to_string().contains("no good adapter"), "{error}");
        assert!(!out.join("adapters.safetensors").exists());
        let last = world.metrics(name).pop().unwrap();
        assert_eq!(
            (&last["reason"], &last["adapter_step"]),
            (&"diverged".into(), &serde_json::Value::Null)
        );
    }
}

#[test]
fn err_rank_beyond_the_weight_is_refused_before_anything_is_made() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(2));
    let options = TrainOptions {
        tuning: Tuning::Adapters(Box::new(LoraConfig {
            rank: 100_000_000,
            ..lora()
        })),
        ..options(1)
    };
    let refused = Trainer::new(options, &data, &world.path("out")).run(&mut tiny_model(), &mut Silent);
    let Err(Error::Config {
        key: "lora.rank",
        reason,
    }) = refused
    else {
        panic!("{refused:?}")
    };
    assert!(
        reason.contains("model.layers.0") && reason.contains("at most"),
        "{reason}"
    );
    assert!(!world.path("out").exists());
}

#[test]
fn states_are_saved_by_time_and_never_where_saving_is_switched_off() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let saves = |name: &str, checkpoint_interval| {
        let options = TrainOptions {
            checkpoint_interval,
            keep_last: 9,
            ..four_rows()
        };
        train(options, &data, None, &world.path(name));
        std::fs::read_dir(world.path(name).join("checkpoints"))
            .unwrap()
            .filter(|entry| {
                entry
                    .as_ref()
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .starts_with("step-")
            })
            .count()
    };
    // The share of time that saving may take spaces them out.
    assert!(saves("often", Some(Duration::from_nanos(1))) >= 2);
    assert_eq!(saves("never", None), 1);
    assert_eq!(saves("late", Some(Duration::from_secs(300))), 1);
}

/// The evaluation of a step that a stop interrupted is made when the run goes on.
#[test]
fn resume_after_a_stop_before_an_evaluation_gives_the_records_of_the_straight_run() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let valid = world.data("valid.jsonl", &uneven_rows(2));
    let options = TrainOptions {
        eval_every: Some(2),
        ..four_rows()
    };
    let evaluations = |name: &str| -> Vec<serde_json::Value> {
        let lines = world.metrics(name).into_iter().filter(|line| line["kind"] == "eval");
        lines
            .map(|line| serde_json::json!([line["step"], line["val_loss"], line["best_step"]]))
            .collect()
    };
    train(options.clone(), &data, Some(&valid), &world.path("straight"));
    for at in [2, 4] {
        let name = format!("stopped-{at}");
        let out = world.path(&name);
        let stop = StopFlag::default();
        let mut watch = |event: &Event| {
            if matches!(event, Event::Step(step) if step.position.step == at) {
                stop.stop();
            }
        };
        let first = Trainer::new(options.clone(), &data, &out).valid(&valid).stop(&stop);
        let summary = first.run(&mut tiny_model(), &mut watch).unwrap();
        assert_eq!((summary.end, summary.position.step), (End::Interrupted, at));
        let again = Trainer::new(options.clone(), &data, &out)
            .valid(&valid)
            .resume(Resume::Exact);
        let summary = again.run(&mut tiny_model(), &mut Silent).unwrap();
        assert_eq!((summary.end, summary.position.step), (End::Completed, 4));
        assert_eq!(evaluations(&name), evaluations("straight"));
        assert_eq!(
            world.read(&format!("{name}/adapters.safetensors")),
            world.read("straight/adapters.safetensors")
        );
    }
}

#[test]
fn stop_before_the_first_update_leaves_nothing() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(2));
    let valid = world.data("valid.jsonl", &uneven_rows(2));
    let stop = StopFlag::default();
    stop.stop();
    let out = world.path("out");
    let run = Trainer::new(four_rows(), &data, &out).valid(&valid).stop(&stop);
    let summary = run.run(&mut tiny_model(), &mut Silent).unwrap();
    assert_eq!((summary.end, summary.position.step), (End::Interrupted, 0));
    assert!(!out.exists());
}
