//! The page: facts, curves, answers, data, configuration.

use std::fmt::Write;
use std::time::Duration;

use planish_core::units::{format_bytes, format_duration};
use serde_json::Value;

use super::chart::{Chart, Look};
use super::run::{Run, Weighted};

/// Colours that the style sheet has.
const COLOURS: usize = 6;

/// One HTML document about some runs, which needs no other file.
pub(crate) fn page(runs: &[Run]) -> String {
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let title = escaped(&names.join(", "));
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, \
         initial-scale=1\">\n<title>{title}</title>\n<style>{}</style>\n<h1>{title}</h1>\n",
        include_str!("style.css")
    );
    html.push_str(&what_it_was(runs));
    section(&mut html, "Result", &facts(runs));
    section(&mut html, "Curves", &curves(runs));
    section(&mut html, "Answers before and after", &answers(runs));
    section(&mut html, "Refused and unusual updates", &guards(runs));
    section(&mut html, "Data", &data(runs));
    section(&mut html, "Configuration", &configuration(runs));
    html.push_str("</html>\n");
    html
}

/// Text as it can stand in HTML and in attributes.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn section(html: &mut String, title: &str, content: &str) {
    if !content.is_empty() {
        let _ = write!(html, "<section>\n<h2>{title}</h2>\n{content}</section>\n");
    }
}

/// One line a run; the legend of the curves where there are several.
fn what_it_was(runs: &[Run]) -> String {
    let line = |run: &Run| {
        let plan = run.plan();
        let word = |value: &Value| value.as_str().map(str::to_owned);
        let parts = [
            word(&plan["model"]).map(|model| last_name(&model)),
            word(&plan["backend"]),
            plan["versions"]["planish"]
                .as_str()
                .map(|version| format!("planish {version}")),
            plan["versions"]["mlx"].as_str().map(|version| format!("MLX {version}")),
        ];
        escaped(&parts.into_iter().flatten().collect::<Vec<_>>().join(" · "))
    };
    if let [run] = runs {
        return format!("<p class=\"soft\">{}</p>\n", line(run));
    }
    let mut html = String::from("<ul class=\"legend\">");
    for (index, run) in runs.iter().enumerate() {
        let colour = index % COLOURS;
        let _ = write!(
            html,
            "<li><i class=\"run{colour}\"></i>{} <span class=\"soft\">{}</span></li>",
            escaped(&run.name),
            line(run)
        );
    }
    html.push_str("</ul>\n");
    html
}

