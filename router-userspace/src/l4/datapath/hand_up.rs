//! Connections to VIPs of `l7` mode, handed to the proxy's listeners.

use std::fs::File;
use std::net::TcpListener;

use anyhow::Context;
use aya::maps::SockMap;
use aya::programs::SkLookup;
use router_common::{LISTENER_V4, LISTENER_V6};

use super::{Datapath, programs, take};

impl Datapath {
    /// Has the kernel hand connections to VIPs of `l7` mode to the first of `listeners` of either
    /// family, in this thread's network namespace and for as long as this process runs: nothing is
    /// pinned, since there is nobody to hand them to without the proxy. Called again, to others.
    ///
    /// # Errors
    /// The kernel refused the program or a listener.
    pub fn hand_up_to(&mut self, listeners: &[TcpListener]) -> anyhow::Result<()> {
        let of_family = |ipv4: bool| {
            let is = |listener: &&TcpListener| {
                let address = listener.local_addr();
                address.is_ok_and(|address| address.is_ipv4() == ipv4)
            };
            listeners.iter().find(is)
        };
        let v6 = of_family(false);
        // A listener of IPv6 may take IPv4 as well.
        let v4 = of_family(true).or(v6);
        let first_call = self.listeners.is_none();
        let map = match &mut self.listeners {
            Some(map) => map,
            none => none.insert(SockMap::try_from(take(&mut self.ebpf, "LISTENERS")?)?),
        };
        for (index, listener) in [(LISTENER_V4, v4), (LISTENER_V6, v6)] {
            if let Some(listener) = listener {
                map.set(index, listener, 0).context("write LISTENERS")?;
            }
        }
        if !first_call {
            return Ok(());
        }
        let program: &mut SkLookup = self
            .ebpf
            .program_mut(programs::SK_LOOKUP)
            .with_context(|| format!("no program {}", programs::SK_LOOKUP))?
            .try_into()
            .context("the program is of another kind")?;
        let netns = File::open("/proc/thread-self/ns/net").context("open the namespace")?;
        program
            .attach(netns)
            .context("attach to the lookup of sockets")?;
        Ok(())
    }
}
