//! What `viaduct_redirect` and the proxy agree on about connections whose bytes pass TCP by.

/// The mark (SO_MARK, socket(7)) of such connections: the low half tells one agent's from another's.
pub const SOCKMAP_MARK: u32 = 0x5642_0000;

/// What one end may have sent since the other last did, for all that is known unread by it, until it
/// goes on by TCP: the bytes, and [`SOCKMAP_MESSAGE_BYTES`] for each message. The kernel keeps to no
/// SO_RCVBUF here.
pub const SOCKMAP_BYTES: u32 = 256 * 1024;

/// What the kernel needs for a message besides its bytes (`struct sk_msg`), rounded up.
pub const SOCKMAP_MESSAGE_BYTES: u32 = 1024;

/// Sockets that can be in the map, two for a connection.
pub const SOCKMAP_SOCKETS: u32 = 65_536;

/// What `SOCKMAP_COUNTERS` counts.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SockmapCounter {
    /// Connections with both ends on this host.
    Connections = 0,
    /// Ends that went over to TCP, because too much may have been unread or the other end was not
    /// there.
    Fallbacks = 1,
}

impl SockmapCounter {
    pub const COUNT: u32 = 2;
}
