//! Every log of the fixtures is named rightly, as it is and in every disguise that a terminal, a CI or a parallel build
//! puts on it.

use metal_check::classify::classify;
use std::path::{Path, PathBuf};

/// A log with the code it must get.
struct Case {
    name: String,
    expect: String,
    log: String,
}

/// `fixtures/reported`: one file a thread, the code in its first line.
fn reported() -> Vec<Case> {
    files("reported")
        .into_iter()
        .map(|(name, text)| case(&name, &text))
        .collect()
}

/// `fixtures/logs`: one file a code, several logs each, parted by `=== title` lines; `=== title -> CODE` is a near miss.
fn written() -> Vec<Case> {
    let mut cases = Vec::new();
    for (code, text) in files("logs") {
        for part in text.split("\n=== ").skip(1) {
            let (title, log) = part.split_once('\n').unwrap();
            let expect = title.split_once("-> ").map_or(code.as_str(), |(_, other)| other.trim());
            cases.push(Case {
                name: format!("{code}: {title}"),
                expect: expect.to_owned(),
                log: log.to_owned(),
            });
        }
    }
    cases
}

fn files(folder: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(folder);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let read = |path: PathBuf| {
        (
            path.file_stem().unwrap().to_str().unwrap().to_owned(),
            std::fs::read_to_string(&path).unwrap(),
        )
    };
    paths.into_iter().map(read).collect()
}

fn case(name: &str, text: &str) -> Case {
    let expect = text
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("# expect: "))
        .unwrap()
        .trim()
        .to_owned();
    let log = text
        .lines()
        .filter(|line| !line.starts_with("# expect:") && !line.starts_with("# source:"))
        .collect::<Vec<_>>()
        .join("\n");
    Case {
        name: name.to_owned(),
        expect,
        log,
    }
}

