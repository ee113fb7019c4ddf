use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::run::{Ran, run, text};

fn doctor(cache: &Path, args: &[&str]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_planish"));
    run(command.arg("doctor").args(args).env("PLANISH_CACHE", cache))
}

#[test]
fn doctor_tells_every_device_with_its_reason_and_remembers() {
    let dir = tempfile::tempdir().unwrap();
    let first: Value = serde_json::from_str(&doctor(dir.path(), &["--json"]).success()).unwrap();
    assert_eq!(first["mlx"]["version"], "0.32.2");
    let library = first["mlx"]["library"].as_str().unwrap();
    assert!(Path::new(library).exists(), "{library}");
    let backends = first["backends"].as_array().unwrap();
    let mut names: Vec<&str> = backends.iter().map(|one| one["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["cpu", "cuda", "metal"]);
    for one in backends {
        let usable = one["usable"].as_bool().unwrap();
        assert_eq!(usable, one["reason"].as_str().unwrap().is_empty(), "{one}");
        assert_eq!(
            usable,
            one["gflops"].as_f64().is_some_and(|gflops| gflops > 0.0),
            "{one}"
        );
    }
    let cpu = |found: &Value| {
        let backends = found["backends"].as_array().unwrap();
        backends.iter().find(|one| one["name"] == "cpu").unwrap().clone()
    };
    assert!(cpu(&first)["usable"].as_bool().unwrap());
    assert!(first["kernels"]["by"].is_string(), "{first}");
    let selected = first["selected"].as_str().unwrap();
    assert!(
        backends
            .iter()
            .any(|one| one["name"] == selected && one["usable"] == true)
    );
    assert!(
        first["coreml"]["how"][0]
            .as_str()
            .unwrap()
            .contains("planish export coreml")
    );

    let second: Value = serde_json::from_str(&doctor(dir.path(), &["--json"]).success()).unwrap();
    assert_eq!(cpu(&second)["remembered"], true);
    assert_eq!(cpu(&second)["gflops"], cpu(&first)["gflops"]);

    let screen = doctor(dir.path(), &[]).success();
    assert!(screen.lines().count() <= 40, "more than a screen:\n{screen}");
    for words in ["cpu ", "GFLOP/s", "train ", "deploy ", "Neural Engine"] {
        assert!(screen.contains(words), "no {words:?} in\n{screen}");
    }
}

#[test]
fn a_training_step_agrees_with_itself() {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("step.json");
    let ran = run(Command::new(env!("CARGO_BIN_EXE_planish")).args(["__step", "cpu", text(&report)]));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let found: Value = serde_json::from_str(&std::fs::read_to_string(&report).unwrap()).unwrap();
    assert_eq!(found["passed"], true, "{found}");
    assert_eq!(found["gradients"], 56);
}
