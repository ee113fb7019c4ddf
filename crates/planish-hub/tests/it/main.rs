//! Integration tests of planish-hub, one module a subject.

mod package;
