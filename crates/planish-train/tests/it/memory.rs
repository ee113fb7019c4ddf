//! Memory: what saves it, what it is estimated at, and what happens when there is not enough.

use planish_core::run_config::RunConfig;
use planish_train::{Error, MemoryEstimate, Silent, TrainOptions, Trainer, schedule::Shape};

use crate::world::{World, options, tiny_model, train, uneven_rows};

/// Runs one test of this binary in a process of its own, since memory counters belong to the whole process.
#[allow(clippy::print_stdout)] // Figures of record.
pub(crate) fn alone(test: &str) -> bool {
    const MARK: &str = "PLANISH_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command
        .args([test, "--exact", "--nocapture"])
        .env(MARK, "1")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{stdout}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(stdout.contains("1 passed"), "{test} was not found: {stdout}");
    print!(
        "{}",
        stdout
            .lines()
            .filter(|line| line.contains(" MB"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    false
}

fn long_rows() -> TrainOptions {
    TrainOptions {
        batch_size: 8,
        shape: Shape::Constant,
        ..options(2)
    }
}

#[test]
fn activation_checkpointing_gives_the_same_losses_at_a_lower_peak() {
    if !alone("memory::activation_checkpointing_gives_the_same_losses_at_a_lower_peak") {
        return;
    }
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let run = |activation_checkpointing: bool| {
        let name = format!("out-{activation_checkpointing}");
        let options = TrainOptions {
            activation_checkpointing,
            ..long_rows()
        };
        let run = train(options, &data, None, &world.path(&name));
        let peaks = world
            .metrics(&name)
            .into_iter()
            .filter_map(|line| line["peak_memory_bytes"].as_f64());
        (run.losses(), peaks.fold(0.0, f64::max))
    };
    let (kept, kept_peak) = run(false);
    let (again, again_peak) = run(true);
    for (one, other) in kept.iter().zip(&again) {
        assert!((one / other - 1.0).abs() < 1e-6, "{kept:?} {again:?}");
    }
    println!(
        "peak {:.1} MB without, {:.1} MB with activation checkpointing",
        kept_peak / 1e6,
        again_peak / 1e6
    );
    assert!(again_peak < 0.75 * kept_peak, "{again_peak} of {kept_peak}");
}

#[test]
fn the_estimate_is_near_the_measured_peak() {
    if !alone("memory::the_estimate_is_near_the_measured_peak") {
        return;
    }
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(16));
    let cases = [
        ("plain", long_rows()),
        (
            "checkpointing",
            TrainOptions {
                activation_checkpointing: true,
                ..long_rows()
            },
        ),
        (
            "wide",
            TrainOptions {
                batch_size: 16,
                ..long_rows()
            },
        ),
        (
            "full",
            TrainOptions {
                tuning: planish_train::Tuning::Full,
                ..long_rows()
            },
        ),
    ];
    for (name, options) in cases {
        let options = TrainOptions {
            preflight: true,
            ..options
        };
        let rows = options.batch_size;
        train(options.clone(), &data, None, &world.path(name));
        let plan = world
            .metrics(name)
            .into_iter()
            .find(|line| line["kind"] == "plan")
            .unwrap();
        let measured = plan["step_memory_bytes"].as_f64().unwrap();
        let model = tiny_model();
        let weights = model.config().arch.n_parameters();
        let length = plan["shapes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s[1].as_u64().unwrap())
            .max()
            .unwrap();
        let estimate = MemoryEstimate::of(model.config(), 4 * weights as u64, &options, rows, length as usize).unwrap();
        let ratio = estimate.total() as f64 / measured;
        println!(
            "{name}: estimated {:.1} MB, measured {:.1} MB ({estimate:?})",
            estimate.total() as f64 / 1e6,
            measured / 1e6
        );
        assert!((0.75..1.25).contains(&ratio), "{name}: {ratio} {estimate:?} {measured}");
    }
}

#[test]
fn a_trial_changes_no_bit_of_the_run() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let run = |preflight: bool| {
        let options = TrainOptions {
            preflight,
            ..long_rows()
        };
        let out = format!("out-{preflight}");
        let run = train(options, &data, None, &world.path(&out));
        (
            run.values(),
            world.read(&format!("{out}/checkpoints/step-0000002/optimizer.safetensors")),
        )
    };
    assert!(run(true) == run(false));
}

#[test]
fn err_what_does_not_fit_is_refused_with_settings_that_do() {
    let world = World::new();
    let data = world.data("train.jsonl", &uneven_rows(8));
    let refuse = |budget: u64| {
        let options = TrainOptions {
            preflight: true,
            ..long_rows()
        };
        let out = world.path("out");
        let outcome = Trainer::new(options, &data, &out)
            .memory_budget(budget)
            .run(&mut tiny_model(), &mut Silent);
        let Err(error @ Error::Memory { .. }) = outcome else {
            panic!("{outcome:?}")
        };
        error.to_string()
    };
    let message = refuse(1_000_000);
    assert!(
        message.contains("estimated") && message.contains("no setting"),
        "{message}"
    );
    let measured = refuse(60_000_000);
    assert!(
        measured.contains("takes") && measured.contains("train.checkpointing=true"),
        "{measured}"
    );
    // Every setting that is named is one.
    let settings = measured
        .lines()
        .nth(1)
        .unwrap()
        .trim_start_matches("set ")
        .split(';')
        .next()
        .unwrap()
        .to_owned();
    let mut builder = RunConfig::builder();
    for assignment in settings.split(" and ") {
        builder = builder.set(assignment).unwrap();
    }
    assert!(builder.build().unwrap().train.checkpointing);
}
