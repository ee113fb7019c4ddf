//! Reads what a macOS library or program says about itself: oldest system, libraries, run paths.

use crate::Error;
use crate::version::Version;
use object::Endianness;
use object::macho::{self, MachHeader64};
use object::read::macho::{LoadCommandVariant, MachHeader, Nlist};
use serde::{Deserialize, Serialize};

/// The load commands that decide whether it starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// `program`, `library`, `bundle` or `other`.
    pub kind: String,
    /// Oldest macOS (`LC_BUILD_VERSION` minos).
    pub minos: Option<Version>,
    /// SDK it was built with.
    pub sdk: Option<Version>,
    /// Own name of a library (`LC_ID_DYLIB`).
    pub install_name: Option<String>,
    /// Libraries it needs, in order.
    pub libraries: Vec<String>,
    /// Libraries it can do without, in order.
    pub weak_libraries: Vec<String>,
    /// Where `@rpath` is looked up, in order.
    pub rpaths: Vec<String>,
    /// Symbols that others must define.
    pub undefined_symbols: Vec<String>,
}

/// Reads a thin 64-bit arm file.
///
/// # Errors
/// [`Error::MachO`] when the file is fat, of another architecture, not for macOS, or damaged.
pub fn parse(bytes: &[u8]) -> Result<Image, Error> {
    let refuse = |error: object::Error| Error::MachO(error.to_string());
    let header = MachHeader64::<Endianness>::parse(bytes, 0).map_err(refuse)?;
    let endian = header.endian().map_err(refuse)?;
    if header.cputype(endian) != macho::CPU_TYPE_ARM64 {
        return Err(Error::MachO(format!(
            "CPU type {:#x} is not arm64",
            header.cputype(endian)
        )));
    }
    let mut image = Image {
        kind: kind(header.filetype(endian)).to_owned(),
        ..Image::default()
    };
    let mut commands = header.load_commands(endian, bytes, 0).map_err(refuse)?;
    while let Some(command) = commands.next().map_err(refuse)? {
        let text = |offset| -> Result<String, Error> {
            let name = command.string(endian, offset).map_err(refuse)?;
            Ok(String::from_utf8_lossy(name).into_owned())
        };
        match command.variant().map_err(refuse)? {
            LoadCommandVariant::BuildVersion(build) => {
                if build.platform.get(endian) != macho::PLATFORM_MACOS {
                    return Err(Error::MachO(format!(
                        "platform {} is not macOS",
                        build.platform.get(endian)
                    )));
                }
                image.minos = Some(packed(build.minos.get(endian)));
                image.sdk = Some(packed(build.sdk.get(endian)));
            }
            LoadCommandVariant::IdDylib(dylib) => image.install_name = Some(text(dylib.dylib.name)?),
            LoadCommandVariant::Dylib(dylib) if command.cmd() == macho::LC_LOAD_WEAK_DYLIB => {
                image.weak_libraries.push(text(dylib.dylib.name)?)
            }
            LoadCommandVariant::Dylib(dylib) => image.libraries.push(text(dylib.dylib.name)?),
            LoadCommandVariant::Rpath(rpath) => image.rpaths.push(text(rpath.path)?),
            LoadCommandVariant::Symtab(table) => image.undefined_symbols = undefined(endian, table, bytes)?,
            _ => {}
        }
    }
    Ok(image)
}

impl Image {
    /// Libraries that are neither the system's nor found through `@rpath`.
    pub fn foreign_libraries(&self) -> Vec<&str> {
        let system = |name: &&String| name.starts_with("/usr/lib/") || name.starts_with("/System/Library/");
        self.libraries
            .iter()
            .chain(&self.weak_libraries)
            .filter(|name| !system(name))
            .map(String::as_str)
            .collect()
    }

    /// Run paths that break when the working directory changes.
    pub fn relative_rpaths(&self) -> Vec<&str> {
        self.rpaths
            .iter()
            .map(String::as_str)
            .filter(|path| !path.starts_with('/') && !path.starts_with('@'))
            .collect()
    }
}

