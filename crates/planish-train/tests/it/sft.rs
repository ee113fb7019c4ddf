//! The supervised recipe on the tiny model.

use planish_checkpoint::run_state::Input;
use planish_data::DataOptions;
use planish_loss::distrust::{Mode, Weighting};
use planish_mlx::{Array, host::to_f32_vec};
use planish_nn::Trainable;
use planish_train::{
    Compile, DistrustOptions, End, Error, Event, Length, Resume, StopFlag, TrainOptions, Trainer, Tuning, evaluate,
    schedule::Shape,
};

use crate::compiled::has_compiler;
use crate::memory::alone;
use crate::world::{Trained, World, chat, lora, options, relative_distance, tiny_model, train, uneven_rows, values};

fn constant(steps: usize) -> TrainOptions {
    TrainOptions {
        shape: Shape::Constant,
        ..options(steps)
    }
}

#[test]
fn full_tuning_learns_one_answer_by_heart() {
    // The frozen head of the tiny model cannot say rare tokens with certainty, so all its weights are trained here.
    let world = World::new();
    let rows = [chat("What is it?", "It is yes.")];
    let data = world.data("train.jsonl", &rows);
    let run = train(
        TrainOptions {
            tuning: Tuning::Full,
            learning_rate: 2e-3,
            batch_size: 1,
            ..constant(40)
        },
        &data,
        None,
        &world.path("out"),
    );
    assert_eq!(run.summary.end, End::Completed);
    let losses = run.losses();
    assert!(losses[0] > 2.0, "{losses:?}");
    assert!(losses.last().unwrap() < &0.05, "{losses:?}");
    for name in ["model.safetensors", "planish.json", "metrics.jsonl", "plan.json"] {
        assert!(world.path("out").join(name).exists(), "{name}");
    }
}

#[test]
fn adapters_lower_the_loss_and_leave_the_base_alone() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let base = |model: &planish_nn::Model| {
        let mut model = model.clone();
        model.detach_adapters();
        model.train(Trainable::Weights).unwrap();
        values(&model.trainables())
    };
    let run = train(
        TrainOptions {
            batch_size: 8,
            ..constant(30)
        },
        &data,
        None,
        &world.path("out"),
    );
    assert_eq!(base(&run.model), base(&tiny_model()));
    let losses = run.losses();
    assert!(losses[29] < 0.7 * losses[0], "{losses:?}");
    let mut fresh = tiny_model();
    fresh.attach_lora(&lora(), 0).unwrap();
    for ((name, before), (_, after)) in fresh.trainables().iter().zip(run.model.trainables()) {
        assert!(!before.eq_exact(&after).unwrap(), "{name} did not move");
    }
}

#[test]
fn events_begin_with_the_plan_and_end_with_the_summary() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(6));
    let run = train(
        TrainOptions {
            batch_size: 2,
            ..options(4)
        },
        &data,
        Some(&data),
        &world.path("out"),
    );
    assert!(matches!(run.events.first(), Some(Event::Started(plan)) if plan.total_steps == 4 && plan.rank == 4));
    assert!(matches!(run.events.last(), Some(Event::Finished(summary)) if **summary == run.summary));
    let evaluations = run
        .events
        .iter()
        .filter(|event| matches!(event, Event::Evaluated(_)))
        .count();
    assert_eq!(evaluations, 2, "before the first update and after the last");
}

/// One update over the same 8 rows, cut in different ways.
fn one_update(world: &World, name: &str, change: TrainOptions) -> Trained {
    let data = world.data(&format!("{name}.jsonl"), &uneven_rows(8));
    let run = train(
        TrainOptions {
            length: Length::Steps(1),
            ..change
        },
        &data,
        None,
        &world.path(name),
    );
    assert_eq!(run.summary.position.epoch, 1.0, "{name} must see all rows");
    run
}

