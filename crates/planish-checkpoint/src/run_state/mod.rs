//! Resumable checkpoints: all that a run needs to go on as if it had never stopped.
//!
//! ```text
//! OUT/run.lock                     held while a run writes here
//! OUT/checkpoints/step-0000100/    adapters.safetensors, adapter_config.json, planish.json, optimizer.safetensors,
//!                                  state.json, manifest.json (written last)
//! OUT/checkpoints/latest, best     names of directories; hints, never trusted
//! ```
//!
//! A checkpoint is written beside the others under a temporary name, flushed, hashed and renamed. A directory without
//! a manifest that agrees with every file does not exist for the reader, so a crash at any instant leaves the previous
//! checkpoint whole. Checkpoints are cut only after an optimizer update: there is no gradient buffer to save.

mod lock;
mod manifest;
mod pointer;
mod run_dir;
mod save;
mod search;
mod state;

pub use lock::RunLock;
pub use manifest::{Manifest, ManifestFile};
pub use run_dir::RunDir;
pub use save::{Retention, Saved};
pub use search::{Checkpoint, PassedOver, Resume, Verify};
pub use state::{
    Best, ChangedInput, Counters, DataCursor, DistrustSums, Environment, Input, Interval, Position, RunInputs, RunState,
};

#[doc(hidden)]
pub mod fuzzing {
    //! Entry points for the fuzz targets.

    use std::path::Path;

    /// Reads `json` as state and as manifest; what is accepted must come back the same.
    pub fn checkpoint_state(json: &[u8]) {
        let path = Path::new("state.json");
        if let Ok(state) = super::RunState::from_json(json, path) {
            let again = state.to_json();
            assert_eq!(super::RunState::from_json(&again, path).ok(), Some(state));
        }
        let _ = super::Manifest::from_json(json, path);
    }
}
