//! Integration tests of planish-hub, one module a subject.
// Clippy's exemption of tests covers the test functions, not the helpers beside them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod gguf_errors;
mod gguf_goldens;
mod hub_server;
mod hugging_face;
mod package;
mod tokenizers;
