//! Models and adapters as other programs leave them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use planish_checkpoint::adapter::{Adapter, Method, ReadOptions, SidecarBase};
use planish_tensors::{self as tensors, HostTensor, TensorStore};
use serde_json::{Value, json};

use crate::adapters::{difference, logits, with_adapter};
use crate::run::{copy_of_the_model, planish, text, tiny_model};

type Tensors = BTreeMap<String, HostTensor>;

/// Reads, changes and writes the tensors of a file.
fn change_tensors(file: &Path, change: impl FnOnce(Tensors) -> Tensors) {
    let store = TensorStore::open(file).unwrap();
    let old = store
        .iter()
        .map(|view| (view.name.to_string(), view.to_host()))
        .collect();
    tensors::write(file, &change(old), &BTreeMap::new()).unwrap();
}

fn rename(file: &Path, rename: impl Fn(&str) -> String) {
    change_tensors(file, |old| {
        old.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect()
    });
}

fn change_json(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    change(&mut json);
    fs::write(file, json.to_string()).unwrap();
}

/// The made-up adapter in PEFT's layout, and its logits.
fn peft_adapter() -> (tempfile::TempDir, PathBuf, Vec<f32>) {
    let (dir, adapter) = with_adapter(Method::Lora, 1e-2);
    let expected = logits(tiny_model(), Some(&adapter));
    let peft = dir.path().join("peft");
    let base = tiny_model();
    planish(&[
        "adapter",
        "convert",
        text(&adapter),
        text(&peft),
        "--to",
        "peft",
        "--model",
        text(base),
    ])
    .success();
    assert!(
        difference(&expected, &logits(base, None)) > 0.1,
        "the adapter does nothing"
    );
    (dir, peft, expected)
}

/// Runs `planish logits`, which must fail, and returns what it said.
fn refusal(model: &Path, adapter: Option<&Path>) -> String {
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("l.safetensors");
    let mut args = vec![
        "logits",
        "--model",
        text(model),
        "--tokens",
        "1,45",
        "--out",
        text(&file),
    ];
    if let Some(adapter) = adapter {
        args.extend(["--adapter", text(adapter)]);
    }
    let ran = planish(&args);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    ran.stderr
}

#[test]
fn cli_adapter_of_a_wrapped_model_is_read() {
    let prefix = "base_model.model.";
    for wrapped in [
        "_orig_mod.base_model.model.",
        "module.base_model.model.",
        "base_model.model._orig_mod.",
        "base_model.model._fsdp_wrapped_module.",
        "",
    ] {
        let (_dir, peft, expected) = peft_adapter();
        rename(&peft.join("adapter_model.safetensors"), |name| {
            let path = name.strip_prefix(prefix).unwrap();
            format!("{wrapped}{}", path.replace(".mlp.", "._checkpoint_wrapped_module.mlp."))
        });
        assert_eq!(logits(tiny_model(), Some(&peft)), expected, "{wrapped}");
    }
}

#[test]
fn cli_adapter_that_starts_from_activations_is_read() {
    let (_dir, peft, expected) = peft_adapter();
    let config = peft.join("adapter_config.json");
    change_json(&config, |config| config["init_lora_weights"] = json!("eva"));
    assert_eq!(logits(tiny_model(), Some(&peft)), expected);
    change_json(&config, |config| config["init_lora_weights"] = json!("pissa"));
    assert!(refusal(tiny_model(), Some(&peft)).contains("residual-init"));
}

#[test]
fn cli_adapter_of_an_early_mlx_lm_is_read() {
    let (_dir, adapter) = with_adapter(Method::Lora, 1e-2);
    let expected = logits(tiny_model(), Some(&adapter));
    fs::remove_file(adapter.join("planish.json")).unwrap();
    change_json(&adapter.join("adapter_config.json"), |config| {
        let (rank, scale) = (&config["lora_parameters"]["rank"], &config["lora_parameters"]["scale"]);
        *config = json!({"lora_layers": 16, "lora_parameters": {"rank": rank, "alpha": 16.0, "scale": scale, "dropout": 0.0}});
    });
    assert_eq!(logits(tiny_model(), Some(&adapter)), expected);
}

#[test]
fn cli_copy_of_the_base_in_an_adapter_is_passed_over_and_a_trained_one_is_not() {
    let (_dir, peft, expected) = peft_adapter();
    let file = peft.join("adapter_model.safetensors");
    let module = "model.layers.0.self_attn.q_proj";
    let name = format!("base_model.model.{module}.base_layer.weight");
    let store = TensorStore::open(tiny_model()).unwrap();
    let copy = store.require(&format!("{module}.weight")).unwrap().to_host();
    change_tensors(&file, |mut old| {
        old.insert(name.clone(), copy.clone());
        old
    });
    assert_eq!(logits(tiny_model(), Some(&peft)), expected);
    change_tensors(&file, |mut old| {
        old.get_mut(&name).unwrap().bytes[0] ^= 1;
        old
    });
    let said = refusal(tiny_model(), Some(&peft));
    assert!(said.contains("modules-to-save") && said.contains(&name), "{said}");
}

