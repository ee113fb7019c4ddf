//! Line charts as inline SVG.

use std::fmt::Write;

/// One chart: a figure over the steps, a line a run.
pub(super) struct Chart {
    pub(super) title: String,
    /// How numbers on the vertical axis are written.
    pub(super) format: fn(f64) -> String,
    /// Points by run, in the order of the runs; empty for runs without the figure.
    pub(super) lines: Vec<Vec<(f64, Option<f64>)>>,
    /// How the line is drawn.
    pub(super) look: Look,
    /// Let the axis begin at zero.
    pub(super) from_zero: bool,
}

/// How a line is drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// As it is: what is set or measured without noise.
    Plain,
    /// Faintly under its moving average, when there are many points.
    Noisy,
    /// Every point marked, for figures that are taken seldom.
    Dots,
}

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 28.0;
/// Points of a line; more are drawn as the extremes of their neighbourhood.
const MOST_POINTS: usize = 400;
/// A line with more points than this is drawn faintly under its moving average.
const SMOOTHED_FROM: usize = 60;

impl Chart {
    /// Nothing where no run has the figure.
    pub(super) fn svg(&self) -> Option<String> {
        let values = || self.lines.iter().flatten().filter_map(|(x, y)| y.map(|y| (*x, y)));
        values().next()?;
        let x = Axis::over(values().map(|(x, _)| x), false, LEFT, WIDTH - RIGHT);
        let y = Axis::over(values().map(|(_, y)| y), self.from_zero, HEIGHT - BOTTOM, TOP);
        let mut svg = format!(
            r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}">"#,
            super::page::escaped(&self.title)
        );
        self.grid(&mut svg, &x, &y);
        for (run, line) in self.lines.iter().enumerate() {
            self.line(&mut svg, run, line, &x, &y);
        }
        svg.push_str("</svg>");
        Some(svg)
    }

    fn grid(&self, svg: &mut String, x: &Axis, y: &Axis) {
        for tick in y.ticks(4) {
            let at = y.place(tick);
            let _ = write!(
                svg,
                r#"<line class="grid" x1="{LEFT}" x2="{:.1}" y1="{at:.1}" y2="{at:.1}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0,
                (self.format)(tick)
            );
        }
        for tick in x.ticks(5).into_iter().filter(|tick| tick.fract() == 0.0) {
            let at = x.place(tick);
            let anchor = if at > WIDTH - 40.0 { "end" } else { "middle" };
            let _ = write!(
                svg,
                r#"<text class="tick" x="{at:.1}" y="{:.1}" text-anchor="{anchor}">{tick}</text>"#,
                HEIGHT - 8.0
            );
        }
    }

    fn line(&self, svg: &mut String, run: usize, points: &[(f64, Option<f64>)], x: &Axis, y: &Axis) {
        let n = points.iter().filter(|(_, value)| value.is_some()).count();
        let is_smoothed = n >= SMOOTHED_FROM && self.look == Look::Noisy;
        let path = |points: &[(f64, Option<f64>)]| {
            let mut path = String::new();
            let mut pen_is_down = false;
            for (step, value) in points {
                let Some(value) = value else {
                    pen_is_down = false;
                    continue;
                };
                let word = if pen_is_down { 'L' } else { 'M' };
                let _ = write!(path, "{word}{:.1} {:.1}", x.place(*step), y.place(*value));
                pen_is_down = true;
            }
            path
        };
        let faint = if is_smoothed { " faint" } else { "" };
        let _ = write!(
            svg,
            r#"<path class="line run{run}{faint}" d="{}"/>"#,
            path(&thinned(points))
        );
        if is_smoothed {
            let _ = write!(
                svg,
                r#"<path class="line run{run}" d="{}"/>"#,
                path(&thinned(&smoothed(points)))
            );
        }
        if self.look == Look::Dots || n == 1 {
            for (step, value) in points
                .iter()
                .filter_map(|(step, value)| value.map(|value| (step, value)))
            {
                let _ = write!(
                    svg,
                    r#"<circle class="dot run{run}" cx="{:.1}" cy="{:.1}" r="3.2"><title>step {step}: {}</title></circle>"#,
                    x.place(*step),
                    y.place(value),
                    (self.format)(value)
                );
            }
        }
    }
}

