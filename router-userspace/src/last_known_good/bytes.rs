//! Numbers and texts as the file has them: variable-length integers (LEB128), texts behind their length.

use std::io::{self, Write};
use std::sync::Arc;

/// Writes, and keeps the checksum and length of what was written.
pub struct Encoder<W: Write> {
    out: W,
    checksum: crc32fast::Hasher,
    length: u64,
}

impl<W: Write> Encoder<W> {
    pub fn new(out: W) -> Encoder<W> {
        Encoder {
            out,
            checksum: crc32fast::Hasher::new(),
            length: 0,
        }
    }

    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.checksum.update(bytes);
        self.length += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    pub fn byte(&mut self, byte: u8) -> io::Result<()> {
        self.raw(&[byte])
    }

    pub fn flag(&mut self, flag: bool) -> io::Result<()> {
        self.byte(flag.into())
    }

    pub fn number(&mut self, mut number: u64) -> io::Result<()> {
        let mut bytes = [0; 10];
        let mut length = 0;
        while number >= 0x80 {
            bytes[length] = number as u8 | 0x80;
            number >>= 7;
            length += 1;
        }
        bytes[length] = number as u8;
        self.raw(&bytes[..=length])
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.number(bytes.len() as u64)?;
        self.raw(bytes)
    }

    pub fn text(&mut self, text: &str) -> io::Result<()> {
        self.bytes(text.as_bytes())
    }

    pub fn option<T>(
        &mut self,
        value: Option<T>,
        write: impl FnOnce(&mut Encoder<W>, T) -> io::Result<()>,
    ) -> io::Result<()> {
        self.flag(value.is_some())?;
        value.map_or(Ok(()), |value| write(self, value))
    }

    pub fn list<T>(
        &mut self,
        list: &[T],
        mut write: impl FnMut(&mut Encoder<W>, &T) -> io::Result<()>,
    ) -> io::Result<()> {
        self.number(list.len() as u64)?;
        list.iter().try_for_each(|item| write(self, item))
    }

    pub fn text_option(&mut self, text: Option<&Arc<str>>) -> io::Result<()> {
        self.option(text, |out, text| out.text(text))
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    /// The checksum of all that was written, and where it went.
    pub fn finish(self) -> (u32, W) {
        (self.checksum.finalize(), self.out)
    }
}

/// What is left to read. Each method takes from its beginning; `None`: not what was asked for.
pub struct Decoder<'a>(pub &'a [u8]);

impl<'a> Decoder<'a> {
    pub fn raw(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn byte(&mut self) -> Option<u8> {
        Some(self.raw(1)?[0])
    }

    pub fn flag(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            2.. => None,
        }
    }

    pub fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if (bits << shift) >> shift != bits {
                return None;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    /// A number of a smaller type.
    pub fn small<T: TryFrom<u64>>(&mut self) -> Option<T> {
        self.number()?.try_into().ok()
    }

    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.small()?;
        self.raw(length)
    }

    pub fn str(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    pub fn text(&mut self) -> Option<Arc<str>> {
        self.str().map(Arc::from)
    }

    pub fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Decoder<'a>) -> Option<T>,
    ) -> Option<Option<T>> {
        match self.flag()? {
            true => read(self).map(Some),
            false => Some(None),
        }
    }

    /// Each item takes a byte at least, so that a wrong count ends with the input.
    pub fn list<T>(
        &mut self,
        mut read: impl FnMut(&mut Decoder<'a>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let count: usize = self.small()?;
        let mut list = Vec::with_capacity(count.min(self.0.len()).min(64));
        for _ in 0..count {
            list.push(read(self)?);
        }
        Some(list)
    }

    pub fn text_option(&mut self) -> Option<Option<Arc<str>>> {
        self.option(Decoder::text)
    }
}
