//! Turns the bytes of a log into lines that can be compared: escapes off, frames off, numbers kept.

use regex::Regex;
use std::sync::LazyLock;

/// One line of a log as a person reads it.
///
/// Several may share a `number`: a progress bar overwrites its line with carriage returns, and a Rust panic prints a whole
/// diagnostic in one line with literal `\n` inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Number in the original file, from 1, counted by line feeds.
    pub number: usize,
    /// Text without escape sequences, log frames and trailing white space.
    pub text: String,
}

/// The lines of a log: lossy UTF-8 (or UTF-16 with a mark), CRLF, lone CR, colour codes and time stamps removed.
///
/// Leading `# expect:` and `# source:` lines, which collections of logs carry as labels, are left out.
///
/// ```
/// let lines = metal_check::text::clean(b"10%\r100%\r\n\x1b[31merror:\x1b[0m no device\r\n");
/// assert_eq!(lines.iter().map(|l| (l.number, l.text.as_str())).collect::<Vec<_>>(), [(1, "10%"), (1, "100%"), (2, "error: no device")]);
/// ```
pub fn clean(bytes: &[u8]) -> Vec<Line> {
    let text = decode(bytes);
    let mut lines = Vec::new();
    let mut labels = true;
    for (index, raw) in text.split('\n').enumerate() {
        labels &= raw.trim().is_empty() || is_label(raw);
        if labels {
            continue;
        }
        for piece in raw
            .split('\r')
            .filter(|piece| !piece.trim().is_empty())
            .flat_map(split_literal_newlines)
        {
            lines.push(Line {
                number: index + 1,
                text: strip_frame(&strip_escapes(&piece)),
            });
        }
        if raw.trim().is_empty() {
            lines.push(Line {
                number: index + 1,
                text: String::new(),
            });
        }
    }
    while lines.last().is_some_and(|line| line.text.is_empty()) {
        lines.pop();
    }
    lines
}

/// The same text with every quotation mark written `"`, so that one rule fits every compiler's locale and Rust's `{:?}`.
pub(crate) fn unify_quotes(text: &str) -> String {
    let mut unified = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\\' if matches!(characters.peek(), Some('"' | '\'')) => {}
            '\'' | '`' | '‘' | '’' | '“' | '”' | '´' => unified.push('"'),
            other => unified.push(other),
        }
    }
    unified
}

fn decode(bytes: &[u8]) -> String {
    match bytes {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        [0xef, 0xbb, 0xbf, rest @ ..] => String::from_utf8_lossy(rest).into_owned(),
        _ => String::from_utf8_lossy(bytes).into_owned(),
    }
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units: Vec<u16> = bytes.chunks_exact(2).map(|pair| unit([pair[0], pair[1]])).collect();
    String::from_utf16_lossy(&units)
}

fn is_label(raw: &str) -> bool {
    let raw = raw.trim_start();
    raw.starts_with("# expect:") || raw.starts_with("# source:")
}

/// A panic message printed with `{:?}` holds the whole diagnostic in one line; each `\n` in it begins a line of its own.
fn split_literal_newlines(raw: &str) -> Vec<String> {
    static QUOTED_NEWLINE: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\\r\\n|\\n").ok());
    match QUOTED_NEWLINE.as_ref() {
        Some(newline) if raw.contains("\\n") && raw.contains('"') => newline.split(raw).map(str::to_owned).collect(),
        _ => vec![raw.to_owned()],
    }
}

