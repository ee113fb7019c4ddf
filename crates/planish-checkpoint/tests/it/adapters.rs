use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use planish_checkpoint::Error;
use planish_checkpoint::adapter::{
    Adapter, AdapterReport, BaseModel, BaseModule, Format, Method, ReadOptions, Refusal, SidecarBase, convert,
};
use planish_tensors::{self as tensors, Dtype, HostTensor, TensorStore};
use proptest::prelude::*;
use serde_json::{Value, json};

const PLAIN: ReadOptions<'static> = ReadOptions {
    base: None,
    trust_shapes: false,
    force: false,
    note_another_base: false,
};

/// Values that differ from each other and are exact in every element type.
fn tensor(dtype: Dtype, shape: &[usize], seed: u64) -> HostTensor {
    let count = shape.iter().product::<usize>() as u64;
    let value = |i: u64| ((seed.wrapping_mul(31).wrapping_add(i * 7)) % 255) as f32 / 64.0 + 1.0 / 64.0;
    HostTensor::from_f32_as(dtype, shape, &(0..count).map(value).collect::<Vec<_>>()).unwrap()
}

fn module(layer: usize, suffix: &str) -> String {
    format!("model.layers.{layer}.{suffix}")
}

const WIDTHS: [(&str, usize, usize); 3] = [
    ("self_attn.q_proj", 6, 4),
    ("self_attn.v_proj", 6, 2),
    ("mlp.down_proj", 8, 6),
];

/// An untied base of four layers with the modules of `WIDTHS`.
fn base() -> BaseModel {
    let mut modules = BTreeMap::new();
    let linear = |input_dims, output_dims| BaseModule {
        input_dims,
        output_dims,
        is_embedding: false,
        bits: None,
    };
    for layer in 0..4 {
        for (suffix, input, output) in WIDTHS {
            modules.insert(module(layer, suffix), linear(input, output));
        }
    }
    modules.insert("lm_head".to_string(), linear(6, 10));
    let embedding = BaseModule {
        is_embedding: true,
        ..linear(10, 6)
    };
    modules.insert("model.embed_tokens".to_string(), embedding);
    BaseModel {
        n_layers: 4,
        tied_head: false,
        modules,
        identity: SidecarBase::default(),
        folder: None,
    }
}

/// An mlx-lm adapter on those modules of `base()` that `keep` chooses.
fn mlx_adapter(method: Method, rank: usize, scale: f64, dtype: Dtype, keep: impl Fn(&str) -> bool) -> Adapter {
    let mut adapter = Adapter::new(method, rank, scale, 0.05);
    for (i, (name, at)) in base().modules.iter().filter(|(name, _)| keep(name)).enumerate() {
        let i = i as u64;
        adapter
            .tensors
            .insert(format!("{name}.lora_a"), tensor(dtype, &[at.input_dims, rank], i));
        adapter.tensors.insert(
            format!("{name}.lora_b"),
            tensor(dtype, &[rank, at.output_dims], i + 100),
        );
        if method == Method::Dora {
            adapter
                .tensors
                .insert(format!("{name}.m"), tensor(dtype, &[at.output_dims], i + 200));
        }
    }
    adapter.fill_keys();
    adapter
}

fn peft_config(extra: Value) -> Value {
    let mut config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "some/base", "init_lora_weights": true,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": null, "use_dora": false, "use_rslora": false,
    });
    config
        .as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    config
}

fn write_peft(dir: &Path, config: &Value, tensors: &[(&str, HostTensor)]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let tensors = tensors
        .iter()
        .map(|(name, t)| (format!("base_model.model.{name}"), t.clone()))
        .collect();
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    tensors::write(&dir.join("adapter_model.safetensors"), &tensors, &metadata).unwrap();
}

/// A PEFT pair for `q_proj` or `v_proj` of one layer.
fn pair(layer: usize, suffix: &str, rank: usize) -> Vec<(String, HostTensor)> {
    let (_, input, output) = WIDTHS.iter().find(|(name, ..)| *name == suffix).unwrap();
    let (name, seed) = (module(layer, suffix), (layer * 10 + rank) as u64);
    vec![
        (
            format!("{name}.lora_A.weight"),
            tensor(Dtype::F32, &[rank, *input], seed),
        ),
        (
            format!("{name}.lora_B.weight"),
            tensor(Dtype::F32, &[*output, rank], seed + 1),
        ),
    ]
}

