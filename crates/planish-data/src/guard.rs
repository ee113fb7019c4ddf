//! The border to the tokenizers crate, which takes some things in a file for granted and panics where they are not so: a
//! decoder that cuts more than there is, a normaliser whose table is no table. To us that is an error of the file.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Runs `work`; a panic in it becomes a message.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    DEPTH.with(|depth| depth.set(depth.get() + 1));
    // What a panic leaves half-done belongs to the tokenizer, which only gives more errors from then on.
    let result = catch_unwind(AssertUnwindSafe(work));
    DEPTH.with(|depth| depth.set(depth.get() - 1));
    result.map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "it cannot be used as it is".to_owned())
    })
}

/// Whether a panic now would be caught here.
pub(crate) fn is_guarded() -> bool {
    DEPTH.with(Cell::get) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_becomes_its_message() {
        let empty: Vec<u8> = Vec::new();
        let error = guarded(|| empty[3]).unwrap_err();
        assert!(error.contains("out of bounds"), "{error}");
        assert!(!is_guarded());
        assert_eq!(guarded(is_guarded), Ok(true));
    }
}
