//! The findings as one screen.

use std::fmt::Write;

use planish_backend::{CheckStatus, ProbeReport, Verdict};
use planish_core::units::format_bytes;

use super::findings::Findings;
use super::step::StepReport;

/// Bytes of a weight while it trains: f32 on a processor, bf16 on a GPU.
const BYTES_PER_WEIGHT: [f64; 2] = [4.0, 2.0];
/// Share of the memory left for weights beside activations, gradients and moments.
const SHARE_OF_WEIGHTS: f64 = 0.5;

pub(super) fn render(findings: &Findings) -> String {
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = write_all(&mut text, findings);
    text
}

fn write_all(out: &mut String, findings: &Findings) -> std::fmt::Result {
    writeln!(out, "planish {} on {}", env!("CARGO_PKG_VERSION"), machine(findings))?;
    writeln!(
        out,
        "MLX {} for {} from {}",
        findings.mlx_version,
        findings.built_for,
        library(findings)
    )?;
    if let Some(metallib) = &findings.files.metallib {
        let (file, os, msl) = (&metallib.file, metallib.target_os, metallib.msl);
        let (path, hash) = (file.path.display(), short(&file.sha256));
        writeln!(out, "  kernels {path} ({hash}), for macOS {os}, Metal {msl}")?;
    }
    writeln!(out)?;
    for report in &findings.reports {
        writeln!(out, "{}", backend(report, findings))?;
    }
    writeln!(out)?;
    writeln!(out, "train   {}", training(findings))?;
    if let Some(kernels) = findings.kernels {
        writeln!(out, "        {kernels}")?;
    }
    for step in findings.steps.iter().flatten() {
        writeln!(out, "step    {}", training_step(step))?;
    }
    if findings.steps.as_ref().is_some_and(Vec::is_empty) {
        writeln!(out, "step    no usable GPU to compare with the processor")?;
    }
    let deployment = &findings.deployment;
    let can = if deployment.runs_here { "yes" } else { "not here" };
    writeln!(out, "deploy  Neural Engine: {can}: {}", deployment.reason)?;
    for step in &deployment.how {
        writeln!(out, "        {step}")?;
    }
    writeln!(out)?;
    if findings.missing.is_empty() {
        return writeln!(out, "Nothing is missing.");
    }
    writeln!(out, "Missing:")?;
    for missing in &findings.missing {
        writeln!(out, "  {}", missing.what)?;
        writeln!(out, "    → {}", missing.mend)?;
    }
    Ok(())
}

fn machine(findings: &Findings) -> String {
    let machine = &findings.machine;
    let system = match machine.macos {
        Some(version) => format!("macOS {version} ({})", machine.system),
        None => format!("{} {}", std::env::consts::OS, machine.system),
    };
    let processor = machine.processor.as_deref().unwrap_or("an unnamed processor");
    let memory = findings
        .memory_bytes
        .map(|bytes| format!(", {} of memory", format_bytes(bytes)));
    format!(
        "{system}, {}, {processor}{}",
        std::env::consts::ARCH,
        memory.unwrap_or_default()
    )
}

fn library(findings: &Findings) -> String {
    match &findings.files.library {
        Some(file) => format!("{} ({})", file.path.display(), short(&file.sha256)),
        None => "an unknown place".to_owned(),
    }
}

fn short(sha256: &str) -> &str {
    sha256.get(..12).unwrap_or(sha256)
}

fn backend(report: &ProbeReport, findings: &Findings) -> String {
    let mark = if report.verdict.is_usable() { "yes" } else { "no" };
    let name = report.backend.name();
    if !report.verdict.is_usable() {
        return format!("{name:<7} {mark:<4} {}", report.reason());
    }
    let mut facts = Vec::new();
    let processor = || findings.machine.processor.clone();
    let is_cpu = report.backend == planish_backend::Backend::Cpu;
    let device = report.device.name.clone().or_else(|| processor().filter(|_| is_cpu));
    facts.extend(device);
    facts.extend(report.gflops.map(speed));
    facts.extend(report.detail.clone());
    if is_cpu {
        facts.extend(findings.blas.as_ref().map(|kernels| format!("OpenBLAS {kernels}")));
    }
    facts.extend(report.device.memory_bytes.filter(|_| !is_cpu).map(format_bytes));
    if report.verdict == Verdict::OkVirtual {
        facts.push("virtual, checked with a wider bound".to_owned());
    }
    let passed = report
        .checks
        .iter()
        .filter(|check| check.status == CheckStatus::Pass)
        .count();
    if !report.checks.is_empty() {
        let when = if report.cached { ", remembered" } else { "" };
        facts.push(format!("{passed} of {} checks passed{when}", report.checks.len()));
    }
    if let (Some(gflops), Some(cpu)) = (report.gflops, report.cpu_gflops.filter(|_| !is_cpu))
        && gflops < cpu
    {
        facts.push("slower than the processor".to_owned());
    }
    format!("{name:<7} {mark:<4} {}", facts.join(", "))
}

fn speed(gflops: f64) -> String {
    if gflops >= 1000.0 {
        format!("{:.1} TFLOP/s", gflops / 1000.0)
    } else {
        format!("{gflops:.0} GFLOP/s")
    }
}

/// What trains here, and what its memory holds.
fn training(findings: &Findings) -> String {
    let Some(report) = findings.selected() else {
        return "nothing: no device computes correctly".to_owned();
    };
    let on_cpu = report.backend == planish_backend::Backend::Cpu;
    let bytes_per_weight = BYTES_PER_WEIGHT[usize::from(!on_cpu)];
    let size = findings.budget_bytes().map(|bytes| {
        let billions = bytes as f64 * SHARE_OF_WEIGHTS / bytes_per_weight / 1e9;
        let format = if on_cpu { "f32" } else { "bf16" };
        let bytes = format_bytes(bytes);
        format!("; within {bytes}, LoRA on models of up to about {billions:.1} billion weights in {format}")
    });
    format!("--backend auto takes {}{}", report.backend, size.unwrap_or_default())
}

fn training_step(step: &StepReport) -> String {
    let word = if step.passed { "agrees with" } else { "DIFFERS from" };
    let precision = if step.tf32 { "as it trains" } else { "exact f32" };
    match &step.failure {
        Some(failure) => format!("{}, {precision}: {failure}", step.backend),
        None => format!(
            "{}, {precision}: {word} the processor: loss off by {:.1e}, gradients by {:.1e} at most ({}); {} updates in bf16: loss off by {:.1e}",
            step.backend, step.loss_error, step.gradient_error, step.worst, step.updates, step.update_error
        ),
    }
}
