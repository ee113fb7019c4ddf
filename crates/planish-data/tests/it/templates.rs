use planish_data::{ChatTemplate, Error, TemplateOptions, Tokenizer};
use serde_json::{Value, json};

use crate::support::{fixture, read_json, tokenizer, tokenizer_with, turn};

fn options(now: Option<i64>) -> TemplateOptions {
    TemplateOptions {
        now,
        ..TemplateOptions::default()
    }
}

fn compile(source: &str) -> planish_data::Result<ChatTemplate> {
    ChatTemplate::from_source(source, "inline", &tokenizer(), &TemplateOptions::default())
}

/// Every template fixture and a list of snippets, rendered by Jinja2 (`fixtures/render_templates.py`); texts are equal
/// to the byte, and what Jinja2 refuses we refuse.
#[test]
fn golden_renderings_of_jinja2() {
    let golden = read_json(&fixture("rendered.json"));
    let tokenizer = tokenizer_with(&["<s>"], Some("<s>"), "<|im_end|>");
    let options = options(golden["now"].as_i64());
    let mut differences = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let source = match case["source"].as_str() {
            Some(source) => source.to_string(),
            None => std::fs::read_to_string(fixture("templates").join(name)).unwrap(),
        };
        let conversation = case["conversation"].as_str().unwrap();
        let messages = &golden["conversations"][conversation];
        let tools = (conversation == "calls").then_some(&golden["tools"]);
        let ours = ChatTemplate::from_source(&source, name, &tokenizer, &options)
            .and_then(|template| template.render(messages, tools, case["prompt"].as_bool().unwrap()));
        let equal = match (&ours, case["text"].as_str()) {
            (Ok(ours), Some(theirs)) => ours == theirs,
            (Err(Error::Template { reason, .. }), None) => {
                let theirs = case["error"].as_str().unwrap();
                name != "snippet 22" || reason == theirs
            }
            _ => false,
        };
        if !equal {
            differences.push(format!(
                "{name}, {conversation}:\n  ours   {ours:?}\n  theirs {}",
                case["text"]
            ));
        }
    }
    assert!(
        differences.is_empty(),
        "{} differ\n{}",
        differences.len(),
        differences.join("\n")
    );
}

