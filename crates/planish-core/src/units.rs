//! Numbers as people read them: decimal bytes (GB = 10⁹) and durations.

use std::time::Duration;

/// `bytes` with a decimal unit and three significant digits.
///
/// ```
/// use planish_core::units::format_bytes;
/// assert_eq!(format_bytes(269_060_552), "269 MB");
/// assert_eq!(format_bytes(1_500_000_000), "1.50 GB");
/// ```
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut unit = 0;
    // 999.5 would print as 1000: it belongs to the next unit.
    while value >= 999.5 {
        value /= 1000.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// Bytes from text such as `8GB`, `1.5 GiB`, `512M` or `1000`; a bare letter is decimal. `None` when it is none of these.
///
/// ```
/// use planish_core::units::parse_bytes;
/// assert_eq!(parse_bytes("1.5 GB"), Some(1_500_000_000));
/// assert_eq!(parse_bytes("2KiB"), Some(2048));
/// assert_eq!(parse_bytes("8 apples"), None);
/// ```
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let unit_start = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_start);
    let scale: f64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    let bytes = number.trim().parse::<f64>().ok()? * scale;
    (bytes.is_finite() && (0.0..9e18).contains(&bytes)).then_some(bytes.round() as u64)
}

/// A duration with the two units that matter: `850 ms`, `4.2 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`.
///
/// ```
/// use std::time::Duration;
/// use planish_core::units::format_duration;
/// assert_eq!(format_duration(Duration::from_secs(185)), "3 min 05 s");
/// ```
pub fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 0.9995 {
        return format!("{:.0} ms", seconds * 1e3);
    }
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..3_600 => format!("{} min {:02} s", whole / 60, whole % 60),
        3_600..86_400 => format!("{} h {:02} min", whole / 3_600, whole % 3_600 / 60),
        _ => format!("{} d {:02} h", whole / 86_400, whole % 86_400 / 3_600),
    }
}

fn three_digits(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_three_digits() {
        let check = |bytes, expect: &str| assert_eq!(format_bytes(bytes), expect);
        check(0, "0 B");
        check(999, "999 B");
        check(1_000, "1.00 kB");
        check(9_996, "10.0 kB");
        check(99_960, "100 kB");
        check(999_499, "999 kB");
        check(999_500, "1.00 MB");
        check(1 << 30, "1.07 GB");
        check(u64::MAX, "18.4 EB");
    }

    #[test]
    fn durations_never_show_sixty() {
        let check = |ms, expect: &str| assert_eq!(format_duration(Duration::from_millis(ms)), expect);
        check(0, "0 ms");
        check(999, "999 ms");
        check(1_000, "1.0 s");
        check(59_940, "59.9 s");
        check(59_960, "1 min 00 s");
        check(3_599_600, "1 h 00 min");
        check(7_620_000, "2 h 07 min");
        check(273_600_000, "3 d 04 h");
    }
}