#[test]
fn cli_unknown_option_of_peft_is_refused_with_a_way_out_that_works() {
    let (dir, peft, expected) = peft_adapter();
    change_json(&peft.join("adapter_config.json"), |config| {
        config["some_new_option"] = json!("default")
    });
    let said = refusal(tiny_model(), Some(&peft));
    assert!(said.contains("some_new_option") && said.contains("--force"), "{said}");
    let (out, base) = (dir.path().join("l.safetensors"), tiny_model());
    let tokens = ["--tokens", "1,5,77,300,2,1999,42,8", "--out", text(&out), "--force"];
    planish(
        &[
            &["logits", "--model", text(base), "--adapter", text(&peft)],
            &tokens[..],
        ]
        .concat(),
    )
    .success();
    let store = TensorStore::open(&out).unwrap();
    assert_eq!(store.require("logits").unwrap().to_f32().unwrap(), expected);
}

#[test]
fn cli_model_is_read_under_other_names() {
    let expected = logits(tiny_model(), None);
    let renamed: [fn(&str) -> String; 3] = [
        |name| name.trim_start_matches("model.").to_string(),
        |name| format!("_orig_mod.{name}"),
        |name| name.replace("model.embed_tokens", "lm_head"),
    ];
    for change in renamed {
        let dir = tempfile::tempdir().unwrap();
        let model = copy_of_the_model(dir.path());
        rename(&model.join("model.safetensors"), change);
        assert_eq!(logits(&model, None), expected);
    }
}

#[test]
fn cli_head_that_differs_from_its_tied_embedding_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let model = copy_of_the_model(dir.path());
    let file = model.join("model.safetensors");
    change_tensors(&file, |mut old| {
        old.insert("lm_head.weight".into(), old["model.embed_tokens.weight"].clone());
        old
    });
    assert_eq!(logits(&model, None), logits(tiny_model(), None));
    change_tensors(&file, |mut old| {
        old.get_mut("lm_head.weight").unwrap().bytes[0] ^= 1;
        old
    });
    let said = refusal(&model, None);
    assert!(said.contains("tie_word_embeddings = false"), "{said}");
    for command in ["safetensors", "gguf", "coreml"] {
        let out = dir.path().join("out.mlpackage");
        let ran = planish(&["export", command, "--model", text(&model), "--out", text(&out)]);
        assert!(
            ran.stderr.contains("tie_word_embeddings = false"),
            "{command}: {}",
            ran.stderr
        );
    }
}

#[test]
fn cli_pointer_of_git_lfs_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = copy_of_the_model(dir.path());
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:68d29d85\nsize 4006311\n";
    fs::write(model.join("model.safetensors"), pointer).unwrap();
    let said = refusal(&model, None);
    assert!(
        said.contains("Git LFS pointer") && said.contains("git lfs pull"),
        "{said}"
    );
}

#[test]
fn cli_path_of_another_kind_is_named_with_its_command() {
    let (dir, peft, _) = peft_adapter();
    let cache = dir.path().join("models--example--micro");
    let snapshot = cache.join("snapshots/0123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::copy(tiny_model().join("config.json"), snapshot.join("config.json")).unwrap();
    let gguf = dir.path().join("m.gguf");
    fs::write(&gguf, "GGUF").unwrap();
    for (path, expected) in [
        (
            Path::new("HuggingFaceTB/SmolLM2-135M"),
            "planish pull hf:HuggingFaceTB/SmolLM2-135M",
        ),
        (&gguf, "planish import"),
        (&peft, "--adapter"),
        (&cache, "snapshots/0123"),
    ] {
        let said = refusal(path, None);
        assert!(said.contains(expected), "{said}");
    }
    let said = refusal(tiny_model(), Some(tiny_model()));
    assert!(said.contains("this is a model") && said.contains("--model"), "{said}");
}

/// An adapter that knows its base is not laid over another without a word.
#[test]
fn cli_adapter_knows_its_base() {
    let (dir, adapter) = with_adapter(Method::Lora, 1e-2);
    let (base, fused) = (tiny_model(), dir.path().join("fused"));
    let (mut known, _) = Adapter::read(&adapter, &ReadOptions::default()).unwrap();
    known.sidecar.base = SidecarBase::of_model(base).unwrap();
    known.write_mlx_lm(&adapter).unwrap();

    let fuse = |model: &Path, out: &Path| {
        planish(&[
            "fuse",
            "--model",
            text(model),
            "--adapter",
            text(&adapter),
            "--no-check",
            "--out",
            text(out),
        ])
    };
    fuse(base, &fused).success();
    let twice = fuse(&fused, &dir.path().join("twice"));
    assert!(twice.stderr.contains("base-mismatch"), "{}", twice.stderr);
    let said = planish(&[
        "generate",
        "--model",
        text(&fused),
        "--adapter",
        text(&adapter),
        "--prompt",
        "a",
        "--max-tokens",
        "1",
    ]);
    assert!(
        said.code == Some(0) && said.stderr.contains("another base model"),
        "{}",
        said.stderr
    );

    let peft = dir.path().join("peft");
    planish(&["adapter", "convert", text(&adapter), text(&peft), "--to", "peft"]).success();
    let config: Value = serde_json::from_slice(&fs::read(peft.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["base_model_name_or_path"], text(base));
}
