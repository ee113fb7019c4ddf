//! Every rule against the same formula in f64 loops, and what all rules have in common.

use std::collections::BTreeMap;

use mlx_rs::{Array, Dtype};
use planish_train::{
    Error,
    optimizer::{Adafactor, Adam, AdamW, Groups, Lion, Muon, Optimizer, Rule, Sgd, decays},
};

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect()
}

fn rules() -> Vec<Rule> {
    vec![
        Rule::AdamW(AdamW::default()),
        Rule::Adam(Adam::default()),
        Rule::Sgd(Sgd {
            momentum: 0.9,
            nesterov: true,
            weight_decay: 0.1,
        }),
        Rule::Lion(Lion::default()),
        Rule::Muon(Muon::default()),
        Rule::Adafactor(Adafactor::default()),
    ]
}

fn adapters() -> Vec<(String, Array)> {
    let shapes = [
        ("b.0.q.lora_a", [6, 2]),
        ("b.0.q.lora_b", [2, 5]),
        ("b.1.q.lora_a", [6, 2]),
        ("b.1.q.lora_b", [2, 5]),
    ];
    let mut all: Vec<(String, Array)> = shapes
        .iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let values = noise((shape[0] * shape[1]) as usize, i as u32 + 1);
            (name.to_string(), Array::from_slice(&values, &shape[..]))
        })
        .collect();
    all.push(("b.0.q.m".to_owned(), Array::from_slice(&noise(5, 9), &[5])));
    all
}

fn gradients_of(trainables: &[(String, Array)], seed: u32) -> Vec<Array> {
    let one = |(i, (_, value)): (usize, &(String, Array))| {
        Array::from_slice(&noise(value.size(), seed * 100 + i as u32), value.shape())
    };
    trainables.iter().enumerate().map(one).collect()
}

fn accept(yes: bool) -> Array {
    Array::from_bool(yes)
}

fn run(optimizer: &mut Optimizer, trainables: &[(String, Array)], steps: std::ops::Range<u32>) -> Vec<Vec<f32>> {
    let mut latest = Vec::new();
    for seed in steps {
        let gradients = optimizer.gather(&gradients_of(trainables, seed)).unwrap();
        latest = optimizer.step(&gradients, 1e-2, &accept(true)).unwrap();
        mlx_rs::transforms::eval(latest.iter().chain(optimizer.pending())).unwrap();
    }
    values(&latest)
}

fn values(arrays: &[Array]) -> Vec<Vec<f32>> {
    arrays
        .iter()
        .map(|a| a.contiguous().unwrap().as_slice::<f32>().to_vec())
        .collect()
}

/// 50 steps of one tensor under `rule` against `reference(step from 1, θ, g)`.
fn check_trace(rule: Rule, relative: f64, mut reference: impl FnMut(i32, &mut [f64], &[f64])) {
    let start = noise(12, 3);
    let trainables = [("layer.lora_a".to_owned(), Array::from_slice(&start, &[3, 4]))];
    let mut optimizer = Optimizer::new(rule, Groups::default(), &trainables).unwrap();
    let mut expected: Vec<f64> = start.iter().map(|&x| f64::from(x)).collect();
    for step in 1..=50 {
        let gradient = noise(12, 1000 + step as u32);
        let gathered = optimizer.gather(&[Array::from_slice(&gradient, &[3, 4])]).unwrap();
        let found = optimizer.step(&gathered, 1e-2, &accept(true)).unwrap();
        mlx_rs::transforms::eval(found.iter().chain(optimizer.pending())).unwrap();
        let gradient: Vec<f64> = gradient.iter().map(|&x| f64::from(x)).collect();
        reference(step, &mut expected, &gradient);
        for (a, b) in values(&found)[0].iter().zip(&expected) {
            assert!(
                (f64::from(*a) - b).abs() <= relative * b.abs().max(0.1),
                "step {step}: {a} is not {b}"
            );
        }
    }
    assert_eq!(optimizer.count().unwrap(), 50);
}

#[test]
fn adamw_follows_its_formula_for_50_steps() {
    let (mut m, mut v) = (vec![0.0; 12], vec![0.0; 12]);
    check_trace(Rule::adamw(), 1e-6, |t, x, g| {
        for i in 0..12 {
            m[i] = 0.9 * m[i] + 0.1 * g[i];
            v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
            let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.999f64.powi(t)));
            x[i] -= 1e-2 * (mh / (vh.sqrt() + 1e-8) + 0.01 * x[i]);
        }
    });
}

