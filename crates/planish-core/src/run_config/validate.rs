//! Ranges of single values, and values that must agree.

use super::{Compat, DistrustMode, LoraInit, LoraMethod, LossName, OptimizerName, RunConfig};
use crate::target_modules::Blocks;

/// The keys involved (the one to change first), what they hold, and the rule.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) keys: Vec<&'static str>,
    pub(super) found: String,
    pub(super) expected: String,
}

impl RunConfig {
    pub(super) fn validate(&self) -> Result<(), Problem> {
        let Self {
            lora,
            train,
            optimizer,
            schedule,
            loss,
            distrust,
            checkpoint,
            logging,
            data,
            backend,
            ..
        } = self;

        at_least("lora.rank", Some(lora.rank), 1)?;
        positive("lora.alpha", lora.alpha)?;
        positive("lora.scale", lora.scale)?;
        share("lora.dropout", lora.dropout)?;
        let is_count = Blocks::from_count(lora.layers).is_ok();
        rule(
            "lora.layers",
            lora.layers,
            is_count,
            "a number of blocks, or 0 or -1 for all",
        )?;
        not_empty("lora.targets", &lora.targets)?;
        not_empty("data.train_roles", &data.train_roles)?;

        let pissa = lora.init == LoraInit::Pissa;
        let keys = ["lora.init", "lora.method"];
        let fits = !pissa || lora.method == LoraMethod::Lora;
        together(&keys, lora.init, fits, "zero, unless the method is lora")?;
        let keys = ["lora.start", "lora.init"];
        together(
            &keys,
            "a folder",
            !(pissa && lora.start.is_some()),
            "unset with init = pissa",
        )?;
        let keys = ["lora.rank_stabilized", "lora.scale"];
        let fits = !(lora.rank_stabilized && lora.scale.is_some());
        together(&keys, true, fits, "false where lora.scale gives the factor itself")?;
        let keys = ["data.train_prompt", "data.last_turn_only"];
        together(
            &keys,
            true,
            !(data.train_prompt && data.last_turn_only),
            "one of the two",
        )?;

        at_least("train.steps", train.steps, 1)?;
        positive("train.epochs", train.epochs)?;
        at_least("train.batch_size", Some(train.batch_size), 1)?;
        at_least("train.accumulation", Some(train.accumulation), 1)?;
        // One token to read and one to predict.
        at_least("train.max_seq_length", train.max_seq_length, 2)?;
        at_least("train.eval_every", train.eval_every, 1)?;

        // No rule moves a weight by so much and learns.
        let lr = optimizer.learning_rate;
        rule(
            "optimizer.learning_rate",
            lr,
            lr > 0.0 && lr <= 1000.0,
            "above 0 and at most 1000",
        )?;
        not_negative("optimizer.weight_decay", optimizer.weight_decay)?;
        positive("optimizer.eps", Some(optimizer.eps))?;
        not_negative("optimizer.clip_norm", optimizer.clip_norm)?;
        for beta in optimizer.betas {
            share("optimizer.betas", beta)?;
        }

        not_negative("schedule.min_learning_rate", schedule.min_learning_rate)?;
        let (low, high) = (schedule.min_learning_rate, optimizer.learning_rate);
        let keys = ["schedule.min_learning_rate", "optimizer.learning_rate"];
        together(
            &keys,
            low,
            low <= high,
            &format!("at most optimizer.learning_rate = {high}"),
        )?;
        if let (Some(warmup), Some(steps)) = (schedule.warmup_steps, train.steps) {
            let keys = ["schedule.warmup_steps", "train.steps"];
            together(
                &keys,
                warmup,
                warmup < steps,
                &format!("fewer than train.steps = {steps}"),
            )?;
        }

        share("optimizer.momentum", optimizer.momentum)?;
        positive("optimizer.lora_b_ratio", Some(optimizer.lora_b_ratio))?;
        not_negative("train.min_delta", train.min_delta)?;
        at_least("schedule.cycles", Some(schedule.cycles), 1)?;
        positive("schedule.power", Some(schedule.power))?;
        let decay_share = schedule.decay_share;
        let is_share = decay_share > 0.0 && decay_share <= 1.0;
        rule("schedule.decay_share", decay_share, is_share, "above 0 and at most 1")?;

        at_least("loss.chunk_tokens", loss.chunk_tokens, 1)?;
        share("loss.label_smoothing", loss.label_smoothing)?;
        not_negative("loss.z_loss", loss.z_loss)?;
        positive("loss.beta", Some(loss.beta))?;
        not_negative("loss.lambda", loss.lambda)?;
        rule(
            "loss.distrust.alpha",
            distrust.alpha,
            (2.3..=3.0).contains(&distrust.alpha),
            "from 2.3 to 3",
        )?;
        share("loss.distrust.floor", distrust.floor)?;
        rule("loss.distrust.cap", distrust.cap, distrust.cap > 1.0, "above 1")?;
        if let Some(lambda) = distrust.lambda {
            let is_used = distrust.mode == DistrustMode::Additive;
            together(
                &["loss.distrust.lambda", "loss.distrust.mode"],
                lambda,
                is_used,
                "unset, unless the mode is additive",
            )?;
            not_negative("loss.distrust.lambda", lambda)?;
        }

        at_least("train.val_batches", train.val_batches, 1)?;
        self.validate_compat()?;

        at_least("checkpoint.every", checkpoint.every, 1)?;
        not_negative("checkpoint.every_minutes", checkpoint.every_minutes)?;
        rule(
            "backend.memory_limit",
            0,
            backend.memory_limit.is_none_or(|limit| limit.0 > 0),
            "above 0",
        )?;
        at_least("checkpoint.keep_last", Some(checkpoint.keep_last), 1)?;
        at_least("logging.report_every", Some(logging.report_every), 1)
    }
}

