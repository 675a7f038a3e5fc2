//! Whether a request came with both `Transfer-Encoding` and `Content-Length`, which hyper does not tell:
//! it goes by the former and hides the latter (RFC 9112 §6.3), where the gateway refuses such requests.
//!
//! [`crate::l7::client_io`] shows what it reads while heads arrive; only if the parsed request has a
//! `Transfer-Encoding` is the text of its head looked at. Where the beginning of a head is not known, as
//! behind a body or in a long read that it shares with an earlier request, nothing is found: such a request is served by
//! its `Transfer-Encoding` alone and its connection closed, as hyper does it.

/// The bytes of a connection of HTTP/1 since the last place where a head is known to begin.
#[derive(Debug, Default)]
pub(super) struct RawHeads {
    bytes: Vec<u8>,
    /// Requests whose heads these bytes begin with, without bodies between them.
    passed: usize,
    /// What comes is of a body.
    in_body: bool,
    /// Behind the head that these bytes are, there was more than was kept.
    is_cut: bool,
}

/// Longer heads, and more of them at once, are not looked at.
const MAX_BYTES: usize = 64 * 1024;

/// Of a longer read only the first head is kept: mostly the rest is a body.
const LONG_READ_BYTES: usize = 8 * 1024;

/// Memory that is kept for the next head.
const KEPT_BYTES: usize = 2048;

impl RawHeads {
    /// Bytes have come from the client.
    pub(super) fn on_read(&mut self, bytes: &[u8]) {
        if self.in_body {
            return;
        }
        // All whole heads have been passed before more is read, and no part of one ends like this.
        if self.passed > 0 && ends_with_empty_line(&self.bytes) {
            self.forget();
        }
        if self.bytes.len() + bytes.len() > MAX_BYTES {
            // Many requests at once: where the next one begins is found again after a body.
            self.forget();
            self.in_body = true;
            return;
        }
        let head = match bytes.len() > LONG_READ_BYTES && self.bytes.is_empty() {
            true => first_head(bytes),
            false => bytes,
        };
        self.is_cut = head.len() < bytes.len();
        self.bytes.extend_from_slice(head);
    }

    /// A request's head is complete.
    pub(super) fn head_ends(&mut self, has_body: bool) {
        self.passed += 1;
        self.in_body |= has_body || self.is_cut;
        let is_large = self.bytes.len() > KEPT_BYTES;
        if has_body || is_large && self.passed >= heads_in(&self.bytes) {
            self.forget();
        }
    }

    /// The body of the last request has been read to its end, and what is read next begins a head.
    pub(super) fn body_ends(&mut self) {
        self.in_body = false;
        self.forget();
    }

    /// Whether the head that is complete and has not been passed has a `Content-Length`. `method` is what the
    /// parser found, and proves that the head begins where it is thought to.
    pub(super) fn has_content_length(&self, method: &str) -> bool {
        if self.in_body {
            return false;
        }
        let mut lines = Lines(&self.bytes);
        for _ in 0..self.passed {
            if !lines.skip_head() {
                return false;
            }
        }
        let Some(request_line) = lines.by_ref().find(|line| !line.is_empty()) else {
            return false;
        };
        let begins_here = request_line
            .strip_prefix(method.as_bytes())
            .is_some_and(|rest| rest.starts_with(b" ") && rest.ends_with(b" HTTP/1.1"));
        begins_here
            && lines
                .take_while(|line| !line.is_empty())
                .any(is_content_length)
    }

    fn forget(&mut self) {
        self.passed = 0;
        self.is_cut = false;
        self.bytes.clear();
        self.bytes.shrink_to(KEPT_BYTES);
    }
}

fn is_content_length(line: &[u8]) -> bool {
    const NAME: &[u8] = b"content-length";
    line.get(..NAME.len())
        .is_some_and(|name| name.eq_ignore_ascii_case(NAME))
        && line.get(NAME.len()) == Some(&b':')
}

fn ends_with_empty_line(bytes: &[u8]) -> bool {
    bytes.ends_with(b"\r\n\r\n") || bytes.ends_with(b"\n\n")
}

/// The bytes up to the end of the first head; all of them if it does not end here.
fn first_head(bytes: &[u8]) -> &[u8] {
    let mut lines = Lines(bytes);
    match lines.skip_head() {
        true => &bytes[..bytes.len() - lines.0.len()],
        false => bytes,
    }
}

/// How many whole heads follow each other.
fn heads_in(bytes: &[u8]) -> usize {
    let mut lines = Lines(bytes);
    let mut heads = 0;
    while lines.skip_head() {
        heads += 1;
    }
    heads
}

/// Lines by LF, with or without CR before it: the parser takes both.
struct Lines<'a>(&'a [u8]);