#[test]
fn err_names_the_line_of_the_template() {
    let line = |source: &str| match compile(source).and_then(|t| t.render(&json!([turn("user", "a")]), None, false)) {
        Err(Error::Template { origin, line, reason }) => {
            assert_eq!(origin, "inline");
            (line, reason)
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(
        line("a\n{{ raise_exception('no ' ~ messages[0].role) }}"),
        (2, "no user".into())
    );
    assert_eq!(line("\n\n{% for m in messages %}").0, 3);
    assert_eq!(line("{{ 1 }}\n{{ messages[0].gone.too }}").0, 2);
    assert_eq!(
        line("{% macro m() %}\n{{ raise_exception('inside') }}{% endmacro %}\n{{ m() }}"),
        (2, "inside".into())
    );
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert_eq!(
        line(endless),
        (1, "the template takes too much work: does it end?".into())
    );
    for print in ["ns.a", "ns.a | tojson", "ns.a | string", "{'k': ns.a}"] {
        let nested = format!(
            "{{% set ns = namespace(a=[]) %}}{{% for i in range(2000) %}}{{% set ns.a = [ns.a] %}}{{% endfor %}}\n{{{{ {print} }}}}"
        );
        assert_eq!(line(&nested).1, "a value is nested more than 200 deep");
    }
    let shown = compile("{{ raise_exception('x') }}")
        .unwrap()
        .render(&json!([]), None, true)
        .unwrap_err()
        .to_string();
    assert_eq!(shown, "inline:1: x");
}

/// Work is counted by what is written, so that a long conversation with large tools is no more than its length.
#[test]
fn long_conversations_and_large_tools_render() {
    let source = "{% for t in tools %}{{ t|tojson }}{{ t }}{{ '%s' % t }}{% endfor %}{% for m in messages %}{{ '<' ~ m.role ~ '>' }}{{ m.content }}{% endfor %}";
    let properties: Value = (0..400)
        .map(|i| (format!("p{i}"), json!({"type": "string", "n": i})))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let tools: Vec<Value> = (0..40)
        .map(|_| json!({"name": "f", "parameters": properties}))
        .collect();
    let messages: Vec<Value> = (0..5000).map(|_| turn("user", &"word ".repeat(40))).collect();
    let text = compile(source)
        .unwrap()
        .render(&json!(messages), Some(&json!(tools)), false)
        .unwrap();
    assert!(text.len() > 2_000_000);
}

#[test]
fn the_source_is_the_file_then_the_jinja_file_then_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let tokenizer = tokenizer();
    let text = |options: &TemplateOptions| {
        let template = ChatTemplate::from_dir(dir.path(), &tokenizer, options).unwrap()?;
        Some(template.render(&json!([]), None, false).unwrap())
    };
    let plain = TemplateOptions::default();
    assert_eq!(text(&plain), None);
    write("tokenizer_config.json", "{\"chat_template\": null}");
    assert_eq!(text(&plain), None);
    write(
        "tokenizer_config.json",
        "{\"chat_template\": \"from the configuration\"}",
    );
    assert_eq!(text(&plain).unwrap(), "from the configuration");
    write("chat_template.jinja", "from the jinja file");
    assert_eq!(text(&plain).unwrap(), "from the jinja file");
    write("mine.jinja", "from mine");
    let mine = TemplateOptions {
        file: Some(dir.path().join("mine.jinja")),
        ..plain.clone()
    };
    assert_eq!(text(&mine).unwrap(), "from mine");
    let gone = TemplateOptions {
        file: Some(dir.path().join("gone.jinja")),
        ..plain
    };
    assert!(matches!(
        ChatTemplate::from_dir(dir.path(), &tokenizer, &gone),
        Err(Error::Io { .. })
    ));
}

#[test]
fn named_variants_are_chosen() {
    let config = json!({"chat_template": [
        {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "rag"},
    ]});
    let tokenizer = tokenizer();
    let render = |name: Option<&str>, tools: Option<&Value>| {
        let options = TemplateOptions {
            name: name.map(str::to_string),
            ..TemplateOptions::default()
        };
        let template = ChatTemplate::from_config(&config, "config", &tokenizer, &options)?.unwrap();
        template.render(&json!([]), tools, false)
    };
    let tools = json!([{"name": "f"}]);
    assert_eq!(render(None, None).unwrap(), "plain");
    assert_eq!(render(None, Some(&tools)).unwrap(), "tools");
    assert_eq!(render(Some("rag"), Some(&tools)).unwrap(), "rag");
    assert_eq!(
        render(Some("gone"), None).unwrap_err().to_string(),
        "no chat template is called \"gone\"; there are: default, rag, tool_use"
    );
}

#[test]
fn keywords_reach_the_template_and_its_hash() {
    let tokenizer = tokenizer();
    let with = |kwargs: Value| {
        let options = TemplateOptions {
            kwargs: kwargs.as_object().unwrap().clone(),
            ..TemplateOptions::default()
        };
        ChatTemplate::from_source(
            "{{ depth }}{{ bos_token }}{{ pad_token }}",
            "inline",
            &tokenizer,
            &options,
        )
        .unwrap()
    };
    let (one, two) = (with(json!({"depth": 1})), with(json!({"depth": 2})));
    assert_eq!(one.render(&json!([]), None, false).unwrap(), "1<|im_start|><|im_end|>");
    assert_ne!(one.sha256(), two.sha256());
    assert_eq!(one.sha256(), with(json!({"depth": 1})).sha256());
}

#[test]
fn a_stream_never_breaks_a_character_and_loses_nothing() {
    let tokenizer = tokenizer();
    for text in [
        "Emma was there, and 🙂 漢字 é too.",
        " leading",
        "a",
        "\n\n",
        &"é🙂 word ".repeat(60),
    ] {
        let ids = tokenizer.encode(text).unwrap().ids;
        let mut stream = tokenizer.stream();
        let mut pieces = Vec::new();
        for id in &ids {
            pieces.extend(stream.push(*id).unwrap());
        }
        pieces.push(stream.finish().unwrap());
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        assert_eq!(pieces.concat(), text);
    }
    // Generation that stops inside a character says so.
    let ids = tokenizer.encode("🙂").unwrap().ids;
    assert!(ids.len() > 1);
    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(ids[0]).unwrap(), None);
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
}

