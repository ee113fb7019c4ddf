//! What one rendering may take: steps, and bytes that its values hold. Templates come from strangers.
//!
//! A value counts itself in while it lives ([`Held`]); whatever makes a large one asks [`room`] first, so that nothing
//! large is made before it is allowed. A rendering stays on its thread, so the counts are the thread's.

use std::cell::Cell;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static LIMIT: Cell<usize> = const { Cell::new(usize::MAX) };
    static STEPS: Cell<u64> = const { Cell::new(0) };
}

/// Why a rendering was stopped.
pub(super) const TOO_MUCH_WORK: &str = "the template takes too much work: does it end?";
const TOO_MUCH_MEMORY: &str = "the template takes too much memory: does a value double?";

/// Steps of one rendering: thousands of messages need a hundredth of it.
const MAX_STEPS: u64 = 2_000_000;
/// Bytes that one rendering may hold beside its input, and per byte of input.
const MAX_BYTES: usize = 32 << 20;
const MAX_BYTES_PER_INPUT_BYTE: usize = 8;
/// Bytes written that count as one step.
const BYTES_PER_STEP: usize = 64;

/// Starts a rendering of about `input` bytes on this thread.
pub(super) fn start(input: usize) {
    let room = MAX_BYTES.saturating_add(input.saturating_mul(MAX_BYTES_PER_INPUT_BYTE));
    LIMIT.set(HELD.get().saturating_add(room));
    STEPS.set(MAX_STEPS.saturating_add(input as u64));
}

/// Counts `n` steps.
pub(super) fn steps(n: usize) -> Result<(), String> {
    let left = STEPS.get().saturating_sub(n as u64);
    STEPS.set(left);
    if left == 0 { Err(TOO_MUCH_WORK.into()) } else { Ok(()) }
}

/// Asks for `bytes` more, and counts the work of writing them.
pub(super) fn room(bytes: usize) -> Result<(), String> {
    grown(bytes, bytes)
}

/// Asks for a text of `total` bytes, of which `new` ones are written now.
pub(super) fn grown(total: usize, new: usize) -> Result<(), String> {
    if HELD.get().saturating_add(total) > LIMIT.get() {
        return Err(TOO_MUCH_MEMORY.into());
    }
    steps(new / BYTES_PER_STEP + 1)
}

/// Bytes that live values of this thread hold.
pub(super) fn held() -> usize {
    HELD.get()
}

/// A value that counts its bytes while it lives.
#[derive(Debug)]
pub(super) struct Held<T> {
    pub(super) value: T,
    bytes: usize,
}

impl<T> Held<T> {
    pub(super) fn new(value: T, bytes: usize) -> Self {
        HELD.set(HELD.get().saturating_add(bytes));
        Self { value, bytes }
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        HELD.set(HELD.get().saturating_sub(self.bytes));
    }
}
