//! How the work of this crate is followed from outside: it never prints.

/// What kind of work an [`Event::Began`] announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Bytes come over the network.
    Download,
    /// An archive is unpacked.
    Unpack,
    /// A hash is computed.
    Check,
    /// Files are copied.
    Copy,
    /// Tensors are converted and written.
    Convert,
}

/// One step of the work. A `Began` is followed by any number of `Advanced` and, unless the work fails, one `Ended`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Work on `item` (a file or package) begins.
    Began {
        /// Kind of work.
        stage: Stage,
        /// Name to show.
        item: &'a str,
        /// Amount of work in bytes, when it is known beforehand.
        total_bytes: Option<u64>,
    },
    /// This many bytes are done, since the last `Began`.
    Advanced {
        /// A running total, not an increment.
        done_bytes: u64,
    },
    /// The work announced last is done.
    Ended,
}

/// Receives [`Event`]s. Closures implement it.
///
/// ```
/// use planish_hub::{Event, Progress};
/// let mut seen = 0;
/// let mut progress = |event: Event<'_>| if let Event::Advanced { done_bytes } = event { seen = done_bytes };
/// progress.report(Event::Advanced { done_bytes: 7 });
/// assert_eq!(seen, 7);
/// ```
pub trait Progress {
    /// Takes one event. Called on the thread that does the work, so it should be quick.
    fn report(&mut self, event: Event<'_>);
}

impl<F: FnMut(Event<'_>)> Progress for F {
    fn report(&mut self, event: Event<'_>) {
        self(event);
    }
}

/// Ignores every event.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn report(&mut self, _: Event<'_>) {}
}
