use planish_data::{
    ChatTemplate, DataOptions, Dataset, OnPrefixViolation, Role, Straddling, TemplateOptions, Tokenizer, Train,
};
use serde_json::{Value, json};

use crate::support::{RowFile, chat, chatml, load, rows, template, tokenizer, tokenizer_with, trained_text, turn};

const LLAMA: [&str; 4] = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
];
const GEMMA: [&str; 4] = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"];
const PHI: [&str; 4] = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"];

fn three_turns() -> Value {
    chat(&[
        ("user", "What is it?"),
        ("assistant", "It is a bird."),
        ("user", "Which?"),
        ("assistant", "A heron, she said.\nGrey."),
        ("user", "Thanks"),
        ("assistant", "Not at all!"),
    ])
}

fn read(file: &RowFile, template: &ChatTemplate, tokenizer: &Tokenizer, options: &DataOptions) -> Dataset {
    let (data, report) = Dataset::load(&file.path, tokenizer, Some(template), options).unwrap();
    assert_eq!(report.end_of_turn_warning, None);
    data
}

/// The trained text of every example, joined within an example by nothing at all.
fn trained(file: &RowFile, template: &ChatTemplate, tokenizer: &Tokenizer, options: &DataOptions) -> Vec<String> {
    let data = read(file, template, tokenizer, options);
    (0..data.len())
        .map(|example| trained_text(&data, example, tokenizer))
        .collect()
}

#[test]
fn every_assistant_turn_and_its_end_is_trained_in_each_template() {
    let check = |name: &str, tokenizer: Tokenizer, end: &str, before: &str| {
        let expect: String = ["It is a bird.", "A heron, she said.\nGrey.", "Not at all!"]
            .iter()
            .map(|answer| format!("{before}{answer}{end}"))
            .collect();
        let template = if name == "chatml" {
            chatml(&tokenizer)
        } else {
            template(name, &tokenizer)
        };
        let options = DataOptions::default();
        assert_eq!(
            trained(&rows(&[three_turns()]), &template, &tokenizer, &options),
            [expect],
            "{name}"
        );
    };
    check("chatml", tokenizer(), "<|im_end|>", "");
    check("generation_tags.jinja", tokenizer(), "<|im_end|>", "");
    check("tools.jinja", tokenizer(), "<|im_end|>", "");
    check(
        "llama3.jinja",
        tokenizer_with(&LLAMA, Some("<|begin_of_text|>"), "<|eot_id|>"),
        "<|eot_id|>",
        "",
    );
    check(
        "mistral.jinja",
        tokenizer_with(&["<s>", "</s>", "[INST]", "[/INST]"], Some("<s>"), "</s>"),
        "</s>",
        " ",
    );
    check(
        "gemma.jinja",
        tokenizer_with(&GEMMA, Some("<bos>"), "<end_of_turn>"),
        "<end_of_turn>",
        "",
    );
    check("phi.jinja", tokenizer_with(&PHI, None, "<|end|>"), "<|end|>", "");
}

#[test]
fn thinking_templates_rewrite_history_and_are_unrolled() {
    let tokenizer = tokenizer_with(&["<think>", "</think>"], None, "<|im_end|>");
    let template = template("qwen3.jinja", &tokenizer);
    let row = json!({"messages": [
        turn("user", "What is it?"), turn("assistant", "<think>\nFeathers.\n</think>\n\nA bird."),
        turn("user", "Which?"), turn("assistant", "<think>\nGrey.\n</think>\n\nA heron."),
    ]});
    let file = rows(&[row]);
    let unroll = DataOptions::default();
    let refuse = DataOptions {
        on_prefix_violation: OnPrefixViolation::Error,
        ..DataOptions::default()
    };
    let error = Dataset::load(&file.path, &tokenizer, Some(&template), &refuse)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(":1:1: turn 1: the conversation up to this turn is not how the whole conversation begins"),
        "{error}"
    );
    assert!(
        error.contains("Fix: set data.on_prefix_violation = \"unroll\""),
        "{error}"
    );
    assert_eq!(
        trained(&file, &template, &tokenizer, &unroll),
        [
            "<think>\nFeathers.\n</think>\n\nA bird.<|im_end|>",
            "<think>\nGrey.\n</think>\n\nA heron.<|im_end|>"
        ]
    );
    let data = read(&file, &template, &tokenizer, &unroll);
    assert_eq!(
        data.examples()[0].row,
        data.examples()[1].row,
        "both belong to one row, so splits cannot part them"
    );
    let last = DataOptions {
        train: Train::LastTurn,
        ..DataOptions::default()
    };
    assert_eq!(
        trained(&file, &template, &tokenizer, &last),
        ["<think>\nGrey.\n</think>\n\nA heron.<|im_end|>"]
    );
}

