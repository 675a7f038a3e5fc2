//! Which frames a client of HTTP/2 sends, and when it sends too many that ask for work and bring none. The
//! budget is that of HTTP/3 too, whose frames are read by [`crate::l7::http3`].
//!
//! The h2 library bounds floods of HEADERS, CONTINUATION and empty DATA and resets it was made to send, but
//! answers any number of PING and SETTINGS and takes any number of PRIORITY and RST_STREAM. The client's
//! stream is therefore read along, as bytes, by [`crate::l7::client_io`]. No I/O and no clock here: time
//! is an argument. What is not HTTP/2 is left to h2 to refuse.

use std::time::Duration;

use tokio::time::Instant;

/// RFC 9113 §3.4.
const PREFACE_LEN: usize = 24;
/// RFC 9113 §4.1.
const HEAD_LEN: usize = 9;

/// How long frames are added up before the count begins anew.
pub(super) const WINDOW: Duration = Duration::from_secs(10);

/// Bytes of responses that pay for one frame: a client that downloads opens its windows.
const BYTES_PER_FRAME: u64 = 1024;

/// A client that cancels every request pays for its resets by what it may send anyway.
const RESET_COST: u64 = 2;

/// Frames that are counted, by what they are a flood of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Control {
    Ping,
    Settings,
    Priority,
    Reset,
    WindowUpdate,
    /// Of no kind that HTTP/2 has.
    Unknown,
}

const CONTROLS: [Control; 6] = [
    Control::Ping,
    Control::Settings,
    Control::Priority,
    Control::Reset,
    Control::WindowUpdate,
    Control::Unknown,
];

/// What a frame is to the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Begins or carries a request.
    Useful,
    Control(Control),
    /// Bounded by h2, or an answer.
    Neutral,
}

/// One client's stream, read along.
#[derive(Debug)]
pub(super) struct Frames {
    reader: FrameReader,
    budget: Budget,
}

impl Frames {
    pub(super) fn new(now: Instant) -> Frames {
        Frames {
            reader: FrameReader::default(),
            budget: Budget::new(now),
        }
    }

    /// Takes what the client has sent. `limit` is what it may send in a [`WINDOW`] beyond what it
    /// earns; 0 is no limit.
    ///
    /// # Errors
    /// What there was too much of.
    pub(super) fn on_read(
        &mut self,
        bytes: &[u8],
        limit: u32,
        now: Instant,
    ) -> Result<(), Control> {
        let budget = &mut self.budget;
        budget.begin_window(now);
        self.reader.read(bytes, |kind| match kind {
            Kind::Useful => budget.earn(1),
            Kind::Control(control) => budget.spend(control),
            Kind::Neutral => {}
        });
        match budget.is_over(limit) {
            true => Err(budget.largest()),
            false => Ok(()),
        }
    }

    pub(super) fn on_write(&mut self, len: usize) {
        self.budget.on_write(len);
    }
}

/// What a client may send in a [`WINDOW`] beyond what it earns.
#[derive(Debug)]
pub(super) struct Budget {
    since: Instant,
    /// Useful frames of this window.
    earned: u64,
    /// In the order of [`CONTROLS`].
    spent: [u64; CONTROLS.len()],
    /// Bytes to the client in this window.
    written: u64,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Budget {
        Budget {
            since: now,
            earned: 0,
            spent: [0; CONTROLS.len()],
            written: 0,
        }
    }

    pub(super) fn begin_window(&mut self, now: Instant) {
        if now.saturating_duration_since(self.since) >= WINDOW {
            *self = Budget::new(now);
        }
    }

    /// So many frames have brought work.
    pub(super) fn earn(&mut self, frames: u64) {
        self.earned += frames;
    }

    /// So many bytes have gone to the client.
    pub(super) fn on_write(&mut self, len: usize) {
        self.written += len as u64;
    }

    pub(super) fn spend(&mut self, control: Control) {
        self.spent[control as usize] += match control {
            Control::Reset => RESET_COST,
            _ => 1,
        };
    }

    /// `limit` 0 is no limit.
    pub(super) fn is_over(&self, limit: u32) -> bool {
        let allowed = u64::from(limit) + self.earned + self.written / BYTES_PER_FRAME;
        limit > 0 && self.spent.iter().sum::<u64>() > allowed
    }

    /// Of what there was most.
    pub(super) fn largest(&self) -> Control {
        let largest = CONTROLS
            .into_iter()
            .max_by_key(|it| self.spent[*it as usize]);
        largest.expect("there are kinds of frames")
    }
}

/// Finds the heads of frames in a stream that comes in pieces.
#[derive(Debug)]
struct FrameReader {
    /// Bytes until the next head.
    skip: usize,
    head: [u8; HEAD_LEN],
    have: usize,
}

impl Default for FrameReader {
    fn default() -> FrameReader {
        FrameReader {
            skip: PREFACE_LEN,
            head: [0; HEAD_LEN],
            have: 0,
        }
    }
}