fn strip_escapes(raw: &str) -> String {
    static ESCAPES: LazyLock<Option<Regex>> = LazyLock::new(|| {
        // CSI · OSC up to BEL or ST · two-byte escapes · colour codes whose escape byte was lost on the way.
        Regex::new(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_()][0-9A-B]?|\^\[\[[0-9;]*m|\[[0-9]{1,3}(?:;[0-9]{1,3})*m").ok()
    });
    let text = match ESCAPES.as_ref() {
        Some(escapes) if raw.contains(['\x1b', '[']) => escapes.replace_all(raw, "").into_owned(),
        _ => raw.to_owned(),
    };
    text.replace('\t', "    ")
        .chars()
        .filter(|character| !character.is_control())
        .collect()
}

/// Takes off what programs that run other programs print before each line: a time, a job, a quote sign.
fn strip_frame(text: &str) -> String {
    static FRAME: LazyLock<Option<Regex>> = LazyLock::new(|| {
        Regex::new(concat!(
            r"^(?:",
            r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?(?:\s|$)", // CI time stamps
            r"|\[?\d\d:\d\d:\d\d(?:[.,]\d+)?(?:AM|PM)?\]?(?:\s|$)",                        // clock
            r"|\[\s*\+?\d+\.\d+s?\]\s",                                                    // seconds since start
            r"|\[(?:stderr|stdout|err|out)\]\s",
            r"|\[[a-z][a-z0-9_-]* v?\d+\.\d+\.\d+[^\]]*\](?:\s|$)", // cargo -vv: [mlx-sys 0.7.0]
            r"|#\d+ \d+\.\d+ ",                                     // docker build
            r"|(?:[a-zA-Z][\w.-]*)\s*(?:> |\| )",                   // nix, compose: name> text
            r"|##\[(?:error|group|endgroup|debug|command|section)\]|::(?:error|notice|group)(?: [^:]*)?::",
            r"|warning: [a-zA-Z][\w-]*@\d+\.\d+\.\d+\S*: ", // cargo relays a build script
            r"|cargo:{1,2}(?:warning|error)=",
            r"|\(\w+ pid=\d+\)\s",
            r"|E {3,}", // pytest
            r"|> )"
        ))
        .ok()
    });
    let mut text = text.trim_end();
    if let Some(frame) = FRAME.as_ref() {
        for _ in 0..4 {
            let Some(found) = frame.find(text) else { break };
            text = &text[found.end()..];
        }
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(bytes: &[u8]) -> Vec<String> {
        clean(bytes).into_iter().map(|line| line.text).collect()
    }

    #[test]
    fn colours_links_and_crlf_are_off() {
        assert_eq!(
            texts(b"\x1b[1;31merror\x1b[0m: a\r\n\x1b]8;;http://x\x07b\x1b]8;;\x07\r\n"),
            ["error: a", "b"]
        );
        assert_eq!(texts(b"[31merror:[0m lost escape"), ["error: lost escape"]);
    }

    #[test]
    fn frames_are_off() {
        for framed in [
            "2026-03-01T10:00:00.1234567Z ##[error]boom",
            "[mlx-sys 0.7.0] boom",
            "warning: mlx-sys@0.7.0: boom",
            "#12 34.5 boom",
            "mlx> boom",
        ] {
            assert_eq!(texts(framed.as_bytes()), ["boom"], "{framed}");
        }
    }

    #[test]
    fn ordinary_brackets_and_colons_stay() {
        for line in [
            "[METAL] Command buffer",
            "[metal::Device] x",
            "[ 10%] Building",
            "ld: warning: y",
            "  3 | let x",
        ] {
            assert_eq!(texts(line.as_bytes()), [line]);
        }
    }

    #[test]
    fn panic_text_with_literal_newlines_is_several_lines_of_one_number() {
        let lines = clean(b"x\nwhat: \"one\\ntwo\"\n");
        assert_eq!(
            lines[1..]
                .iter()
                .map(|l| (l.number, l.text.as_str()))
                .collect::<Vec<_>>(),
            [(2, "what: \"one"), (2, "two\"")]
        );
    }

    #[test]
    fn labels_are_cut_off_only_at_the_top() {
        assert_eq!(
            texts(b"# expect: X\n# source: y\na\n# expect: z\n"),
            ["a", "# expect: z"]
        );
    }

    #[test]
    fn utf16_and_bad_utf8_are_read() {
        assert_eq!(texts(&[0xff, 0xfe, b'a', 0, b'b', 0]), ["ab"]);
        assert_eq!(texts(b"a\xffb"), ["a\u{fffd}b"]);
    }

    #[test]
    fn quotes_are_one_kind() {
        assert_eq!(unify_quotes(r#"‘a’ `b` \"c\" 'd'"#), r#""a" "b" "c" "d""#);
    }
}
