//! `cargo xtask size`: how much code there is, and how much of it faces outwards without need.
//!
//! Counted are the Rust files that git tracks. A line of code holds something beside comments and the inside of a string.
//! A public item counts as used when its name occurs in another crate, its tests included: by name and not by path, so that
//! a common name hides an unused item, never the other way round. The crate's own tests do not count. Of the unused ones
//! those are needless that no public signature, field or variant of the crate mentions either: nobody could miss them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use crate::{
    repo,
    source::{Source, body_of, words},
};

/// No function is longer, from `fn` to its closing bracket.
pub(crate) const MAX_FUNCTION_LINES: usize = 100;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Count a commit instead of the working tree
    #[arg(long, value_name = "COMMIT")]
    at: Option<String>,
    /// List the needless public items
    #[arg(long)]
    list: bool,
}

/// What one crate, or all, add up to.
#[derive(Clone, Default)]
struct Size {
    code: usize,
    tests: usize,
    functions: usize,
    long_functions: Vec<String>,
    public: usize,
    unused: usize,
    needless: Vec<String>,
}

struct File {
    path: String,
    source: Source,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let files = read(args.at.as_deref())?;
    let sizes = measure(&files);
    println!(
        "{:<20} {:>7} {:>7} {:>10} {:>10} {:>9} {:>7} {:>7} {:>9}",
        "crate", "code", "tests", "tests/code", "functions", "over 100", "public", "unused", "needless"
    );
    for (name, size) in &sizes {
        println!("{}", size.row(name));
    }
    let mut all = Size::default();
    sizes.values().for_each(|size| all.add(size));
    println!("{}", all.row("all"));
    all.long_functions
        .iter()
        .for_each(|name| println!("over {MAX_FUNCTION_LINES} lines: {name}"));
    if args.list {
        all.needless.iter().for_each(|name| println!("needless: {name}"));
    }
    Ok(())
}

fn read(commit: Option<&str>) -> Result<Vec<File>> {
    let paths = match commit {
        None => repo::files()?,
        Some(commit) => repo::output_of(&["git", "ls-tree", "-r", "--name-only", commit])?
            .lines()
            .map(str::to_owned)
            .collect(),
    };
    let is_ours = |path: &String| path.ends_with(".rs") && crate_of(path).is_some();
    let read_one = |path: String| {
        let text = match commit {
            None => std::fs::read_to_string(repo::root().join(&path))?,
            Some(commit) => repo::output_of(&["git", "show", &format!("{commit}:{path}")])?,
        };
        let source = Source::read(&text);
        Ok(File { path, source })
    };
    paths.into_iter().filter(is_ours).map(read_one).collect()
}

/// The crate that a file belongs to, by its folder.
fn crate_of(path: &str) -> Option<&str> {
    match path.split('/').collect::<Vec<_>>().as_slice() {
        ["crates", name, ..] => Some(name),
        [name @ ("xtask" | "benches" | "examples" | "fuzz" | "tests"), ..] => Some(name),
        _ => None,
    }
}

/// Code that is part of a product, not of its tests, benches or examples.
fn is_product(path: &str) -> bool {
    ["/src/", "/build/"].iter().any(|folder| path.contains(folder)) && !path.starts_with("tests/")
        || path.ends_with("/build.rs")
}

fn measure(files: &[File]) -> BTreeMap<String, Size> {
    let mut sizes: BTreeMap<String, Size> = BTreeMap::new();
    let uses = Uses::of(files);
    for file in files {
        let Some(name) = crate_of(&file.path) else { continue };
        let size = sizes.entry(name.to_owned()).or_default();
        let lines = file.source.code.lines().filter(|line| !line.trim().is_empty()).count();
        if !is_product(&file.path) {
            size.tests += lines;
            continue;
        }
        let product = file.source.product_lines().filter(|(_, line)| !line.trim().is_empty());
        let code = product.count();
        size.code += code;
        size.tests += lines - code;
        let functions = file.source.functions();
        size.functions += functions.len();
        let long = functions.iter().filter(|f| f.lines.len() > MAX_FUNCTION_LINES);
        size.long_functions
            .extend(long.map(|f| format!("{}:{} {}", file.path, f.lines.start + 1, f.name)));
        for (line, item) in public_items(&file.source) {
            size.public += 1;
            if uses.is_outside(name, item) {
                continue;
            }
            size.unused += 1;
            if !uses.mentioned.contains(&(name, item)) {
                size.needless.push(format!("{}:{} {item}", file.path, line + 1));
            }
        }
    }
    sizes
}

/// Names of public items, with their lines.
fn public_items(source: &Source) -> impl Iterator<Item = (usize, &str)> {
    const KINDS: [&str; 8] = ["fn", "struct", "enum", "trait", "const", "static", "type", "mod"];
    source.product_lines().filter_map(|(number, line)| {
        let rest = line.trim_start().strip_prefix("pub ")?;
        let mut words = words(rest).map(|(_, word)| word).peekable();
        while words
            .next_if(|word| matches!(*word, "unsafe" | "async" | "extern"))
            .is_some()
        {}
        let kind = words.next().filter(|word| KINDS.contains(word))?;
        // `const fn` names a function.
        if kind == "const" {
            words.next_if(|word| *word == "fn");
        }
        Some((number, words.next()?))
    })
}

