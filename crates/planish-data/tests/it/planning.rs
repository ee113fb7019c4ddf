use std::collections::BTreeMap;

use planish_data::{Batch, BatchPlan, Cursor, DataOptions, Dataset, PlanOptions, Rungs, Window};
use serde_json::json;

use crate::support::{RowFile, chat, file, load, rows};

fn texts(lengths: impl IntoIterator<Item = usize>) -> RowFile {
    let words = ["the", "of", "her", "Emma", "was", "not", "I", "and"];
    let row = |(index, length): (usize, usize)| {
        let text: String = (0..length)
            .map(|k| format!("{} ", words[(index * 7 + k * 3) % 8]))
            .collect();
        json!({"text": format!("{index} {text}")})
    };
    rows(&lengths.into_iter().enumerate().map(row).collect::<Vec<_>>())
}

fn data(lengths: impl IntoIterator<Item = usize>, max: usize) -> (RowFile, Dataset) {
    let file = texts(lengths);
    let options = DataOptions {
        max_seq_length: max,
        ..DataOptions::default()
    };
    let data = load(&file, &options).unwrap().0;
    (file, data)
}

fn windows(plan: &BatchPlan, data: &Dataset, epoch: u64) -> Vec<Window> {
    (0..plan.windows_in_epoch(epoch).unwrap())
        .map(|index| plan.window(data, epoch, index).unwrap())
        .collect()
}

fn mixed_lengths() -> impl Iterator<Item = usize> + Clone {
    (0..90usize).map(|index| 1 + (index * index * 37) % 170)
}

#[test]
fn a_batch_is_shifted_padded_and_weighted() {
    let file = rows(&[
        chat(&[("user", "Hi"), ("assistant", "Yes.")]),
        json!(chat(&[("user", "a b c d e f"), ("assistant", "No.")])),
    ]);
    let (data, _) = load(&file, &DataOptions::default()).unwrap();
    let plan = BatchPlan::new(&data, &PlanOptions::default()).unwrap();
    let window = plan.window(&data, 0, 0).unwrap();
    let [batch] = &window.micro_batches[..] else {
        panic!("one batch")
    };
    assert_eq!((batch.rows, batch.length), (2, 32), "a set of two rows needs no third");
    for segment in &batch.segments {
        let tokens = data.tokens(segment.example).unwrap();
        let row = segment.row * batch.length;
        for step in 0..batch.length {
            let (input, target, weight) = match (tokens.ids.get(step), tokens.ids.get(step + 1)) {
                (Some(input), Some(target)) => (*input, *target, f32::from(u8::from(tokens.trained[step + 1]))),
                _ => (0, 0, 0.0),
            };
            assert_eq!(batch.inputs[row + step], input as i32);
            assert_eq!(batch.targets[row + step], target as i32);
            assert_eq!(batch.target_weights[row + step], weight);
        }
    }
    assert_eq!(
        window.target_tokens,
        data.examples().iter().map(|example| example.n_targets).sum::<usize>()
    );
    assert!(batch.segment_ids.is_none());
}

/// Everything that a window trains, without the way it is cut: what each target is, after which inputs.
fn content(window: &Window) -> BTreeMap<usize, Vec<(i32, i32, u32)>> {
    let mut all = BTreeMap::new();
    for batch in &window.micro_batches {
        for segment in &batch.segments {
            let at = segment.row * batch.length + segment.start;
            let steps = at..at + segment.len;
            let row = steps
                .map(|i| (batch.inputs[i], batch.targets[i], batch.target_weights[i].to_bits()))
                .collect();
            assert!(
                all.insert(segment.example, row).is_none(),
                "an example comes once a window"
            );
        }
    }
    all
}