#[test]
fn adam_without_bias_correction_follows_mlx_lm() {
    let (mut m, mut v) = (vec![0.0; 12], vec![0.0; 12]);
    let rule = Rule::Adam(Adam {
        bias_correction: false,
        weight_decay: 0.01,
        ..Adam::default()
    });
    // Uncorrected steps start about three times larger, and so do their roundings.
    check_trace(rule, 3e-6, |_, x, g| {
        for i in 0..12 {
            m[i] = 0.9 * m[i] + 0.1 * g[i];
            v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
            x[i] = x[i] * (1.0 - 1e-2 * 0.01) - 1e-2 * m[i] / (v[i].sqrt() + 1e-8);
        }
    });
}

#[test]
fn sgd_follows_its_formula() {
    let mut b = [0.0; 12];
    check_trace(
        Rule::Sgd(Sgd {
            momentum: 0.9,
            nesterov: true,
            weight_decay: 0.1,
        }),
        1e-6,
        |_, x, g| {
            for i in 0..12 {
                let d = g[i] + 0.1 * x[i];
                b[i] = 0.9 * b[i] + d;
                x[i] -= 1e-2 * (d + 0.9 * b[i]);
            }
        },
    );
    check_trace(Rule::Sgd(Sgd::default()), 1e-6, |_, x, g| {
        (0..12).for_each(|i| x[i] -= 1e-2 * g[i])
    });
}

#[test]
fn lion_follows_its_formula() {
    let mut m = [0.0f64; 12];
    check_trace(
        Rule::Lion(Lion {
            weight_decay: 0.1,
            ..Lion::default()
        }),
        1e-6,
        |_, x, g| {
            for i in 0..12 {
                x[i] -= 1e-2 * ((0.9 * m[i] + 0.1 * g[i]).signum() + 0.1 * x[i]);
                m[i] = 0.99 * m[i] + 0.01 * g[i];
            }
        },
    );
}

#[test]
fn adafactor_follows_its_formula() {
    let (mut row, mut column) = ([0.0f64; 3], [0.0f64; 4]);
    check_trace(Rule::Adafactor(Adafactor::default()), 1e-5, |t, x, g| {
        let beta = 1.0 - f64::from(t).powf(-0.8);
        for r in 0..3 {
            row[r] = beta * row[r] + (1.0 - beta) * (0..4).map(|c| g[r * 4 + c].powi(2)).sum::<f64>() / 4.0;
        }
        for c in 0..4 {
            column[c] = beta * column[c] + (1.0 - beta) * (0..3).map(|r| g[r * 4 + c].powi(2)).sum::<f64>() / 3.0;
        }
        let mean = row.iter().sum::<f64>() / 3.0;
        let u: Vec<f64> = (0..12)
            .map(|i| g[i] / (row[i / 4] * column[i % 4] / mean).sqrt())
            .collect();
        let rms = (u.iter().map(|x| x * x).sum::<f64>() / 12.0).sqrt();
        (0..12).for_each(|i| x[i] -= 1e-2 * u[i] / rms.max(1.0));
    });
}

#[test]
fn muon_moves_a_matrix_by_a_nearly_orthogonal_step() {
    let trainables = [("layer.lora_a".to_owned(), Array::zeros::<f32>(&[8, 3]).unwrap())];
    let mut optimizer = Optimizer::new(Rule::Muon(Muon::default()), Groups::default(), &trainables).unwrap();
    let gathered = optimizer.gather(&[Array::from_slice(&noise(24, 7), &[8, 3])]).unwrap();
    let moved = optimizer.step(&gathered, 1.0, &accept(true)).unwrap().remove(0);
    let gram = moved.transpose().unwrap().matmul(&moved).unwrap();
    let diagonal: Vec<f32> = (0..3).map(|i| gram.as_slice::<f32>()[i * 4] / (8.0 / 3.0)).collect();
    assert!(diagonal.iter().all(|d| (0.4..1.5).contains(d)), "{diagonal:?}");
}

#[test]
fn a_refused_step_changes_no_bit_and_the_next_one_is_normal() {
    for rule in rules() {
        let trainables = adapters();
        let mut straight = Optimizer::new(rule.clone(), Groups::default(), &trainables).unwrap();
        let mut disturbed = Optimizer::new(rule.clone(), Groups::default(), &trainables).unwrap();
        run(&mut straight, &trainables, 0..3);
        let before = run(&mut disturbed, &trainables, 0..3);

        let broken: Vec<Array> = gradients_of(&trainables, 77)
            .iter()
            .map(|g| g.multiply(Array::from_f32(f32::NAN)).unwrap())
            .collect();
        let broken = disturbed.gather(&broken).unwrap();
        let after = disturbed.step(&broken, 1e-2, &accept(false)).unwrap();
        assert_eq!(values(&after), before, "{}", rule.name());
        assert_eq!(disturbed.count().unwrap(), 3);

        assert_eq!(
            run(&mut disturbed, &trainables, 3..6),
            run(&mut straight, &trainables, 3..6),
            "{}",
            rule.name()
        );
    }
}

