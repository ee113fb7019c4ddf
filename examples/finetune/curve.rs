//! A loss curve, as text and as SVG.

/// The curve in characters, the scale on the left.
pub(crate) fn as_text(losses: &[f64]) -> String {
    const ROWS: usize = 12;
    const COLUMNS: usize = 72;
    let highest = highest(losses);
    let columns: Vec<f64> = losses.chunks(losses.len().div_ceil(COLUMNS).max(1)).map(mean).collect();
    let mut text = String::new();
    for row in (0..ROWS).rev() {
        let (floor, step) = (row as f64 / ROWS as f64 * highest, highest / ROWS as f64);
        let marks: String = columns
            .iter()
            .map(|loss| {
                if (floor..floor + step).contains(loss) {
                    '●'
                } else {
                    ' '
                }
            })
            .collect();
        text.push_str(&format!("{floor:6.2} ┤{marks}\n"));
    }
    text.push_str(&format!(
        "  loss └{}\n        0 … {} steps\n",
        "─".repeat(columns.len()),
        losses.len()
    ));
    text
}

/// The curve as a drawing, readable on light and dark pages.
pub(crate) fn as_svg(losses: &[f64]) -> String {
    const WIDTH: f64 = 640.0;
    const HEIGHT: f64 = 320.0;
    const MARGIN: f64 = 40.0;
    let highest = highest(losses);
    let x = |step: usize| MARGIN + step as f64 / losses.len().saturating_sub(1).max(1) as f64 * (WIDTH - 2.0 * MARGIN);
    let y = |loss: f64| HEIGHT - MARGIN - loss / highest * (HEIGHT - 2.0 * MARGIN);
    let points: String = losses
        .iter()
        .enumerate()
        .map(|(step, loss)| format!("{:.1},{:.1} ", x(step), y(*loss)))
        .collect();
    let mut lines = String::new();
    for quarter in 0..=4 {
        let loss = highest * f64::from(quarter) / 4.0;
        let (y, right) = (y(loss), WIDTH - MARGIN);
        lines.push_str(&format!(
            "<line x1=\"{MARGIN}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#8884\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{loss:.2}</text>\n",
            MARGIN - 6.0,
            y + 4.0
        ));
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\" fill=\"#888\">\n<title>Loss over {} steps</title>\n{lines}\
         <polyline fill=\"none\" stroke=\"#d2691e\" stroke-width=\"2\" points=\"{}\"/>\n\
         <text x=\"{MARGIN}\" y=\"20\">loss</text><text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} steps</text>\n</svg>\n",
        losses.len(),
        points.trim_end(),
        WIDTH - MARGIN,
        HEIGHT - 12.0,
        losses.len()
    )
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Just above the highest loss, so that it has a place in the picture.
fn highest(losses: &[f64]) -> f64 {
    losses.iter().copied().fold(f64::MIN_POSITIVE, f64::max) * 1.001
}
