//! Compression of responses for routes that ask for it, with what the client accepts.
//!
//! A response is compressed if its type is text of some kind and it is not known to be short, whole and
//! not compressed yet, and not to be left as it is (RFC 9110 §7.7). `forward` chooses; the body of the
//! response is turned over here, frame by frame. What the backend has sent is flushed whenever it pauses,
//! so that events and long polls are not held back.

use std::io::{self, Write};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use flate2::write::GzEncoder;
use http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, ETAG, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use http_body::{Body, Frame};

use crate::l7::validate::has_token;

/// Shorter responses gain nothing.
const MIN_BYTES: u64 = 1024;

/// Responses that one worker compresses at once; further ones go as they are. An encoder has up to 2 MiB.
pub(super) const AT_ONCE: usize = 128;

/// Of input, after which there is output though the backend has not paused.
const BYTES_PER_FRAME: usize = 64 * 1024;

/// Of zstd and brotli, as a power of two: what an encoder looks back at.
const WINDOW_LOG: u32 = 18;
const ZSTD_LEVEL: i32 = 3;
const BROTLI_QUALITY: i32 = 4;
const GZIP_LEVEL: u32 = 5;

/// Digests of what is changed here (RFC 9530).
const DIGESTS: [HeaderName; 3] = [
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("content-md5"),
    HeaderName::from_static("digest"),
];

/// In the order of preference, where the client has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Zstd,
    Brotli,
    Gzip,
}

const CODINGS: [Coding; 3] = [Coding::Zstd, Coding::Brotli, Coding::Gzip];

impl Coding {
    fn name(self) -> &'static str {
        match self {
            Coding::Zstd => "zstd",
            Coding::Brotli => "br",
            Coding::Gzip => "gzip",
        }
    }
}

/// What the client would rather have than the response as it is (RFC 9110 §12.5.3).
pub(super) fn accepted(headers: &HeaderMap) -> Option<Coding> {
    let mut qualities = [None; CODINGS.len()];
    let mut any = 0;
    for value in headers.get_all(ACCEPT_ENCODING) {
        for item in value.to_str().unwrap_or("").split(',') {
            let mut parts = item.split(';');
            let name = parts.next().unwrap_or("").trim();
            let quality = quality(parts);
            let is_named = |coding: &Coding| {
                name.eq_ignore_ascii_case(coding.name())
                    || *coding == Coding::Gzip && name.eq_ignore_ascii_case("x-gzip")
            };
            match CODINGS.iter().position(is_named) {
                Some(index) => qualities[index] = Some(quality),
                None if name == "*" => any = quality,
                None => {}
            }
        }
    }
    let quality_of = |coding: &Coding| qualities[*coding as usize].unwrap_or(any);
    // Of equals the last is the greatest.
    let best = CODINGS.into_iter().rev().max_by_key(|it| quality_of(it))?;
    (quality_of(&best) > 0).then_some(best)
}

/// In thousandths; what is malformed is not accepted.
fn quality<'a>(parameters: impl Iterator<Item = &'a str>) -> u32 {
    for parameter in parameters {
        let parameter = parameter.trim();
        let Some(text) = parameter
            .strip_prefix("q=")
            .or(parameter.strip_prefix("Q="))
        else {
            continue;
        };
        let value = text.parse::<f32>().unwrap_or(0.0);
        return if (0.0..=1.0).contains(&value) {
            (value * 1000.0) as u32
        } else {
            0
        };
    }
    1000
}

/// Whether a response could be compressed for a client that accepts it; `len` is its length if it is known.
pub(super) fn is_compressible(status: StatusCode, headers: &HeaderMap, len: Option<u64>) -> bool {
    let is_whole = !matches!(
        status,
        StatusCode::PARTIAL_CONTENT | StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
    );
    let keeps = |value: &HeaderValue| has_token(value, "no-transform");
    is_whole
        && !status.is_informational()
        && len.is_none_or(|len| len >= MIN_BYTES)
        && !headers.contains_key(CONTENT_ENCODING)
        && !headers.contains_key(CONTENT_RANGE)
        && !headers.get_all(CACHE_CONTROL).iter().any(keeps)
        && headers.get(CONTENT_TYPE).is_some_and(is_text)
}

