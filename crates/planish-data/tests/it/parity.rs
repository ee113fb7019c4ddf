//! Chat templates in the manner of 14 families, rendered here and by transformers' own `apply_chat_template`: the texts must
//! be equal, and so must the masks, which transformers takes from `{% generation %}` and planish from the difference of
//! prompts. `cargo xtask parity --only templates` makes the reference and runs this.
//!
//! Where the two differ on purpose, the reason is one of [`Verdict`]'s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_data::{ChatTemplate, DataOptions, Shown, TemplateOptions, Tokenizer, show};
use serde_json::{Value, json};

use crate::support::read_json;

/// How a case came out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Equal,
    /// Both refuse the conversation.
    BothRefuse,
    /// transformers refuses what planish hands over in another form: parts joined, or arguments as text.
    OtherForm,
    /// The row becomes an example per turn, begins with the prompt that a server sends, or has no Python `repr` of its parts.
    OwnText,
    /// The conversation is refused for training only, with a reason of its own.
    Refused(String),
    Different(String),
}

#[test]
#[ignore = "cargo xtask parity --only templates makes its reference"]
fn parity_transformers_chat_templates() {
    let folder = PathBuf::from(std::env::var_os("PLANISH_TEMPLATE_REFERENCE").expect("the folder of reference.json"));
    let cases = read_json(&folder.join("reference.json"));
    let mut found: BTreeMap<(String, &str, Verdict), Vec<String>> = BTreeMap::new();
    for case in cases.as_array().unwrap() {
        let path = PathBuf::from(case["template"].as_str().unwrap());
        let family = path.file_stem().unwrap().to_string_lossy().into_owned();
        let conversation = case["conversation"].as_str().unwrap().to_string();
        let ours = Ours::of(&folder, &path, case);
        for (what, verdict) in [
            ("text", ours.text(case, "text", false)),
            ("prompt", ours.text(case, "prompt", true)),
            ("mask", ours.mask(case)),
        ] {
            found
                .entry((family.clone(), what, verdict))
                .or_default()
                .push(conversation.clone());
        }
    }
    let failures = report(&found);
    assert!(
        failures.is_empty(),
        "{} differ\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// Prints what is equal and what differs on purpose.
#[allow(clippy::print_stdout)]
fn report(found: &BTreeMap<(String, &str, Verdict), Vec<String>>) -> Vec<String> {
    let mut failures = Vec::new();
    for ((family, what, verdict), conversations) in found {
        let named = conversations.join(", ");
        match verdict {
            Verdict::Equal => println!("templates {family} {what}: {} equal", conversations.len()),
            Verdict::Different(how) => failures.push(format!("templates {family} {what}: {how} ({named})")),
            other => println!("templates {family} {what}: {other:?}: {named}"),
        }
    }
    failures
}

/// What planish makes of a case.
struct Ours {
    template: ChatTemplate,
    shown: Vec<std::result::Result<Shown, String>>,
}

impl Ours {
    fn of(folder: &Path, path: &Path, case: &Value) -> Self {
        // transformers has saved the tokenizer with the special tokens of all families.
        let json = std::fs::read(folder.join("tokenizer.json")).unwrap();
        let config = json!({"bos_token": "<s>", "eos_token": "<|im_end|>"});
        let tokenizer = Tokenizer::from_parts(path, &json, Some(&config), None, None).unwrap();
        let options = TemplateOptions {
            file: Some(path.into()),
            ..TemplateOptions::default()
        };
        let template = ChatTemplate::from_dir(folder, &tokenizer, &options).unwrap().unwrap();
        let file = folder.join("row.jsonl");
        std::fs::write(&file, case["row"].as_str().unwrap()).unwrap();
        let shown = show(&file, &tokenizer, Some(&template), &DataOptions::default(), 1).unwrap();
        let shown = shown
            .into_iter()
            .map(|row| row.map_err(|error| error.message))
            .collect();
        Self { template, shown }
    }

    fn text(&self, case: &Value, name: &str, prompt: bool) -> Verdict {
        let ours = self.template.render_row(case["row"].as_str().unwrap(), prompt);
        match (&ours, case[name]["value"].as_str()) {
            (Ok(ours), Some(theirs)) if ours == theirs => Verdict::Equal,
            (Err(_), None) => Verdict::BothRefuse,
            (ours, theirs) => Verdict::Different(format!("ours {ours:?}, theirs {theirs:?}")),
        }
    }

    fn mask(&self, case: &Value) -> Verdict {
        let theirs = &case["mask"]["value"];
        let whole = case["text"]["value"].as_str();
        match (&self.shown[..], whole) {
            ([Ok(one)], Some(whole)) if one.text == whole => {
                // Nothing predicts the first token, so it is never trained here.
                let mask = one.trained.iter().map(|trained| u8::from(*trained)).collect::<Vec<_>>();
                if json!(one.ids) == theirs["ids"] && json!(mask) == theirs["mask"] {
                    return Verdict::Equal;
                }
                Verdict::Different(format!("ours {:?} {mask:?}, theirs {theirs} of {whole:?}", one.ids))
            }
            ([Err(_), ..] | [], None) => Verdict::BothRefuse,
            ([Ok(_), ..], None) => Verdict::OtherForm,
            ([Err(reason), ..], Some(_)) => Verdict::Refused(reason.clone()),
            ([Ok(_), ..], Some(_)) => Verdict::OwnText,
            ([], Some(_)) => Verdict::Different("planish shows no row".into()),
        }
    }
}