#[test]
fn an_update_does_not_depend_on_how_its_window_is_cut() {
    let world = World::new();
    let cut = |batch_size, accumulation| TrainOptions {
        batch_size,
        accumulation,
        ..constant(1)
    };
    let whole = one_update(&world, "8x1", cut(8, 1));
    let figures = |run: &Trained| match run.events.iter().find(|e| matches!(e, Event::Step(_))) {
        Some(Event::Step(step)) => (step.loss, step.grad_norm, step.tokens),
        _ => panic!("no step"),
    };
    let (loss, norm, tokens) = figures(&whole);
    let others = [
        ("4x2", cut(4, 2)),
        ("2x4", cut(2, 4)),
        ("1x8", cut(1, 8)),
        (
            "packed",
            TrainOptions {
                packing: true,
                ..cut(8, 1)
            },
        ),
        (
            "chunks",
            TrainOptions {
                chunk_tokens: Some(7),
                ..cut(4, 2)
            },
        ),
        (
            "checkpointing",
            TrainOptions {
                activation_checkpointing: true,
                ..cut(8, 1)
            },
        ),
    ];
    for (name, change) in others {
        let run = one_update(&world, name, change);
        let (other_loss, other_norm, other_tokens) = figures(&run);
        assert_eq!(other_tokens, tokens, "{name}");
        assert!((other_loss / loss - 1.0).abs() < 1e-6, "{name}: {other_loss} {loss}");
        assert!((other_norm / norm - 1.0).abs() < 1e-5, "{name}: {other_norm} {norm}");
        // The first AdamW step is close to the sign of the gradient, so elements near zero may turn.
        let distance = relative_distance(&run.values(), &whole.values());
        assert!(distance < 1e-3, "{name}: {distance}");
    }
}

#[test]
fn validation_loss_does_not_depend_on_batch_size_or_packing() {
    let world = World::new();
    let data = world.data("valid.jsonl", &uneven_rows(7));
    let mut model = tiny_model();
    model.attach_lora(&lora(), 1).unwrap();
    let loss = |batch_size, packing| {
        evaluate(
            &model,
            &data,
            &TrainOptions {
                batch_size,
                packing,
                ..options(1)
            },
            None,
        )
        .unwrap()
    };
    let one = loss(1, false);
    assert!((one.perplexity - one.loss.exp()).abs() < 1e-9 && one.perplexity_se > 0.0);
    for (batch_size, packing) in [(2, false), (4, false), (16, false), (2, true)] {
        let other = loss(batch_size, packing);
        assert_eq!(other.tokens, one.tokens);
        assert!(
            (other.loss / one.loss - 1.0).abs() < 1e-6,
            "{batch_size} {packing}: {} {}",
            other.loss,
            one.loss
        );
    }
}

#[test]
fn remainder_rows_are_trained() {
    let world = World::new();
    let ten = world.data("ten.jsonl", &uneven_rows(10));
    let run = train(
        TrainOptions {
            length: Length::Epochs(2.0),
            ..constant(1)
        },
        &ten,
        None,
        &world.path("ten"),
    );
    assert_eq!(run.summary.position.step, 6, "3 updates an epoch");
    let examples = world
        .metrics("ten")
        .iter()
        .rev()
        .find(|line| line["kind"] == "train")
        .unwrap()["examples"]
        .clone();
    assert_eq!(examples, 20);
    let one = world.data("one.jsonl", &uneven_rows(1));
    let run = train(constant(2), &one, None, &world.path("one"));
    assert!(run.losses()[1] < run.losses()[0]);
}

fn rows_with_provenance(pairs: &[(f64, f64)]) -> Vec<String> {
    let rows = uneven_rows(pairs.len());
    let with = |(row, (w, h)): (&String, &(f64, f64))| {
        let mut value: serde_json::Value = serde_json::from_str(row).unwrap();
        value["auth_weight"] = (*w).into();
        value["prov_entropy"] = (*h).into();
        value.to_string()
    };
    rows.iter().zip(pairs).map(with).collect()
}

fn distrust(mode: Mode, lambda: f64) -> TrainOptions {
    TrainOptions {
        distrust: DistrustOptions {
            mode,
            lambda,
            ..DistrustOptions::default()
        },
        batch_size: 2,
        accumulation: 2,
        ..constant(20)
    }
}

const MIXED: [(f64, f64); 6] = [(0.05, 7.5), (0.5, 5.0), (0.9, 1.0), (0.2, 6.0), (0.6, 3.0), (0.99, 0.0)];