fn is_text(content_type: &HeaderValue) -> bool {
    let essence = content_type.to_str().unwrap_or("").split(';').next();
    let essence = essence.unwrap_or("").trim().to_ascii_lowercase();
    essence.starts_with("text/")
        || essence.ends_with("+json")
        || essence.ends_with("+xml")
        || matches!(
            essence.as_str(),
            "application/json"
                | "application/x-ndjson"
                | "application/javascript"
                | "application/xml"
                | "application/wasm"
                | "application/graphql"
                | "application/toml"
                | "application/yaml"
                | "application/vnd.ms-fontobject"
                | "font/ttf"
                | "font/otf"
                | "image/bmp"
                | "image/x-icon"
        )
}

/// Tells caches that the response depends on what the client accepts.
pub(super) fn vary(headers: &mut HeaderMap) {
    let said = |value: &HeaderValue| has_token(value, "accept-encoding") || has_token(value, "*");
    if !headers.get_all(VARY).iter().any(said) {
        headers.append(VARY, HeaderValue::from_static("Accept-Encoding"));
    }
}

/// Makes the head of a response that of a compressed one.
pub(super) fn rewrite_head(headers: &mut HeaderMap, coding: Coding) {
    headers.insert(CONTENT_ENCODING, HeaderValue::from_static(coding.name()));
    headers.remove(CONTENT_LENGTH);
    headers.remove(ACCEPT_RANGES);
    for digest in DIGESTS {
        headers.remove(digest);
    }
    // The same content in other bytes (RFC 9110 §8.8.1).
    if let Some(etag) = headers.get(ETAG)
        && !etag.as_bytes().starts_with(b"W/")
        && let Ok(weak) = HeaderValue::from_bytes(&[b"W/", etag.as_bytes()].concat())
    {
        headers.insert(ETAG, weak);
    }
}

/// A body on its way through an encoder.
pub(super) struct Compressed {
    /// `None` when all has been put into it.
    encoder: Option<Encoder>,
    /// Bytes put into the encoder since there was output.
    unflushed: usize,
    trailers: Option<HeaderMap>,
    /// Counts it among those of its worker.
    _place: Rc<()>,
}

enum Encoder {
    Zstd(zstd::Encoder<'static, Vec<u8>>),
    Brotli(Box<brotli::CompressorWriter<Vec<u8>>>),
    Gzip(GzEncoder<Vec<u8>>),
}

impl Compressed {
    /// `None` if the worker, whose `places` are cloned for each, has [`AT_ONCE`].
    pub(super) fn new(coding: Coding, places: &Rc<()>) -> Option<Compressed> {
        if Rc::strong_count(places) > AT_ONCE {
            return None;
        }
        Some(Compressed {
            encoder: Some(Encoder::new(coding).ok()?),
            unflushed: 0,
            trailers: None,
            _place: Rc::clone(places),
        })
    }

    /// Nothing more will come.
    pub(super) fn is_over(&self) -> bool {
        self.encoder.is_none() && self.trailers.is_none()
    }

    pub(super) fn poll_frame<B: Body<Data = Bytes> + Unpin>(
        &mut self,
        body: &mut B,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        loop {
            let Some(encoder) = &mut self.encoder else {
                return Poll::Ready(self.trailers.take().map(|it| Ok(Frame::trailers(it))));
            };
            if self.unflushed >= BYTES_PER_FRAME {
                self.unflushed = 0;
                return Poll::Ready(Some(Ok(Frame::data(encoder.flush()))));
            }
            let frame = match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => return Poll::Ready(self.finish()),
                Poll::Pending if self.unflushed == 0 => return Poll::Pending,
                Poll::Pending => {
                    self.unflushed = BYTES_PER_FRAME;
                    continue;
                }
            };
            match frame.into_data() {
                Ok(data) => {
                    encoder.write(&data);
                    self.unflushed += data.len();
                }
                Err(frame) => {
                    self.trailers = frame.into_trailers().ok();
                    return Poll::Ready(self.finish());
                }
            }
        }
    }

