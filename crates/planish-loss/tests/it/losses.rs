use mlx_rs::{Array, Dtype, transforms::fallible_vjp};
use planish_loss::{
    Error, Head, HeadKernel, HeadLoss, Result, TokenLoss, TokenLossOptions, TrainedPositions, cross_entropy, head_loss,
    weighted_sum,
};

use crate::reference::{assert_close, gradient, linear_objective, noise, to_f64, token_objective};

const DIMS: usize = 6;
const VOCABULARY: usize = 11;

fn options(label_smoothing: f32, z_loss: f32) -> TokenLossOptions {
    TokenLossOptions {
        label_smoothing,
        z_loss,
    }
}

fn all_options() -> [TokenLossOptions; 4] {
    [
        options(0.0, 0.0),
        options(0.1, 0.0),
        options(0.0, 0.01),
        options(0.2, 0.003),
    ]
}

/// A batch of 2 × 4 positions of which 5 are trained.
struct Batch {
    hidden: Vec<f32>,
    head: Vec<f32>,
    targets: Vec<i32>,
    weights: Vec<f32>,
}

impl Batch {
    fn new() -> Self {
        Self {
            hidden: noise(2 * 4 * DIMS, 1).iter().map(|x| x * 4.0).collect(),
            head: noise(VOCABULARY * DIMS, 2).iter().map(|x| x * 3.0).collect(),
            targets: vec![3, 0, 10, 7, 7, 1, 4, 9],
            weights: vec![0.0, 1.0, 0.5, 0.0, 2.0, 1.0, 0.0, 0.25],
        }
    }

    fn hidden(&self) -> Array {
        Array::from_slice(&self.hidden, &[2, 4, DIMS as i32])
    }

    fn head(&self) -> Array {
        Array::from_slice(&self.head, &[VOCABULARY as i32, DIMS as i32])
    }

    fn positions(&self) -> TrainedPositions {
        TrainedPositions::select(&self.targets, &self.weights).unwrap()
    }

    fn reference(&self, hidden: &[f64], head: &[f64], o: &TokenLossOptions) -> f64 {
        let targets: Vec<usize> = self.targets.iter().map(|&t| t as usize).collect();
        let weights = to_f64(&self.weights);
        linear_objective(
            hidden,
            head,
            &targets,
            &weights,
            f64::from(o.label_smoothing),
            f64::from(o.z_loss),
        )
    }
}

fn chunked(
    hidden: &Array,
    head: &Array,
    positions: &TrainedPositions,
    chunk: usize,
    o: &TokenLossOptions,
) -> TokenLoss {
    chunked_by(HeadKernel::Composed, hidden, head, positions, chunk, o)
}

fn chunked_by(
    kernel: HeadKernel,
    hidden: &Array,
    head: &Array,
    positions: &TrainedPositions,
    chunk: usize,
    o: &TokenLossOptions,
) -> TokenLoss {
    let project = |h: &Array| Ok::<_, Error>(h.matmul(head.transpose()?)?);
    projected(kernel, hidden, &project, positions, chunk, o).unwrap()
}

fn projected(
    kernel: HeadKernel,
    hidden: &Array,
    project: &dyn Fn(&Array) -> Result<Array>,
    positions: &TrainedPositions,
    chunk: usize,
    o: &TokenLossOptions,
) -> Result<TokenLoss> {
    let head = Head {
        project,
        vocab_size: VOCABULARY,
        kernel,
    };
    let how = HeadLoss {
        terms: *o,
        chunk_tokens: Some(chunk),
        is_trained: true,
    };
    head_loss(hidden, &head, positions, &how)
}

fn value_and_gradients(inputs: &[Array], loss: impl Fn(&[Array]) -> Array) -> (f32, Vec<Vec<f32>>) {
    let one = Array::from_f32(1.0);
    let (values, gradients) = fallible_vjp(|a: &[Array]| Ok(vec![loss(a)]), inputs, &[one]).unwrap();
    let gradients = gradients
        .iter()
        .map(|g| g.contiguous().unwrap().as_slice::<f32>().to_vec())
        .collect();
    (values[0].item_exact::<f32>(), gradients)
}

