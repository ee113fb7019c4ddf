//! Benchmarks, one file a subject. Run them with `cargo bench -p planish-benches`.
//!
//! Each asserts its answer before it is timed. On a machine that pins OpenBLAS's kernels, measure what a user gets:
//! `env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE cargo bench -p planish-benches --bench matmul`.