impl FrameReader {
    fn read(&mut self, mut bytes: &[u8], mut on_frame: impl FnMut(Kind)) {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let taken = (HEAD_LEN - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == HEAD_LEN {
                self.have = 0;
                let [a, b, c, kind, flags, ..] = self.head;
                self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
                on_frame(classify(kind, flags, self.skip));
            }
        }
    }
}

/// RFC 9113 §6.
fn classify(kind: u8, flags: u8, len: usize) -> Kind {
    const ACK: u8 = 1;
    match kind {
        // HEADERS
        1 => Kind::Useful,
        // DATA
        0 if len > 0 => Kind::Useful,
        2 => Kind::Control(Control::Priority),
        3 => Kind::Control(Control::Reset),
        4 if flags & ACK == 0 => Kind::Control(Control::Settings),
        6 if flags & ACK == 0 => Kind::Control(Control::Ping),
        8 => Kind::Control(Control::WindowUpdate),
        // Empty DATA, PUSH_PROMISE, GOAWAY, CONTINUATION, and acknowledgements.
        0 | 4..=7 | 9 => Kind::Neutral,
        _ => Kind::Control(Control::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PREFACE: &[u8; PREFACE_LEN] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, len: usize) -> Vec<u8> {
        let [_, a, b, c] = u32::try_from(len).unwrap().to_be_bytes();
        let mut frame = vec![a, b, c, kind, flags, 0, 0, 0, 0];
        frame.resize(HEAD_LEN + len, 0xff);
        frame
    }

    fn stream(frames: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
        let mut stream = PREFACE.to_vec();
        stream.extend(frames.into_iter().flatten());
        stream
    }

    /// What a flood of one kind of frame comes to, with a limit of 100.
    fn flood(kind: u8, len: usize, count: usize) -> Result<(), Control> {
        let now = Instant::now();
        Frames::new(now).on_read(&stream(vec![frame(kind, 0, len); count]), 100, now)
    }

    #[test]
    fn each_flood_is_ended_by_its_name() {
        for (kind, len, control) in [
            (2, 5, Control::Priority),
            (4, 0, Control::Settings),
            (6, 8, Control::Ping),
            (8, 4, Control::WindowUpdate),
            (0xbe, 3, Control::Unknown),
        ] {
            assert_eq!(flood(kind, len, 100), Ok(()), "{control:?}");
            assert_eq!(flood(kind, len, 101), Err(control));
        }
        assert_eq!(flood(3, 4, 50), Ok(()));
        assert_eq!(flood(3, 4, 51), Err(Control::Reset));
    }

    #[test]
    fn requests_bodies_and_responses_pay_for_control_frames() {
        let now = Instant::now();
        let mut frames = Frames::new(now);
        let of_work = [
            frame(1, 5, 20),
            frame(6, 0, 8),
            frame(0, 1, 9),
            frame(8, 0, 4),
        ];
        let bytes = stream((0..1000).flat_map(|_| of_work.clone()));
        assert_eq!(frames.on_read(&bytes, 1, now), Ok(()));
        frames.on_write(100 * 1024);
        let updates = vec![frame(8, 0, 4); 101].concat();
        assert_eq!(frames.on_read(&updates, 1, now), Ok(()));
        assert_eq!(
            frames.on_read(&frame(8, 0, 4), 1, now),
            Err(Control::WindowUpdate)
        );
    }

    #[test]
    fn requests_that_are_all_reset_do_not_pay_for_it() {
        let now = Instant::now();
        let pairs = stream((0..200).flat_map(|_| [frame(1, 5, 20), frame(3, 0, 4)]));
        let ended = Frames::new(now).on_read(&pairs, 100, now);
        assert_eq!(ended, Err(Control::Reset));
    }

    #[test]
    fn a_client_may_send_as_much_again_in_the_next_window() {
        let mut now = Instant::now();
        let mut frames = Frames::new(now);
        frames.on_read(PREFACE, 100, now).unwrap();
        for _ in 0..5 {
            let pings = vec![frame(6, 0, 8); 100].concat();
            assert_eq!(frames.on_read(&pings, 100, now), Ok(()));
            now += WINDOW;
        }
    }

    #[test]
    fn without_a_limit_nothing_ends() {
        let now = Instant::now();
        let pings = stream(vec![frame(6, 0, 8); 10_000]);
        assert_eq!(Frames::new(now).on_read(&pings, 0, now), Ok(()));
    }

    proptest! {
        #[test]
        fn frames_are_the_same_however_the_stream_is_cut(
            frames in proptest::collection::vec((0_u8..12, 0_u8..2, 0_usize..40), 0..20),
            cuts in proptest::collection::vec(1_usize..15, 1..200),
        ) {
            let bytes = stream(frames.iter().map(|&(kind, flags, len)| frame(kind, flags, len)));
            let mut found = Vec::new();
            let mut reader = FrameReader::default();
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                let (piece, tail) = rest.split_at((*cut).min(rest.len()));
                reader.read(piece, |kind| found.push(kind));
                rest = tail;
                if rest.is_empty() {
                    break;
                }
            }
            let sent: Vec<Kind> = frames
                .iter()
                .map(|&(kind, flags, len)| classify(kind, flags, len))
                .collect();
            prop_assert_eq!(found, sent);
        }
    }
}