fn write_pairs(dir: &Path, config: &Value, pairs: Vec<Vec<(String, HostTensor)>>) {
    let pairs: Vec<_> = pairs.into_iter().flatten().collect();
    write_peft(
        dir,
        config,
        &pairs
            .iter()
            .map(|(name, t)| (name.as_str(), t.clone()))
            .collect::<Vec<_>>(),
    );
}

fn refusal(result: Result<AdapterReport, Error>) -> Refusal {
    match result {
        Err(Error::AdapterRefused { refusal, .. }) => *refusal,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

fn bytes(dir: &Path, file: &str) -> Vec<u8> {
    fs::read(dir.join(file)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn prop_mlx_to_peft_to_mlx_is_byte_equal(
        rank in 1usize..7, scale in 1e-3f64..1e3, dora in any::<bool>(), with_base in any::<bool>(),
        dtype in prop::sample::select(vec![Dtype::F32, Dtype::F16, Dtype::BF16]),
        first_layer in 0usize..4, suffixes in 1usize..4, outside in 0usize..3,
    ) {
        let method = if dora { Method::Dora } else { Method::Lora };
        let keep = |name: &str| match WIDTHS.iter().position(|(suffix, ..)| name.ends_with(suffix)) {
            Some(i) => i < suffixes && (first_layer..4).any(|layer| name.contains(&format!(".{layer}."))),
            None if name == "lm_head" => outside > 0,
            None => outside > 1 && with_base && !dora,
        };
        let mut adapter = mlx_adapter(method, rank, scale, dtype, keep);
        adapter.n_adapted_layers = 4 - first_layer as i64;
        let (dir, base) = (tempfile::tempdir().unwrap(), base());
        let (mlx, peft, back) = (dir.path().join("mlx"), dir.path().join("peft"), dir.path().join("back"));
        adapter.write_mlx_lm(&mlx).unwrap();
        let options = ReadOptions { base: with_base.then_some(&base), ..PLAIN };
        prop_assert!(convert(&mlx, &peft, Format::Peft, &options).unwrap().is_plain());
        prop_assert!(convert(&peft, &back, Format::MlxLm, &options).unwrap().is_plain());
        for file in ["adapters.safetensors", "adapter_config.json"] {
            prop_assert_eq!(bytes(&mlx, file), bytes(&back, file), "{}", file);
        }

        // Without the sidecar, the tensors are still the same and the scale differs by at most one ulp.
        fs::remove_file(peft.join("planish.json")).unwrap();
        let (bare, _) = Adapter::read(&peft, &options).unwrap();
        let holes = &bare.sidecar.holes;
        let real = bare.tensors.iter().filter(|(name, _)| !holes.iter().any(|hole| name.starts_with(&format!("{hole}."))));
        prop_assert_eq!(real.map(|(n, t)| (n.clone(), t.clone())).collect::<BTreeMap<_, _>>(), adapter.tensors);
        prop_assert!((bare.scale - scale).abs() <= f64::EPSILON * scale);
    }

    #[test]
    fn prop_peft_to_mlx_to_peft_is_byte_equal(
        ranks in prop::collection::vec(prop::option::of(1usize..5), 8), alpha_power in 0i32..4, rslora in any::<bool>(),
        with_base in any::<bool>(),
    ) {
        let present: Vec<(usize, &str, usize)> = ranks.iter().enumerate()
            .filter_map(|(i, rank)| Some((i / 2, WIDTHS[i % 2].0, (*rank)?))).collect();
        prop_assume!(!present.is_empty());
        // Scales that differ by powers of two only, so that every fold is exact.
        let divisor = |rank: usize| if rslora { (rank as f64).sqrt() } else { rank as f64 };
        let pattern = |value: &dyn Fn(usize, usize) -> Value| present.iter().map(|(layer, suffix, rank)|
            (module(*layer, suffix), value(*layer, *rank))).collect::<serde_json::Map<_, _>>();
        let config = peft_config(json!({
            "use_rslora": rslora,
            "rank_pattern": pattern(&|_, rank| rank.into()),
            "alpha_pattern": pattern(&|layer, rank| json!(divisor(rank) * 2f64.powi(alpha_power * (layer as i32 % 2)))),
        }));
        let dir = tempfile::tempdir().unwrap();
        let (peft, mlx, back) = (dir.path().join("peft"), dir.path().join("mlx"), dir.path().join("back"));
        write_pairs(&peft, &config, present.iter().map(|(layer, suffix, rank)| pair(*layer, suffix, *rank)).collect());
        let base = base();
        let options = ReadOptions { base: with_base.then_some(&base), ..PLAIN };
        let report = convert(&peft, &mlx, Format::MlxLm, &options).unwrap();
        prop_assert!(report.folded.iter().all(|fold| fold.exact));
        check_updates(&peft, &config, &mlx);
        convert(&mlx, &back, Format::Peft, &options).unwrap();
        prop_assert_eq!(bytes(&peft, "adapter_model.safetensors"), bytes(&back, "adapter_model.safetensors"));
        let written: Value = serde_json::from_slice(&bytes(&back, "adapter_config.json")).unwrap();
        prop_assert_eq!(written, config);
    }
}

/// The update of every module, `alpha/r · B A`, is the one of the mlx-lm adapter, `scale · bᵀ aᵀ`, and holes are zero.
fn check_updates(peft: &Path, config: &Value, mlx: &Path) {
    let store = TensorStore::open(&peft.join("adapter_model.safetensors")).unwrap();
    let (adapter, _) = Adapter::read(mlx, &PLAIN).unwrap();
    for name in adapter.modules() {
        let values = |leaf: &str| adapter.tensors[&format!("{name}.{leaf}")].to_f32().unwrap();
        let (a, b, rank) = (values("lora_a"), values("lora_b"), adapter.rank);
        let (input, output) = (a.len() / rank, b.len() / rank);
        let theirs = |leaf: &str| {
            store
                .get(&format!("base_model.model.{name}.{leaf}.weight"))
                .map(|v| v.to_f32().unwrap())
        };
        let (Some(their_a), Some(their_b)) = (theirs("lora_A"), theirs("lora_B")) else {
            assert!(
                b.iter().all(|v| *v == 0.0) && a.iter().all(|v| *v == 0.0),
                "{name} is no hole"
            );
            continue;
        };
        let their_rank = their_a.len() / input;
        let alpha = config["alpha_pattern"][name].as_f64().unwrap();
        let divisor = their_rank as f64;
        let their_scale = alpha
            / if config["use_rslora"] == true {
                divisor.sqrt()
            } else {
                divisor
            };
        for (row, column) in (0..output).flat_map(|row| (0..input).map(move |column| (row, column))) {
            let sum = |rank: usize, f: &dyn Fn(usize) -> f64| (0..rank).map(f).sum::<f64>();
            let ours = sum(rank, &|k| {
                f64::from(a[column * rank + k]) * f64::from(b[k * output + row])
            }) * adapter.scale;
            let want = sum(their_rank, &|k| {
                f64::from(their_a[k * input + column]) * f64::from(their_b[row * their_rank + k])
            });
            let want = want * their_scale;
            assert!((ours - want).abs() <= 1e-12 * want.abs(), "{name}: {ours} {want}");
        }
    }
}

#[test]
fn scale_is_bit_equal_with_the_sidecar_and_within_an_ulp_without() {
    // (0.1 · 3) / 3 is not 0.1.
    let (rank, scale) = (3, 0.1f64);
    assert_ne!((scale * rank as f64) / rank as f64, scale);
    let dir = tempfile::tempdir().unwrap();
    let adapter = mlx_adapter(Method::Lora, rank, scale, Dtype::F32, |name| name.contains("q_proj"));
    adapter.write_peft(dir.path(), None).unwrap();
    let (exact, _) = Adapter::read(dir.path(), &PLAIN).unwrap();
    assert_eq!(exact.scale.to_bits(), scale.to_bits());
    fs::remove_file(dir.path().join("planish.json")).unwrap();
    let (near, _) = Adapter::read(dir.path(), &PLAIN).unwrap();
    assert_ne!(near.scale, scale);
    assert!((near.scale - scale).abs() <= f64::EPSILON * scale);
}

#[test]
fn mlx_scale_20_at_rank_8_is_alpha_160() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = mlx_adapter(Method::Lora, 8, 20.0, Dtype::F32, |name| name.contains("q_proj"));
    assert_eq!(adapter.alpha(), 160.0);
    adapter.write_peft(dir.path(), None).unwrap();
    let config: Value = serde_json::from_slice(&bytes(dir.path(), "adapter_config.json")).unwrap();
    assert_eq!(
        (&config["lora_alpha"], &config["r"], &config["use_rslora"]),
        (&json!(160), &json!(8), &json!(false))
    );
    assert_eq!(config["target_modules"], json!(["self_attn.q_proj"]));
    assert_eq!(config["layers_to_transform"], Value::Null);
}

#[test]
fn rslora_keeps_alpha_over_root_of_rank() {
    let dir = tempfile::tempdir().unwrap();
    let (peft, mlx, back) = (dir.path().join("peft"), dir.path().join("mlx"), dir.path().join("back"));
    write_pairs(
        &peft,
        &peft_config(json!({"use_rslora": true})),
        vec![pair(0, "self_attn.q_proj", 2)],
    );
    convert(&peft, &mlx, Format::MlxLm, &PLAIN).unwrap();
    let (adapter, _) = Adapter::read(&mlx, &PLAIN).unwrap();
    assert_eq!((adapter.scale, adapter.alpha()), (4.0 / 2f64.sqrt(), 4.0));
    convert(&mlx, &back, Format::Peft, &PLAIN).unwrap();
    let config: Value = serde_json::from_slice(&bytes(&back, "adapter_config.json")).unwrap();
    assert_eq!(
        (&config["use_rslora"], &config["lora_alpha"]),
        (&json!(true), &json!(4))
    );
}

#[test]
fn layers_of_a_known_base_are_counted_from_the_end() {
    let dir = tempfile::tempdir().unwrap();
    write_pairs(
        dir.path(),
        &peft_config(json!({})),
        vec![pair(1, "self_attn.q_proj", 2), pair(3, "self_attn.v_proj", 2)],
    );
    let base = base();
    let (adapter, report) = Adapter::read(
        dir.path(),
        &ReadOptions {
            base: Some(&base),
            ..PLAIN
        },
    )
    .unwrap();
    assert_eq!(adapter.n_adapted_layers, 3);
    let holes = [
        "2.self_attn.q_proj",
        "3.self_attn.q_proj",
        "1.self_attn.v_proj",
        "2.self_attn.v_proj",
    ];
    assert_eq!(report.holes, holes.map(|hole| format!("model.layers.{hole}")));
    let hole = &adapter.tensors["model.layers.2.self_attn.v_proj.lora_b"];
    assert_eq!(
        (hole.shape.as_slice(), hole.bytes.iter().any(|b| *b != 0)),
        (&[2, 2][..], false)
    );
}

#[test]
fn unknown_base_means_all_layers() {
    let dir = tempfile::tempdir().unwrap();
    write_pairs(
        dir.path(),
        &peft_config(json!({})),
        vec![pair(2, "self_attn.q_proj", 2)],
    );
    let (adapter, report) = Adapter::read(dir.path(), &PLAIN).unwrap();
    assert_eq!(
        (adapter.n_adapted_layers, report.holes.len(), report.notes.len()),
        (-1, 2, 1)
    );
}

#[test]
fn scales_that_differ_are_folded_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let config = peft_config(json!({"alpha_pattern": {r"layers\.1\..*": 12, "layers.0.self_attn.v_proj": 8}}));
    let pairs = vec![
        pair(0, "self_attn.q_proj", 2),
        pair(0, "self_attn.v_proj", 2),
        pair(1, "self_attn.q_proj", 2),
        pair(2, "self_attn.q_proj", 2),
    ];
    write_pairs(dir.path(), &config, pairs);
    let (adapter, report) = Adapter::read(dir.path(), &PLAIN).unwrap();
    assert_eq!(adapter.scale, 2.0);
    let folded: Vec<(&str, f64)> = report
        .folded
        .iter()
        .map(|fold| (fold.module.as_str(), fold.factor))
        .collect();
    assert_eq!(
        folded,
        [
            ("model.layers.0.self_attn.v_proj", 2.0),
            ("model.layers.1.self_attn.q_proj", 3.0)
        ]
    );
}

#[test]
fn adapter_trained_on_after_conversion_keeps_what_it_learned() {
    let dir = tempfile::tempdir().unwrap();
    let (peft, out) = (dir.path().join("peft"), dir.path().join("out"));
    let config = peft_config(
        json!({"rank_pattern": {"layers.1.self_attn.q_proj": 1}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}}),
    );
    write_pairs(
        &peft,
        &config,
        vec![
            pair(0, "self_attn.q_proj", 2),
            pair(1, "self_attn.q_proj", 1),
            pair(3, "self_attn.q_proj", 2),
        ],
    );
    let (mut adapter, _) = Adapter::read(&peft, &PLAIN).unwrap();
    assert_eq!((adapter.sidecar.padding.len(), adapter.sidecar.holes.len()), (1, 1));
    for name in ["1.self_attn.q_proj.lora_b", "2.self_attn.q_proj.lora_b"] {
        let trained = tensor(Dtype::F32, &[2, 4], 9);
        adapter.tensors.insert(format!("model.layers.{name}"), trained);
    }
    let report = adapter.write_peft(&out, None).unwrap();
    assert_eq!(report.notes.len(), 2, "{report}");
    let store = TensorStore::open(&out.join("adapter_model.safetensors")).unwrap();
    assert_eq!(store.len(), 8);
    let (back, _) = Adapter::read(&out, &PLAIN).unwrap();
    assert_eq!(back.tensors, adapter.tensors);
}

