//! Generation with a cache computes what the full forward pass computes.

use planish_mlx::host;
use planish_nn::generate::{GenerateOptions, generate};
use planish_nn::{AttentionMask, Error, KvCache, Sampling};

use crate::{largest, logits, max_difference, small_random, tiny_llama};

#[test]
fn cached_logits_equal_the_full_forward_pass() {
    let model = tiny_llama();
    let text: Vec<u32> = (0..300).map(|i| (i * 37 + 11) % 2048).collect();
    let expect = logits(&model, &[&text]);
    let mut cache = KvCache::new();
    let mut found = Vec::new();
    // A prompt, single tokens, and a chunk that crosses the cache's growth.
    for chunk in [
        &text[..20],
        &text[20..21],
        &text[21..22],
        &text[22..290],
        &text[290..291],
        &text[291..],
    ] {
        let ids = model.token_array(&[chunk]).unwrap();
        let hidden = model.hidden(&ids, &AttentionMask::Causal, Some(&mut cache)).unwrap();
        found.extend(host::to_f32_vec(&model.logits(&hidden).unwrap()).unwrap());
    }
    assert_eq!(cache.len(), 300);
    assert!(
        max_difference(&found, &expect) < 2e-5 * largest(&expect),
        "{}",
        max_difference(&found, &expect)
    );
}

#[test]
fn greedy_generation_follows_the_full_forward_pass() {
    let model = tiny_llama();
    let mut text = vec![641, 280, 1220, 274];
    let options = GenerateOptions {
        max_tokens: 24,
        stop_tokens: vec![],
        sampling: Sampling::default(),
    };
    let generated: Vec<u32> = generate(&model, &text, &options).unwrap().map(Result::unwrap).collect();
    assert_eq!(generated.len(), 24);
    for token in generated {
        let all = logits(&model, &[&text]);
        let last = &all[all.len() - 2048..];
        let likeliest = (0..2048)
            .max_by(|&one, &other| last[one].total_cmp(&last[other]))
            .unwrap();
        assert_eq!(token as usize, likeliest, "after {} tokens", text.len());
        text.push(token);
    }
}

#[test]
fn generation_ends_at_a_stop_token_without_it() {
    let model = tiny_llama();
    let mut options = GenerateOptions {
        max_tokens: 24,
        stop_tokens: vec![],
        sampling: Sampling::default(),
    };
    let all: Vec<u32> = generate(&model, &[641, 280], &options)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let stop = *all.iter().find(|&&token| token != all[0]).unwrap();
    options.stop_tokens = vec![stop];
    let cut: Vec<u32> = generate(&model, &[641, 280], &options)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(cut, all[..all.iter().position(|&token| token == stop).unwrap()]);
}

#[test]
fn long_prompt_is_computed_in_chunks() {
    let model = small_random();
    let prompt: Vec<u32> = (0..1100).map(|i| i * 7 % 50).collect();
    let options = GenerateOptions {
        max_tokens: 1,
        stop_tokens: vec![],
        sampling: Sampling::default(),
    };
    let token = generate(&model, &prompt, &options).unwrap().next().unwrap().unwrap();
    let all = logits(&model, &[&prompt]);
    let last = &all[all.len() - 50..];
    assert_eq!(
        token as usize,
        (0..50)
            .max_by(|&one, &other| last[one].total_cmp(&last[other]))
            .unwrap()
    );
}

#[test]
fn err_prompt_that_cannot_be_run() {
    let model = small_random();
    let options = GenerateOptions {
        max_tokens: 1,
        stop_tokens: vec![],
        sampling: Sampling::default(),
    };
    assert!(matches!(generate(&model, &[], &options), Err(Error::EmptyPrompt)));
    assert!(matches!(model.token_array(&[&[]]), Err(Error::EmptyPrompt)));
    assert!(matches!(
        model.token_array(&[&[1, 2], &[1]]),
        Err(Error::RaggedRows {
            row: 1,
            expected: 2,
            found: 1
        })
    ));
    let result = generate(&model, &[1, 50], &options);
    assert!(matches!(
        result,
        Err(Error::TokenOutOfRange {
            token: 50,
            position: 1,
            vocab_size: 50
        })
    ));
}