#[test]
fn without_thinking_the_empty_thought_belongs_to_the_prompt() {
    let tokenizer = tokenizer_with(&["<think>", "</think>"], None, "<|im_end|>");
    let file = rows(&[
        json!({"messages": [turn("user", "Hi"), turn("assistant", "Yes.")], "template_kwargs": {"enable_thinking": false}}),
        chat(&[("user", "Hi"), ("assistant", "Yes.")]),
    ]);
    let template = template("qwen3.jinja", &tokenizer);
    assert_eq!(
        trained(&file, &template, &tokenizer, &DataOptions::default()),
        ["Yes.<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"]
    );
}

#[test]
fn a_template_that_closes_the_text_is_refused_or_unrolled() {
    let tokenizer = tokenizer_with(&PHI, None, "<|endoftext|>");
    let template = template("phi_closed.jinja", &tokenizer);
    let file = rows(&[chat(&[
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ])]);
    let refuse = DataOptions {
        on_prefix_violation: OnPrefixViolation::Error,
        ..DataOptions::default()
    };
    assert!(Dataset::load(&file.path, &tokenizer, Some(&template), &refuse).is_err());
    let unroll = DataOptions::default();
    assert_eq!(
        trained(&file, &template, &tokenizer, &unroll),
        ["b<|end|>\n<|endoftext|>", "d<|end|>\n<|endoftext|>"]
    );
}

/// The finished turn is written in another way than the prompt opens it: what both have is context.
#[test]
fn generation_prompt_that_no_turn_begins_with_is_shared_as_far_as_it_goes() {
    let tokenizer = tokenizer();
    let source = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ' says ' ~ m.content ~ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let template = ChatTemplate::from_source(source, "inline", &tokenizer, &TemplateOptions::default()).unwrap();
    let file = rows(&[chat(&[("user", "Hi"), ("assistant", "Yes.")])]);
    assert_eq!(
        trained(&file, &template, &tokenizer, &DataOptions::default()),
        [" says Yes.<|im_end|>"]
    );
}

#[test]
fn err_generation_prompt_that_no_text_continues() {
    let tokenizer = tokenizer();
    let source = "{% if add_generation_prompt %}{{ messages|length }} go{% else %}{% for m in messages %}{{ m.content }}{% endfor %}{% endif %}";
    let template = ChatTemplate::from_source(source, "inline", &tokenizer, &TemplateOptions::default()).unwrap();
    let file = rows(&[chat(&[("user", "Hi"), ("assistant", "Yes.")])]);
    for on_prefix_violation in [OnPrefixViolation::Error, OnPrefixViolation::Unroll] {
        let options = DataOptions {
            on_prefix_violation,
            ..DataOptions::default()
        };
        let error = Dataset::load(&file.path, &tokenizer, Some(&template), &options)
            .unwrap_err()
            .to_string();
        let expect = "turn 1: the prompt before this turn is not how the text with it begins; at byte 0 the one has \"1 go\", the other";
        assert!(error.contains(expect), "{error}");
    }
}

