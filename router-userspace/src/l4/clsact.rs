//! Takes the clsact queueing discipline off a device when nothing is left on it.
//!
//! Where the kernel has no tcx, our filter hangs there; whoever removes the filter calls this.

use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcHandle, TcMessage};

use crate::l4::netlink;

/// # Errors
/// rtnetlink does not answer, or refuses.
pub(super) fn remove_if_empty(ifindex: u32) -> anyhow::Result<()> {
    for minor in [TcHandle::MIN_INGRESS, TcHandle::MIN_EGRESS] {
        let side = TcHandle {
            minor,
            ..TcHandle::CLSACT
        };
        let filters = netlink::dump(RouteNetlinkMessage::GetTrafficFilter(at(ifindex, side)))?;
        if !filters.is_empty() {
            return Ok(());
        }
    }
    let mut clsact = at(ifindex, TcHandle::CLSACT);
    clsact.header.handle = TcHandle {
        minor: 0,
        ..TcHandle::CLSACT
    };
    netlink::send(RouteNetlinkMessage::DelQueueDiscipline(clsact), 0)?;
    Ok(())
}

fn at(ifindex: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = ifindex.cast_signed();
    message.header.parent = parent;
    message
}