/// Classifies each case under a disguise and reports all that went wrong at once.
fn check(cases: &[Case], disguise: &str, dress: impl Fn(&str) -> Vec<u8>) {
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let answer = classify(&dress(&case.log));
            (answer.code != case.expect).then(|| {
                format!(
                    "{}: expected {}, got {} from {:?}",
                    case.name, case.expect, answer.code, answer.evidence
                )
            })
        })
        .collect();
    assert!(
        wrong.is_empty(),
        "{disguise}: {} of {} wrong\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

fn all() -> Vec<Case> {
    let mut cases = reported();
    cases.extend(written());
    cases
}

#[test]
fn every_log_is_named() {
    check(&all(), "as it is", |log| log.as_bytes().to_vec());
}

#[test]
fn labels_at_the_top_do_not_matter() {
    check(&all(), "labelled", |log| {
        format!("# expect: SOMETHING_ELSE\n# source: nowhere\n{log}").into_bytes()
    });
}

#[test]
fn crlf_does_not_matter() {
    check(&all(), "CRLF", |log| log.replace('\n', "\r\n").into_bytes());
}

#[test]
fn colours_do_not_matter() {
    let coloured = |log: &str| {
        let words = log
            .replace("error:", "\x1b[0m\x1b[1;31merror:\x1b[0m\x1b[1m")
            .replace("warning:", "\x1b[35mwarning:\x1b[0m");
        words
            .lines()
            .map(|line| format!("\x1b[2K{line}\x1b[0m\n"))
            .collect::<String>()
            .into_bytes()
    };
    check(&all(), "coloured", coloured);
}

#[test]
fn noise_around_does_not_matter() {
    let noise: String = (0..5000).map(noise_line).collect();
    let mut seen = std::collections::BTreeSet::new();
    let one_each: Vec<Case> = all()
        .into_iter()
        .filter(|case| seen.insert(case.expect.clone()))
        .collect();
    check(&one_each, "5000 noise lines before and after", |log| {
        format!("{noise}{log}\n{noise}").into_bytes()
    });
}

#[test]
fn progress_bars_do_not_matter() {
    let bars = |log: &str| {
        format!("Downloading   0%\rDownloading  50%\rDownloading 100%\n{log}\nfetch 1/2\rfetch 2/2\n").into_bytes()
    };
    check(&all(), "carriage returns", bars);
}

#[test]
fn lines_of_another_job_between_do_not_matter() {
    let other = |index: usize| {
        [
            "[ 12%] Building CXX object _deps/fmt-build/CMakeFiles/fmt.dir/src/os.cc.o",
            "   Compiling serde_json v1.0.140",
            "make[3]: Entering directory '/tmp/other'",
        ][index % 3]
    };
    let mixed = |log: &str| {
        log.lines()
            .enumerate()
            .map(|(index, line)| format!("{line}\n{}\n", other(index)))
            .collect::<String>()
            .into_bytes()
    };
    check(&all(), "interleaved", mixed);
}

#[test]
fn time_stamps_and_job_names_do_not_matter() {
    check(&all(), "time stamps", |log| {
        log.lines()
            .map(|line| format!("2026-05-04T10:11:12.1234567Z {line}\n"))
            .collect::<String>()
            .into_bytes()
    });
    check(&all(), "cargo -vv", |log| {
        log.lines()
            .map(|line| format!("[mlx-sys 0.7.0] {line}\n"))
            .collect::<String>()
            .into_bytes()
    });
}

#[test]
fn a_build_script_frame_does_not_matter() {
    let framed = |log: &str| {
        let inner: String = log.lines().map(|line| format!("  {line}\n")).collect();
        format!("   Compiling mlx-sys v0.7.0\nerror: failed to run custom build command for `mlx-sys v0.7.0`\n\nCaused by:\n  process didn't exit successfully: `/t/debug/build/mlx-sys-0f/build-script-build` (exit status: 101)\n  --- stdout\n  cargo:rerun-if-changed=build.rs\n\n  --- stderr\n{inner}\n").into_bytes()
    };
    let failing: Vec<Case> = all()
        .into_iter()
        .filter(|case| !matches!(case.expect.as_str(), "NONE" | "RUST_COMPILE" | "UNKNOWN"))
        .collect();
    check(&failing, "inside a build-script frame", framed);
}

#[test]
fn warnings_never_change_a_code() {
    let warned = |log: &str| {
        let warning = "src/x.cpp:1:2: warning: unable to find utility \"metal\" [-Wfoo]\nld: warning: Undefined symbols for architecture arm64\n";
        format!("{warning}{log}\n{warning}").into_bytes()
    };
    check(&all(), "warnings", warned);
}

#[test]
fn a_log_cut_anywhere_is_classified() {
    for case in all() {
        for (cut, _) in case.log.match_indices('\n') {
            classify(&case.log.as_bytes()[..cut]);
            classify(&case.log.as_bytes()[cut..]);
        }
    }
}

#[test]
fn unknown_and_catch_alls_keep_the_tail() {
    let answer = classify(b"one\nerror: the frobnicator refused\ntwo\n");
    assert_eq!((answer.code.as_str(), answer.tail.len()), ("UNKNOWN", 3));
    assert_eq!(answer.evidence[0].line, 2);
}

#[test]
fn every_code_has_a_log_that_is_it_and_one_that_is_not() {
    let (cases, written) = (all(), written());
    for entry in metal_check::catalogue::entries() {
        assert!(
            cases.iter().any(|case| case.expect == entry.code),
            "no log of {}",
            entry.code
        );
        let own: Vec<&Case> = written
            .iter()
            .filter(|case| case.name.starts_with(&format!("{}:", entry.code)))
            .collect();
        assert!(
            own.iter().any(|case| case.expect != entry.code) || matches!(entry.code.as_str(), "NONE" | "UNKNOWN"),
            "no near miss of {}",
            entry.code
        );
    }
}

fn noise_line(index: usize) -> String {
    match index % 9 {
        0 => format!(
            "[{:3}%] Building CXX object mlx/CMakeFiles/mlx.dir/backend/error_{index}.cpp.o\n",
            index % 100
        ),
        1 => format!("   Compiling crate_{index} v1.0.{index}\n"),
        2 => format!("-- Looking for symbol_{index} - not found\n"),
        3 => format!("/usr/bin/c++ -DNDEBUG -o x{index}.o -c x{index}.cpp\n"),
        4 => format!("x{index}.cpp:{index}:1: warning: unused parameter 'error' [-Wunused-parameter]\n"),
        5 => format!("make[2]: Leaving directory '/tmp/b/{index}'\n"),
        6 => format!("test module_{index}::failed_to_load ... ok\n"),
        7 => format!("step {index} loss 2.31 tok/s 1042\n"),
        _ => format!("copying {index} of 5000\n"),
    }
}
