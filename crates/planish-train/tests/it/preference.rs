//! The preference recipes on the tiny model.

use planish_data::Dataset;
use planish_loss::dpo::DpoOptions;
use planish_train::{Error, Event, Recipe, Resume, Silent, StopFlag, TrainOptions, Trainer, schedule::Shape};

use crate::world::{World, options, tiny_model, train, uneven_rows, values};

/// Preference pairs of one taste: the chosen answer agrees and the rejected one refuses, whatever is asked.
pub(crate) fn pairs(questions: std::ops::Range<usize>) -> Vec<String> {
    let things = [
        "the letter",
        "a walk",
        "the carriage",
        "Bath",
        "tea",
        "the ball",
        "Emma",
        "a ring",
        "Mr. Elton",
        "the book",
    ];
    let wishes = [
        "May I have",
        "Do you like",
        "Shall we speak of",
        "Would you see",
        "Can you bring",
        "Will you wait for",
    ];
    let agrees = ["Yes, with all my heart.", "Yes, with great pleasure."];
    let refuses = ["No, not for the world.", "No, I would rather not."];
    questions
        .map(|i| {
            let question = format!(
                "{} {}?",
                wishes[(i / things.len()) % wishes.len()],
                things[i % things.len()]
            );
            let row = serde_json::json!({
                "prompt": question, "chosen": agrees[i % 2], "rejected": refuses[(i / 2) % 2],
            });
            row.to_string()
        })
        .collect()
}

fn preference(recipe: Recipe, steps: usize) -> TrainOptions {
    TrainOptions {
        recipe,
        shape: Shape::Constant,
        learning_rate: 1e-3,
        ..options(steps)
    }
}

fn dpo() -> Recipe {
    Recipe::Dpo(DpoOptions::default())
}

/// Margin and accuracy of the first and the last evaluation.
fn margins(world: &World, out: &str) -> [(f64, f64); 2] {
    let lines = world.metrics(out);
    let evals: Vec<_> = lines.iter().filter(|line| line["kind"] == "eval").collect();
    let of = |line: &serde_json::Value| {
        (
            line["reward_margin"].as_f64().unwrap(),
            line["reward_accuracy"].as_f64().unwrap(),
        )
    };
    [of(evals[0]), of(evals[evals.len() - 1])]
}

#[test]
fn dpo_on_40_pairs_raises_the_margin_on_held_out_pairs() {
    let world = World::new();
    let data = world.data("train.jsonl", &pairs(0..40));
    let held_out = world.data("valid.jsonl", &pairs(40..60));
    let run = train(preference(dpo(), 30), &data, Some(&held_out), &world.path("out"));
    let [before, after] = margins(&world, "out");
    assert_eq!(before, (0.0, 0.0), "policy and reference begin as one");
    assert!(
        after.0 > 0.5 && after.1 > 0.9,
        "margin {} accuracy {}",
        after.0,
        after.1
    );
    assert!((run.losses()[0] - 2f64.ln()).abs() < 1e-6, "{:?}", run.losses());
    println!(
        "held-out margin {:.3} -> {:.3}, {:.0} % right",
        before.0,
        after.0,
        100.0 * after.1
    );
}

#[test]
fn orpo_learns_the_chosen_answers_and_prefers_them() {
    let world = World::new();
    let data = world.data("train.jsonl", &pairs(0..40));
    let held_out = world.data("valid.jsonl", &pairs(40..60));
    let recipe = Recipe::Orpo { lambda: 0.5 };
    let run = train(preference(recipe, 30), &data, Some(&held_out), &world.path("out"));
    let [before, after] = margins(&world, "out");
    assert!(after.0 > before.0 + 0.5, "{before:?} {after:?}");
    assert!(run.losses()[29] < 0.9 * run.losses()[0], "{:?}", run.losses());
}

#[test]
fn a_preference_update_does_not_depend_on_how_its_window_is_cut() {
    let world = World::new();
    let data = world.data("train.jsonl", &pairs(0..8));
    let first = |name: &str, batch_size, accumulation| {
        let options = TrainOptions {
            batch_size,
            accumulation,
            ..preference(Recipe::Orpo { lambda: 0.5 }, 1)
        };
        let run = train(options, &data, None, &world.path(name));
        run.events.iter().find_map(|event| match event {
            Event::Step(step) => Some((step.loss, step.grad_norm)),
            _ => None,
        })
    };
    let (loss, norm) = first("8x1", 8, 1).unwrap();
    for (name, batch_size, accumulation) in [("4x2", 4, 2), ("1x8", 1, 8)] {
        let (other_loss, other_norm) = first(name, batch_size, accumulation).unwrap();
        assert!((other_loss / loss - 1.0).abs() < 1e-6, "{name}: {other_loss} {loss}");
        assert!((other_norm / norm - 1.0).abs() < 1e-5, "{name}: {other_norm} {norm}");
    }
}

#[test]
fn dpo_resumes_to_the_same_bits() {
    let world = World::new();
    let data = world.data("train.jsonl", &pairs(0..20));
    let options = TrainOptions {
        report_every: 3,
        ..preference(dpo(), 6)
    };
    let straight = train(options.clone(), &data, None, &world.path("straight"));
    let out = world.path("stopped");
    let stop = StopFlag::default();
    let mut watch = |event: &Event| {
        if matches!(event, Event::Step(step) if step.position.step == 1) {
            stop.stop();
        }
    };
    let first = Trainer::new(options.clone(), &data, &out).stop(&stop);
    first.run(&mut tiny_model(), &mut watch).unwrap();
    let mut model = tiny_model();
    let again = Trainer::new(options, &data, &out).resume(Resume::Exact);
    again.run(&mut model, &mut Silent).unwrap();
    assert_eq!(values(&model.trainables()), straight.values());
    let figures = |out: &str| -> Vec<serde_json::Value> {
        let lines = world.metrics(out).into_iter().filter(|line| line["kind"] == "train");
        lines.map(|line| line["reward_margin"].clone()).collect()
    };
    assert_eq!(figures("stopped"), figures("straight"));
}

#[test]
fn margin_of_a_row_asks_for_more() {
    let world = World::new();
    let with = |margin: f64| {
        let rows: Vec<String> = pairs(0..4)
            .iter()
            .map(|row| {
                let mut row: serde_json::Value = serde_json::from_str(row).unwrap();
                row["margin"] = margin.into();
                row.to_string()
            })
            .collect();
        let data = world.data(&format!("margin-{margin}.jsonl"), &rows);
        train(preference(dpo(), 1), &data, None, &world.path(&format!("out-{margin}"))).losses()[0]
    };
    // Policy and reference are one at the first step: -log σ(-m).
    assert!((with(2.0) - (1.0 + 2f64.exp()).ln()).abs() < 1e-5);
    assert!((with(0.0) - 2f64.ln()).abs() < 1e-6);
}

#[test]
fn err_recipe_and_data_must_fit() {
    let world = World::new();
    let preferences = world.data("pairs.jsonl", &pairs(0..4));
    let chats = world.data("chats.jsonl", &uneven_rows(4));
    let check = |recipe, data: &Dataset, part: &str| {
        let refused = Trainer::new(preference(recipe, 1), data, &world.path("out")).run(&mut tiny_model(), &mut Silent);
        let Err(Error::Config {
            key: "loss.name",
            reason,
        }) = refused
        else {
            panic!("{refused:?}")
        };
        assert!(reason.contains(part), "{reason}");
    };
    check(Recipe::Sft, &preferences, "dpo");
    check(dpo(), &chats, "preference pairs");
    assert!(!world.path("out").exists(), "nothing may be left behind");
}
