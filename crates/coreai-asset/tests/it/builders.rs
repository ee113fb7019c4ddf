//! Type inference, refusals, and that every decomposition computes what its operation does.

use std::collections::BTreeMap;

use coreai_asset::{
    AssetWriter, Element, Error, TensorType, Type,
    builder::{BlockBuilder, GraphBuilder, ProgramBuilder, Tensor},
    interpreter::{Arithmetic, Machine, States, Understanding, Value},
};

use crate::support::{tensor, write_small};

/// Runs `body` over inputs of f32 `[2, 3]` and `[3]`, by kernels and by bodies.
fn both_ways(body: impl FnOnce(&mut BlockBuilder, &Tensor, &Tensor) -> Tensor) -> [Vec<f32>; 2] {
    let inputs = [
        ("a", tensor(Element::F32, &[1, 2, 3])),
        ("b", Type::Tensor(TensorType::new(Element::F32, &[None]))),
    ];
    let mut graph = GraphBuilder::new("main", &inputs);
    let (a, b) = (graph.input("a").unwrap(), graph.input("b").unwrap());
    let y = body(&mut graph, &a, &b);
    let mut program = ProgramBuilder::new();
    program.add(graph.finish(&[], &[("y", &y)])).unwrap();
    let folder = tempfile::tempdir().unwrap();
    AssetWriter::create(folder.path(), &program.finish())
        .unwrap()
        .finish()
        .unwrap();
    let machine = Machine::open(folder.path()).unwrap();
    let values = [
        (
            "a",
            Value::floats(&[1, 2, 3], vec![0.5, -1.0, 2.0, 30.0, -4.0, 0.25]).unwrap(),
        ),
        ("b", Value::floats(&[3], vec![2.0, 0.5, -1.5]).unwrap()),
    ];
    let values: BTreeMap<String, Value> = values.map(|(name, value)| (name.to_owned(), value)).into();
    [Understanding::Kernels, Understanding::Bodies].map(|understanding| {
        let machine = machine.with(Arithmetic::F32, understanding);
        match machine.run("main", &values, &mut States::new()).unwrap().remove("y") {
            Some(Value::Float(y)) => y.iter().copied().collect(),
            other => panic!("{other:?}"),
        }
    })
}

fn check(expected: &[f32], body: impl FnOnce(&mut BlockBuilder, &Tensor, &Tensor) -> Tensor) {
    for found in both_ways(body) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() <= 1e-6 * expected.abs().max(1.0),
                "{found} {expected}"
            );
        }
    }
}

#[test]
fn elementwise_operations_equal_their_decompositions() {
    check(&[2.5, -0.5, 0.5, 32.0, -3.5, -1.25], |g, a, b| g.add(a, b).unwrap());
    check(&[-1.5, -1.5, 3.5, 28.0, -4.5, 1.75], |g, a, b| g.sub(a, b).unwrap());
    check(&[1.0, -0.5, -3.0, 60.0, -2.0, -0.375], |g, a, b| g.mul(a, b).unwrap());
    check(&[0.25, -2.0, -2.0 / 1.5, 15.0, -8.0, -0.25 / 1.5], |g, a, b| {
        g.divide(a, b).unwrap()
    });
    check(&[0.0, 0.0, 1.0, 1.0, 0.0, 1.0], |g, a, b| {
        let greater = g.greater(a, b).unwrap();
        g.cast(&greater, Element::F32)
    });
}

#[test]
fn means_softmax_and_silu_equal_their_decompositions() {
    check(&[0.5, 26.25 / 3.0], |g, a, _| g.mean(a).unwrap());
    let silu = |v: f32| v / (1.0 + (-v).exp());
    check(&[0.5, -1.0, 2.0, 30.0, -4.0, 0.25].map(silu), |g, a, _| {
        g.silu(a).unwrap()
    });
    let rows = [[0.5f32, -1.0, 2.0], [30.0, -4.0, 0.25]].map(|row| {
        let sum: f32 = row.iter().map(|v| v.exp()).sum();
        row.map(|v| v.exp() / sum)
    });
    check(&rows.concat(), |g, a, _| g.softmax(a).unwrap());
}

