//! One repository over the network, file by file, each checked after it has come.

use std::any::Any;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use planish_core::hash::sha256_file;

use super::{HubSettings, RepoId};
use crate::error::io_at;
use crate::{Error, Event, Progress, Result, Stage};

/// A download that breaks off goes on where it stopped, this many times. The loop is ours: when hf-hub 0.5 retries a
/// download that it had resumed, it begins anew in the same file and the pieces do not fit.
const RETRIES: u32 = 3;
/// Before the first retry; the second waits four times as long, the third nine times.
const RETRY_WAIT: Duration = Duration::from_millis(200);

/// A repository whose list of files has been read.
pub(super) struct Connection<'a> {
    repo: &'a RepoId,
    settings: &'a HubSettings,
    api: Api,
    /// The commit that the revision means; all files come from it.
    commit: String,
    names: Vec<String>,
}

impl<'a> Connection<'a> {
    pub(super) fn open(repo: &'a RepoId, settings: &'a HubSettings) -> Result<Self> {
        let mut builder = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_progress(false)
            .with_token(settings.token.clone());
        if let Some(endpoint) = &settings.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        let failed = |error| request_error(repo, settings, "its list of files", error);
        let api = builder.build().map_err(Failure::Api).map_err(failed)?;
        let listed = api.repo(at_revision(repo, repo.revision()));
        let info = guarded(|| listed.info()).map_err(failed)?;
        if !is_hash(&info.sha) {
            return Err(nonsense(repo, "its list of files", "the commit", &info.sha));
        }
        let names = info.siblings.into_iter().map(|file| file.rfilename).collect();
        Ok(Self {
            repo,
            settings,
            api,
            commit: info.sha,
            names,
        })
    }

    pub(super) fn file_names(&self) -> Vec<String> {
        self.names.clone()
    }

    /// The folder of this commit in the cache.
    pub(super) fn snapshot(&self) -> PathBuf {
        snapshot(self.repo, self.settings, &self.commit)
    }

    /// Brings one file into the snapshot, unless it is there.
    pub(super) fn fetch(&self, file: &str, progress: &mut dyn Progress) -> Result<()> {
        let path = self.snapshot().join(file);
        if path.exists() {
            return Ok(());
        }
        let remote = self.api.repo(at_revision(self.repo, &self.commit));
        let failed = |error| request_error(self.repo, self.settings, file, error);
        let announced = guarded(|| self.api.metadata(&remote.url(file))).map_err(failed)?;
        // Both become parts of paths.
        for (what, value) in [("the etag", announced.etag()), ("the commit", announced.commit_hash())] {
            if !is_hash(value) {
                return Err(nonsense(self.repo, file, what, value));
            }
        }
        if announced.commit_hash() != self.commit {
            return Err(nonsense(self.repo, file, "another commit", announced.commit_hash()));
        }
        self.download(&remote, file, announced.etag(), progress)
            .map_err(failed)?;
        self.check(file, announced.etag(), announced.size() as u64, progress)
    }

    /// Lets an offline run find this commit under the name of the revision.
    pub(super) fn remember_revision(&self) -> Result<()> {
        let cached = Cache::new(self.settings.cache.clone()).repo(at_revision(self.repo, self.repo.revision()));
        cached.create_ref(&self.commit).map_err(io_at(&self.settings.cache))
    }

    fn download(&self, remote: &ApiRepo, file: &str, etag: &str, progress: &mut dyn Progress) -> Result<(), Failure> {
        let mut attempt = 0;
        loop {
            let result = guarded(|| {
                remote.download_with_progress(
                    file,
                    Reporter {
                        progress,
                        file,
                        done_bytes: 0,
                    },
                )
            });
            let Err(failure) = result else { return Ok(()) };
            attempt += 1;
            if attempt > RETRIES || failure.is_final() {
                return Err(failure);
            }
            if failure.leftover_is_unusable() {
                let _ = fs::remove_file(self.blob(etag).with_extension("part"));
            } else {
                std::thread::sleep(RETRY_WAIT * attempt * attempt);
            }
        }
    }

    /// Compares size and, for large files, whose etag is their SHA-256, content.
    fn check(&self, file: &str, etag: &str, size: u64, progress: &mut dyn Progress) -> Result<()> {
        let path = self.snapshot().join(file);
        let found_size = fs::metadata(&path).map_err(io_at(&path))?.len();
        let mut problem = (found_size != size).then(|| format!("{found_size} bytes came, {size} were announced"));
        if problem.is_none() && etag.len() == 64 {
            progress.report(Event::Began {
                stage: Stage::Check,
                item: file,
                total_bytes: None,
            });
            let found = sha256_file(&path).map_err(io_at(&path))?;
            problem = (found != etag).then(|| format!("SHA-256 is {found}, {etag} was announced"));
            progress.report(Event::Ended);
        }
        let Some(problem) = problem else { return Ok(()) };
        for gone in [path, self.blob(etag)] {
            fs::remove_file(&gone).map_err(io_at(gone))?;
        }
        Err(Error::HubCorrupt {
            repo: self.repo.to_string(),
            file: file.to_owned(),
            problem,
        })
    }

