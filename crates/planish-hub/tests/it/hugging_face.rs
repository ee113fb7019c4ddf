//! `pull hf:ORG/NAME` against a server of the test's own.

use std::path::{Path, PathBuf};

use planish_hub::hugging_face::{HubSettings, pull};
use planish_hub::{Error, Event, Silent, Stage};

use crate::hub_server::{COMMIT, HubServer, Manner};

const CONFIG: &[u8] = br#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 4}"#;
const WEIGHTS: &[u8] = &[42; 5000];
const FILES: [(&str, &[u8]); 5] = [
    ("config.json", CONFIG),
    ("tokenizer.json", b"{}"),
    ("model.safetensors", WEIGHTS),
    ("pytorch_model.bin", b"a pickle"),
    ("README.md", b"text"),
];

fn settings(server: &HubServer, home: &Path) -> HubSettings {
    let (endpoint, cache) = (Some(server.endpoint.clone()), home.join("hub"));
    HubSettings {
        endpoint,
        token: None,
        offline: false,
        cache,
    }
}

fn pull_model(settings: &HubSettings) -> Result<PathBuf, Error> {
    pull(&"hf:org/model".parse().unwrap(), settings, None, &mut Silent)
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn brings_what_a_model_needs_and_no_pickle() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    let folder = pull_model(&settings(&server, home.path())).unwrap();
    assert!(folder.ends_with(COMMIT));
    assert_eq!(
        names_in(&folder),
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), WEIGHTS);
    assert!(
        server
            .take_requests()
            .iter()
            .all(|request| !request.path.contains("pytorch_model"))
    );
}

#[test]
fn second_pull_asks_for_the_list_only() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    let settings = settings(&server, home.path());
    pull_model(&settings).unwrap();
    server.take_requests();
    pull_model(&settings).unwrap();
    let paths: Vec<_> = server.take_requests().into_iter().map(|request| request.path).collect();
    assert_eq!(paths, ["/api/models/org/model/revision/main"]);
}

#[test]
fn shards_are_those_of_the_index() {
    let index =
        br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let files: [(&str, &[u8]); 6] = [
        ("config.json", CONFIG),
        ("tokenizer.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b"two"),
        ("other.safetensors", b"not of the model"),
    ];
    let (server, home) = (HubServer::start(&files), tempfile::tempdir().unwrap());
    let folder = pull_model(&settings(&server, home.path())).unwrap();
    let expect = [
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names_in(&folder), expect);

    server.remove("model-2.safetensors");
    let elsewhere = tempfile::tempdir().unwrap();
    let error = pull_model(&settings(&server, elsewhere.path())).unwrap_err();
    assert!(error.to_string().contains("model-2.safetensors"), "{error}");
}

#[test]
fn redirect_is_followed_without_the_token() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    server.treat("model.safetensors", Manner::Redirect);
    let mut settings = settings(&server, home.path());
    settings.token = Some("secret".into());
    let folder = pull_model(&settings).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), WEIGHTS);
    let requests = server.take_requests();
    let api = requests
        .iter()
        .find(|request| request.path.starts_with("/api"))
        .unwrap();
    assert_eq!(api.authorization.as_deref(), Some("Bearer secret"));
    let last = requests
        .iter()
        .rfind(|request| request.path.starts_with("/cdn"))
        .unwrap();
    assert_eq!(last.authorization, None, "{last:?}");
}

#[test]
fn broken_download_goes_on_where_it_stopped() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    server.treat("model.safetensors", Manner::BreakOff(2));
    let folder = pull_model(&settings(&server, home.path())).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), WEIGHTS);
    let ranges: Vec<_> = server
        .take_requests()
        .into_iter()
        .filter_map(|request| request.range)
        .collect();
    assert!(
        ranges.contains(&"bytes=2500-".to_owned()) && ranges.contains(&"bytes=3750-".to_owned()),
        "{ranges:?}"
    );
}

#[test]
fn err_download_that_never_ends_is_named_and_leaves_no_model() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    let settings = settings(&server, home.path());
    server.treat("model.safetensors", Manner::BreakOff(usize::MAX));
    let error = pull_model(&settings).unwrap_err();
    assert!(
        matches!(&error, Error::HubRequest { item, .. } if item == "model.safetensors"),
        "{error}"
    );
    let snapshot = settings.cache.join("models--org--model/snapshots").join(COMMIT);
    assert!(!snapshot.join("model.safetensors").exists());
    // What came is kept: the next attempt asks for the rest alone.
    server.treat("model.safetensors", Manner::Plain);
    server.take_requests();
    pull_model(&settings).unwrap();
    let ranges: Vec<_> = server
        .take_requests()
        .into_iter()
        .filter_map(|request| request.range)
        .collect();
    assert!(!ranges.contains(&"bytes=0-".to_owned()), "{ranges:?}");
}

#[test]
fn err_altered_bytes_are_found_and_removed() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    let settings = settings(&server, home.path());
    server.treat("model.safetensors", Manner::Corrupt);
    let error = pull_model(&settings).unwrap_err();
    assert!(
        matches!(&error, Error::HubCorrupt { file, .. } if file == "model.safetensors"),
        "{error}"
    );
    server.treat("model.safetensors", Manner::Plain);
    let folder = pull_model(&settings).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), WEIGHTS);
}

#[test]
fn server_without_ranges_cannot_spoil_a_file() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    let settings = settings(&server, home.path());
    server.treat("model.safetensors", Manner::BreakOff(usize::MAX));
    pull_model(&settings).unwrap_err();
    // The rest is asked for, the whole file is sent: the pieces do not fit.
    server.treat("model.safetensors", Manner::IgnoreRange);
    let error = pull_model(&settings).unwrap_err();
    assert!(matches!(&error, Error::HubCorrupt { .. }), "{error}");
    let folder = pull_model(&settings).unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), WEIGHTS);
}

