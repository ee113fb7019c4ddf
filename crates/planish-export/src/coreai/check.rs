//! Does a written asset compute what the model computes? Runs it as Apple's engines do and compares with the f32 pass.

use std::{collections::BTreeMap, path::Path};

use coreai_asset::{
    interpreter::{Arithmetic, Machine, States, Understanding, Value},
    program::{Block, Graph, OpCode, Payload, Program},
};
use ndarray::{Array2, Axis};
use planish_core::model_config::ModelConfig;
use serde::Serialize;

use crate::{
    Error, Result,
    check::{Agreement, agreement, argmax},
    reference::forward,
    weights::Rows,
};

/// Tokens of the prompt, read in two calls.
const PROMPT: usize = 24;
const FIRST_CALL: usize = 17;
/// Tokens decoded one by one after the prompt.
const DECODED: usize = 16;
/// With f32 arithmetic on the stored weights logits may differ by this share of the largest.
const TOLERANCE: f32 = 1e-4;

/// The outcome of a check.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CoreAiCheck {
    /// Prompt tokens that went through two calls.
    pub prompt_tokens: usize,
    /// Tokens decoded after it, each the asset's own most likely one.
    pub decoded_tokens: usize,
    /// f32 arithmetic on the stored weights, composites by kernels of their names, against the f32 pass.
    pub kernels: Agreement,
    /// The same by the bodies and decompositions that the program carries.
    pub bodies: Agreement,
    /// fp16 arithmetic against the f32 pass over the original weights: what a user gets.
    pub fp16: Agreement,
}

/// What an asset is compared with.
pub(crate) struct Judge<'a> {
    pub(crate) config: &'a ModelConfig,
    /// Weights with the adapter folded in.
    pub(crate) original: &'a dyn Rows,
    /// The same after compression or rounding.
    pub(crate) stored: &'a dyn Rows,
    /// Longest text.
    pub(crate) context: usize,
}

impl Judge<'_> {
    /// Runs the asset and compares. `text` gives the prompt; where it is too short, arbitrary tokens follow.
    ///
    /// # Errors
    /// [`Error::CheckFailed`] when a logit differs by more than 1e-4 of the largest in f32 arithmetic, by kernels or by
    /// bodies, when one is not finite in fp16, or a state is used for something else than its name says;
    /// [`Error::Asset`] when the asset cannot be opened or run.
    pub(crate) fn check(&self, asset: &Path, text: &[u32]) -> Result<CoreAiCheck> {
        let machine = Machine::open(asset)?;
        check_states(machine.asset().program())?;
        let prompt = self.prompt(text);
        let decoded = DECODED.min(self.context.saturating_sub(prompt.len())).max(1);
        let declared = machine.with(Arithmetic::Declared, Understanding::Kernels);
        let (tokens, fp16_rows) = self.decode(&declared, &prompt, decoded)?;
        let seen = &tokens[..tokens.len() - 1];
        let stored = forward(self.config, self.stored, &[seen], None)?;
        let original = forward(self.config, self.original, &[seen], None)?;
        let exact = |understanding| -> Result<Agreement> {
            let machine = machine.with(Arithmetic::F32, understanding);
            let rows = self.force(&machine, seen, prompt.len())?;
            within(agreement(&rows, &stored), understanding)
        };
        let report = CoreAiCheck {
            prompt_tokens: prompt.len(),
            decoded_tokens: decoded,
            kernels: exact(Understanding::Kernels)?,
            bodies: exact(Understanding::Bodies)?,
            fp16: agreement(&fp16_rows, &original),
        };
        if !fp16_rows.iter().all(|v| v.is_finite()) {
            let problem = "with fp16 arithmetic a logit is not finite: activations leave the fp16 range".into();
            return Err(Error::CheckFailed { problem });
        }
        Ok(report)
    }

    fn prompt(&self, text: &[u32]) -> Vec<u32> {
        let length = PROMPT.min(self.context.saturating_sub(1)).max(1);
        let mut state = 0x9E37_79B9u32;
        let arbitrary = std::iter::repeat_with(move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        });
        let vocabulary = self.config.arch.vocab_size as u32;
        text.iter()
            .copied()
            .chain(arbitrary.map(|n| n % vocabulary))
            .take(length)
            .collect()
    }

    /// The prompt and what the asset appends to it, with the logits of every token but the last.
    fn decode(&self, machine: &Machine, prompt: &[u32], count: usize) -> Result<(Vec<u32>, Array2<f32>)> {
        let mut call = Calls::new(machine, prompt.len() + count)?;
        let mut tokens = prompt.to_vec();
        let mut rows = call.prompt(prompt)?;
        while let Some(last) = rows
            .last()
            .and_then(|rows| rows.rows().into_iter().next_back().map(|r| argmax(r)))
        {
            tokens.push(last as u32);
            if tokens.len() == prompt.len() + count {
                break;
            }
            rows.push(call.run(&[last as u32])?);
        }
        Ok((tokens, joined(&rows)?))
    }

    /// Logits of known tokens: the prompt in two calls, then one by one.
    fn force(&self, machine: &Machine, tokens: &[u32], prompt: usize) -> Result<Array2<f32>> {
        let mut call = Calls::new(machine, tokens.len())?;
        let mut rows = call.prompt(&tokens[..prompt])?;
        for token in &tokens[prompt..] {
            rows.push(call.run(&[*token])?);
        }
        joined(&rows)
    }
}

