//! Tells the linker where the installed program will find MLX: the cache it was built against, else `lib` beside `bin`.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let beside = match env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("macos") => "@executable_path/../lib",
        _ => "$ORIGIN/../lib",
    };
    // Set by the build script of mlx-sys, where the program is linked to MLX at all.
    let cache = env::var("DEP_MLX_LIB_DIR");
    for directory in cache.as_deref().into_iter().chain([beside]) {
        println!("cargo::rustc-link-arg-bins=-Wl,-rpath,{directory}");
    }
}
