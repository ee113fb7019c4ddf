//! Takes the user's name and home out of whatever leaves the machine.

/// Whose traces to remove.
#[derive(Debug, Clone, Default)]
pub struct Redactor {
    /// Home directory.
    pub home: Option<String>,
    /// Login name.
    pub user: Option<String>,
}

impl Redactor {
    /// The text with the home directory as `~` and the user as `<user>`.
    ///
    /// ```
    /// let redactor = metal_check::redact::Redactor { home: Some("/u/ada".into()), user: Some("ada".into()) };
    /// assert_eq!(redactor.redact("/u/ada/x by ada, adamant"), "~/x by <user>, adamant");
    /// ```
    pub fn redact(&self, text: &str) -> String {
        let mut text = text.to_owned();
        if let Some(home) = self.home.as_deref().filter(|home| home.len() > 1) {
            text = replace_whole(&text, home.trim_end_matches('/'), "~");
        }
        match self.user.as_deref().filter(|user| user.len() > 1 && *user != "root") {
            Some(user) => replace_whole(&text, user, "<user>"),
            None => text,
        }
    }
}

/// Replaces where no letter or digit touches the match.
fn replace_whole(text: &str, needle: &str, with: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(needle) {
        let (before, after) = (&rest[..at], &rest[at + needle.len()..]);
        let touches = before.chars().next_back().is_some_and(char::is_alphanumeric)
            || after.chars().next().is_some_and(char::is_alphanumeric);
        out.push_str(before);
        out.push_str(if touches { needle } else { with });
        rest = after;
    }
    out + rest
}
