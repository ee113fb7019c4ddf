//! Integration tests of planish-checkpoint: files on disk, through the public API.

mod adapters;
mod tensor_files;
