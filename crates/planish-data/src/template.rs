//! Chat templates: Jinja as model folders write it, rendered the way Python's transformers renders it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map as SerdeMap, Value as Json};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::jinja::{Fault, Name, Template, Value};
use crate::json::{self, Map};
use crate::tokenizer::{Tokenizer, optional_json};

/// A model's chat template: turns a conversation into the text the model was trained on.
///
/// Templates see `messages`, `tools`, `add_generation_prompt`, the special tokens (`bos_token`, …), and the keywords of
/// [`TemplateOptions::kwargs`] and of the row. They may call `raise_exception`, `strftime_now` (UTC, fixed when the
/// template is loaded, so that one run sees one date) and `tojson` with Python's layout; everything else is Jinja2's and
/// Python's. Null keys of messages are dropped, and thoughts (`reasoning_content`, `thinking`, `reasoning`) are found
/// under the name that the template reads, as in transformers 5.
///
/// # Errors
/// [`Error::Template`] names the source and the line of the template.
///
/// # Example
/// ```
/// use planish_data::{ChatTemplate, TemplateOptions, Tokenizer};
/// # let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fixtures/tiny").as_ref();
/// let tokenizer = Tokenizer::from_dir(dir)?;
/// let template = ChatTemplate::from_dir(dir, &tokenizer, &TemplateOptions::default())?.unwrap();
/// let messages = serde_json::json!([{"role": "user", "content": "Hi"}]);
/// let prompt = template.render(&messages, None, true)?;
/// assert_eq!(prompt, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
/// # Ok::<(), planish_data::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    main: Arc<Template>,
    /// A variant for conversations with tools, used when tools are given and no variant was asked for.
    for_tools: Option<Arc<Template>>,
    origin: String,
    digest: String,
    now: i64,
    globals: BTreeMap<String, json::Value>,
}

/// Which template to use, and what to pass to it.
#[derive(Debug, Clone, Default)]
pub struct TemplateOptions {
    /// A template file that goes before the model's own.
    pub file: Option<std::path::PathBuf>,
    /// One of several named templates.
    pub name: Option<String>,
    /// Keywords for every row (`enable_thinking`, …); a row's own `template_kwargs` go before them.
    pub kwargs: SerdeMap<String, Json>,
    /// Seconds since 1970 that `strftime_now` shows; now, when absent. A resumed run passes the first run's value.
    pub now: Option<i64>,
}

/// What a template without a name is called among named ones.
const DEFAULT: &str = "default";
const TOOL_VARIANT: &str = "tool_use";
/// Templates in files of their own, by name.
const MORE_TEMPLATES: &str = "additional_chat_templates";

impl ChatTemplate {
    /// Finds a folder's template: [`TemplateOptions::file`], else `chat_template.jinja` with `additional_chat_templates/`,
    /// else `tokenizer_config.json`.
    ///
    /// Gives nothing when the folder has none.
    pub fn from_dir(dir: &Path, tokenizer: &Tokenizer, options: &TemplateOptions) -> Result<Option<Self>> {
        if let Some(file) = &options.file {
            let source = std::fs::read_to_string(file).map_err(|error| Error::io(file, error))?;
            return Self::from_source(&source, &file.display().to_string(), tokenizer, options).map(Some);
        }
        let file = dir.join("tokenizer_config.json");
        let config = optional_json(&file)?.unwrap_or_default();
        let mut origin = file.display().to_string();
        let mut variants = variants_of(&config, &origin)?;
        let file = dir.join("chat_template.jinja");
        if let Some(source) = optional_text(&file)? {
            variants.insert(DEFAULT.into(), source);
            origin = file.display().to_string();
        }
        variants.extend(more_templates(&dir.join(MORE_TEMPLATES))?);
        Self::from_variants(&variants, &origin, tokenizer, options)
    }

    /// Takes the template out of a parsed `tokenizer_config.json`; `origin` is for errors.
    pub fn from_config(
        config: &Json,
        origin: &str,
        tokenizer: &Tokenizer,
        options: &TemplateOptions,
    ) -> Result<Option<Self>> {
        Self::from_variants(&variants_of(config, origin)?, origin, tokenizer, options)
    }