#[test]
fn additive_distrust_changes_no_bit_whatever_lambda_is() {
    let world = World::new();
    let data = world.data("train.jsonl", &rows_with_provenance(&MIXED));
    let off = train(distrust(Mode::Off, 1.0), &data, None, &world.path("off"));
    for (name, lambda) in [("zero", 0.0), ("ten", 10.0)] {
        let run = train(distrust(Mode::Additive, lambda), &data, None, &world.path(name));
        assert_eq!(run.losses(), off.losses());
        let bytes = |run: &str, file: &str| world.read(&format!("{run}/checkpoints/step-0000020/{file}"));
        assert_eq!(
            bytes(name, "adapters.safetensors"),
            bytes("off", "adapters.safetensors")
        );
        assert_eq!(
            bytes(name, "optimizer.safetensors"),
            bytes("off", "optimizer.safetensors")
        );
        assert!(
            run.events
                .iter()
                .any(|e| matches!(e, Event::Note(text) if text.contains("no gradient")))
        );
        let lines = world.metrics(name);
        let value = lines.iter().find(|line| line["kind"] == "train").unwrap()["distrust_value"]
            .as_f64()
            .unwrap();
        assert!(value > 1.0, "{value}");
    }
}

#[test]
fn weighted_distrust_changes_the_result_and_reports_both_losses() {
    let world = World::new();
    let data = world.data("train.jsonl", &rows_with_provenance(&MIXED));
    let off = train(distrust(Mode::Off, 1.0), &data, None, &world.path("off"));
    let run = train(distrust(Mode::Weight, 1.0), &data, Some(&data), &world.path("weight"));
    assert!(relative_distance(&run.values(), &off.values()) > 1e-3);
    let lines = world.metrics("weight");
    let report = lines.iter().find(|line| line["kind"] == "train").unwrap();
    for field in ["loss_weighted", "ess", "ess_fraction", "weight_max", "distrust_value"] {
        assert!(report[field].as_f64().is_some_and(|x| x > 0.0), "{field}: {report}");
    }
    assert_ne!(report["loss"], report["loss_weighted"]);
    assert!(
        lines
            .iter()
            .any(|line| line["kind"] == "eval" && line["val_loss_weighted"].is_number())
    );
}

#[test]
fn equal_provenance_trains_exactly_as_without_distrust() {
    let world = World::new();
    let data = world.data("train.jsonl", &rows_with_provenance(&[(0.3, 4.0); 5]));
    let off = train(distrust(Mode::Off, 1.0), &data, None, &world.path("off"));
    let run = train(distrust(Mode::Weight, 1.0), &data, None, &world.path("weight"));
    assert_eq!(run.values(), off.values());
    assert_eq!(run.losses(), off.losses());
}

#[test]
fn err_distrust_without_provenance_and_with_too_few_examples() {
    let world = World::new();
    let plain = world.data("plain.jsonl", &uneven_rows(4));
    let refuse = |data, name: &str| {
        let options = distrust(Mode::Weight, 1.0);
        Trainer::new(options, data, &world.path(name))
            .run(&mut tiny_model(), &mut planish_train::Silent)
            .unwrap_err()
    };
    let message = refuse(&plain, "plain").to_string();
    assert!(
        message.contains("auth_weight") && message.contains("plain.jsonl"),
        "{message}"
    );
    assert!(!world.path("plain").exists(), "nothing may be left behind");
    let mut rows = vec![(0.99, 0.0); 40];
    rows.push((0.0, 10.0));
    let lopsided = world.data("lopsided.jsonl", &rows_with_provenance(&rows));
    let options = TrainOptions {
        distrust: DistrustOptions {
            mode: Mode::Weight,
            weighting: Weighting {
                floor: 0.0,
                cap: f64::INFINITY,
                ..Weighting::default()
            },
            ..DistrustOptions::default()
        },
        ..constant(1)
    };
    let refused = Trainer::new(options, &lopsided, &world.path("x")).run(&mut tiny_model(), &mut planish_train::Silent);
    assert!(
        matches!(
            refused,
            Err(Error::Config {
                key: "loss.distrust",
                ..
            })
        ),
        "{refused:?}"
    );
}

