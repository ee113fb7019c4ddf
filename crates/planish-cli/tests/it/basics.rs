use crate::run::planish;

#[test]
fn cli_help_lists_the_commands() {
    let ran = planish(&["--help"]);
    assert_eq!(ran.code, Some(0));
    for command in ["pull", "import", "completions"] {
        assert!(ran.stdout.contains(command), "{}", ran.stdout);
    }
}

#[test]
fn cli_unknown_flag_is_wrong_usage() {
    assert_eq!(planish(&["pull", "--no-such-flag"]).code, Some(2));
}

#[test]
fn cli_unknown_model_names_the_known_ones() {
    let ran = planish(&["pull", "gpt-17"]);
    assert_eq!(ran.code, Some(2));
    assert_eq!(ran.stdout, "");
    assert_eq!(
        ran.stderr,
        "error: no model is called \"gpt-17\"\nhint: there are: smollm2-135m, and hf:ORG/NAME\n"
    );
}

#[test]
fn cli_import_of_something_else_fails_with_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.gguf");
    std::fs::write(&file, "not a model").unwrap();
    let out = dir.path().join("out");
    let ran = planish(&["import", file.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert_eq!(ran.code, Some(1));
    assert!(
        ran.stderr.starts_with("error: ") && ran.stderr.contains("x.gguf"),
        "{}",
        ran.stderr
    );
    assert!(!out.exists());
}

#[test]
fn cli_completions_for_each_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = planish(&["completions", shell]);
        assert_eq!(ran.code, Some(0));
        assert!(
            ran.stdout.contains("planish") && ran.stdout.contains("completions"),
            "{shell}"
        );
    }
}