/// Numbers laid over a stretch of the picture.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, from_zero: bool, from: f64, to: f64) -> Self {
        let start = if from_zero {
            (0.0, 0.0)
        } else {
            (f64::INFINITY, f64::NEG_INFINITY)
        };
        let (mut low, mut high) = values.fold(start, |(low, high), value| (low.min(value), high.max(value)));
        if high - low <= f64::EPSILON * high.abs() {
            // One value only: the middle of a stretch.
            let around = if high == 0.0 { 1.0 } else { 0.5 * high.abs() };
            (low, high) = (low - around, high + around);
        }
        Self { low, high, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// Round numbers, about `n` of them.
    fn ticks(&self, n: usize) -> Vec<f64> {
        let rough = (self.high - self.low) / n as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|factor| factor * power)
            .into_iter()
            .find(|step| *step >= rough);
        let step = step.unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        // From whole numbers, so that 0.3 is not 0.30000000000000004.
        (first..=last)
            .map(|k| (k as f64 * step * 1e12 / power).round() / 1e12 * power)
            .collect()
    }
}

/// The smallest and the largest of each stretch, when there are too many points.
fn thinned(points: &[(f64, Option<f64>)]) -> Vec<(f64, Option<f64>)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MOST_POINTS / 2);
    let mut kept = Vec::new();
    for part in points.chunks(stretch) {
        if part.iter().any(|(_, value)| value.is_none()) {
            kept.push((part[0].0, None));
        }
        let known = || part.iter().filter(|(_, value)| value.is_some());
        let order = |a: &&(f64, Option<f64>), b: &&(f64, Option<f64>)| {
            a.1.partial_cmp(&b.1).unwrap_or(std::cmp::Ordering::Equal)
        };
        let mut ends: Vec<_> = known()
            .min_by(order)
            .into_iter()
            .chain(known().max_by(order))
            .copied()
            .collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        kept.extend(ends);
    }
    kept
}

/// A moving average over a fiftieth of the points to either side.
fn smoothed(points: &[(f64, Option<f64>)]) -> Vec<(f64, Option<f64>)> {
    let reach = (points.len() / 50).max(2);
    (0..points.len())
        .map(|at| {
            let near = &points[at.saturating_sub(reach)..(at + reach + 1).min(points.len())];
            let known: Vec<f64> = near.iter().filter_map(|(_, value)| *value).collect();
            let mean = (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64);
            (points[at].0, mean)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(line: Vec<(f64, Option<f64>)>) -> Chart {
        Chart {
            title: "loss".to_owned(),
            format: |x| format!("{x}"),
            lines: vec![line],
            look: Look::Noisy,
            from_zero: false,
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let check = |low: f64, high: f64, expected: &[f64]| {
            let axis = Axis {
                low,
                high,
                from: 0.0,
                to: 1.0,
            };
            let ticks = axis.ticks(4);
            let near = |(tick, expected): (&f64, &f64)| (tick - expected).abs() <= 1e-12 * expected.abs();
            assert!(
                ticks.len() == expected.len() && ticks.iter().zip(expected).all(near),
                "{ticks:?}"
            );
        };
        check(0.0, 1.0, &[0.0, 0.5, 1.0]);
        check(0.12, 0.47, &[0.2, 0.3, 0.4]);
        check(1e-5, 9e-5, &[2e-5, 4e-5, 6e-5, 8e-5]);
        check(-3.0, 3.0, &[-2.0, 0.0, 2.0]);
    }

    #[test]
    fn a_value_that_is_not_finite_is_a_gap() {
        let svg = chart(vec![(1.0, Some(2.0)), (2.0, None), (3.0, Some(1.0)), (4.0, Some(1.5))])
            .svg()
            .unwrap();
        let path = svg.split("d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(path.matches('M').count(), 2);
        assert_eq!(path.matches('L').count(), 1);
    }

    #[test]
    fn nothing_and_one_point_and_many_are_drawn_without_nan() {
        assert!(chart(vec![]).svg().is_none());
        assert!(chart(vec![(1.0, None)]).svg().is_none());
        for points in [
            vec![(5.0, Some(0.0))],
            (0..5000).map(|i| (f64::from(i), Some(f64::from(i % 7)))).collect(),
        ] {
            let svg = chart(points).svg().unwrap();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.len() < 40_000, "{}", svg.len());
        }
    }
}
