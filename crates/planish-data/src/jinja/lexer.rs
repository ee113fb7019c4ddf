//! A template's text cut into tokens, by the rules of Jinja2 with `trim_blocks` and `lstrip_blocks`.

use super::Fault;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    /// Text outside of tags.
    Data(String),
    /// `{{`
    PrintBegin,
    /// `}}`
    PrintEnd,
    /// `{%`
    BlockBegin,
    /// `%}`
    BlockEnd,
    Name(String),
    Text(String),
    /// Decimal digits, of any number.
    Int(String),
    Float(f64),
    Operator(&'static str),
    End,
}

#[derive(Debug, Clone)]
pub(super) struct Located {
    pub(super) token: Token,
    pub(super) line: usize,
}

/// Longer ones first, so that the first that fits is the right one.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";",
];

/// Cuts a template; the last token is [`Token::End`].
pub(super) fn tokens(source: &str) -> Result<Vec<Located>, Fault> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer = Lexer {
        rest: &source,
        line: 1,
        line_start: true,
        tokens: Vec::new(),
    };
    while !lexer.rest.is_empty() {
        lexer.data()?;
    }
    lexer.push(Token::End);
    Ok(lexer.tokens)
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    /// What was read last ended a line.
    line_start: bool,
    tokens: Vec<Located>,
}

/// What a tag's first characters open.
enum Tag {
    Print,
    Block,
    Comment,
}

impl<'a> Lexer<'a> {
    /// Text up to the next tag, and that tag.
    fn data(&mut self) -> Result<(), Fault> {
        let Some(at) = next_tag(self.rest) else {
            let text = self.take(self.rest.len());
            self.push(Token::Data(text.into()));
            return Ok(());
        };
        let text = self.take(at);
        let tag = match self.rest.as_bytes()[1] {
            b'{' => Tag::Print,
            b'%' => Tag::Block,
            _ => Tag::Comment,
        };
        self.take(2);
        let sign = self.sign();
        let is_print = matches!(tag, Tag::Print);
        self.text_before(text, sign, is_print);
        match tag {
            Tag::Print => {
                self.push(Token::PrintBegin);
                self.expression("}}", Token::PrintEnd)
            }
            Tag::Comment => self.comment(),
            Tag::Block => match raw_begin(self.rest) {
                Some(length) => {
                    self.line_start = self.take(length).ends_with('\n');
                    self.raw()
                }
                None => {
                    self.push(Token::BlockBegin);
                    self.expression("%}", Token::BlockEnd)
                }
            },
        }
    }

    /// `-` and `+` at the start of a tag say what becomes of the white space before it.
    fn sign(&mut self) -> Option<u8> {
        let sign = self.rest.bytes().next().filter(|byte| matches!(byte, b'-' | b'+'));
        if sign.is_some() {
            self.take(1);
        }
        sign
    }

    /// Text before a tag, without the white space that the tag takes: a tag alone in its line takes the indentation.
    fn text_before(&mut self, text: &str, sign: Option<u8>, is_print: bool) {
        let kept = match sign {
            Some(b'-') => text.trim_end_matches(is_space),
            None if !is_print => {
                let start = text.rfind('\n').map_or(0, |at| at + 1);
                if (start > 0 || self.line_start) && text[start..].chars().all(is_space) {
                    &text[..start]
                } else {
                    text
                }
            }
            _ => text,
        };
        if !kept.is_empty() {
            self.push(Token::Data(kept.into()));
        }
    }

    fn comment(&mut self) -> Result<(), Fault> {
        let Some(end) = self.rest.find("#}") else {
            return Err(self.fault("a comment does not end: \"#}\" is missing"));
        };
        let sign = self.rest[..end].bytes().last();
        self.take(end);
        self.close("#}", sign);
        Ok(())
    }

    /// After the end of a tag: `-` takes all white space, nothing takes one line end, `+` takes none.
    fn close(&mut self, end: &str, sign: Option<u8>) {
        self.take(end.len());
        let more = match sign {
            Some(b'-') => self.rest.len() - self.rest.trim_start_matches(is_space).len(),
            Some(b'+') => 0,
            _ if end == "}}" => 0,
            _ => usize::from(self.rest.starts_with('\n')),
        };
        let taken = self.take(more);
        self.line_start = taken.ends_with('\n');
    }

