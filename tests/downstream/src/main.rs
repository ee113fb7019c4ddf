//! Fine-tunes a model in one step through planish's public API: `cargo run -- MODEL DATA.jsonl OUT`, or on the tiny model
//! without arguments.

use std::error::Error;
use std::path::PathBuf;

use planish_data::{ChatTemplate, DataOptions, Dataset, TemplateOptions, Tokenizer};
use planish_nn::{LoadOptions, Model};
use planish_train::Trainer;
use planish_train::{Event, Length, TrainOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let mut paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if paths.is_empty() {
        let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let out = here.join("target/adapter");
        if out.exists() {
            std::fs::remove_dir_all(&out)?;
        }
        paths = vec![
            here.join("../../crates/planish-nn/tests/fixtures/tiny-llama-1m"),
            here.join("rows.jsonl"),
            out,
        ];
    }
    let [base, data, out] = paths.as_slice() else {
        return Err("expected MODEL DATA.jsonl OUT".into());
    };

    let tokenizer = Tokenizer::from_dir(base)?;
    let template = ChatTemplate::from_dir(base, &tokenizer, &TemplateOptions::default())?;
    let (rows, _) = Dataset::load(data, &tokenizer, template.as_ref(), &DataOptions::default())?;
    let (mut model, _) = Model::load(base, &LoadOptions::default())?;

    let options = TrainOptions {
        length: Length::Steps(1),
        ..TrainOptions::default()
    };
    let mut print = |event: &Event| {
        if let Event::Step(step) = event {
            println!("step {}: loss {:.3}", step.position.step, step.loss);
        }
    };
    let summary = Trainer::new(options, &rows, out).run(&mut model, &mut print)?;
    println!(
        "{} trained tokens, adapter in {}",
        summary.tokens,
        summary.out.display()
    );
    Ok(())
}