#[test]
fn restored_state_continues_bit_for_bit() {
    for rule in rules() {
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let trainables: Vec<(String, Array)> = adapters()
                .into_iter()
                .map(|(name, value)| (name, value.as_dtype(dtype).unwrap()))
                .collect();
            let mut straight = Optimizer::new(rule.clone(), Groups { lora_b_ratio: 16.0 }, &trainables).unwrap();
            let advance = |optimizer: &mut Optimizer, steps: std::ops::Range<u32>| {
                for seed in steps {
                    let gradients = optimizer.gather(&gradients_of(&trainables, seed)).unwrap();
                    optimizer.step(&gradients, 1e-2, &accept(true)).unwrap();
                }
            };
            advance(&mut straight, 0..5);
            let saved: BTreeMap<String, Array> = straight.state().unwrap();
            let current = straight.trainables().unwrap();
            let mut resumed = Optimizer::new(rule.clone(), Groups { lora_b_ratio: 16.0 }, &trainables).unwrap();
            resumed.restore(&saved, &current, straight.count().unwrap()).unwrap();
            advance(&mut straight, 5..9);
            advance(&mut resumed, 5..9);
            let bits = |o: &Optimizer| {
                let arrays = o.state().unwrap().into_values().chain(o.trainables().unwrap());
                values(&arrays.map(|a| a.as_dtype(Dtype::Float32).unwrap()).collect::<Vec<_>>())
            };
            assert_eq!(bits(&resumed), bits(&straight), "{} {dtype:?}", rule.name());
            assert_eq!(resumed.count().unwrap(), 9);
        }
    }
}

#[test]
fn err_state_of_another_adapter_is_named() {
    let trainables = adapters();
    let optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &trainables).unwrap();
    let good = optimizer.state().unwrap();
    let current: Vec<Array> = trainables.iter().map(|(_, v)| v.clone()).collect();
    let check = |change: &dyn Fn(&mut BTreeMap<String, Array>), part: &str| {
        let mut state = good.clone();
        change(&mut state);
        let mut fresh = Optimizer::new(Rule::adamw(), Groups::default(), &trainables).unwrap();
        let message = fresh.restore(&state, &current, 1).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    check(&|s| drop(s.remove("m/b.0.q.lora_a")), "m/b.0.q.lora_a is missing");
    check(
        &|s| drop(s.insert("m/x".into(), Array::from_f32(0.0))),
        "m/x belongs to no",
    );
    check(
        &|s| drop(s.insert("v/b.0.q.lora_a".into(), Array::from_f32(0.0))),
        "v/b.0.q.lora_a: expected shape [6, 2]",
    );
}

#[test]
fn dtypes_stay_what_they_are() {
    for rule in rules() {
        let trainables: Vec<(String, Array)> = adapters()
            .into_iter()
            .enumerate()
            .map(|(i, (n, v))| {
                (
                    n,
                    if i % 2 == 0 {
                        v.as_dtype(Dtype::Bfloat16).unwrap()
                    } else {
                        v
                    },
                )
            })
            .collect();
        let mut optimizer = Optimizer::new(rule.clone(), Groups::default(), &trainables).unwrap();
        let mut moved = Vec::new();
        for seed in 0..3 {
            let gradients = optimizer.gather(&gradients_of(&trainables, seed)).unwrap();
            moved = optimizer.step(&gradients, 1e-2, &accept(true)).unwrap();
        }
        let found: Vec<Dtype> = moved.iter().map(Array::dtype).collect();
        let expected: Vec<Dtype> = trainables.iter().map(|(_, v)| v.dtype()).collect();
        assert_eq!(found, expected, "{}", rule.name());
        assert!(
            optimizer
                .state()
                .unwrap()
                .values()
                .all(|slot| slot.dtype() == Dtype::Float32)
        );
    }
}

#[test]
fn bf16_weights_collect_updates_smaller_than_their_spacing() {
    let one = Array::from_slice(&[1.0f32], &[1, 1]).as_dtype(Dtype::Bfloat16).unwrap();
    let mut optimizer = Optimizer::new(
        Rule::Sgd(Sgd::default()),
        Groups::default(),
        &[("w.weight".to_owned(), one)],
    )
    .unwrap();
    let mut moved = Vec::new();
    for _ in 0..100 {
        let gradient = optimizer.gather(&[Array::from_slice(&[1.0f32], &[1, 1])]).unwrap();
        moved = optimizer.step(&gradient, 1e-4, &accept(true)).unwrap();
    }
    let value = moved[0].as_dtype(Dtype::Float32).unwrap().item_exact::<f32>();
    assert!((value - 0.99).abs() < 0.004, "{value}"); // bf16 alone would still read 1
}

