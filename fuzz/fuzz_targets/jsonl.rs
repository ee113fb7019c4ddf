//! Any bytes as a data file.
#![no_main]

use std::io::Write;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use planish_data::{ChatTemplate, DataOptions, Dataset, TemplateOptions, Tokenizer};

static MODEL: LazyLock<(Tokenizer, ChatTemplate)> = LazyLock::new(|| {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/planish-data/tests/it/fixtures/tiny").as_ref();
    let tokenizer = Tokenizer::from_dir(dir).expect("the fixture is there");
    let template = ChatTemplate::from_dir(dir, &tokenizer, &TemplateOptions::default()).expect("it has a template");
    (tokenizer, template.expect("it has a template"))
});

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("room for it");
    let (tokenizer, template) = &*MODEL;
    let _ = Dataset::load(file.path(), tokenizer, Some(template), &DataOptions::default());
});