#[test]
fn tool_calls_are_trained_and_tool_results_are_not() {
    let tokenizer = tokenizer();
    let template = template("tools.jinja", &tokenizer);
    let row = |arguments: Value| {
        json!({
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
            "messages": [
                turn("user", "2 + 3?"),
                {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}]},
                {"role": "tool", "name": "add", "content": "5"},
                turn("assistant", "It is 5."),
            ]
        })
    };
    let expect =
        "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 2, \"b\": [3]}}</tool_call><|im_end|>It is 5.<|im_end|>";
    let file = rows(&[row(json!({"a": 2, "b": [3]})), row(json!("{\"a\": 2, \"b\": [3]}"))]);
    let (data, report) = Dataset::load(&file.path, &tokenizer, Some(&template), &DataOptions::default()).unwrap();
    assert_eq!(report.format.name(), "tools");
    for example in 0..2 {
        assert_eq!(trained_text(&data, example, &tokenizer), expect);
    }
    assert_eq!(
        report.duplicate_lines,
        [(1, 2)],
        "arguments as a string are the same row"
    );
}

#[test]
fn options_choose_the_turns() {
    let (tokenizer, file) = (tokenizer(), rows(&[three_turns()]));
    let template = chatml(&tokenizer);
    let check = |train: Train, expect: &str| {
        let options = DataOptions {
            train,
            ..DataOptions::default()
        };
        assert_eq!(trained(&file, &template, &tokenizer, &options), [expect]);
    };
    check(Train::LastTurn, "Not at all!<|im_end|>");
    check(
        Train::Turns(vec![Role::User]),
        // The very first token of a text follows nothing, so it is never a target.
        "user\nWhat is it?<|im_end|><|im_start|>user\nWhich?<|im_end|><|im_start|>user\nThanks<|im_end|>",
    );
    let data = read(
        &file,
        &template,
        &tokenizer,
        &DataOptions {
            train: Train::Everything,
            ..DataOptions::default()
        },
    );
    let tokens = data.tokens(0).unwrap();
    assert!(!tokens.trained[0] && tokens.trained[1..].iter().all(|trained| *trained));
}

#[test]
fn rows_may_mask_their_own_turns() {
    let (tokenizer, mut row) = (tokenizer(), three_turns());
    let template = chatml(&tokenizer);
    row["messages"][1]["train"] = json!(false);
    row["messages"][3]["train"] = json!(true);
    let expect = "A heron, she said.\nGrey.<|im_end|>Not at all!<|im_end|>";
    assert_eq!(
        trained(&rows(&[row.clone()]), &template, &tokenizer, &DataOptions::default()),
        [expect]
    );
    row["messages"][0]["train"] = json!(true);
    let error = load(&rows(&[row]), &DataOptions::default()).unwrap_err().to_string();
    assert!(
        error.contains("messages[0].train: a turn of role user is not trained"),
        "{error}"
    );
}

#[test]
fn completions_train_the_completion_and_its_end() {
    let (tokenizer, row) = (
        tokenizer(),
        json!({"prompt": "Hi", "completion": "Yes.", "system": "Be short."}),
    );
    let template = chatml(&tokenizer);
    assert_eq!(
        trained(&rows(&[row]), &template, &tokenizer, &DataOptions::default()),
        ["Yes.<|im_end|>"]
    );
}

#[test]
fn mlx_lm_masks_one_span_to_the_end_with_the_newline() {
    let (tokenizer, file) = (tokenizer(), rows(&[chat(&[("user", "Hi"), ("assistant", "Yes.")])]));
    let template = chatml(&tokenizer);
    let with = |mask_prompt| DataOptions {
        train: Train::MlxLm { mask_prompt },
        ..DataOptions::default()
    };
    assert_eq!(trained(&file, &template, &tokenizer, &with(true)), ["Yes.<|im_end|>\n"]);
    assert_eq!(
        trained(&file, &template, &tokenizer, &with(false)),
        ["user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"]
    );
}