#[test]
fn the_same_windows_however_they_are_cut() {
    // More rows than one stretch of sorting holds.
    let (_file, data) = data(mixed_lengths().cycle().take(700), 256);
    let plan = |batch_size, accumulation| {
        let options = PlanOptions {
            batch_size,
            accumulation,
            max_seq_length: 256,
            seed: 5,
            ..PlanOptions::default()
        };
        BatchPlan::new(&data, &options).unwrap()
    };
    let (whole, halves, quarters) = (plan(8, 1), plan(4, 2), plan(2, 4));
    for epoch in 0..2 {
        let cut = |plan: &BatchPlan| windows(plan, &data, epoch).iter().map(content).collect::<Vec<_>>();
        let expect = cut(&whole);
        assert_eq!(expect, cut(&halves));
        assert_eq!(expect, cut(&quarters));
    }
}

#[test]
fn every_example_once_an_epoch_and_remainders_are_kept() {
    for packing in [false, true] {
        let (_file, data) = data(mixed_lengths(), 200);
        let options = PlanOptions {
            batch_size: 4,
            accumulation: 2,
            max_seq_length: 200,
            packing,
            ..PlanOptions::default()
        };
        let plan = BatchPlan::new(&data, &options).unwrap();
        let mut orders = Vec::new();
        for epoch in 0..2 {
            let windows = windows(&plan, &data, epoch);
            let order: Vec<usize> = windows
                .iter()
                .flat_map(|window| &window.micro_batches)
                .flat_map(|batch| batch.row_ids.clone())
                .collect();
            let mut seen = order.clone();
            seen.sort_unstable();
            assert_eq!(seen, (0..data.len()).collect::<Vec<_>>());
            let targets: usize = windows.iter().map(|window| window.target_tokens).sum();
            assert_eq!(targets, plan.summary().target_tokens);
            for (index, window) in windows.iter().enumerate() {
                assert_eq!(plan.target_tokens(epoch, index).unwrap(), window.target_tokens);
                let weights: f32 = window
                    .micro_batches
                    .iter()
                    .flat_map(|batch| &batch.target_weights)
                    .sum();
                assert_eq!(weights as usize, window.target_tokens);
                assert!(window.micro_batches.iter().all(|batch| batch.rows == 4));
            }
            orders.push(order);
        }
        assert_ne!(orders[0], orders[1], "epochs differ");
    }
}

#[test]
fn without_shuffling_every_epoch_is_the_first_and_begins_with_a_fair_sample() {
    let (_file, data) = data(mixed_lengths(), 256);
    let with = |shuffle| {
        let options = PlanOptions {
            max_seq_length: 256,
            shuffle,
            ..PlanOptions::default()
        };
        BatchPlan::new(&data, &options).unwrap()
    };
    let (fixed, shuffled) = (with(false), with(true));
    assert_eq!(windows(&fixed, &data, 0), windows(&fixed, &data, 7));
    assert_eq!(windows(&fixed, &data, 0), windows(&shuffled, &data, 0));
    assert_ne!(windows(&shuffled, &data, 0), windows(&shuffled, &data, 7));
    let lengths: Vec<usize> = windows(&fixed, &data, 0)
        .iter()
        .map(|window| window.micro_batches[0].length)
        .collect();
    assert!(!lengths.is_sorted(), "{lengths:?}");
}

#[test]
fn rows_of_like_length_meet() {
    let (_file, data) = data(mixed_lengths().cycle().take(600), 256);
    let options = PlanOptions {
        max_seq_length: 256,
        ..PlanOptions::default()
    };
    let plan = BatchPlan::new(&data, &options).unwrap();
    let steps: Vec<usize> = data.examples().iter().map(|example| example.n_tokens - 1).collect();
    let used: usize = steps.iter().sum();
    let in_file_order: usize = steps
        .chunks(4)
        .map(|rows| {
            4 * plan
                .ladder()
                .rungs()
                .iter()
                .find(|rung| **rung >= *rows.iter().max().unwrap())
                .unwrap()
        })
        .sum();
    let unsorted = 1.0 - used as f64 / in_file_order as f64;
    let sorted = plan.summary().padding_fraction;
    // What is left is the distance to the next rung.
    assert!(sorted < 0.6 * unsorted, "{sorted} sorted, {unsorted} not");
    let batches = windows(&plan, &data, 0);
    let padding: f64 = batches
        .iter()
        .flat_map(|window| &window.micro_batches)
        .map(Batch::padding_fraction)
        .sum();
    assert!((padding / batches.len() as f64 - sorted).abs() < 0.1);
}

