//! Rust source as the checks need it: which characters are code, which lines are tests.
//!
//! A lexer and not a parser: it knows comments, literals and brackets, which is enough to count and to look for words.

use std::ops::Range;

/// One file, taken apart. All texts have the lines of the original.
pub(crate) struct Source {
    /// The code, its comments blank and the insides of its literals blank too.
    pub(crate) code: String,
    /// For each line: it belongs to an item under `#[cfg(test)]`.
    pub(crate) is_test: Vec<bool>,
}

/// A function outside tests.
pub(crate) struct Function {
    pub(crate) name: String,
    /// Lines (from 0) from `fn` to the closing bracket.
    pub(crate) lines: Range<usize>,
}

impl Source {
    pub(crate) fn read(text: &str) -> Self {
        let code = code_of(text);
        let is_test = test_lines(&code);
        Self { code, is_test }
    }

    /// Lines (from 0) of code that is no test.
    pub(crate) fn product_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code
            .lines()
            .enumerate()
            .filter(|(number, _)| !self.is_test.get(*number).copied().unwrap_or(false))
    }

    /// Functions with a body, methods and nested ones included.
    pub(crate) fn functions(&self) -> Vec<Function> {
        let mut found = Vec::new();
        for (at, word) in words(&self.code).filter(|(_, word)| *word == "fn") {
            let rest = &self.code[at + word.len()..];
            if !rest.starts_with(char::is_whitespace) {
                continue; // a pointer to a function
            }
            let Some(name) = words(rest).next().map(|(_, name)| name) else {
                continue;
            };
            let Some(body) = body_of(rest) else { continue };
            let line = |index: usize| self.code[..index].matches('\n').count();
            let start = line(at);
            if !self.is_test.get(start).copied().unwrap_or(false) {
                found.push(Function {
                    name: name.to_owned(),
                    lines: start..line(at + word.len() + body.end) + 1,
                });
            }
        }
        found
    }
}

/// Identifiers and keywords with their places.
pub(crate) fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    code.split(move |c| !is_word(c))
        .filter(|word| !word.is_empty())
        .map(move |word| (word.as_ptr() as usize - code.as_ptr() as usize, word))
}

/// The code with comments and the insides of literals blank.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let before = &text[..text.len() - rest.len()];
        let is_fresh = !before.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let len = match token(rest, is_fresh) {
            None => {
                code.push(first);
                first.len_utf8()
            }
            Some(token) => {
                // A literal is code, what it says is not.
                code.push(if token.is_comment { ' ' } else { '"' });
                blank(&rest[1..token.len], &mut code);
                token.len
            }
        };
        rest = &rest[len..];
    }
    code
}

