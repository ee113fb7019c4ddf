//! `logits`, `generate` and `eval` on the tiny model.

use planish_tensors::TensorStore;
use serde_json::Value;

use crate::run::{planish, text, tiny_model};

#[test]
fn cli_logits_are_those_of_mlx_lm() {
    let golden = std::fs::read_to_string(tiny_model().join("reference.json")).unwrap();
    let reference = &serde_json::from_str::<Value>(&golden).unwrap()["prompts"][0];
    let ids: Vec<String> = reference["ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(Value::to_string)
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let model = tiny_model();
    let args = [
        "logits",
        "--model",
        text(model),
        "--tokens",
        &ids.join(","),
        "--out",
        text(&out),
    ];
    planish(&args).success();

    let store = TensorStore::open(&out).unwrap();
    let logits = store.get("logits").unwrap();
    assert_eq!(logits.shape, [1, ids.len(), 2048]);
    let values = logits.to_f32().unwrap();
    let last = &values[(ids.len() - 1) * 2048..];
    for pair in reference["last"]["top"].as_array().unwrap() {
        let (token, expect) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap() as f32);
        // The largest logit is about 10: a thousandth of it is what parity asks for.
        assert!(
            (last[token] - expect).abs() < 1e-2,
            "token {token}: {} instead of {expect}",
            last[token]
        );
    }
}

#[test]
fn cli_logits_refuse_a_token_outside_the_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("x.safetensors");
    let ran = planish(&[
        "logits",
        "--model",
        text(tiny_model()),
        "--tokens",
        "1,2048",
        "--out",
        text(&out),
    ]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("2048"), "{}", ran.stderr);
    assert!(!out.exists());
}

#[test]
fn cli_generate_prints_text_or_one_json_document() {
    let model = tiny_model();
    let args = [
        "generate",
        "--model",
        text(model),
        "--raw",
        "--prompt",
        "It is a truth",
        "--max-tokens",
        "8",
    ];
    let plain = planish(&args).success();
    let json = planish(&[&args[..], &["--json"]].concat()).success();
    let document: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(format!("{}\n", document["text"].as_str().unwrap()), plain);
    assert_eq!(document["tokens"], 8);
    assert!(document["prompt_tokens"].as_u64().unwrap() > 2);
    assert!(document["tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn cli_generate_seed_decides_a_random_text() {
    let model = tiny_model();
    let say = |seed: &str| {
        let args = [
            "generate",
            "--model",
            text(model),
            "--prompt",
            "Hello",
            "--temp",
            "1.5",
            "--max-tokens",
            "12",
        ];
        planish(&[&args[..], &["--seed", seed]].concat()).success()
    };
    assert_eq!(say("1"), say("1"));
    assert_ne!(say("1"), say("2"));
}

#[test]
fn cli_eval_does_not_depend_on_the_batch_size() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d.jsonl");
    let rows = [
        "It is a truth.",
        "Emma Woodhouse, handsome, clever, and rich, with a comfortable home.",
        "She was.",
    ];
    let lines: Vec<String> = rows
        .iter()
        .map(|row| serde_json::json!({"text": row}).to_string())
        .collect();
    std::fs::write(&data, lines.join("\n")).unwrap();
    let model = tiny_model();
    let loss = |batch: &str| {
        let args = [
            "eval",
            "--model",
            text(model),
            "--data",
            text(&data),
            "--batch-size",
            batch,
            "--json",
        ];
        let document: Value = serde_json::from_str(&planish(&args).success()).unwrap();
        assert!((document["perplexity"].as_f64().unwrap().ln() - document["loss"].as_f64().unwrap()).abs() < 1e-9);
        (document["loss"].as_f64().unwrap(), document["tokens"].clone())
    };
    let (one, three) = (loss("1"), loss("3"));
    assert!((one.0 - three.0).abs() < 1e-5, "{one:?} {three:?}");
    assert_eq!(one.1, three.1);
    // Untrained would be ln 2048 = 7.6; the tiny model has read Jane Austen.
    assert!(one.0 < 7.0, "{one:?}");
}

#[test]
fn cli_missing_model_names_the_file() {
    let ran = planish(&["generate", "--model", "no/such/model", "--prompt", "x"]);
    assert_eq!(ran.code, Some(1));
    assert!(
        ran.stderr.starts_with("error: ") && ran.stderr.contains("no/such/model"),
        "{}",
        ran.stderr
    );
}

#[test]
fn cli_refuses_a_device_that_is_not_here() {
    let other = if cfg!(target_os = "macos") { "cuda" } else { "metal" };
    let ran = planish(&[
        "generate",
        "--model",
        text(tiny_model()),
        "--prompt",
        "x",
        "--backend",
        other,
    ]);
    assert_eq!(ran.code, Some(1));
    assert!(
        ran.stderr.contains(other) && ran.stderr.contains("hint:"),
        "{}",
        ran.stderr
    );
}