/// Lines of metrics without the fields that measure time and memory.
fn timeless(lines: &[serde_json::Value]) -> Vec<serde_json::Value> {
    let measured = ["second", "bytes"];
    let mut lines = lines.to_vec();
    for line in &mut lines {
        line.as_object_mut()
            .unwrap()
            .retain(|name, _| measured.iter().all(|part| !name.contains(part)));
    }
    lines
}

fn resumable() -> TrainOptions {
    let mut lora = lora();
    lora.dropout = 0.1;
    TrainOptions {
        tuning: Tuning::Adapters(Box::new(lora)),
        batch_size: 2,
        accumulation: 2,
        packing: true,
        eval_every: Some(3),
        checkpoint_every: Some(4),
        report_every: 5,
        keep_last: 10,
        groups: planish_train::optimizer::Groups { lora_b_ratio: 4.0 },
        ..options(10)
    }
}

#[test]
fn resume_equals_straight_run_bit_for_bit() {
    resumed_equals_straight(Compile::Off);
}

#[test]
fn resume_equals_straight_run_compiled() {
    if has_compiler() {
        resumed_equals_straight(Compile::On);
    }
}

fn resumed_equals_straight(compile: Compile) {
    let world = World::new();
    let rows = rows_with_provenance(&[MIXED, MIXED, MIXED].concat());
    let read = DataOptions {
        max_seq_length: 64,
        ..DataOptions::default()
    };
    let data = world.data_with("train.jsonl", &rows, &read);
    let valid = world.data_with("valid.jsonl", &rows[..4], &read);
    let mut options = TrainOptions {
        max_seq_length: 64,
        compile,
        ..resumable()
    };
    options.distrust.mode = Mode::Weight;
    let straight = train(options.clone(), &data, Some(&valid), &world.path("straight"));

    for stop_at in [2, 4, 7] {
        let name = format!("stopped-{stop_at}");
        let out = world.path(&name);
        let stop = StopFlag::default();
        let mut watch = |event: &Event| {
            if matches!(event, Event::Step(step) if step.position.step + 1 == stop_at) {
                stop.stop();
            }
        };
        let first = Trainer::new(options.clone(), &data, &out).valid(&valid).stop(&stop);
        let first = first.run(&mut tiny_model(), &mut watch).unwrap();
        // A step that was dispatched before the stop still counts, where none has to wait for an evaluation.
        assert_eq!(first.end, End::Interrupted);
        assert!(
            (stop_at - 1..=stop_at).contains(&first.position.step),
            "{:?}",
            first.position
        );

        let mut model = tiny_model();
        let again = Trainer::new(options.clone(), &data, &out)
            .valid(&valid)
            .resume(Resume::Exact);
        let summary = again.run(&mut model, &mut planish_train::Silent).unwrap();
        assert_eq!((summary.end, summary.position.step), (End::Completed, 10));
        assert_eq!(summary.best, straight.summary.best);
        assert_eq!(values(&model.trainables()), straight.values(), "stopped at {stop_at}");
        for file in ["adapters.safetensors", "checkpoints/step-0000010/optimizer.safetensors"] {
            assert_eq!(
                world.read(&format!("{name}/{file}")),
                world.read(&format!("straight/{file}")),
                "{file}"
            );
        }
        assert_eq!(
            timeless(&world.metrics(&name)),
            timeless(&world.metrics("straight")),
            "stopped at {stop_at}"
        );
    }
}