/// Spaces for every character but the ends of lines.
fn blank(text: &str, code: &mut String) {
    code.extend(text.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
}

/// What is not plain code, with its length in bytes.
struct Token {
    is_comment: bool,
    len: usize,
}

/// The comment or literal at the start of `rest`; a literal's prefix counts only where no word runs on.
fn token(rest: &str, is_fresh: bool) -> Option<Token> {
    let comment = |len| Some(Token { is_comment: true, len });
    if rest.starts_with("//") {
        return comment(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return comment(block_comment(rest));
    }
    let len = if rest.starts_with('\'') {
        character(rest)?
    } else {
        string(rest, is_fresh)?
    };
    Some(Token { is_comment: false, len })
}

/// Length of a string literal with its prefix, such as `br#"…"#`.
fn string(rest: &str, is_fresh: bool) -> Option<usize> {
    let prefix = rest.len() - rest.trim_start_matches(['b', 'c', 'r']).len();
    if prefix > 2 || prefix > 0 && !is_fresh {
        return None;
    }
    let hashes = rest[prefix..].len() - rest[prefix..].trim_start_matches('#').len();
    let is_raw = rest[..prefix].contains('r');
    let start = prefix + hashes + 1;
    if !rest[prefix + hashes..].starts_with('"') || hashes > 0 && !is_raw {
        return None;
    }
    let end = if is_raw {
        let close = format!("\"{}", "#".repeat(hashes));
        rest[start..].find(&close).map(|at| start + at + close.len())
    } else {
        plain_end(&rest[start..]).map(|at| start + at + 1)
    };
    Some(end.unwrap_or(rest.len()))
}

/// Where the quote that ends a plain string is.
fn plain_end(text: &str) -> Option<usize> {
    let mut is_escaped = false;
    text.char_indices()
        .find(|(_, c)| {
            let ends = *c == '"' && !is_escaped;
            is_escaped = *c == '\\' && !is_escaped;
            ends
        })
        .map(|(at, _)| at)
}

/// Length of a character literal; `None` for a lifetime.
fn character(rest: &str) -> Option<usize> {
    let inside = &rest[1..];
    let first = inside.chars().next()?;
    if first == '\\' {
        return inside[2..].find('\'').map(|at| 1 + 2 + at + 1);
    }
    inside[first.len_utf8()..]
        .starts_with('\'')
        .then_some(1 + first.len_utf8() + 1)
}

/// Length of a block comment; they nest.
fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// For each line: does it belong to an item under `#[cfg(test)]`, or does the whole file?
fn test_lines(code: &str) -> Vec<bool> {
    let count = code.lines().count();
    if code.contains("#![cfg(test)]") {
        return vec![true; count];
    }
    let mut is_test = vec![false; count];
    for (at, _) in code.match_indices("#[cfg(test)]") {
        let end = at + item_end(&code[at..]);
        let line = |index: usize| code[..index].matches('\n').count();
        is_test[line(at)..=line(end).min(count - 1)].fill(true);
    }
    is_test
}

/// The end of the item that starts here: its body's closing bracket, or its semicolon.
fn item_end(code: &str) -> usize {
    let semicolon = code.find(';').unwrap_or(code.len());
    match body_of(code) {
        Some(body) => body.end,
        None => semicolon,
    }
}

/// The curly brackets that follow, unless a semicolon outside round and square brackets comes first.
pub(crate) fn body_of(code: &str) -> Option<Range<usize>> {
    let (mut depth, mut start, mut curly) = (0i32, None, 0);
    for (at, c) in code.char_indices() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            ';' if depth == 0 && start.is_none() => return None,
            '{' => {
                start.get_or_insert(at);
                curly += 1;
            }
            '}' => {
                curly -= 1;
                if curly == 0 {
                    return start.map(|start| start..at);
                }
                if curly < 0 {
                    return None;
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_no_code() {
        let source = Source::read("let a = \"x // \\\" y\"; // unsafe\n/* a /* b */ c */ let b = r#\"un\"safe\"#;\n");
        let words: Vec<&str> = words(&source.code).map(|(_, word)| word).collect();
        assert_eq!(words, ["let", "a", "let", "b"]);
    }

    #[test]
    fn lifetimes_are_no_characters() {
        let source = Source::read("fn f<'a>(x: &'a str) -> char { '\"' }\nfn g() { '\\'' }\nlet s = \"t\";");
        assert!(source.code.ends_with("let s = \"  ;"), "{}", source.code);
        assert_eq!(source.functions().len(), 2);
    }

    #[test]
    fn items_under_cfg_test_are_tests() {
        let source =
            Source::read("fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\n#[cfg(test)]\nuse x;\nfn c() {}\n");
        assert_eq!(source.is_test, [false, true, true, true, true, true, true, false]);
        let names: Vec<String> = source.functions().into_iter().map(|f| f.name).collect();
        assert_eq!(names, ["a", "c"]);
    }

    #[test]
    fn function_ends_at_its_own_bracket() {
        let source = Source::read("fn a(x: [u8; 4])\n{\n    if x { 1 }\n}\ntrait T { fn b(); }\n");
        let functions = source.functions();
        assert_eq!(functions.len(), 1);
        assert_eq!(functions[0].lines, 0..4);
    }
}
