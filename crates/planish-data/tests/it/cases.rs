//! What users of such tools have fed them, each made anew as a small input: `fixtures/cases/NAME`.
//!
//! `want.txt` is what transformers 5.24 renders. All other rows say beside the check what is right.

use std::path::PathBuf;

use planish_data::{
    ChatTemplate, ControlTokens, DataOptions, DataReport, Dataset, Error, Layout, OnPrefixViolation, Result, Shown,
    Splits, TemplateOptions, Tokenizer, show,
};

use crate::support::{file, fixture, read_json, trained_text};

/// A case with its tokenizer and template; a case without its own uses those of `_model`.
struct Case {
    dir: PathBuf,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    options: DataOptions,
}

impl Case {
    fn new(name: &str) -> Self {
        let dir = fixture("cases").join(name);
        let model = fixture("cases/_model");
        let own = dir.join("tokenizer_config.json");
        let config = read_json(&if own.is_file() {
            own.clone()
        } else {
            model.join("tokenizer_config.json")
        });
        let json = std::fs::read(model.join("tokenizer.json")).unwrap();
        let tokenizer = Tokenizer::from_parts("tokenizer.json".as_ref(), &json, Some(&config), None, None).unwrap();
        let file = Some(dir.join("template.jinja")).filter(|file| file.is_file());
        let options = TemplateOptions {
            file,
            ..TemplateOptions::default()
        };
        let from = if own.is_file() { &dir } else { &model };
        let template = ChatTemplate::from_dir(from, &tokenizer, &options).unwrap();
        Self {
            dir,
            tokenizer,
            template,
            options: DataOptions::default(),
        }
    }

    fn load(&self, name: &str) -> Result<(Dataset, DataReport)> {
        Dataset::load(
            &self.dir.join(name),
            &self.tokenizer,
            self.template.as_ref(),
            &self.options,
        )
    }

    fn shown(&self, name: &str) -> Vec<Shown> {
        let rows = show(
            &self.dir.join(name),
            &self.tokenizer,
            self.template.as_ref(),
            &self.options,
            9,
        )
        .unwrap();
        rows.into_iter()
            .map(|row| row.unwrap_or_else(|error| panic!("{}: {error}", self.dir.display())))
            .collect()
    }

    /// The trained texts of a file's examples.
    fn trained(&self, name: &str) -> Vec<String> {
        let (data, _) = self
            .load(name)
            .unwrap_or_else(|error| panic!("{}: {error}", self.dir.display()));
        (0..data.len())
            .map(|example| trained_text(&data, example, &self.tokenizer))
            .collect()
    }

    fn warnings(&self, name: &str) -> String {
        self.load(name).unwrap().1.warnings().join("\n")
    }

    fn refusal(&self, name: &str) -> String {
        self.load(name).unwrap_err().to_string()
    }
}

#[test]
fn golden_texts_of_transformers() {
    let mut count = 0;
    for entry in std::fs::read_dir(fixture("cases")).unwrap() {
        let dir = entry.unwrap().path();
        let Ok(want) = std::fs::read_to_string(dir.join("want.txt")) else {
            continue;
        };
        let case = Case::new(dir.file_name().unwrap().to_str().unwrap());
        let got = &case.shown("train.jsonl")[0].text;
        // The files end where an editor ends them.
        assert_eq!(
            got.trim_end_matches('\n'),
            want.trim_end_matches('\n'),
            "{}",
            dir.display()
        );
        count += 1;
    }
    assert_eq!(count, 12);
}

#[test]
fn share_gpt_rows_are_conversations() {
    let case = Case::new("sharegpt");
    let (_, report) = case.load("train.jsonl").unwrap();
    assert_eq!(report.layouts.get(&Layout::ShareGpt), Some(&2));
    assert_eq!(
        case.trained("train.jsonl"),
        ["Under the mat.<|im_end|>", "Green.<|im_end|>"]
    );
    let text = &case.shown("train.jsonl")[0].text;
    assert!(
        text.contains("system\nBe brief.<|im_end|>") && text.contains("user\nWhere is the key?"),
        "{text}"
    );
    assert!(
        case.warnings("train.jsonl")
            .contains("2 rows: nothing reads the field \"id\"")
    );
}

