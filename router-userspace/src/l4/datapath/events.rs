//! Sampled packets, as the programs report them.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::Context;
use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use router_common::{Addr, PacketEvent, RingSlot};

use super::take;

/// The one reader of `EVENTS`. Its descriptor is readable while there is something to read.
///
/// The ring holds 256 KiB; what the programs report beyond is lost, and counted
/// ([`super::Counters::events_lost`]).
pub struct Events(RingBuf<MapData>);

impl Events {
    pub(super) fn take(ebpf: &mut Ebpf) -> anyhow::Result<Events> {
        let map = take(ebpf, "EVENTS")?;
        Ok(Events(RingBuf::try_from(map).context("map EVENTS")?))
    }
}

impl Iterator for Events {
    type Item = PacketEvent;

    /// The next that is there; does not wait.
    fn next(&mut self) -> Option<PacketEvent> {
        loop {
            let record = self.0.next()?;
            if let Some(event) = parse(&record) {
                return Some(event);
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// In the order of the fields, which leave no gaps.
fn parse(record: &[u8]) -> Option<PacketEvent> {
    let mut fields = Fields(record);
    Some(PacketEvent {
        monotonic_ns: u64::from_ne_bytes(fields.take()?),
        source: fields.addr()?,
        destination: fields.addr()?,
        source_port: u16::from_ne_bytes(fields.take()?),
        destination_port: u16::from_ne_bytes(fields.take()?),
        len: fields.word()?,
        ifindex: fields.word()?,
        vip: fields.word()?,
        backend: fields.word()?,
        slot: fields.word()?,
        slot_content: RingSlot(fields.word()?),
        verdict: fields.word()?,
        proto: fields.octet()?,
        mode: fields.octet()?,
        flow_state: fields.octet()?,
        asked_table: fields.octet()?,
        asked_ring: fields.octet()?,
        reserved: fields.take()?,
    })
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    fn octet(&mut self) -> Option<u8> {
        self.take::<1>().map(|[octet]| octet)
    }

    fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn addr(&mut self) -> Option<Addr> {
        let words = [self.word()?, self.word()?, self.word()?, self.word()?];
        Some(Addr::from_words(words))
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_record_is_read_field_by_field() {
        let mut record = vec![0; size_of::<PacketEvent>()];
        let mut put = |offset: usize, bytes: &[u8]| {
            record[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(offset_of!(PacketEvent, monotonic_ns), &7u64.to_ne_bytes());
        let mapped = Ipv4Addr::new(192, 0, 2, 10).to_ipv6_mapped().octets();
        put(offset_of!(PacketEvent, destination), &mapped);
        put(
            offset_of!(PacketEvent, destination_port),
            &80u16.to_ne_bytes(),
        );
        put(offset_of!(PacketEvent, len), &60u32.to_ne_bytes());
        put(offset_of!(PacketEvent, backend), &5u32.to_ne_bytes());
        put(offset_of!(PacketEvent, verdict), &4u32.to_ne_bytes());
        put(offset_of!(PacketEvent, proto), &[6]);
        put(offset_of!(PacketEvent, asked_ring), &[1]);
        let expected = PacketEvent {
            monotonic_ns: 7,
            destination: Addr::from(Ipv4Addr::new(192, 0, 2, 10)),
            destination_port: 80,
            len: 60,
            backend: 5,
            verdict: 4,
            proto: 6,
            asked_ring: 1,
            ..PacketEvent::default()
        };
        assert_eq!(parse(&record), Some(expected));
        assert_eq!(parse(&record[1..]), None);
    }
}
