//! Integration tests of planish-export: one binary.

mod adapters;
mod blob;
mod mutants;
mod packages;
mod reference;
mod refusals;
mod support;