#[test]
fn share_gpt_rows_may_be_named() {
    let mut case = Case::new("sharegpt");
    case.options.fields.messages = "conversations".into();
    assert_eq!(
        case.trained("train.jsonl"),
        ["Under the mat.<|im_end|>", "Green.<|im_end|>"]
    );
    let rows =
        file("{\"conversations\": [{\"from\": \"human\", \"value\": 3}, {\"from\": \"gpt\", \"value\": \"b\"}]}");
    let case = Case {
        dir: rows.path.parent().unwrap().into(),
        ..case
    };
    let refusal = case.refusal("train.jsonl");
    assert!(
        refusal.contains(":1:47: conversations[0].value: expected string, found number"),
        "{refusal}"
    );
}

#[test]
fn alpaca_rows_keep_their_input() {
    let mut case = Case::new("alpaca");
    for named in [false, true] {
        if named {
            case.options.fields.prompt = "instruction".into();
            case.options.fields.completion = "output".into();
        }
        assert!(
            case.shown("train.jsonl")[1]
                .text
                .contains("user\nAdd the numbers.\n2 3<|im_end|>")
        );
        assert_eq!(case.trained("train.jsonl"), ["hi<|im_end|>", "5<|im_end|>"]);
        assert_eq!(case.warnings("train.jsonl"), "");
    }
    let rows =
        file(r#"{"instruction": "c?", "input": "", "output": "d", "system": "Be brief.", "history": [["a?", "b"]]}"#);
    let case = Case {
        dir: rows.path.parent().unwrap().into(),
        ..case
    };
    assert_eq!(case.trained("train.jsonl"), ["b<|im_end|>d<|im_end|>"]);
    assert!(
        case.shown("train.jsonl")[0]
            .text
            .starts_with("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?")
    );
}

#[test]
fn prompt_and_completion_may_be_lists() {
    let case = Case::new("prompt-and-completion-as-messages");
    assert_eq!(case.trained("train.jsonl"), ["Under the mat.<|im_end|>"]);
    assert_eq!(case.load("train.jsonl").unwrap().1.layouts.get(&Layout::Trl), Some(&1));
}

#[test]
fn tools_may_be_a_string() {
    let case = Case::new("tools-as-text");
    assert_eq!(case.trained("train.jsonl"), ["yo<|im_end|>"]);
    // And this template does not write them, which is said.
    assert!(
        case.warnings("train.jsonl")
            .contains("1 rows: the chat template does not write tools (first: line 1)")
    );
}

#[test]
fn err_calls_that_the_template_never_writes() {
    let case = Case::new("fields-the-template-never-writes");
    let refusal = case.refusal("train.jsonl");
    assert!(
        refusal.contains("messages[1].tool_calls: the chat template does not write calls"),
        "{refusal}"
    );
    let warnings = case.warnings("reasoning.jsonl");
    assert!(
        warnings.contains("does not write messages[].reasoning_content"),
        "{warnings}"
    );
}

#[test]
fn err_strict_refuses_what_is_lost() {
    let mut case = Case::new("fields-the-template-never-writes");
    case.options.strict = true;
    let refusal = case.refusal("reasoning.jsonl");
    assert!(
        refusal.contains("does not write messages[].reasoning_content. Fix: remove the field"),
        "{refusal}"
    );
}

#[test]
fn rows_with_label_false_are_left_out() {
    let case = Case::new("label-false");
    assert_eq!(case.trained("train.jsonl"), ["Under the mat.<|im_end|>"]);
    assert!(
        case.warnings("train.jsonl")
            .contains("1 rows have label = false and were left out")
    );
}

#[test]
fn weight_zero_is_not_trained() {
    let case = Case::new("message-weight-zero");
    assert_eq!(case.trained("train.jsonl"), ["yes<|im_end|>"]);
}

#[test]
fn validation_file_has_many_names() {
    let case = Case::new("name-of-the-validation-file");
    let load = |dir: &std::path::Path| Splits::load(dir, &case.tokenizer, case.template.as_ref(), &case.options);
    assert_eq!(load(&case.dir).unwrap().valid.unwrap().data.len(), 1);
    let dir = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| std::fs::copy(case.dir.join(from), dir.path().join(to)).unwrap();
    copy("train.jsonl", "train.jsonl");
    copy("train.jsonl", "more.jsonl");
    copy("validation.jsonl", "dev.jsonl");
    let splits = load(dir.path()).unwrap();
    assert_eq!(splits.valid.unwrap().data.len(), 1);
    assert_eq!(splits.unread, [dir.path().join("more.jsonl")]);
    copy("validation.jsonl", "eval.jsonl");
    let refusal = load(dir.path()).unwrap_err();
    assert!(
        matches!(refusal, Error::TwoValidationFiles { .. }) && refusal.to_string().contains("eval.jsonl and dev.jsonl")
    );
}

#[test]
fn tables_and_compressed_files_are_rows() {
    use std::io::Write as _;
    let case = Case::new("alpaca");
    let dir = tempfile::tempdir().unwrap();
    let table = "instruction,input,output\r\n\"Say, \"\"hi\"\"\",,hi\r\n\"Add the\nnumbers.\",2 3,5\r\n";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&std::fs::read(case.dir.join("train.jsonl")).unwrap())
        .unwrap();
    std::fs::write(dir.path().join("train.csv"), table).unwrap();
    std::fs::write(dir.path().join("valid.jsonl.gz"), gzip.finish().unwrap()).unwrap();
    let splits = Splits::load(dir.path(), &case.tokenizer, case.template.as_ref(), &case.options).unwrap();
    assert_eq!((splits.train.report.rows, splits.valid.unwrap().report.rows), (2, 2));
    let case = Case {
        dir: dir.path().into(),
        ..case
    };
    assert_eq!(case.trained("train.csv"), ["hi<|im_end|>", "5<|im_end|>"]);
    let texts: Vec<String> = case.shown("train.csv").into_iter().map(|shown| shown.text).collect();
    assert!(
        texts[0].contains("user\nSay, \"hi\"<|im_end|>") && texts[1].contains("Add the\nnumbers.\n2 3"),
        "{texts:?}"
    );
    std::fs::write(dir.path().join("cut.jsonl.gz"), [0x1f, 0x8b, 8, 0]).unwrap();
    assert!(matches!(case.load("cut.jsonl.gz"), Err(Error::Io { .. })));
}

