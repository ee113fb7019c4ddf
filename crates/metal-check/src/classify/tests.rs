//! Facts about whole logs; the fixtures of every code are in `tests/it`.

use super::*;

fn code(log: &str) -> String {
    classify(log.as_bytes()).code
}

#[test]
fn empty_log_shows_nothing() {
    assert_eq!(code(""), "NONE");
}