impl RunConfig {
    /// What mlx-lm does not have cannot be asked for in its name, and its own keys mean nothing without it.
    fn validate_compat(&self) -> Result<(), Problem> {
        let Self {
            data,
            train,
            optimizer,
            loss,
            distrust,
            ..
        } = self;
        let on = train.compat == Compat::MlxLm;
        let key = |key| [key, "train.compat"];
        let only = "unset, unless train.compat is mlx-lm";
        together(&key("data.mask_prompt"), true, on || !data.mask_prompt, only)?;
        together(
            &key("train.batch_order"),
            "a file",
            on || train.batch_order.is_none(),
            only,
        )?;
        let without = |name: &str| format!("{name}: mlx-lm has nothing else");
        let is_adam = matches!(optimizer.name, OptimizerName::Adam | OptimizerName::Adamw);
        together(
            &key("optimizer.name"),
            optimizer.name,
            !on || is_adam,
            "adam or adamw with train.compat = mlx-lm",
        )?;
        let plain = loss.name == LossName::CrossEntropy;
        together(&key("loss.name"), loss.name, !on || plain, &without("cross_entropy"))?;
        together(
            &key("data.packing"),
            data.packing,
            !on || !data.packing,
            &without("false"),
        )?;
        let off = distrust.mode == DistrustMode::Off;
        together(&key("loss.distrust.mode"), distrust.mode, !on || off, &without("off"))
    }
}

fn at_least(key: &'static str, value: Option<usize>, least: usize) -> Result<(), Problem> {
    value.map_or(Ok(()), |n| rule(key, n, n >= least, &format!("at least {least}")))
}

fn positive(key: &'static str, value: Option<f64>) -> Result<(), Problem> {
    value.map_or(Ok(()), |x| rule(key, x, x > 0.0, "above 0"))
}

fn not_negative(key: &'static str, value: f64) -> Result<(), Problem> {
    rule(key, value, value >= 0.0, "0 or above")
}

fn share(key: &'static str, value: f64) -> Result<(), Problem> {
    rule(key, value, (0.0..1.0).contains(&value), "at least 0 and below 1")
}

fn not_empty(key: &'static str, list: &[String]) -> Result<(), Problem> {
    rule(key, "an empty list", !list.is_empty(), "at least one")
}

fn rule(key: &'static str, found: impl ToString, holds: bool, expected: &str) -> Result<(), Problem> {
    together(&[key], found, holds, expected)
}