/// The words of a public declaration, the declared name left out: the signature, or the variants of an enum and the
/// methods of a trait.
fn declaration(code: &str) -> impl Iterator<Item = &str> {
    const KINDS: [&str; 11] = [
        "pub", "fn", "struct", "enum", "trait", "const", "static", "type", "mod", "unsafe", "async",
    ];
    let is_open = ["pub enum ", "pub trait "].iter().any(|kind| code.starts_with(kind));
    let end = match is_open {
        true => body_of(code).map(|body| body.end),
        false => code.find(['{', ';']),
    };
    words(&code[..end.unwrap_or(code.len())])
        .map(|(_, word)| word)
        .skip_while(|word| KINDS.contains(word))
        .skip(1)
}

/// A field's declaration ends with its line, every other one where `declaration` sees it.
fn declared(code: &str) -> &str {
    let line = code.lines().next().unwrap_or(code);
    let is_field =
        line.ends_with(',') && words(line).nth(2).is_some() && line[4..].split(':').next().is_some_and(is_name);
    if is_field { line } else { code }
}

fn is_name(text: &str) -> bool {
    text.chars().all(|c| c.is_alphanumeric() || c == '_')
}

/// Who says a word.
struct Uses<'a> {
    /// For each word the crates that say it, tests included.
    crates: BTreeMap<&'a str, BTreeSet<&'a str>>,
    /// Crate and word of what public declarations mention.
    mentioned: BTreeSet<(&'a str, &'a str)>,
}

impl<'a> Uses<'a> {
    fn of(files: &'a [File]) -> Self {
        let mut uses = Self {
            crates: BTreeMap::new(),
            mentioned: BTreeSet::new(),
        };
        for file in files {
            let Some(name) = crate_of(&file.path) else { continue };
            for (_, word) in words(&file.source.code) {
                uses.crates.entry(word).or_default().insert(name);
            }
            if is_product(&file.path) {
                let starts = file.source.code.match_indices("pub ");
                let said = starts.flat_map(|(at, _)| declaration(declared(&file.source.code[at..])));
                uses.mentioned.extend(said.map(|word| (name, word)));
            }
        }
        uses
    }

    fn is_outside(&self, krate: &str, item: &str) -> bool {
        let crates = self.crates.get(item);
        crates.is_some_and(|crates| crates.iter().any(|name| *name != krate))
    }
}

impl Size {
    fn add(&mut self, other: &Self) {
        self.code += other.code;
        self.tests += other.tests;
        self.functions += other.functions;
        self.long_functions.extend_from_slice(&other.long_functions);
        self.public += other.public;
        self.unused += other.unused;
        self.needless.extend_from_slice(&other.needless);
    }

    fn row(&self, name: &str) -> String {
        format!(
            "{name:<20} {:>7} {:>7} {:>10.2} {:>10} {:>9} {:>7} {:>7} {:>9}",
            self.code,
            self.tests,
            self.tests as f64 / self.code.max(1) as f64,
            self.functions,
            self.long_functions.len(),
            self.public,
            self.unused,
            self.needless.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> File {
        File {
            path: path.into(),
            source: Source::read(text),
        }
    }

    #[test]
    fn code_tests_and_items_are_counted_apart() {
        let files = [
            file(
                "crates/a/src/lib.rs",
                "//! Doc.\n\npub fn used() {}\npub const fn alone() {}\n#[cfg(test)]\nmod tests {\n}\n",
            ),
            file("crates/b/src/lib.rs", "fn f() { a::used(); } // alone\n"),
        ];
        let sizes = measure(&files);
        let a = &sizes["a"];
        assert_eq!((a.code, a.tests, a.functions, a.public), (2, 3, 2, 2));
        assert_eq!(a.needless, ["crates/a/src/lib.rs:4 alone"]);
    }

    #[test]
    fn use_in_the_own_tests_does_not_count() {
        let in_tests_of = |name: &str| {
            let user = file(&format!("crates/{name}/tests/it/main.rs"), "use a::Tried;\n");
            measure(&[file("crates/a/src/lib.rs", "pub struct Tried;\n"), user])["a"].unused
        };
        assert_eq!((in_tests_of("a"), in_tests_of("b")), (1, 0));
    }

    #[test]
    fn type_that_a_public_declaration_mentions_is_not_needless() {
        let text = "pub struct A {\n    pub b: B,\n}\npub struct B;\npub enum C {\n    D(E),\n}\npub struct E;\n\
            pub fn f(\n    a: A,\n) -> C {}\n";
        let sizes = measure(&[file("crates/a/src/lib.rs", text)]);
        assert_eq!(
            (sizes["a"].unused, &sizes["a"].needless),
            (5, &vec!["crates/a/src/lib.rs:9 f".to_owned()])
        );
    }
}