#[test]
fn snapshot_file_of_mlx_lm_is_read_beside_its_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = mlx_adapter(Method::Lora, 2, 20.0, Dtype::F32, |name| name.contains("q_proj"));
    adapter.write_mlx_lm(dir.path()).unwrap();
    let snapshot = dir.path().join("0000100_adapters.safetensors");
    fs::rename(dir.path().join("adapters.safetensors"), &snapshot).unwrap();
    assert_eq!(Adapter::read(&snapshot, &PLAIN).unwrap().0.tensors, adapter.tensors);
    assert!(matches!(
        Adapter::read(dir.path(), &PLAIN),
        Err(Error::UnclearAdapter { both: false, .. })
    ));
}

#[test]
fn mlx_configuration_is_written_with_sorted_keys_and_indent_4() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = mlx_adapter(Method::Lora, 2, 20.0, Dtype::F32, |name| name.contains("q_proj"));
    adapter.write_mlx_lm(dir.path()).unwrap();
    let expect = r#"{
    "fine_tune_type": "lora",
    "lora_parameters": {
        "dropout": 0.05,
        "keys": [
            "self_attn.q_proj"
        ],
        "rank": 2,
        "scale": 20.0
    },
    "num_layers": -1
}
"#;
    assert_eq!(
        String::from_utf8(bytes(dir.path(), "adapter_config.json")).unwrap(),
        expect
    );
}

