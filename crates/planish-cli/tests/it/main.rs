//! The program from outside: arguments in, streams and exit codes out.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test that cannot go on must say why.

mod adapters;
mod bad_input;
mod basics;
mod device;
mod doctor;
mod endings;
mod failures;
mod full_fine_tune;
mod leaving;
mod model_commands;
mod run;
mod train_command;
mod training_kinds;
mod world;