/// Calls of `main` as an engine makes them.
struct Calls<'a> {
    machine: &'a Machine,
    states: States,
    seen: usize,
}

impl<'a> Calls<'a> {
    fn new(machine: &'a Machine, context: usize) -> Result<Self> {
        Ok(Self {
            machine,
            states: machine.new_states("main", context)?,
            seen: 0,
        })
    }

    fn prompt(&mut self, prompt: &[u32]) -> Result<Vec<Array2<f32>>> {
        prompt.chunks(FIRST_CALL).map(|part| self.run(part)).collect()
    }

    /// Logits `[tokens, v]`.
    fn run(&mut self, tokens: &[u32]) -> Result<Array2<f32>> {
        self.seen += tokens.len();
        let row = |values: Vec<i64>| Value::ints(&[1, values.len()], values);
        let inputs = [
            ("input_ids", row(tokens.iter().map(|t| i64::from(*t)).collect())),
            ("position_ids", row((0..self.seen as i64).collect())),
        ];
        let inputs: BTreeMap<String, Value> = inputs
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)))
            .collect();
        let mut outputs = self.machine.run("main", &inputs, &mut self.states)?;
        let Some(Value::Float(logits)) = outputs.remove("logits") else {
            return Err(Error::CheckFailed {
                problem: "the function main gives no logits".into(),
            });
        };
        let rows = logits.index_axis(Axis(0), 0).to_owned();
        rows.into_dimensionality().map_err(|e| Error::internal(e.to_string()))
    }
}

fn joined(rows: &[Array2<f32>]) -> Result<Array2<f32>> {
    let views: Vec<_> = rows.iter().map(|r| r.view()).collect();
    ndarray::concatenate(Axis(0), &views).map_err(|e| Error::internal(e.to_string()))
}

fn within(found: Agreement, understanding: Understanding) -> Result<Agreement> {
    let limit = TOLERANCE * found.max_logit;
    // A NaN is beyond every limit.
    if found.max_error <= limit {
        return Ok(found);
    }
    let way = match understanding {
        Understanding::Kernels => "kernels of the declared composites",
        Understanding::Bodies => "the bodies of composites and decompositions",
    };
    Err(Error::CheckFailed {
        problem: format!(
            "with f32 arithmetic on the stored weights and {way} a logit differs by {}, allowed are {limit} (logits up to {})",
            found.max_error, found.max_logit
        ),
    })
}

/// Hosts know states by name alone: keys must come from `keyCache` and values from `valueCache`.
fn check_states(program: &Program) -> Result<()> {
    let fail = |problem: String| Error::CheckFailed { problem };
    let main = program
        .graph("main")
        .ok_or_else(|| fail("there is no function main".into()))?;
    let attention = |name: &String| {
        let composite = program.graph(name).and_then(|graph| graph.composite.as_ref());
        composite.is_some_and(|c| c.name == "scaled_dot_product_attention")
    };
    let mut attentions = 0;
    for operation in &main.block.operations {
        let (OpCode::Invoke, Payload::Callee(name)) = (operation.code, &operation.payload) else {
            continue;
        };
        if !attention(name) {
            continue;
        }
        attentions += 1;
        for (operand, expected) in [(1, "keyCache"), (2, "valueCache")] {
            let found = operation
                .operands
                .get(operand)
                .and_then(|value| state_behind(main, *value));
            if found != Some(expected) {
                return Err(fail(format!("attention takes {found:?} where {expected} is expected")));
            }
        }
    }
    match attentions {
        0 => Err(fail("no attention is declared".into())),
        _ => Ok(()),
    }
}

/// Name of the state that a value was read from, through operations that reshape it.
fn state_behind(graph: &Graph, value: u32) -> Option<&str> {
    let mut value = value;
    loop {
        let operation = maker(&graph.block, value)?;
        let from = *operation.operands.first()?;
        match operation.code {
            OpCode::ReadHandle => return Some(graph.inputs.get(from as usize)?.name.as_str()),
            OpCode::Slice | OpCode::ShrinkDims | OpCode::Reshape => value = from,
            _ => return None,
        }
    }
}

/// The operation that makes a value.
fn maker(block: &Block, value: u32) -> Option<&coreai_asset::program::Operation> {
    let mut next = block.arguments as u32;
    block.operations.iter().find(|operation| {
        next += operation.results as u32;
        value >= next - operation.results as u32 && value < next
    })
}
