//! Kinds of adapters: what is trained is what the files hold, and runs go on from them.

use planish_checkpoint::adapter::{Adapter, ReadOptions};
use planish_core::target_modules::PerModule;
use planish_data::Dataset;
use planish_nn::{LoraConfig, LoraInit, LoraMethod, LoraScale, Model};
use planish_train::{Error, Event, Resume, Silent, StopFlag, TrainOptions, Trainer, Tuning, evaluate, schedule::Shape};

use crate::world::{World, lora, options, tiny_model, train, uneven_rows, values};

fn run_of(lora: LoraConfig, steps: usize) -> TrainOptions {
    TrainOptions {
        tuning: Tuning::Adapters(Box::new(lora)),
        shape: Shape::Constant,
        learning_rate: 2e-3,
        ..options(steps)
    }
}

fn pissa() -> LoraConfig {
    LoraConfig {
        init: LoraInit::Pissa,
        ..lora()
    }
}

/// Modules of three ranks and three strengths.
fn patterned() -> LoraConfig {
    LoraConfig {
        ranks: PerModule::new([("q_proj", 6), ("down_proj", 2)]),
        alphas: PerModule::new([("v_proj", 3.0)]),
        ..lora()
    }
}

fn loss(model: &Model, data: &Dataset) -> f64 {
    evaluate(model, data, &options(1), None).unwrap().loss
}

/// The loss of the unchanged model with an adapter from its files.
fn loss_of_files(world: &World, out: &str, data: &Dataset) -> (f64, Adapter) {
    let (adapter, _) = Adapter::read(&world.path(out), &ReadOptions::default()).unwrap();
    let mut model = tiny_model();
    model.attach_adapter(&adapter).unwrap();
    (loss(&model, data), adapter)
}

#[test]
fn files_hold_what_was_trained_whatever_the_kind() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let kinds = [
        ("lora", lora(), 4),
        ("pissa", pissa(), 8),
        ("patterned", patterned(), 6),
        (
            "patterned-pissa",
            LoraConfig {
                init: LoraInit::Pissa,
                ..patterned()
            },
            12,
        ),
        (
            "patterned-dora",
            LoraConfig {
                method: LoraMethod::Dora,
                ..patterned()
            },
            6,
        ),
        (
            "rank-stabilised",
            LoraConfig {
                scale: LoraScale::RankStabilised(8.0),
                ..patterned()
            },
            6,
        ),
    ];
    let before = loss(&tiny_model(), &data);
    for (name, kind, rank) in kinds {
        let run = train(run_of(kind, 6), &data, None, &world.path(name));
        let trained = loss(&run.model, &data);
        let (from_files, adapter) = loss_of_files(&world, name, &data);
        assert!(trained < before - 0.05, "{name}: {before} {trained}");
        assert!((from_files - trained).abs() < 1e-5, "{name}: {from_files} {trained}");
        assert_eq!(adapter.rank, rank, "{name}");
        // PEFT keeps own ranks and alphas, so its files must give the same model.
        let peft = world.path(&format!("{name}-peft"));
        std::fs::create_dir(&peft).unwrap();
        adapter.write_peft(&peft, None).unwrap();
        let (from_peft, _) = loss_of_files(&world, &format!("{name}-peft"), &data);
        assert!((from_peft - trained).abs() < 1e-5, "{name}: {from_peft} {trained}");
    }
}

#[test]
fn pissa_starts_as_the_base_and_trains_its_strongest_directions() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(4));
    let mut model = tiny_model();
    model.attach_lora(&pissa(), 0).unwrap();
    let fresh = loss(&model, &data);
    assert!((fresh / loss(&tiny_model(), &data) - 1.0).abs() < 1e-5);
    // The update holds something from the start, which has left the base.
    model.detach_adapters();
    assert!((loss(&model, &data) - fresh).abs() > 1e-2);
    let too_large = LoraConfig { rank: 4096, ..pissa() };
    let message = tiny_model().attach_lora(&too_large, 0).unwrap_err().to_string();
    assert!(message.contains("rank 4096"), "{message}");
}

#[test]
fn converted_and_full_runs_resume_to_the_same_bits() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let full = TrainOptions {
        tuning: Tuning::Full,
        learning_rate: 1e-3,
        ..run_of(lora(), 6)
    };
    for (name, options) in [
        ("pissa", run_of(pissa(), 6)),
        ("patterned", run_of(patterned(), 6)),
        ("full", full),
    ] {
        let straight = train(options.clone(), &data, None, &world.path(name));
        let stopped = format!("{name}-stopped");
        let out = world.path(&stopped);
        let stop = StopFlag::default();
        let mut watch = |event: &Event| {
            if matches!(event, Event::Step(step) if step.position.step == 2) {
                stop.stop();
            }
        };
        let first = Trainer::new(options.clone(), &data, &out).stop(&stop);
        first.run(&mut tiny_model(), &mut watch).unwrap();
        let mut model = tiny_model();
        let again = Trainer::new(options, &data, &out).resume(Resume::Exact);
        again.run(&mut model, &mut Silent).unwrap();
        assert!(values(&model.trainables()) == straight.values(), "{name}");
        let file = match name {
            "full" => "model.safetensors",
            _ => "adapters.safetensors",
        };
        assert!(
            world.read(&format!("{name}/{file}")) == world.read(&format!("{stopped}/{file}")),
            "{name}"
        );
    }
}

#[test]
fn a_run_starts_from_an_adapter_of_the_same_kind() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let first = train(run_of(lora(), 6), &data, None, &world.path("first"));
    let from = |lora: LoraConfig, name: &str| {
        let options = TrainOptions {
            start: Some(world.path("first")),
            ..run_of(lora, 1)
        };
        let out = world.path(name);
        let mut losses = Vec::new();
        let mut watch = |event: &Event| {
            if let Event::Step(step) = event {
                losses.push(step.loss);
            }
        };
        let outcome = Trainer::new(options, &data, &out).run(&mut tiny_model(), &mut watch);
        outcome.map(|_| losses[0])
    };
    let second = from(lora(), "second").unwrap();
    // The same rows come first in both.
    assert!(second < first.losses()[0] - 0.05, "{second} {:?}", first.losses());
    let refused = from(LoraConfig { rank: 2, ..lora() }, "third");
    let Err(Error::Config {
        key: "lora.start",
        reason,
    }) = refused
    else {
        panic!("{refused:?}")
    };
    assert!(reason.contains("rank 4") && reason.contains("rank 2"), "{reason}");
}