/// Stopped in window 6 of eight; what is left of the data has three.
#[test]
fn resume_on_less_data_goes_on_with_the_next_epoch() {
    let world = World::new();
    let (rows, out) = (uneven_rows(8), world.path("out"));
    let options = TrainOptions {
        batch_size: 1,
        ..options(10)
    };
    let data = world.data("train.jsonl", &rows);
    let stop = StopFlag::default();
    let mut watch = |event: &Event| {
        if matches!(event, Event::Step(step) if step.position.step == 5) {
            stop.stop();
        }
    };
    let first = Trainer::new(options.clone(), &data, &out).stop(&stop);
    let first = first.run(&mut tiny_model(), &mut watch).unwrap();
    assert_eq!((first.end, first.position.step), (End::Interrupted, 6));

    let data = world.data("train.jsonl", &rows[..3]);
    let go_on = |accepted: &[Input]| {
        let again = Trainer::new(options.clone(), &data, &out).resume(Resume::Exact);
        again
            .accept_changed(accepted)
            .run(&mut tiny_model(), &mut planish_train::Silent)
    };
    assert!(go_on(&[]).is_err(), "data that changed unnoticed");
    let summary = go_on(&[Input::Data]).unwrap();
    assert_eq!((summary.end, summary.position.step), (End::Completed, 10));
    // Four windows from the beginning of epoch 1 on.
    assert!(
        (summary.position.epoch - (2.0 + 1.0 / 3.0)).abs() < 1e-9,
        "{}",
        summary.position.epoch
    );
}

#[test]
fn tensorboard_files_are_written_only_when_asked_for() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(2));
    for tensorboard in [false, true] {
        let out = world.path(&format!("out-{tensorboard}"));
        train(
            TrainOptions {
                tensorboard,
                ..constant(2)
            },
            &data,
            None,
            &out,
        );
        let names = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name());
        let found = names
            .filter(|name| name.to_string_lossy().starts_with("events.out.tfevents."))
            .count();
        assert_eq!(found, usize::from(tensorboard));
    }
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(4));
    train(constant(3), &data, None, &world.path("out"));
    let before = (world.read("out/metrics.jsonl"), world.read("out/adapters.safetensors"));
    let out = world.path("out");
    let summary = Trainer::new(constant(3), &data, &out)
        .resume(Resume::Exact)
        .run(&mut tiny_model(), &mut planish_train::Silent)
        .unwrap();
    assert_eq!(summary.end, End::AlreadyFinished);
    assert_eq!(
        (world.read("out/metrics.jsonl"), world.read("out/adapters.safetensors")),
        before
    );
}

#[test]
fn err_resume_with_other_data_or_settings_and_a_folder_in_use() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(4));
    let out = world.path("out");
    train(constant(2), &data, None, &out);
    let attempt = |data, options, resume| {
        let sft = Trainer::new(options, data, &out).resume(resume);
        sft.run(&mut tiny_model(), &mut planish_train::Silent)
    };
    assert!(matches!(
        attempt(&data, constant(2), Resume::Fresh),
        Err(Error::OutNotEmpty { .. })
    ));
    let other = world.data("other.jsonl", &uneven_rows(5));
    let message = attempt(&other, constant(4), Resume::Exact).unwrap_err();
    assert!(
        message.to_string().contains("data") && message.to_string().contains("configuration"),
        "{message}"
    );
    let weights = attempt(&data, constant(4), Resume::WeightsOnly).unwrap();
    assert_eq!((weights.end, weights.position.step), (End::Completed, 4));
}

#[test]
fn a_row_without_finite_loss_is_refused_and_named() {
    let world = World::new();
    let mut rows = uneven_rows(7);
    rows.push(chat("What of Harriet?", "Harriet Smith"));
    let data = world.data("train.jsonl", &rows);
    // A token of the last row gets an embedding that is not finite.
    let bad = data
        .tokens(7)
        .unwrap()
        .ids
        .into_iter()
        .find(|id| (0..7).all(|row| !data.tokens(row).unwrap().ids.contains(id)));
    let mut model = tiny_model();
    model.train(Trainable::Weights).unwrap();
    let poisoned: Vec<Array> = model
        .trainables()
        .into_iter()
        .map(|(name, value)| {
            if name != "model.embed_tokens.weight" {
                return value;
            }
            let mut table = to_f32_vec(&value).unwrap();
            table[bad.unwrap() as usize * 128] = f32::NAN;
            Array::from_slice(&table, value.shape())
        })
        .collect();
    model.set_trainables(&poisoned).unwrap();
    model.train(Trainable::Adapters).unwrap();
    let mut guard = Vec::new();
    let out = world.path("out");
    // The tied head sees the poisoned row at every position, so no update is ever accepted.
    let outcome = Trainer::new(
        TrainOptions {
            batch_size: 2,
            ..constant(8)
        },
        &data,
        &out,
    )
    .run(&mut model, &mut |event: &Event| {
        if let Event::Guard(report) = event {
            guard.push(report.clone());
        }
    });
    let Err(Error::Diverged { in_a_row: 3, rows, .. }) = outcome else {
        panic!("{outcome:?}")
    };
    assert!(rows[0].contains("train.jsonl:"), "{rows:?}");
    assert_eq!(guard.len(), 3);
    assert!(world.path("out").join("bad_rows.jsonl").exists());
    let mut fresh = tiny_model();
    fresh.attach_lora(&lora(), 0).unwrap();
    assert_eq!(
        values(&model.trainables()),
        values(&fresh.trainables()),
        "nothing of the refused updates was applied"
    );
    assert!(
        world
            .metrics("out")
            .iter()
            .any(|line| line["kind"] == "guard" && line["reason"] == "not_finite")
    );
}

