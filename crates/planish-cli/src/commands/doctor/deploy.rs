//! Whether the Neural Engine is within reach of this machine, and by which way.

use std::process::Command;

use planish_backend::Machine;
use serde_json::{Value, json};

/// Oldest macOS that loads what `planish export coreml` writes.
const OLDEST_MACOS: u32 = 15;
/// Oldest macOS with Core AI, whose engines put a model behind `LanguageModelSession`.
const CORE_AI_MACOS: u32 = 27;

pub(super) struct Deployment {
    /// Whether a package can run here.
    pub(super) runs_here: bool,
    pub(super) reason: String,
    /// The steps, each a command or an action.
    pub(super) how: Vec<String>,
    /// What is in the way, and its mend.
    pub(super) missing: Vec<(String, String)>,
}

impl Deployment {
    pub(super) fn to_json(&self) -> Value {
        json!({"writes_packages": true, "runs_here": self.runs_here, "reason": self.reason, "how": self.how})
    }
}

pub(super) fn of(machine: &Machine) -> Deployment {
    let export = "planish export coreml --model DIR --out model.mlpackage --check".to_owned();
    let core_ai = format!(
        "for macOS {CORE_AI_MACOS}, iOS {CORE_AI_MACOS} and later: planish export coreai --model DIR --out model --check"
    );
    let Some(macos) = machine.macos else {
        return Deployment {
            runs_here: false,
            reason: "the Neural Engine exists in Apple's devices only; packages are written and checked here"
                .to_owned(),
            how: vec![
                export,
                "copy model.mlpackage to a Mac with macOS 15, or an iPhone with iOS 18, or later".to_owned(),
                core_ai,
            ],
            missing: Vec::new(),
        };
    };
    if !cfg!(target_arch = "aarch64") || macos.0 < OLDEST_MACOS {
        return Deployment {
            runs_here: false,
            reason: format!("packages need Apple silicon and macOS {OLDEST_MACOS} or later; this is macOS {macos}"),
            how: vec![export, "copy model.mlpackage to a newer system".to_owned()],
            missing: vec![(
                format!("Neural Engine: macOS {macos} is older than {OLDEST_MACOS}"),
                "softwareupdate --list".to_owned(),
            )],
        };
    }
    if macos.0 >= CORE_AI_MACOS {
        return Deployment {
            runs_here: true,
            reason: "Core AI runs language models here; which unit runs them is the system's choice".to_owned(),
            how: vec![
                core_ai,
                "open the folder with CoreAILanguageModel(resourcesAt:), or llm-runner of Apple's coreai-models"
                    .to_owned(),
                format!("for older systems: {export}"),
            ],
            missing: Vec::new(),
        };
    }
    let compiler = has_coreml_compiler();
    let compile = "xcrun coremlcompiler compile model.mlpackage .".to_owned();
    Deployment {
        runs_here: true,
        reason: "macOS loads the packages; which unit runs them is the system's choice".to_owned(),
        how: if compiler {
            vec![export, compile]
        } else {
            vec![
                export,
                "load the package from Swift, which compiles it (MLModel.compileModel)".to_owned(),
            ]
        },
        missing: if compiler {
            Vec::new()
        } else {
            vec![(
                "Core ML: hosts such as ANEMLL's load compiled packages, and coremlcompiler comes with Xcode only".to_owned(),
                "install Xcode, then for one command: DEVELOPER_DIR=/Applications/Xcode.app/Contents/Developer xcrun coremlcompiler compile model.mlpackage .".to_owned(),
            )]
        },
    }
}

fn has_coreml_compiler() -> bool {
    Command::new("xcrun")
        .args(["-f", "coremlcompiler"])
        .output()
        .is_ok_and(|output| output.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_is_no_mac_writes_packages_for_others() {
        let deployment = of(&Machine::default());
        assert!(!deployment.runs_here);
        assert!(deployment.how[0].starts_with("planish export coreml"));
        assert_eq!(deployment.to_json()["writes_packages"], true);
    }

    #[test]
    fn a_system_with_core_ai_is_shown_that_way_first() {
        let machine = Machine {
            macos: Some("27.1".parse().unwrap()),
            ..Machine::default()
        };
        let deployment = of(&machine);
        if cfg!(target_arch = "aarch64") {
            assert!(
                deployment.how[0].contains("planish export coreai"),
                "{:?}",
                deployment.how
            );
        }
        assert!(
            of(&Machine::default())
                .how
                .iter()
                .any(|step| step.contains("planish export coreai"))
        );
    }

    #[test]
    fn an_old_macos_is_told_what_it_lacks() {
        let machine = Machine {
            macos: Some("14.6".parse().unwrap()),
            ..Machine::default()
        };
        let deployment = of(&machine);
        assert!(
            !deployment.runs_here && deployment.missing.len() == 1,
            "{}",
            deployment.reason
        );
    }
}
