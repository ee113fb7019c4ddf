//! What is remarkable in a row that can be used: said once for all rows that have it.

/// A remark about one row, worded so that rows with the same remark can be counted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Note {
    pub(crate) kind: NoteKind,
    /// What follows "N rows: ".
    pub(crate) text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum NoteKind {
    /// Something that the row says is not in its text; refused where the run is strict.
    Lost,
    /// The row was read in another way than it is written.
    Read,
    /// What training sees differs from what a server would send.
    Prompt,
    /// Control tokens inside messages.
    Control,
}

impl Note {
    fn new(kind: NoteKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }

    /// A field that changes nothing in the text.
    pub(crate) fn lost(field: &str) -> Self {
        Self::new(NoteKind::Lost, format!("the chat template does not write {field}"))
    }

    /// A field of the row that nothing reads.
    pub(crate) fn unread(field: &str) -> Self {
        Self::new(NoteKind::Lost, format!("nothing reads the field {field:?}"))
    }

    /// A content of which only some is in the text.
    pub(crate) fn partial(field: &str) -> Self {
        Self::new(NoteKind::Read, format!("the chat template writes {field} only in part"))
    }

    pub(crate) fn role(written: &str, read: &str) -> Self {
        Self::new(NoteKind::Read, format!("the role {written:?} is read as {read:?}"))
    }

    pub(crate) fn no_prompt(turn: usize) -> Self {
        let text = format!(
            "turn {turn} has no prompt and is not trained: the chat template refuses the conversation before it"
        );
        Self::new(NoteKind::Prompt, text)
    }

    pub(crate) fn prompt_differs(more: &str) -> Self {
        let text = format!(
            "the generation prompt ends with {more:?}, which a finished turn does not have: prompts at generation differ by it from what is trained"
        );
        Self::new(NoteKind::Prompt, text)
    }

    pub(crate) fn control_tokens() -> Self {
        let text =
            "control tokens inside messages act as control tokens; data.control_tokens = \"text\" encodes them as text";
        Self::new(NoteKind::Control, text)
    }

    pub(crate) fn control_tokens_as_text() -> Self {
        Self::new(NoteKind::Control, "control tokens inside messages are encoded as text")
    }
}
