//! Integration tests of planish-checkpoint: files on disk, through the public API.

mod tensor_files;
