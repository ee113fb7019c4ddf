use super::*;
use crate::history::Change;

fn candidate(id: &str, is_gpu: bool, verdict: Verdict, code: &str) -> CandidateReport {
    let status = match verdict {
        Verdict::Skipped => "skipped",
        verdict if verdict.is_usable() => "pass",
        _ => "fail",
    };
    let log = "\x1b[31mxcrun: error: unable to find utility \"metal\", not a developer tool or in PATH\u{1}<&\n";
    CandidateReport {
        id: id.into(),
        mlx: "0.32.2".into(),
        is_control: !is_gpu,
        is_gpu,
        verdict,
        code: code.into(),
        detail: None,
        stages: vec![Stage {
            stage: "build".into(),
            status: status.into(),
            ms: 1500,
        }],
        predictions: Vec::new(),
        classification: (status == "fail").then(|| crate::classify::classify(log.as_bytes())),
        probe: None,
        log: None,
    }
}

fn report(candidates: Vec<CandidateReport>) -> Report {
    let overall = overall(&candidates);
    let history = vec![Comparison {
        id: "0.33.0/prebuilt/metal/dt14.0".into(),
        change: Change::NowWorks,
        env_changed: vec!["Xcode 26.1 → 26.6".into()],
    }];
    Report {
        schema: SCHEMA,
        tool: "metal-check 0.1.0".into(),
        run: "20260101T000000Z-1".into(),
        host_status: "ok".into(),
        host: Host::default(),
        deployment_target: DeploymentTarget::default(),
        findings: Vec::new(),
        micro_probe: None,
        candidates,
        overall,
        history,
        exit: 0,
    }
}

fn mixed() -> Report {
    report(vec![
        candidate("0.33.0/prebuilt/accelerate/dt14.0", false, Verdict::Works, "NONE"),
        candidate("0.33.0/prebuilt/metal/dt14.0", true, Verdict::Works, "NONE"),
        candidate(
            "0.33.0/source/metal+accelerate/dt14.0",
            true,
            Verdict::BuildFail,
            "TOOLCHAIN_METAL_MISSING",
        ),
        candidate(
            "0.25.3/source/metal+accelerate/dt14.0",
            true,
            Verdict::Skipped,
            "TOOLCHAIN_METAL_MISSING",
        ),
        candidate(
            "0.32.0/source/metal+accelerate/dt14.0",
            true,
            Verdict::InfraError,
            "FETCH_OFFLINE",
        ),
    ])
}

#[test]
fn the_gpu_is_recommended_with_its_lines() {
    let overall = mixed().overall;
    assert_eq!(overall.recommended.as_deref(), Some("0.33.0/prebuilt/metal/dt14.0"));
    assert_eq!(overall.lines[0], "export MACOSX_DEPLOYMENT_TARGET=14.0");
    assert!(overall.lines[2].contains("--backend metal"));
}

#[test]
fn wrong_results_are_never_recommended() {
    let overall = report(vec![candidate(
        "0.33.0/prebuilt/metal/dt14.0",
        true,
        Verdict::WrongResults,
        "PARITY_FAIL",
    )])
    .overall;
    assert_eq!(overall.recommended, None);
    assert!(overall.lines[0].contains("Do not train"));
}

#[test]
fn json_is_read_back() {
    let report = mixed();
    assert_eq!(serde_json::from_str::<Report>(&json(&report)).unwrap(), report);
}

#[test]
fn markdown_has_answer_evidence_remedy_and_change() {
    let page = markdown(&mixed());
    for text in [
        "**works: use `0.33.0/prebuilt/metal/dt14.0`**",
        "    1  xcrun: error: unable to find utility",
        "→ Use the prebuilt route",
        "now-works; changed: Xcode 26.1 → 26.6",
        "| `0.25.3/source/metal+accelerate/dt14.0` | 0.32.2 | skipped",
    ] {
        assert!(page.contains(text), "{text} in\n{page}");
    }
}

#[test]
fn junit_counts_and_is_clean_xml() {
    let xml = junit(&mixed());
    assert!(
        xml.contains("tests=\"5\" failures=\"1\" errors=\"1\" skipped=\"1\""),
        "{xml}"
    );
    assert!(xml.contains("<skipped message=\"skipped TOOLCHAIN_METAL_MISSING\">"));
    assert!(!xml.chars().any(|character| character.is_control() && character != '\n'));
    let parsed = roxmltree::Document::parse(&xml).unwrap();
    assert_eq!(
        parsed
            .descendants()
            .filter(|node| node.has_tag_name("testcase"))
            .count(),
        5
    );
}
