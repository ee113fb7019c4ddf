use serde::Serialize;

/// How much of an intended update is left in the stored weight, over all elements, in f64.
///
/// With `Δ` intended and `Δ̂` kept: `cosine = <Δ,Δ̂>/(‖Δ‖‖Δ̂‖)`, `rel_error = ‖Δ̂-Δ‖/‖Δ‖`, `gain = <Δ,Δ̂>/‖Δ‖²`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Retention {
    /// Direction: 1 when it is kept.
    pub cosine: f64,
    /// Size of what went wrong, relative to the update.
    pub rel_error: f64,
    /// How much of the update is there along its own direction.
    pub gain: f64,
    /// Root mean square of the intended update.
    pub delta_rms: f64,
    /// `‖Δ‖ / ‖W‖`.
    pub delta_to_weight: f64,
}

impl Retention {
    /// Compares base, fused and stored weight; `None` when the update is zero everywhere.
    ///
    /// ```
    /// use planish_checkpoint::fuse::Retention;
    /// let kept = Retention::measure(&[1.0, 0.0], &[1.0, 0.5], &[1.0, 0.25]).expect("an update");
    /// assert_eq!((kept.cosine, kept.rel_error, kept.gain), (1.0, 0.5, 0.5));
    /// assert_eq!(Retention::measure(&[1.0], &[1.0], &[1.0]), None);
    /// ```
    pub fn measure(base: &[f32], fused: &[f32], stored: &[f32]) -> Option<Self> {
        let (mut intended, mut kept, mut product, mut error, mut weight) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for ((base, fused), stored) in base.iter().zip(fused).zip(stored) {
            let base = f64::from(*base);
            let (delta, left) = (f64::from(*fused) - base, f64::from(*stored) - base);
            intended += delta * delta;
            kept += left * left;
            product += delta * left;
            error += (left - delta) * (left - delta);
            weight += base * base;
        }
        if intended == 0.0 {
            return None;
        }
        Some(Self {
            // A lost update has no direction: as bad as an unrelated one.
            cosine: if kept == 0.0 {
                0.0
            } else {
                product / (intended.sqrt() * kept.sqrt())
            },
            rel_error: (error / intended).sqrt(),
            gain: product / intended,
            delta_rms: (intended / base.len() as f64).sqrt(),
            delta_to_weight: if weight == 0.0 {
                f64::MAX
            } else {
                (intended / weight).sqrt()
            },
        })
    }
}
