//! C's `strftime` in the C locale, as glibc has it, of a time without a zone.
//!
//! A field is `%`, flags (`-` no padding, `_` blanks, `0` zeros, `^` capitals, `#` the other case), a width, a
//! modifier (`E` or `O`, without effect in this locale) and a letter. `%z` and `%Z` are empty, as for Python's
//! naive dates, and `%f` is Python's: microseconds. What is no field stays as written.

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
#[rustfmt::skip]
const MONTHS: [&str; 12] = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
];
/// Widest field that is written.
const MAX_WIDTH: usize = 1024;

/// Seconds of Unix time; 0 with a clock before 1970.
pub fn unix_now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64)
}

/// The time `unix_s` in UTC, written as `format` says.
pub(super) fn strftime(format: &str, unix_s: i64) -> String {
    let time = Time::new(unix_s);
    let mut text = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        text.push_str(&rest[..at]);
        let field = &rest[at..];
        let used = match time.field(&field[1..]) {
            Some((written, used)) => {
                text.push_str(&written);
                used + 1
            }
            None => {
                // As written: the percent sign, and what follows is looked at on its own.
                text.push('%');
                1
            }
        };
        rest = &field[used..];
    }
    text + rest
}

/// A broken-down time.
struct Time {
    unix_s: i64,
    year: i64,
    /// From 1.
    month: i64,
    /// From 1.
    day: i64,
    /// From 0.
    day_of_year: i64,
    /// From Sunday, 0.
    weekday: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

/// What a letter stands for.
enum Field {
    /// A number, its width, and what pads it.
    Number(i64, usize, char),
    Text(String),
}

impl Time {
    fn new(unix_s: i64) -> Time {
        let (days, seconds) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
        let (year, month, day) = civil(days);
        Time {
            unix_s,
            year,
            month,
            day,
            day_of_year: days - days_before(year),
            weekday: (days + 4).rem_euclid(7),
            hour: seconds / 3600,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }

    /// The field that `spec` begins with, behind the percent sign, and the bytes it takes.
    fn field(&self, spec: &str) -> Option<(String, usize)> {
        let flags = spec.len() - spec.trim_start_matches(['-', '_', '0', '^', '#']).len();
        let digits = spec[flags..].bytes().take_while(u8::is_ascii_digit).count();
        let width = &spec[flags..flags + digits];
        let width: usize = if width.is_empty() { 0 } else { width.parse().ok()? };
        if width > MAX_WIDTH {
            return None;
        }
        let rest = &spec[flags + digits..];
        let letter = rest.trim_start_matches(['E', 'O']);
        let modifiers = rest.len() - letter.len();
        let letter = letter.chars().next().filter(|_| modifiers <= 1)?;
        let flags_of = &spec[..flags];
        let pad = flags_of.chars().rfind(|c| matches!(c, '-' | '_' | '0'));
        let mut text = match self.value(letter)? {
            Field::Number(n, own, fill) => {
                let fill = match pad {
                    Some('-' | '_') => ' ',
                    Some('0') => '0',
                    _ => fill,
                };
                let width = match pad {
                    Some('-') => width,
                    _ => width.max(own),
                };
                let digits = n.abs().to_string();
                let sign = if n < 0 { "-" } else { "" };
                let missing = width.saturating_sub(digits.len() + sign.len());
                match fill {
                    '0' => format!("{sign}{}{digits}", "0".repeat(missing)),
                    _ => format!("{}{sign}{digits}", " ".repeat(missing)),
                }
            }
            Field::Text(text) => {
                let fill = if pad == Some('0') { "0" } else { " " };
                fill.repeat(width.saturating_sub(text.chars().count())) + &text
            }
        };
        for flag in flags_of.chars() {
            text = match (flag, letter) {
                ('^', 'P') | ('#', 'p' | 'Z') => text.to_lowercase(),
                ('^', _) | ('#', 'a' | 'A' | 'b' | 'B' | 'h') => text.to_uppercase(),
                _ => text,
            };
        }
        Some((text, flags + digits + modifiers + letter.len_utf8()))
    }

    fn value(&self, letter: char) -> Option<Field> {
        let two = |n: i64| Field::Number(n, 2, '0');
        let blank = |n: i64| Field::Number(n, 2, ' ');
        let text = |format: &str| Field::Text(strftime(format, self.unix_s));
        let name = |text: &str| Field::Text(text.into());
        let hour12 = (self.hour + 11) % 12 + 1;
        let (iso_year, iso_week) = self.iso();
        let day = DAYS[self.weekday as usize];
        let month = MONTHS[self.month as usize - 1];
        Some(match letter {
            'a' => name(&day[..3]),
            'A' => name(day),
            'b' | 'h' => name(&month[..3]),
            'B' => name(month),
            'c' => text("%a %b %e %H:%M:%S %Y"),
            'C' => two(self.year.div_euclid(100)),
            'd' => two(self.day),
            'D' | 'x' => text("%m/%d/%y"),
            'e' => blank(self.day),
            'f' => name("000000"),
            'F' => text("%Y-%m-%d"),
            'g' => two(iso_year.rem_euclid(100)),
            'G' => Field::Number(iso_year, 0, '0'),
            'H' => two(self.hour),
            'I' => two(hour12),
            'j' => Field::Number(self.day_of_year + 1, 3, '0'),
            'k' => blank(self.hour),
            'l' => blank(hour12),
            'm' => two(self.month),
            'M' => two(self.minute),
            'n' => name("\n"),
            'p' => name(if self.hour < 12 { "AM" } else { "PM" }),
            'P' => name(if self.hour < 12 { "am" } else { "pm" }),
            'r' => text("%I:%M:%S %p"),
            'R' => text("%H:%M"),
            's' => Field::Number(self.unix_s, 0, '0'),
            'S' => two(self.second),
            't' => name("\t"),
            'T' | 'X' => text("%H:%M:%S"),
            'u' => Field::Number((self.weekday + 6) % 7 + 1, 0, '0'),
            'U' => two((self.day_of_year + 7 - self.weekday) / 7),
            'V' => two(iso_week),
            'w' => Field::Number(self.weekday, 0, '0'),
            'W' => two((self.day_of_year + 7 - (self.weekday + 6) % 7) / 7),
            'y' => two(self.year.rem_euclid(100)),
            'Y' => Field::Number(self.year, 0, '0'),
            'z' | 'Z' => name(""),
            '%' => name("%"),
            _ => return None,
        })
    }

    /// Year and week of ISO 8601: a week belongs to the year that has its Thursday.
    fn iso(&self) -> (i64, i64) {
        let thursday = self.day_of_year + 3 - (self.weekday + 6) % 7;
        let days_in = |year: i64| days_before(year + 1) - days_before(year);
        if thursday < 0 {
            (self.year - 1, (thursday + days_in(self.year - 1)) / 7 + 1)
        } else if thursday >= days_in(self.year) {
            (self.year + 1, 1)
        } else {
            (self.year, thursday / 7 + 1)
        }
    }
}

/// Days from 1970-01-01 to the first of January of a year.
fn days_before(year: i64) -> i64 {
    let y = year - 1;
    365 * (year - 1970) + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) - 477
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153; // 0 is March
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn years_begin_where_the_calendar_says() {
        for year in [1600, 1969, 1970, 1972, 1999, 2000, 2001, 2024, 2100, 2401] {
            let day = days_before(year);
            assert_eq!((civil(day), civil(day - 1)), ((year, 1, 1), (year - 1, 12, 31)));
        }
    }

    #[test]
    fn before_1970_and_what_is_no_field() {
        assert_eq!(strftime("%a %d %b %Y %H:%M:%S", -1), "Wed 31 Dec 1969 23:59:59");
        assert_eq!(strftime("100%, %q %", 0), "100%, %q %");
        assert_eq!(strftime("%99999999999999999999d", 0), "%99999999999999999999d");
    }
}