    fn blob(&self, etag: &str) -> PathBuf {
        Cache::new(self.settings.cache.clone())
            .repo(at_revision(self.repo, &self.commit))
            .blob_path(etag)
    }
}

/// The folder in the cache that the revision last meant, or that it names as a commit.
pub(super) fn cached_snapshot(repo: &RepoId, settings: &HubSettings) -> Option<PathBuf> {
    let at = at_revision(repo, repo.revision());
    let named = settings.cache.join(at.folder_name()).join("refs").join(repo.revision());
    let commit = fs::read_to_string(named)
        .ok()
        .map(|text| text.trim().to_owned())
        .filter(|text| is_hash(text));
    let folder = snapshot(repo, settings, commit.as_deref().unwrap_or(repo.revision()));
    folder.is_dir().then_some(folder)
}

fn snapshot(repo: &RepoId, settings: &HubSettings, commit: &str) -> PathBuf {
    Cache::new(settings.cache.clone())
        .repo(at_revision(repo, commit))
        .pointer_path(commit)
}

fn at_revision(repo: &RepoId, revision: &str) -> Repo {
    Repo::with_revision(repo.name().to_owned(), RepoType::Model, revision.to_owned())
}

/// Git's SHA-1, or SHA-256.
fn is_hash(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Why a call of hf-hub did not succeed.
enum Failure {
    Api(ApiError),
    /// hf-hub 0.5 panics at a redirect without a target.
    Panic,
}

impl Failure {
    /// What an earlier run left is longer than the file, or whole already so that no byte of it can be asked for.
    fn leftover_is_unusable(&self) -> bool {
        matches!(self, Self::Api(ApiError::InvalidResume)) || self.status() == Some(416)
    }

    /// Whether another attempt would end the same way: refusals, and everything but the network.
    fn is_final(&self) -> bool {
        match self {
            Self::Api(ApiError::RequestError(_)) => matches!(self.status(), Some(400..=415 | 417..=428 | 430..=499)),
            Self::Api(ApiError::IoError(source)) => is_local(source.kind()),
            Self::Api(ApiError::InvalidResume) => false,
            Self::Api(_) | Self::Panic => true,
        }
    }

    fn status(&self) -> Option<u16> {
        match self {
            Self::Api(error) => status(error),
            Self::Panic => None,
        }
    }
}

fn guarded<T>(call: impl FnOnce() -> Result<T, ApiError>) -> Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(Failure::Api),
        Err(payload) => {
            drop::<Box<dyn Any + Send>>(payload);
            Err(Failure::Panic)
        }
    }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

fn request_error(repo: &RepoId, settings: &HubSettings, item: &str, failure: Failure) -> Error {
    let (repo, item) = (repo.to_string(), item.to_owned());
    let error = match failure {
        Failure::Panic => {
            return Error::HubRequest {
                repo,
                item,
                message: "the answer makes no sense".into(),
            };
        }
        Failure::Api(error) => error,
    };
    if let ApiError::IoError(source) = error {
        return if is_local(source.kind()) {
            Error::Io {
                path: settings.cache.clone(),
                source,
            }
        } else {
            Error::HubRequest {
                repo,
                item,
                message: format!("the connection broke before the file ended ({source})"),
            }
        };
    }
    match status(&error) {
        Some(status @ (401 | 403)) => Error::HubDenied {
            repo,
            item,
            status,
            had_token: settings.token.is_some(),
        },
        Some(404) => Error::HubNotFound { repo, item },
        Some(status) => Error::HubRequest {
            repo,
            item,
            message: format!("the hub answers {status}"),
        },
        None => Error::HubRequest {
            repo,
            item,
            message: error.to_string(),
        },
    }
}

/// Whether an I/O error is the disk's rather than the network's; hf-hub does not say.
fn is_local(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind as K;
    matches!(
        kind,
        K::StorageFull
            | K::QuotaExceeded
            | K::FileTooLarge
            | K::PermissionDenied
            | K::ReadOnlyFilesystem
            | K::NotFound
            | K::AlreadyExists
            | K::NotADirectory
            | K::IsADirectory
    )
}

fn nonsense(repo: &RepoId, item: &str, what: &str, value: &str) -> Error {
    let shown: String = value.chars().take(80).collect();
    let message = format!("the hub gives {what} as {shown:?}, which makes no sense");
    Error::HubRequest {
        repo: repo.to_string(),
        item: item.to_owned(),
        message,
    }
}

/// hf-hub's progress as ours.
struct Reporter<'a> {
    progress: &'a mut dyn Progress,
    file: &'a str,
    done_bytes: u64,
}

impl hf_hub::api::Progress for Reporter<'_> {
    /// Called again for each attempt.
    fn init(&mut self, size: usize, _: &str) {
        self.done_bytes = 0;
        self.progress.report(Event::Began {
            stage: Stage::Download,
            item: self.file,
            total_bytes: Some(size as u64),
        });
    }

    fn update(&mut self, size: usize) {
        self.done_bytes += size as u64;
        self.progress.report(Event::Advanced {
            done_bytes: self.done_bytes,
        });
    }

    fn finish(&mut self) {
        self.progress.report(Event::Ended);
    }
}