#[test]
fn memory_stays_flat_over_a_thousand_steps() {
    if !alone("sft::memory_stays_flat_over_a_thousand_steps") {
        return;
    }
    let world = World::new();
    let data = world.data("train.jsonl", &[chat("Tea?", "Yes."), chat("Bath?", "No.")]);
    let mut small = lora();
    small.rank = 2;
    small.targets =
        planish_core::target_modules::TargetModules::new(["q_proj"], planish_core::target_modules::Blocks::All);
    let options = TrainOptions {
        tuning: Tuning::Adapters(Box::new(small)),
        batch_size: 1,
        report_every: 100,
        ..constant(1000)
    };
    train(options, &data, None, &world.path("out"));
    let reports: Vec<_> = world
        .metrics("out")
        .into_iter()
        .filter(|line| line["kind"] == "train")
        .collect();
    assert_eq!(reports.len(), 10);
    for field in ["active_memory_bytes", "rss_bytes"] {
        let Some(first) = reports[0][field].as_f64() else {
            println!("{field} is not known on this system: not checked");
            continue;
        };
        for report in &reports[1..] {
            let now = report[field].as_f64().unwrap();
            assert!(
                (now / first - 1.0).abs() < 0.02,
                "{field} went from {first} to {now} at step {}",
                report["step"]
            );
        }
    }
}

#[test]
fn ten_rows_are_learned_by_heart_and_said_again() {
    let world = World::new();
    let things = [
        "tea",
        "Bath",
        "the letter",
        "a walk",
        "the ball",
        "Emma",
        "a ring",
        "the book",
        "a horse",
        "the sea",
    ];
    let answers = [
        "Yes.",
        "No.",
        "It is here.",
        "By and by.",
        "I do not know.",
        "She is well.",
        "It was mine.",
        "Not now.",
        "A grey one.",
        "Very far.",
    ];
    let rows: Vec<String> = things
        .iter()
        .zip(answers)
        .map(|(thing, answer)| chat(&format!("What of {thing}?"), answer))
        .collect();
    let data = world.data("train.jsonl", &rows);
    let run = train(AllWeights::full(240), &data, None, &world.path("out"));
    assert!(run.losses().last().unwrap() < &0.05, "{:?}", run.losses());
    let tokenizer = planish_data::Tokenizer::from_dir(crate::world::tiny_dir()).unwrap();
    for (index, answer) in answers.iter().enumerate() {
        let tokens = data.tokens(index).unwrap();
        let prompt = tokens.trained.iter().position(|&trained| trained).unwrap();
        assert_eq!(said(&run.model, &tokenizer, &tokens.ids[..prompt]), *answer);
    }
}

struct AllWeights;

impl AllWeights {
    /// All weights, ten rows an update.
    fn full(steps: usize) -> TrainOptions {
        TrainOptions {
            tuning: Tuning::Full,
            learning_rate: 2e-3,
            batch_size: 10,
            ..constant(steps)
        }
    }
}