impl Lines<'_> {
    /// Leaves empty lines and then a head behind; false if it has no end.
    fn skip_head(&mut self) -> bool {
        self.find(|line| !line.is_empty()).is_some() && self.any(|line| line.is_empty())
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|&byte| byte == b'\n')?;
        let (line, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Some(line.strip_suffix(b"\r").unwrap_or(line))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(bytes: &str) -> RawHeads {
        let mut heads = RawHeads::default();
        heads.on_read(bytes.as_bytes());
        heads
    }

    #[test]
    fn a_length_is_found_in_any_case_and_order() {
        for lines in [
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: chunked\r\nCONTENT-LENGTH:5\r\n",
            "a: b\ncontent-length: 5\n",
        ] {
            let heads = after(&format!("POST / HTTP/1.1\r\n{lines}\r\n"));
            assert!(heads.has_content_length("POST"), "{lines}");
        }
    }

    #[test]
    fn what_is_not_the_heads_is_not_looked_at() {
        for bytes in [
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nContent-Length: 5\r\n\r\n",
            "POST / HTTP/1.1\r\nX-Content-Length: 5\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length-X: 5\r\n\r\n",
            "POST / HTTP/1.1\r\nX: a\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
            "of a body\r\nContent-Length: 5\r\n\r\n",
        ] {
            assert!(!after(bytes).has_content_length("POST"), "{bytes}");
        }
    }

    #[test]
    fn it_is_found_behind_pipelined_requests_and_after_a_body() {
        let last = "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n";
        let mut heads = after(&format!("GET / HTTP/1.1\r\nHost: a\r\n\r\n{last}"));
        assert!(!heads.has_content_length("GET"));
        heads.head_ends(false);
        assert!(heads.has_content_length("POST"));
        heads.head_ends(true);
        heads.on_read(b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n");
        assert!(!heads.has_content_length("POST"));
        heads.body_ends();
        heads.on_read(last.as_bytes());
        assert!(heads.has_content_length("POST"));
    }

    #[test]
    fn of_a_long_read_only_the_first_head_is_kept() {
        let head = "POST / HTTP/1.1\r\nContent-Length: 9000\r\nTransfer-Encoding: chunked\r\n\r\n";
        let mut heads = after(&format!("{head}{}", "x".repeat(9000)));
        assert_eq!(heads.bytes.len(), head.len());
        assert!(heads.has_content_length("POST"));
        heads.head_ends(true);
        heads.body_ends();
        heads.on_read(head.as_bytes());
        assert!(heads.has_content_length("POST"));
        // Without a body, where the next head begins is not known either.
        let get = "GET / HTTP/1.1\r\nContent-Length: 0\r\n\r\n";
        let mut heads = after(&get.repeat(300));
        assert!(heads.has_content_length("GET"));
        heads.head_ends(false);
        assert!(!heads.has_content_length("GET"));
    }

    #[test]
    fn memory_is_bounded_and_given_back() {
        let mut heads = RawHeads::default();
        for _ in 0..1000 {
            heads.on_read(&[b'x'; 1000]);
        }
        assert!(heads.bytes.capacity() <= KEPT_BYTES);
        let large = "x".repeat(KEPT_BYTES);
        let mut heads = after(&format!("GET / HTTP/1.1\r\nx: {large}\r\n\r\n"));
        heads.head_ends(false);
        assert!(heads.bytes.capacity() <= KEPT_BYTES);
        let mut heads = after("GET / HTTP/1.1\r\n\r\n");
        heads.head_ends(false);
        heads.on_read(b"G");
        assert_eq!(heads.bytes, b"G");
    }

    /// Header lines, and whether a reader that splits names from values finds a length.
    fn naive(lines: &[(String, String)]) -> bool {
        lines
            .iter()
            .any(|(name, _)| name.eq_ignore_ascii_case("content-length"))
    }

    fn name() -> impl Strategy<Value = String> {
        prop_oneof![
            "[A-Za-z-]{1,20}",
            "[Cc]ontent-[Ll]ength",
            "X-Content-Length",
            "Content-Length-[A-Z]",
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_reader_on_every_request_of_a_stream(
            requests in proptest::collection::vec(
                proptest::collection::vec((name(), "[ -~]{0,20}"), 0..5), 1..5),
            cut in 1_usize..64,
        ) {
            let mut heads = RawHeads::default();
            let text: Vec<String> = requests
                .iter()
                .map(|lines| {
                    let lines = lines.iter().map(|(name, value)| format!("{name}: {value}\r\n"));
                    format!("POST / HTTP/1.1\r\n{}\r\n", lines.collect::<String>())
                })
                .collect();
            for piece in text.concat().as_bytes().chunks(cut) {
                heads.on_read(piece);
            }
            for lines in &requests {
                prop_assert_eq!(heads.has_content_length("POST"), naive(lines));
                heads.head_ends(false);
            }
        }

        #[test]
        fn any_bytes_are_taken(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut heads = RawHeads::default();
            heads.on_read(&bytes);
            heads.has_content_length("POST");
            heads.head_ends(false);
            heads.has_content_length("POST");
        }
    }
}
