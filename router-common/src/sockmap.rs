//! What `viaduct_sockmap` and the agent agree on: the mark, and whose bytes go past TCP.

/// The mark (SO_MARK, socket(7)) of the proxy's connections that may leave TCP.
pub const SOCKMAP_MARK: u32 = 0x5642_0000;

/// Most bytes of one response that go past TCP, read or not: what a client that reads slowly can make
/// the kernel hold for a connection beyond TCP's own buffers.
pub const SOCKMAP_BYTES: u32 = 256 * 1024;

/// A bit of `DIRECTIONS`: from the proxy to the backend.
pub const REQUESTS: u32 = 1;
/// A bit of `DIRECTIONS`: from the backend to the proxy.
pub const RESPONSES: u32 = 2;