#[test]
fn a_set_of_one_row_trains() {
    let (_file, data) = data([3], 64);
    let plan = BatchPlan::new(&data, &PlanOptions::default()).unwrap();
    let window = plan.window(&data, 0, 0).unwrap();
    assert_eq!((window.micro_batches.len(), window.micro_batches[0].rows), (1, 1));
    assert!(window.target_tokens > 0);
}

#[test]
fn shapes_are_on_the_ladder_and_few_over_epochs() {
    let (_file, data) = data(mixed_lengths(), 512);
    for (rungs, max_shapes) in [(Rungs::Fine, 12), (Rungs::Cuda, 12), (Rungs::Fine, 2)] {
        let options = PlanOptions {
            max_seq_length: 512,
            rungs,
            max_shapes,
            ..PlanOptions::default()
        };
        let plan = BatchPlan::new(&data, &options).unwrap();
        let mut shapes = std::collections::BTreeSet::new();
        for epoch in 0..2 {
            for batch in windows(&plan, &data, epoch)
                .iter()
                .flat_map(|window| &window.micro_batches)
            {
                assert!(rungs == Rungs::Fine || batch.length % 128 == 0);
                assert!(plan.ladder().rungs().contains(&batch.length));
                shapes.insert((batch.rows, batch.length));
            }
        }
        assert!(
            shapes.len() <= plan.ladder().rungs().len() && shapes.len() <= max_shapes,
            "{shapes:?}"
        );
    }
}

#[test]
fn packed_segments_are_whole_apart_and_in_place() {
    let (_file, data) = data(mixed_lengths(), 300);
    let options = PlanOptions {
        max_seq_length: 300,
        packing: true,
        ..PlanOptions::default()
    };
    let plan = BatchPlan::new(&data, &options).unwrap();
    for batch in windows(&plan, &data, 0).iter().flat_map(|window| &window.micro_batches) {
        check_segments(batch, &data);
    }
    let shapes = &plan.summary().shapes;
    assert_eq!(shapes.len(), 1, "packing has one shape");
    let padded = BatchPlan::new(
        &data,
        &PlanOptions {
            packing: false,
            ..options
        },
    )
    .unwrap();
    assert!(plan.summary().micro_batches < padded.summary().micro_batches / 2);
}

fn check_segments(batch: &Batch, data: &Dataset) {
    let ids = batch.segment_ids.as_ref().unwrap();
    let mut expect = vec![-1; ids.len()];
    let mut next = vec![0; batch.rows];
    for segment in &batch.segments {
        let tokens = data.tokens(segment.example).unwrap();
        assert_eq!(segment.len, tokens.ids.len() - 1, "segments are never cut");
        let at = segment.row * batch.length + segment.start;
        assert!(segment.start + segment.len <= batch.length);
        expect[at..at + segment.len].iter_mut().for_each(|id| {
            assert_eq!(*id, -1, "segments do not overlap");
            *id = next[segment.row];
        });
        next[segment.row] += 1;
        let inputs: Vec<u32> = batch.inputs[at..at + segment.len].iter().map(|id| *id as u32).collect();
        assert_eq!(inputs, tokens.ids[..segment.len]);
        assert_eq!(
            batch.targets[at + segment.len - 1] as u32,
            tokens.ids[segment.len],
            "the next segment is no target"
        );
    }
    assert_eq!(*ids, expect);
}

#[test]
fn a_cursor_resumes_where_it_was() {
    let (_file, data) = data(mixed_lengths(), 256);
    let options = PlanOptions {
        batch_size: 8,
        max_seq_length: 256,
        seed: 9,
        ..PlanOptions::default()
    };
    let plan = BatchPlan::new(&data, &options).unwrap();
    let mut cursor = Cursor::default();
    let mut straight = Vec::new();
    for _ in 0..30 {
        straight.push((cursor, plan.window(&data, cursor.epoch, cursor.window_index).unwrap()));
        cursor = plan.advance(cursor).unwrap();
    }
    assert_eq!(cursor.epoch, 2, "90 rows are 12 windows of 8");
    let again = BatchPlan::new(&data, &options).unwrap();
    assert_eq!(again.plan_hash(), plan.plan_hash());
    for (cursor, window) in straight.iter().rev() {
        assert_eq!(&again.window(&data, cursor.epoch, cursor.window_index).unwrap(), window);
    }
}