fn undefined(endian: Endianness, table: &macho::SymtabCommand<Endianness>, bytes: &[u8]) -> Result<Vec<String>, Error> {
    let refuse = |error: object::Error| Error::MachO(error.to_string());
    let symbols = table
        .symbols::<MachHeader64<Endianness>, _>(endian, bytes)
        .map_err(refuse)?;
    let strings = symbols.strings();
    let wanted = symbols
        .iter()
        .filter(|symbol| symbol.is_undefined() && !symbol.is_stab());
    wanted
        .map(|symbol| {
            symbol
                .name(endian, strings)
                .map(|name| String::from_utf8_lossy(name).into_owned())
                .map_err(refuse)
        })
        .collect()
}

fn kind(file_type: u32) -> &'static str {
    match file_type {
        macho::MH_EXECUTE => "program",
        macho::MH_DYLIB => "library",
        macho::MH_BUNDLE => "bundle",
        _ => "other",
    }
}

/// `0xXXXXYYZZ` is X.Y.Z.
fn packed(number: u32) -> Version {
    Version(number >> 16, number >> 8 & 0xff, number & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A library of load commands only.
    fn library(cpu: u32, platform: u32, minos: u32) -> Vec<u8> {
        let mut commands = Vec::new();
        command(&mut commands, 0x32, &[platform, minos, 0x001a_0500, 0], "");
        command(&mut commands, 0x0d, &[24, 0, 0, 0], "@rpath/libmlx.dylib");
        command(&mut commands, 0x0c, &[24, 0, 0, 0], "/usr/lib/libc++.1.dylib");
        command(&mut commands, 0x0c, &[24, 0, 0, 0], "@rpath/libjaccl.dylib");
        command(
            &mut commands,
            0x8000_0018,
            &[24, 0, 0, 0],
            "/System/Library/Frameworks/Foundation.framework/Foundation",
        );
        command(&mut commands, 0x8000_001c, &[12], "lib/mlx");
        command(&mut commands, 0x8000_001c, &[12], "@executable_path/../lib");
        let mut file = Vec::new();
        for number in [0xfeed_facf, cpu, 0, 6, 7, commands.len() as u32, 0, 0] {
            file.extend(u32::to_le_bytes(number));
        }
        file.extend(commands);
        file
    }

    fn command(commands: &mut Vec<u8>, id: u32, numbers: &[u32], text: &str) {
        let mut body: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        body.extend(text.bytes());
        if !text.is_empty() {
            body.push(0);
        }
        while !body.len().is_multiple_of(8) {
            body.push(0);
        }
        commands.extend(id.to_le_bytes());
        commands.extend((body.len() as u32 + 8).to_le_bytes());
        commands.extend(body);
    }

    const ARM64: u32 = 0x0100_000c;

    #[test]
    fn load_commands_are_read() {
        let image = parse(&library(ARM64, 1, 0x001a_0200)).unwrap();
        assert_eq!(image.kind, "library");
        assert_eq!(
            (image.minos, image.sdk),
            (Some(Version(26, 2, 0)), Some(Version(26, 5, 0)))
        );
        assert_eq!(image.install_name.as_deref(), Some("@rpath/libmlx.dylib"));
        assert_eq!(image.foreign_libraries(), ["@rpath/libjaccl.dylib"]);
        assert_eq!(image.weak_libraries.len(), 1);
        assert_eq!(image.relative_rpaths(), ["lib/mlx"]);
    }

    #[test]
    fn err_other_architecture_platform_or_file() {
        assert!(parse(&library(0x0100_0007, 1, 0)).is_err());
        assert!(parse(&library(ARM64, 2, 0)).is_err());
        assert!(parse(b"\x7fELF").is_err());
    }

    #[test]
    fn err_cut_file() {
        let whole = library(ARM64, 1, 0);
        for cut in 0..whole.len() {
            assert!(parse(&whole[..cut]).is_err(), "{cut}");
        }
    }

    proptest::proptest! {
        #[test]
        fn prop_changed_bytes_are_survived(at in 0_usize..400, value: u8) {
            let mut file = library(ARM64, 1, 0);
            let at = at % file.len();
            file[at] = value;
            let _ = parse(&file);
        }
    }
}
