//! Integration tests of the losses: against f64 references, finite differences, and one another.

mod losses;
mod preferences;
mod reference;