#[test]
fn full_loss_equals_f64_reference_and_its_finite_differences() {
    for o in all_options() {
        let logits = noise(3 * VOCABULARY, 5).iter().map(|x| x * 8.0).collect::<Vec<f32>>();
        let targets = [4usize, 0, 10];
        let reference = |x: &[f64]| {
            let rows = x.chunks(VOCABULARY).zip(targets);
            rows.map(|(row, t)| token_objective(row, t, f64::from(o.label_smoothing), f64::from(o.z_loss)))
                .sum::<f64>()
        };
        let target_array = Array::from_slice(&targets.map(|t| t as i32), &[3]);
        let (value, gradients) = value_and_gradients(&[Array::from_slice(&logits, &[3, VOCABULARY as i32])], |a| {
            cross_entropy(&a[0], &target_array, &o)
                .unwrap()
                .objective
                .sum(false)
                .unwrap()
        });
        assert!(
            (f64::from(value) / reference(&to_f64(&logits)) - 1.0).abs() < 1e-6,
            "{o:?}"
        );
        assert_close(&gradients[0], &gradient(reference, &to_f64(&logits)), 1e-5);
    }
}

/// Positions as a traced function gets them: numbers on the device, filled up with repetitions of weight zero.
fn filled_up(batch: &Batch, all: bool) -> (TrainedPositions, Array) {
    let (mut indices, mut weights) = (Vec::new(), Vec::new());
    for (i, &weight) in batch.weights.iter().enumerate() {
        if all || weight != 0.0 {
            indices.push(i as i32);
            weights.push(weight);
        }
    }
    while indices.len() < 7 {
        indices.push(indices[0]);
        weights.push(0.0);
    }
    let targets: Vec<i32> = indices.iter().map(|&i| batch.targets[i as usize]).collect();
    let n = [indices.len() as i32];
    let on_device = (!all).then(|| Array::from_slice(&indices, &n));
    let positions = TrainedPositions::on_device(on_device, Array::from_slice(&targets, &n), 8);
    (positions, Array::from_slice(&weights, &n))
}