#[test]
fn lora_plus_scales_only_the_rate_of_b() {
    let trainables = adapters();
    let after = |ratio| {
        let mut optimizer =
            Optimizer::new(Rule::Sgd(Sgd::default()), Groups { lora_b_ratio: ratio }, &trainables).unwrap();
        run(&mut optimizer, &trainables, 0..1)
    };
    let (plain, plus) = (after(1.0), after(16.0));
    let start = values(&trainables.iter().map(|(_, v)| v.clone()).collect::<Vec<_>>());
    for (i, (name, _)) in trainables.iter().enumerate() {
        let factor = if name.ends_with(".lora_b") { 16.0 } else { 1.0 };
        for ((a, b), origin) in plus[i].iter().zip(&plain[i]).zip(&start[i]) {
            assert!(((a - origin) - factor * (b - origin)).abs() < 1e-5, "{name}");
        }
    }
}

#[test]
fn weight_decay_reaches_matrices_only() {
    let table = [
        ("model.layers.0.self_attn.q_proj.lora_a", vec![8, 2], true),
        ("model.layers.0.self_attn.q_proj.lora_b", vec![2, 8], true),
        ("model.layers.0.self_attn.q_proj.m", vec![8], false),
        ("model.layers.0.mlp.up_proj.weight", vec![8, 8], true),
        ("model.layers.0.self_attn.q_proj.bias", vec![8], false),
        ("model.norm.weight", vec![8], false),
        ("model.embed_tokens.lora_a", vec![100, 2], false),
        ("model.embed_tokens.lora_b", vec![2, 8], true),
    ];
    for (name, shape, expected) in table {
        assert_eq!(decays(name, &shape), expected, "{name}");
    }
    // Without a gradient, decay is all that moves a weight.
    let trainables = adapters();
    let mut optimizer = Optimizer::new(
        Rule::AdamW(AdamW {
            weight_decay: 0.5,
            ..AdamW::default()
        }),
        Groups::default(),
        &trainables,
    )
    .unwrap();
    let none: Vec<Array> = trainables
        .iter()
        .map(|(_, v)| mlx_rs::ops::zeros_like(v).unwrap())
        .collect();
    let moved = optimizer
        .step(&optimizer.gather(&none).unwrap(), 1e-1, &accept(true))
        .unwrap();
    for ((name, before), after) in trainables.iter().zip(&moved) {
        let same = before.as_slice::<f32>() == after.contiguous().unwrap().as_slice::<f32>();
        assert_eq!(same, name.ends_with(".m"), "{name}");
    }
}

#[test]
fn gradient_sums_do_not_depend_on_the_layout() {
    let trainables = adapters();
    let optimizer = Optimizer::new(Rule::adamw(), Groups { lora_b_ratio: 2.0 }, &trainables).unwrap();
    let gradients = gradients_of(&trainables, 5);
    let norm = optimizer
        .gather(&gradients)
        .unwrap()
        .norm()
        .unwrap()
        .item_exact::<f32>();
    let squares: f64 = values(&gradients).iter().flatten().map(|&g| f64::from(g).powi(2)).sum();
    assert!((f64::from(norm) / squares.sqrt() - 1.0).abs() < 1e-6);
}

#[test]
fn err_settings_out_of_range() {
    let trainables = adapters();
    let check = |rule: Rule, key: &str| match Optimizer::new(rule, Groups::default(), &trainables) {
        Err(Error::Config { key: found, .. }) => assert_eq!(found, key),
        other => panic!("{key}: {other:?}"),
    };
    check(
        Rule::AdamW(AdamW {
            betas: [0.9, 1.0],
            ..AdamW::default()
        }),
        "optimizer.betas",
    );
    check(
        Rule::AdamW(AdamW {
            eps: 0.0,
            ..AdamW::default()
        }),
        "optimizer.eps",
    );
    check(
        Rule::AdamW(AdamW {
            weight_decay: f64::NAN,
            ..AdamW::default()
        }),
        "optimizer.weight_decay",
    );
    check(
        Rule::Sgd(Sgd {
            momentum: 1.0,
            ..Sgd::default()
        }),
        "optimizer.momentum",
    );
    assert!(Optimizer::new(Rule::adamw(), Groups { lora_b_ratio: 0.0 }, &trainables).is_err());
    let optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &trainables).unwrap();
    assert!(matches!(
        optimizer.gather(&gradients_of(&trainables, 1)[..2]),
        Err(Error::OptimizerState { .. })
    ));
}
