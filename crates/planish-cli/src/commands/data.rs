use std::io::{BufWriter, IsTerminal};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use planish_core::fs::AtomicFile;
use planish_core::model_config::ModelConfig;
use planish_core::run_config::RunConfig;
use planish_data::{DataOptions, DataReport, Shown, ShownKind, SplitFiles, score_file, show, survey};

use crate::data::{self, Text};
use crate::output;

/// Look at training data
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Summarise a data file and print rows as training sees them; trained text is coloured, or in [brackets] without colour
    Show {
        /// Folder with train.jsonl, or one file
        data: PathBuf,
        /// Folder of the model, whose tokenizer and chat template decide
        #[arg(long, value_name = "DIR")]
        model: PathBuf,
        /// Rows to print
        #[arg(long, value_name = "N", default_value_t = 3)]
        rows: usize,
        /// Set a key of the configuration, such as data.train_roles=user,assistant; may be repeated
        #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
        assignments: Vec<String>,
    },
    /// Add provenance scores (a keyword heuristic) to rows that have none
    Score {
        /// JSONL file
        file: PathBuf,
        /// File to write instead of standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Show {
            data,
            model,
            rows,
            assignments,
        } => show_rows(data, model, *rows, assignments),
        Command::Score { file, out } => score_rows(file, out.as_deref()),
    }
}

fn score_rows(file: &Path, out: Option<&Path>) -> Result<()> {
    let max_line_bytes = DataOptions::default().max_line_bytes;
    let report = match out {
        None => score_file(file, &mut std::io::stdout().lock(), max_line_bytes)?,
        Some(out) => {
            let failed = || format!("cannot write {}", out.display());
            let mut scored = BufWriter::new(AtomicFile::create(out).with_context(failed)?);
            let report = score_file(file, &mut scored, max_line_bytes)?;
            let written = scored
                .into_inner()
                .map_err(std::io::IntoInnerError::into_error)
                .and_then(AtomicFile::commit);
            written.with_context(failed)?;
            report
        }
    };
    output::note(&format!(
        "{} rows: {} scored by keywords, {} by their evidence, {} kept theirs, {} too short to say anything",
        report.rows, report.heuristic, report.evidence, report.kept, report.too_short
    ));
    for (label, rows) in &report.labels_without_prior {
        output::note(&format!("warning: source_type {label:?} ({rows} rows) has no prior"));
    }
    Ok(())
}

fn show_rows(data: &Path, model: &Path, rows: usize, assignments: &[String]) -> Result<()> {
    let mut builder = RunConfig::builder();
    for assignment in assignments {
        builder = builder.set(assignment)?;
    }
    let config = builder.build()?;
    let context = ModelConfig::from_file(&model.join("config.json"))?.max_position_embeddings;
    let options = data::options(&config, data::max_seq_length(config.train.max_seq_length, context)?)?;
    let text = Text::configured(model, &config, None)?;
    let file = if data.is_dir() {
        let files = SplitFiles::find(data)?;
        for file in &files.unread {
            output::note(&format!("warning: {}: not a split, not read", file.display()));
        }
        files.train
    } else {
        data.to_path_buf()
    };
    let report = survey(&file, &text.tokenizer, text.template.as_ref(), &options)?;
    summarise(&report);
    for row in show(&file, &text.tokenizer, text.template.as_ref(), &options, rows)? {
        match row {
            Ok(shown) => print(&shown)?,
            Err(error) => output::line(&format!("error: {error}\n"))?,
        }
    }
    let (faulty, rows) = (report.skipped.len(), report.rows);
    match report.skipped.first() {
        Some(first) => bail!("{faulty} of {rows} rows are faulty; the first: {first}"),
        None => Ok(()),
    }
}

/// What the whole file holds; beside the rows, so that these can be read by a program.
fn summarise(report: &DataReport) {
    output::note(&format!("{}: {}", report.path.display(), data::describe(report)));
    let lengths = &report.lengths;
    output::note(&format!(
        "{} examples of {} to {} tokens (median {}, 90 % up to {}); {} of {} tokens are trained",
        report.examples, lengths.min, lengths.max, lengths.median, lengths.p90, report.targets, report.tokens
    ));
    let cut = 100.0 * report.share_of_targets_lost();
    output::note(&format!(
        "{cut:.2} % of the trained tokens are cut; {} rows repeat an earlier one",
        report.duplicates
    ));
    for warning in report.warnings() {
        output::note(&format!("warning: {warning}"));
    }
    output::note("");
}

fn print(shown: &Shown) -> Result<()> {
    let cut = shown.ids.len() - shown.n_kept;
    output::line(&format!(
        "line {}  {}  {} tokens, {} trained{}{}",
        shown.line,
        shown.format,
        shown.n_kept,
        shown.n_targets,
        if cut > 0 {
            format!(", {cut} beyond the limit")
        } else {
            String::new()
        },
        control_tokens(shown)
    ))?;
    let on_terminal = std::io::stdout().is_terminal();
    let coloured = on_terminal && std::env::var_os("NO_COLOR").is_none();
    let marked: String = shown
        .spans
        .iter()
        .map(|span| {
            let text = &shown.text[span.bytes.clone()];
            if on_terminal {
                mark(&output::visible(text), span.kind, coloured)
            } else {
                mark(text, span.kind, coloured)
            }
        })
        .collect();
    output::line(&format!("{marked}\n"))
}

/// Control tokens that stand inside messages, with the bytes at which they are.
fn control_tokens(shown: &Shown) -> String {
    let named = |range: &Range<usize>| format!("{:?} at byte {}", &shown.text[range.clone()], range.start);
    let named: Vec<String> = shown.foreign.iter().map(named).collect();
    if named.is_empty() {
        String::new()
    } else {
        format!(", control tokens inside messages: {}", named.join(", "))
    }
}

/// Green for trained, faint for what is cut off; brackets and braces without colours.
fn mark(text: &str, kind: ShownKind, coloured: bool) -> String {
    match (kind, coloured) {
        (ShownKind::Context, _) => text.to_string(),
        (ShownKind::Trained, true) => format!("\x1b[32m{text}\x1b[0m"),
        (ShownKind::BeyondLimit, true) => format!("\x1b[2m{text}\x1b[0m"),
        (ShownKind::Trained, false) => format!("[{text}]"),
        (ShownKind::BeyondLimit, false) => format!("{{{text}}}"),
    }
}