#[test]
fn err_mlx_configuration_without_a_mandatory_key() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = mlx_adapter(Method::Lora, 2, 20.0, Dtype::F32, |name| name.contains("q_proj"));
    adapter.write_mlx_lm(dir.path()).unwrap();
    let path = dir.path().join("adapter_config.json");
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for key in ["rank", "scale", "dropout"] {
        let mut config = good.clone();
        config["lora_parameters"].as_object_mut().unwrap().remove(key);
        fs::write(&path, config.to_string()).unwrap();
        let error = Adapter::read(dir.path(), &PLAIN).unwrap_err();
        assert!(
            matches!(&error, Error::BadJson { reason, .. } if reason.contains(key)),
            "{error}"
        );
    }
}

#[test]
fn err_non_finite_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = mlx_adapter(Method::Lora, 2, 20.0, Dtype::F32, |name| {
        name.contains("0.self_attn.q_proj")
    });
    adapter.tensors.insert(
        "model.layers.0.self_attn.q_proj.lora_b".to_string(),
        HostTensor::from_f32(&[2, 4], &[f32::NAN; 8]),
    );
    adapter.write_mlx_lm(dir.path()).unwrap();
    assert!(matches!(
        Adapter::read(dir.path(), &PLAIN),
        Err(Error::Tensors(planish_tensors::Error::NonFinite { index: 0, .. }))
    ));
}

