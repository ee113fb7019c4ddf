//! Chat templates: Jinja as model folders write it, rendered the way Python's transformers renders it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind, context};
use regex::Regex;
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::python::{self, JsonStyle};
use crate::tokenizer::Tokenizer;

/// A model's chat template: turns a conversation into the text the model was trained on.
///
/// Templates see `messages`, `tools`, `add_generation_prompt`, the special tokens (`bos_token`, …), and the keywords of
/// [`TemplateOptions::kwargs`] and of the row. They may call `raise_exception`, `strftime_now` (UTC, fixed when the
/// template is loaded, so that one run sees one date) and `tojson` with Python's layout, and use Python's methods of
/// strings, lists and dictionaries.
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
    environment: Environment<'static>,
    origin: String,
    digest: String,
    /// A variant for conversations with tools, used when tools are given and no variant was asked for.
    has_tool_variant: bool,
    globals: BTreeMap<String, Value>,
}

/// Which template to use, and what to pass to it.
#[derive(Debug, Clone, Default)]
pub struct TemplateOptions {
    /// A template file that goes before the model's own.
    pub file: Option<std::path::PathBuf>,
    /// One of several named templates in `tokenizer_config.json`.
    pub name: Option<String>,
    /// Keywords for every row (`enable_thinking`, …); a row's own `template_kwargs` go before them.
    pub kwargs: Map<String, Json>,
    /// Seconds since 1970 that `strftime_now` shows; now, when absent. A resumed run passes the first run's value.
    pub now: Option<i64>,
}

const MAIN: &str = "chat";
const TOOL_VARIANT: &str = "tool_use";
/// Instructions that one rendering may take: thousands of messages need a hundredth of it, and it ends within a second.
const FUEL: u64 = 10_000_000;

impl ChatTemplate {
    /// Finds a folder's template: [`TemplateOptions::file`], else `chat_template.jinja`, else `tokenizer_config.json`.
    ///
    /// Gives nothing when the folder has none.
    pub fn from_dir(dir: &Path, tokenizer: &Tokenizer, options: &TemplateOptions) -> Result<Option<Self>> {
        if let Some(file) = &options.file {
            let source = std::fs::read_to_string(file).map_err(|error| Error::io(file, error))?;
            return Self::from_source(&source, &file.display().to_string(), tokenizer, options).map(Some);
        }
        let file = dir.join("chat_template.jinja");
        match std::fs::read_to_string(&file) {
            Ok(source) => return Self::from_source(&source, &file.display().to_string(), tokenizer, options).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(&file, error)),
        }
        let file = dir.join("tokenizer_config.json");
        let config = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice::<Json>(&bytes).map_err(|error| Error::Tokenizer {
                path: file.clone(),
                reason: format!("not valid JSON: {error}"),
                fix: "take the file from the model's source again",
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&file, error)),
        };
        Self::from_config(&config, &file.display().to_string(), tokenizer, options)
    }

    /// Takes the template out of a parsed `tokenizer_config.json`; `origin` is for errors.
    pub fn from_config(
        config: &Json,
        origin: &str,
        tokenizer: &Tokenizer,
        options: &TemplateOptions,
    ) -> Result<Option<Self>> {
        match config.get("chat_template") {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(source)) => Self::from_source(source, origin, tokenizer, options).map(Some),
            Some(Json::Array(list)) => {
                let named = |entry: &Json| {
                    let field = |name: &str| entry.get(name).and_then(Json::as_str).map(str::to_string);
                    Some((field("name")?, field("template")?))
                };
                let variants: BTreeMap<_, _> = list.iter().filter_map(named).collect();
                Self::from_variants(&variants, origin, tokenizer, options).map(Some)
            }
            Some(other) => Err(Error::Template {
                origin: origin.into(),
                line: 0,
                reason: format!(
                    "chat_template: expected a string or a list, found {}",
                    crate::json::describe(other)
                ),
            }),
        }
    }

    /// Compiles a template from its text; `origin` is for errors.
    pub fn from_source(source: &str, origin: &str, tokenizer: &Tokenizer, options: &TemplateOptions) -> Result<Self> {
        if let Some(name) = &options.name {
            return Err(Error::UnknownTemplateName {
                name: name.clone(),
                known: format!("only one, without a name, in {origin}"),
            });
        }
        let mut template = Self::new(origin, tokenizer, options)?;
        template.add(MAIN, source)?;
        Ok(template)
    }

    /// Renders a list of messages for generation (`add_generation_prompt`) or as it stands.
    pub fn render(&self, messages: &Json, tools: Option<&Json>, add_generation_prompt: bool) -> Result<String> {
        let messages = Value::from(Serde(messages));
        self.render_values(messages, &self.bind(tools, &Map::new()), add_generation_prompt)
    }

    /// Where the template came from.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// SHA-256 over source and keywords, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.digest
    }

    /// Everything but the messages, converted once for the several renderings of one row.
    pub(crate) fn bind(&self, tools: Option<&Json>, kwargs: &Map<String, Json>) -> Bound {
        let mut globals = self.globals.clone();
        for (name, value) in kwargs {
            globals.insert(name.clone(), Value::from(Serde(value)));
        }
        Bound {
            tools: tools.map_or(Value::from(()), |tools| Value::from(Serde(tools))),
            globals: Value::from_pairs(globals),
        }
    }

    pub(crate) fn render_values(&self, messages: Value, bound: &Bound, add_generation_prompt: bool) -> Result<String> {
        let with_tools = self.has_tool_variant && !bound.tools.is_none();
        let name = if with_tools { TOOL_VARIANT } else { MAIN };
        let context = context! {
            messages,
            tools => bound.tools.clone(),
            documents => (),
            add_generation_prompt,
            ..bound.globals.clone()
        };
        self.environment
            .get_template(name)
            .and_then(|template| template.render(context))
            .map_err(|error| template_error(&self.origin, &error))
    }

    fn from_variants(
        variants: &BTreeMap<String, String>,
        origin: &str,
        tokenizer: &Tokenizer,
        options: &TemplateOptions,
    ) -> Result<Self> {
        let wanted = options.name.as_deref().unwrap_or("default");
        let source = variants.get(wanted).ok_or_else(|| Error::UnknownTemplateName {
            name: wanted.into(),
            known: variants.keys().cloned().collect::<Vec<_>>().join(", "),
        })?;
        let mut template = Self::new(origin, tokenizer, options)?;
        template.add(MAIN, source)?;
        if let (None, Some(source)) = (&options.name, variants.get(TOOL_VARIANT)) {
            template.add(TOOL_VARIANT, source)?;
            template.has_tool_variant = true;
        }
        Ok(template)
    }

    fn new(origin: &str, tokenizer: &Tokenizer, options: &TemplateOptions) -> Result<Self> {
        let mut globals: BTreeMap<String, Value> = tokenizer
            .special_strings()
            .map(|(name, token)| (name.to_string(), Value::from(token)))
            .collect();
        globals.insert(
            "additional_special_tokens".into(),
            Value::from(tokenizer.additional_special().to_vec()),
        );
        for (name, value) in &options.kwargs {
            globals.insert(name.clone(), Value::from(Serde(value)));
        }
        let digest = crate::hex(&Sha256::digest(format!("{globals:?}")));
        let now = options.now.unwrap_or_else(seconds_now);
        Ok(Self {
            environment: environment(now).map_err(|error| template_error(origin, &error))?,
            origin: origin.into(),
            digest,
            has_tool_variant: false,
            globals,
        })
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<()> {
        self.digest = crate::hex(&Sha256::digest(format!("{}\0{name}\0{source}", self.digest)));
        self.environment
            .add_template_owned(name, plain_blocks(source))
            .map_err(|error| template_error(&self.origin, &error))
    }
}

