//! How a peer that vanished without a word is noticed: by the kernel, which ends its connection.
//!
//! Requests have timeouts of their own; a tunnel has none, and may rightly be silent for hours.
//! Listeners set [`keep_alive`] for the client connections they accept, backend connections get it
//! when they are opened, and both sides of a tunnel [`limit_unacknowledged`] when it begins.

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// How long a connection is silent before its peer is asked whether it is there, how often it is
/// asked, and how many answers may be missing: it is gone after 90 s.
const SILENCE: Duration = Duration::from_secs(60);
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
const PROBE_COUNT: u32 = 3;

/// How long sent bytes may stay unacknowledged, or a peer that still answers may take no more of
/// them (tcp(7), TCP_USER_TIMEOUT). Keepalive probes are not sent while bytes are outstanding.
const UNACKNOWLEDGED: Duration = Duration::from_secs(300);

pub(super) fn keep_alive(socket: SockRef<'_>) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(SILENCE)
        .with_interval(PROBE_INTERVAL)
        .with_retries(PROBE_COUNT);
    socket.set_tcp_keepalive(&keepalive)
}

pub(super) fn limit_unacknowledged(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))
}
