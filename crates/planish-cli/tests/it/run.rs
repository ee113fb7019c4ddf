//! Runs the program.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub(crate) use planish_testkit::tiny_model;

/// What a run of the program gave.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs `planish` with these arguments.
pub(crate) fn planish(args: &[&str]) -> Ran {
    run(Command::new(env!("CARGO_BIN_EXE_planish")).args(args))
}

pub(crate) fn run(command: &mut Command) -> Ran {
    let Output { status, stdout, stderr } = command.output().expect("the program starts");
    Ran {
        code: status.code(),
        stdout: String::from_utf8(stdout).expect("UTF-8 on stdout"),
        stderr: String::from_utf8(stderr).expect("UTF-8 on stderr"),
    }
}

impl Ran {
    /// Standard output of a run that must have gone well.
    pub(crate) fn success(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }
}

/// A copy of the tiny model, to be changed: `dir/model`.
pub(crate) fn copy_of_the_model(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    std::fs::create_dir(&model).unwrap();
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        std::fs::copy(tiny_model().join(name), model.join(name)).unwrap();
    }
    model
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a path of Unicode")
}