#[test]
fn products_of_matrices_equal_their_decompositions() {
    // a [1, 2, 3] times aᵀ [3, 2].
    let expected = [
        0.25 + 1.0 + 4.0,
        15.0 + 4.0 + 0.5,
        15.0 + 4.0 + 0.5,
        900.0 + 16.0 + 0.0625,
    ];
    check(&expected, |g, a, _| {
        let turned = g.transpose(a, &[0, 2, 1]).unwrap();
        let turned = g.shrink(&turned, 0).unwrap();
        g.matmul(a, &turned).unwrap()
    });
}

#[test]
fn a_composite_equals_its_kernel_and_a_state_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    write_small(folder.path());
    let machine = Machine::open(folder.path()).unwrap();
    let x = Value::floats(&[2, 4], (0..8).map(|i| i as f32 * 0.5 - 1.0).collect()).unwrap();
    let inputs: BTreeMap<String, Value> = [("x".to_owned(), x)].into();
    let mut results = Vec::new();
    for understanding in [Understanding::Kernels, Understanding::Bodies] {
        let machine = machine.with(Arithmetic::F32, understanding);
        let mut states = machine.new_states("main", 3).unwrap();
        let outputs = machine.run("main", &inputs, &mut states).unwrap();
        let held: Vec<f32> = states["held"].iter().copied().collect();
        assert_eq!(held, [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 0.0, 0.0, 0.0, 0.0]);
        match &outputs["y"] {
            Value::Float(y) => results.push(y.iter().copied().collect::<Vec<f32>>()),
            other => panic!("{other:?}"),
        }
    }
    // What coreai-core 1.0.0b3 computes from the same file in half floats.
    let apple = [6.119e-3, 6.374e-3, 1.063e-2, 2.835e-2, 0.1211, 0.8276];
    let near = |(ours, apples): (&f32, &f32)| (ours - apples).abs() < 2e-3;
    assert!(results[0].iter().zip(&apple).all(near), "{:?}", results[0]);
    let worst = results[0]
        .iter()
        .zip(&results[1])
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst < 1e-6, "{worst}");
    assert!((results[0][..6].iter().sum::<f32>() - 1.0).abs() < 1e-5);
}

#[test]
fn err_operands_that_do_not_fit_are_named() {
    let mut graph = GraphBuilder::new(
        "main",
        &[
            ("a", tensor(Element::F16, &[2, 3])),
            ("b", tensor(Element::F16, &[2, 4])),
        ],
    );
    let (a, b) = (graph.input("a").unwrap(), graph.input("b").unwrap());
    let problem = |result: Result<Tensor, Error>| result.unwrap_err().to_string();
    assert_eq!(
        problem(graph.matmul(&a, &b)),
        "broadcasting_batch_matmul_v1: 2x3xf16 times 2x4xf16"
    );
    assert!(problem(graph.add(&a, &b)).contains("do not broadcast"));
    assert_eq!(
        problem(graph.reshape(&a, &[7.into()])),
        "primitive.reshape_v2: 2x3xf16 as 7xf16"
    );
    assert_eq!(
        problem(graph.transpose(&a, &[0, 0])),
        "primitive.transpose_v1: order [0, 0] of 2x3xf16"
    );
    assert!(problem(graph.slice(&a, &[0.into(), 2.into()], &[2.into(), 5.into()])).contains("2 to 5 of 3"));
    assert!(problem(graph.concat(0, &[&a, &b])).contains("2x3xf16, 2x4xf16"));
    assert!(problem(graph.shrink(&a, 0)).contains("is not 1"));
}

#[test]
fn err_inputs_of_another_shape_are_named() {
    let folder = tempfile::tempdir().unwrap();
    write_small(folder.path());
    let machine = Machine::open(folder.path()).unwrap();
    let mut states = machine.new_states("main", 3).unwrap();
    let inputs: BTreeMap<String, Value> = [("x".to_owned(), Value::floats(&[8], vec![0.0; 8]).unwrap())].into();
    let problem = machine.run("main", &inputs, &mut states).unwrap_err().to_string();
    assert_eq!(problem, "x: expected ?x4xf16, found shape Some([8])");
    assert!(
        machine.run("norm", &inputs, &mut states).is_err(),
        "a private graph is not a function"
    );
}