/// Converts a folder made by `fill`, expects the refusal `id`, and that nothing was left behind.
fn check_refusal(id: &str, to: Format, options: &ReadOptions<'_>, fill: impl Fn(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let (input, out) = (dir.path().join("in"), dir.path().join("out"));
    fs::create_dir(&input).unwrap();
    fill(&input);
    let refusal = refusal(convert(&input, &out, to, options));
    assert_eq!(refusal.id(), id, "{refusal}");
    assert!(!refusal.way_out().is_empty());
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "{id} left something behind"
    );
}

fn check_peft_config_refusal(id: &str, extra: Value) {
    check_refusal(id, Format::MlxLm, &PLAIN, |dir| {
        write_pairs(dir, &peft_config(extra.clone()), vec![pair(0, "self_attn.q_proj", 2)]);
    });
}

fn check_peft_tensor_refusal(id: &str, extra: &[(&str, HostTensor)]) {
    check_refusal(id, Format::MlxLm, &PLAIN, |dir| {
        let extra = extra.iter().map(|(name, t)| (name.to_string(), t.clone())).collect();
        write_pairs(
            dir,
            &peft_config(json!({})),
            vec![pair(0, "self_attn.q_proj", 2), extra],
        );
    });
}

#[test]
fn err_modules_to_save() {
    check_peft_tensor_refusal(
        "modules-to-save",
        &[("lm_head.weight", tensor(Dtype::F32, &[10, 6], 0))],
    );
    check_peft_config_refusal("modules-to-save", json!({"modules_to_save": ["lm_head"]}));
}

