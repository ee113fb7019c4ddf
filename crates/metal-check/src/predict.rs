//! Says before anything runs that a build cannot load on this macOS.

use crate::macho::Image;
use crate::metallib::{self, Header, Summary};
use crate::version::Version;
use serde::{Deserialize, Serialize};

/// A failure that the files already show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prediction {
    /// A code of the catalogue.
    pub code: String,
    /// The numbers that show it.
    pub detail: String,
}

/// What will fail on that macOS: the library first, since it is loaded first. Empty when nothing is seen.
///
/// ```
/// use metal_check::predict::of_library;
/// let image = metal_check::macho::Image { minos: Some("26.2".parse().unwrap()), ..Default::default() };
/// assert_eq!(of_library(&image, "26.1".parse().unwrap())[0].code, "DYLIB_TARGET_TOO_NEW");
/// ```
pub fn of_library(image: &Image, macos: Version) -> Vec<Prediction> {
    let mut found = Vec::new();
    if let Some(minos) = image.minos.filter(|minos| *minos > macos) {
        found.push(prediction(
            "DYLIB_TARGET_TOO_NEW",
            format!("libmlx needs macOS {minos}, this is {macos}"),
        ));
    }
    if let Some(path) = image.relative_rpaths().first() {
        found.push(prediction(
            "DYLD_NOT_LOADED",
            format!("run path `{path}` is relative to the working directory"),
        ));
    }
    found
}

/// The same for the Metal library; `summary` where its list of functions was read.
pub fn of_metallib(header: &Header, summary: Option<&Summary>, macos: Version) -> Vec<Prediction> {
    let mut found = Vec::new();
    if header.target_os > macos {
        found.push(prediction(
            "METALLIB_TARGET_TOO_NEW",
            format!("mlx.metallib needs macOS {}, this is {macos}", header.target_os),
        ));
    }
    let newest = metallib::newest_language(macos);
    if let Some(language) = summary
        .map(|summary| summary.language)
        .filter(|language| *language > newest)
    {
        found.push(prediction(
            "METALLIB_LANG_TOO_NEW",
            format!("mlx.metallib is in Metal {language}, macOS {macos} loads up to {newest}"),
        ));
    }
    found
}

/// The prediction for a Metal library that could not be read: absent, empty, truncated or something else.
pub fn of_unreadable_metallib(reason: &str) -> Prediction {
    prediction("METALLIB_NOT_FOUND", reason.to_owned())
}

fn prediction(code: &str, detail: String) -> Prediction {
    Prediction {
        code: code.to_owned(),
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(target_os: Version) -> Header {
        let section = metallib::Section { offset: 0, size: 1 };
        Header {
            is_macos: true,
            file_version: (2, 7),
            target_os,
            file_bytes: 100,
            functions: section,
            public_metadata: section,
            private_metadata: section,
            bitcode: section,
        }
    }

    fn summary(language: Version) -> Summary {
        Summary {
            functions: 1,
            tensor_unit: 0,
            fences: 0,
            air: Version(2, 6, 0),
            language,
        }
    }

    fn codes(found: Vec<Prediction>) -> Vec<String> {
        found.into_iter().map(|one| one.code).collect()
    }

    #[test]
    fn newer_files_fail_on_older_systems_only() {
        let newer = header(Version(26, 2, 0));
        assert_eq!(
            codes(of_metallib(&newer, Some(&summary(Version(4, 0, 0))), Version(15, 6, 1))),
            ["METALLIB_TARGET_TOO_NEW", "METALLIB_LANG_TOO_NEW"]
        );
        assert!(of_metallib(&newer, Some(&summary(Version(4, 0, 0))), Version(26, 2, 0)).is_empty());
    }

    #[test]
    fn a_lying_stamp_is_seen_by_the_language() {
        assert_eq!(
            codes(of_metallib(
                &header(Version(14, 0, 0)),
                Some(&summary(Version(4, 0, 0))),
                Version(15, 0, 0)
            )),
            ["METALLIB_LANG_TOO_NEW"]
        );
    }

    #[test]
    fn relative_run_path_is_seen() {
        let image = Image {
            rpaths: vec!["lib".into()],
            ..Image::default()
        };
        assert_eq!(codes(of_library(&image, Version(26, 0, 0))), ["DYLD_NOT_LOADED"]);
    }
}
