use mlx_rs::{Array, transforms::fallible_vjp};
use planish_loss::{
    Error,
    dpo::{DpoOptions, PairLogProbabilities, dpo, sequence_sums},
    orpo::orpo,
};

use crate::reference::{assert_close, gradient};

fn pairs(chosen: &[f64], rejected: &[f64]) -> PairLogProbabilities {
    let array = |x: &[f64]| Array::from_slice(&x.iter().map(|&v| v as f32).collect::<Vec<_>>(), &[x.len() as i32]);
    PairLogProbabilities {
        chosen: array(chosen),
        rejected: array(rejected),
    }
}

fn log_sigmoid(x: f64) -> f64 {
    -(-x).exp().ln_1p()
}

/// Gradient of the summed losses with respect to `[chosen…, rejected…]`.
fn gradients(input: &[f64], loss: impl Fn(&PairLogProbabilities) -> Array) -> (f32, Vec<f32>) {
    let (chosen, rejected) = input.split_at(input.len() / 2);
    let at = pairs(chosen, rejected);
    let function = |a: &[Array]| {
        let pair = PairLogProbabilities {
            chosen: a[0].clone(),
            rejected: a[1].clone(),
        };
        loss(&pair).sum(false).map(|total| vec![total])
    };
    let (value, parts) = fallible_vjp(function, &[at.chosen, at.rejected], &[Array::from_f32(1.0)]).unwrap();
    let parts: Vec<f32> = parts.iter().flat_map(|g| g.as_slice::<f32>().to_vec()).collect();
    (value[0].item_exact::<f32>(), parts)
}

#[test]
fn dpo_equals_its_formula_and_finite_differences() {
    let reference = ([-12.0, -3.5, -40.0], [-10.0, -3.0, -20.0]);
    let policy = [-11.0, -3.0, -60.0, -14.0, -2.0, -19.0];
    for (smoothing, asked) in [(0.0, [0.0; 3]), (0.1, [0.0; 3]), (0.1, [0.5, 0.0, 2.0])] {
        let options = DpoOptions {
            beta: 0.3,
            label_smoothing: smoothing as f32,
        };
        let formula = |x: &[f64]| {
            let margins = (0..3).map(|i| 0.3 * ((x[i] - reference.0[i]) - (x[i + 3] - reference.1[i])) - asked[i]);
            margins
                .map(|m| -(1.0 - smoothing) * log_sigmoid(m) - smoothing * log_sigmoid(-m))
                .sum::<f64>()
        };
        let frozen = pairs(&reference.0, &reference.1);
        let wanted = Array::from_slice(&asked.map(|m| m as f32), &[3]);
        let (value, found) = gradients(&policy, |p| dpo(p, &frozen, Some(&wanted), &options).unwrap().losses);
        assert!((f64::from(value) / formula(&policy) - 1.0).abs() < 1e-5);
        assert_close(&found, &gradient(formula, &policy), 1e-4);
    }
}

#[test]
fn dpo_rewards_are_scaled_log_ratios() {
    let loss = dpo(
        &pairs(&[-3.0], &[-8.0]),
        &pairs(&[-5.0], &[-7.0]),
        None,
        &DpoOptions::default(),
    )
    .unwrap();
    assert!((loss.chosen_rewards.item_exact::<f32>() - 0.2).abs() < 1e-6);
    assert!((loss.rejected_rewards.item_exact::<f32>() + 0.1).abs() < 1e-6);
}

#[test]
fn dpo_stays_finite_far_from_the_reference() {
    let loss = dpo(
        &pairs(&[-5000.0], &[-1.0]),
        &pairs(&[-1.0], &[-5000.0]),
        None,
        &DpoOptions::default(),
    )
    .unwrap();
    assert!((loss.losses.item_exact::<f32>() - 999.8).abs() < 0.1);
}

#[test]
fn orpo_equals_its_formula_and_finite_differences() {
    let means = [-0.4, -2.0, -0.05, -0.9, -0.3, -4.0];
    let lambda = 0.25;
    let log_odds = |x: f64| x - (1.0 - x.exp()).ln();
    let formula = |x: &[f64]| {
        let pairs = (0..3).map(|i| -x[i] - lambda * log_sigmoid(log_odds(x[i]) - log_odds(x[i + 3])));
        pairs.sum::<f64>()
    };
    let (value, found) = gradients(&means, |p| orpo(p, lambda as f32).unwrap().losses);
    assert!((f64::from(value) / formula(&means) - 1.0).abs() < 1e-5);
    assert_close(&found, &gradient(formula, &means), 1e-4);
}

#[test]
fn orpo_stays_finite_when_an_answer_is_certain() {
    let loss = orpo(&pairs(&[0.0], &[-1.0]), 0.1).unwrap();
    assert!(loss.losses.item_exact::<f32>().is_finite());
}

#[test]
fn sequence_sums_add_the_tokens_of_each_sequence() {
    let values = Array::from_slice(&[1.0f32, 2.0, 4.0, 8.0, 16.0], &[5]);
    let members = [1f32, 0., 1., 0., 0., 0., 0., 0., 1., 0., 0., 1., 0., 0., 1.];
    let members = Array::from_slice(&members, &[3, 5]);
    let sums = sequence_sums(&values, &members).unwrap();
    assert_eq!(sums.as_slice::<f32>(), &[5.0, 8.0, 18.0]);
    let four = Array::from_slice(&[1.0f32; 4], &[4]);
    assert!(matches!(
        sequence_sums(&four, &members),
        Err(Error::ShapeMismatch { .. })
    ));
}

#[test]
fn err_preference_settings_and_shapes() {
    let one = pairs(&[-1.0], &[-2.0]);
    for beta in [0.0, -1.0, f32::NAN] {
        assert!(
            dpo(
                &one,
                &one,
                None,
                &DpoOptions {
                    beta,
                    label_smoothing: 0.0
                }
            )
            .is_err()
        );
    }
    assert!(
        dpo(
            &one,
            &one,
            None,
            &DpoOptions {
                beta: 0.1,
                label_smoothing: 0.5
            }
        )
        .is_err()
    );
    assert!(matches!(
        dpo(&one, &pairs(&[-1.0, -2.0], &[-1.0, -2.0]), None, &DpoOptions::default()),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(orpo(&one, -0.1).is_err());
    assert!(PairLogProbabilities::split(&Array::zeros::<f32>(&[3]).unwrap()).is_err());
}
