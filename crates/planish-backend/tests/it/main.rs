//! The probe process on this machine's own CPU.
#![allow(clippy::unwrap_used)] // helpers of tests may panic

use std::io::Read;

use planish_backend::{Backend, CheckStatus, ChildEnd, Verdict, child_main, conclude};

#[test]
fn the_cpu_passes_every_check_and_has_a_speed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.jsonl");
    child_main(&["cpu".into(), path.display().to_string(), "7".into()]).unwrap();
    let mut lines = String::new();
    std::fs::File::open(&path).unwrap().read_to_string(&mut lines).unwrap();
    let report = conclude(
        Backend::Cpu,
        7,
        &lines,
        ChildEnd {
            exit: Some(0),
            ..ChildEnd::default()
        },
    );
    let failed: Vec<_> = report.checks.iter().filter(|c| c.status == CheckStatus::Fail).collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(
        (report.verdict, report.stage.as_str()),
        (Verdict::Ok, "speed"),
        "{:?}",
        report.child
    );
    assert!(report.checks.len() > 30, "{}", report.checks.len());
    assert!(report.gflops.unwrap() > 0.1);
    assert_eq!(report.mlx_version, "0.32.2");
}

#[test]
fn a_missing_gpu_is_reported_as_such() {
    if planish_mlx::device::count(planish_mlx::device::DeviceKind::Gpu).unwrap() > 0 {
        println!("skipped: this machine has a GPU");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.jsonl");
    child_main(&["cuda".into(), path.display().to_string(), "7".into()]).unwrap();
    let lines = std::fs::read_to_string(&path).unwrap();
    let report = conclude(
        Backend::Cuda,
        7,
        &lines,
        ChildEnd {
            exit: Some(0),
            ..ChildEnd::default()
        },
    );
    assert_eq!(
        (report.verdict, report.code.as_str()),
        (Verdict::NoDevice, "DEVICE_NONE")
    );
}

#[test]
fn err_wrong_arguments_of_the_hidden_subcommand() {
    for arguments in [
        vec![],
        vec!["cpu".into()],
        vec!["tpu".into(), "x".into(), "7".into()],
        vec!["cpu".into(), "x".into(), "y".into()],
    ] {
        assert!(child_main(&arguments).is_err(), "{arguments:?}");
    }
}