    /// Compiles a template from its text; `origin` is for errors.
    pub fn from_source(source: &str, origin: &str, tokenizer: &Tokenizer, options: &TemplateOptions) -> Result<Self> {
        if let Some(name) = &options.name {
            return Err(Error::UnknownTemplateName {
                name: name.clone(),
                known: format!("only one, without a name, in {origin}"),
            });
        }
        Self::compile(source, None, origin, tokenizer, options)
    }

    /// Renders a list of messages for generation (`add_generation_prompt`) or as it stands.
    pub fn render(&self, messages: &Json, tools: Option<&Json>, add_generation_prompt: bool) -> Result<String> {
        let values = messages.as_array().into_iter().flatten().map(|message| match message {
            Json::Object(fields) => message_value(&json::from_serde_map(fields)),
            other => Value::from_json(&other.into()),
        });
        let tools = tools.map(json::Value::from);
        self.render_values(
            values.collect(),
            &self.bind(tools.as_ref(), &Map::new()),
            add_generation_prompt,
        )
    }

    /// Renders the `messages` and `tools` of a row of JSON, with every digit of its numbers.
    ///
    /// # Errors
    /// [`Error::Plan`] where the text is not a JSON object; [`Error::Template`].
    pub fn render_row(&self, row: &str, add_generation_prompt: bool) -> Result<String> {
        let row = json::parse_object(row, true).map_err(|fault| Error::plan(fault.message, fault.fix))?;
        let messages = row.get("messages").and_then(json::Value::as_array);
        let values = messages.into_iter().flatten().map(|message| match message {
            json::Value::Object(fields) => message_value(fields),
            other => Value::from_json(other),
        });
        let bound = self.bind(row.get("tools").filter(|tools| !tools.is_null()), &Map::new());
        self.render_values(values.collect(), &bound, add_generation_prompt)
    }

    /// Where the template came from.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// SHA-256 over source and keywords, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.digest
    }

    /// The special token that ends an assistant's turn, where the template writes one.
    ///
    /// Generation should stop there, and exports should say so: see [`with_end_tokens`](crate::with_end_tokens).
    pub fn turn_end(&self, tokenizer: &Tokenizer) -> Option<u32> {
        // Two conversations, since some templates want a system text and others refuse one.
        let turn = |role: &str| serde_json::json!({"role": role, "content": "a"});
        [
            vec![turn("user"), turn("assistant")],
            vec![turn("system"), turn("user"), turn("assistant")],
        ]
        .into_iter()
        .filter_map(|messages| self.render(&Json::Array(messages), None, false).ok())
        .find_map(|text| Some(tokenizer.special_suffix(text.trim_end())?.0))
    }

    /// Everything but the messages, converted once for the several renderings of one row.
    pub(crate) fn bind(&self, tools: Option<&json::Value>, kwargs: &Map) -> Bound {
        let mut globals: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, value) in self.globals.iter().chain(kwargs) {
            globals.insert(name, Value::from_json(value));
        }
        Bound {
            has_tools: tools.is_some(),
            tools: tools.map_or(Value::None, Value::from_json),
            globals: globals.into_iter().map(|(name, value)| (name.into(), value)).collect(),
        }
    }

    pub(crate) fn render_values(
        &self,
        messages: Vec<Value>,
        bound: &Bound,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let fault = |fault: Fault| Error::Template {
            origin: self.origin.clone(),
            line: fault.line,
            reason: fault.message,
        };
        let template = self
            .for_tools
            .as_ref()
            .filter(|_| bound.has_tools)
            .unwrap_or(&self.main);
        let mut variables = bound.globals.clone();
        let own = [
            ("messages", Value::from_items(messages)),
            ("tools", bound.tools.clone()),
            ("documents", Value::None),
            ("add_generation_prompt", Value::Bool(add_generation_prompt)),
        ];
        variables.retain(|(name, _)| own.iter().all(|(own, _)| **own != **name));
        variables.extend(own.map(|(name, value)| (name.into(), value)));
        template.render(variables, self.now).map_err(fault)
    }

    fn from_variants(
        variants: &BTreeMap<String, String>,
        origin: &str,
        tokenizer: &Tokenizer,
        options: &TemplateOptions,
    ) -> Result<Option<Self>> {
        if variants.is_empty() {
            return Ok(None);
        }
        let wanted = options.name.as_deref().unwrap_or(DEFAULT);
        let source = variants.get(wanted).ok_or_else(|| Error::UnknownTemplateName {
            name: wanted.into(),
            known: variants.keys().cloned().collect::<Vec<_>>().join(", "),
        })?;
        let for_tools = variants.get(TOOL_VARIANT).filter(|_| options.name.is_none());
        Self::compile(source, for_tools, origin, tokenizer, options).map(Some)
    }

    fn compile(
        source: &str,
        for_tools: Option<&String>,
        origin: &str,
        tokenizer: &Tokenizer,
        options: &TemplateOptions,
    ) -> Result<Self> {
        let parse = |source: &str| match Template::parse(source) {
            Ok(template) => Ok(Arc::new(template)),
            Err(Fault { line, message }) => Err(Error::Template {
                origin: origin.into(),
                line,
                reason: message,
            }),
        };
        let mut globals: BTreeMap<String, json::Value> = tokenizer
            .special_strings()
            .map(|(name, token)| (name.to_string(), token.into()))
            .collect();
        let additional = tokenizer.additional_special().iter().map(|token| token.as_str().into());
        globals.insert(
            "additional_special_tokens".into(),
            json::Value::Array(additional.collect()),
        );
        globals.extend(json::from_serde_map(&options.kwargs));
        let digest = Sha256::digest(format!("{globals:?}\0{source}\0{for_tools:?}"));
        Ok(Self {
            main: parse(source)?,
            for_tools: for_tools.map(|source| parse(source)).transpose()?,
            origin: origin.into(),
            digest: crate::hex(&digest),
            now: options.now.unwrap_or_else(seconds_now),
            globals,
        })
    }
}