#[test]
fn text_trains_all_but_the_first_and_ends_once() {
    let tokenizer = tokenizer();
    let file = rows(&[json!({"text": "one two"}), json!({"text": "one two<|im_end|>"})]);
    let (data, _) = load(&file, &DataOptions::default()).unwrap();
    let tokens = data.tokens(0).unwrap();
    assert_eq!(
        tokens,
        data.tokens(1).unwrap(),
        "an end of text that is there is not doubled"
    );
    assert_eq!(tokenizer.decode_all(&tokens.ids).unwrap(), "one two<|im_end|>");
    assert!(!tokens.trained[0] && tokens.trained[1..].iter().all(|trained| *trained));
}

#[test]
fn a_token_across_the_start_is_encoded_apart_and_counted() {
    // Without a special token between them, the prompt's line break and the answer's form one token in this vocabulary
    // or not; a space and a word certainly do.
    let tokenizer = tokenizer();
    let source = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";
    let template = ChatTemplate::from_source(source, "inline", &tokenizer, &TemplateOptions::default()).unwrap();
    let file = rows(&[chat(&[("user", "Who?"), ("assistant", "Emma was there.")])]);
    let (data, report) = Dataset::load(&file.path, &tokenizer, Some(&template), &DataOptions::default()).unwrap();
    assert_eq!(
        report.straddling,
        Straddling {
            start_split: 1,
            ..Straddling::default()
        }
    );
    assert_eq!(trained_text(&data, 0, &tokenizer), "Emma was there.<|im_end|>");
    // What inference sees: the prompt's tokens, then the answer's.
    let prompt = tokenizer.encode("user: Who?\nassistant: ").unwrap().ids;
    assert_eq!(data.tokens(0).unwrap().ids[..prompt.len()], prompt);
}

#[test]
fn templates_without_an_end_of_turn_are_warned_of() {
    let tokenizer = tokenizer();
    let template = template("unmarked.jinja", &tokenizer);
    let file = rows(&[chat(&[("user", "Hi"), ("assistant", "Yes.")])]);
    let (_, report) = Dataset::load(&file.path, &tokenizer, Some(&template), &DataOptions::default()).unwrap();
    assert!(report.end_of_turn_warning.unwrap().contains("writes no special token"));
    let other = tokenizer_with(&PHI, None, "<|endoftext|>");
    let phi = crate::support::template("phi.jinja", &other);
    let (_, report) = Dataset::load(&file.path, &other, Some(&phi), &DataOptions::default()).unwrap();
    assert!(
        report
            .end_of_turn_warning
            .unwrap()
            .contains("\"<|end|>\", which is not among")
    );
}

#[test]
fn preference_pairs_train_the_two_answers_only() {
    let tokenizer = tokenizer();
    let history = [turn("user", "Hi"), turn("assistant", "Yes?"), turn("user", "Name one.")];
    let full = |answer: &str| [&history[..], &[turn("assistant", answer)]].concat();
    let file = rows(&[
        json!({"prompt": "Name one.", "chosen": "Emma.", "rejected": "No.", "margin": 0.5}),
        json!({"chosen": full("Emma."), "rejected": full("No.")}),
        json!({"prompt": history, "chosen": [turn("assistant", "Emma.")], "rejected": [turn("assistant", "No.")]}),
        json!({"prompt": history, "chosen": full("Emma."), "rejected": full("No.")}),
    ]);
    let (data, report) = load(&file, &DataOptions::default()).unwrap();
    assert_eq!((report.format.name(), data.len()), ("preference", 8));
    for pair in 0..4 {
        assert_eq!(trained_text(&data, 2 * pair, &tokenizer), "Emma.<|im_end|>");
        assert_eq!(trained_text(&data, 2 * pair + 1, &tokenizer), "No.<|im_end|>");
    }
    assert_eq!(data.examples()[0].margin, Some(0.5));
    for pair in 2..4 {
        assert_eq!(
            data.tokens(2 * pair).unwrap(),
            data.tokens(2).unwrap(),
            "three ways to write one row"
        );
    }
    let plan = planish_data::BatchPlan::new(
        &data,
        &planish_data::PlanOptions {
            batch_size: 3,
            ..Default::default()
        },
    )
    .unwrap();
    let batch = &plan.window(&data, 0, 0).unwrap().micro_batches[0];
    assert_eq!(batch.rows, 6);
    for two in batch.segments.chunks(2) {
        assert_eq!(
            (two[0].side, two[1].side),
            (Some(planish_data::Side::Chosen), Some(planish_data::Side::Rejected))
        );
        assert_eq!(two[0].example + 1, two[1].example);
        assert_eq!((two[0].row % 2, two[1].row), (0, two[0].row + 1));
    }
}

