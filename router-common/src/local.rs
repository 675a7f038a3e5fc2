//! What is remembered of the sockets of this host that dial VIPs.
//!
//! Their packets carry the backend's address from the start, so all that is left to do is to tell the
//! application of the VIP it dialed, and to count.

use crate::Addr;

/// The address and port of a socket's peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    pub addr: Addr,
    /// Host byte order.
    pub port: u16,
    pub reserved: u16,
}

impl Peer {
    #[inline(always)]
    pub const fn new(addr: Addr, port: u16) -> Peer {
        Peer {
            addr,
            port,
            reserved: 0,
        }
    }
}

/// `generation:16 | backend:16`: the backend that a socket counts for. 0 is none.
///
/// One word, so that whoever takes it away counts down, and nobody twice.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalFlow(pub u64);

impl LocalFlow {
    #[inline(always)]
    pub const fn new(backend: u32, generation: u16) -> LocalFlow {
        LocalFlow((generation as u64) << 16 | (backend & 0xffff) as u64)
    }

    #[inline(always)]
    pub const fn backend(self) -> u32 {
        self.0 as u32 & 0xffff
    }

    /// Of the backend's entry when the flow was made.
    #[inline(always)]
    pub const fn generation(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// A socket that dialed a VIP; value of `LOCAL_SOCKETS`, which the kernel keeps with the socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalSocket {
    /// What it counts for while it is connected.
    pub flow: LocalFlow,
    /// The VIP; zero for a socket that only sends datagrams to addresses it names each time.
    pub dialed: Peer,
    /// Who has its packets instead.
    pub backend: Peer,
}

/// Which of two addresses a [`LocalPeerKey`] is about.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The VIP that a datagram is sent to.
    Dialed = 0,
    /// The backend that an answer comes from.
    Backend = 1,
}

/// Key of `LOCAL_PEERS`: an address that a socket without a connection sends to or hears from.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalPeerKey {
    /// The kernel's number of the socket, never given twice.
    pub cookie: u64,
    pub peer: Peer,
    /// A [`Side`].
    pub side: u32,
}

/// Value of `LOCAL_PEERS`: the address on the other side.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalPeer {
    pub peer: Peer,
    pub backend: u16,
    /// Of the backend's entry when the pair was made.
    pub generation: u16,
    /// Ticks when it was last used, as in [`crate::FlowSlot`].
    pub seen: u32,
}

const _: () = assert!(size_of::<Peer>() == 20);
const _: () = assert!(size_of::<LocalSocket>() == 48);
const _: () = assert!(size_of::<LocalPeerKey>() == 32);
const _: () = assert!(size_of::<LocalPeer>() == 28);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_flow_reads_back_what_went_in() {
        let flow = LocalFlow::new(crate::MAX_BACKENDS, 0xffff);
        assert_eq!(
            (flow.backend(), flow.generation()),
            (crate::MAX_BACKENDS, 0xffff)
        );
        // Generations in use are not 0, so no flow looks like none.
        assert_ne!(LocalFlow::new(0, 1), LocalFlow::default());
    }
}