fn facts(runs: &[Run]) -> String {
    type Fact = (&'static str, fn(&Run) -> Option<String>);
    let rows: [Fact; 14] = [
        ("Ended", |run| {
            run.end()["reason"]
                .as_str()
                .map(|reason| reason.replace('_', " "))
                .or(Some("not yet".into()))
        }),
        ("Updates", |run| {
            let done = run
                .of_kind("train")
                .last()
                .map_or(0, |line| line["step"].as_u64().unwrap_or(0));
            Some(format!("{done} of {}", run.plan()["total_steps"]))
        }),
        ("Training loss", training_loss),
        ("Validation loss, before → best", |run| {
            let first = run.of_kind("eval").next()?["val_loss"].as_f64()?;
            let last = run.of_kind("eval").last()?;
            let best_step = last["best_step"].as_u64()?;
            let best = run.of_kind("eval").filter(|line| line["step"] == best_step).last()?["val_loss"].as_f64()?;
            let is_worse = best_step == 0 && run.of_kind("eval").count() > 1;
            let worse = if is_worse {
                ": every later evaluation was worse"
            } else {
                ""
            };
            Some(format!("{first:.4} → {best:.4} at update {best_step}{worse}"))
        }),
        ("Last validation loss", |run| {
            let last = run.of_kind("eval").last()?;
            last["val_loss"]
                .is_null()
                .then(|| format!("not finite, at update {}", last["step"]))
        }),
        ("Perplexity, before → best", |run| {
            let first = run.of_kind("eval").next()?["val_ppl"].as_f64()?;
            let values = run.of_kind("eval").filter_map(|line| line["val_ppl"].as_f64());
            Some(format!("{first:.3} → {:.3}", values.fold(f64::INFINITY, f64::min)))
        }),
        ("Held-out pairs, margin and right", |run| {
            let last = run.of_kind("eval").last()?;
            let (margin, right) = (last["reward_margin"].as_f64()?, last["reward_accuracy"].as_f64()?);
            Some(format!("{margin:.3}, {:.0} %", 100.0 * right))
        }),
        ("Adapter kept", |run| {
            Some(format!("of update {}", run.end()["adapter_step"].as_u64()?))
        }),
        ("Trained numbers", |run| {
            let (trained, total) = (run.plan()["trainable"].as_f64()?, run.plan()["total"].as_f64()?);
            let rank = run.plan()["rank"].as_u64().filter(|rank| *rank > 0);
            let rank = rank.map(|rank| format!(", rank {rank}, scale {}", run.plan()["scale"]));
            Some(format!(
                "{trained} of {total} ({:.2} %){}",
                100.0 * trained / total,
                rank.unwrap_or_default()
            ))
        }),
        ("Trained tokens", |run| {
            Some(run.of_kind("train").last()?["tokens"].to_string())
        }),
        ("Trained tokens a second, median", |run| {
            Some(format!("{:.0}", median(run.series("train", "tokens_per_second"))?))
        }),
        ("Peak memory of MLX", |run| {
            let peaks = run
                .of_kind("train")
                .filter_map(|line| line["peak_memory_bytes"].as_u64());
            peaks.max().map(format_bytes)
        }),
        ("Time", |run| {
            let last = run
                .of_kind("end")
                .chain(run.of_kind("train"))
                .filter_map(|line| line["elapsed_seconds"].as_f64());
            Some(format_duration(
                Duration::try_from_secs_f64(last.fold(0.0, f64::max)).ok()?,
            ))
        }),
        ("Updates left out", |run| {
            run.end()["skipped_steps"]
                .as_u64()
                .filter(|n| *n > 0)
                .map(|n| n.to_string())
        }),
    ];
    table(
        runs,
        rows.iter()
            .map(|(name, fact)| ((*name).to_owned(), runs.iter().map(fact).collect())),
    )
}

/// Means over whole epochs, which have the same rows; of the whole run where there are fewer than two.
fn training_loss(run: &Run) -> Option<String> {
    let epochs = run.epoch_losses();
    let whole = run.of_kind("train").last()?["epoch"].as_f64()? as usize;
    if whole >= 2 && epochs.len() >= whole {
        return Some(format!(
            "{:.4} in the first epoch → {:.4} in the last",
            epochs[0].mean()?,
            epochs[whole - 1].mean()?
        ));
    }
    Some(format!(
        "{:.4}, mean of the run",
        epochs.into_iter().sum::<Weighted>().mean()?
    ))
}

fn curves(runs: &[Run]) -> String {
    let number: fn(f64) -> String = |x| short(x);
    let charts = [
        ("Training loss", "train", "loss", number, Look::Noisy, false),
        ("Validation loss", "eval", "val_loss", number, Look::Dots, false),
        (
            "Reward margin of the pairs trained",
            "train",
            "reward_margin",
            number,
            Look::Noisy,
            false,
        ),
        (
            "Reward margin of held-out pairs",
            "eval",
            "reward_margin",
            number,
            Look::Dots,
            false,
        ),
        ("Weighted loss", "train", "loss_weighted", number, Look::Noisy, false),
        ("Learning rate", "train", "lr", number, Look::Plain, true),
        (
            "Gradient norm before clipping",
            "train",
            "grad_norm",
            number,
            Look::Noisy,
            true,
        ),
        (
            "Trained tokens a second",
            "train",
            "tokens_per_second",
            number,
            Look::Noisy,
            true,
        ),
        (
            "Peak memory of MLX",
            "train",
            "peak_memory_bytes",
            |x| format_bytes(x.max(0.0) as u64),
            Look::Plain,
            true,
        ),
    ];
    let mut html = String::new();
    for (title, kind, field, format, look, from_zero) in charts {
        let chart = Chart {
            title: title.to_owned(),
            format,
            lines: runs.iter().map(|run| run.series(kind, field)).collect(),
            look,
            from_zero,
        };
        if let Some(svg) = chart.svg() {
            let _ = writeln!(
                html,
                "<figure class=\"card\" style=\"margin:0\"><h3>{title}</h3>{svg}</figure>"
            );
        }
    }
    if html.is_empty() {
        return html;
    }
    format!("<div class=\"cards\">\n{html}</div>\n<p class=\"soft\">Over updates.</p>\n")
}

fn answers(runs: &[Run]) -> String {
    let mut html = String::new();
    let mut prompts: Vec<&Value> = Vec::new();
    for sample in runs.iter().flat_map(|run| run.of_kind("sample")) {
        if !prompts.contains(&&sample["prompt"]) {
            prompts.push(&sample["prompt"]);
        }
    }
    for prompt in prompts {
        let mut rows = vec![("Prompt".to_owned(), text_of(prompt))];
        for (index, run) in runs.iter().enumerate() {
            let of_run = || run.of_kind("sample").filter(|sample| sample["prompt"] == *prompt);
            let whose = if runs.len() > 1 {
                format!(", {}", run.name)
            } else {
                String::new()
            };
            let answer = |when: &str| of_run().filter(|sample| sample["when"] == when).last();
            if let Some(expected) = of_run().next().filter(|_| index == 0) {
                rows.push(("In the data".to_owned(), text_of(&expected["expected"])));
            }
            for when in ["before", "after"] {
                if let Some(sample) = answer(when) {
                    let label = if when == "before" { "Before" } else { "After" };
                    rows.push((format!("{label}{whose}"), text_of(&sample["text"])));
                }
            }
        }
        let rows: String = rows
            .iter()
            .map(|(label, text)| format!("<dt>{}</dt><dd class=\"say\">{}</dd>", escaped(label), escaped(text)))
            .collect();
        let _ = writeln!(
            html,
            "<div class=\"card stacked\"><dl class=\"sample\">{rows}</dl></div>"
        );
    }
    html
}

fn guards(runs: &[Run]) -> String {
    let mut rows = String::new();
    for run in runs {
        for guard in run.of_kind("guard") {
            let places: Vec<String> = guard["rows"].as_array().into_iter().flatten().map(text_of).collect();
            let _ = write!(
                rows,
                "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escaped(&run.name),
                guard["step"],
                if guard["reason"] == "spike" {
                    "gradient far above usual"
                } else {
                    "not finite: left out"
                },
                escaped(&places.join(", "))
            );
        }
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "<div class=\"card wide\"><table><thead><tr><th>Run</th><th>Update</th><th>What</th><th>Rows</th></tr></thead>{rows}</table></div>\n"
    )
}

fn data(runs: &[Run]) -> String {
    let rows = [
        ("Rows", "rows"),
        ("Format", "format"),
        ("Examples", "examples"),
        ("Tokens", "tokens"),
        ("Trained tokens", "trained_tokens"),
        ("Median length in tokens", "length_median"),
        ("Nine of ten are no longer than", "length_p90"),
        ("Longest", "length_max"),
        ("Rows that were cut", "truncated_rows"),
        ("Faulty rows left out", "skipped_rows"),
        ("Rows that repeat", "duplicates"),
    ];
    let mut html = String::new();
    for (split, title) in [("train", "Training"), ("valid", "Validation")] {
        let of = |run: &Run, field: &str| run.plan()["data"][split].get(field).map(text_of);
        if runs.iter().all(|run| of(run, "rows").is_none()) {
            continue;
        }
        let rows = rows
            .iter()
            .map(|(name, field)| ((*name).to_owned(), runs.iter().map(|run| of(run, field)).collect()));
        let _ = writeln!(html, "<div><h3>{title}</h3>{}</div>", table(runs, rows));
    }
    let shapes = |run: &Run| {
        let shapes = run.plan()["shapes"].as_array()?.iter();
        let shapes: Vec<String> = shapes
            .map(|s| format!("{} × {} ({} times)", s[0], s[1], s[2]))
            .collect();
        Some(shapes.join(", "))
    };
    let padding = |run: &Run| Some(format!("{:.1} %", 100.0 * run.plan()["padding_fraction"].as_f64()?));
    let plan = [
        ("Shapes of an epoch".to_owned(), runs.iter().map(shapes).collect()),
        ("Padding".to_owned(), runs.iter().map(padding).collect()),
    ];
    let _ = writeln!(html, "<div><h3>Batches</h3>{}</div>", table(runs, plan.into_iter()));
    // Columns for several runs want the whole width.
    let class = if runs.len() > 1 { "stack" } else { "cards" };
    format!("<div class=\"{class}\">\n{html}</div>\n")
}

fn configuration(runs: &[Run]) -> String {
    let mut html = String::new();
    if runs.len() > 1 {
        let settings: Vec<Vec<(String, String)>> = runs.iter().map(Run::settings).collect();
        let mut keys: Vec<&String> = Vec::new();
        for (key, _) in settings.iter().flatten() {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let value = |of: &[(String, String)], key: &str| {
            of.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
        };
        let rows = keys
            .into_iter()
            .map(|key| (key.clone(), settings.iter().map(|of| value(of, key)).collect()));
        let differing =
            rows.filter(|(_, values): &(String, Vec<Option<String>>)| values.iter().any(|v| *v != values[0]));
        let _ = write!(html, "<p>What differs:</p>\n{}", table(runs, differing));
    }
    for run in runs {
        if let Some(config) = &run.config {
            let open = if runs.len() == 1 { " open" } else { "" };
            let _ = writeln!(
                html,
                "<div class=\"card stacked\"><details{open}><summary>{} · config.toml</summary><pre>{}</pre></details></div>",
                escaped(&run.name),
                escaped(config.trim_end())
            );
        }
    }
    html
}

/// A row a figure, a column a run; rows that no run has are left out.
fn table(runs: &[Run], rows: impl Iterator<Item = (String, Vec<Option<String>>)>) -> String {
    let mut body = String::new();
    for (name, values) in rows.filter(|(_, values)| values.iter().any(Option::is_some)) {
        let cells = values.iter().map(|value| escaped(value.as_deref().unwrap_or("–")));
        let cells: String = cells.map(|cell| format!("<td>{cell}</td>")).collect();
        let _ = write!(body, "<tr><th>{}</th>{cells}</tr>", escaped(&name));
    }
    if body.is_empty() {
        return body;
    }
    let several = runs.len() > 1;
    let names = runs.iter().map(|run| format!("<th>{}</th>", escaped(&run.name)));
    let head = several.then(|| format!("<thead><tr><th></th>{}</tr></thead>", names.collect::<String>()));
    let class = if several { "compared" } else { "facts" };
    format!(
        "<div class=\"card wide\"><table class=\"{class}\">{}{body}</table></div>",
        head.unwrap_or_default()
    )
}

fn median(points: Vec<(f64, Option<f64>)>) -> Option<f64> {
    let mut values: Vec<f64> = points.into_iter().filter_map(|(_, value)| value).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Three digits that matter, large and small numbers as powers of ten.
fn short(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        size if !(1e-3..1e5).contains(&size) => format!("{x:.0e}"),
        size if size >= 1000.0 => format!("{x:.0}"),
        _ => {
            let text = format!("{x:.4}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
    }
}

fn last_name(path: &str) -> String {
    let name = std::path::Path::new(path).file_name();
    name.map_or_else(|| path.to_owned(), |name| name.to_string_lossy().into_owned())
}

fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