#[test]
fn download_that_was_whole_but_not_renamed_is_recovered() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    let settings = settings(&server, home.path());
    let blobs = settings.cache.join("models--org--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = blobs
        .join(planish_core::hash::sha256_hex(WEIGHTS))
        .with_extension("part");
    for leftover in [WEIGHTS.to_vec(), [WEIGHTS, b"more"].concat()] {
        std::fs::write(&part, leftover).unwrap();
        let folder = pull_model(&settings).unwrap();
        assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), WEIGHTS);
        std::fs::remove_dir_all(settings.cache.join("models--org--model/snapshots")).unwrap();
    }
}

#[test]
fn err_denied_with_and_without_a_token() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    server.require_token("right");
    let mut settings = settings(&server, home.path());
    let error = pull_model(&settings).unwrap_err();
    assert!(
        matches!(
            error,
            Error::HubDenied {
                status: 401,
                had_token: false,
                ..
            }
        ),
        "{error}"
    );
    settings.token = Some("wrong".into());
    let error = pull_model(&settings).unwrap_err();
    assert!(
        matches!(
            error,
            Error::HubDenied {
                status: 401,
                had_token: true,
                ..
            }
        ),
        "{error}"
    );
    assert!(!error.to_string().contains("wrong"), "{error}");
    settings.token = Some("right".into());
    pull_model(&settings).unwrap();
}

#[test]
fn err_unknown_repository_revision_and_server_trouble() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    let settings = settings(&server, home.path());
    for name in ["org/modle", "org/model@v9"] {
        let error = pull(&name.parse().unwrap(), &settings, None, &mut Silent).unwrap_err();
        assert!(
            matches!(&error, Error::HubNotFound { repo, .. } if repo.contains(name)),
            "{error}"
        );
    }
    server.fail_list(503);
    let error = pull_model(&settings).unwrap_err();
    assert!(
        matches!(&error, Error::HubRequest { message, .. } if message.contains("503")),
        "{error}"
    );
}

#[test]
fn err_no_server() {
    let home = tempfile::tempdir().unwrap();
    let settings = HubSettings {
        // Port 1 of loopback: nobody listens.
        endpoint: Some("http://127.0.0.1:1".into()),
        token: None,
        offline: false,
        cache: home.path().join("hub"),
    };
    let error = pull_model(&settings).unwrap_err();
    assert!(matches!(error, Error::HubRequest { .. }), "{error}");
}

#[test]
fn err_hostile_answers() {
    for manner in [Manner::LostRedirect, Manner::EvilEtag, Manner::OtherCommit] {
        let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
        server.treat("tokenizer.json", manner);
        let error = pull_model(&settings(&server, home.path())).unwrap_err();
        assert!(
            matches!(&error, Error::HubRequest { item, .. } if item == "tokenizer.json"),
            "{manner:?}: {error}"
        );
    }
}

#[test]
fn err_model_of_another_family_before_its_weights() {
    let mut files = FILES;
    files[0].1 = br#"{"model_type": "mamba2"}"#;
    let (server, home) = (HubServer::start(&files), tempfile::tempdir().unwrap());
    let error = pull_model(&settings(&server, home.path())).unwrap_err();
    assert!(
        matches!(error, Error::Config(_)) && error.to_string().contains("mamba2"),
        "{error}"
    );
    assert!(
        server
            .take_requests()
            .iter()
            .all(|request| !request.path.contains("safetensors"))
    );
}

#[test]
fn offline_uses_the_cache_alone() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    let mut settings = settings(&server, home.path());
    settings.offline = true;
    let error = pull_model(&settings).unwrap_err();
    assert!(matches!(error, Error::HubOffline { .. }), "{error}");

    settings.offline = false;
    let folder = pull_model(&settings).unwrap();
    settings.offline = true;
    server.take_requests();
    assert_eq!(pull_model(&settings).unwrap(), folder);
    let by_commit = pull(
        &format!("org/model@{COMMIT}").parse().unwrap(),
        &settings,
        None,
        &mut Silent,
    )
    .unwrap();
    assert_eq!(by_commit, folder);
    assert!(server.take_requests().is_empty());

    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let error = pull_model(&settings).unwrap_err();
    assert!(matches!(error, Error::HubOffline { .. }), "{error}");
}

#[test]
fn copy_stands_alone_and_is_recognised() {
    let (server, home) = (HubServer::start(&FILES), tempfile::tempdir().unwrap());
    let settings = settings(&server, home.path());
    let copy = home.path().join("copy");
    let repo = "org/model".parse().unwrap();
    let (mut copied, mut again) = (Vec::new(), Vec::new());
    let mut note = |event: Event<'_>| {
        if let Event::Began {
            stage: Stage::Copy,
            item,
            ..
        } = event
        {
            copied.push(item.to_owned());
        }
    };
    assert_eq!(pull(&repo, &settings, Some(&copy), &mut note).unwrap(), copy);
    assert_eq!(copied, ["config.json", "tokenizer.json", "model.safetensors"]);
    assert!(
        !std::fs::symlink_metadata(copy.join("config.json"))
            .unwrap()
            .is_symlink()
    );
    let mut note = |event: Event<'_>| {
        if let Event::Began {
            stage: Stage::Copy,
            item,
            ..
        } = event
        {
            again.push(item.to_owned());
        }
    };
    pull(&repo, &settings, Some(&copy), &mut note).unwrap();
    assert!(again.is_empty());
}
