//! `planish report`: what a run left on disk as one HTML page that needs nothing else, neither scripts nor a network.

mod chart;
mod page;
mod run;

pub(crate) use page::page;
pub(crate) use run::Run;
