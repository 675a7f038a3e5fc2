//! Points in time as access logs write them.

use std::io::Write;
use std::time::Duration;

const SECONDS_A_DAY: u64 = 24 * 60 * 60;

/// Appends `2006-01-02T15:04:05.000000000Z` for a time since the Unix epoch (RFC 3339 §5.6).
pub(super) fn write(line: &mut Vec<u8>, since_epoch: Duration) {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = date(seconds / SECONDS_A_DAY);
    let of_day = seconds % SECONDS_A_DAY;
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let nanos = since_epoch.subsec_nanos();
    write!(
        line,
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z"
    )
    .expect("a vector takes all");
}

/// The same with microseconds, which is as fine as syslog takes it (RFC 5424 §6.2.3).
pub(super) fn write_micros(line: &mut Vec<u8>, since_epoch: Duration) {
    write(line, since_epoch);
    line.truncate(line.len() - "000Z".len());
    line.push(b'Z');
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Years are taken from March on, so that the leap day is the last: 400 of them have 146,097 days, and
/// months of 30 and 31 days follow in runs of 153 days for five.
fn date(day: u64) -> (u64, u64, u64) {
    // 0000-03-01 is 719,468 days before 1970-01-01.
    let days = day + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(seconds: u64, nanos: u32, expected: &str) {
        let mut line = Vec::new();
        write(&mut line, Duration::new(seconds, nanos));
        assert_eq!(String::from_utf8(line).unwrap(), expected);
    }

    #[test]
    fn times_are_written_in_utc_with_nanoseconds() {
        check(0, 0, "1970-01-01T00:00:00.000000000Z");
        check(1_136_214_245, 7, "2006-01-02T15:04:05.000000007Z");
        check(951_782_400, 0, "2000-02-29T00:00:00.000000000Z");
        check(4_107_542_399, 999_999_999, "2100-02-28T23:59:59.999999999Z");
        check(4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z");
    }

    #[test]
    fn each_day_follows_the_one_before() {
        let mut before = date(0);
        for day in 1..200_000 {
            let (year, month, of_month) = date(day);
            let follows = (year, month, of_month) == (before.0, before.1, before.2 + 1)
                || of_month == 1
                    && before.2 >= 28
                    && (month == before.1 + 1 && year == before.0
                        || month == 1 && before.1 == 12 && year == before.0 + 1);
            assert!(
                follows,
                "{before:?} is not before {:?}",
                (year, month, of_month)
            );
            before = (year, month, of_month);
        }
    }
}
