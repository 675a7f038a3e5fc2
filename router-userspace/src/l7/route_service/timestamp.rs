//! Times as RFC 3339 writes them, which is how Go's `encoding/json` does. Pure.
//!
//! Written in UTC with nine digits of a second; read with any offset and any number of digits.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY_SECS: i64 = 86_400;

/// `2006-01-02T15:04:05.000000000Z`. Times before 1970 are written as 1970.
pub(super) fn format(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let secs = since.as_secs().cast_signed();
    let (year, month, day) = date_of(secs.div_euclid(DAY_SECS));
    let of_day = secs.rem_euclid(DAY_SECS);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let nanos = since.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// `None` if it is no time, or before 1970.
pub(super) fn parse(text: &str) -> Option<SystemTime> {
    let bytes = text.as_bytes();
    let separators = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if separators
        .iter()
        .any(|&(at, byte)| bytes.get(at) != Some(&byte))
    {
        return None;
    }
    let field = |from: usize, to: usize| number(text.get(from..to)?);
    let (year, month, day) = (field(0, 4)?, field(5, 7)?, field(8, 10)?);
    let (hour, minute, second) = (field(11, 13)?, field(14, 16)?, field(17, 19)?);
    let is_time = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    let (nanos, zone) = fraction(text.get(19..)?)?;
    let secs = days_to(year, month, day) * DAY_SECS + hour * 3600 + minute * 60 + second;
    let secs = u64::try_from(secs - offset_secs(zone)?).ok()?;
    is_time.then(|| UNIX_EPOCH + Duration::new(secs, nanos))
}

/// The nanoseconds, cut at the ninth digit, and what is behind them.
fn fraction(text: &str) -> Option<(u32, &str)> {
    let Some(digits) = text.strip_prefix('.') else {
        return Some((0, text));
    };
    let end = digits.find(|digit: char| !digit.is_ascii_digit())?;
    let (digits, zone) = digits.split_at(end);
    let digits = &digits[..digits.len().min(9)];
    let scale = 10_u32.pow(9 - u32::try_from(digits.len()).ok()?);
    let value = u32::try_from(number(digits)?).ok()?;
    Some((value * scale, zone))
}

/// `Z`, `+HH:MM` or `-HH:MM`, eastwards.
fn offset_secs(zone: &str) -> Option<i64> {
    if zone == "Z" {
        return Some(0);
    }
    let sign = match zone.as_bytes().first()? {
        b'+' => 1,
        b'-' => -1,
        _ => return None,
    };
    let (hours, minutes) = zone.get(1..)?.split_once(':')?;
    let has_lengths = hours.len() == 2 && minutes.len() == 2;
    let secs = number(hours)? * 3600 + number(minutes)? * 60;
    has_lengths.then_some(sign * secs)
}

fn number(digits: &str) -> Option<i64> {
    let are_digits = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
    are_digits.then(|| digits.parse().ok())?
}

/// Days from 1970-01-01 to a date of the proleptic Gregorian calendar.
///
/// Years begin in March, so that the day that may be missing is the last. A cycle of leap years is
/// 400 years or 146,097 days, and 719,468 days lie between 0000-03-01 and 1970-01-01.
fn days_to(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let of_cycle = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let of_cycle = of_cycle * 365 + of_cycle / 4 - of_cycle / 100 + of_year;
    year.div_euclid(400) * 146_097 + of_cycle - 719_468
}

/// The year, month and day that [`days_to`] is of.
fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let of_cycle = days.rem_euclid(146_097);
    let year = (of_cycle - of_cycle / 1460 + of_cycle / 36_524 - of_cycle / 146_096) / 365;
    let of_year = of_cycle - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + days.div_euclid(146_097) * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at_ms(ms: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(ms)
    }

    #[test]
    fn times_are_read_with_any_offset_and_precision() {
        for (text, ms) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:00:00Z", 951_825_600_000),
            ("2026-11-22T21:17:21.5+02:00", 1_795_375_041_500),
            ("2026-11-22T14:47:21.500000000-04:30", 1_795_375_041_500),
            ("2026-11-22T19:17:21.5000000009Z", 1_795_375_041_500),
        ] {
            assert_eq!(parse(text), Some(at_ms(ms)), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "2026-11-22",
            "2026-11-22T19:17:21",
            "2026-11-22 19:17:21Z",
            "2026-13-22T19:17:21Z",
            "2026-11-22T24:17:21Z",
            "2026-11-22T19:17:21.Z",
            "2026-11-22T19:17:21+2:00",
            "2026-11-22T19:17:21+02",
            "2026-11-22T19:17:21Zé",
            "+026-11-22T19:17:21Z",
            "1969-12-31T23:59:59Z",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn times_are_written_in_utc() {
        let text = format(at_ms(1_795_375_041_500));
        assert_eq!(text, "2026-11-22T19:17:21.500000000Z");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(secs in 0..250_000_000_000_u64, nanos in 0..1_000_000_000_u32) {
            let time = UNIX_EPOCH + Duration::new(secs, nanos);
            prop_assert_eq!(parse(&format(time)), Some(time));
        }

        #[test]
        fn any_text_is_read_without_a_panic(text: String) {
            let _ = parse(&text);
        }
    }
}