#[test]
fn loss_is_the_same_whatever_fills_its_positions_up() {
    let batch = Batch::new();
    for dtype in [Dtype::Float32, Dtype::Bfloat16] {
        let hidden = batch.hidden().as_dtype(dtype).unwrap();
        let head = batch.head().as_dtype(dtype).unwrap();
        for o in all_options() {
            let of = |loss: &dyn Fn(&Array) -> Array| {
                let (value, gradients) = fallible_vjp(
                    |a: &[Array]| Ok(vec![loss(&a[0])]),
                    std::slice::from_ref(&hidden),
                    &[Array::from_f32(1.0)],
                )
                .unwrap();
                let gradient = gradients[0].as_dtype(Dtype::Float32).unwrap();
                (
                    value[0].item_exact::<f32>(),
                    gradient.contiguous().unwrap().as_slice::<f32>().to_vec(),
                )
            };
            let plain = of(&|h| {
                let positions = batch.positions();
                let loss = chunked(h, &head, &positions, 2, &o);
                weighted_sum(&loss.objective, &positions.weights()).unwrap()
            });
            for all in [false, true] {
                let filled = of(&|h| {
                    let (positions, weights) = filled_up(&batch, all);
                    let loss = chunked(h, &head, &positions, 3, &o);
                    weighted_sum(&loss.objective, &weights).unwrap()
                });
                assert!(
                    (filled.0 / plain.0 - 1.0).abs() < 1e-6,
                    "{dtype:?} {o:?}: {filled:?} {plain:?}"
                );
                // Products of chunks of other sizes may be summed in another order.
                let tolerance = if dtype == Dtype::Float32 { 1e-6 } else { 1e-2 };
                for (a, b) in filled.1.iter().zip(&plain.1) {
                    assert!(
                        (a - b).abs() <= tolerance * b.abs().max(0.1),
                        "{dtype:?} {o:?}: {a} is not {b}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_nan_of_an_untrained_position_stays_out_of_the_gradient() {
    let batch = Batch::new();
    let mut hidden = batch.hidden.clone();
    hidden[..DIMS].fill(f32::NAN);
    let (value, gradients) = value_and_gradients(&[Array::from_slice(&hidden, &[2, 4, DIMS as i32])], |a| {
        let (positions, weights) = filled_up(&batch, true);
        let loss = chunked(&a[0], &batch.head(), &positions, 3, &options(0.0, 0.0));
        weighted_sum(&loss.objective, &weights).unwrap()
    });
    assert!(
        value.is_finite() && gradients[0].iter().all(|g| g.is_finite()),
        "{value} {gradients:?}"
    );
}

#[test]
fn chunked_loss_equals_f64_reference_and_its_finite_differences() {
    let batch = Batch::new();
    for o in all_options() {
        for chunk in [1, 2, 3, 5, 64] {
            let positions = batch.positions();
            let (value, gradients) = value_and_gradients(&[batch.hidden()], |a| {
                let loss = chunked(&a[0], &batch.head(), &positions, chunk, &o);
                weighted_sum(&loss.objective, &positions.weights()).unwrap()
            });
            let (hidden, head) = (to_f64(&batch.hidden), to_f64(&batch.head));
            let expected = batch.reference(&hidden, &head, &o);
            assert!((f64::from(value) / expected - 1.0).abs() < 1e-6, "{o:?} chunk {chunk}");
            assert_close(
                &gradients[0],
                &gradient(|x| batch.reference(x, &head, &o), &hidden),
                1e-5,
            );
        }
    }
}

#[test]
fn chunked_loss_equals_full_loss_with_its_gradients() {
    let batch = Batch::new();
    let o = options(0.0, 0.0);
    let positions = batch.positions();
    let targets = Array::from_slice(&batch.targets, &[2, 4]);
    let weights = Array::from_slice(&batch.weights, &[2, 4]);
    let inputs = [batch.hidden(), batch.head()];
    let (full, full_gradients) = value_and_gradients(&inputs, |a| {
        let logits = a[0].matmul(a[1].transpose().unwrap()).unwrap();
        weighted_sum(&cross_entropy(&logits, &targets, &o).unwrap().objective, &weights).unwrap()
    });
    for kernel in [HeadKernel::Composed, HeadKernel::Cpu] {
        let (chunks, gradients) = value_and_gradients(&inputs, |a| {
            let loss = chunked_by(kernel.clone(), &a[0], &a[1], &positions, 2, &o);
            weighted_sum(&loss.objective, &positions.weights()).unwrap()
        });
        assert!((full - chunks).abs() < 1e-5 * full.abs(), "{kernel:?}");
        assert_close(&gradients[0], &to_f64(&full_gradients[0]), 1e-5);
        // A head that is trained gets its gradient too, by ordinary differentiation.
        assert_close(&gradients[1], &to_f64(&full_gradients[1]), 1e-5);
    }
}

#[test]
fn chunked_gradient_follows_a_nonlinear_use_of_the_loss() {
    let batch = Batch::new();
    let o = options(0.0, 0.0);
    let positions = batch.positions();
    let (_, gradients) = value_and_gradients(&[batch.hidden()], |a| {
        chunked(&a[0], &batch.head(), &positions, 2, &o)
            .nll
            .sum(false)
            .unwrap()
            .square()
            .unwrap()
    });
    assert!(
        gradients[0].iter().all(|&g| g == 0.0),
        "the nll is for reporting and carries no gradient"
    );
    let (_, gradients) = value_and_gradients(&[batch.hidden()], |a| {
        chunked(&a[0], &batch.head(), &positions, 2, &o)
            .objective
            .sum(false)
            .unwrap()
            .square()
            .unwrap()
    });
    let unweighted = Batch {
        weights: batch.weights.iter().map(|&w| f32::from(w != 0.0)).collect(),
        ..Batch::new()
    };
    let (hidden, head) = (to_f64(&batch.hidden), to_f64(&batch.head));
    assert_close(
        &gradients[0],
        &gradient(|x| unweighted.reference(x, &head, &o).powi(2), &hidden),
        1e-5,
    );
}

#[test]
fn masked_positions_get_no_gradient_and_no_head_work() {
    let batch = Batch::new();
    let positions = batch.positions();
    let seen = std::cell::Cell::new(0);
    let head = batch.head();
    let project = |h: &Array| {
        seen.set(seen.get().max(h.dim(0)));
        Ok::<_, Error>(h.matmul(head.transpose()?)?)
    };
    let loss = projected(
        HeadKernel::Composed,
        &batch.hidden(),
        &project,
        &positions,
        64,
        &options(0.0, 0.0),
    )
    .unwrap();
    assert_eq!(loss.nll.shape(), [5]);
    assert_eq!(seen.get(), 5);
    let (_, gradients) = value_and_gradients(&[batch.hidden()], |a| {
        let loss = chunked(&a[0], &batch.head(), &positions, 2, &options(0.0, 0.0));
        loss.objective.sum(false).unwrap()
    });
    for (position, weight) in batch.weights.iter().enumerate() {
        let row = &gradients[0][position * DIMS..(position + 1) * DIMS];
        assert_eq!(row.iter().any(|&g| g != 0.0), *weight != 0.0, "position {position}");
    }
}

#[test]
fn uniform_logits_cost_ln_v() {
    let logits = Array::zeros::<f32>(&[1, 5, 49152]).unwrap();
    let targets = Array::from_slice(&[0, 1, 77, 40_000, 49_151], &[1, 5]);
    let loss = cross_entropy(&logits, &targets, &options(0.0, 0.0)).unwrap();
    let mean = loss.nll.mean(false).unwrap().item_exact::<f32>();
    assert!((f64::from(mean) - 49_152f64.ln()).abs() < 1e-5, "{mean}");
}

#[test]
fn bf16_logits_lose_nothing_in_the_loss() {
    let logits = noise(4 * 1000, 9).iter().map(|x| x * 20.0).collect::<Vec<f32>>();
    let narrow = Array::from_slice(&logits, &[4, 1000])
        .as_dtype(Dtype::Bfloat16)
        .unwrap();
    let rounded = narrow.as_dtype(Dtype::Float32).unwrap();
    let targets = [5usize, 999, 0, 123];
    let loss = cross_entropy(
        &narrow,
        &Array::from_slice(&targets.map(|t| t as i32), &[4]),
        &options(0.0, 0.0),
    )
    .unwrap();
    let expected: Vec<f64> = to_f64(rounded.as_slice::<f32>())
        .chunks(1000)
        .zip(targets)
        .map(|(row, target)| token_objective(row, target, 0.0, 0.0))
        .collect();
    for (found, expected) in loss.nll.as_slice::<f32>().iter().zip(&expected) {
        assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} is not {expected}");
    }
}

#[test]
fn bf16_chunks_agree_with_bf16_full_loss() {
    let batch = Batch::new();
    let o = options(0.0, 0.0);
    let positions = batch.positions();
    let narrow = |a: Array| a.as_dtype(Dtype::Bfloat16).unwrap();
    let (hidden, head) = (narrow(batch.hidden()), narrow(batch.head()));
    let targets = Array::from_slice(&batch.targets, &[2, 4]);
    let weights = Array::from_slice(&batch.weights, &[2, 4]);
    let run = |loss: &dyn Fn(&Array) -> Array| {
        let one = Array::from_f32(1.0);
        let (v, g) = fallible_vjp(
            |a: &[Array]| Ok(vec![loss(&a[0])]),
            std::slice::from_ref(&hidden),
            &[one],
        )
        .unwrap();
        (
            v[0].item_exact::<f32>(),
            g[0].as_dtype(Dtype::Float32)
                .unwrap()
                .contiguous()
                .unwrap()
                .as_slice::<f32>()
                .to_vec(),
        )
    };
    let (full, full_gradient) = run(&|h| {
        let logits = h.matmul(head.transpose().unwrap()).unwrap();
        weighted_sum(&cross_entropy(&logits, &targets, &o).unwrap().objective, &weights).unwrap()
    });
    let (chunks, gradient) =
        run(&|h| weighted_sum(&chunked(h, &head, &positions, 2, &o).objective, &positions.weights()).unwrap());
    assert!((full - chunks).abs() < 2e-3 * full.abs(), "{full} {chunks}");
    assert_close(&gradient, &to_f64(&full_gradient), 1e-2); // both round to 8 bits, at different places
}

#[test]
fn weight_zero_hides_even_a_nan() {
    let values = Array::from_slice(&[1.0f32, f32::NAN, 3.0], &[3]);
    let weights = Array::from_slice(&[2.0f32, 0.0, 1.0], &[3]);
    assert_eq!(weighted_sum(&values, &weights).unwrap().item_exact::<f32>(), 5.0);
}

#[test]
fn err_shapes_and_empty_batches_are_named() {
    let logits = Array::zeros::<f32>(&[2, 3, 5]).unwrap();
    let targets = Array::zeros::<i32>(&[2, 4]).unwrap();
    let refused = cross_entropy(&logits, &targets, &options(0.0, 0.0)).unwrap_err();
    assert!(
        matches!(refused, Error::ShapeMismatch { what: "targets", .. }),
        "{refused}"
    );
    assert!(matches!(
        TrainedPositions::select(&[1, 2], &[0.0, 0.0]),
        Err(Error::NoTrainedTokens { .. })
    ));
    assert!(matches!(
        TrainedPositions::select(&[1, 2], &[1.0]),
        Err(Error::LengthMismatch { .. })
    ));
    let batch = Batch::new();
    let other = TrainedPositions::select(&[1, 2, 3], &[1.0; 3]).unwrap();
    let head = batch.head();
    let project = |h: &Array| Ok::<_, Error>(h.matmul(head.transpose()?)?);
    let run = |positions: &TrainedPositions, chunk| {
        projected(
            HeadKernel::Composed,
            &batch.hidden(),
            &project,
            positions,
            chunk,
            &options(0.0, 0.0),
        )
    };
    assert!(matches!(run(&other, 2), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(run(&batch.positions(), 0), Err(Error::OutOfRange { .. })));
    assert!(options(1.0, 0.0).check().is_err() && options(0.0, -1.0).check().is_err());
    assert!(options(f32::NAN, 0.0).check().is_err());
}

#[test]
fn err_in_the_head_comes_back_unchanged() {
    let batch = Batch::new();
    let calls = std::cell::Cell::new(0);
    let project = |h: &Array| {
        calls.set(calls.get() + 1);
        if calls.get() == 2 {
            return Err(Error::LengthMismatch {
                what: "made up",
                expected: 1,
                found: 2,
            });
        }
        Ok(h.matmul(batch.head().transpose()?)?)
    };
    let refused = projected(
        HeadKernel::Composed,
        &batch.hidden(),
        &project,
        &batch.positions(),
        64,
        &options(0.0, 0.0),
    );
    assert!(matches!(refused, Err(Error::LengthMismatch { what: "made up", .. })));
}

/// Runs one test of this binary in a process of its own, since memory counters belong to the whole process.
fn alone(test: &str) -> bool {
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
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains("1 passed"), "{test} was not found: {stdout}");
    #[allow(clippy::print_stderr)]
    {
        eprintln!("{stdout}");
    }
    false
}

#[test]
fn chunks_need_less_than_a_quarter_of_the_memory() {
    if !alone("losses::chunks_need_less_than_a_quarter_of_the_memory") {
        return;
    }
    peaks_of(2048, 16_384, 128);
}

/// `cargo test -p planish-loss --test it -- --ignored --nocapture` prints the figures; the full loss takes some 8 GB.
#[test]
#[ignore = "takes 8 GB"]
fn chunks_need_less_than_a_quarter_at_vocabulary_128k_and_4096_tokens() {
    // What training takes by itself: 128 MiB of logits at a time. Some ten arrays of that size exist at once, because MLX's
    // CPU stream runs that far ahead.
    peaks_of(4096, 131_072, 256);
}

#[allow(clippy::print_stdout)] // A figure of record.
fn peaks_of(tokens: i32, vocabulary: i32, chunk_tokens: usize) {
    let dims = 16;
    let hidden = Array::from_slice(&noise((tokens * dims) as usize, 3), &[1, tokens, dims]);
    let head = Array::from_slice(&noise((vocabulary * dims) as usize, 4), &[vocabulary, dims]);
    let targets: Vec<i32> = (0..tokens).map(|i| i * 7 % vocabulary).collect();
    let positions = TrainedPositions::select(&targets, &vec![1.0; tokens as usize]).unwrap();
    let target_array = Array::from_slice(&targets, &[1, tokens]);
    mlx_rs::transforms::eval([&hidden, &head]).unwrap();
    let peak = |loss: &dyn Fn(&Array) -> Array| {
        mlx_rs::memory::clear_cache().unwrap();
        mlx_rs::memory::reset_peak_memory().unwrap();
        let before = mlx_rs::memory::active_memory().unwrap();
        let (value, _) = value_and_gradients(std::slice::from_ref(&hidden), |a| loss(&a[0]));
        (value, mlx_rs::memory::peak_memory().unwrap() - before)
    };
    let o = options(0.0, 0.0);
    let (full, full_peak) = peak(&|h| {
        let logits = h.matmul(head.transpose().unwrap()).unwrap();
        cross_entropy(&logits, &target_array, &o)
            .unwrap()
            .objective
            .sum(false)
            .unwrap()
    });
    let (chunks, chunk_peak) = peak(&|h| {
        chunked(h, &head, &positions, chunk_tokens, &o)
            .objective
            .sum(false)
            .unwrap()
    });
    assert!((full / chunks - 1.0).abs() < 1e-5);
    println!("peak: {full_peak} bytes in one piece, {chunk_peak} in chunks");
    assert!(chunk_peak * 4 < full_peak, "{chunk_peak} of {full_peak}");
}