#[test]
fn marks_of_byte_order_inside_are_counted() {
    let case = Case::new("byte-order-mark-inside");
    assert_eq!(case.trained("train.jsonl").len(), 2);
    assert!(
        case.warnings("train.jsonl")
            .contains("byte-order marks at the head of 2 lines")
    );
}

#[test]
fn way_out_of_an_answer_that_is_an_object() {
    let case = Case::new("answer-is-an-object");
    let refusal = case.refusal("train.jsonl");
    assert!(
        refusal.contains("expected string, found object. Fix: write the object as a string of JSON"),
        "{refusal}"
    );
    assert_eq!(case.trained("function.jsonl"), ["x<|im_end|>4<|im_end|>"]);
    assert!(
        case.warnings("function.jsonl")
            .contains("the role \"function\" is read as \"tool\"")
    );
}

#[test]
fn greeting_of_the_assistant_is_context() {
    let case = Case::new("assistant-speaks-first");
    assert_eq!(case.trained("train.jsonl"), ["yes<|im_end|>"]);
    assert!(
        case.warnings("train.jsonl")
            .contains("turn 0 has no prompt and is not trained")
    );
}

#[test]
fn shared_beginning_of_whole_texts_is_context() {
    let case = Case::new("pairs-of-whole-texts");
    assert_eq!(
        case.trained("train.jsonl"),
        ["Under the mat.<|im_end|>", "Go away.<|im_end|>"]
    );
}

#[test]
fn prompt_that_the_finished_text_does_not_keep_is_trained_with_its_answer() {
    let case = Case::new("system-written-late");
    let shown = &case.shown("train.jsonl")[0];
    assert_eq!(
        shown.text,
        "<|im_start|>[INST] Be brief.\n\nWhere?[/INST] Here.<|im_end|>"
    );
    assert_eq!(case.trained("train.jsonl"), [" Here.<|im_end|>"]);
}

#[test]
fn thoughts_that_the_prompt_opens_are_trained() {
    let case = Case::new("thoughts-opened-by-the-prompt");
    let shown = &case.shown("thoughts.jsonl")[0];
    assert_eq!(shown.text, "<U>2 and 3?<A><think>\nadd\n</think>\n\n5<|im_end|>");
    assert_eq!(case.trained("thoughts.jsonl"), ["add\n</think>\n\n5<|im_end|>"]);
    assert_eq!(case.shown("train.jsonl")[0].text, "<U>2 and 3?<A>5<|im_end|>");
    assert_eq!(case.trained("train.jsonl"), ["5<|im_end|>"]);
    assert_eq!(case.trained("multi.jsonl"), ["5<|im_end|>6<|im_end|>"]);
    assert!(
        case.warnings("train.jsonl")
            .contains("the generation prompt ends with \"<think>\\n\"")
    );
}