fn together(keys: &[&'static str], found: impl ToString, holds: bool, expected: &str) -> Result<(), Problem> {
    if holds {
        return Ok(());
    }
    Err(Problem {
        keys: keys.to_vec(),
        found: found.to_string(),
        expected: expected.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(assignments: &[&str], expect: Option<&str>) {
        let mut builder = RunConfig::builder();
        for assignment in assignments {
            builder = builder.set(assignment).unwrap();
        }
        let message = builder.build().err().map(|error| error.to_string());
        assert_eq!(message.as_deref(), expect, "{assignments:?}");
    }

    #[test]
    fn defaults_are_valid() {
        check(&[], None);
    }

    #[test]
    fn warmup_must_end_before_the_run() {
        check(&["train.steps=10", "schedule.warmup_steps=9"], None);
        check(&["train.steps=10", "schedule.warmup_steps=0"], None);
        check(
            &["train.steps=10", "schedule.warmup_steps=10"],
            Some(
                "--set schedule.warmup_steps=10: `schedule.warmup_steps`: found 10, expected fewer than train.steps = 10",
            ),
        );
    }

    #[test]
    fn lambda_needs_the_additive_mode() {
        check(&["loss.distrust.lambda=1", "loss.distrust.mode=additive"], None);
        check(
            &["loss.distrust.lambda=1"],
            Some(
                "--set loss.distrust.lambda=1: `loss.distrust.lambda`: found 1, expected unset, unless the mode is additive",
            ),
        );
    }

    #[test]
    fn err_each_range() {
        for (assignment, rule) in [
            ("lora.rank=0", "at least 1"),
            ("lora.alpha=0", "above 0"),
            ("lora.scale=-1", "above 0"),
            ("lora.layers=-2", "a number of blocks, or 0 or -1 for all"),
            ("lora.targets=[]", "at least one"),
            ("data.train_roles=[]", "at least one"),
            ("train.steps=0", "at least 1"),
            ("train.epochs=0", "above 0"),
            ("train.batch_size=0", "at least 1"),
            ("train.accumulation=0", "at least 1"),
            ("train.max_seq_length=1", "at least 2"),
            ("train.eval_every=0", "at least 1"),
            ("optimizer.learning_rate=0", "above 0 and at most 1000"),
            ("optimizer.learning_rate=1e30", "above 0 and at most 1000"),
            ("backend.memory_limit=0", "above 0"),
            ("checkpoint.every_minutes=-1", "0 or above"),
            ("optimizer.weight_decay=-1", "0 or above"),
            ("optimizer.eps=0", "above 0"),
            ("optimizer.clip_norm=-1", "0 or above"),
            ("optimizer.betas=[0.9,1]", "at least 0 and below 1"),
            (
                "schedule.min_learning_rate=1",
                "at most optimizer.learning_rate = 0.0001",
            ),
            ("optimizer.momentum=1", "at least 0 and below 1"),
            ("optimizer.lora_b_ratio=0", "above 0"),
            ("train.min_delta=-1", "0 or above"),
            ("schedule.cycles=0", "at least 1"),
            ("schedule.power=0", "above 0"),
            ("schedule.decay_share=0", "above 0 and at most 1"),
            ("loss.label_smoothing=1", "at least 0 and below 1"),
            ("loss.z_loss=-1", "0 or above"),
            ("loss.beta=0", "above 0"),
            ("loss.lambda=-1", "0 or above"),
            ("loss.chunk_tokens=0", "at least 1"),
            ("loss.distrust.alpha=2", "from 2.3 to 3"),
            ("loss.distrust.floor=1", "at least 0 and below 1"),
            ("loss.distrust.cap=1", "above 1"),
            ("checkpoint.every=0", "at least 1"),
            ("checkpoint.keep_last=0", "at least 1"),
            ("logging.report_every=0", "at least 1"),
        ] {
            let error = RunConfig::builder()
                .set(assignment)
                .unwrap()
                .build()
                .unwrap_err()
                .to_string();
            assert!(error.ends_with(&format!("expected {rule}")), "{assignment}: {error}");
        }
    }
}