/// The context of a row without its messages.
pub(crate) struct Bound {
    tools: Value,
    globals: Value,
}

fn environment(now: i64) -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| Ok(out.write_str(&python::text(value)?)?));
    environment.add_test("iterable", is_iterable);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: Value| python::text(&value));
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_function("strftime_now", move |format: String| strftime(now, &format));
    Ok(environment)
}

fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    if indent.is_some_and(|indent| indent > MAX_INDENT) {
        return Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("tojson: indent above {MAX_INDENT}"),
        ));
    }
    let style = JsonStyle {
        indent,
        separators: options
            .get::<Option<Vec<String>>>("separators")?
            .and_then(|pair| match &pair[..] {
                [comma, colon] => Some((comma.clone(), colon.clone())),
                _ => None,
            }),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    python::dumps(&value, &style)
}

/// Fuel does not see what a filter writes before it returns.
const MAX_INDENT: usize = 64;

/// As in Jinja2, where none is not iterable and texts are: templates ask it of `tools`.
fn is_iterable(value: &Value) -> bool {
    value.as_str().is_some() || (!value.is_none() && value.try_iter().is_ok())
}

fn strftime(now: i64, format: &str) -> Result<String, minijinja::Error> {
    let bad = |error: jiff::Error| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    let time = jiff::Timestamp::from_second(now)
        .map_err(bad)?
        .to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &time).map_err(bad)
}

fn seconds_now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs() as i64)
}

/// `{% generation %}` marks assistant text for trainers that mask by it; it renders its body and nothing else, which a
/// condition that always holds does too. The prefix rule finds the same text without the mark.
fn plain_blocks(source: &str) -> String {
    static OPEN: LazyLock<Regex> = LazyLock::new(|| pattern(r"\{%([-+]?)\s*generation\s*([-+]?)%\}"));
    static CLOSE: LazyLock<Regex> = LazyLock::new(|| pattern(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}"));
    let opened = OPEN.replace_all(source, "{%${1} if true ${2}%}");
    CLOSE.replace_all(&opened, "{%${1} endif ${2}%}").into_owned()
}

#[allow(clippy::expect_used)]
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern, compiled in every test of a template")
}

/// The innermost error knows the line; an error inside a macro is wrapped by the call.
fn template_error(origin: &str, error: &minijinja::Error) -> Error {
    let mut innermost = error;
    let mut source = std::error::Error::source(error);
    while let Some(next) = source {
        if let Some(next) = next.downcast_ref::<minijinja::Error>() {
            innermost = next;
        }
        source = next.source();
    }
    let line = innermost.line().or(error.line()).unwrap_or(0);
    let reason = match (innermost.kind(), innermost.detail()) {
        (ErrorKind::OutOfFuel, _) => "the template takes too much work: does it end?".to_string(),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    Error::Template {
        origin: origin.into(),
        line,
        reason,
    }
}