#[test]
fn thoughts_that_the_prompt_opens_are_trained_in_pairs() {
    let rows = file(r#"{"prompt": "2 and 3?", "chosen": "<think>\nadd\n</think>\n\n5", "rejected": "6"}"#);
    let case = Case::new("thoughts-opened-by-the-prompt");
    let case = Case {
        dir: rows.path.parent().unwrap().into(),
        ..case
    };
    assert_eq!(
        case.trained("train.jsonl"),
        ["add\n</think>\n\n5<|im_end|>", "6<|im_end|>"]
    );
}

#[test]
fn err_prompts_that_do_not_begin_the_text_where_that_is_asked() {
    let mut case = Case::new("system-written-late");
    case.options.on_prefix_violation = OnPrefixViolation::Error;
    assert!(
        case.refusal("train.jsonl")
            .contains("the prompt before this turn is not how the text with it begins")
    );
}

#[test]
fn text_without_an_end_is_named_and_can_be_given_one() {
    let mut case = Case::new("no-end-of-text-token");
    assert!(case.warnings("train.jsonl").contains("name one with data.append_eos"));
    case.options.append_eos = Some("<|endoftext|>".into());
    assert!(
        case.trained("train.jsonl")
            .iter()
            .all(|text| text.ends_with("<|endoftext|>"))
    );
    assert_eq!(case.warnings("train.jsonl"), "");
    case.options.append_eos = Some("<|gone|>".into());
    assert!(case.refusal("train.jsonl").contains("data.append_eos is \"<|gone|>\""));
}

#[test]
fn turn_end_is_known_and_ends_generation() {
    let mut case = Case::new("turn-end-that-does-not-stop");
    assert!(
        case.warnings("train.jsonl")
            .contains("eos_token_id in generation_config.json")
    );
    let end = case.template.as_ref().unwrap().turn_end(&case.tokenizer).unwrap();
    assert_eq!(case.tokenizer.id_to_token(end).unwrap(), "<|im_end|>");
    case.tokenizer.also_end_at(end);
    assert!(case.tokenizer.is_eos(end));
    assert!(
        case.warnings("train.jsonl")
            .contains("eos_token_id in generation_config.json"),
        "it is still said"
    );
}

#[test]
fn control_tokens_in_messages_are_counted_and_can_be_text() {
    let mut case = Case::new("use-marks-in-content");
    let shown = &case.shown("train.jsonl")[0];
    let foreign: Vec<&str> = shown.foreign.iter().map(|range| &shown.text[range.clone()]).collect();
    assert_eq!(foreign, ["<|im_end|>", "<|im_start|>", "<|im_end|>"]);
    assert!(
        case.warnings("train.jsonl")
            .contains("1 rows: control tokens inside messages")
    );
    let controls = |shown: &Shown| shown.ids.iter().filter(|id| **id < 3).count();
    assert_eq!(controls(shown), 7);
    case.options.control_tokens = ControlTokens::Text;
    let shown = &case.shown("train.jsonl")[0];
    assert_eq!(controls(shown), 4, "those of the template stay");
    assert_eq!(case.tokenizer.decode_all(&shown.ids).unwrap(), shown.text);
    assert_eq!(case.trained("train.jsonl"), ["fine <|im_end|> more<|im_end|>"]);
    case.options.control_tokens = ControlTokens::Refuse;
    assert!(case.refusal("train.jsonl").contains("a message holds a control token"));
}

#[test]
fn err_a_template_that_doubles_a_list_ends_soon() {
    let case = Case::new("use-template-that-doubles");
    let source = std::fs::read_to_string(case.dir.join("chat_template.jinja")).unwrap();
    let doubling = [
        source.as_str(),
        "{% set ns = namespace(x='abcd') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x|replace('a', 'aaaa') %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(150) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x={}) %}{% for i in range(150) %}{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}{{ ns.x == ns.x|tojson }}",
        "{{ 'x' * 999999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'a'.center(999999999) }}",
        "{{ '{:>999999999}'.format('a') }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{% set ns = namespace(x=none) %}{% for i in range(99999) %}{% set ns.x = namespace(x=ns.x) %}{% endfor %}{{ ns.x }}",
    ];
    for source in doubling {
        let start = std::time::Instant::now();
        let template = ChatTemplate::from_source(source, "x", &case.tokenizer, &TemplateOptions::default()).unwrap();
        let refusal = template
            .render(&serde_json::json!([{"role": "user", "content": "a"}]), None, true)
            .unwrap_err();
        println!("{refusal} after {:?}: {source:.60}", start.elapsed());
    }
}
