use std::path::Path;

use crate::error::{Error, Result};

/// Writes the name of a checkpoint directory into a pointer file.
pub(super) fn write(checkpoints: &Path, pointer: &str, dir_name: &str) -> Result<()> {
    let path = checkpoints.join(pointer);
    planish_core::fs::write_atomic(&path, format!("{dir_name}\n").as_bytes()).map_err(|e| Error::write(&path, e))
}

/// The name in a pointer file, if it is one of a checkpoint. Pointers are hints: what cannot be read is no hint.
pub(super) fn read(checkpoints: &Path, pointer: &str) -> Option<String> {
    let text = std::fs::read_to_string(checkpoints.join(pointer)).ok()?;
    let name = text.trim();
    step_of(name).map(|_| name.to_string())
}

/// The directory name of a step.
pub(super) fn dir_name(step: u64) -> String {
    format!("step-{step:07}")
}

/// The step of a directory name; `None` for other names.
pub(super) fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (dir_name(step) == name).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_steps() {
        assert_eq!(dir_name(100), "step-0000100");
        assert_eq!(step_of("step-0000100"), Some(100));
        assert_eq!(step_of("step-12345678"), Some(12_345_678));
        for other in [
            "step-100",
            "step-+000100",
            "step-00000100",
            ".tmp-0000100-x",
            "best",
            "step-",
        ] {
            assert_eq!(step_of(other), None, "{other}");
        }
    }
}
