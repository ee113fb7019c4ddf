//! A small program with most operations, and the assets that lie beside the checkout.

use std::path::{Path, PathBuf};

use coreai_asset::{
    AssetWriter, Element, FileReport, TensorType, Type,
    builder::{Extent, GraphBuilder, ProgramBuilder, Tensor},
    program::{Parameter, Program},
};

/// `shared/` beside an ancestor of this crate; `None` where the checkout is alone.
pub(crate) fn shared() -> Option<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors()
        .map(|a| a.join("shared"))
        .find(|s| s.join("cases").is_dir())
}

pub(crate) fn tensor(element: Element, dims: &[usize]) -> Type {
    Type::Tensor(TensorType::fixed(element, dims))
}

/// `y = softmax(silu(x) W)`, a state of the last `x`, a composite and a scaled weight: `x [t, 4]` in f16.
pub(crate) fn small_program() -> Program {
    let mut program = ProgramBuilder::new();
    let weight = program.weight("w", 4 * 6).unwrap();
    let scale = program.weight("s", 6 * 2 * 2).unwrap();
    let x_type = TensorType::new(Element::F16, &[None, Some(4)]);
    let inputs = [
        ("input", Type::Tensor(x_type.clone())),
        ("scale", tensor(Element::F16, &[4])),
    ];
    let mut norm = GraphBuilder::new("norm", &inputs);
    let result = normed(&mut norm, 1e-5);
    let attributes = [
        ("axes", Parameter::Int(-1)),
        ("eps", Parameter::Float(1e-5)),
        ("version", Parameter::Int(1)),
    ];
    program
        .add(norm.finish_composite("rms_norm", &attributes, &result))
        .unwrap();

    let held = TensorType::new(Element::F16, &[None, Some(4)]);
    let mut main = GraphBuilder::new("main", &[("x", Type::Tensor(x_type)), ("held", Type::Handle(held))]);
    let mut state = main.state("held").unwrap();
    let x = main.input("x").unwrap();
    let before = main.read(&mut state);
    let length = main.length(&x, 0).unwrap();
    let places = ([0.into(), 0.into()], [Extent::from(&length), 4.into()]);
    let updated = main.slice_update(&before, &x, &places.0, &places.1).unwrap();
    main.write(&mut state, &updated).unwrap();
    let gain = main.filled(Element::F16, &[4], 2.0).unwrap();
    let normed = main.invoke(program.graph("norm").unwrap(), &[&x, &gain]).unwrap();
    let active = main.silu(&normed).unwrap();
    let data = main.weight(weight, TensorType::fixed(Element::I8, &[6, 4]));
    let scale = main.weight(scale, TensorType::fixed(Element::F16, &[6, 2]));
    let matrix = main.scaled(&data, &scale).unwrap();
    let matrix = main.transpose(&matrix, &[1, 0]).unwrap();
    let product = main.matmul(&active, &matrix).unwrap();
    let y = main.softmax(&product).unwrap();
    program.add(main.finish(&[state], &[("y", &y)])).unwrap();
    program.finish()
}

fn normed(g: &mut GraphBuilder, eps: f32) -> Tensor {
    let (x, scale) = (g.input("input").unwrap(), g.input("scale").unwrap());
    let wide = g.cast(&x, Element::F32);
    let square = g.mul(&wide, &wide).unwrap();
    let mean = g.mean(&square).unwrap();
    let eps = g.filled(Element::F32, &[], eps).unwrap();
    let mean = g.add(&mean, &eps).unwrap();
    let inverse = g.rsqrt(&mean);
    let normed = g.mul(&wide, &inverse).unwrap();
    let normed = g.cast(&normed, Element::F16);
    g.mul(&normed, &scale).unwrap()
}

/// Writes the small program with its weights.
pub(crate) fn write_small(folder: &Path) -> FileReport {
    std::fs::create_dir_all(folder).unwrap();
    let mut writer = AssetWriter::create(folder, &small_program()).unwrap();
    writer.next_weight().unwrap();
    writer
        .write(&(0..24u8).map(|i| i.wrapping_sub(12)).collect::<Vec<_>>())
        .unwrap();
    writer.next_weight().unwrap();
    let halves: Vec<u8> = (1..=12)
        .flat_map(|i| half::f16::from_f32(0.03 * i as f32).to_le_bytes())
        .collect();
    writer.write(&halves).unwrap();
    writer.finish().unwrap()
}