    fn raw(&mut self) -> Result<(), Fault> {
        // The white space after `{% raw -%}` has been taken with the tag.
        let mut from = 0;
        loop {
            let Some(at) = self.rest[from..].find("{%").map(|at| from + at) else {
                return Err(self.fault("{% raw %} does not end: {% endraw %} is missing"));
            };
            let inside = &self.rest[at + 2..];
            let sign = inside.bytes().next().filter(|byte| matches!(byte, b'-' | b'+'));
            let name = inside[usize::from(sign.is_some())..].trim_start_matches(is_space);
            let after = name
                .strip_prefix("endraw")
                .map(|after| after.trim_start_matches(is_space));
            let (end_sign, after) = match after {
                Some(after) if after.starts_with("%}") => (None, after),
                Some(after) if after.starts_with("-%}") => (Some(b'-'), &after[1..]),
                Some(after) if after.starts_with("+%}") => (Some(b'+'), &after[1..]),
                _ => {
                    from = at + 2;
                    continue;
                }
            };
            let tag_length = self.rest.len() - at - after.len();
            let text = self.take(at);
            self.text_before(text, sign, false);
            self.take(tag_length);
            self.close("%}", end_sign);
            return Ok(());
        }
    }

    /// The tokens of a tag up to its end. Inside brackets the end does not count.
    fn expression(&mut self, end: &'static str, end_token: Token) -> Result<(), Fault> {
        let mut open: Vec<&str> = Vec::new();
        loop {
            let space = self.rest.len() - self.rest.trim_start_matches(is_space).len();
            self.take(space);
            if self.rest.is_empty() {
                return Err(self.fault(format!("a tag does not end: {end:?} is missing")));
            }
            if open.is_empty() {
                let sign = self
                    .rest
                    .bytes()
                    .next()
                    .filter(|byte| *byte == b'-' || (*byte == b'+' && end == "%}"));
                if self.rest[usize::from(sign.is_some())..].starts_with(end) {
                    self.push(end_token);
                    self.take(usize::from(sign.is_some()));
                    self.close(end, sign);
                    return Ok(());
                }
            }
            self.one(&mut open)?;
        }
    }

    fn one(&mut self, open: &mut Vec<&str>) -> Result<(), Fault> {
        let first = self.rest.chars().next().unwrap_or_default();
        if first.is_ascii_digit() {
            return self.number();
        }
        if first == '_' || first.is_alphabetic() {
            let length = self
                .rest
                .find(|c: char| c != '_' && !c.is_alphanumeric())
                .unwrap_or(self.rest.len());
            let name = self.take(length);
            self.push(Token::Name(name.into()));
            return Ok(());
        }
        if first == '"' || first == '\'' {
            return self.string(first);
        }
        let Some(operator) = OPERATORS.into_iter().find(|operator| self.rest.starts_with(operator)) else {
            return Err(self.fault(format!("unexpected character {first:?}")));
        };
        match operator {
            "(" => open.push(")"),
            "[" => open.push("]"),
            "{" => open.push("}"),
            ")" | "]" | "}" if open.pop() != Some(operator) => {
                return Err(self.fault(format!("unexpected {operator:?}")));
            }
            _ => {}
        }
        self.push(Token::Operator(operator));
        self.take(operator.len());
        Ok(())
    }

    fn number(&mut self) -> Result<(), Fault> {
        let based = [("0x", 16), ("0X", 16), ("0o", 8), ("0O", 8), ("0b", 2), ("0B", 2)]
            .into_iter()
            .find(|(prefix, _)| self.rest.starts_with(prefix));
        if let Some((_, base)) = based {
            let body = &self.rest[2..];
            let length = body.find(|c: char| c != '_' && !c.is_digit(base)).unwrap_or(body.len());
            let digits = body[..length].replace('_', "");
            let Ok(number) = i128::from_str_radix(&digits, base) else {
                return Err(self.fault(format!("{:?} is not a number", &self.rest[..length + 2])));
            };
            self.push(Token::Int(number.to_string()));
            self.take(length + 2);
            return Ok(());
        }
        let whole = digits(self.rest);
        let mut length = whole;
        let after_dot = self.rest[length..].strip_prefix('.').map_or(0, digits);
        // `1.e5` is no number, and in `list.0.name` the dot is an attribute's.
        let follows_dot = matches!(
            self.tokens.last(),
            Some(Located {
                token: Token::Operator("."),
                ..
            })
        );
        let mut is_float = after_dot > 0 && !follows_dot;
        if is_float {
            length += 1 + after_dot;
        }
        if !follows_dot && self.rest[length..].starts_with(['e', 'E']) {
            let exponent = &self.rest[length + 1..];
            let sign = usize::from(exponent.starts_with(['+', '-']));
            let size = digits(&exponent[sign..]);
            if size > 0 {
                length += 1 + sign + size;
                is_float = true;
            }
        }
        let text = self.rest[..length].replace('_', "");
        let token = if is_float {
            Token::Float(
                text.parse()
                    .map_err(|_| self.fault(format!("{text:?} is not a number")))?,
            )
        } else {
            Token::Int(text)
        };
        self.push(token);
        self.take(length);
        Ok(())
    }