/// A tokenizer as Llama 2 and Mistral have it: a word mark for each blank and before each piece, and bytes for what the
/// vocabulary lacks.
fn word_mark_tokenizer() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: &str| {
        let id = vocab.len();
        vocab.entry(token.to_string()).or_insert(id.into());
    };
    ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
        .iter()
        .for_each(|token| add(token));
    (0..256).for_each(|byte| add(&format!("<0x{byte:02X}>")));
    "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?é"
        .chars()
        .for_each(|c| add(&c.to_string()));
    add("▁a");
    add("▁b");
    let special = |id: usize, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(1, "<s>"), special(2, "</s>"), special(3, "[INST]"), special(4, "[/INST]")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": ["▁ a", "▁ b"]}
    });
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    Tokenizer::from_parts("x".as_ref(), json.to_string().as_bytes(), Some(&config), None, None).unwrap()
}

#[test]
fn word_marks_and_bytes_are_trained_with_their_text() {
    let tokenizer = word_mark_tokenizer();
    let template = template("mistral.jinja", &tokenizer);
    for answer in ["abc", "b 🙂 a\nb", " b", "\nb", "漢字"] {
        let file = rows(&[chat(&[
            ("user", "a?"),
            ("assistant", answer),
            ("user", "b"),
            ("assistant", answer),
        ])]);
        let data = read(&file, &template, &tokenizer, &DataOptions::default());
        let tokens = data.tokens(0).unwrap();
        let names: Vec<String> = tokens
            .ids
            .iter()
            .map(|id| tokenizer.id_to_token(*id).unwrap())
            .collect();
        // Everything between [/INST] and the end of the turn, that one included.
        let mut inside = false;
        for (name, trained) in names.iter().zip(&tokens.trained) {
            assert_eq!(*trained, inside, "{name} in {names:?}");
            inside = (inside || name == "[/INST]") && name != "</s>";
        }
    }
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    fn turns() -> impl Strategy<Value = Vec<(String, String)>> {
        let text = prop_oneof!["[ -~é漢🙂\n]{1,30}", "\\PC{0,12}"];
        prop::collection::vec((text.clone(), text), 1..4)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any content, any number of turns: what is trained is what the assistant said and the end of its turn.
        #[test]
        fn prop_trained_text_is_the_answers(turns in turns()) {
            let tokenizer = tokenizer();
            let template = chatml(&tokenizer);
            let messages: Vec<(&str, &str)> = turns
                .iter()
                .flat_map(|(question, answer)| [("user", question.as_str()), ("assistant", answer.as_str())])
                .collect();
            let data = read(&rows(&[chat(&messages)]), &template, &tokenizer, &DataOptions::default());
            let expect: String = turns.iter().map(|(_, answer)| format!("{answer}<|im_end|>")).collect();
            prop_assert_eq!(trained_text(&data, 0, &tokenizer), expect);
            let whole = template.render(&chat(&messages)["messages"], None, false).unwrap();
            prop_assert_eq!(tokenizer.decode_all(&data.tokens(0).unwrap().ids).unwrap(), whole);
        }
    }
}