#[test]
fn err_lora_bias() {
    let name = "model.layers.0.self_attn.q_proj.lora_B.bias";
    check_peft_tensor_refusal("lora-bias", &[(name, tensor(Dtype::F32, &[4], 0))]);
    check_peft_config_refusal("lora-bias", json!({"bias": "all"}));
    check_peft_config_refusal("lora-bias", json!({"lora_bias": true}));
}

#[test]
fn err_residual_init() {
    for init in ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"] {
        check_peft_config_refusal("residual-init", json!({"init_lora_weights": init}));
    }
}

#[test]
fn err_switch_lora_to_peft() {
    check_refusal("switch-lora-to-peft", Format::Peft, &PLAIN, |dir| {
        let mut adapter = Adapter::new(Method::Lora, 2, 1.0, 0.0);
        let name = "model.layers.0.mlp.switch_mlp.up_proj";
        adapter
            .tensors
            .insert(format!("{name}.lora_a"), tensor(Dtype::F32, &[3, 2, 5], 0));
        adapter
            .tensors
            .insert(format!("{name}.lora_b"), tensor(Dtype::F32, &[3, 7, 2], 1));
        adapter.fill_keys();
        adapter.write_mlx_lm(dir).unwrap();
    });
}

#[test]
fn err_fused_projection() {
    let fused = |dir: &Path| {
        let name = "model.layers.0.self_attn.qkv_proj";
        let tensors = [
            (format!("{name}.lora_A.weight"), tensor(Dtype::F32, &[2, 6], 0)),
            (format!("{name}.lora_B.weight"), tensor(Dtype::F32, &[12, 2], 1)),
        ];
        write_pairs(dir, &peft_config(json!({})), vec![tensors.to_vec()]);
    };
    let split = base();
    check_refusal(
        "fused-projection",
        Format::MlxLm,
        &ReadOptions {
            base: Some(&split),
            ..PLAIN
        },
        fused,
    );
    let mut fused_base = base();
    let module = fused_base.modules.remove("model.layers.0.self_attn.q_proj").unwrap();
    fused_base
        .modules
        .insert("model.layers.0.self_attn.qkv_proj".to_string(), module);
    check_refusal(
        "fused-projection",
        Format::MlxLm,
        &ReadOptions {
            base: Some(&fused_base),
            ..PLAIN
        },
        |dir| {
            write_pairs(dir, &peft_config(json!({})), vec![pair(0, "self_attn.q_proj", 2)]);
        },
    );
}

