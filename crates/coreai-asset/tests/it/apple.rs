//! A file that Apple's converter wrote, read and run here.

use std::{collections::BTreeMap, fs};

use coreai_asset::{
    interpreter::{Arithmetic, Machine, States, Understanding, Value},
    program::OpCode,
};

use crate::support::shared;

/// Greedy continuation of `prompt` by `tokens` tokens.
fn greedy(machine: &Machine, prompt: &[i64], tokens: usize) -> Vec<i64> {
    let mut states = machine.new_states("main", prompt.len() + tokens).unwrap();
    let mut all = prompt.to_vec();
    let mut new = prompt.to_vec();
    for _ in 0..tokens {
        let next = step(machine, &mut states, &new, all.len());
        all.push(next);
        new = vec![next];
    }
    all.split_off(prompt.len())
}

fn step(machine: &Machine, states: &mut States, ids: &[i64], total: usize) -> i64 {
    let row = |values: Vec<i64>| Value::ints(&[1, values.len()], values).unwrap();
    let inputs: BTreeMap<String, Value> = [
        ("input_ids".to_owned(), row(ids.to_vec())),
        ("position_ids".to_owned(), row((0..total as i64).collect())),
    ]
    .into();
    let outputs = machine.run("main", &inputs, states).unwrap();
    let Some(Value::Float(logits)) = outputs.get("logits") else {
        panic!("no logits");
    };
    let last = logits.index_axis(ndarray::Axis(1), ids.len() - 1);
    let best = last.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as i64
}

#[test]
fn golden_of_apples_converter_decodes_as_torch_does() {
    let Some(golden) = shared().map(|s| s.join("tools/coreai/golden")) else {
        println!("skipped: no shared/ beside the checkout");
        return;
    };
    let text = fs::read_to_string(golden.join("tiny-llama.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |key: &str| {
        json[key]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_i64().unwrap())
            .collect::<Vec<_>>()
    };
    let machine = Machine::open(&golden.join("tiny-llama.aimodel")).unwrap();
    // By kernels only: the decomposition of softmax that the converter writes does not subtract the largest score, and
    // scores of this model overflow in it.
    let found = greedy(
        &machine.with(Arithmetic::F32, Understanding::Kernels),
        &ids("prompt"),
        24,
    );
    assert_eq!(found, ids("greedy")[..24]);
    let program = machine.asset().program();
    let composites: Vec<&str> = program
        .graphs
        .iter()
        .filter_map(|g| Some(g.composite.as_ref()?.name.as_str()))
        .collect();
    assert!(composites.contains(&"rope") && composites.contains(&"scaled_dot_product_attention"));
    assert!(
        program
            .graphs
            .iter()
            .any(|g| g.block.operations.iter().any(|o| o.code == OpCode::BroadcastingWhere))
    );
}
