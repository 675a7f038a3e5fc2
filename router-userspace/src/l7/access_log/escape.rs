//! Bytes that somebody else has chosen, as part of a line: none of them ends it, nor the string they
//! are in.

use std::io::Write;

/// Bytes of one value that a line has; the rest is left out and `...` says so.
const MAX_VALUE_BYTES: usize = 4096;

/// Appends a JSON string (RFC 8259 §7). Bytes that are not UTF-8 become U+FFFD.
pub(super) fn json(line: &mut Vec<u8>, value: &[u8]) {
    line.push(b'"');
    each_part(value, |part| match part {
        Part::Text(text) => text.chars().for_each(|it| json_char(line, it)),
        Part::Broken(_) => line.extend_from_slice("\u{fffd}".as_bytes()),
    });
    line.push(b'"');
}

/// Appends a string as Go's `strconv.Quote` does, which gorouter uses.
pub(super) fn quoted(line: &mut Vec<u8>, value: &[u8]) {
    line.push(b'"');
    inside_quotes(line, value);
    line.push(b'"');
}

/// The same without quotes; a space is escaped too.
pub(super) fn bare(line: &mut Vec<u8>, value: &[u8]) {
    let mut escaped = Vec::with_capacity(value.len());
    inside_quotes(&mut escaped, value);
    for byte in escaped {
        match byte {
            b' ' => line.extend_from_slice(b"\\x20"),
            byte => line.push(byte),
        }
    }
}

/// What [`quoted`] has between its quotes.
pub(super) fn inside_quotes(line: &mut Vec<u8>, value: &[u8]) {
    each_part(value, |part| match part {
        Part::Text(text) => text.chars().for_each(|it| go_char(line, it)),
        Part::Broken(bytes) => {
            for byte in bytes {
                push(line, format_args!("\\x{byte:02x}"));
            }
        }
    });
}

enum Part<'a> {
    Text(&'a str),
    /// Not UTF-8.
    Broken(&'a [u8]),
}

fn each_part(value: &[u8], mut take: impl FnMut(Part<'_>)) {
    let shown = &value[..value.len().min(MAX_VALUE_BYTES)];
    for chunk in shown.utf8_chunks() {
        if !chunk.valid().is_empty() {
            take(Part::Text(chunk.valid()));
        }
        if !chunk.invalid().is_empty() {
            take(Part::Broken(chunk.invalid()));
        }
    }
    if shown.len() < value.len() {
        take(Part::Text("..."));
    }
}

fn json_char(line: &mut Vec<u8>, char: char) {
    match char {
        '"' => line.extend_from_slice(b"\\\""),
        '\\' => line.extend_from_slice(b"\\\\"),
        // Line and paragraph separators end a line for some readers.
        '\u{2028}' | '\u{2029}' => push(line, format_args!("\\u{:04x}", u32::from(char))),
        _ if char.is_control() => push(line, format_args!("\\u{:04x}", u32::from(char))),
        _ => push_char(line, char),
    }
}

fn go_char(line: &mut Vec<u8>, char: char) {
    match char {
        '"' => line.extend_from_slice(b"\\\""),
        '\\' => line.extend_from_slice(b"\\\\"),
        '\n' => line.extend_from_slice(b"\\n"),
        '\r' => line.extend_from_slice(b"\\r"),
        '\t' => line.extend_from_slice(b"\\t"),
        '\u{2028}' | '\u{2029}' => push(line, format_args!("\\u{:04x}", u32::from(char))),
        _ if char.is_ascii_control() => push(line, format_args!("\\x{:02x}", u32::from(char))),
        _ if char.is_control() => push(line, format_args!("\\u{:04x}", u32::from(char))),
        _ => push_char(line, char),
    }
}

fn push_char(line: &mut Vec<u8>, char: char) {
    line.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes());
}

fn push(line: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    line.write_fmt(text).expect("a vector takes all");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(write: impl Fn(&mut Vec<u8>, &[u8]), value: &[u8]) -> String {
        let mut line = Vec::new();
        write(&mut line, value);
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn nothing_in_a_value_ends_a_json_string() {
        let value = b"a\"b\\c\n\r\t\x00\x1f\x7f\xff\xc3\xa9\xe2\x80\xa8";
        assert_eq!(
            text(json, value),
            "\"a\\\"b\\\\c\\u000a\\u000d\\u0009\\u0000\\u001f\\u007f\u{fffd}\u{e9}\\u2028\""
        );
    }

    #[test]
    fn nothing_in_a_value_ends_a_quoted_one() {
        let value = b"a\"b\\c\n\r\t\x00\x7f\xff\xc3\xa9 \xc2\x85";
        assert_eq!(
            text(quoted, value),
            "\"a\\\"b\\\\c\\n\\r\\t\\x00\\x7f\\xff\u{e9} \\u0085\""
        );
        assert_eq!(text(bare, b"a b\"\n"), "a\\x20b\\\"\\n");
    }

    #[test]
    fn a_long_value_is_cut_and_says_so() {
        let line = text(quoted, &[b'a'; MAX_VALUE_BYTES + 1]);
        assert_eq!(line.len(), MAX_VALUE_BYTES + 5);
        assert!(line.ends_with("a...\""));
    }

    proptest! {
        #[test]
        fn every_value_of_utf8_comes_back_from_json(value: String) {
            let line = text(json, value.as_bytes());
            prop_assert_eq!(serde_json::from_str::<String>(&line).unwrap(), value);
        }

        #[test]
        fn no_value_breaks_a_line(value: Vec<u8>) {
            let json = text(json, &value);
            prop_assert!(serde_json::from_str::<String>(&json).is_ok());
            for line in [json, text(quoted, &value), text(bare, &value)] {
                prop_assert!(!line.contains(char::is_control));
            }
        }
    }
}
