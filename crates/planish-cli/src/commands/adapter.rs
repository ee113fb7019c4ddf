use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use planish_checkpoint::adapter::{Adapter, AdapterReport, BaseModel, Format, Method, ReadOptions, convert};
use planish_core::units::format_bytes;
use serde_json::json;

use crate::output;

/// Look at an adapter, or carry it between mlx-lm and PEFT
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print what an adapter changes and how strongly
    Show {
        /// Folder of the adapter
        dir: PathBuf,
        /// Print one JSON document
        #[arg(long)]
        json: bool,
    },
    /// Write an adapter in the other layout
    Convert {
        /// Folder of the adapter
        input: PathBuf,
        /// Folder to write; must not exist, or be empty
        out: PathBuf,
        /// The layout to write
        #[arg(long, value_name = "LAYOUT", value_parser = format_parser())]
        to: Format,
        /// Folder of the base model, to check names and shapes against
        #[arg(long, value_name = "DIR")]
        model: Option<PathBuf>,
        /// Go on although the base is another one, or an option of PEFT is unknown
        #[arg(long)]
        force: bool,
    },
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Show { dir, json } => {
            let (adapter, report) = Adapter::read(dir, &ReadOptions::default())?;
            if *json {
                output::line(&as_json(&adapter).to_string())?
            } else {
                show(&adapter)?
            }
            notes(&report);
            Ok(())
        }
        Command::Convert {
            input,
            out,
            to,
            model,
            force,
        } => {
            let base = model.as_deref().map(BaseModel::open).transpose()?;
            let options = ReadOptions {
                base: base.as_ref(),
                force: *force,
                ..ReadOptions::default()
            };
            notes(&convert(input, out, *to, &options)?);
            output::line(&out.display().to_string())
        }
    }
}

fn show(adapter: &Adapter) -> Result<()> {
    let (method, n_tensors) = (adapter.method.name(), adapter.tensors.len());
    output::line(&format!(
        "{method}, {n_tensors} tensors, {}",
        format_bytes(n_bytes(adapter))
    ))?;
    if adapter.method != Method::Full {
        let (rank, alpha, scale) = (adapter.rank, adapter.alpha(), adapter.scale);
        output::line(&format!(
            "rank {rank}, alpha {alpha}, scale {scale}, dropout {}",
            adapter.dropout
        ))?;
    }
    for module in adapter.modules() {
        output::line(module)?;
    }
    Ok(())
}

fn as_json(adapter: &Adapter) -> serde_json::Value {
    json!({
        "method": adapter.method.name(),
        "rank": adapter.rank,
        "alpha": adapter.alpha(),
        "scale": adapter.scale,
        "dropout": adapter.dropout,
        "tensors": adapter.tensors.len(),
        "bytes": n_bytes(adapter),
        "modules": adapter.modules(),
    })
}

fn n_bytes(adapter: &Adapter) -> u64 {
    adapter.tensors.values().map(|tensor| tensor.bytes.len() as u64).sum()
}

fn notes(report: &AdapterReport) {
    let text = report.to_string();
    if !text.trim().is_empty() {
        output::note(text.trim_end());
    }
}

fn format_parser() -> impl TypedValueParser<Value = Format> {
    let formats = [Format::MlxLm, Format::Peft];
    PossibleValuesParser::new(formats.map(Format::name)).map(move |word| {
        formats
            .into_iter()
            .find(|format| format.name() == word)
            .unwrap_or(Format::MlxLm)
    })
}
