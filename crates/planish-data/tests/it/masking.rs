use crate::support::*;
use planish_data::DataOptions;
#[test]
fn x() {
    let f = rows(&[chat(&[("user", "Hi"), ("assistant", "Yes.")])]);
    let (d, _) = load(&f, &DataOptions::default()).unwrap();
    assert_eq!(trained_text(&d, 0, &tokenizer()), "Yes.<|im_end|>");
}