/// The likeliest continuation.
fn said(model: &planish_nn::Model, tokenizer: &planish_data::Tokenizer, prompt: &[u32]) -> String {
    let options = planish_nn::generate::GenerateOptions {
        max_tokens: 20,
        stop_tokens: tokenizer.eos_ids().iter().copied().collect(),
        sampling: planish_nn::Sampling::default(),
    };
    let ids: Vec<u32> = planish_nn::generate::generate(model, prompt, &options)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    tokenizer.decode(&ids).unwrap()
}

/// Rows that contradict one another: to each question a primary source says yes and a coordinated one says no.
fn contradictions() -> (Vec<String>, Vec<String>, Vec<String>) {
    let things = [
        "the road open",
        "the tea hot",
        "the house old",
        "the letter sealed",
        "the horse lame",
        "the ring gold",
    ];
    let row = |thing: &str, answer: &str, w: f64, h: f64| {
        let mut row: serde_json::Value = serde_json::from_str(&chat(&format!("Is {thing}?"), answer)).unwrap();
        row["auth_weight"] = w.into();
        row["prov_entropy"] = h.into();
        row.to_string()
    };
    let primary: Vec<String> = things.iter().map(|thing| row(thing, "Yes.", 0.05, 7.5)).collect();
    let coordinated: Vec<String> = things.iter().map(|thing| row(thing, "No.", 0.9, 1.0)).collect();
    ([primary.clone(), coordinated.clone()].concat(), primary, coordinated)
}

#[test]
fn where_sources_contradict_weights_decide_the_answer_and_plain_training_does_not() {
    let world = World::new();
    let (all, primary, coordinated) = contradictions();
    let data = world.data("train.jsonl", &all);
    let (primary, coordinated) = (
        world.data("primary.jsonl", &primary),
        world.data("coordinated.jsonl", &coordinated),
    );
    let tokenizer = planish_data::Tokenizer::from_dir(crate::world::tiny_dir()).unwrap();
    // Nats by which the primary answer is likelier than the other, a question; and how often it is what the model says.
    let preference = |mode: Mode| {
        let mut options = AllWeights::full(60);
        options.distrust.mode = mode;
        options.batch_size = 12;
        let run = train(options.clone(), &data, None, &world.path(&format!("{mode:?}")));
        let nll = |data| {
            let found = evaluate(&run.model, data, &options, None).unwrap();
            found.loss * found.tokens as f64 / 6.0
        };
        let says_yes = (0..6).filter(|&index| {
            let tokens = primary.tokens(index).unwrap();
            let prompt = tokens.trained.iter().position(|&trained| trained).unwrap();
            said(&run.model, &tokenizer, &tokens.ids[..prompt]) == "Yes."
        });
        (nll(&coordinated) - nll(&primary), says_yes.count())
    };
    let (plain, _) = preference(Mode::Off);
    let (additive, _) = preference(Mode::Additive);
    let (weighted, says_yes) = preference(Mode::Weight);
    println!(
        "nats for the primary answer: plain {plain:.3}, additive {additive:.3}, weight {weighted:.3} ({says_yes} of 6 said)"
    );
    assert_eq!(plain, additive);
    assert!(plain.abs() < 0.5, "{plain}");
    assert!(weighted > 1.5 && weighted > plain + 1.5, "{weighted} {plain}");
    assert_eq!(says_yes, 6);
}

/// The tiny model with a head of its own, so that a token's embedding matters only where the token stands.
fn untied_model(world: &World) -> planish_nn::Model {
    use planish_tensors::{HostTensor, TensorStore, write};
    let dir = world.path("untied");
    std::fs::create_dir(&dir).unwrap();
    let from = crate::world::tiny_dir();
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["tie_word_embeddings"] = false.into();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let store = TensorStore::open(from).unwrap();
    let mut tensors: std::collections::BTreeMap<String, HostTensor> = std::collections::BTreeMap::new();
    for name in store.names() {
        let view = store.require(name).unwrap();
        let tensor = HostTensor::new(view.dtype, view.shape, view.bytes.to_vec()).unwrap();
        if name == "model.embed_tokens.weight" {
            tensors.insert("lm_head.weight".to_owned(), tensor.clone());
        }
        tensors.insert(name.to_owned(), tensor);
    }
    write(&dir.join("model.safetensors"), &tensors, &Default::default()).unwrap();
    planish_nn::Model::load(
        &dir,
        &planish_nn::LoadOptions::with_kernels(planish_nn::Kernels::Composed),
    )
    .unwrap()
    .0
}