/// The context of a row without its messages.
pub(crate) struct Bound {
    has_tools: bool,
    tools: Value,
    globals: Vec<(Name, Value)>,
}

/// Names for what a model thought before it answered; the first is the one that most templates read.
pub(crate) const THOUGHTS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message as transformers 5 hands it to a template: without null keys, and with its thoughts under both names.
pub(crate) fn message_value(fields: &Map) -> Value {
    let mut fields: Map = fields
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    if let Some(thoughts) = THOUGHTS.iter().find_map(|name| fields.get(*name).cloned()) {
        if !fields.contains_key("thinking") {
            fields.shift_insert(0, "thinking".into(), thoughts.clone());
        }
        fields.insert("reasoning_content".into(), thoughts);
    }
    Value::from_json(&json::Value::Object(fields))
}

/// The templates of a `tokenizer_config.json`, by name.
fn variants_of(config: &Json, origin: &str) -> Result<BTreeMap<String, String>> {
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(BTreeMap::new()),
        Some(Json::String(source)) => Ok(BTreeMap::from([(DEFAULT.into(), source.clone())])),
        Some(Json::Array(list)) => {
            let named = |entry: &Json| {
                let field = |name: &str| entry.get(name).and_then(Json::as_str).map(str::to_string);
                Some((field("name")?, field("template")?))
            };
            Ok(list.iter().filter_map(named).collect())
        }
        Some(other) => Err(Error::Template {
            origin: origin.into(),
            line: 0,
            reason: format!(
                "chat_template: expected a string or a list, found {}",
                json::describe(&other.into())
            ),
        }),
    }
}

/// `NAME.jinja` files of a folder, which need not be there.
fn more_templates(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut templates = BTreeMap::new();
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(templates),
        Err(error) => return Err(Error::io(dir, error)),
    };
    for entry in entries {
        let path = entry.map_err(|error| Error::io(dir, error))?.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        if let (Some(name), true) = (name, path.extension().is_some_and(|end| end == "jinja")) {
            templates.extend(optional_text(&path)?.map(|source| (name.to_string(), source)));
        }
    }
    Ok(templates)
}

fn optional_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_start_matches('\u{feff}').into())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path, error)),
    }
}

fn seconds_now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs() as i64)
}
