//! The frames of one stream of HTTP/3 (RFC 9114 §7.1), read along.
//!
//! The h3 library holds every frame but DATA until it is whole, however long it says to be, takes a stream
//! that ends within a frame for one that ends after it, and an empty DATA frame for the end of a body.
//! What it is given is therefore read first by [`super::transport`]. No I/O here.

/// Two integers of up to eight bytes (RFC 9000 §16).
const MAX_HEAD_LEN: usize = 16;

const DATA: u64 = 0;
const HEADERS: u64 = 1;

/// Where a stream is, between pieces.
#[derive(Debug)]
pub(in crate::l7) struct Frames {
    /// Bytes of frames other than DATA, at most.
    max_len: u64,
    /// The type of a unidirectional stream is still to come.
    expects_type: bool,
    head: [u8; MAX_HEAD_LEN],
    have: usize,
    /// Of the frame's payload.
    left: u64,
    is_data: bool,
}

/// What a piece of a stream has in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::l7) struct Piece {
    /// Bytes of bodies.
    pub data_len: usize,
    pub empty_data: usize,
    /// Frames that carry a request or a part of one.
    pub useful: u64,
    /// Frames that are neither, empty ones among them.
    pub other: u64,
}

/// A frame is longer than it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::l7) struct TooLong;

impl Frames {
    pub(in crate::l7) fn of_request(max_len: u64) -> Frames {
        Frames {
            max_len,
            expects_type: false,
            head: [0; MAX_HEAD_LEN],
            have: 0,
            left: 0,
            is_data: false,
        }
    }

    /// Of a unidirectional stream, which begins with its type (RFC 9114 §6.2).
    pub(in crate::l7) fn of_control(max_len: u64) -> Frames {
        Frames {
            expects_type: true,
            ..Frames::of_request(max_len)
        }
    }

    /// Whether the stream may end here.
    pub(in crate::l7) fn is_whole(&self) -> bool {
        self.left == 0 && self.have == 0
    }

    /// # Errors
    /// A frame that begins in it is too long.
    pub(in crate::l7) fn read(&mut self, mut bytes: &[u8]) -> Result<Piece, TooLong> {
        let mut piece = Piece::default();
        while !bytes.is_empty() {
            if self.left > 0 {
                let len = usize::try_from(self.left).map_or(bytes.len(), |it| it.min(bytes.len()));
                self.left -= len as u64;
                bytes = &bytes[len..];
                if self.is_data {
                    piece.data_len += len;
                }
                continue;
            }
            self.head[self.have] = bytes[0];
            self.have += 1;
            bytes = &bytes[1..];
            self.begin_frame(&mut piece)?;
        }
        Ok(piece)
    }

    /// Begins the next frame if its head is whole.
    fn begin_frame(&mut self, piece: &mut Piece) -> Result<(), TooLong> {
        let head = &self.head[..self.have];
        let Some((kind, rest)) = integer(head) else {
            return Ok(());
        };
        if std::mem::take(&mut self.expects_type) {
            self.have = 0;
            return Ok(());
        }
        let Some((len, _)) = integer(rest) else {
            return Ok(());
        };
        self.have = 0;
        self.left = len;
        self.is_data = kind == DATA;
        match kind {
            DATA if len == 0 => piece.empty_data += 1,
            DATA => {}
            _ if len > self.max_len => return Err(TooLong),
            _ => {}
        }
        match (kind, len) {
            (DATA | HEADERS, 1..) => piece.useful += 1,
            _ => piece.other += 1,
        }
        Ok(())
    }
}

/// A variable-length integer, and what is behind it.
fn integer(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let first = *bytes.first()?;
    let len = 1 << (first >> 6);
    let (bytes, rest) = bytes.split_at_checked(len)?;
    let value = bytes[1..]
        .iter()
        .fold(u64::from(first & 0x3f), |value, byte| {
            value << 8 | u64::from(*byte)
        });
    Some((value, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put(stream: &mut Vec<u8>, value: u32) {
        stream.extend((value | 0x8000_0000).to_be_bytes());
    }

    fn frame(stream: &mut Vec<u8>, kind: u32, len: u32) {
        put(stream, kind);
        put(stream, len);
        stream.extend(std::iter::repeat_n(0xff, len as usize));
    }

    fn sum(one: Piece, other: Piece) -> Piece {
        Piece {
            data_len: one.data_len + other.data_len,
            empty_data: one.empty_data + other.empty_data,
            useful: one.useful + other.useful,
            other: one.other + other.other,
        }
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_add_up_to_the_whole(
            wanted in proptest::collection::vec((0..4_u32, 0..40_u32), 0..20),
            size in 1..50_usize,
        ) {
            let mut stream = Vec::new();
            let mut expected = Piece::default();
            for &(kind, len) in &wanted {
                frame(&mut stream, kind, len);
                if kind == 0 {
                    expected.data_len += len as usize;
                    expected.empty_data += usize::from(len == 0);
                }
                match kind < 2 && len > 0 {
                    true => expected.useful += 1,
                    false => expected.other += 1,
                }
            }
            let mut frames = Frames::of_request(40);
            let pieces = stream.chunks(size).map(|piece| frames.read(piece).unwrap());
            prop_assert_eq!(pieces.fold(Piece::default(), sum), expected);
            prop_assert!(frames.is_whole());
        }
    }

    #[test]
    fn only_data_may_be_long() {
        let mut stream = Vec::new();
        put(&mut stream, 0);
        put(&mut stream, 1 << 29);
        let mut frames = Frames::of_request(100);
        assert!(frames.read(&stream).is_ok());
        assert!(!frames.is_whole());
        for kind in [1, 0x21] {
            let mut stream = Vec::new();
            put(&mut stream, kind);
            put(&mut stream, 101);
            assert_eq!(Frames::of_request(100).read(&stream), Err(TooLong));
        }
    }

    #[test]
    fn the_type_of_a_control_stream_is_no_frame() {
        let mut frames = Frames::of_control(100);
        // The type, and empty SETTINGS.
        let piece = frames.read(&[0, 4, 0]).unwrap();
        assert_eq!(piece.other, 1);
        assert!(frames.is_whole());
    }
}
