//! `docs/configuration.md`, written from the table of settings in `planish-core`.

use anyhow::{Context, Result};
use planish_core::run_config::RunConfig;

use crate::repo;

/// Where the page is, relative to the root.
pub(crate) const PATH: &str = "docs/configuration.md";

const HEAD: &str = "# Configuration of a run

<!-- Written by `cargo xtask docs` from crates/planish-core/src/run_config.rs: change it there. -->

Every key can stand in `run.toml` (`planish train --config run.toml`) and on the command line (`--set section.key=value`).
A flag wins over `--set`, `--set` over the file, the file over the default. An unknown key is an error that names the
nearest known one. `planish train --print-config` prints all of them with their values.
";

/// Writes the page.
pub(crate) fn write() -> Result<()> {
    let path = repo::root().join(PATH);
    planish_core::fs::write_atomic(&path, page().as_bytes()).with_context(|| format!("cannot write {PATH}"))
}

/// Whether the page in the repository is the one that the table gives.
pub(crate) fn is_current() -> bool {
    std::fs::read_to_string(repo::root().join(PATH)).is_ok_and(|text| text == page())
}

fn page() -> String {
    let mut page = HEAD.to_string();
    for (section, doc) in RunConfig::sections() {
        page.push_str(&format!(
            "\n## `[{section}]`\n\n{doc}\n\n| key | default | accepts | meaning |\n|---|---|---|---|\n"
        ));
        for key in RunConfig::keys().iter().filter(|key| key.section == section) {
            let default = key
                .default
                .as_ref()
                .map_or_else(|| "unset".to_string(), |value| format!("`{value}`"));
            let (name, expected, doc) = (key.name, &key.expected, &key.doc);
            page.push_str(&format!(
                "| `{name}` | {default} | {} | {} |\n",
                in_cell(expected),
                in_cell(doc)
            ));
        }
    }
    page
}

fn in_cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_a_row_for_every_key() {
        let page = page();
        for key in RunConfig::keys() {
            assert!(page.contains(&format!("\n| `{}` | ", key.name)), "{}", key.name);
        }
        assert!(page.contains("| `rank` | `8` | a whole number |"));
    }
}