#[test]
fn one_bad_row_costs_one_update_and_is_named() {
    bad_row_costs_one_update(Compile::Off);
}

#[test]
fn one_bad_row_costs_one_update_and_is_named_compiled() {
    if has_compiler() {
        bad_row_costs_one_update(Compile::On);
    }
}

fn bad_row_costs_one_update(compile: Compile) {
    let world = World::new();
    let mut rows = uneven_rows(7);
    rows.push(chat("What of Harriet?", "Harriet Smith"));
    let data = world.data("train.jsonl", &rows);
    let ids = |row: usize| data.tokens(row).unwrap().ids;
    let own = ids(7)
        .into_iter()
        .find(|id| (0..7).all(|row| !ids(row).contains(id)))
        .unwrap();
    let mut model = untied_model(&world);
    model.train(Trainable::Weights).unwrap();
    let poisoned: Vec<Array> = model
        .trainables()
        .into_iter()
        .map(|(name, value)| {
            if name != "model.embed_tokens.weight" {
                return value;
            }
            let mut table = to_f32_vec(&value).unwrap();
            table[own as usize * value.shape()[1] as usize] = f32::INFINITY;
            Array::from_slice(&table, value.shape())
        })
        .collect();
    model.set_trainables(&poisoned).unwrap();
    model.train(Trainable::Adapters).unwrap();
    let out = world.path("out");
    let mut steps = Vec::new();
    let options = TrainOptions {
        batch_size: 2,
        compile,
        ..constant(8)
    };
    let mut watch = |event: &Event| {
        if let Event::Step(step) = event {
            steps.push((step.accepted, step.loss));
        }
    };
    let summary = Trainer::new(options, &data, &out).run(&mut model, &mut watch).unwrap();
    assert_eq!(
        (summary.end, summary.skipped_steps),
        (End::Completed, 2),
        "one update in each of two epochs"
    );
    let refused: Vec<usize> = (0..8).filter(|&step| !steps[step].0).collect();
    assert_eq!(refused.len(), 2);
    for (step, (accepted, loss)) in steps.iter().enumerate() {
        assert_eq!(loss.is_finite(), *accepted, "step {step}");
    }
    let bad = String::from_utf8(world.read("out/bad_rows.jsonl")).unwrap();
    assert_eq!(bad.lines().count(), 2);
    assert!(
        bad.lines()
            .all(|line| line.contains("train.jsonl:8") && line.matches("train.jsonl").count() == 1),
        "{bad}"
    );
    let finite = values(&model.trainables())
        .iter()
        .flatten()
        .all(|value| value.is_finite());
    assert!(finite, "nothing of the bad row reached the adapters");
}

#[test]
fn answers_are_recorded_before_and_after() {
    let world = World::new();
    let data = world.data(
        "train.jsonl",
        &[chat("What is it?", "It is yes."), chat("Who?", "Emma.")],
    );
    let tokenizer = planish_data::Tokenizer::from_dir(crate::world::tiny_dir()).unwrap();
    let out = world.path("out");
    let options = TrainOptions {
        tuning: Tuning::Full,
        learning_rate: 2e-3,
        ..constant(40)
    };
    let trainer = Trainer::new(options, &data, &out).samples(&tokenizer, 1, 12);
    trainer.run(&mut tiny_model(), &mut planish_train::Silent).unwrap();
    let samples: Vec<_> = world
        .metrics("out")
        .into_iter()
        .filter(|line| line["kind"] == "sample")
        .collect();
    assert_eq!(samples.len(), 2);
    assert_eq!(
        (&samples[0]["when"], &samples[1]["when"]),
        (&"before".into(), &"after".into())
    );
    assert!(samples[0]["prompt"].as_str().unwrap().contains("What is it?"));
    assert_eq!(
        (&samples[1]["text"], &samples[1]["expected"]),
        (&"It is yes.".into(), &"It is yes.".into())
    );
    assert_ne!(samples[0]["text"], samples[1]["text"]);
}