#[test]
fn err_pickle() {
    check_refusal("pickle", Format::MlxLm, &PLAIN, |dir| {
        fs::write(dir.join("adapter_model.bin"), b"x").unwrap()
    });
}

#[test]
fn err_unsupported_peft_type() {
    for found in ["IA3", "LOHA", "ADALORA", "VERA", "PROMPT_TUNING"] {
        check_peft_config_refusal("unsupported-peft-type", json!({"peft_type": found}));
    }
}

#[test]
fn err_unsupported_peft_option() {
    let option = json!({"layer_replication": [[0, 4], [2, 5]]});
    check_peft_config_refusal("unsupported-peft-option", option.clone());
    let dir = tempfile::tempdir().unwrap();
    write_pairs(dir.path(), &peft_config(option), vec![pair(0, "self_attn.q_proj", 2)]);
    assert!(Adapter::read(dir.path(), &ReadOptions { force: true, ..PLAIN }).is_ok());
}

#[test]
fn err_unknown_module() {
    let base = base();
    check_refusal(
        "unknown-module",
        Format::MlxLm,
        &ReadOptions {
            base: Some(&base),
            ..PLAIN
        },
        |dir| {
            write_pairs(dir, &peft_config(json!({})), vec![pair(7, "self_attn.q_proj", 2)]);
        },
    );
    check_refusal("unknown-module", Format::Peft, &PLAIN, |dir| {
        let mut adapter = mlx_adapter(Method::Lora, 2, 1.0, Dtype::F32, |name| name.contains("q_proj"));
        adapter.tensors.insert(
            "model.layers.0.self_attn.q_proj.lora_c".to_string(),
            tensor(Dtype::F32, &[1], 0),
        );
        adapter.write_mlx_lm(dir).unwrap();
    });
}

#[test]
fn err_shape_mismatch() {
    let mut base = base();
    base.modules
        .get_mut("model.layers.0.self_attn.q_proj")
        .unwrap()
        .output_dims = 5;
    check_refusal(
        "shape-mismatch",
        Format::MlxLm,
        &ReadOptions {
            base: Some(&base),
            ..PLAIN
        },
        |dir| {
            write_pairs(dir, &peft_config(json!({})), vec![pair(0, "self_attn.q_proj", 2)]);
        },
    );
}

#[test]
fn err_rank_conflict_unless_shapes_are_trusted() {
    check_peft_config_refusal("rank-conflict", json!({"r": 4}));
    let dir = tempfile::tempdir().unwrap();
    write_pairs(
        dir.path(),
        &peft_config(json!({"r": 4, "lora_alpha": 4})),
        vec![pair(0, "self_attn.q_proj", 2)],
    );
    let (adapter, report) = Adapter::read(
        dir.path(),
        &ReadOptions {
            trust_shapes: true,
            ..PLAIN
        },
    )
    .unwrap();
    assert_eq!((adapter.rank, adapter.scale, report.notes.len()), (2, 2.0, 1));
    check_refusal("rank-conflict", Format::Peft, &PLAIN, |dir| {
        let mut adapter = mlx_adapter(Method::Lora, 2, 1.0, Dtype::F32, |name| name.contains("q_proj"));
        adapter.rank = 4;
        adapter.write_mlx_lm(dir).unwrap();
    });
}

