/// What can be wrong with the facts handed to this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are no Metal library, or one whose header contradicts itself.
    #[error("not a usable metallib: {what} (expected {expected}, found {found}); fetch the wheel again")]
    Metallib {
        /// Which field.
        what: &'static str,
        /// The rule.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// The bytes are no 64-bit arm Mach-O file, or a damaged one.
    #[error("not a usable arm64 Mach-O file: {0}; fetch or build it again")]
    MachO(String),
    /// A version is not written as numbers with dots between them.
    #[error("`{0}` is not a version (expected numbers with dots, such as 15.6.1)")]
    Version(String),
    /// A recorded report does not have the expected form.
    #[error("{origin}: {what}")]
    Record {
        /// Where it came from.
        origin: String,
        /// What is wrong.
        what: String,
    },
    /// No candidate has this id.
    #[error("unknown candidate `{id}`; `metal-check --list` prints them (nearest: {nearest})")]
    UnknownCandidate {
        /// As given.
        id: String,
        /// The nearest known one.
        nearest: String,
    },
}