    fn finish<E>(&mut self) -> Option<Result<Frame<Bytes>, E>> {
        let encoder = self.encoder.take()?;
        Some(Ok(Frame::data(encoder.finish())))
    }
}

/// What is written to is memory, which takes everything.
const TO_MEMORY: &str = "an encoder into memory does not fail";

impl Encoder {
    /// # Errors
    /// There is no memory for it.
    fn new(coding: Coding) -> io::Result<Encoder> {
        let out = Vec::new();
        Ok(match coding {
            Coding::Zstd => {
                let mut encoder = zstd::Encoder::new(out, ZSTD_LEVEL)?;
                encoder.window_log(WINDOW_LOG)?;
                Encoder::Zstd(encoder)
            }
            Coding::Brotli => {
                let parameters = brotli::enc::BrotliEncoderParams {
                    quality: BROTLI_QUALITY,
                    lgwin: WINDOW_LOG as i32,
                    ..Default::default()
                };
                let writer = brotli::CompressorWriter::with_params(out, 4096, &parameters);
                Encoder::Brotli(Box::new(writer))
            }
            Coding::Gzip => {
                Encoder::Gzip(GzEncoder::new(out, flate2::Compression::new(GZIP_LEVEL)))
            }
        })
    }

    fn writer(&mut self) -> &mut dyn Write {
        match self {
            Encoder::Zstd(encoder) => encoder,
            Encoder::Brotli(encoder) => encoder,
            Encoder::Gzip(encoder) => encoder,
        }
    }

    fn write(&mut self, data: &[u8]) {
        self.writer().write_all(data).expect(TO_MEMORY);
    }

    /// All output that is not taken yet, complete for all that was written.
    fn flush(&mut self) -> Bytes {
        self.writer().flush().expect(TO_MEMORY);
        let out = match self {
            Encoder::Zstd(encoder) => encoder.get_mut(),
            Encoder::Brotli(encoder) => encoder.get_mut(),
            Encoder::Gzip(encoder) => encoder.get_mut(),
        };
        Bytes::from(std::mem::take(out))
    }

    fn finish(self) -> Bytes {
        Bytes::from(match self {
            Encoder::Zstd(encoder) => encoder.finish().expect(TO_MEMORY),
            Encoder::Brotli(encoder) => encoder.into_inner(),
            Encoder::Gzip(encoder) => encoder.finish().expect(TO_MEMORY),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::task::Waker;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_client_has_the_choice() {
        for (accept, coding) in [
            ("gzip, deflate, br, zstd", Some(Coding::Zstd)),
            ("gzip, br", Some(Coding::Brotli)),
            ("gzip;q=1.0, br;q=0.5", Some(Coding::Gzip)),
            ("x-gzip", Some(Coding::Gzip)),
            ("*", Some(Coding::Zstd)),
            ("*, zstd;q=0", Some(Coding::Brotli)),
            ("GZIP ; Q=0.3", Some(Coding::Gzip)),
            ("gzip;q=0", None),
            ("gzip;q=2", None),
            ("gzip;q=x", None),
            ("identity", None),
            ("deflate", None),
            ("", None),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT_ENCODING, accept.parse().unwrap())]);
            assert_eq!(accepted(&headers), coding, "{accept}");
        }
        assert_eq!(accepted(&HeaderMap::new()), None);
    }