#[test]
fn err_dora_bits() {
    let mut base = base();
    base.modules.get_mut("model.layers.0.self_attn.q_proj").unwrap().bits = Some(6);
    let dora = |dir: &Path| {
        let adapter = mlx_adapter(Method::Dora, 2, 1.0, Dtype::F32, |name| {
            name.contains("0.self_attn.q_proj")
        });
        adapter.write_peft(dir, None).unwrap();
    };
    check_refusal(
        "dora-bits",
        Format::MlxLm,
        &ReadOptions {
            base: Some(&base),
            ..PLAIN
        },
        dora,
    );
}

#[test]
fn err_full_as_adapter() {
    check_refusal("full-as-adapter", Format::Peft, &PLAIN, |dir| {
        let mut adapter = Adapter::new(Method::Full, 0, 0.0, 0.0);
        adapter
            .tensors
            .insert("model.norm.weight".to_string(), tensor(Dtype::F32, &[6], 0));
        adapter.write_mlx_lm(dir).unwrap();
    });
}

#[test]
fn err_tied_embedding_lora() {
    let tied = BaseModel {
        tied_head: true,
        ..base()
    };
    let peft = |dir: &Path| {
        let name = "base_model.model.model.embed_tokens";
        let tensors = BTreeMap::from([
            (format!("{name}.lora_embedding_A"), tensor(Dtype::F32, &[2, 10], 0)),
            (format!("{name}.lora_embedding_B"), tensor(Dtype::F32, &[6, 2], 1)),
        ]);
        fs::write(dir.join("adapter_config.json"), peft_config(json!({})).to_string()).unwrap();
        tensors::write(&dir.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    };
    let mlx = |dir: &Path| {
        mlx_adapter(Method::Lora, 2, 1.0, Dtype::F32, |name| name.contains("embed"))
            .write_mlx_lm(dir)
            .unwrap();
    };
    for base in [None, Some(&tied)] {
        let options = ReadOptions { base, ..PLAIN };
        check_refusal("tied-embedding-lora", Format::MlxLm, &options, peft);
        check_refusal("tied-embedding-lora", Format::Peft, &options, mlx);
    }
}

#[test]
fn err_dora_embedding() {
    let base = base();
    check_refusal(
        "dora-embedding",
        Format::Peft,
        &ReadOptions {
            base: Some(&base),
            ..PLAIN
        },
        |dir| {
            let mut adapter = mlx_adapter(Method::Dora, 2, 1.0, Dtype::F32, |name| name.contains("embed"));
            adapter
                .tensors
                .insert("model.embed_tokens.m".to_string(), tensor(Dtype::F32, &[10], 0));
            adapter.write_mlx_lm(dir).unwrap();
        },
    );
}

#[test]
fn err_empty_adapter() {
    check_refusal("empty-adapter", Format::MlxLm, &PLAIN, |dir| {
        write_peft(dir, &peft_config(json!({})), &[])
    });
    check_refusal("empty-adapter", Format::MlxLm, &PLAIN, |dir| {
        write_pairs(
            dir,
            &peft_config(json!({})),
            vec![pair(0, "self_attn.q_proj", 2)[..1].to_vec()],
        );
    });
}

#[test]
fn err_base_mismatch_unless_forced() {
    let base = BaseModel {
        identity: SidecarBase {
            config_sha256: Some("bb".to_string()),
            ..SidecarBase::default()
        },
        ..base()
    };
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = mlx_adapter(Method::Lora, 2, 1.0, Dtype::F32, |name| name.contains("q_proj"));
    adapter.sidecar.base.config_sha256 = Some("aa".to_string());
    adapter.write_mlx_lm(dir.path()).unwrap();
    let options = ReadOptions {
        base: Some(&base),
        ..PLAIN
    };
    let error = Adapter::read(dir.path(), &options).unwrap_err();
    assert!(matches!(&error, Error::AdapterRefused { refusal, .. } if refusal.id() == "base-mismatch"));
    assert!(
        error.to_string().contains("aa") && error.to_string().contains("bb"),
        "{error}"
    );
    assert!(Adapter::read(dir.path(), &ReadOptions { force: true, ..options }).is_ok());
}
