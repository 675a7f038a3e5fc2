//! The server that a QUIC connection ID names, so that a client keeps it from whatever address.
//!
//! Connection IDs as of draft-ietf-quic-load-balancers-21, §3 and §5.2, unencrypted: an octet whose first
//! three bits tell the configuration, then the server ID.

use router_common::{NO_BACKEND, QuicKey};

use crate::frame::{Frame, at};
use crate::maps;
use crate::packet::{Packet, UDP_LEN};
use crate::vip::Vip;

/// RFC 8999 §5.1: a long header has the first bit set, then a version, and the length of the ID.
const LONG_HEADER: u8 = 0x80;
const LONG_ID_AT: u32 = 6;
/// RFC 9000 §17.3.1: a short header has the ID behind its first octet.
const SHORT_ID_AT: u32 = 1;
const LONGEST_SERVER_ID: usize = 8;

/// The backend id of the server that a datagram's connection ID names; `None` if it names none of the
/// VIP's, as those that clients make up for their first datagram.
#[inline(always)]
pub fn server(frame: &impl Frame, packet: &Packet, vip: Vip) -> Option<u32> {
    let payload = packet.l4 + UDP_LEN;
    let first = at::<u8>(frame, payload)?;
    // SAFETY: `at` checked that it lies in the frame, as below.
    let id_at = if unsafe { *first } & LONG_HEADER != 0 {
        LONG_ID_AT
    } else {
        SHORT_ID_AT
    };
    // One octet of configuration, and the longest server ID: IDs are padded to look alike (§5.2), and
    // what is behind a short one is ciphertext of 16 octets at least (RFC 9001 §5.4.2).
    let id = at::<[u8; 1 + LONGEST_SERVER_ID]>(frame, payload + id_at)?;
    // SAFETY: as above.
    let id = unsafe { &*id };
    if id[0] >> 5 != vip.entry.quic_config {
        return None;
    }
    let mut key = QuicKey {
        vip: vip.index,
        reserved: 0,
        server: [0; LONGEST_SERVER_ID],
    };
    for octet in 0..LONGEST_SERVER_ID {
        if octet < vip.entry.quic_len as usize {
            key.server[octet] = id[1 + octet];
        }
    }
    // SAFETY: the value is read at once; the agent only ever replaces it whole.
    let backend = unsafe { maps::QUIC_SERVERS.get(key) }?;
    (*backend != NO_BACKEND).then_some(*backend)
}