    #[test]
    fn only_long_whole_text_is_compressed() {
        let check = |status: u16, lines: &[(&str, &str)], len: Option<u64>| {
            let lines = lines
                .iter()
                .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap()));
            is_compressible(StatusCode::from_u16(status).unwrap(), &lines.collect(), len)
        };
        let html = ("content-type", "text/html; charset=utf-8");
        assert!(check(200, &[html], None));
        assert!(check(404, &[html], Some(1024)));
        assert!(check(
            200,
            &[("content-type", "Application/Problem+JSON")],
            None
        ));
        assert!(!check(200, &[html], Some(1023)));
        assert!(!check(206, &[html], None));
        assert!(!check(304, &[html], None));
        assert!(!check(200, &[("content-type", "image/png")], None));
        assert!(!check(200, &[], None));
        for kept in [
            ("content-encoding", "br"),
            ("content-range", "bytes 0-1/2"),
            ("cache-control", "public, no-transform"),
        ] {
            assert!(!check(200, &[html, kept], None), "{kept:?}");
        }
    }

    #[test]
    fn the_head_tells_of_other_bytes() {
        let lines = [
            ("content-length", "5000"),
            ("etag", "\"a\""),
            ("accept-ranges", "bytes"),
            ("digest", "x"),
            ("vary", "Origin"),
        ];
        let mut headers: HeaderMap = lines
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .into_iter()
            .collect();
        vary(&mut headers);
        vary(&mut headers);
        rewrite_head(&mut headers, Coding::Brotli);
        assert_eq!(headers[ETAG], "W/\"a\"");
        assert_eq!(headers[CONTENT_ENCODING], "br");
        let varies: Vec<_> = headers.get_all(VARY).iter().collect();
        assert_eq!(varies, ["Origin", "Accept-Encoding"]);
        assert_eq!(headers.len(), 4);
    }

    /// A backend's body: pieces, with a pause before those that are empty.
    struct Pieces(Vec<Vec<u8>>, bool);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            if self.0.is_empty() {
                let trailers = std::mem::take(&mut self.1);
                return Poll::Ready(trailers.then(|| Ok(Frame::trailers(HeaderMap::new()))));
            }
            let piece = self.0.remove(0);
            if piece.is_empty() {
                return Poll::Pending;
            }
            Poll::Ready(Some(Ok(Frame::data(Bytes::from(piece)))))
        }
    }

    fn decoded(coding: Coding, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        match coding {
            Coding::Gzip => flate2::read::GzDecoder::new(bytes).read_to_end(&mut out),
            Coding::Brotli => brotli::Decompressor::new(bytes, 4096).read_to_end(&mut out),
            Coding::Zstd => zstd::Decoder::new(bytes).unwrap().read_to_end(&mut out),
        }
        .unwrap();
        out
    }

    #[test]
    fn a_worker_compresses_so_many_at_once() {
        let places = Rc::new(());
        let all: Vec<_> = (0..AT_ONCE)
            .map(|_| Compressed::new(Coding::Gzip, &places).unwrap())
            .collect();
        assert!(Compressed::new(Coding::Gzip, &places).is_none());
        drop(all);
        assert!(Compressed::new(Coding::Gzip, &places).is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_decoded_is_what_was_sent_and_no_pause_holds_any_back(
            pieces in proptest::collection::vec(
                proptest::collection::vec(0_u8..4, 0..5000), 0..12),
            trailers in any::<bool>(),
        ) {
            for coding in CODINGS {
                let places = Rc::new(());
                let mut compressed = Compressed::new(coding, &places).unwrap();
                let mut body = Pieces(pieces.clone(), trailers);
                let mut cx = Context::from_waker(Waker::noop());
                let mut out = Vec::new();
                let mut got_trailers = false;
                loop {
                    match compressed.poll_frame(&mut body, &mut cx) {
                        Poll::Pending => prop_assert_eq!(compressed.unflushed, 0),
                        Poll::Ready(None) => break,
                        Poll::Ready(Some(frame)) => match frame.unwrap().into_data() {
                            Ok(data) => out.extend_from_slice(&data),
                            Err(_) => got_trailers = true,
                        },
                    }
                }
                prop_assert!(compressed.is_over());
                prop_assert_eq!(got_trailers, trailers);
                prop_assert_eq!(decoded(coding, &out), pieces.concat());
            }
        }
    }
}
