//! Facts about whole logs, wheels and records.

mod logs;
mod wheels;