/// The ids that mlx-lm's tokenizer gives for the same folder (`reference.json` beside the shared tiny model).
#[test]
fn golden_ids_of_mlx_lm() {
    let shared = std::path::Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../shared/models/tiny-llama-1m"
    ));
    if !shared.is_dir() {
        println!("not run: {} is not there", shared.display());
        return;
    }
    let reference = read_json(&shared.join("reference.json"));
    let tokenizer = Tokenizer::from_dir(shared).unwrap();
    for prompt in reference["prompts"].as_array().unwrap() {
        let text = prompt["text"].as_str().unwrap();
        assert_eq!(json!(tokenizer.encode_text(text).unwrap().ids), prompt["ids"], "{text}");
    }
}

#[test]
fn ends_of_text_come_from_all_three_files() {
    let bytes = std::fs::read(fixture("tiny/tokenizer.json")).unwrap();
    let build = |tokenizer_config: Value, generation: Value, model: Value| {
        Tokenizer::from_parts(
            "x".as_ref(),
            &bytes,
            Some(&tokenizer_config),
            Some(&generation),
            Some(&model),
        )
        .unwrap()
    };
    let all = build(
        json!({"eos_token": {"content": "<|im_end|>"}}),
        json!({"eos_token_id": [0, 5]}),
        json!({"eos_token_id": 7, "text_config": {"eos_token_id": 8}}),
    );
    assert_eq!(all.eos_ids().iter().copied().collect::<Vec<_>>(), [0, 2, 5, 7, 8]);
    assert_eq!(all.eos(), Some(2), "the tokenizer's own comes first");
    let model_only = build(json!({}), json!({}), json!({"eos_token_id": 7, "bos_token_id": 1}));
    assert_eq!((model_only.eos(), model_only.bos()), (Some(7), Some(1)));
    assert_eq!(build(json!({}), json!({}), json!({"eos_token_id": null})).eos(), None);
}

#[test]
fn the_beginning_of_text_follows_the_configuration() {
    let mut json = read_json(&fixture("tiny/tokenizer.json"));
    let build = |json: &Value, add_bos: Value| {
        let config = json!({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": add_bos});
        Tokenizer::from_parts("x".as_ref(), json.to_string().as_bytes(), Some(&config), None, None).unwrap()
    };
    let first = |tokenizer: &Tokenizer| tokenizer.encode_text("one").unwrap().ids[0];
    assert_eq!(first(&build(&json, json!(true))), 1);
    assert_ne!(first(&build(&json, json!(null))), 1);
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    });
    assert_eq!(first(&build(&json, json!(null))), 1);
    assert_ne!(first(&build(&json, json!(false))), 1);
    assert_ne!(
        build(&json, json!(null)).encode("one").unwrap().ids[0],
        1,
        "rendered text brings its own"
    );
}

#[test]
fn ranges_cover_the_text_whatever_the_file_switches_on() {
    let mut json = read_json(&fixture("tiny/tokenizer.json"));
    json["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    json["post_processor"] = json!({"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]});
    let tokenizer = Tokenizer::from_parts("x".as_ref(), json.to_string().as_bytes(), None, None, None).unwrap();
    let text = "one  two three é🙂 four";
    let encoded = tokenizer.encode(text).unwrap();
    let mut at = 0;
    for range in &encoded.ranges {
        assert!(
            range.start <= at && range.end >= at,
            "{range:?} leaves a gap after {at}"
        );
        at = range.end;
    }
    assert_eq!(at, text.len());
    assert_eq!(encoded.ids, self::tokenizer().encode(text).unwrap().ids);
}

#[test]
fn tokens_that_swallow_space_claim_only_their_mark() {
    let mut json = read_json(&fixture("tiny/tokenizer.json"));
    json["added_tokens"].as_array_mut().unwrap().push(json!({
        "id": 2048, "content": "<|end|>", "single_word": false, "lstrip": true, "rstrip": true, "normalized": false, "special": true
    }));
    let tokenizer = Tokenizer::from_parts("x".as_ref(), json.to_string().as_bytes(), None, None, None).unwrap();
    let encoded = tokenizer.encode("one <|end|>\n two").unwrap();
    let at = encoded.ids.iter().position(|id| *id == 2048).unwrap();
    assert_eq!(encoded.ranges[at], 4..11);
}

#[test]
fn err_broken_tokenizer_folders() {
    let dir = tempfile::tempdir().unwrap();
    let said = || Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(said().contains("tokenizer.json: there is no such file"));
    std::fs::write(dir.path().join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
    assert!(said().contains("tokenizer.json: not a tokenizer"));
    std::fs::copy(fixture("tiny/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(said().contains("tokenizer_config.json: not valid JSON"));
}
