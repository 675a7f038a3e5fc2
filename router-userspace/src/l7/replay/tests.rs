use std::collections::VecDeque;
use std::convert::Infallible;
use std::task::Waker;

use http::HeaderValue;
use proptest::prelude::*;

use super::*;

/// Gives its frames one by one, and now and then has to be waited for.
struct Chunks {
    frames: VecDeque<Option<Frame<Bytes>>>,
}

impl Body for Chunks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.frames.pop_front() {
            Some(Some(frame)) => Poll::Ready(Some(Ok(frame))),
            Some(None) => Poll::Pending,
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let len = |frame: &Option<Frame<Bytes>>| {
            let data = frame.as_ref().and_then(Frame::data_ref);
            data.map_or(0, Bytes::len) as u64
        };
        SizeHint::with_exact(self.frames.iter().map(len).sum())
    }
}

fn body(chunks: &[&'static str]) -> Chunks {
    let frame = |chunk: &&'static str| Some(Frame::data(Bytes::from_static(chunk.as_bytes())));
    Chunks {
        frames: chunks.iter().map(frame).collect(),
    }
}

/// One poll: a frame, the end, or nothing yet.
fn poll(attempt: &mut Attempt<Chunks>) -> Poll<Option<Frame<Bytes>>> {
    let mut context = Context::from_waker(Waker::noop());
    let polled = Pin::new(attempt).poll_frame(&mut context);
    polled.map(|frame| frame.map(|frame| frame.unwrap()))
}

/// All data and whether trailers came, polled to the end.
fn drain(attempt: &mut Attempt<Chunks>) -> (Vec<u8>, bool) {
    let (mut data, mut trailers) = (Vec::new(), false);
    while !attempt.is_end_stream() {
        match poll(attempt) {
            Poll::Ready(Some(frame)) => match frame.into_data() {
                Ok(bytes) => data.extend_from_slice(&bytes),
                Err(_) => trailers = true,
            },
            Poll::Ready(None) => break,
            Poll::Pending => {}
        }
    }
    assert_eq!(
        poll(attempt).map(|frame| frame.is_none()),
        Poll::Ready(true)
    );
    (data, trailers)
}

#[test]
fn a_short_body_is_sent_again_from_its_start() {
    let replay = Replay::new(body(&["he", "llo", " world"]), 16);
    let mut first = replay.attempt().unwrap();
    assert!(matches!(poll(&mut first), Poll::Ready(Some(_))));
    assert!(matches!(poll(&mut first), Poll::Ready(Some(_))));
    let mut second = replay.attempt().unwrap();
    assert!(second.is_current() && !first.is_current());
    assert_eq!(second.size_hint().exact(), Some(11));
    assert_eq!(drain(&mut second).0, b"hello world");
    let mut third = replay.attempt().unwrap();
    assert_eq!(third.size_hint().exact(), Some(11));
    assert_eq!(drain(&mut third).0, b"hello world");
}

#[test]
fn an_attempt_that_was_given_up_says_neither_more_nor_that_it_ended() {
    let replay = Replay::new(body(&["he", "llo"]), 16);
    let mut first = replay.attempt().unwrap();
    let mut second = replay.attempt().unwrap();
    assert!(poll(&mut first).is_pending());
    assert!(!first.is_end_stream());
    assert_eq!(drain(&mut second).0, b"hello");
    assert!(poll(&mut first).is_pending());
}

#[test]
fn a_body_beyond_the_capacity_is_sent_once() {
    let replay = Replay::new(body(&["hello", " world"]), 10);
    let mut first = replay.attempt().unwrap();
    assert_eq!(drain(&mut first).0, b"hello world");
    assert!(replay.attempt().is_none());
}

#[test]
fn trailers_are_repeated() {
    let mut chunks = body(&["hello"]);
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", HeaderValue::from_static("7"));
    chunks.frames.push_back(Some(Frame::trailers(trailers)));
    let replay = Replay::new(chunks, 16);
    for _ in 0..3 {
        let mut attempt = replay.attempt().unwrap();
        assert_eq!(drain(&mut attempt), (b"hello".to_vec(), true));
    }
}

#[test]
fn a_request_without_a_body_can_be_repeated() {
    let replay = Replay::new(body(&[]), 0);
    for _ in 0..3 {
        let mut attempt = replay.attempt().unwrap();
        assert!(attempt.is_end_stream());
        assert_eq!(attempt.size_hint().exact(), Some(0));
        assert_eq!(drain(&mut attempt).0, b"");
    }
}

proptest! {
    #[test]
    fn whatever_was_polled_before_the_last_attempt_is_whole(
        chunks in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 1..9)), 0..12),
        polls in prop::collection::vec(0_usize..15, 0..5),
        capacity in 0_usize..64,
    ) {
        let sent: Vec<u8> = chunks.iter().flatten().flatten().copied().collect();
        let frames = chunks
            .into_iter()
            .map(|chunk| chunk.map(|data| Frame::data(Bytes::from(data))))
            .collect();
        let replay = Replay::new(Chunks { frames }, capacity);
        for count in polls {
            let Some(mut attempt) = replay.attempt() else { break };
            for _ in 0..count {
                let _ = poll(&mut attempt);
            }
        }
        prop_assert!(replay.kept.borrow().len() <= capacity);
        match replay.attempt() {
            Some(mut last) => prop_assert_eq!(drain(&mut last).0, sent),
            None => prop_assert!(sent.len() > capacity),
        }
    }
}