#[test]
fn the_plan_hash_follows_every_setting_and_the_data() {
    let (_file, first) = data([3, 5, 9], 64);
    let (_other_file, second) = data([3, 5, 8], 64);
    let base = PlanOptions::default();
    let hash = |data: &Dataset, options: &PlanOptions| BatchPlan::new(data, options).unwrap().plan_hash().to_string();
    let mut hashes = vec![hash(&first, &base), hash(&second, &base)];
    for change in [
        |o: &mut PlanOptions| o.batch_size = 2,
        |o: &mut PlanOptions| o.accumulation = 2,
        |o: &mut PlanOptions| o.max_seq_length = 64,
        |o: &mut PlanOptions| o.seed = 1,
        |o: &mut PlanOptions| o.shuffle = false,
        |o: &mut PlanOptions| o.packing = true,
        |o: &mut PlanOptions| o.rungs = Rungs::Cuda,
        |o: &mut PlanOptions| o.max_shapes = 3,
        |o: &mut PlanOptions| o.sampler_weights = Some(vec![1.0, 2.0, 1.0]),
    ] {
        let mut options = base.clone();
        change(&mut options);
        hashes.push(hash(&first, &options));
    }
    let count = hashes.len();
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), count);
}

#[test]
fn a_sampler_draws_in_proportion_and_the_same_again() {
    let (_file, data) = data((0..20).map(|index| 5 + index), 64);
    let weights: Vec<f64> = (0..20).map(|index| if index < 10 { 0.25 } else { 1.75 }).collect();
    for packing in [false, true] {
        let options = PlanOptions {
            max_seq_length: 64,
            packing,
            sampler_weights: Some(weights.clone()),
            ..PlanOptions::default()
        };
        let plan = BatchPlan::new(&data, &options).unwrap();
        let mut counts = [0usize; 20];
        for epoch in 0..400 {
            for batch in windows(&plan, &data, epoch)
                .iter()
                .flat_map(|window| &window.micro_batches)
            {
                batch.row_ids.iter().for_each(|example| counts[*example] += 1);
            }
        }
        assert_eq!(counts.iter().sum::<usize>(), 400 * 20);
        for (count, weight) in counts.iter().zip(&weights) {
            assert!(
                (*count as f64 / 400.0 - weight).abs() < 0.1,
                "{count} of 400 for {weight}"
            );
        }
    }
}

#[test]
fn err_settings_that_cannot_be() {
    let (_file, data) = data([3, 5], 64);
    for change in [
        |o: &mut PlanOptions| o.batch_size = 0,
        |o: &mut PlanOptions| o.accumulation = 0,
        |o: &mut PlanOptions| o.max_shapes = 0,
        |o: &mut PlanOptions| o.max_seq_length = 2,
        |o: &mut PlanOptions| o.sampler_weights = Some(vec![1.0]),
        |o: &mut PlanOptions| o.sampler_weights = Some(vec![1.0, f64::NAN]),
        |o: &mut PlanOptions| o.sampler_weights = Some(vec![0.0, 0.0]),
    ] {
        let mut options = PlanOptions::default();
        change(&mut options);
        let result = BatchPlan::new(&data, &options);
        assert!(matches!(result, Err(planish_data::Error::Plan { .. })), "{options:?}");
    }
    let plan = BatchPlan::new(&data, &PlanOptions::default()).unwrap();
    assert!(matches!(
        plan.window(&data, 0, 1),
        Err(planish_data::Error::NoSuchWindow { .. })
    ));
    let other = load(&file("{\"text\": \"else\"}"), &DataOptions::default()).unwrap().0;
    assert!(plan.window(&other, 0, 0).is_err(), "another data set");
}