    fn string(&mut self, quote: char) -> Result<(), Fault> {
        let mut escaped = false;
        let end = self.rest[1..].char_indices().find(|(_, character)| {
            let ends = !escaped && *character == quote;
            escaped = !escaped && *character == '\\';
            ends
        });
        let Some((length, _)) = end else {
            return Err(self.fault("a string does not end"));
        };
        let text = unescape(&self.rest[1..=length]).map_err(|message| self.fault(message))?;
        self.push(Token::Text(text));
        self.take(length + 2);
        Ok(())
    }

    fn take(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(length);
        self.line += taken.bytes().filter(|byte| *byte == b'\n').count();
        self.rest = rest;
        taken
    }

    fn push(&mut self, token: Token) {
        self.tokens.push(Located { token, line: self.line });
    }

    fn fault(&self, message: impl Into<String>) -> Fault {
        Fault {
            line: self.line,
            message: message.into(),
        }
    }
}

fn next_tag(text: &str) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = text[from..].find('{').map(|at| from + at) {
        if matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#')) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// The length of the rest of a `{% raw %}`, with the white space that `-%}` takes.
fn raw_begin(rest: &str) -> Option<usize> {
    let after = rest
        .trim_start_matches(is_space)
        .strip_prefix("raw")?
        .trim_start_matches(is_space);
    let after = match after.strip_prefix("-%}") {
        Some(after) => after.trim_start_matches(is_space),
        None => after.strip_prefix("%}")?,
    };
    Some(rest.len() - after.len())
}

/// Bytes of a run of digits with underscores between them.
fn digits(text: &str) -> usize {
    let end = text
        .find(|c: char| c != '_' && !c.is_ascii_digit())
        .unwrap_or(text.len());
    if text.starts_with('_') {
        0
    } else {
        text[..end].trim_end_matches('_').len()
    }
}

/// White space as Python's `\s` takes it.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

/// Python's escapes; an unknown one stays as it is written.
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(kind) = rest.chars().next() else {
            out.push('\\');
            break;
        };
        let body = &rest[kind.len_utf8()..];
        let plain = match kind {
            'n' => Some('\n'),
            't' => Some('\t'),
            'r' => Some('\r'),
            'a' => Some('\u{7}'),
            'b' => Some('\u{8}'),
            'f' => Some('\u{c}'),
            'v' => Some('\u{b}'),
            '\\' | '\'' | '"' => Some(kind),
            _ => None,
        };
        if let Some(character) = plain {
            out.push(character);
            rest = body;
        } else if kind == '\n' {
            rest = body;
        } else if let Some(size) = [('x', 2), ('u', 4), ('U', 8)]
            .iter()
            .find(|(name, _)| *name == kind)
            .map(|it| it.1)
        {
            let code = body.get(..size).and_then(|digits| u32::from_str_radix(digits, 16).ok());
            let character = code
                .and_then(char::from_u32)
                .ok_or_else(|| format!("\"\\{kind}\" must be followed by {size} hexadecimal digits of a character"))?;
            out.push(character);
            rest = &body[size..];
        } else if kind.is_digit(8) {
            let length = rest
                .bytes()
                .take(3)
                .take_while(|byte| (b'0'..=b'7').contains(byte))
                .count();
            out.extend(u32::from_str_radix(&rest[..length], 8).ok().and_then(char::from_u32));
            rest = &rest[length..];
        } else {
            out.push('\\');
            out.push(kind);
            rest = body;
        }
    }
    out.push_str(rest);
    Ok(out)
}
