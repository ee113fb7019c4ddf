//! Every recipe trains what can be trained with every choice of kernels, and finds the losses of MLX's own operations.

use std::path::Path;

use planish_core::model_config::ModelConfig;
use planish_core::target_modules::{Blocks, TargetModules};
use planish_data::Dataset;
use planish_loss::dpo::DpoOptions;
use planish_mlx::Dtype;
use planish_nn::{Kernels, LoraConfig, Model};
use planish_train::{
    Error, Event, Recipe, Silent, TrainOptions, Trainer, Tuning,
    optimizer::{Adam, Rule},
    schedule::Shape,
};

use crate::preference::pairs;
use crate::world::{World, lora, options, tiny_dir, train_model, uneven_rows};

/// What trains.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Trained {
    Adapters,
    /// An adapter on the head besides one in the blocks.
    Head,
    Everything,
}

const ALL_KERNELS: [Kernels; 4] = [Kernels::Composed, Kernels::Native, Kernels::NativeBf16, Kernels::Fused];

impl Trained {
    fn tuning(self) -> Tuning {
        let adapters = |config| Tuning::Adapters(Box::new(config));
        match self {
            Self::Adapters => adapters(lora()),
            Self::Head => adapters(LoraConfig {
                targets: TargetModules::new(["q_proj", "lm_head"], Blocks::All),
                ..lora()
            }),
            Self::Everything => Tuning::Full,
        }
    }

    /// Whether the head may be the embedding; tied and untied heads are different paths. An adapter needs a head of its own.
    fn heads(self) -> &'static [bool] {
        match self {
            Self::Adapters => &[true],
            Self::Head => &[false],
            Self::Everything => &[true, false],
        }
    }
}

/// The tiny model's shape with random weights.
fn model(kernels: Kernels, is_tied: bool) -> Model {
    let text = std::fs::read_to_string(tiny_dir().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["tie_word_embeddings"] = is_tied.into();
    config["num_hidden_layers"] = 2.into();
    let config = ModelConfig::from_json_str(&config.to_string(), Path::new("config.json")).unwrap();
    Model::random_with(&config, Dtype::Float32, kernels, 11).unwrap()
}

fn three_steps(recipe: Recipe, trained: Trained) -> TrainOptions {
    TrainOptions {
        recipe,
        tuning: trained.tuning(),
        shape: Shape::Constant,
        // Gradients that are nearly zero differ by rounding, and would else be steps of full size all the same.
        rule: Rule::Adam(Adam {
            eps: 1e-4,
            ..Adam::default()
        }),
        ..options(3)
    }
}

/// Loss and gradient norm of each step.
fn steps(kernels: Kernels, is_tied: bool, options: &TrainOptions, data: &Dataset) -> Vec<(f64, f64)> {
    let world = World::new();
    let run = train_model(model(kernels, is_tied), options.clone(), data, None, &world.path("out"));
    let step = |event: &Event| match event {
        Event::Step(step) => Some((step.loss, step.grad_norm)),
        _ => None,
    };
    run.events.iter().filter_map(step).collect()
}

#[test]
fn every_recipe_trains_everything_with_all_kernels() {
    let world = World::new();
    let rows = world.data("rows.jsonl", &uneven_rows(4));
    let preferences = world.data("pairs.jsonl", &pairs(0..4));
    let recipes = [
        (Recipe::Sft, &rows),
        (Recipe::Dpo(DpoOptions::default()), &preferences),
        (Recipe::Orpo { lambda: 0.5 }, &preferences),
    ];
    for (recipe, data) in recipes {
        for trained in [Trained::Adapters, Trained::Head, Trained::Everything] {
            for &is_tied in trained.heads() {
                let options = three_steps(recipe, trained);
                let expected = steps(Kernels::Composed, is_tied, &options, data);
                assert_eq!(expected.len(), 3);
                for kernels in ALL_KERNELS.into_iter().skip(1) {
                    if kernels == Kernels::NativeBf16 && trained == Trained::Everything {
                        continue; // its weights are packed; below
                    }
                    let found = steps(kernels, is_tied, &options, data);
                    let name = format!("{} {trained:?} {kernels:?}, tied {is_tied}", recipe.name());
                    check(&name, kernels, &found, &expected);
                }
            }
        }
    }
}

#[allow(clippy::print_stdout)] // figures of record
fn check(name: &str, kernels: Kernels, found: &[(f64, f64)], expected: &[(f64, f64)]) {
    let apart = |of: fn(&(f64, f64)) -> f64| {
        let pairs = found.iter().zip(expected);
        pairs.map(|(a, b)| (of(a) / of(b) - 1.0).abs()).fold(0.0, f64::max)
    };
    let (loss, norm) = (apart(|step| step.0), apart(|step| step.1));
    println!("{name}: losses {loss:.1e}, norms {norm:.1e} apart");
    // f32: sums in another order. bf16 keeps 8 bits of what is multiplied.
    let (of_loss, of_norm) = match kernels {
        Kernels::NativeBf16 => (5e-3, 5e-2),
        _ => (1e-5, 1e-3),
    };
    assert_eq!(found.len(), expected.len(), "{name}");
    assert!(loss <= of_loss && norm <= of_norm, "{name}: {found:?} {expected:?}");
}

#[test]
fn err_packed_weights_do_not_train() {
    let world = World::new();
    let rows = world.data("rows.jsonl", &uneven_rows(2));
    let options = three_steps(Recipe::Sft, Trained::Everything);
    let out = world.path("out");
    let refused = Trainer::new(options, &rows, &out).run(&mut model(Kernels::NativeBf16, true), &mut Silent);
    assert!(
        matches!(
            refused,
            Err(Error::Model(planish_nn::Error::PackedWeights {
                operation: "full fine-tuning"
            }))
        ),
        "{refused:?}"
    );
}
