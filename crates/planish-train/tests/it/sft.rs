//! The supervised recipe on the tiny model.

use planish_train::{End, Event, SftOptions};

use crate::world::{World, chat, options, train, uneven_rows};

#[test]
fn ten_sentences_are_learned_by_heart() {
    let world = World::new();
    let rows: Vec<String> = [
        "orange",
        "seven",
        "a grey owl",
        "in May",
        "Osterling",
        "by boat",
        "no",
        "tea",
        "Anne",
        "twice",
    ]
    .iter()
    .enumerate()
    .map(|(i, answer)| chat(&format!("Question number {i}?"), &format!("The answer is {answer}.")))
    .collect();
    let data = world.data("train.jsonl", &rows);
    let run = train(
        SftOptions {
            batch_size: 10,
            ..options(150)
        },
        &data,
        None,
        &world.path("out"),
    );
    assert_eq!(run.summary.end, End::Completed);
    let losses = run.losses();
    assert!(losses[0] > 2.0, "{losses:?}");
    assert!(losses.last().unwrap() < &0.05, "{losses:?}");
    assert!(matches!(run.events.first(), Some(Event::Started(_))));
    assert!(matches!(run.events.last(), Some(Event::Finished(_))));
    for name in [
        "adapters.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "plan.json",
        "planish.json",
    ] {
        assert!(world.path("out").join(name).exists(), "{name}");
    }
    println!("{:?}", &losses[..3]);
    let _ = uneven_rows(1);
}
